package dist

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"margo/engine"
)

// Group is a group of ranks over TCP. It is an engine.Comm for streams of any device:
// tensors travel through the host, and calls wait for the stream. Close may be called by
// another goroutine while a call waits for other ranks, which ends it.
type Group struct {
	place Place
	limit time.Duration
	seq   uint32 // collectives so far

	calling sync.Mutex // held by the collective that is under way, and taken before mu
	mu      sync.Mutex // guards what follows, and the deadlines of connections
	peers   []net.Conn // rank 0: of every other rank; else peers[0] only; none once the group is broken
	broken  error
}

var _ engine.Comm = (*Group)(nil)

// Rank is this process's number.
func (g *Group) Rank() int { return g.place.Rank }

// Size is the number of ranks.
func (g *Group) Size() int { return g.place.Size }

// Collectives, as they are named in headers.
const (
	opReady = iota + 1
	opError
	opSum
	opBroadcast
	opBarrier
	opAgree
)

var opNames = map[uint8]string{opReady: "join", opSum: "all-reduce", opBroadcast: "broadcast", opBarrier: "barrier", opAgree: "agreement"}

// header goes before every message: what is called, the how manieth call it is, of
// what dtype, from which root, and the bytes that follow.
type header struct {
	op, dtype uint8
	root      uint16
	seq       uint32
	bytes     uint64
}

func (h header) String() string {
	switch h.op {
	case opSum:
		return fmt.Sprintf("all-reduce of %d bytes of %v", h.bytes, engine.DType(h.dtype))
	case opBroadcast:
		return fmt.Sprintf("broadcast of %d bytes of %v from rank %d", h.bytes, engine.DType(h.dtype), h.root)
	}
	return opNames[h.op]
}

func writeHeader(c io.Writer, h header) error {
	b := []byte{h.op, h.dtype}
	b = binary.LittleEndian.AppendUint16(b, h.root)
	b = binary.LittleEndian.AppendUint32(b, h.seq)
	_, err := c.Write(binary.LittleEndian.AppendUint64(b, h.bytes))
	return err
}

// writeError sends the text of an error in the place of a header. Nothing more can be
// done about a peer that does not take it.
func writeError(c net.Conn, text string) {
	text = text[:min(len(text), maxText)]
	c.SetWriteDeadline(time.Now().Add(helloWait))
	if writeHeader(c, header{op: opError, bytes: uint64(len(text))}) == nil {
		io.WriteString(c, text)
	}
}

// readHeader reads a header, which must be want.
func readHeader(c io.Reader, want header) (header, error) {
	var b [16]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			err = errors.New("it is gone")
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = errors.New("it did not come in time")
		}
		return header{}, err
	}
	h := header{b[0], b[1], binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint64(b[8:])}
	if h.op == opError && h.bytes <= maxText {
		text := make([]byte, h.bytes)
		if _, err := io.ReadFull(c, text); err != nil {
			return h, err
		}
		return h, fmt.Errorf("it says %q", text)
	}
	if h != want {
		return h, fmt.Errorf("it calls %v (call %d), this rank %v (call %d)", h, h.seq, want, want.seq)
	}
	return h, nil
}

// collect runs one collective: the data of every rank that sends is combined on rank 0
// in the order of ranks, and data becomes the result on all.
func (g *Group) collect(h header, data []byte, combine func(rank int, theirs []byte) error) error {
	g.calling.Lock()
	defer g.calling.Unlock()
	g.mu.Lock()
	broken, peers := g.broken, g.peers
	g.mu.Unlock()
	if broken != nil {
		return broken
	}
	if g.place.Size == 1 {
		return nil
	}
	g.seq++
	h.seq, h.bytes = g.seq, uint64(len(data))
	until := func(c net.Conn, times time.Duration) {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.broken == nil { // else Close has ended the call
			c.SetDeadline(time.Now().Add(times * g.limit))
		}
	}
	sends := func(rank int) bool {
		return h.op == opSum || h.op == opAgree || h.op == opBroadcast && rank == int(h.root)
	}
	if c := peers[0]; g.place.Rank != 0 {
		until(c, 2) // rank 0's error, which names who is late, comes first
		err := writeHeader(c, h)
		if err == nil && sends(g.place.Rank) {
			_, err = c.Write(data)
		}
		// A failed write leaves the reason to be read, if rank 0 sent one.
		if _, err2 := readHeader(c, h); err2 != nil {
			err = err2
		}
		if err == nil && h.op != opBarrier {
			_, err = io.ReadFull(c, data)
		}
		if err != nil {
			return g.breakUp(fault("%s: rank %d hears of rank 0: %w", opNames[h.op], g.place.Rank, err))
		}
		return nil
	}
	theirs := make([]byte, len(data))
	for r, c := range peers {
		if r == 0 {
			continue
		}
		until(c, 1)
		_, err := readHeader(c, h)
		if err == nil && sends(r) {
			if _, err = io.ReadFull(c, theirs); err == nil {
				err = combine(r, theirs)
			}
		}
		if err != nil {
			return g.breakUp(fault("%s: rank %d: %w", opNames[h.op], r, err))
		}
	}
	for r, c := range peers {
		if r == 0 {
			continue
		}
		until(c, 1)
		err := writeHeader(c, h)
		if err == nil && h.op != opBarrier {
			_, err = c.Write(data)
		}
		if err != nil {
			return g.breakUp(fault("%s: answering rank %d: %w", opNames[h.op], r, err))
		}
	}
	return nil
}

// breakUp makes err the group's last word: rank 0 tells it to all, everybody hangs up. Where Close has ended the
// call, that is why, and Close hangs up.
func (g *Group) breakUp(err error) error {
	g.mu.Lock()
	broken := g.broken
	if broken == nil {
		g.broken = err
	}
	g.mu.Unlock()
	if broken != nil {
		return broken
	}
	if g.place.Rank == 0 {
		g.refuseAll(err)
	}
	g.hangUp()
	return err
}

func (g *Group) hangUp() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.peers {
		if c == nil {
			continue
		}
		if t, ok := c.(*net.TCPConn); ok && g.place.Rank == 0 {
			// A reset would overtake the text of an error: end our side, and read what is
			// under way for a moment.
			t.CloseWrite()
			t.SetReadDeadline(time.Now().Add(helloWait))
			go func() { io.Copy(io.Discard, t); t.Close() }()
		} else {
			c.Close()
		}
	}
	g.peers = nil
}

// Close leaves the group: the others learn of it in their next call. A call of this rank's that waits for others, in
// another goroutine, ends with an error.
func (g *Group) Close() error {
	g.mu.Lock()
	open := g.broken == nil
	if open {
		g.broken = fault("rank %d has left the group", g.place.Rank)
		for _, c := range g.peers {
			if c != nil {
				c.SetDeadline(time.Unix(1, 0))
			}
		}
	}
	g.mu.Unlock()
	if open {
		g.calling.Lock() // what reads from the connections has ended
		defer g.calling.Unlock()
		g.hangUp()
	}
	return nil
}

// Barrier waits until every rank has called it, at most the group's time limit.
func (g *Group) Barrier() error {
	return g.collect(header{op: opBarrier}, nil, nil)
}

// agreeText is how much of a text travels with its hash, for messages.
const agreeText = 256

// Agree waits like Barrier, and is an error on every rank unless all call it with the
// same text: what they are about to do by other means, which would not notice.
func (g *Group) Agree(text string) error {
	hash := sha256.Sum256([]byte(text))
	data := make([]byte, len(hash)+agreeText)
	copy(data[copy(data, hash[:]):], text)
	return g.collect(header{op: opAgree}, data, func(_ int, theirs []byte) error {
		if bytes.Equal(theirs, data) {
			return nil
		}
		said := func(b []byte) []byte { return bytes.TrimRight(b[len(hash):], "\x00") }
		return fmt.Errorf("it says %q, rank 0 %q", said(theirs), said(data))
	})
}

// SumBytes and BroadcastBytes are AllReduce and Broadcast of host memory, little
// endian.

// SumBytes replaces data, elements of d, by its sum over the ranks.
func (g *Group) SumBytes(d engine.DType, data []byte) error {
	if len(data)%d.Size() != 0 {
		return bad("all-reduce: %d bytes of %v", len(data), d)
	}
	if g.place.Rank != 0 || d != engine.BF16 {
		return g.collect(header{op: opSum, dtype: uint8(d)}, data, func(_ int, theirs []byte) error {
			add(d, data, theirs)
			return nil
		})
	}
	wide := make([]float32, len(data)/2) // BF16 is rounded once
	for i := range wide {
		wide[i] = engine.FromBF16(binary.LittleEndian.Uint16(data[2*i:]))
	}
	return g.collect(header{op: opSum, dtype: uint8(d)}, data, func(rank int, theirs []byte) error {
		for i := range wide {
			wide[i] += engine.FromBF16(binary.LittleEndian.Uint16(theirs[2*i:]))
			if rank == g.place.Size-1 {
				binary.LittleEndian.PutUint16(data[2*i:], engine.ToBF16(wide[i]))
			}
		}
		return nil
	})
}

// add adds four-byte elements.
func add(d engine.DType, sum, x []byte) {
	for i := 0; i < len(sum); i += 4 {
		a, b := binary.LittleEndian.Uint32(sum[i:]), binary.LittleEndian.Uint32(x[i:])
		if d == engine.F32 {
			a = math.Float32bits(math.Float32frombits(a) + math.Float32frombits(b))
		} else {
			a += b
		}
		binary.LittleEndian.PutUint32(sum[i:], a)
	}
}

// BroadcastBytes replaces data by that of rank root.
func (g *Group) BroadcastBytes(root int, data []byte) error {
	return g.broadcast(root, engine.I32, data)
}

func (g *Group) broadcast(root int, d engine.DType, data []byte) error {
	if root < 0 || root >= g.place.Size {
		return bad("broadcast from rank %d of %d", root, g.place.Size)
	}
	return g.collect(header{op: opBroadcast, dtype: uint8(d), root: uint16(root)}, data,
		func(_ int, theirs []byte) error {
			copy(data, theirs)
			return nil
		})
}

// AllReduce sums tensors over the ranks, in their order; see engine.Comm.
func (g *Group) AllReduce(s engine.Stream, tensors ...*engine.Tensor) error {
	return g.each("all-reduce", s, tensors, func(t *engine.Tensor, data []byte) error { return g.SumBytes(t.DType, data) })
}

// Broadcast replaces tensors by those of rank root.
func (g *Group) Broadcast(s engine.Stream, root int, tensors ...*engine.Tensor) error {
	return g.each("broadcast", s, tensors, func(t *engine.Tensor, data []byte) error { return g.broadcast(root, t.DType, data) })
}

// each takes tensors through the host. A group of one has nothing to do, but the same
// arguments are refused.
func (g *Group) each(op string, s engine.Stream, tensors []*engine.Tensor, f func(*engine.Tensor, []byte) error) error {
	for _, t := range tensors {
		if t == nil || !t.Contiguous() {
			return engine.Errorf(op, engine.Invalid, "%v is not a contiguous tensor", t)
		}
	}
	for _, t := range tensors {
		data := make([]byte, t.Bytes())
		err := s.CopyOut(data, t)
		if err == nil {
			err = f(t, data)
		}
		if err == nil {
			err = s.CopyIn(t, data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
