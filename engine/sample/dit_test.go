//go:build cgo

package sample

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"margo/cpu"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/dit"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/ref"
)

func openDiT(t *testing.T, dev engine.Device, d engine.DType) *Engine {
	t.Helper()
	f := openGolden(t, "dit_tiny")
	cfg, err := checkpoint.InferDiT(f, checkpoint.MAROptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := dit.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Bind(engine.Params(m), f, dev, d, load.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(engine.Params(m)) })
	e, err := OpenDiT(m, nil, dev, Options{Compute: d})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// joint is a short guided run of a DiT, with repeated classes.
func joint(n int) Request {
	r := Defaults()
	r.N, r.Batch, r.CFG, r.Labels, r.Seed, r.Steps = n, n, 2, []int{3, 7, 3}, 11, "6"
	return r
}

// On the CPU an image of a DiT has the same bits in any batch, at any place, with any
// number of threads, and with whatever classes beside it.
func TestDiTInvariance(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		var want []Image
		for _, threads := range []int{1, 3} {
			dev, err := cpu.New(cpu.Options{Threads: threads, Poison: true})
			if err != nil {
				t.Fatal(err)
			}
			e := openDiT(t, dev, d)
			for _, batch := range []int{5, 2, 1} {
				r := joint(5)
				r.Batch = batch
				got := collect(t, e, r)
				if want == nil {
					want = got
				}
				same(t, fmt.Sprintf("%v, %d threads, batch %d", d, threads, batch), got, want)
			}
			r := joint(2)
			r.FirstIndex = 3
			same(t, "images 3 and 4", collect(t, e, r), want[3:])
			r.Seed++
			if slices.Equal(collect(t, e, r)[0].Tokens, want[3].Tokens) {
				t.Error("the seed has no influence")
			}
		}
		if slices.Equal(want[0].Tokens, want[2].Tokens) {
			t.Error("two images of a class are the same")
		}
	}
}

// recorded gives the draws of a DiT's trace.
type recorded struct {
	t        *testing.T
	z, noise []float32 // tokens
	rows     int       // of an image
}

func (recorded) Order(_, n int) []int { return make([]int, n) }
func (r recorded) Noise(_ int, ids []TokenID, steps, ch int) ([]float32, []float32, error) {
	for i, id := range ids {
		if id.Image != i/r.rows || id.Token != i%r.rows {
			r.t.Fatalf("row %d is %+v", i, id)
		}
	}
	return r.z, r.noise, nil
}

// ditTokens turns the first n of images [·,C,side,side] into tokens of 2×2 patches.
func ditTokens(v []float32, n, ch, side int) []float32 {
	out := make([]float32, 0, n*ch*side*side)
	for b := range n {
		for t := range side * side / 4 {
			for k := range ch * 4 {
				y, x := t/(side/2)*2+k%4/2, t%(side/2)*2+k%2
				out = append(out, v[((b*ch+k/4)*side+y)*side+x])
			}
		}
	}
	return out
}

// Whole runs from the recorded draws end where the authors' end, chunks of modulations
// and all.
func TestDiTReplay(t *testing.T) {
	dev, err := cpu.New(cpu.Options{Threads: 2, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	e := openDiT(t, dev, engine.F32)
	for _, sampler := range []string{"p", "ddim"} {
		for _, scale := range []string{"1.5", "4.0"} {
			tr := trace{t, openGolden(t, "dit_"+sampler+"_sample_loop_cfg"+scale)}
			z, noise, final := tr.floats("z"), tr.floats("step_noise"), tr.floats("final")
			per := len(z) / 4
			var drawn []float32
			for k := range 10 {
				drawn = append(drawn, ditTokens(noise[k*4*per:], 2, 4, 8)...)
			}
			r := joint(2)
			r.Labels, r.Steps, r.Draws = []int{3, 7}, "10", recorded{t, ditTokens(z, 2, 4, 8), drawn, 16}
			r.CFG = map[string]float64{"1.5": 1.5, "4.0": 4}[scale]
			if sampler == "ddim" {
				r.Sampler = DDIM
			}
			var got []float32
			for _, im := range collect(t, e, r) {
				got = append(got, im.Tokens...)
			}
			// 4.4e-7 is the recording's own distance from float64 (its README); ours adds
			// to it.
			compare(t, sampler+" cfg "+scale, got, ditTokens(final, 2, 4, 8), 2e-6)
		}
	}
}

func TestDiTGuidance(t *testing.T) {
	dev := ref.New(ref.Exact)
	e := openDiT(t, dev, engine.F32)
	run := func(f func(r *Request)) []float32 {
		r := joint(1)
		f(&r)
		return collect(t, e, r)[0].Tokens
	}
	plain := run(func(r *Request) { r.CFG = 1 })
	compare(t, "guidance next to 1", run(func(r *Request) { r.CFG = 1 + 1e-9 }), plain, 1e-6)
	three, all := run(func(*Request) {}), run(func(r *Request) { r.CFGChannels = GuideAll })
	if slices.Equal(three, all) || slices.Equal(three, plain) {
		t.Error("guidance has no influence")
	}
	uncond := run(func(r *Request) { r.CFG, r.Labels = 1, nil })
	compare(t, "unconditional", run(func(r *Request) { r.CFG, r.Labels = 5, []int{-1} }), uncond, 1e-6)
	// A single step guides the fourth channel with "all" alone.
	one := func(f func(r *Request)) []float32 {
		return run(func(r *Request) { r.Only = []int{0}; f(r) })
	}
	off, a, b := one(func(r *Request) { r.CFG = 1 }), one(func(*Request) {}), one(func(r *Request) { r.CFGChannels = GuideAll })
	for i := range off {
		guided := i%16 < 12
		if guided != (a[i] != off[i]) || b[i] == off[i] || guided && a[i] != b[i] {
			t.Fatalf("column %d: without %g, three channels %g, all %g", i%16, off[i], a[i], b[i])
		}
	}
	// DDIM has no noise at eta 0, at 1 as much as the posterior.
	ddim := run(func(r *Request) { r.Sampler = DDIM })
	if slices.Equal(ddim, run(func(r *Request) { r.Sampler, r.Eta = DDIM, 1 })) {
		t.Error("eta has no influence")
	}
	compare(t, "temperature is of the noise", run(func(r *Request) { r.Sampler, r.Temperature = DDIM, 0.5 }), ddim, 0)
	if slices.Equal(three, run(func(r *Request) { r.Steps = "3,3" })) {
		t.Error("respacing has no influence")
	}
}

func TestDiTRefused(t *testing.T) {
	dev := ref.New(ref.Exact)
	e := openDiT(t, dev, engine.F32)
	for what, f := range map[string]func(r *Request){
		"class 10":     func(r *Request) { r.Labels = []int{10} },
		"class -2":     func(r *Request) { r.Labels = []int{-2} },
		"one step":     func(r *Request) { r.Steps = "1" },
		"too many":     func(r *Request) { r.Steps = "1001" },
		"no steps":     func(r *Request) { r.Steps = "many" },
		"sampler":      func(r *Request) { r.Sampler = "euler" },
		"eta of ddpm":  func(r *Request) { r.Eta = 0.5 },
		"eta":          func(r *Request) { r.Sampler, r.Eta = DDIM, 2 },
		"cfg channels": func(r *Request) { r.CFGChannels = "2" },
		"known":        func(r *Request) { r.Known = &Known{} },
		"only":         func(r *Request) { r.Only = []int{6} },
		"guidance":     func(r *Request) { r.CFG = math.NaN() },
		"batch":        func(r *Request) { r.Batch = 0 },
	} {
		r := joint(1)
		f(&r)
		err := e.Run(context.Background(), r, nil, func(Image) error { return nil })
		if !errors.Is(err, engine.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := e.Estimate(r); !errors.Is(err, engine.Invalid) {
			t.Errorf("%s, estimated: %v", what, err)
		}
	}
}

// Progress counts the steps; a run that is stopped leaves no memory and the engine as
// it was.
func TestDiTCancellation(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openDiT(t, dev, engine.F32)
	want := collect(t, e, joint(2))
	e.c.Arena.Close()
	free := dev.Info().MemFree
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("enough")
	told := 0
	r := joint(2)
	r.AfterIterate = func(k int, _ []float32) {
		if k == 2 {
			cancel(why)
			<-ctx.Done()
		}
	}
	err := e.Run(ctx, r, func(p Progress) {
		if told++; p.Iters != 6 || p.Iter != told {
			t.Errorf("%+v after %d steps", p, told)
		}
	}, func(Image) error { t.Error("an image after the end"); return nil })
	// The flag is set by a goroutine: it may take another step to be seen.
	if !errors.Is(err, engine.Cancelled) && !errors.Is(err, why) || told >= 6 {
		t.Errorf("after %d steps: %v", told, err)
	}
	if got := dev.Info().MemFree; got != free {
		t.Errorf("%d bytes stay", free-got)
	}
	same(t, "after a stop", collect(t, e, joint(2)), want)
}

// A whole run of DiT-B/2 by a dry run: nearly all of the authors' work is left, for
// there is little to be saved but modulations and embeddings.
func TestDiTEstimate(t *testing.T) {
	p, err := checkpoint.NamedDiT("dit-b/2")
	if err != nil {
		t.Fatal(err)
	}
	dev := plan.New(0)
	m, err := dit.New(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Allocate(engine.Params(m), dev, engine.BF16); err != nil {
		t.Fatal(err)
	}
	e, err := OpenDiT(m, nil, dev, Options{Compute: engine.BF16})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	r := Defaults()
	r.N, r.Batch, r.CFG, r.Labels = 4, 4, 4, []int{207, 360}
	est, err := e.Estimate(r)
	if err != nil {
		t.Fatal(err)
	}
	share := float64(est.Work.Total().FLOPs()) / 4 / dit.CountFLOPs(p, 250, true)
	if share < 0.99 || share > 1 {
		t.Errorf("%.4f of the authors' FLOPs", share)
	}
	if est.steps != 250 || est.Activations > 300<<20 {
		t.Errorf("%d steps, %d bytes of activations", est.steps, est.Activations)
	}
}
