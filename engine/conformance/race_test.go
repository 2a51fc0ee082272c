package conformance

import (
	"strings"
	"sync"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

// TestRace: a device whose streams share what they should not is seen, one whose streams are independent passes.
func TestRace(t *testing.T) {
	good := Race(ref.New(ref.Rounded), RaceOptions{Workers: 2, Rounds: 2})
	if len(good.Failures) > 0 || good.Runs != 2*2*good.Cases || good.Streams != 2*good.Cases || good.Cases < 20 {
		t.Errorf("%+v", good)
	}
	// Two streams share a workspace: a product destroys the row that another stream's product has written and
	// nobody has read yet.
	var mu sync.Mutex
	var last *engine.GemmArgs
	m := &mutant{name: "a shared workspace", gemm: func(s engine.Stream, a engine.GemmArgs) error {
		mu.Lock()
		defer mu.Unlock()
		if last != nil {
			s.Fill(last.Y.RowsAt(0, 1), 1) // an error if the last wave's memory was given back: then it is harmless
		}
		last = &a
		return s.Gemm(a)
	}}
	bad := Race(faulty{ref.New(ref.Rounded), m}, RaceOptions{})
	if len(bad.Failures) != 1 || !strings.Contains(bad.Failures[0], "gemm/") || !strings.Contains(bad.Failures[0], "not what it gives alone") {
		t.Errorf("a workspace shared by streams is not seen: %+v", bad)
	}
}

// TestRoofline: the bound is the longer of arithmetic at the dtype's peak and memory.
func TestRoofline(t *testing.T) {
	i := engine.Info{PeakF32: 1e12, PeakBF16: 4e12, PeakMemory: 1e11}
	for _, c := range []struct {
		cost  engine.Cost
		bound string
		want  float64
	}{{engine.Cost{F32: 2e9, Bytes: 1e8}, "arithmetic", 2e-3}, {engine.Cost{BF16: 2e9, Bytes: 1e8}, "memory", 1e-3},
		{engine.Cost{F32: 1e9, BF16: 4e9, Bytes: 1e8}, "arithmetic", 2e-3}} {
		if s, bound := (Timing{Cost: c.cost}).Roofline(i); s != c.want || bound != c.bound {
			t.Errorf("%+v: %g s, bound by %s; want %g s, %s", c.cost, s, bound, c.want, c.bound)
		}
	}
	if s, bound := (Timing{Cost: engine.Cost{F32: 1, BF16: 1, Bytes: 1}}).Roofline(engine.Info{}); s != 0 || bound != "" {
		t.Errorf("without peaks: %g s, bound by %q", s, bound)
	}
}
