package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/imageio"
	"margo/engine/load"
	"margo/engine/sample"
	"margo/engine/verify"
)

// selftestFP8 is what weights in FP8 cost.
type selftestFP8 struct {
	Recorded *verify.FP8Error `json:"recorded_head"`    // of the head whose network the authors' code has recorded
	Demo     *verify.FP8Error `json:"demo_head"`        // of the demo model, weights only
	Images   []fp8Images      `json:"images,omitempty"` // of the demo model
}

// fp8Images compares pictures of two runs with the same seed, pixel by pixel, in steps of 255.
type fp8Images struct {
	What   string  `json:"what"`
	Images int     `json:"images"`
	Mean   float64 `json:"mean_abs"`
	Most   float64 `json:"max_abs"`
}

// mostE4M3 is the largest relative error of e4m3's three bits of mantissa; smaller numbers err by more of themselves, and weigh less.
const mostE4M3 = 1.0 / 16

// fp8 reports errors, which only the weights' are judged by: of them it is known what rounding may do. The table compares the
// kernels with the oracle on the rounded weights.
func (t *selftest) fp8() {
	r := &selftestFP8{}
	t.report.FP8 = r
	demo := filepath.Join(t.goldens, "..", "..", "models", "fashion-mar.safetensors")
	r.Recorded = t.fp8Head("mar_tiny", filepath.Join(t.goldens, "mar_tiny.safetensors"), filepath.Join(t.goldens, "mar_diffloss_net.safetensors"))
	r.Demo = t.fp8Head("fashion-mar", demo, "")
	if t.small {
		t.leftOut("fp8: pictures of the demo model")
		return
	}
	if err := t.fp8Pictures(demo, r); err != nil && t.ctx.Err() == nil {
		t.fail("%s: %v", filepath.Base(demo), err)
	}
}

// fp8Head prints a line a layer.
func (t *selftest) fp8Head(name, model, trace string) *verify.FP8Error {
	e, err := verify.FP8(t.ctx, verify.Options{Model: model, Trace: trace, Device: t.dev})
	if err != nil {
		if t.ctx.Err() == nil {
			t.fail("%s: %v", name, err)
		}
		return nil
	}
	t.printf("%-22s %12s %12s %14s\n", name, "weights bf16", "weights fp8", "noise bf16→fp8")
	line := func(layer string, bf16, fp8, eps float64) {
		noise := "-"
		if trace != "" {
			noise = fmt.Sprintf("%.3f %%", 100*eps)
		}
		t.printf("%-22s %10.3f %% %10.3f %% %14s\n", layer, 100*bf16, 100*fp8, noise)
		if !(fp8 > 0 && fp8 <= mostE4M3) {
			t.fail("%s %s: weights in fp8 are off by %.3g, rounding explains at most %.3g", name, layer, fp8, mostE4M3)
		} else {
			t.at.Passed++
		}
	}
	for _, l := range e.Layers {
		line(l.Name, l.BF16, l.Weights, l.Eps)
	}
	line("all", e.BF16, e.Weights, e.Eps)
	if trace != "" {
		t.printf("noise against the recorded: %.3f %% with bf16 weights, %.3f %% with fp8\n", 100*e.EpsBF16, 100*e.EpsFP8)
	}
	return e
}

// fp8Pictures samples the demo model with weights in f32, bf16 and FP8.
func (t *selftest) fp8Pictures(path string, r *selftestFP8) error {
	const n = 40
	var f32, bf16, fp8 [][]byte
	for _, x := range []struct {
		into *[][]byte
		d    engine.DType
		fp8  bool
	}{{&f32, engine.F32, false}, {&bf16, engine.BF16, false}, {&fp8, engine.BF16, true}} {
		var err error
		if *x.into, err = t.demoPictures(path, n, x.d, x.fp8); err != nil {
			return err
		}
	}
	for _, x := range []struct {
		what string
		a, b [][]byte
	}{{"bf16 and f32", bf16, f32}, {"fp8 and bf16", fp8, bf16}} {
		d := fp8Images{What: x.what, Images: n}
		pixels := 0
		for i, a := range x.a {
			for j, v := range a {
				off := math.Abs(float64(v) - float64(x.b[i][j]))
				d.Mean, d.Most, pixels = d.Mean+off, max(d.Most, off), pixels+1
			}
		}
		d.Mean /= float64(pixels)
		r.Images = append(r.Images, d)
		t.printf("%d pictures of the demo model, %s: mean absolute difference %.2f of 255, at most %.0f\n", n, d.What, d.Mean, d.Most)
		t.at.Passed++
	}
	return nil
}

// demoPictures samples n pictures, with the settings that the file carries.
func (t *selftest) demoPictures(path string, n int, d engine.DType, fp8 bool) (pictures [][]byte, err error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	f, info, err := openModel(path, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tf, err := openTokenizer("", path, info, t.log)
	if err != nil {
		return nil, err
	}
	defer tf.close()
	g, err := loadModel(t.ctx, f, info, t.dev, d, fp8)
	if err != nil {
		return nil, err
	}
	defer load.Free(g.params)
	tok, err := tf.load(t.ctx, t.dev, d, false)
	if err != nil {
		return nil, err
	}
	defer load.Free(engine.Params(tok))
	e, err := g.open(tok, t.dev, sample.Options{Compute: d, LatentScale: tf.scale})
	if err != nil {
		return nil, err
	}
	defer e.Close()
	s, r := info.Sampling, sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.CFGSchedule, r.Temperature = n, n, s.Iters, s.HeadSteps, s.MaxTimestep, s.CFG, s.CFGSchedule, s.Temperature
	r.Labels = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}
	err = e.Run(t.ctx, r, nil, func(im sample.Image) error {
		rgb, finite := imageio.FromFloat(im.W, im.H, im.Pixels)
		if !finite {
			return failf("picture %d has pixels that are not finite", im.Index)
		}
		pictures = append(pictures, rgb.Pix)
		return nil
	})
	return pictures, err
}
