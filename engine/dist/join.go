package dist

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"margo/engine"
)

const (
	maxRanks  = 4096
	magic     = "margo-ranks-1\n\x00\x00" // of a hello; another version has another magic
	helloSize = len(magic) + 8 + sha256.Size
	maxText   = 4096 // bytes of an error's text
)

// helloWait is how long a connection may take to say who it is: others wait behind it.
const helloWait = 2 * time.Second

// Join meets the other ranks: rank 0 listens at p.Addr, the others call it until it
// answers. It returns when all are there, or after limit, or when ctx ends, with an
// error that says who was missing. limit is also the group's time limit for a rank to
// come to a collective. A group of one needs no network.
func Join(ctx context.Context, p Place, limit time.Duration) (*Group, error) {
	if p.Size < 1 || p.Size > maxRanks || p.Rank < 0 || p.Rank >= p.Size || limit <= 0 {
		return nil, bad("rank %d of %d, %v to wait", p.Rank, p.Size, limit)
	}
	g := &Group{place: p, limit: limit, peers: make([]net.Conn, p.Size)}
	if p.Size == 1 {
		return g, nil
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var err error
	if p.Rank == 0 {
		err = g.gather(ctx)
	} else {
		err = g.call(ctx)
	}
	if err != nil {
		g.hangUp()
		return nil, err
	}
	return g, nil
}

func fault(format string, a ...any) error {
	return engine.Errorf("ranks", engine.CommFault, format, a...)
}

// hello is what a rank says first: magic, rank, size, hash of the job's name.
func hello(p *Place) []byte {
	b := append(make([]byte, 0, helloSize), magic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(p.Rank))
	b = binary.LittleEndian.AppendUint32(b, uint32(p.Size))
	job := sha256.Sum256([]byte(p.Job))
	return append(b, job[:]...)
}

// gather accepts the other ranks. Strangers (a port scanner, a rank of another job)
// are turned away; a rank that comes twice or counts differently ends the group.
func (g *Group) gather(ctx context.Context) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", g.place.Addr)
	if err != nil {
		return fault("rank 0 cannot listen at %s: %w", g.place.Addr, err)
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	want := hello(&g.place)
	for missing := g.place.Size - 1; missing > 0; {
		c, err := l.Accept()
		if err != nil {
			return g.refuseAll(fault("%w: rank 0 at %s waits for %s", because(ctx, err), g.place.Addr, g.absent()))
		}
		b := make([]byte, helloSize)
		c.SetDeadline(time.Now().Add(helloWait))
		if _, err := io.ReadFull(c, b); err != nil || string(b[:len(magic)]) != magic {
			c.Close()
			continue
		}
		if string(b[len(magic)+8:]) != string(want[len(magic)+8:]) {
			writeError(c, "rank 0 belongs to another job")
			c.Close()
			continue
		}
		rank, size := int(binary.LittleEndian.Uint32(b[len(magic):])), int(binary.LittleEndian.Uint32(b[len(magic)+4:]))
		switch {
		case size != g.place.Size:
			err = fault("rank %d counts %d ranks, rank 0 counts %d", rank, size, g.place.Size)
		case rank < 1 || rank >= size:
			err = fault("a process calls itself rank %d of %d", rank, size)
		case g.peers[rank] != nil:
			err = fault("two processes call themselves rank %d", rank)
		}
		if err != nil {
			writeError(c, err.Error())
			c.Close()
			return g.refuseAll(err)
		}
		g.peers[rank] = c
		missing--
	}
	for _, c := range g.peers[1:] {
		c.SetDeadline(time.Now().Add(g.limit))
		if err := writeHeader(c, header{op: opReady}); err != nil {
			return g.refuseAll(fault("answering a rank: %w", err))
		}
	}
	return nil
}

// because prefers the context's reason over that of the connection it closed.
func because(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return errors.New("time is up")
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}

// absent lists the ranks that have not come, at most eight of them.
func (g *Group) absent() string {
	text, more := "rank", 0
	for r := 1; r < g.place.Size; r++ {
		switch {
		case g.peers[r] != nil:
		case more < 8:
			text += fmt.Sprintf(" %d", r)
			more++
		default:
			return text + " …"
		}
	}
	return text
}

// refuseAll tells those who came why there is no group, and returns err.
func (g *Group) refuseAll(err error) error {
	for _, c := range g.peers {
		if c != nil {
			writeError(c, err.Error())
		}
	}
	return err
}

// call calls rank 0 until it answers: it may not be up yet.
func (g *Group) call(ctx context.Context) error {
	var d net.Dialer
	for {
		c, err := d.DialContext(ctx, "tcp", g.place.Addr)
		if err == nil {
			g.peers[0] = c
			break
		}
		select {
		case <-ctx.Done():
			return fault("rank %d reaches no rank 0 at %s: %w (%w)", g.place.Rank, g.place.Addr, because(ctx, err), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	c := g.peers[0]
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := c.Write(hello(&g.place))
	if err == nil {
		// Rank 0's limit may have begun later: its reason is better than ours.
		_, err = readHeader(c, header{op: opReady})
	}
	if err != nil {
		return fault("rank %d met rank 0 at %s: %w", g.place.Rank, g.place.Addr, because(ctx, err))
	}
	return nil
}
