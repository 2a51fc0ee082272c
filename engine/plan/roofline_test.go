package plan

import (
	"math"
	"testing"

	"margo/engine"
)

// TestRoofline: each limit binds where it is the largest, in the order of engine.Ops.
func TestRoofline(t *testing.T) {
	m := Machine{F32: 10, BF16: 100, Memory: 5, Dependent: 0.5, Exchange: 0.25}
	r := Report{Ops: map[engine.Op]Total{
		engine.OpGemm:      {Calls: 2, Cost: engine.Cost{F32: 20, BF16: 300, Bytes: 10}}, // 2+3, 2, 1
		engine.OpAttention: {Calls: 1, Cost: engine.Cost{BF16: 100, Bytes: 20}},          // 1, 4, 0.5
		engine.OpHeadSteps: {Calls: 1, Cost: engine.Cost{BF16: 100, Bytes: 20}},          // 1, 4, 12·0.5 + 4·0.25
		OpCopyIn:           {Calls: 1, Cost: engine.Cost{Bytes: 1000}},                   // left out
	}}
	got := m.Roofline(r, map[engine.Op]Chain{engine.OpHeadSteps: {Kernels: 12, Exchanges: 4}})
	want := map[engine.Op]struct {
		seconds float64
		by      string
	}{engine.OpGemm: {5, "compute"}, engine.OpAttention: {4, "memory"}, engine.OpHeadSteps: {7, "chain"}}
	if len(got) != len(want) {
		t.Fatalf("%d bounds, want %d", len(got), len(want))
	}
	for _, b := range got {
		if w := want[b.Op]; math.Abs(b.Seconds()-w.seconds) > 1e-12 || b.By() != w.by {
			t.Errorf("%s takes %g by %s, want %g by %s", b.Op, b.Seconds(), b.By(), w.seconds, w.by)
		}
	}
}
