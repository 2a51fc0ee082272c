package tokenizer

import (
	"errors"
	"fmt"
	"math"
	"math/rand"
	"strings"
	"testing"
	"time"

	"margo/cpu"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/ref"
)

// bound loads a golden tokenizer of any kind.
func bound(t *testing.T, name string, dev engine.Device, compute engine.DType) (Autoencoder, *engine.Ctx) {
	t.Helper()
	f := golden(t, name)
	cfg, err := checkpoint.InferKL(f)
	if err != nil {
		t.Fatal(err)
	}
	tok, err := New(cfg, 1, true)
	if err != nil {
		t.Fatal(err)
	}
	params := engine.Params(tok)
	if err := load.Bind(params, f, dev, compute, load.Options{Ignore: tok.Unused}); err != nil {
		t.Fatal(err)
	}
	c, err := engine.NewCtx(dev, compute)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), load.Free(params)); err != nil {
			t.Error(err)
		}
	})
	return tok, c
}

func codesOf(t *testing.T, f *checkpoint.File, name string) ([]int32, []int) {
	t.Helper()
	info, ok := f.Tensor(name)
	if !ok {
		t.Fatalf("no golden %s", name)
	}
	v := make([]int64, info.Elems())
	if err := f.ReadI64(name, v); err != nil {
		t.Fatal(err)
	}
	out := make([]int32, len(v))
	for i, x := range v {
		out[i] = int32(x)
	}
	return out, info.Shape
}

// Layouts of diffusers, LDM and taming: encoding and decoding as the libraries do.
func TestLibraries(t *testing.T) {
	for _, name := range []string{"kl_diffusers.safetensors", "kl_diffusers_old.safetensors", "kl_diffusers_bare.safetensors", "kl_ldm.safetensors",
		"vq_ldm.safetensors", "vq_taming.ckpt"} {
		for _, tc := range []struct {
			mode    ref.Mode
			compute engine.DType
			limit   float64
		}{{ref.Exact, engine.F32, 3e-6}, {ref.Rounded, engine.F32, 6e-6}, {ref.Rounded, engine.BF16, 3e-2}} {
			tok, c := bound(t, name, ref.New(tc.mode), tc.compute)
			io := golden(t, strings.TrimSuffix(strings.TrimSuffix(name, ".safetensors"), ".ckpt")+"_io.safetensors")
			img, shape := nhwc(t, io, "image")
			p := tok.Encode(c, c.F32(img, shape...))
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
			vq, isVQ := tok.(*VQ)
			mean, latent := "mean", []int{}
			if isVQ {
				mean = "prequant"
			}
			want, latent := nhwc(t, io, mean)
			near(t, name+" "+mean, p.Mean, want, tc.limit)
			if isVQ {
				for i, s := range p.Std {
					if s != 0 || !math.IsInf(float64(p.LogVar[i]), -1) {
						t.Fatalf("value %d has standard deviation %g", i, s)
					}
				}
				// The library's codes, exactly: no two are nearly as near in the golden.
				codes, _ := codesOf(t, io, "indices")
				got := vq.Nearest(c, c.F32(want, latent...))
				for i, k := range codes {
					if got == nil || got[i] != k {
						t.Fatalf("%s: position %d has code %v, want %d (%v)", name, i, got, k, c.Err())
					}
				}
				quant, _ := nhwc(t, io, "quant")
				near(t, name+" quant", c.Download(vq.Vectors(c, codes, latent[0], latent[1], latent[2])), quant, 2e-7)
				codes, s := codesOf(t, io, "codes")
				want, _ := nhwc(t, io, "decoded_codes")
				near(t, name+" decoded_codes", c.Download(vq.DecodeCodes(c, codes, s[0], s[1], s[2])), want, tc.limit)
			} else {
				want, _ := nhwc(t, io, "std")
				near(t, name+" std", p.Std, want, tc.limit)
			}
			z, latent := nhwc(t, io, "z")
			want, _ = nhwc(t, io, "decoded_z")
			near(t, name+" decoded_z", c.Download(tok.Decode(c, c.F32(z, latent...))), want, tc.limit)
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
		}
	}
}

// KL-8 with tokens of 2×2 latent positions (P45): the authors' order of columns,
// through the library's decoder.
func TestGroupedTokens(t *testing.T) {
	tok, c := bound(t, "kl_diffusers_old.safetensors", ref.New(ref.Rounded), engine.F32)
	io := golden(t, "mar_kl8_run.safetensors")
	info, _ := io.Tensor("tokens")
	v := make([]float32, info.Elems())
	if err := io.ReadF32("tokens", v); err != nil {
		t.Fatal(err)
	}
	want, _ := nhwc(t, io, "decoded_tokens")
	z := FromTokens(c, c.F32(v, info.Shape...), 32, 32, 2, 0.5)
	near(t, "decoded_tokens", c.Download(tok.Decode(c, z)), want, 6e-6)
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}

// fakeVQ is a VQ tokenizer with the given codebook, on a device.
func fakeVQ(t testing.TB, dev engine.Device, codes []float32, ch int) (*VQ, *engine.Ctx) {
	t.Helper()
	cfg := &checkpoint.KLConfig{Ch: 32, ChMult: []int{1}, NumResBlocks: 1, InChannels: 3, OutChannels: 3, ZChannels: ch, EmbedDim: ch, NEmbed: len(codes) / ch}
	v, err := NewVQ(cfg, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	c, err := engine.NewCtx(dev, engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	v.Codebook.T = c.F32(codes, len(codes)/ch, ch)
	return v, c
}

// rough is an oracle whose GEMM errs as much as F32 sums in the worst order may.
type rough struct{ engine.Device }

func (r rough) NewStream() (engine.Stream, error) {
	s, err := r.Device.NewStream()
	return &roughStream{s, rand.New(rand.NewSource(1))}, err
}

type roughStream struct {
	engine.Stream
	rng *rand.Rand
}

func (s *roughStream) Gemm(a engine.GemmArgs) error {
	if err := s.Stream.Gemm(a); err != nil {
		return err
	}
	get := func(t *engine.Tensor) []float32 {
		v, err := ref.Float64s(t)
		if err != nil {
			panic(err)
		}
		out := make([]float32, len(v))
		for i, x := range v {
			out[i] = float32(x)
		}
		return out
	}
	x, w, y := get(a.X), get(a.W), get(a.Y)
	k, n := a.X.Cols(), a.Y.Cols()
	raw := make([]byte, 4*len(y))
	for i, v := range y {
		r, c := i/n, i%n
		size := math.Sqrt(dot(x[r*k:(r+1)*k], x[r*k:(r+1)*k]) * dot(w[c*k:(c+1)*k], w[c*k:(c+1)*k]))
		v += float32((2*s.rng.Float64() - 1) * size * float64(k-1) / (1 << 24))
		for b := range 4 {
			raw[4*i+b] = byte(math.Float32bits(v) >> (8 * b))
		}
	}
	return s.CopyIn(a.Y, raw)
}

// The search gives what comparing with every code in float64 gives, also where
// codes are equal, differ in the last bit, are 0, or differ much in size, and
// whatever a device's rounding is.
func TestNearest(t *testing.T) {
	rng := rand.New(rand.NewSource(1))
	for _, ch := range []int{1, 4, 8, 256} {
		const n, rows = 300, 600
		codes := make([]float32, n*ch)
		for k := range n {
			e, scale := codes[k*ch:(k+1)*ch], float32(1)
			switch {
			case k%10 == 9: // a code again
				copy(e, codes[rng.Intn(k)*ch:][:ch])
				continue
			case k%10 == 8: // a code again, and nearly so
				copy(e, codes[rng.Intn(k)*ch:][:ch])
				j := rng.Intn(ch)
				e[j] = math.Nextafter32(e[j], 9)
				continue
			case k%10 == 7:
				scale = float32(math.Pow(10, 20*rng.Float64()-16))
			case k == 50:
				scale = 0
			}
			for i := range e {
				e[i] = scale * float32(rng.NormFloat64())
			}
		}
		z := make([]float32, rows*ch)
		for r := range rows {
			x := z[r*ch : (r+1)*ch]
			a, b := codes[rng.Intn(n)*ch:][:ch], codes[rng.Intn(n)*ch:][:ch]
			for i := range x {
				switch r % 5 {
				case 0:
					x[i] = float32(rng.NormFloat64())
				case 1: // between two codes
					x[i] = (a[i] + b[i]) / 2
				case 2:
					x[i] = a[i]
				case 3:
					x[i] = float32(rng.NormFloat64()) * 1e-20
				}
			}
		}
		want := make([]int32, rows)
		for r := range want {
			best := math.Inf(1)
			for k := range n {
				if d := distance2(z[r*ch:(r+1)*ch], codes[k*ch:(k+1)*ch]); d < best {
					best, want[r] = d, int32(k)
				}
			}
		}
		for name, dev := range map[string]engine.Device{"exact": ref.New(ref.Exact), "rounded": ref.New(ref.Rounded), "rough": rough{ref.New(ref.Exact)}} {
			v, c := fakeVQ(t, dev, codes, ch)
			got := v.Nearest(c, c.F32(z, rows, ch))
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
			for r := range want {
				if got[r] != want[r] {
					t.Fatalf("%s, %d channels: position %d has code %d, want %d", name, ch, r, got[r], want[r])
				}
			}
		}
	}
	// A dry run in between leaves nothing behind.
	vq, real := fakeVQ(t, ref.New(ref.Rounded), []float32{0, 1, 2, 3}, 1)
	for range 2 {
		dry, err := engine.NewCtx(plan.New(0), engine.F32)
		if err != nil {
			t.Fatal(err)
		}
		if got := vq.Nearest(dry, dry.New(engine.F32, 2, 1)); len(got) != 2 || dry.Err() != nil {
			t.Errorf("a plan gives %v, %v", got, dry.Err())
		}
		if got := vq.Nearest(real, real.F32([]float32{2.2, 0.9}, 2, 1)); len(got) != 2 || got[0] != 2 || got[1] != 1 {
			t.Errorf("after a plan: %v, %v", got, real.Err())
		}
	}
	// Beyond F32's products: still the nearest.
	v, c := fakeVQ(t, ref.New(ref.Rounded), []float32{1e30, -1e30, 3e30, 0}, 1)
	if got := v.Nearest(c, c.F32([]float32{2.5e30, -1, 1e30, 0}, 4, 1)); len(got) != 4 || got[0] != 2 || got[1] != 3 || got[2] != 0 || got[3] != 3 {
		t.Errorf("large codes: %v, %v", got, c.Err())
	}
}

func TestVQErrors(t *testing.T) {
	nan := float32(math.NaN())
	v, c := fakeVQ(t, ref.New(ref.Rounded), []float32{0, 1, 2, 3}, 2)
	bad, badCtx := fakeVQ(t, ref.New(ref.Rounded), []float32{0, nan}, 1)
	for name, tc := range map[string]struct {
		c    *engine.Ctx
		want string
		f    func()
	}{
		"NaN":           {c, "latent position 1 is not finite", func() { v.Nearest(c, c.F32([]float32{0, 0, nan, 0}, 2, 2)) }},
		"codebook":      {badCtx, "codebook is not finite", func() { bad.Nearest(badCtx, badCtx.F32([]float32{0}, 1, 1)) }},
		"channels":      {c, "want f32[..,2]", func() { v.Nearest(c, c.New(engine.F32, 1, 3)) }},
		"no code":       {c, "code 1 is 2; the codebook has 0 to 1", func() { v.Vectors(c, []int32{0, 2}, 1, 1, 2) }},
		"negative":      {c, "code 0 is -1", func() { v.DecodeCodes(c, []int32{-1}, 1, 1, 1) }},
		"few codes":     {c, "1 codes for 1 images of 1×2", func() { v.DecodeCodes(c, []int32{0}, 1, 1, 2) }},
		"encoder":       {c, "without its encoder", func() { v.Encode(c, c.New(engine.F32, 1, 4, 4, 3)) }},
		"decode shapes": {c, "want f32[N,h,w,2]", func() { v.Decode(c, c.New(engine.F32, 4, 2)) }},
	} {
		tc.f()
		if err := tc.c.ClearErr(); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	if _, err := NewKL(&v.cfg, 1, false); !errors.Is(err, engine.Invalid) {
		t.Errorf("a KL tokenizer with a codebook: %v", err)
	}
	if _, err := NewVQ(checkpoint.KL16(), 1, false); !errors.Is(err, engine.Invalid) {
		t.Errorf("a VQ tokenizer without one: %v", err)
	}
}

// VQ-16 in LDM's size can be planned: the search of a plan's zeros takes no time,
// and the codebook and its scores are in the estimate.
func TestPlanVQ16(t *testing.T) {
	cfg := checkpoint.KL16()
	cfg.DecoderAttn = []int{4}
	cfg.ZChannels, cfg.EmbedDim, cfg.NEmbed = 256, 256, 16384
	v, err := NewVQ(cfg, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	dev := plan.New(0)
	if err := load.Allocate(engine.Params(v), dev, engine.BF16); err != nil {
		t.Fatal(err)
	}
	c, err := engine.NewCtx(dev, engine.BF16)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	v.Decode(c, c.New(engine.F32, 1, 16, 16, 256))
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("planning takes %v", took)
	}
	if r := dev.Report(); r.Ops[engine.OpGemm].FLOPs() < 2*256*256*16384 {
		t.Errorf("%d FLOPs of GEMM", r.Ops[engine.OpGemm].FLOPs())
	}
	if peak := c.Arena.Peak(); peak < 256*16384*4 || peak > 100<<20 {
		t.Errorf("decoding takes %s of activations", plan.Size(int64(peak)))
	}
}

// The search of one 256×256 image's 16×16 positions in the published codebooks.
func BenchmarkNearest(b *testing.B) {
	dev, err := cpu.New(cpu.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	for _, ch := range []int{8, 256} {
		b.Run(fmt.Sprintf("16384x%d", ch), func(b *testing.B) {
			rng := rand.New(rand.NewSource(1))
			normal := func(n int) []float32 {
				v := make([]float32, n)
				for i := range v {
					v[i] = float32(rng.NormFloat64())
				}
				return v
			}
			v, c := fakeVQ(b, dev, normal(16384*ch), ch)
			z := c.F32(normal(256*ch), 1, 16, 16, ch)
			for b.Loop() {
				v.Nearest(c, z)
			}
			if c.Err() != nil {
				b.Fatal(c.Err())
			}
		})
	}
}
