package dist

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/ref"
	"margo/engine/testkit"
)

// together runs f as every rank of a group and returns what it returned for each.
func together(t *testing.T, size int, limit time.Duration, f func(g *Group) error) []error {
	t.Helper()
	addr, errs := testkit.FreeAddr(t), make([]error, size)
	var wg sync.WaitGroup
	for r := range size {
		wg.Add(1)
		go func() {
			defer wg.Done()
			g, err := Join(context.Background(), Place{Rank: r, Size: size, Addr: addr}, limit)
			if err == nil {
				defer g.Close()
				err = f(g)
			}
			errs[r] = err
		}()
	}
	wg.Wait()
	return errs
}

func allFine(t *testing.T, errs []error) {
	t.Helper()
	for r, err := range errs {
		if err != nil {
			t.Errorf("rank %d: %v", r, err)
		}
	}
}

// Numbers whose sum depends on the order: the order of ranks must be kept, bit for
// bit, and on all ranks.
func TestAllReduceIsTheSumInOrderOfRanks(t *testing.T) {
	const n = 1000
	dev := ref.New(ref.Exact)
	defer dev.Close()
	for _, size := range []int{1, 2, 4} {
		for _, d := range []engine.DType{engine.F32, engine.BF16, engine.I32} {
			numbers, want := func(rank int) []byte { return testkit.Numbers(d, rank, n) }, testkit.Sum(d, size, n)
			allFine(t, together(t, size, 20*time.Second, func(g *Group) error {
				s, err := dev.NewStream()
				if err != nil {
					return err
				}
				defer s.Close()
				buf, err := dev.Alloc(len(want))
				if err != nil {
					return err
				}
				defer buf.Free()
				x := engine.NewTensor(buf, 0, d, n)
				got := make([]byte, len(want))
				if err := errors.Join(s.CopyIn(x, numbers(g.Rank())), g.AllReduce(s, x), s.CopyOut(got, x)); err != nil {
					return err
				}
				if !bytes.Equal(got, want) {
					return fmt.Errorf("%v, %d ranks: not the sum in order of ranks", d, size)
				}
				for root := range size {
					if err := errors.Join(s.CopyIn(x, numbers(g.Rank())), g.Broadcast(s, root, x), s.CopyOut(got, x), g.Barrier()); err != nil {
						return err
					}
					if !bytes.Equal(got, numbers(root)) {
						return fmt.Errorf("%v: not what rank %d sent", d, root)
					}
				}
				return nil
			}))
		}
	}
}

// Nobody returns from a barrier before the last has come.
func TestBarrierWaits(t *testing.T) {
	var mu sync.Mutex
	came := 0
	allFine(t, together(t, 4, 20*time.Second, func(g *Group) error {
		for round := 1; round <= 5; round++ {
			time.Sleep(time.Duration(g.Rank()) * time.Millisecond)
			mu.Lock()
			came++
			mu.Unlock()
			if err := g.Barrier(); err != nil {
				return err
			}
			mu.Lock()
			n := came
			mu.Unlock()
			if n < 4*round {
				return fmt.Errorf("round %d: passed after %d calls", round, n)
			}
		}
		return nil
	}))
}

// What ranks disagree about is an error on all of them, soon, and the group stays broken.
func TestDisagreement(t *testing.T) {
	data := func(n int) []byte { return make([]byte, n) }
	for name, c := range map[string]struct {
		odd  func(*Group) error // of rank 2; the others sum 8 floats
		says string
	}{
		"count":      {func(g *Group) error { return g.SumBytes(engine.F32, data(16)) }, "all-reduce of 16 bytes of f32"},
		"dtype":      {func(g *Group) error { return g.SumBytes(engine.I32, data(32)) }, "all-reduce of 32 bytes of i32"},
		"collective": {func(g *Group) error { return g.Barrier() }, "barrier"},
		"root":       {func(g *Group) error { return g.BroadcastBytes(3, data(32)) }, "broadcast of 32 bytes of i32 from rank 3"},
		"gone":       {func(g *Group) error { g.Close(); return g.Barrier() }, "rank 2"},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			errs := together(t, 4, 20*time.Second, func(g *Group) error {
				if g.Rank() == 2 {
					return c.odd(g)
				}
				err := g.SumBytes(engine.F32, data(32))
				if again := g.Barrier(); again != err {
					return fmt.Errorf("after %v the group says %v", err, again)
				}
				return err
			})
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			for r, err := range errs {
				if !errors.Is(err, engine.CommFault) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("rank %d: %v, want %q", r, err, c.says)
				}
			}
		})
	}
}

// Agree passes where all say the same, and tells all ranks who said what where not.
func TestAgree(t *testing.T) {
	long := strings.Repeat("x", 1000)
	allFine(t, together(t, 3, 20*time.Second, func(g *Group) error { return errors.Join(g.Agree(""), g.Agree("sum"), g.Agree(long)) }))
	for _, odd := range []string{"mean", long + "y"} {
		same := map[bool]string{true: "sum", false: long}[odd == "mean"]
		for r, err := range together(t, 3, 20*time.Second, func(g *Group) error {
			if g.Rank() == 1 {
				return g.Agree(odd)
			}
			return g.Agree(same)
		}) {
			if !errors.Is(err, engine.CommFault) || !strings.Contains(strings.ReplaceAll(err.Error(), `\`, ""), `rank 1: it says "`+odd[:4]) {
				t.Errorf("rank %d: %v", r, err)
			}
		}
	}
}

// A rank that does not come to a collective is named after the time limit.
func TestLateRank(t *testing.T) {
	release := make(chan struct{})
	var once sync.WaitGroup
	once.Add(2)
	go func() { once.Wait(); close(release) }()
	errs := together(t, 3, 300*time.Millisecond, func(g *Group) error {
		if g.Rank() == 1 {
			<-release // until the others have given up
			return nil
		}
		defer once.Done()
		return g.Barrier()
	})
	for _, r := range []int{0, 2} {
		if !errors.Is(errs[r], engine.CommFault) || !strings.Contains(errs[r].Error(), "rank 1") || !strings.Contains(errs[r].Error(), "in time") {
			t.Errorf("rank %d: %v", r, errs[r])
		}
	}
}

// Close ends a call that another goroutine waits in, and the others hear that this rank has gone.
func TestCloseEndsACall(t *testing.T) {
	for _, closes := range []int{0, 1} {
		start := time.Now()
		waiting := make(chan struct{})
		errs := together(t, 3, time.Minute, func(g *Group) error {
			switch g.Rank() {
			case closes:
				ended := make(chan error)
				go func() {
					close(waiting)
					ended <- g.Barrier()
				}()
				<-waiting
				time.Sleep(50 * time.Millisecond) // most likely it waits by then; the outcome is the same if not
				g.Close()
				return <-ended
			case 2: // who is waited for
				<-waiting
				time.Sleep(200 * time.Millisecond)
			}
			if err := g.Barrier(); err != nil {
				return err
			}
			return g.Barrier() // rank 1 had come to the first
		})
		for r, err := range errs {
			says := fmt.Sprintf("rank %d", closes)
			if !errors.Is(err, engine.CommFault) || !strings.Contains(err.Error(), says) {
				t.Errorf("rank %d: %v, want %q", r, err, says)
			}
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("took %v", took)
		}
	}
}

func TestJoinRefuses(t *testing.T) {
	join := func(limit time.Duration, places ...Place) []error {
		addr, errs := testkit.FreeAddr(t), make([]error, len(places))
		var wg sync.WaitGroup
		for i, p := range places {
			wg.Add(1)
			go func() {
				defer wg.Done()
				p.Addr = addr
				g, err := Join(context.Background(), p, limit)
				if err == nil {
					g.Close()
				}
				errs[i] = err
			}()
		}
		wg.Wait()
		return errs
	}
	for name, c := range map[string]struct {
		limit  time.Duration
		places []Place
		says   string // rank 0
	}{
		"missing":   {200 * time.Millisecond, []Place{{Rank: 0, Size: 3}, {Rank: 1, Size: 3}}, "time is up: rank 0 at"},
		"size":      {10 * time.Second, []Place{{Rank: 0, Size: 3}, {Rank: 1, Size: 2}}, "rank 1 counts 2 ranks, rank 0 counts 3"},
		"twice":     {10 * time.Second, []Place{{Rank: 0, Size: 3}, {Rank: 1, Size: 3}, {Rank: 1, Size: 3}}, "two processes call themselves rank 1"},
		"other job": {300 * time.Millisecond, []Place{{Rank: 0, Size: 2, Job: "a"}, {Rank: 1, Size: 2, Job: "b"}}, "waits for rank 1"},
		"alone":     {200 * time.Millisecond, []Place{{Rank: 1, Size: 2}}, "reaches no rank 0"},
	} {
		errs := join(c.limit, c.places...)
		for i, err := range errs {
			if !errors.Is(err, engine.CommFault) {
				t.Errorf("%s: process %d: %v", name, i, err)
			}
		}
		if errs[0] == nil || !strings.Contains(errs[0].Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, errs[0], c.says)
		}
	}
}

// Strangers do not disturb.
func TestStrangers(t *testing.T) {
	addr := testkit.FreeAddr(t)
	done := make(chan error)
	go func() {
		g, err := Join(context.Background(), Place{Size: 2, Addr: addr}, 20*time.Second)
		if err == nil {
			err = g.Barrier()
		}
		done <- err
	}()
	for _, text := range []string{"", "GET / HTTP/1.1\r\n\r\n" + strings.Repeat("x", 100)} {
		var c net.Conn
		var err error
		for range 100 {
			if c, err = net.Dial("tcp", addr); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, text)
		c.Close()
	}
	g, err := Join(context.Background(), Place{Rank: 1, Size: 2, Addr: addr}, 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if err := g.Barrier(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCancelledJoin(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	start := time.Now()
	if _, err := Join(ctx, Place{Size: 2, Addr: testkit.FreeAddr(t)}, time.Minute); !errors.Is(err, context.Canceled) || time.Since(start) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}
