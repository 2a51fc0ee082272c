package cuda

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"margo/engine"
	weights "margo/engine/load"
	"margo/engine/mar"
	"margo/engine/plan"
	"margo/engine/sample"
	"margo/engine/testkit"
)

// plannedMemory is what a check up front counts for a request of a model like that of e, with its weights, on a device that is
// like d; nothing runs.
func plannedMemory(t *testing.T, d *Device, e *sample.Engine, r sample.Request) int64 {
	t.Helper()
	before := d.Counters()
	est, err := e.Estimate(r)
	if err != nil {
		t.Fatal(err)
	}
	if after := d.Counters(); after.Allocs != before.Allocs || after.Kernels != before.Kernels {
		t.Errorf("planning took memory %d times and launched %d kernels", after.Allocs-before.Allocs, after.Kernels-before.Kernels)
	}
	return int64(before.Taken) + est.Memory // what is held are the weights and what streams have from the beginning
}

// within compares the most memory that was taken with what was planned: not more, and not much less.
func within(t *testing.T, planned int64, d *Device) {
	t.Helper()
	c := d.Counters()
	t.Logf("planned %s, taken %s at most", plan.Size(planned), plan.Size(int64(c.TakenPeak)))
	if most := int64(c.TakenPeak); most > planned || float64(planned) > 1.15*float64(most) {
		t.Errorf("planned %d bytes, at most %d were taken", planned, most)
	}
}

// TestBlock: a device says what its pool takes.
func TestBlock(t *testing.T) {
	for _, cache := range []int64{-1, 3 * mebi} {
		d := openDevice(t, Options{Cache: cache})
		for _, n := range []int{0, 1, 255, 256, 257, 1000, 2049, 4095, 4097, 100_000, mebi + 1, 3*mebi - 1, 3 * mebi, 3*mebi + 1} {
			before := d.Counters().Taken
			b, err := d.Alloc(n)
			if err != nil {
				t.Fatal(err)
			}
			if took := int64(d.Counters().Taken - before); took != d.Block(int64(n)) {
				t.Errorf("cache %d: %d bytes took %d, Block says %d", cache, n, took, d.Block(int64(n)))
			}
			if err := errors.Join(b.Free(), d.Trim()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestPlannedMemory: what a plan counts for weights and a run, with a pool that rounds and caches, with cuBLASLt's workspaces and the
// head's, is enough as a limit, and not much more than is taken. With less, the run is refused before it begins.
func TestPlannedMemory(t *testing.T) {
	emulatorOnly(t)
	t.Setenv("MARGO_EMU_RUN", "0")
	t.Setenv("MARGO_CUDA_CACHE", "512MiB")
	t.Setenv("MARGO_EMU_CC", "90")
	_, described := testkit.OpenMAR(t, golden("mar_tiny_trained"))
	for _, lt := range []string{"0", "1"} {
		for _, c := range []struct {
			compute engine.DType
			batch   int
			fp8     bool // the head's weights, with the latency path, which keeps codes
		}{{compute: engine.F32, batch: 1}, {compute: engine.BF16, batch: 3}, {compute: engine.F32, batch: 40}, {engine.BF16, 3, true}} {
			t.Run(fmt.Sprintf("%v/%d/fp8=%v/cublaslt=%s", c.compute, c.batch, c.fp8, lt), func(t *testing.T) {
				t.Setenv("MARGO_CUBLASLT", lt)
				if c.fp8 {
					t.Setenv("MARGO_HEAD_PATH", "latency")
				}
				r := sample.Defaults()
				r.N, r.Batch, r.Iters, r.HeadSteps, r.CFG, r.Labels = 2*c.batch, c.batch, 4, 20, 3, []int{1}
				open := func(dev engine.Device) (*sample.Engine, func()) {
					t.Helper()
					m, err := mar.New(&described.Config)
					if err != nil {
						t.Fatal(err)
					}
					if c.fp8 {
						m.Head.FP8()
					}
					if err := weights.Allocate(engine.Params(m), dev, c.compute); err != nil {
						t.Fatal(err)
					}
					e, err := sample.Open(m, nil, dev, sample.Options{Compute: c.compute})
					if err != nil {
						t.Fatal(err)
					}
					return e, func() {
						if err := errors.Join(e.Close(), weights.Free(engine.Params(m))); err != nil {
							t.Error(err)
						}
					}
				}
				d := testDevice(t)
				dry := plan.For(d)
				e, done := open(dry)
				est, err := e.Estimate(r)
				if err != nil {
					t.Fatal(err)
				}
				planned := dry.Report().Live + est.Memory
				done()
				own := int64(d.Counters().Taken)
				run := func(limit int64) (kernels uint64, err error) {
					if err := d.SetMemory(limit, 512*mebi); err != nil {
						t.Fatal(err)
					}
					e, done := open(d)
					defer done()
					before := d.Counters().Kernels
					// Twice: what the first run has left counts for the second.
					err = e.Run(context.Background(), r, nil, func(sample.Image) error { return nil })
					if err == nil {
						err = e.Run(context.Background(), r, nil, func(sample.Image) error { return nil })
					}
					return d.Counters().Kernels - before, err
				}
				if _, err := run(own + planned); err != nil {
					t.Fatalf("with what was planned: %v", err)
				}
				within(t, own+planned, d)
				if kernelRan(d, "head_latency_fp8") != c.fp8 {
					t.Errorf("the head's weights in FP8 are used: %v, asked for: %v", !c.fp8, c.fp8)
				}
				n, err := run(own + planned - 1)
				wantError(t, "with a little less", err, engine.OutOfMemory, "sample (emu:0): out of memory: needs ")
				if n != 0 {
					t.Errorf("%d kernels ran before that", n)
				}
			})
		}
	}
}
