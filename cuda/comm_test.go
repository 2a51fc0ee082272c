package cuda

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/dist"
	"margo/engine/testkit"
)

// unheard is a Rendezvous that agrees to everything, so that what ranks disagree about
// reaches NCCL.
type unheard struct{ *dist.Group }

func (unheard) Agree(string) error { return nil }

// commDevices opens an emulated device for each of n ranks.
func commDevices(t *testing.T, n int) []*Device {
	t.Helper()
	emulatorOnly(t)
	t.Setenv("MARGO_EMU_DEVICES", "4")
	devices := make([]*Device, n)
	for r := range devices {
		d, err := Open(fmt.Sprintf("emu:%d", r), Options{Poison: true})
		if err != nil {
			t.Fatal(err)
		}
		devices[r] = d
		t.Cleanup(func() {
			if err := d.Close(); err != nil && !errors.Is(err, engine.DeviceFault) {
				t.Error(err)
			}
		})
	}
	return devices
}

// asComm runs f as every rank of a Comm and returns what each returned. heard: ranks
// agree about calls before NCCL hears of them.
func asComm(t *testing.T, devices []*Device, limit time.Duration, heard bool, f func(c *Comm, s *Stream) error) []error {
	t.Helper()
	addr := testkit.FreeAddr(t)
	errs := make([]error, len(devices))
	var wg sync.WaitGroup
	for r, d := range devices {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[r] = rank(dist.Place{Rank: r, Size: len(devices), Addr: addr}, d, limit, heard, f)
		}()
	}
	wg.Wait()
	return errs
}

func rank(p dist.Place, d *Device, limit time.Duration, heard bool, f func(c *Comm, s *Stream) error) error {
	g, err := dist.Join(context.Background(), p, time.Minute)
	if err != nil {
		return err
	}
	var meet Rendezvous = g
	if !heard {
		meet = unheard{g}
	}
	c, err := d.NewComm(meet, limit)
	if err != nil {
		return errors.Join(err, g.Close())
	}
	defer c.Close()
	s, err := d.NewStream()
	if err != nil {
		return err
	}
	return errors.Join(f(c, s.(*Stream)), s.Close())
}

// after is err, or that of a wait for the stream.
func after(err error, s *Stream) error {
	if err == nil {
		err = s.Sync()
	}
	return err
}

func fine(t *testing.T, errs []error) {
	t.Helper()
	for r, err := range errs {
		if err != nil {
			t.Errorf("rank %d of %d: %v", r, len(errs), err)
		}
	}
}

// collectives sums and broadcasts on one rank and compares: several tensors of every
// dtype in a call, an empty one and one of several chunks among them, after work that is
// still enqueued.
func collectives(c *Comm, s *Stream) error {
	parts := []struct {
		d engine.DType
		n int
	}{{engine.F32, 777}, {engine.BF16, 31}, {engine.I32, 1}, {engine.F32, 0}, {engine.F32, 150_001}}
	var tensors, twice []*engine.Tensor
	for _, p := range parts {
		bytes := p.n * p.d.Size()
		b, err := c.dev.Alloc(2 * max(bytes, 4))
		if err != nil {
			return err
		}
		defer b.Free()
		tensors = append(tensors, engine.NewTensor(b, 0, p.d, p.n))
		twice = append(twice, engine.NewTensor(b, max(bytes, 4), p.d, p.n))
		if err := s.CopyIn(tensors[len(tensors)-1], testkit.Numbers(p.d, c.Rank(), p.n)); err != nil {
			return err
		}
	}
	for i, x := range tensors {
		if err := s.Copy(twice[i], x); err != nil { // enqueued, not waited for
			return err
		}
	}
	if err := errors.Join(c.Broadcast(s, c.Size()-1, tensors...), c.AllReduce(s, twice...), c.AllReduce(s), c.Barrier()); err != nil {
		return err
	}
	for i, p := range parts {
		sum, last := make([]byte, p.n*p.d.Size()), make([]byte, p.n*p.d.Size())
		if err := errors.Join(s.CopyOut(sum, twice[i]), s.CopyOut(last, tensors[i])); err != nil {
			return err
		}
		if !bytes.Equal(last, testkit.Numbers(p.d, c.Size()-1, p.n)) {
			return fmt.Errorf("tensor %d is not that of rank %d", i, c.Size()-1)
		}
		if !bytes.Equal(sum, testkit.Sum(p.d, c.Size(), p.n)) {
			return fmt.Errorf("tensor %d is not the sum in the order of ranks", i)
		}
	}
	return nil
}

func TestComm(t *testing.T) {
	for _, size := range []int{1, 2, 4} {
		fine(t, asComm(t, commDevices(t, size), time.Minute, true, collectives))
	}
}

// TestCommShuffled: the order in which the emulator runs streams changes no bit.
func TestCommShuffled(t *testing.T) {
	t.Setenv("MARGO_EMU_SEED", "5")
	fine(t, asComm(t, commDevices(t, 4), time.Minute, true, collectives))
}

// TestCommProcesses: ranks may be processes.
func TestCommProcesses(t *testing.T) {
	emulatorOnly(t)
	if addr := os.Getenv("MARGO_TEST_COMM"); addr != "" {
		p, err := dist.ParsePlace(addr)
		if err != nil {
			t.Fatal(err)
		}
		if err := rank(*p, testDevice(t), time.Minute, true, collectives); err != nil {
			t.Error(err)
		}
		return
	}
	addr := testkit.FreeAddr(t)
	dir := t.TempDir()
	var wg sync.WaitGroup
	for r := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			cmd := exec.Command(os.Args[0], "-test.run=^TestCommProcesses$", "-test.v")
			cmd.Env = append(os.Environ(), fmt.Sprintf("MARGO_TEST_COMM=%d/2@%s", r, addr), "TMPDIR="+dir)
			if text, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(text), "--- PASS: TestCommProcesses") {
				t.Errorf("rank %d: %v\n%s", r, err, text)
			}
		}()
	}
	wg.Wait()
	if left, err := filepath.Glob(filepath.Join(dir, "margo-nccl-*")); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v (%v)", left, err)
	}
}

// What ranks disagree about is an error on all of them, soon, and stays: whether they
// find out when they agree, or NCCL's stand-in does.
func TestCommDisagreement(t *testing.T) {
	devices := commDevices(t, 4)
	type call func(c *Comm, s *Stream, x *engine.Tensor) error
	for name, k := range map[string]struct {
		odd            call // of rank 2; the others sum 8 floats
		agreed, unhear string
	}{
		"count": {func(c *Comm, s *Stream, x *engine.Tensor) error { return c.AllReduce(s, x.RowsAt(0, 1)) }, "all-reduce of 4 f32", "all-reduce of 4 f32"},
		"dtype": {func(c *Comm, s *Stream, x *engine.Tensor) error {
			return c.AllReduce(s, engine.NewTensor(x.Buf, 0, engine.I32, 2, 4))
		}, "all-reduce of 8 i32", "all-reduce of 8 i32"},
		"op":   {func(c *Comm, s *Stream, x *engine.Tensor) error { return c.Broadcast(s, 1, x) }, "broadcast from rank 1 of 8 f32", "broadcast of 8 f32 from rank 1"},
		"gone": {func(c *Comm, s *Stream, x *engine.Tensor) error { c.Close(); return c.Barrier() }, "rank 2", "rank 2 has left"},
	} {
		for _, heard := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/%v", name, heard), func(t *testing.T) {
				start := time.Now()
				errs := asComm(t, devices, time.Minute, heard, func(c *Comm, s *Stream) error {
					b, err := c.dev.Alloc(4 * 8)
					if err != nil {
						return err
					}
					defer b.Free()
					x := engine.NewTensor(b, 0, engine.F32, 2, 4)
					if c.Rank() == 2 {
						return after(k.odd(c, s, x), s)
					}
					err = after(c.AllReduce(s, x), s)
					if again := c.AllReduce(s, x); again != err {
						return fmt.Errorf("after %v it says %v", err, again)
					}
					return err
				})
				if took := time.Since(start); took > 20*time.Second {
					t.Errorf("took %v", took)
				}
				says := k.agreed
				if !heard {
					says = k.unhear
				}
				told := 0 // a rank that comes later may only hear that another has left
				for r, err := range errs {
					if !errors.Is(err, engine.CommFault) {
						t.Errorf("rank %d: %v", r, err)
					} else if strings.Contains(err.Error(), says) {
						told++
					}
				}
				if heard && told < 4 || told == 0 {
					t.Errorf("%d ranks know of %q: %v", told, says, errs)
				}
			})
		}
	}
}

// A rank that does not come is an error after the time limit, and the one that comes too
// late gets one as well.
func TestCommLate(t *testing.T) {
	gaveUp := make(chan bool)
	errs := asComm(t, commDevices(t, 2), time.Minute, false, func(c *Comm, s *Stream) error {
		if err := c.SetLimit(200 * time.Millisecond); err != nil { // not for meeting, which may take a busy machine longer
			return err
		}
		b, err := c.dev.Alloc(4 * 8)
		if err != nil {
			return err
		}
		defer b.Free()
		if c.Rank() == 1 {
			<-gaveUp
		} else {
			defer close(gaveUp)
		}
		return after(c.AllReduce(s, engine.NewTensor(b, 0, engine.F32, 8)), s)
	})
	wantError(t, "who waited", errs[0], engine.CommFault, "in time")
	wantError(t, "who was late", errs[1], engine.CommFault, "rank 0 has left")
}

// A device that fails breaks the group: its rank says so, the others that it has left.
func TestCommDeviceLost(t *testing.T) {
	t.Setenv("MARGO_EMU_LOSE_DEVICE", "0")
	errs := asComm(t, commDevices(t, 2), time.Minute, false, func(c *Comm, s *Stream) error {
		b, err := c.dev.Alloc(4 * 8)
		if err != nil {
			return err
		}
		x := engine.NewTensor(b, 0, engine.F32, 8)
		if c.Rank() == 1 {
			err = s.Fill(x, 1)
		}
		if err == nil {
			err = after(c.AllReduce(s, x), s)
		}
		b.Free()
		return err
	})
	wantError(t, "the rank that lost its device", errs[1], engine.DeviceFault, "")
	wantError(t, "the other", errs[0], engine.CommFault, "rank 1 has left")
}

func TestCommRefuses(t *testing.T) {
	devices := commDevices(t, 3)
	other, err := devices[2].Alloc(4 * 8)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Free()
	fine(t, asComm(t, devices[:2], time.Minute, true, func(c *Comm, s *Stream) error {
		b, err := c.dev.Alloc(4 * 8)
		if err != nil {
			return err
		}
		defer b.Free()
		x := engine.NewTensor(b, 0, engine.F32, 2, 4)
		wantError(t, "a tensor of another device", c.AllReduce(s, engine.NewTensor(other, 0, engine.F32, 8)), engine.Invalid, "another device")
		wantError(t, "no tensor", c.AllReduce(s, nil), engine.Invalid, "not a contiguous tensor")
		wantError(t, "columns", c.AllReduce(s, x.Slice(0, 2)), engine.Invalid, "not a contiguous tensor")
		wantError(t, "a root", c.Broadcast(s, 2, x), engine.Invalid, "rank 2 of 2")
		graph, err := s.Capture(func() error {
			wantError(t, "a capture", c.AllReduce(s, x), engine.Invalid, "capturing")
			return s.Fill(x, 1)
		})
		if err != nil {
			return err
		}
		// None of this was heard of by the other rank, so all goes on.
		err = errors.Join(graph.Close(), s.Fill(x, 1), c.AllReduce(s, x), c.Barrier(), c.Close(), c.Close())
		wantError(t, "a closed communicator", c.Barrier(), engine.CommFault, "has left")
		return err
	}))
	// Two ranks may not share a device; the group of hosts stays usable.
	for r, err := range asComm(t, []*Device{devices[0], devices[1], devices[0]}, time.Minute, true, collectives) {
		wantError(t, fmt.Sprintf("rank %d", r), err, engine.CommFault, "ranks 0 and 2 share device 0")
	}
	t.Setenv("MARGO_NCCL_LIB", filepath.Join(t.TempDir(), "libnccl.so.2"))
	for r, err := range asComm(t, devices[:2], time.Minute, true, collectives) {
		wantError(t, fmt.Sprintf("rank %d", r), err, engine.Unsupported, "no NCCL: ")
	}
	_, err = NCCLVersion("emu")
	wantError(t, "a library that is not there", err, engine.Unsupported, "cannot open shared object file")
	t.Setenv("MARGO_NCCL_LIB", "libc.so.6")
	_, err = NCCLVersion("emu")
	wantError(t, "another library", err, engine.Unsupported, "has no function ncclGetVersion")
	t.Setenv("MARGO_NCCL_LIB", "")
	if v, err := NCCLVersion("emu"); err != nil || v != "2.14.0" {
		t.Errorf("the stand-in's version is %q (%v)", v, err)
	}
}
