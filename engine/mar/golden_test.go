package mar

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/load"
	"margo/engine/nn"
	"margo/engine/ref"
)

const goldens = "../../testdata/goldens/"

func open(t *testing.T, name string) *checkpoint.File {
	t.Helper()
	f, err := checkpoint.Open(goldens+name+".safetensors", checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// values reads a tensor and its shape.
func values(t *testing.T, f *checkpoint.File, name string) ([]float32, []int) {
	t.Helper()
	info, ok := f.Tensor(name)
	if !ok {
		t.Fatalf("no tensor %s", name)
	}
	n := 1
	shape := make([]int, len(info.Shape))
	for i, s := range info.Shape {
		shape[i] = int(s)
		n *= int(s)
	}
	v := make([]float32, n)
	if strings.HasPrefix(string(info.DType), "F") {
		if err := f.ReadF32(name, v); err != nil {
			t.Fatal(err)
		}
		return v, shape
	}
	ints := make([]int64, n)
	if err := f.ReadI64(name, ints); err != nil {
		t.Fatal(err)
	}
	for i, k := range ints {
		v[i] = float32(k)
	}
	return v, shape
}

// tiny loads a golden model onto dev.
func tiny(t *testing.T, name string, dev engine.Device, d engine.DType) *Model {
	t.Helper()
	f := open(t, name)
	cfg, err := checkpoint.InferMAR(f, checkpoint.MAROptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Bind(engine.Params(m), f, dev, d, load.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(engine.Params(m)) })
	return m
}

func context(t *testing.T, dev engine.Device, d engine.DType) *engine.Ctx {
	t.Helper()
	c, err := engine.NewCtx(dev, d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// near compares with a golden in F32: the oracle's own error is nothing beside
// the golden's rounding, which the limit is.
func near(t *testing.T, what string, got, want []float32, limit float64) {
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
	t.Logf("%s: %.2g of max", what, worst/most)
	if !(worst <= limit*most) {
		t.Errorf("%s: differs by %.3g, %.3g of max %.3g (limit %.3g)", what, worst, worst/most, most, limit)
	}
}

// scene is a golden's masked tokens as sequences; every position is wanted.
func scene(mask []float32, l int, want func(p int) bool) []Seq {
	var seqs []Seq
	for i := 0; i < len(mask)/l; i++ {
		s := Seq{Class: i, Image: i}
		for p := range l {
			if mask[i*l+p] == 0 {
				s.Visible = append(s.Visible, int32(p))
			}
			if want(p) {
				s.Want = append(s.Want, int32(p))
			}
		}
		seqs = append(seqs, s)
	}
	return seqs
}

// embed is the encoder's input of a golden.
func embed(c *engine.Ctx, m *Model, tokens, class []float32, lay *Layout) *engine.Tensor {
	l, ch, n := m.Config.Tokens(), m.Config.TokenDim(), len(lay.Seqs)
	pos := make([]int32, n*l)
	for i := range pos {
		pos[i] = int32(i % l)
	}
	return m.EncoderInput(c, m.EmbedBuffer(c, c.F32(class, n, m.Config.EncoderEmbedDim)),
		m.EmbedTokens(c, c.F32(tokens, n*l, ch), pos), lay)
}

func everywhere(int) bool { return true }

func TestTrunkGoldens(t *testing.T) {
	// Ten or so roundings of 2^-24 add up in F32 between the golden's input and
	// the end of a two-block trunk.
	const limit = 2e-6
	for _, name := range []string{"mar_encdec_vis6", "mar_encdec_allmasked"} {
		t.Run(name, func(t *testing.T) {
			f := open(t, name)
			dev := ref.New(ref.Exact)
			m, c := tiny(t, "mar_tiny", dev, engine.F32), context(t, dev, engine.F32)
			tokens, _ := values(t, f, "tokens")
			mask, _ := values(t, f, "mask")
			class, _ := values(t, f, "class_embedding")
			l := m.Config.Tokens()
			lay := m.NewLayout(c, scene(mask, l, everywhere))

			labels, _ := values(t, f, "labels")
			ids := make([]int, len(labels))
			for i, k := range labels {
				ids[i] = int(k)
			}
			near(t, "class rows", c.Download(m.ClassRows(c, ids)), class, 0)

			in := embed(c, m, tokens, class, lay)
			want, _ := values(t, f, "enc_block0_in")
			near(t, "encoder input", c.Download(in), want, limit)
			enc := m.Encode(c, in, lay)
			want, encShape := values(t, f, "enc_out")
			near(t, "encoder", c.Download(enc), want, limit)
			if encShape[1] != lay.Encoder.Rows()/len(lay.Seqs) {
				t.Errorf("%v encoder rows, golden has %v", lay.Encoder.Rows(), encShape)
			}
			dec := m.DecoderInput(c, enc, lay)
			want, _ = values(t, f, "dec_block0_in")
			near(t, "decoder input", c.Download(dec), want, limit)
			z := m.Decode(c, dec, lay)
			wantZ, _ := values(t, f, "dec_out_z")
			near(t, "z", c.Download(z), wantZ, limit)

			for i := range m.Encoder {
				blockGolden(t, c, f, m.Encoder[i], fmt.Sprintf("enc_block%d", i), lay.Encoder, limit)
			}
			for i := range m.Decoder {
				blockGolden(t, c, f, m.Decoder[i], fmt.Sprintf("dec_block%d", i), lay.Decoder, limit)
			}

			masked := m.DecodeMasked(c, m.DecoderInput(c, enc, lay), lay, m.MaskQKV(c))
			if !slices.Equal(c.Download(masked), c.Download(z)) {
				t.Error("precomputed queries, keys and values change z")
			}

			// Asking for some positions only gives the same numbers, bit for bit.
			odd := m.NewLayout(c, scene(mask, l, func(p int) bool { return p%3 == 1 }))
			z2 := c.Download(m.Decode(c, m.DecoderInput(c, enc, odd), odd))
			all, d, k := c.Download(z), m.Config.DecoderEmbedDim, 0
			for i := range odd.Seqs {
				for p := 1; p < l; p += 3 {
					for j := range d {
						if z2[k*d+j] != all[(i*l+p)*d+j] {
							t.Fatalf("z of sequence %d position %d depends on what else is asked", i, p)
						}
					}
					k++
				}
			}
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
		})
	}
}

func blockGolden(t *testing.T, c *engine.Ctx, f *checkpoint.File, b *nn.Block, name string, s nn.Spans, limit float64) {
	t.Helper()
	in, shape := values(t, f, name+"_in")
	want, _ := values(t, f, name+"_out")
	x := b.Forward(c, c.F32(in, shape...).Reshape(shape[0]*shape[1], shape[2]), s)
	near(t, name, c.Download(x), want, limit)
}

func TestHeadGoldens(t *testing.T) {
	const limit = 2e-6
	f := open(t, "mar_diffloss_net")
	dev := ref.New(ref.Exact)
	m, c := tiny(t, "mar_tiny", dev, engine.F32), context(t, dev, engine.F32)
	h := m.Head
	x, xs := values(t, f, "x")
	ts, _ := values(t, f, "t")
	z, zs := values(t, f, "c")
	tt, zt := c.F32(ts, len(ts)), c.F32(z, zs...)

	emb := c.New(engine.F32, len(ts), frequencyDim)
	c.TimestepEmbedding(engine.TimestepEmbeddingArgs{T: tt, Y: emb, MaxPeriod: maxTimePeriod})
	want, _ := values(t, f, "timestep_embedding")
	// The argument t·f of sin and cos is up to 999, rounded to 2^-24 of that.
	near(t, "timestep embedding", c.Download(emb), want, 1e-4)
	want, _ = values(t, f, "time_embed_out")
	near(t, "time embedding", c.Download(h.Time(c, tt)), want, 2e-5)
	want, _ = values(t, f, "out")
	near(t, "network", c.Download(h.Denoise(c, c.F32(x, xs...), tt, zt, false)), want, limit)
	want, _ = values(t, f, "out_with_cfg3")
	n := xs[0] / 2
	near(t, "network with guidance", c.Download(h.DenoiseCFG(c, c.F32(x[:n*xs[1]], n, xs[1]), tt, zt, 3, false)), want, limit)

	// One reverse step of the process respaced to 10.
	index, _ := values(t, f, "ps_index")
	proc, err := diffusion.MAR(10, 999)
	if err != nil {
		t.Fatal(err)
	}
	noise, _ := values(t, f, "ps_noise")
	sample, _ := values(t, f, "ps_sample_temp0p9")
	for i := range index {
		k := int(index[i])
		row := func(v []float32, w int) *engine.Tensor { return c.F32(v[i*w:(i+1)*w], 1, w) }
		ch := xs[1]
		xr := row(x, ch)
		out := h.Denoise(c, xr, c.F32([]float32{float32(proc.Timesteps[k])}, 1), row(z, zs[1]), false)
		c.DiffusionStep(engine.DiffusionStepArgs{X: xr, Y: xr, Out: out, Noise: row(noise, ch), Coef: proc.Step(k), Temperature: 0.9})
		near(t, fmt.Sprintf("reverse step at index %d", k), c.Download(xr), sample[i*ch:(i+1)*ch], limit)
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}
