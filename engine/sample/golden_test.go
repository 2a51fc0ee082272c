package sample

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/ref"
	"margo/engine/testkit"
)

const goldens = "../../testdata/goldens/"

func openGolden(t *testing.T, name string) *checkpoint.File {
	t.Helper()
	f, err := checkpoint.Open(goldens+name+".safetensors", checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func loadTiny(t *testing.T, name string, dev engine.Device, d engine.DType) *mar.Model {
	t.Helper()
	return testkit.LoadMAR(t, goldens+name+".safetensors", dev, d)
}

func openEngine(t *testing.T, m *mar.Model, dev engine.Device, d engine.DType) *Engine {
	t.Helper()
	e, err := Open(m, nil, dev, Options{Compute: d})
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

// trace replays the draws of a recorded run.
type trace struct {
	t *testing.T
	f *checkpoint.File
}

func (tr trace) floats(name string) []float32 {
	info, ok := tr.f.Tensor(name)
	if !ok {
		tr.t.Fatalf("no tensor %s", name)
	}
	v := make([]float32, info.Elems())
	if err := tr.f.ReadF32(name, v); err != nil {
		tr.t.Fatal(err)
	}
	return v
}

func (tr trace) ints(name string) []int {
	info, ok := tr.f.Tensor(name)
	if !ok {
		return nil
	}
	v, out := make([]int64, info.Elems()), []int{}
	if err := tr.f.ReadI64(name, v); err != nil {
		tr.t.Fatal(err)
	}
	for _, k := range v {
		out = append(out, int(k))
	}
	return out
}

func (tr trace) number(name string) float64 {
	v, err := strconv.ParseFloat(tr.f.Metadata()[name], 64)
	if err != nil {
		tr.t.Fatal(err)
	}
	return v
}

// request is the recorded run.
func (tr trace) request() Request {
	r := Defaults()
	r.N, r.Batch, r.Labels, r.Draws = 2, 2, tr.ints("labels"), tr
	r.Iters, r.HeadSteps = int(tr.number("num_iter")), int(tr.number("diffusion_steps"))
	r.CFG, r.Temperature, r.CFGSchedule = tr.number("cfg"), tr.number("temperature"), tr.f.Metadata()["cfg_schedule"]
	return r
}

func (tr trace) Order(image, n int) []int { return tr.ints("orders")[image*n : (image+1)*n] }

// Noise: with guidance the trace has noise for both halves, of which the second
// has no influence.
func (tr trace) Noise(iter int, ids []TokenID, steps, ch int) ([]float32, []float32, error) {
	init, all := tr.floats(fmt.Sprintf("iter%d.init_noise", iter)), tr.floats(fmt.Sprintf("iter%d.step_noise", iter))
	n := len(ids) * ch
	if len(init) != n {
		return nil, nil, fmt.Errorf("iteration %d: the trace predicts %d tokens, we %d", iter, len(init)/ch, len(ids))
	}
	var noise []float32
	for s := range steps {
		noise = append(noise, all[s*len(all)/steps:][:n]...)
	}
	return init, noise, nil
}

// The authors' sampling loop from the first draw to the final tokens, every draw
// replayed, against the float64 oracle. Limits are the recorded run's own
// distance from a float64 replay (goldens/README: 9e-7 for the untrained model,
// 2.1e-4 and 4.2e-5 for the trained one, whose first steps cancel two large
// numbers), doubled.
func TestReplay(t *testing.T) {
	for _, c := range []struct {
		model, trace string
		limit        float64
	}{
		{"mar_tiny", "mar_sample_cfg1", 2e-6},
		{"mar_tiny", "mar_sample_uncond", 2e-6},
		{"mar_tiny", "mar_sample_cfg3_linear", 2e-6},
		{"mar_tiny", "mar_sample_cfg3_constant", 2e-6},
		{"mar_tiny", "mar_sample_cfg3_linear_iter16", 2e-6},
		{"mar_tiny_trained", "mar_trained_sample_cfg1", 4.2e-4},
		{"mar_tiny_trained", "mar_trained_sample_cfg3_linear", 4.2e-4},
		{"mar_tiny_trained", "mar_trained_sample_cfg3_constant", 4.2e-4},
		{"mar_tiny_trained", "mar_trained_sample_cfg3_linear_100steps", 8.4e-5},
	} {
		t.Run(c.trace, func(t *testing.T) {
			dev := ref.New(ref.Exact)
			m := loadTiny(t, c.model, dev, engine.F32)
			e := openEngine(t, m, dev, engine.F32)
			tr := trace{t, openGolden(t, c.trace)}
			r := tr.request()
			seen := 0
			r.AfterIterate = func(iter int, tokens []float32) {
				if iter != seen {
					t.Errorf("iteration %d after %d", iter, seen)
				}
				if seen++; seen == r.Iters {
					return
				}
				// The next iteration of the trace sees these tokens.
				want := tr.floats(fmt.Sprintf("iter%d.tokens_in", seen))
				compare(t, fmt.Sprintf("tokens after iteration %d", iter), tokens, want[:len(tokens)], c.limit)
			}
			var got []float32
			err := e.Run(context.Background(), r, nil, func(im Image) error { got = append(got, im.Tokens...); return nil })
			if err != nil {
				t.Fatal(err)
			}
			compare(t, "final tokens", got, patchOne(tr.floats("final_tokens"), m.Config.TokenDim(), m.Config.Tokens()), c.limit)
			if seen != r.Iters {
				t.Errorf("%d of %d iterations", seen, r.Iters)
			}
		})
	}
}

// patchOne turns [N,C,h,w], as unpatchify leaves it for patches of one position,
// into tokens [N,L,C].
func patchOne(x []float32, ch, l int) []float32 {
	out := make([]float32, len(x))
	for i := range x {
		n, c, p := i/(ch*l), i/l%ch, i%l
		out[(n*l+p)*ch+c] = x[i]
	}
	return out
}

func compare(t *testing.T, what string, got, want []float32, limit float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d values, want %d", what, len(got), len(want))
	}
	most, worst := 0.0, 0.0
	for i := range want {
		most = math.Max(most, math.Abs(float64(want[i])))
		if d := math.Abs(float64(got[i]) - float64(want[i])); !(d <= worst) {
			worst = d
		}
	}
	t.Logf("%s: %.2g of max %.3g", what, worst/most, most)
	if !(worst <= limit*most) {
		t.Errorf("%s: differs by %.3g of max %.3g (limit %.3g)", what, worst/most, most, limit)
	}
}

// randomModel has random weights.
func randomModel(t *testing.T, cfg *mar.Config, dev engine.Device) *mar.Model {
	t.Helper()
	m, err := mar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	params := engine.Params(m)
	if err := load.Random(params, dev, engine.F32, 1); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(params) })
	return m
}
