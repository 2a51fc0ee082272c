package cuda

import (
	"context"
	"path/filepath"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/sample"
	"margo/engine/testkit"
	"margo/engine/verify"
)

func golden(name string) string {
	return filepath.Join("..", "testdata", "goldens", name+".safetensors")
}

// openSampler makes a sampler of the trained tiny MAR.
func openSampler(t *testing.T, d *Device, dt engine.DType) *sample.Engine {
	t.Helper()
	m := testkit.LoadMAR(t, golden("mar_tiny_trained"), d, dt)
	e, err := sample.Open(m, nil, d, sample.Options{Compute: dt})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// runSampler draws n images in one batch and returns their tokens and what the device did.
func runSampler(t *testing.T, d *Device, e *sample.Engine, n, iters int) ([][]float32, Counters) {
	t.Helper()
	r := sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.Labels, r.Seed = n, n, iters, 5, 950, 2, []int{3, 7, 1}, 11
	before := d.Counters()
	var tokens [][]float32
	if err := e.Run(context.Background(), r, nil, func(im sample.Image) error { tokens = append(tokens, im.Tokens); return nil }); err != nil {
		t.Fatal(err)
	}
	c := d.Counters()
	return tokens, Counters{Kernels: c.Kernels - before.Kernels, Graphs: c.Graphs - before.Graphs, GraphKernels: c.GraphKernels - before.GraphKernels,
		Syncs: c.Syncs - before.Syncs, CopiesIn: c.CopiesIn - before.CopiesIn, CopiesOut: c.CopiesOut - before.CopiesOut,
		BytesIn: c.BytesIn - before.BytesIn, BytesOut: c.BytesOut - before.BytesOut, Allocs: c.Allocs - before.Allocs, Held: c.Held}
}

// TestSampleStaysOnDevice: sampling only enqueues. The host waits as often for many
// iterations as for few, which is at the end, and a sampler that has run once takes no
// memory and launches the same kernels again.
func TestSampleStaysOnDevice(t *testing.T) {
	for _, dt := range []engine.DType{engine.F32, engine.BF16} {
		t.Run(dt.String(), func(t *testing.T) {
			d := testDevice(t)
			e := openSampler(t, d, dt)
			first, _ := runSampler(t, d, e, 2, 6)
			again, c := runSampler(t, d, e, 2, 6)
			t.Logf("6 iterations of 2 images: %+v", c)
			for i := range first {
				if !slices.Equal(first[i], again[i]) {
					t.Errorf("image %d differs when it is sampled again", i)
				}
			}
			if c.Allocs != 0 {
				t.Errorf("a second run took memory %d times", c.Allocs)
			}
			if _, more := runSampler(t, d, e, 2, 6); more != c {
				t.Errorf("a third run does not do what the second did:\n%+v\n%+v", more, c)
			}
			_, fewer := runSampler(t, d, e, 2, 3)
			if fewer.Syncs != c.Syncs || fewer.CopiesOut != c.CopiesOut || fewer.BytesOut != c.BytesOut {
				t.Errorf("6 iterations wait %d times and copy out %d times, 3 do so %d and %d times", c.Syncs, c.CopiesOut, fewer.Syncs, fewer.CopiesOut)
			}
			if c.Syncs != 0 || c.CopiesOut != 1 || c.CopiesIn != 1 {
				t.Errorf("the host waits %d times, copies in %d times and out %d times; want what it knows in one copy, and then only to read the tokens", c.Syncs, c.CopiesIn, c.CopiesOut)
			}
			if alone, _ := runSampler(t, d, e, 1, 6); !slices.Equal(alone[0], first[0]) {
				t.Error("an image depends on the batch")
			}
		})
	}
}

// TestReplay replays a recorded run of the authors' code: trunk, head and the whole loop.
func TestReplay(t *testing.T) {
	d := testDevice(t)
	for _, name := range []string{"mar_encdec_vis6", "mar_sample_cfg3_linear"} {
		for _, dt := range []engine.DType{engine.F32, engine.BF16} {
			res, err := verify.Run(context.Background(), verify.Options{Model: golden("mar_tiny"), Trace: golden(name), Device: d, DType: dt})
			if err != nil {
				t.Fatalf("%s %v: %v", name, dt, err)
			}
			gated := 0
			for _, s := range res.Stages {
				if s.Gated {
					gated++
				}
				if s.Gated && !s.Pass {
					t.Errorf("%s %v: %s is off by %.3g, limit %.3g: %s", name, dt, s.Name, s.MaxAbs, s.Limit, s.Reason)
				}
			}
			if gated == 0 {
				t.Errorf("%s %v checks nothing", name, dt)
			}
		}
	}
}

// TestPeakUsed: the peak is that since the last reset, and begins with what is held.
func TestPeakUsed(t *testing.T) {
	d := testDevice(t)
	is := func(want int64) {
		t.Helper()
		if d.PeakUsed() != want {
			t.Errorf("peak is %d, want %d", d.PeakUsed(), want)
		}
	}
	take := func(n int) engine.Buffer {
		t.Helper()
		b, err := d.Alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	a, b := take(1000), take(500)
	is(1500)
	if err := b.Free(); err != nil {
		t.Fatal(err)
	}
	is(1500)
	d.ResetPeakUsed()
	is(1000)
	b = take(200)
	is(1200)
	for _, x := range []engine.Buffer{a, b} {
		if err := x.Free(); err != nil {
			t.Fatal(err)
		}
	}
	if d.Used() != 0 {
		t.Errorf("%d bytes are still counted", d.Used())
	}
}
