package tokenizer

import (
	"errors"
	"math"
	"path/filepath"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/ref"
)

func golden(t *testing.T, name string) *checkpoint.File {
	t.Helper()
	f, err := checkpoint.Open(filepath.Join("..", "..", "testdata", "goldens", name), checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// nhwc reads a golden [N,C,H,W] as [N,H,W,C] with its shape.
func nhwc(t *testing.T, f *checkpoint.File, name string) ([]float32, []int) {
	t.Helper()
	info, ok := f.Tensor(name)
	if !ok || len(info.Shape) != 4 {
		t.Fatalf("no golden %s", name)
	}
	src := make([]float32, info.Elems())
	if err := f.ReadF32(name, src); err != nil {
		t.Fatal(err)
	}
	n, ch, h, w := info.Shape[0], info.Shape[1], info.Shape[2], info.Shape[3]
	out := make([]float32, len(src))
	for i, v := range src {
		x, y, c, b := i%w, i/w%h, i/(w*h)%ch, i/(w*h*ch)
		out[((b*h+y)*w+x)*ch+c] = v
	}
	return out, []int{n, h, w, ch}
}

// near compares by the largest difference as a share of the largest golden.
func near(t *testing.T, what string, got, want []float32, limit float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d values, want %d", what, len(got), len(want))
	}
	worst, most := 0.0, 0.0
	for i := range want {
		d := math.Abs(float64(got[i]) - float64(want[i]))
		if !(d <= worst) { // NaN too
			worst = d
		}
		most = max(most, math.Abs(float64(want[i])))
	}
	t.Logf("%s: max|Δ|/max|golden| %.2g", what, worst/most)
	if !(worst <= limit*most) {
		t.Errorf("%s: max|Δ| %g of max|golden| %g, limit %g", what, worst, most, limit)
	}
}

// tiny loads the golden tokenizer.
func tiny(t *testing.T, name string, dev engine.Device, compute engine.DType, encode bool) (*KL, *engine.Ctx) {
	t.Helper()
	f := golden(t, name)
	cfg, err := checkpoint.InferKL(f)
	if err != nil {
		t.Fatal(err)
	}
	k, err := NewKL(cfg, 1, encode)
	if err != nil {
		t.Fatal(err)
	}
	params := engine.Params(k)
	if err := load.Bind(params, f, dev, compute, load.Options{Ignore: k.Unused}); err != nil {
		t.Fatal(err)
	}
	c, err := engine.NewCtx(dev, compute)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := load.Free(params); err != nil {
			t.Error(err)
		}
	})
	return k, c
}

// The authors' encoder, posterior and decoder, in float64, f32 and bf16.
func TestGoldens(t *testing.T) {
	for _, tc := range []struct {
		name    string
		file    string
		mode    ref.Mode
		compute engine.DType
		limit   float64
	}{
		{"exact", "vae_tiny.safetensors", ref.Exact, engine.F32, 3e-6},
		{"f32", "vae_tiny.pth", ref.Rounded, engine.F32, 6e-6},
		{"bf16", "vae_tiny.safetensors", ref.Rounded, engine.BF16, 3e-2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k, c := tiny(t, tc.file, ref.New(tc.mode), tc.compute, true)
			io := golden(t, "vae_io.safetensors")
			img, shape := nhwc(t, io, "image")
			p := k.Encode(c, c.F32(img, shape...))
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
			for _, g := range []struct {
				name string
				got  []float32
			}{{"mean", p.Mean}, {"logvar", p.LogVar}, {"std", p.Std}} {
				want, _ := nhwc(t, io, g.name)
				near(t, g.name, g.got, want, tc.limit)
			}
			noise, _ := nhwc(t, io, "sample_noise")
			sample, err := p.Sample(noise)
			if err != nil {
				t.Fatal(err)
			}
			want, _ := nhwc(t, io, "sample")
			near(t, "sample", sample, want, tc.limit)

			mean, latent := nhwc(t, io, "mean")
			decode := func(what string, z []float32, shape []int, want []float32) {
				out := k.Decode(c, c.F32(z, shape...))
				if c.Err() != nil {
					t.Fatal(c.Err())
				}
				near(t, what, c.Download(out), want, tc.limit)
			}
			want, _ = nhwc(t, io, "decoded_mode")
			decode("decoded_mode", mean, latent, want)
			z, _ := nhwc(t, io, "z")
			want, _ = nhwc(t, io, "decoded_z")
			decode("decoded_z", z, latent, want)

			rect := golden(t, "vae_io_rect.safetensors")
			z, latent = nhwc(t, rect, "z")
			want, _ = nhwc(t, rect, "decoded")
			decode("decoded rectangle", z, latent, want)
		})
	}
}

// One by one, together or without the encoder, the same numbers.
func TestChunks(t *testing.T) {
	io := golden(t, "vae_io.safetensors")
	z, shape := nhwc(t, io, "z")
	var first []float32
	for _, chunk := range []int{1, 1 << 30} {
		k, c := tiny(t, "vae_tiny.safetensors", ref.New(ref.Rounded), engine.F32, false)
		if k.ChunkBytes = chunk; k.together(16, 16) != map[int]int{1: 1, 1 << 30: 1 << 30 / (32 * 32 * 32 * 12)}[chunk] {
			t.Errorf("%d bytes hold %d images", chunk, k.together(16, 16))
		}
		got := c.Download(k.Decode(c, c.F32(z, shape...)))
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		if first == nil {
			first = got
		}
		for i := range got {
			if got[i] != first[i] {
				t.Fatalf("pixel %d: %g and %g", i, got[i], first[i])
			}
		}
	}
}

func TestErrors(t *testing.T) {
	k, c := tiny(t, "vae_tiny.safetensors", ref.New(ref.Exact), engine.F32, false)
	for name, f := range map[string]func(){
		"without encoder": func() { k.Encode(c, c.New(engine.F32, 1, 4, 4, 3)) },
		"channels":        func() { k.Decode(c, c.New(engine.F32, 1, 4, 4, 3)) },
		"dimensions":      func() { k.Decode(c, c.New(engine.F32, 4, 4, 4)) },
		"bf16":            func() { k.Decode(c, c.New(engine.BF16, 1, 4, 4, 4)) },
		"tokens":          func() { FromTokens(c, c.New(engine.F32, 1, 5, 4), 2, 2, 1, 1) },
	} {
		f()
		if err := c.ClearErr(); !errors.Is(err, engine.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	stop := uint32(1)
	c.Cancel = &stop
	if k.Decode(c, c.New(engine.F32, 1, 4, 4, 4)); !errors.Is(c.ClearErr(), engine.Cancelled) {
		t.Error("a set cancel flag does not stop Decode")
	}
	wide := checkpoint.KL16()
	wide.ChMult = []int{1, 8}
	wide.EncoderAttn = nil
	if _, err := NewKL(wide, 1, false); !errors.Is(err, engine.Unsupported) {
		t.Errorf("1024 channels of attention: %v", err)
	}
	if _, err := NewKL(checkpoint.KL16(), 0, false); !errors.Is(err, engine.Invalid) {
		t.Errorf("latent scale 0: %v", err)
	}
}

// The struct's keys and shapes are those that the checkpoint package expects,
// and the published numbers of parameters.
func TestKL16(t *testing.T) {
	cfg := checkpoint.KL16()
	k, err := NewKL(cfg, checkpoint.DefaultLatentScale, true)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for _, s := range cfg.Params() {
		want[s.Name] = engine.ShapeString(s.Shape)
	}
	total, decoder := 0, 0
	half, err := NewKL(cfg, checkpoint.DefaultLatentScale, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range engine.Params(half) {
		decoder += p.Elems()
		if k.Unused(p.Name) || half.Unused(p.Name) {
			t.Errorf("%s is said to be unused", p.Name)
		}
	}
	for _, p := range engine.Params(k) {
		total += p.Elems()
		if want[p.Name] != engine.ShapeString(p.Shape) {
			t.Errorf("%s has shape %v, want %s", p.Name, p.Shape, want[p.Name])
		}
		delete(want, p.Name)
	}
	for name := range want {
		t.Errorf("no parameter %s", name)
	}
	if total != 66456019 || decoder != 38189203 {
		t.Errorf("%d parameters, %d to decode", total, decoder)
	}
	if !half.Unused("encoder.conv_in.weight") || !half.Unused("quant_conv.bias") || half.Unused("decoder.x") || k.Unused("encoder.x") {
		t.Error("Unused does not tell the encoder")
	}
	if k.Stride() != 16 || k.Channels() != 16 || k.LatentScale() != 0.2325 {
		t.Error("stride, channels or scale")
	}

	// One image: the 250.1 GFLOP counted on the authors' decoder, and memory that
	// fits beside a model.
	dev := plan.New(0)
	if err := load.Allocate(engine.Params(half), dev, engine.BF16); err != nil {
		t.Fatal(err)
	}
	c, err := engine.NewCtx(dev, engine.BF16)
	if err != nil {
		t.Fatal(err)
	}
	before := dev.Report()
	half.Decode(c, c.New(engine.F32, 1, 16, 16, 16))
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	r := dev.Report().Since(before)
	t.Logf("\n%v", r)
	if g := float64(r.Total().FLOPs()) / 1e9; g < 250.05 || g > 250.2 {
		t.Errorf("decoding takes %.1f GFLOP", g)
	}
	if c.Arena.Peak() > 100<<20 {
		t.Errorf("decoding takes %s of activations", plan.Size(int64(c.Arena.Peak())))
	}
}

// Latents to tokens and back, by the authors' order of columns (c, py, px).
func TestTokens(t *testing.T) {
	c, err := engine.NewCtx(ref.New(ref.Exact), engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	const n, h, w, ch, p = 2, 4, 6, 3, 2
	z := make([]float32, n*h*w*ch)
	for i := range z {
		z[i] = float32(i)
	}
	tok := Tokens(c, c.F32(z, n, h, w, ch), p, 0.5)
	v := c.Download(tok)
	for _, at := range [][5]int{{0, 0, 0, 0, 0}, {0, 1, 2, 1, 0}, {1, 5, 1, 0, 1}, {1, 3, 2, 1, 1}} {
		b, l, cc, py, px := at[0], at[1], at[2], at[3], at[4]
		y, x := l/(w/p)*p+py, l%(w/p)*p+px
		if got, want := v[(b*6+l)*ch*p*p+(cc*p+py)*p+px], z[((b*h+y)*w+x)*ch+cc]/2; got != want {
			t.Errorf("%v: %g, want %g", at, got, want)
		}
	}
	back := c.Download(FromTokens(c, tok, h, w, p, 0.5))
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	for i := range z {
		if back[i] != z[i] {
			t.Fatalf("value %d: %g, want %g", i, back[i], z[i])
		}
	}
}

func TestPixels(t *testing.T) {
	c, err := engine.NewCtx(ref.New(ref.Exact), engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	img := []float32{-1, 0, 1, 0.5, 0.25, 0.125}
	var tok Tokenizer = Pixels{}
	p := tok.Encode(c, c.F32(img, 1, 1, 2, 3))
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	for i, v := range p.Draw(1, 0) {
		if v != img[i] {
			t.Errorf("pixel %d: %g, want %g", i, v, img[i])
		}
	}
	z := c.F32(img, 1, 1, 2, 3)
	if tok.Decode(c, z) != z {
		t.Error("Decode changes pixels")
	}
}

// Draws are keyed by seed and image: the same whatever images come along.
func TestDraw(t *testing.T) {
	p := newPosterior(2, 1, 2, 3)
	for i := range p.Std {
		p.Mean[i], p.Std[i] = 10, 2
	}
	both, second := p.Draw(7, 4), newPosterior(1, 1, 2, 3)
	copy(second.Mean, p.Mean)
	copy(second.Std, p.Std)
	alone := second.Draw(7, 5)
	for i, v := range alone {
		if v != both[6+i] || v == both[i] {
			t.Errorf("value %d: %g alone, %g and %g together", i, v, both[6+i], both[i])
		}
		want := 10 + 2*float32(engine.NormalAt(engine.RNG{Seed: 7, Purpose: engine.PurposeLatent}, i%3, i/3, 5))
		if v != want {
			t.Errorf("value %d: %g, want %g", i, v, want)
		}
	}
	p.set(0, []float32{1, 2, 3, -100, 0, 100})
	if p.LogVar[0] != -30 || p.LogVar[1] != 0 || p.LogVar[2] != 20 || p.Std[1] != 1 {
		t.Errorf("log variances %v", p.LogVar[:3])
	}
}
