package sample

import (
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/plan"
)

// planned is a model without values on a counting device.
func planned(t testing.TB, name string, d engine.DType) *Engine {
	t.Helper()
	cfg, err := checkpoint.NamedMAR(name)
	if err != nil {
		t.Fatal(err)
	}
	m, err := mar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	dev := plan.New(0)
	if err := load.Allocate(engine.Params(m), dev, d); err != nil {
		t.Fatal(err)
	}
	e, err := Open(m, nil, dev, Options{Compute: d})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func full(batch int) Request {
	r := Defaults()
	r.N, r.Batch, r.CFG, r.Labels = batch, batch, 3, []int{207, 360}
	return r
}

// What is saved against the authors' algorithm, exactly: the last decoder block
// but for the tokens that are due, layers of the head that depend on the step or
// the token alone, and the shared first iteration.
func TestSavings(t *testing.T) {
	e := planned(t, "mar-base", engine.BF16)
	est, err := e.Estimate(full(4))
	if err != nil {
		t.Fatal(err)
	}
	authors := mar.CountFLOPs(&e.model.(marFamily).model.Config, 64, 100, true).Total()
	share := float64(est.Work.Total().FLOPs()) / 4 / authors
	if share < 0.90 || share > 0.94 {
		t.Errorf("%.3f of the authors' FLOPs", share)
	}
	if head := est.Work.Ops[engine.OpHeadSteps]; head.F32 > head.BF16/20 {
		t.Errorf("the head computes %d FLOPs in F32, %d in BF16", head.F32, head.BF16)
	}
	if est.Activations > 200<<20 {
		t.Errorf("%s of activations", plan.Size(est.Activations))
	}
	t.Logf("%.3f of the authors' FLOPs, %s of activations", share, plan.Size(est.Activations))
}

// The host's share of a run: schedule and dry run of a batch.
func BenchmarkEstimate(b *testing.B) {
	e := planned(b, "mar-base", engine.BF16)
	for b.Loop() {
		if _, err := e.Estimate(full(4)); err != nil {
			b.Fatal(err)
		}
	}
}
