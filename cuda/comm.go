package cuda

// #include "calls.h"
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unsafe"

	"margo/engine"
)

// Rendezvous is how ranks meet before NCCL connects their devices, and agree about
// what they call: engine/dist's Group. Each call is one of all ranks, with a time
// limit; what goes wrong is an error of kind CommFault on all. Close ends a call that another goroutine waits in.
type Rendezvous interface {
	Rank() int
	Size() int
	SumBytes(d engine.DType, data []byte) error // Σ over the ranks, of every element
	BroadcastBytes(root int, data []byte) error // data of rank root
	Agree(text string) error                    // an error unless all ranks say the same
	Barrier() error
	Close() error
}

// Comm is a group of ranks with a device of this package each, whose tensors NCCL
// sends from device to device. It keeps engine.Comm's promises, with these differences:
//
//   - NCCL adds in an order of its own, which depends on the machine and the number of
//     ranks, and rounds BF16 at every addition: all ranks get the same bits in one run,
//     but not those of ((t_0 + t_1) + t_2) + …. The stand-in of emulated devices adds
//     in that order, BF16 in F32 and rounded once, as engine/dist does.
//   - All ranks need devices of their own: NCCL refuses two ranks on one.
//
// NCCL does not notice when ranks disagree, and waits for ever for a rank that does not
// come. So the ranks agree about each call over the Rendezvous, one round trip to rank 0, in the
// background: AllReduce and Broadcast enqueue and return. Who waits for the stream, or for an event behind such a call, waits
// for that as well, and gets what has gone wrong. A wait gives up when the next collective does not end within the time limit:
// it aborts what NCCL has under way, upon which streams go on, with undefined contents. The host waits
// in a call only where it is a thousand calls ahead of the agreement, or NCCL has to connect ranks first.
// A stream that captures is refused. A mistake of this rank alone (a tensor of another
// device, say) is an error of kind Invalid before anybody else hears of it.
type Comm struct {
	meet  Rendezvous
	dev   *Device
	calls chan call     // for agree, in order
	stop  chan struct{} // closed when broken is set
	ended chan struct{} // closed when agree has returned

	mu     sync.Mutex    // guards what follows
	c      *C.margo_comm // nil once closed
	limit  time.Duration
	asked  uint64        // calls so far
	agreed uint64        // of these, all ranks have made the same
	more   chan struct{} // closed, and made anew, when agreed grows
	broken error
	left   bool  // by Close, which found all well
	cut    error // what Close has ended
}

var _ engine.Comm = (*Comm)(nil)

// NCCLVersion is the version of the NCCL that devices of a kind, "cuda" or "emu", use,
// as "2.32.3"; of an emulator's stand-in, that of its prototypes. NCCL is the library
// that MARGO_NCCL_LIB names, else libnccl.so.2. The error says why there is none.
func NCCLVersion(kind string) (string, error) {
	p, err := load(kind)
	if err != nil {
		return "", err
	}
	v, err := p.ncclVersion()
	if err != nil {
		return "", err
	}
	return versionText(uint64(v)), nil
}

func (p *plugin) ncclVersion() (int, error) {
	if C.m_has_comm(p.api) == 0 {
		return 0, engine.Errorf("open NCCL", engine.Unsupported, "the plugin %s has no entries for ranks", p.path)
	}
	var v C.int32_t
	text := make([]byte, 1024)
	if s := C.m_nccl_version(p.api, &v, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text))); s != C.MARGO_OK {
		return 0, engine.Errorf("open NCCL", kinds[s], "%s", cString(text))
	}
	return int(v), nil
}

// NewComm connects this device with those of the other ranks, which call it too.
// limit is how long a wait may take until the next collective has ended on the device, with all that its stream has
// to do before. What NCCL takes of the device's memory is measured, by what is free, and counted as taken: see Counters. On success the Comm owns meet and closes it. If NCCL is missing or too
// different somewhere the error, on all ranks, is of kind Unsupported, and meet can
// serve as the communicator instead. Where NCCL finds no memory on a rank, all ranks try once more, after their caches were
// given back; then the error is of kind OutOfMemory on that rank, CommFault on the others. So it is where
// the device's limit has no room for it. Close the Comm before the device.
func (d *Device) NewComm(meet Rendezvous, limit time.Duration) (*Comm, error) {
	const op = "join ranks"
	if limit < time.Millisecond {
		return nil, d.errorf(op, engine.Invalid, "a time limit of %v", limit)
	}
	version, missing := d.p.ncclVersion()
	versions, err := everyRanks(meet, version)
	if err != nil {
		return nil, err
	}
	for r, v := range versions {
		switch {
		case v == 0 && missing != nil:
			return nil, d.errorf(op, engine.Unsupported, "%w", missing)
		case v == 0:
			return nil, d.errorf(op, engine.Unsupported, "rank %d of %d has no NCCL", r, meet.Size())
		case v/10000 != versions[0]/10000: // NCCL refuses finer differences itself, if it minds
			return nil, d.errorf(op, engine.Unsupported, "rank %d has NCCL %d, rank 0 has %d", r, v, versions[0])
		}
	}
	c, short, err := d.joinRanks(op, meet, limit)
	if short && err != nil {
		// NCCL found no memory on some rank, which has given back what it had cached. A rank cannot try again by itself.
		if c, short, err = d.joinRanks(op, meet, limit); short && errors.Is(err, engine.OutOfMemory) {
			err = d.errorf(op, engine.OutOfMemory, "twice: %w", err)
		}
	}
	if err != nil {
		return nil, err
	}
	d.ranks.add(c)
	go c.agree()
	return c, nil
}

// How a rank fared.
const (
	failed = iota
	joined
	noMemory
)

// joinRanks makes a communicator, with what NCCL takes of the devices' memory for small collectives. short says, on all
// ranks, that one of them had no memory for it.
func (d *Device) joinRanks(op engine.Op, meet Rendezvous, limit time.Duration) (c *Comm, short bool, err error) {
	rank, size := meet.Rank(), meet.Size()
	// Rank 0 makes the id; a first byte of 0 says that it could not, and a text why.
	message := make([]byte, 1+1024)
	if rank == 0 {
		var id [C.MARGO_COMM_ID_BYTES]C.uint8_t
		if C.m_comm_unique_id(d.p.api, &id[0], (*C.char)(unsafe.Pointer(&message[1])), C.size_t(len(message)-1)) == C.MARGO_OK {
			message[0] = 1
			for i, b := range id {
				message[1+i] = byte(b)
			}
		}
	}
	if err := meet.BroadcastBytes(0, message); err != nil {
		return nil, false, err
	}
	if message[0] == 0 {
		return nil, false, d.errorf(op, engine.Unsupported, "rank 0: %s", cString(message[1:]))
	}
	c = &Comm{meet: meet, dev: d, limit: limit, calls: make(chan call, callsAhead), stop: make(chan struct{}), ended: make(chan struct{}), more: make(chan struct{})}
	args := C.margo_comm_args{size: C.sizeof_margo_comm_args, rank: C.int32_t(rank), ranks: C.int32_t(size), limit_ms: milliseconds(limit)}
	for i := range args.id {
		args.id[i] = C.uint8_t(message[1+i])
	}
	for _, part := range []func() error{
		func() error { return d.status(op, C.m_comm_init(d.p.api, d.ctx, &args, &c.c)) },
		func() error { return c.connect(op) },
		func() error {
			var bytes C.uint64_t
			return d.status(op, C.m_comm_memory(d.p.api, c.c, &bytes))
		},
	} {
		failure, mine := part(), joined
		if errors.Is(failure, engine.OutOfMemory) {
			mine = noMemory
		} else if failure != nil {
			mine = failed
		}
		all, err := everyRanks(meet, mine)
		if err == nil {
			err = failure
		}
		for r, v := range all {
			switch {
			case v == noMemory && !short:
				short = true
				if mine != noMemory { // the cause of what this rank has met
					err = d.errorf(op, engine.CommFault, "rank %d of %d has no memory to join", r, size)
				}
			case v == failed && err == nil:
				err = d.errorf(op, engine.CommFault, "rank %d of %d could not join", r, size)
			}
		}
		if err != nil {
			if c.c != nil {
				C.m_comm_close(d.p.api, c.c)
			}
			return nil, short, err
		}
	}
	return c, false, nil
}

// connect makes a small collective of each kind, for NCCL takes most of its memory when ranks first need each other.
func (c *Comm) connect(op engine.Op) error {
	d := c.dev
	b, err := d.alloc(op, 4, "a collective that connects ranks")
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m := C.margo_mat{p: b.addr, rows: 1, cols: 1, ld: 1, dtype: C.int32_t(engine.I32)}
	err = d.status(op, C.m_broadcast(d.p.api, d.util, c.c, 0, 1, &m))
	if err == nil {
		err = d.status(op, C.m_all_reduce(d.p.api, d.util, c.c, 1, &m))
	}
	if err == nil {
		err = d.status(op, C.m_comm_wait(d.p.api, c.c, milliseconds(c.limit)))
	}
	return errors.Join(err, b.Free())
}

// everyRanks collects a number from every rank.
func everyRanks(meet Rendezvous, mine int) ([]int, error) {
	data := make([]byte, 4*meet.Size())
	binary.LittleEndian.PutUint32(data[4*meet.Rank():], uint32(mine))
	if err := meet.SumBytes(engine.I32, data); err != nil {
		return nil, err
	}
	all := make([]int, meet.Size())
	for r := range all {
		all[r] = int(binary.LittleEndian.Uint32(data[4*r:]))
	}
	return all, nil
}

func milliseconds(t time.Duration) C.int32_t { return C.int32_t(min(t.Milliseconds(), 1<<31-1)) }

// Rank is this process's number.
func (c *Comm) Rank() int { return c.meet.Rank() }

// Size is the number of ranks.
func (c *Comm) Size() int { return c.meet.Size() }

// SetLimit sets NewComm's limit for waits from now on.
func (c *Comm) SetLimit(limit time.Duration) error {
	if limit < time.Millisecond {
		return c.dev.errorf("ranks", engine.Invalid, "a time limit of %v", limit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c == nil {
		return c.broken
	}
	c.limit = limit
	return c.dev.text("ranks", C.m_comm_limit(c.dev.p.api, c.c, milliseconds(limit)))
}

// AllReduce sums tensors over the ranks; see Comm for the order.
func (c *Comm) AllReduce(s engine.Stream, t ...*engine.Tensor) error {
	return c.call("all-reduce", s, -1, t)
}

// Broadcast replaces tensors by those of rank root.
func (c *Comm) Broadcast(s engine.Stream, root int, t ...*engine.Tensor) error {
	if root < 0 || root >= c.Size() {
		return c.dev.errorf("broadcast", engine.Invalid, "from rank %d of %d", root, c.Size())
	}
	return c.call("broadcast", s, root, t)
}

// call enqueues a collective, and has the ranks agree about it in the background; root -1: a sum.
func (c *Comm) call(op engine.Op, stream engine.Stream, root int, tensors []*engine.Tensor) error {
	if err := c.lastWord(); err != nil {
		return err
	}
	s, ok := stream.(*Stream)
	if !ok || s.dev != c.dev {
		return c.dev.errorf(op, engine.Invalid, "the stream is of another device")
	}
	if err := s.ready(op, nil); err != nil {
		return err
	}
	if s.capturing {
		return c.dev.errorf(op, engine.Invalid, "stream is capturing")
	}
	var err error
	var mats []C.margo_mat
	var what strings.Builder
	what.WriteString(string(op))
	if root >= 0 {
		fmt.Fprintf(&what, " from rank %d", root)
	}
	for i, t := range tensors {
		if t == nil || !t.Contiguous() {
			return c.dev.errorf(op, engine.Invalid, "%v is not a contiguous tensor", t)
		}
		m := s.mat(t, &err)
		if err != nil {
			return s.named(op, err)
		}
		if t.Elems() > 0 {
			mats = append(mats, m)
		}
		fmt.Fprintf(&what, "%s %d %v", map[bool]string{true: " of", false: ","}[i == 0], t.Elems(), t.DType)
	}
	n, err := c.ask(call{op: op, text: what.String()})
	if err != nil {
		return err
	}
	c.dev.ranks.comesAfter(s, behind{c: n})
	if len(mats) == 0 {
		return nil
	}
	api := c.dev.p.api
	if root >= 0 {
		err = c.dev.text(op, C.m_broadcast(api, s.s, c.c, C.int32_t(root), C.int64_t(len(mats)), &mats[0]))
	} else {
		err = c.dev.text(op, C.m_all_reduce(api, s.s, c.c, C.int64_t(len(mats)), &mats[0]))
	}
	if err != nil {
		return c.explain(err)
	}
	return nil
}

// Barrier waits for this rank's collectives, and until every rank has called it.
func (c *Comm) Barrier() error {
	if err := c.lastWord(); err != nil {
		return err
	}
	if err := c.dev.text("barrier", C.m_comm_wait(c.dev.p.api, c.c, milliseconds(c.limit))); err != nil {
		return c.explain(err)
	}
	n, err := c.ask(call{op: "barrier"})
	if err != nil {
		return err
	}
	return c.until(n, nil)
}

// Close leaves the group: the others learn of it in their next call.
func (c *Comm) Close() error {
	c.mu.Lock()
	handle, asked := c.c, c.asked
	c.mu.Unlock()
	if handle == nil {
		return nil
	}
	var pending C.int64_t
	alive := c.dev.open("ranks") == nil // of a device that was closed nothing may be touched
	if alive && C.m_comm_pending(c.dev.p.api, handle, &pending) == C.MARGO_OK && pending == 0 {
		// All ranks have made these calls, and others may not have heard yet that they agree.
		c.until(asked, time.After(closeWait))
	}
	c.mu.Lock()
	c.c, c.left = nil, c.broken == nil
	if alive {
		c.cut = c.dev.text("ranks", C.m_comm_close(c.dev.p.api, handle))
	}
	c.mu.Unlock()
	c.breakUp(c.dev.errorf("ranks", engine.CommFault, "rank %d has left the group", c.Rank()))
	<-c.ended
	c.dev.ranks.drop(c)
	return nil
}
