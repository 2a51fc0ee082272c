package sample

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/plan"
	"margo/engine/testkit"
)

// onGPU is a model without values on a counting device that wants whole batches, as a
// GPU does (cuda.Device.Info).
func onGPU(t *testing.T) *Engine {
	e := planned(t, "mar-base", engine.BF16)
	e.dev = gpuPlan{e.dev}
	return e
}

type gpuPlan struct{ engine.Device }

func (d gpuPlan) Info() engine.Info {
	i := d.Device.Info()
	i.WorkingSet = 4 << 30
	return i
}

// bounds is the roofline of an image of MAR-B, 64 iterations of 100 steps with guidance 3,
// by op for a whole batch, and the sum for an image in seconds.
func bounds(t *testing.T, e *Engine, m plan.Machine, batch int, latency bool) ([]plan.Bound, float64) {
	t.Helper()
	est, err := e.Estimate(full(batch))
	if err != nil {
		t.Fatal(err)
	}
	depth, steps := int64(len(e.model.(marFamily).model.Head.Blocks)), est.Work.Ops[engine.OpHeadSteps].Calls*100
	// A step is norm and two products a block, and the last kernel, or as many exchanges
	// of the persistent kernel as docs/gpu.md counts. The emulated device's graphs have 19 kernels a step.
	chain := plan.Chain{Kernels: steps * (3*depth + 1)}
	if latency {
		chain = plan.Chain{Exchanges: steps * (3*depth + 3)}
	}
	all, sum := m.Roofline(est.Work, map[engine.Op]plan.Chain{engine.OpHeadSteps: chain}), 0.0
	for _, b := range all {
		sum += b.Seconds() / float64(batch)
	}
	return all, sum
}

// rooflines are the cases that docs/gpu.md has measured on an H200, in s/image.
var rooflines = []struct {
	batch    int
	latency  bool
	measured float64
}{{1, false, 1.27}, {1, true, 0.649}, {64, false, 0.0667}}

// TestRooflineBelowMeasured: a bound that a real device has beaten is none. One that is
// a small part of what was measured would tell nothing either: the worst case, batch 1,
// took 7.2 times its bound, for a kernel of the head takes 6.5 µs where the chain has 1.3.
func TestRooflineBelowMeasured(t *testing.T) {
	e := onGPU(t)
	for _, c := range rooflines {
		_, s := bounds(t, e, plan.H200, c.batch, c.latency)
		t.Logf("batch %d, latency head %v: bound %.4f s, measured %.4f", c.batch, c.latency, s, c.measured)
		if s > c.measured || s < c.measured/8 {
			t.Errorf("batch %d, latency head %v: %.4f s an image bound %.4f s measured", c.batch, c.latency, s, c.measured)
		}
	}
}

// TestRooflineTable: the table in kernels/BUDGET.md is that of today's model code.
// MARGO_UPDATE_BUDGET=1 writes it.
func TestRooflineTable(t *testing.T) {
	e := onGPU(t)
	var b strings.Builder
	for _, c := range rooflines {
		path := "throughput"
		if c.latency {
			path = "latency"
		}
		all, sum := bounds(t, e, plan.H100, c.batch, c.latency)
		_, other := bounds(t, e, plan.H200, c.batch, c.latency)
		fmt.Fprintf(&b, "\n**Batch %d, %s head: estimate for an H100 %.4f s an image.** For an H200 %.4f s; measured there: %.4f s.\n\n", c.batch, path, sum, other, c.measured)
		fmt.Fprintf(&b, "| op, an image | calls a batch | GFLOP bf16 | GFLOP f32 | MB | compute ms | memory ms | chain ms | bound by |\n|---|---|---|---|---|---|---|---|---|\n")
		for _, o := range all {
			n := float64(c.batch)
			fmt.Fprintf(&b, "| %s | %d | %.1f | %.1f | %.0f | %.3f | %.3f | %.3f | %s |\n", o.Op, o.Calls, float64(o.BF16)/n/1e9, float64(o.F32)/n/1e9,
				float64(o.Bytes)/n/1e6, o.Compute/n*1e3, o.Memory/n*1e3, o.Serial/n*1e3, o.By())
		}
	}
	b.WriteString("\n")
	testkit.Section(t, filepath.Join("..", "..", "kernels", "BUDGET.md"), "roofline", b.String())
}
