package cuda

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	weights "margo/engine/load"
	"margo/engine/mar"
	"margo/engine/sample"
)

// traced is a MAR-B without values on an emulated H100 that counts what is launched and
// runs none of it: its memory stays poisoned, so nobody can take the tokens for a result.
func traced(t *testing.T, env ...string) (*Device, *sample.Engine) {
	t.Helper()
	for _, e := range append([]string{"MARGO_EMU_RUN=0", "MARGO_EMU_CC=90", "MARGO_EMU_SMS=132"}, env...) {
		k, v, _ := strings.Cut(e, "=")
		t.Setenv(k, v)
	}
	d := testDevice(t)
	if m := d.Info().Model; !strings.Contains(m, "runs no kernel") {
		t.Fatalf("the device is %q", m)
	}
	cfg, err := checkpoint.NamedMAR("mar-base")
	if err != nil {
		t.Fatal(err)
	}
	m, err := mar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("MARGO_HEAD_WEIGHTS") == "fp8" { // as margo sample has it
		m.Head.FP8()
	}
	if err := weights.Allocate(engine.Params(m), d, engine.BF16); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { weights.Free(engine.Params(m)) })
	e, err := sample.Open(m, nil, d, sample.Options{Compute: engine.BF16})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return d, e
}

// enqueued counts kernels that were launched or captured; those that graphs launch are not among them.
func enqueued(d *Device) (n uint64) {
	for _, k := range d.Kernels() {
		n += k.Launches
	}
	return n
}

// marB is a batch of the paper's setting: 64 iterations × 100 steps with guidance.
func marB(n int) sample.Request {
	r := sample.Defaults()
	r.N, r.Batch, r.CFG, r.Labels, r.Seed = n, n, 3, []int{207, 360, 7}, 11
	return r
}

// launched samples a batch and says what the device was asked for.
func launched(t *testing.T, d *Device, e *sample.Engine, r sample.Request) Counters {
	t.Helper()
	before := d.Counters()
	if err := e.Run(context.Background(), r, nil, func(im sample.Image) error {
		if im.MaxToken == im.MaxToken {
			return fmt.Errorf("a number came out of kernels that did not run: %g", im.MaxToken)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	c := d.Counters()
	return Counters{Kernels: c.Kernels - before.Kernels, Graphs: c.Graphs - before.Graphs, GraphKernels: c.GraphKernels - before.GraphKernels,
		Syncs: c.Syncs - before.Syncs, CopiesIn: c.CopiesIn - before.CopiesIn, CopiesOut: c.CopiesOut - before.CopiesOut,
		BytesIn: c.BytesIn - before.BytesIn, BytesOut: c.BytesOut - before.BytesOut, Allocs: c.Allocs - before.Allocs}
}

// launches are those of a MAR-B sample, without the tokenizer, by the head's path and the
// batch. Of the 14,026 kernels for one image 1,536 are attention: 24 blocks × 64
// iterations; a block has 7 kernels, two of them norms. A step of the head has 19 in a
// graph (6 residual blocks × 3, and head_final), of the 100 steps 99 are replayed, the
// first is F32 (design: amplification) and not in a graph. Large batches make the
// modulations of few steps at a time, and so more and shorter graphs.
var launches = []struct {
	path, weights                 string
	batch                         int
	kernels, graphs, graphKernels int64
}{
	{"throughput", "", 1, 14026, 64, 64 * 99 * 19},
	{"throughput", "", 64, 46294, 563, 118047},
	{"latency", "", 1, 14026 + 64, 0, 0}, // one kernel for the 99 steps
	{"latency", "fp8", 1, 14026 + 64, 0, 0},
}

// TestLaunches: a whole sample is enqueued without a wait. What the host knows goes over
// in one copy, the tokens come back in another, and no memory is taken once the sampler
// has run.
func TestLaunches(t *testing.T) {
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("the emulator's counters")
	}
	for _, want := range launches {
		t.Run(fmt.Sprintf("%s%s/%d", want.path, want.weights, want.batch), func(t *testing.T) {
			d, e := traced(t, "MARGO_HEAD_PATH="+want.path, "MARGO_HEAD_WEIGHTS="+want.weights)
			planned := plannedMemory(t, d, e, marB(want.batch))
			if first := launched(t, d, e, marB(want.batch)); first.Syncs != 0 || first.CopiesIn != 1 || first.CopiesOut != 1 {
				t.Errorf("the first run waits %d times and copies %d times in and %d out", first.Syncs, first.CopiesIn, first.CopiesOut)
			}
			before := enqueued(d)
			c := launched(t, d, e, marB(want.batch))
			// Graphs hold the address of the workspace, which must not grow from one iteration to the next.
			if n := enqueued(d) - before - c.Kernels; n != 0 {
				t.Errorf("%d kernels were captured again in the second run", n)
			}
			t.Logf("%+v", c)
			if c.Syncs != 0 || c.CopiesIn != 1 || c.CopiesOut != 1 || c.Allocs != 0 {
				t.Errorf("waits %d times, copies %d times in and %d out, takes memory %d times", c.Syncs, c.CopiesIn, c.CopiesOut, c.Allocs)
			}
			if int64(c.Kernels) != want.kernels || int64(c.Graphs) != want.graphs || int64(c.GraphKernels) != want.graphKernels {
				t.Errorf("%d kernels, %d graphs with %d kernels; want %d, %d and %d", c.Kernels, c.Graphs, c.GraphKernels, want.kernels, want.graphs, want.graphKernels)
			}
			within(t, planned, d)
			if got, asked := kernelRan(d, "head_latency_fp8"), want.weights == "fp8"; got != asked {
				t.Errorf("the head's weights in FP8 are used: %v, asked for: %v", got, asked)
			}
			if tokens := int64(want.batch * 256 * 16 * 4); int64(c.BytesOut) != tokens {
				t.Errorf("%d bytes come back, the tokens have %d", c.BytesOut, tokens)
			}
		})
	}
}

// A second batch's numbers are prepared while the first is under way, and are its own:
// the images are those of batches sampled alone.
func TestConstantsOfBatches(t *testing.T) {
	d := testDevice(t)
	e := openSampler(t, d, engine.F32)
	r := sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.Labels, r.Seed = 5, 2, 3, 4, 950, 2, []int{3, 7, 1}, 11
	before := d.Counters().CopiesIn
	var together [][]float32
	if err := e.Run(context.Background(), r, nil, func(im sample.Image) error { together = append(together, im.Tokens); return nil }); err != nil {
		t.Fatal(err)
	}
	if n := d.Counters().CopiesIn - before; n != 3 {
		t.Errorf("%d copies in for 3 batches", n)
	}
	for i := range r.N {
		one := r
		one.N, one.Batch, one.FirstIndex = 1, 1, i
		if err := e.Run(context.Background(), one, nil, func(im sample.Image) error {
			for k, v := range im.Tokens {
				if v != together[i][k] {
					return fmt.Errorf("token value %d of image %d is %g alone, %g in a batch", k, i, v, together[i][k])
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}
