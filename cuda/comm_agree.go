package cuda

// #include "calls.h"
import "C"

import (
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"margo/engine"
)

const (
	callsAhead  = 1024             // calls of a Comm that wait for the ranks to agree about
	explainWait = 5 * time.Second  // for ranks to tell that they disagree, where that may be why NCCL has failed
	closeWait   = 10 * time.Second // for ranks to tell that they agree about what their devices have done
)

// call is what ranks agree about; without a text a barrier.
type call struct {
	op   engine.Op
	text string
}

// ask gives a call to agree, and numbers it.
func (c *Comm) ask(k call) (uint64, error) {
	c.mu.Lock()
	c.asked++
	n := c.asked
	c.mu.Unlock()
	select {
	case c.calls <- k:
		return n, nil
	case <-c.stop:
		return 0, c.lastWord()
	}
}

// agree makes sure, in the background, that all ranks make the same calls.
func (c *Comm) agree() {
	defer close(c.ended)
	for {
		var k call
		select {
		case <-c.stop:
			return
		case k = <-c.calls:
		}
		var err error
		if k.text == "" {
			err = c.meet.Barrier()
		} else {
			err = c.meet.Agree(k.text)
		}
		if err != nil {
			c.breakUp(c.dev.errorf(k.op, engine.CommFault, "%w", err))
			return
		}
		c.mu.Lock()
		c.agreed++
		close(c.more)
		c.more = make(chan struct{})
		c.mu.Unlock()
	}
}

// until waits until the ranks have agreed about n calls, or timeout has come.
func (c *Comm) until(n uint64, timeout <-chan time.Time) error {
	for {
		c.mu.Lock()
		agreed, more := c.agreed, c.more
		c.mu.Unlock()
		if agreed >= n {
			return nil
		}
		select {
		case <-more:
		case <-timeout:
			return nil
		case <-c.stop:
			return c.lastWord()
		}
	}
}

func (c *Comm) lastWord() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// explain breaks the group up with err, which NCCL has met, or with what the ranks disagree about, which says better why.
func (c *Comm) explain(err error) error {
	if !errors.Is(err, engine.DeviceFault) {
		c.mu.Lock()
		asked := c.asked
		c.mu.Unlock()
		c.until(asked, time.After(explainWait))
	}
	return c.breakUp(err)
}

// breakUp makes err the communicator's last word, unless it has one, and ends what is under way; the other ranks hear of it in their
// present or next call. It returns the last word.
func (c *Comm) breakUp(err error) error {
	c.mu.Lock()
	first := c.broken == nil
	if first {
		c.broken = err
		close(c.stop)
		if c.c != nil && c.dev.open("ranks") == nil {
			text := C.CString(err.Error())
			C.m_comm_fail(c.dev.p.api, c.c, text)
			C.free(unsafe.Pointer(text))
		}
	}
	err = c.broken
	c.mu.Unlock()
	if first {
		c.meet.Close()
	}
	return err
}

// outcome is what has become of the first n calls, whose stream was waited for.
func (c *Comm) outcome(op engine.Op, n uint64) error {
	c.mu.Lock()
	var err error
	open := c.c != nil
	switch {
	case open:
		err = c.dev.text(op, C.m_comm_error(c.dev.p.api, c.c))
	case c.cut != nil:
		err = c.cut
	case !c.left || c.agreed < n:
		err = c.broken
	}
	c.mu.Unlock()
	switch {
	case !open:
		return err
	case err != nil:
		return c.explain(err)
	}
	return c.until(n, nil)
}

// behind are calls that work comes after: of each Comm, the number of the last.
type behind map[*Comm]uint64

// ranks is what a device knows of its groups of ranks: which collectives the work of its streams comes after, since the
// stream was last waited for.
type ranks struct {
	some  atomic.Bool // there has been one
	mu    sync.Mutex  // guards what follows
	comms map[*Comm]bool
	after map[*Stream]behind
}

func (r *ranks) add(c *Comm) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.comms == nil {
		r.comms, r.after = map[*Comm]bool{}, map[*Stream]behind{}
	}
	r.comms[c] = true
	r.some.Store(true)
}

func (r *ranks) drop(c *Comm) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.comms, c)
}

// open lists the groups that were not closed.
func (r *ranks) open() (all []*Comm) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.comms {
		all = append(all, c)
	}
	return all
}

// comesAfter notes that what is enqueued on the stream from now on comes after calls.
func (r *ranks) comesAfter(s *Stream, calls behind) {
	if len(calls) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	have := r.after[s]
	if have == nil {
		have = behind{}
		r.after[s] = have
	}
	for c, n := range calls {
		have[c] = max(have[c], n)
	}
}

// before is what the stream's work comes after.
func (r *ranks) before(s *Stream) behind {
	if !r.some.Load() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.after[s])
}

// waited is what has become of the calls that a stream's work comes after, now that it was waited for.
func (r *ranks) waited(op engine.Op, s *Stream) error {
	calls := r.before(s)
	if len(calls) == 0 {
		return nil
	}
	r.mu.Lock()
	delete(r.after, s)
	r.mu.Unlock()
	return calls.outcome(op)
}

// allWaited is the same of all streams, whose own waits will say it too.
func (r *ranks) allWaited(op engine.Op) error {
	if !r.some.Load() {
		return nil
	}
	all := behind{}
	r.mu.Lock()
	for _, calls := range r.after {
		for c, n := range calls {
			all[c] = max(all[c], n)
		}
	}
	r.mu.Unlock()
	return all.outcome(op)
}

// lost breaks all groups up: the device has failed.
func (r *ranks) lost(err error) {
	if !r.some.Load() {
		return
	}
	for _, c := range r.open() {
		c.breakUp(err)
	}
}

func (b behind) outcome(op engine.Op) error {
	for c, n := range b {
		if err := c.outcome(op, n); err != nil {
			return err
		}
	}
	return nil
}
