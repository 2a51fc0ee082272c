package cuda

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/dist"
	"margo/engine/testkit"
)

func floats(b []byte) []float32 {
	v := make([]float32, len(b)/4)
	for i := range v {
		v[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
	}
	return v
}

// noMoreGoroutines fails where there are more than before, once what ranks have left behind had time to end.
func noMoreGoroutines(t *testing.T, before int) {
	t.Helper()
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	text := make([]byte, 1<<16)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, text[:runtime.Stack(text, true)])
}

// TestCommEnqueues: rank 0 enqueues kernels, sums and a broadcast before any other rank comes, without a wait; then all get
// what the order of the stream makes of it.
func TestCommEnqueues(t *testing.T) {
	const n = 777
	before := runtime.NumGoroutine()
	for _, c := range []struct {
		size int
		seed string
	}{{2, "0"}, {4, "0"}, {4, "5"}} {
		t.Setenv("MARGO_EMU_SEED", c.seed)
		enqueued := make(chan struct{})
		fine(t, asComm(t, commDevices(t, c.size), 20*time.Second, true, func(c *Comm, s *Stream) error {
			b, err := c.dev.Alloc(3 * 4 * n)
			if err != nil {
				return err
			}
			defer b.Free()
			x, y, z := engine.NewTensor(b, 0, engine.F32, n), engine.NewTensor(b, 4*n, engine.F32, n), engine.NewTensor(b, 8*n, engine.F32, n)
			err = s.CopyIn(x, testkit.Numbers(engine.F32, c.Rank(), n))
			if c.Rank() > 0 {
				<-enqueued
			}
			waits := c.dev.Counters().Syncs
			err = errors.Join(err, s.Cast(engine.CastArgs{X: x, Y: y, Scale: 2}), c.AllReduce(s, y), s.Cast(engine.CastArgs{X: y, Y: z, Scale: 0.5}),
				c.AllReduce(s, z), s.Cast(engine.CastArgs{X: z, Y: y, Scale: 1, Shift: 1}), c.Broadcast(s, c.Size()-1, x))
			if c.Rank() == 0 {
				close(enqueued)
			}
			if now := c.dev.Counters().Syncs; now != waits {
				return fmt.Errorf("the host waited %d times", now-waits)
			}
			last, sums := make([]byte, 4*n), make([]byte, 4*n)
			if err := errors.Join(err, s.CopyOut(sums, y), s.CopyOut(last, x)); err != nil {
				return err
			}
			if string(last) != string(testkit.Numbers(engine.F32, c.Size()-1, n)) {
				return fmt.Errorf("not what rank %d has sent", c.Size()-1)
			}
			one := floats(testkit.Sum(engine.F32, c.Size(), n)) // 2 and 0.5 change no bit but the exponent
			for i, got := range floats(sums) {
				want := one[i]
				for range c.Size() - 1 {
					want += one[i]
				}
				if got != want+1 {
					return fmt.Errorf("element %d is %g, want %g", i, got, want+1)
				}
			}
			return nil
		}))
	}
	noMoreGoroutines(t, before)
}

// TestCommLost: a rank that does not come is an error, with the collective's name, of whatever waits for what comes after it,
// within the time limit; of all later calls too. The device goes on working.
func TestCommLost(t *testing.T) {
	devices := commDevices(t, 2)
	before := runtime.NumGoroutine()
	const n = 8
	for name, wait := range map[string]func(c *Comm, s *Stream, x *engine.Tensor) error{
		"sync":     func(_ *Comm, s *Stream, _ *engine.Tensor) error { return s.Sync() },
		"heard":    func(_ *Comm, s *Stream, _ *engine.Tensor) error { return s.Sync() },
		"copy out": func(_ *Comm, s *Stream, x *engine.Tensor) error { return s.CopyOut(make([]byte, 4*n), x) },
		"barrier":  func(c *Comm, _ *Stream, _ *engine.Tensor) error { return c.Barrier() },
		"elapsed": func(_ *Comm, s *Stream, _ *engine.Tensor) error {
			e, err := s.Record()
			if err != nil {
				return err
			}
			_, wrong := e.(*event).Seconds(e)
			return errors.Join(wrong, e.Close())
		},
		"another stream": func(c *Comm, s *Stream, x *engine.Tensor) error {
			other, err := c.dev.NewStream()
			if err != nil {
				return err
			}
			e, err := s.Record()
			if err != nil {
				return err
			}
			if err := errors.Join(other.Wait(e), e.Close(), other.Fill(x, 2)); err != nil {
				return err
			}
			return errors.Join(other.Sync(), other.Close())
		},
		"pack": func(c *Comm, _ *Stream, x *engine.Tensor) error {
			w, err := c.dev.Pack(engine.PackArgs{W: x, DType: engine.F32})
			if err == nil {
				w.Free()
			}
			return err
		},
		"freed": func(c *Comm, s *Stream, _ *engine.Tensor) error { // which waits where nothing is cached
			b, err := c.dev.Alloc(4)
			if err != nil {
				return err
			}
			return errors.Join(b.Free(), s.Sync())
		},
		"uploads": func(_ *Comm, s *Stream, x *engine.Tensor) error { // more than there is staging for
			for range 4 {
				if err := s.CopyIn(x, make([]byte, 4*n)); err != nil {
					return err
				}
			}
			return s.Sync()
		},
		"launches": func(_ *Comm, s *Stream, x *engine.Tensor) error { // more than the driver's queue holds
			for range 1200 {
				if err := s.Fill(x, 1); err != nil {
					return err
				}
			}
			return s.Sync()
		},
	} {
		t.Run(name, func(t *testing.T) {
			gaveUp := make(chan struct{})
			errs := asComm(t, devices, time.Minute, name == "heard", func(c *Comm, s *Stream) error {
				b, err := c.dev.Alloc(4 * n)
				if err != nil {
					return err
				}
				defer b.Free()
				x := engine.NewTensor(b, 0, engine.F32, n, 1)
				if c.Rank() == 1 {
					<-gaveUp
					return nil
				}
				defer close(gaveUp)
				if err := errors.Join(c.SetLimit(200*time.Millisecond), s.Fill(x, 1), c.AllReduce(s, x), s.Fill(x, 2)); err != nil {
					return err
				}
				start := time.Now()
				lost := wait(c, s, x)
				if took := time.Since(start); took > 20*time.Second {
					t.Errorf("took %v", took)
				}
				wantError(t, "the wait", lost, engine.CommFault, "all-reduce: it did not end in time")
				wantError(t, "the next collective", c.Broadcast(s, 0, x), engine.CommFault, "all-reduce: it did not end in time")
				if name == "another stream" || name == "pack" || name == "elapsed" || name == "barrier" {
					wantError(t, "the stream itself", s.Sync(), engine.CommFault, "all-reduce: it did not end in time")
				}
				got := make([]byte, 4*n)
				if err := errors.Join(s.Sync(), s.Fill(x, 3), s.CopyOut(got, x)); err != nil {
					return err
				}
				if v := floats(got); v[n-1] != 3 {
					t.Errorf("%v after a fill", v)
				}
				return nil
			})
			fine(t, errs)
		})
	}
	for _, d := range devices {
		if n := d.Used(); n != 0 {
			t.Errorf("%d bytes are held", n)
		}
	}
	noMoreGoroutines(t, before)
}

// disagreeing is a Rendezvous that says so late, of what NCCL has long done.
type disagreeing struct{ *dist.Group }

func (d disagreeing) Agree(string) error {
	time.Sleep(100 * time.Millisecond)
	return errors.New("another dtype")
}

// TestCommAgreesBeforeResults: NCCL does not notice all that ranks disagree about, so what it has done is no result before
// the ranks have agreed.
func TestCommAgreesBeforeResults(t *testing.T) {
	d := commDevices(t, 1)[0]
	g, err := dist.Join(t.Context(), dist.Place{Size: 1}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.NewComm(disagreeing{g}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	b, err := d.Alloc(4)
	if err != nil {
		t.Fatal(err)
	}
	x := engine.NewTensor(b, 0, engine.F32, 1)
	if err := errors.Join(s.Fill(x, 1), c.AllReduce(s, x)); err != nil {
		t.Fatal(err)
	}
	wantError(t, "what was copied", s.CopyOut(make([]byte, 4), x), engine.CommFault, "all-reduce")
	if err := errors.Join(s.Close(), b.Free(), c.Close()); err != nil {
		t.Error(err)
	}
}

// TestCommLeaves: who leaves with a sum under way ends it, and hears of that at its stream, as the others do at theirs.
// Sums that have ended are none the worse for leaving.
func TestCommLeaves(t *testing.T) {
	devices := commDevices(t, 2)
	left := make(chan struct{})
	errs := asComm(t, devices, time.Minute, false, func(c *Comm, s *Stream) error {
		b, err := c.dev.Alloc(4)
		if err != nil {
			return err
		}
		defer b.Free()
		x := engine.NewTensor(b, 0, engine.F32, 1)
		if c.Rank() == 1 {
			<-left
			return after(c.AllReduce(s, x), s)
		}
		err = errors.Join(s.Fill(x, 1), c.AllReduce(s, x), c.Close())
		close(left)
		return errors.Join(err, s.Sync())
	})
	wantError(t, "who left", errs[0], engine.CommFault, "all-reduce: rank 0 left the group before it had ended")
	wantError(t, "the other", errs[1], engine.CommFault, "rank 0 has left")
	fine(t, asComm(t, devices, time.Minute, true, func(c *Comm, s *Stream) error {
		b, err := c.dev.Alloc(4)
		if err != nil {
			return err
		}
		defer b.Free()
		x := engine.NewTensor(b, 0, engine.F32, 1)
		return errors.Join(s.Fill(x, 1), c.AllReduce(s, x), c.Barrier(), c.Close(), s.Sync())
	}))
}

// TestCommMemory: what NCCL takes when ranks meet counts as taken, within the limit, until the group is closed.
func TestCommMemory(t *testing.T) {
	t.Setenv("MARGO_EMU_MEMORY", fmt.Sprint(64*mebi))
	t.Setenv("MARGO_EMU_TAKES", fmt.Sprintf("nccl:%d,connect:%d", 6*mebi, 2*mebi))
	devices := commDevices(t, 2)
	fine(t, asComm(t, devices, time.Minute, true, func(c *Comm, s *Stream) error {
		n, free := c.dev.Counters(), c.dev.Info().MemFree
		if n.Libraries != 8*mebi || n.Taken != 8*mebi || n.TakenPeak < 8*mebi || free > 56*mebi {
			return fmt.Errorf("NCCL has %d of %d bytes taken, at most %d; %d are free", n.Libraries, n.Taken, n.TakenPeak, free)
		}
		if err := c.dev.SetMemory(20*mebi, 0); err != nil {
			return err
		}
		if free := c.dev.Info().MemFree; free != 12*mebi {
			return fmt.Errorf("%d bytes are free within the limit", free)
		}
		_, err := c.dev.Alloc(13 * mebi)
		wantNoMemory(t, "more than NCCL leaves", err, "13.0 MiB asked")
		return nil
	}))
	for _, d := range devices {
		if n := d.Counters(); n.Libraries != 0 || n.Taken != 0 {
			t.Errorf("after closing NCCL has %d of %d bytes taken", n.Libraries, n.Taken)
		}
	}
	if err := devices[1].SetMemory(7*mebi, 0); err != nil {
		t.Fatal(err)
	}
	errs := asComm(t, devices, time.Minute, true, collectives)
	wantNoMemory(t, "a limit with no room for NCCL", errs[1], "memory that NCCL has taken: 8.0 MiB asked")
	wantError(t, "the other rank", errs[0], engine.CommFault, "rank 1 of 2 has no memory to join")
	for _, d := range devices {
		if n := d.Counters(); n.Libraries != 0 || n.Taken != 0 {
			t.Errorf("after a refusal NCCL has %d of %d bytes taken", n.Libraries, n.Taken)
		}
	}
}
