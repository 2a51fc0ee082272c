package mar

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/ref"
)

func named(t *testing.T, name string) *Config {
	t.Helper()
	cfg, err := checkpoint.NamedMAR(name)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// The paper's models have exactly these many parameters (P41, P74, P77), and
// their keys and shapes are those of the authors' checkpoints.
func TestParameterCounts(t *testing.T) {
	for _, c := range []struct {
		name              string
		img, depth, width int
		trunk, head       int64
	}{
		{"mar-base", 256, 6, 1024, 172174848, 35749920},
		{"mar-large", 256, 8, 1280, 406095872, 72230432},
		{"mar-huge", 256, 12, 1536, 791196160, 151206944},
		{"mar-large", 256, 3, 256, 406095872, 1526560},
		{"mar-large", 256, 3, 512, 406095872, 5412384},
		{"mar-large", 256, 3, 1024, 406095872, 20261920},
		{"mar-large", 256, 3, 1536, 406095872, 44548640},
		{"mar-large", 512, 8, 1280, 408455168, 72230432},
	} {
		cfg := named(t, c.name)
		cfg.ImgSize, cfg.DiffLossD, cfg.DiffLossW = c.img, c.depth, c.width
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		var trunk, head int64
		got := map[string]string{}
		for _, p := range engine.Params(m) {
			if strings.HasPrefix(p.Name, "diffloss.") {
				head += int64(p.Elems())
			} else {
				trunk += int64(p.Elems())
			}
			got[p.Name] = engine.ShapeString(p.Shape)
		}
		if trunk != c.trunk || head != c.head {
			t.Errorf("%+v: trunk %d, head %d", c, trunk, head)
		}
		specs := cfg.Params()
		if len(specs) != len(got) {
			t.Errorf("%d parameters, the checkpoint has %d", len(got), len(specs))
		}
		for _, s := range specs {
			if got[s.Name] != engine.ShapeString(s.Shape) {
				t.Errorf("%s is %s, the checkpoint has %s", s.Name, got[s.Name], engine.ShapeString(s.Shape))
			}
		}
	}
}

func TestConfigError(t *testing.T) {
	cfg := named(t, "mar-base")
	cfg.EncoderNumHeads = 7
	if _, err := New(cfg); !errors.Is(err, engine.Invalid) {
		t.Errorf("7 heads of 768 columns: %v", err)
	}
}

// random is a small model whose parameters are far from zero everywhere:
// encoder and decoder of different widths, patches of two positions.
func random(t *testing.T, dev engine.Device, d engine.DType, change func(*Config)) *Model {
	t.Helper()
	cfg := named(t, "mar-base")
	cfg.ImgSize, cfg.VAEStride, cfg.PatchSize, cfg.VAEEmbedDim = 32, 4, 2, 3
	cfg.EncoderEmbedDim, cfg.EncoderDepth, cfg.EncoderNumHeads = 24, 2, 3
	cfg.DecoderEmbedDim, cfg.DecoderDepth, cfg.DecoderNumHeads = 40, 2, 4
	cfg.ClassNum, cfg.BufferSize, cfg.DiffLossD, cfg.DiffLossW = 5, 3, 2, 32
	if change != nil {
		change(cfg)
	}
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	params := engine.Params(m)
	if err := load.Fill(params, noise{}, dev, d, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(params) })
	return m
}

// noise fills parameters with values of magnitude 0.3, by name.
type noise struct{}

func (noise) Release(string) {}
func (noise) ReadAs(name string, d engine.DType, dst []byte) error {
	seed := uint64(0)
	for _, b := range []byte(name) {
		seed = seed*131 + uint64(b)
	}
	for i := 0; i < len(dst)/d.Size(); i++ {
		v := float32(0.3 * engine.NormalAt(engine.RNG{Seed: seed, Purpose: engine.PurposeTest}, i, 0, 0))
		if d == engine.BF16 {
			h := engine.ToBF16(v)
			dst[2*i], dst[2*i+1] = byte(h), byte(h>>8)
			continue
		}
		u := math.Float32bits(v)
		dst[4*i], dst[4*i+1], dst[4*i+2], dst[4*i+3] = byte(u), byte(u>>8), byte(u>>16), byte(u>>24)
	}
	return nil
}

func normals(n, seed int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(engine.NormalAt(engine.RNG{Seed: uint64(seed), Purpose: engine.PurposeTest}, i, 0, 0))
	}
	return v
}

// trunk runs the trunk for sequences over a token table.
func trunk(c *engine.Ctx, m *Model, tokens []float32, classes []int, seqs []Seq) []float32 {
	n := len(tokens) / m.Config.TokenDim()
	pos := make([]int32, n)
	for i := range pos {
		pos[i] = int32(i % m.Config.Tokens())
	}
	lay := m.NewLayout(c, seqs)
	x := m.EncoderInput(c, m.EmbedBuffer(c, m.ClassRows(c, classes)), m.EmbedTokens(c, c.F32(tokens, n, m.Config.TokenDim()), pos), lay)
	return c.Download(m.Decode(c, m.DecoderInput(c, m.Encode(c, x, lay), lay), lay))
}

// Leak test: whatever stands at positions that a sequence doesn't see (those to
// be predicted and those predicted later alike) has no influence on z, in no bit.
// A visible token has.
func TestNoLeak(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		dev := ref.New(ref.Rounded)
		m, c := random(t, dev, d, nil), context(t, dev, d)
		l, ch := m.Config.Tokens(), m.Config.TokenDim()
		seqs := []Seq{
			{Class: 0, Image: 0, Visible: []int32{2, 3, 7, 11}, Want: []int32{0, 1, 15}},
			{Class: 1, Image: 1, Visible: nil, Want: []int32{4, 5}},
			{Class: 1, Image: 0, Visible: []int32{0}, Want: []int32{2, 3}},
		}
		tokens := normals(2*l*ch, 1)
		base := trunk(c, m, tokens, []int{3, -1}, seqs)
		seen := map[int]bool{}
		for _, s := range seqs {
			for _, p := range s.Visible {
				seen[s.Image*l+int(p)] = true
			}
		}
		for row := range 2 * l {
			changed := slices.Clone(tokens)
			for j := range ch {
				changed[row*ch+j] = 1e6
			}
			got := trunk(c, m, changed, []int{3, -1}, seqs)
			if same := slices.Equal(got, base); same == seen[row] {
				t.Errorf("%v: token %d is seen: %v, but z is the same: %v", d, row, seen[row], same)
			}
		}
		// One sequence does not see another's tokens or class.
		first := trunk(c, m, tokens, []int{3, -1}, seqs[:1])
		if !slices.Equal(first, base[:len(first)]) {
			t.Errorf("%v: the first sequence depends on the others", d)
		}
		other := trunk(c, m, tokens, []int{3, 2}, seqs)
		if !slices.Equal(first, other[:len(first)]) || slices.Equal(other, base) {
			t.Errorf("%v: a class reaches the wrong sequence, or none", d)
		}
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
	}
}

// A model may have no buffer tokens: then a sequence may be empty.
func TestNoBuffer(t *testing.T) {
	dev := ref.New(ref.Exact)
	m := random(t, dev, engine.F32, func(c *Config) { c.BufferSize = 0 })
	c := context(t, dev, engine.F32)
	tokens := normals(m.Config.Tokens()*m.Config.TokenDim(), 1)
	z := trunk(c, m, tokens, []int{0}, []Seq{{Want: []int32{1, 4}}, {Visible: []int32{3}, Want: []int32{1}}})
	if c.Err() != nil || len(z) != 3*m.Config.DecoderEmbedDim || slices.ContainsFunc(z, func(v float32) bool { return v != v }) {
		t.Errorf("%v %v", z, c.Err())
	}
}

func TestTrunkErrors(t *testing.T) {
	dev := plan.New(0)
	m := random(t, dev, engine.F32, nil)
	for name, f := range map[string]func(c *engine.Ctx){
		"class 5":         func(c *engine.Ctx) { m.ClassRows(c, []int{0, 5}) },
		"class -2":        func(c *engine.Ctx) { m.ClassRows(c, []int{-2}) },
		"position 16":     func(c *engine.Ctx) { m.NewLayout(c, []Seq{{Visible: []int32{16}}}) },
		"descending want": func(c *engine.Ctx) { m.NewLayout(c, []Seq{{Want: []int32{4, 3}}}) },
	} {
		c := context(t, dev, engine.F32)
		f(c)
		if !errors.Is(c.Err(), engine.Invalid) {
			t.Errorf("%s: %v", name, c.Err())
		}
	}
	// Every stage does nothing after an error.
	c := context(t, dev, engine.F32)
	c.Fail(engine.Errorf("test", engine.Internal, "stop"))
	if z := trunk(c, m, normals(16*12, 1), []int{0}, []Seq{{}}); z != nil {
		t.Error("work after an error")
	}
	m.Head.Steps(c, engine.HeadStepsArgs{})
	m.Head.Denoise(c, nil, nil, nil, false)
	m.Head.DenoiseCFG(c, nil, nil, nil, 1, false)
	if got := dev.Report().Total().FLOPs(); got != 0 {
		t.Errorf("%d FLOPs after an error", got)
	}
}

func TestCancelled(t *testing.T) {
	dev := ref.New(ref.Exact)
	m, c := random(t, dev, engine.F32, nil), context(t, dev, engine.F32)
	stop := uint32(1)
	c.Cancel = &stop
	trunk(c, m, normals(16*12, 1), []int{0}, []Seq{{Want: []int32{0}}})
	if !errors.Is(c.Err(), engine.Cancelled) {
		t.Error(c.Err())
	}
}

// Steps, the device's fused loop, is Compose: single ops of the same device. With
// float64 both agree to rounding; guided, unguided, with exact steps, given or
// drawn noise.
func TestStepsAgainstComposition(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		for _, guided := range []bool{false, true} {
			for _, given := range []bool{false, true} {
				t.Run(fmt.Sprint(d, guided, given), func(t *testing.T) {
					dev := ref.New(ref.Rounded)
					m, c := random(t, dev, d, nil), context(t, dev, d)
					h, n, ch := m.Head, 5, m.Config.TokenDim()
					proc, err := diffusion.MAR(6, 999)
					if err != nil {
						t.Fatal(err)
					}
					steps := proc.Steps()
					var times []float32
					for _, s := range steps {
						times = append(times, float32(s.Timestep))
					}
					run := func(f func(engine.HeadStepsArgs), exact []bool) ([]float32, []float32) {
						r := n
						a := engine.HeadStepsArgs{Steps: steps, ExactStep: exact, Temperature: 0.9,
							RNG: engine.RNG{Seed: 3, Purpose: engine.PurposeStepNoise, Step: 2}}
						if guided {
							r, a.Guidance = 2*n, c.F32([]float32{1, 2, 3, 0, -1}, n)
						}
						a.X, a.Time = c.F32(normals(n*ch, 1), n, ch), h.Time(c, c.F32(times, len(times)))
						a.Cond = h.Cond(c, c.F32(normals(r*m.Config.DecoderEmbedDim, 2), r, m.Config.DecoderEmbedDim))
						a.IDs = c.I32([]int32{3, 0, 1, 0, 2, 7, 2, 8, 0, 0}, n, 2)
						if given {
							a.IDs, a.Noise = nil, c.F32(normals(len(steps)*n*ch, 4), len(steps)*n, ch)
						}
						a.Trace = c.New(engine.F32, len(steps)*n, ch)
						f(a)
						return c.Download(a.X), c.Download(a.Trace)
					}
					exact := diffusion.ExactSteps(steps)
					fused, trace := run(func(a engine.HeadStepsArgs) { h.Steps(c, a) }, exact)
					single, trace2 := run(func(a engine.HeadStepsArgs) {
						a.Weights, a.Exact = h.Weights(false), h.Weights(true)
						h.Compose(c, a)
					}, exact)
					if c.Err() != nil {
						t.Fatal(c.Err())
					}
					near(t, "x", fused, single, 1e-6)
					near(t, "trace", trace, trace2, 1e-6)
					if !slices.Equal(single, trace2[len(trace2)-n*ch:]) {
						t.Error("the trace doesn't end with the result")
					}
					rough, _ := run(func(a engine.HeadStepsArgs) { h.Steps(c, a) }, nil)
					if same := slices.Equal(rough, fused); same != (d == engine.F32) {
						t.Errorf("exact steps make no difference: %v", same)
					}
				})
			}
		}
	}
}

// A head depends on nothing but its own row: z of another token doesn't matter,
// and n tokens give what each gives alone.
func TestHeadRows(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m, c := random(t, dev, engine.F32, nil), context(t, dev, engine.F32)
	ch, dd := m.Config.TokenDim(), m.Config.DecoderEmbedDim
	x, z, ts := normals(3*ch, 1), normals(3*dd, 2), []float32{999, 5, 400}
	all := c.Download(m.Head.Denoise(c, c.F32(x, 3, ch), c.F32(ts, 3), c.F32(z, 3, dd), false))
	for i := range 3 {
		one := c.Download(m.Head.Denoise(c, c.F32(x[i*ch:(i+1)*ch], 1, ch), c.F32(ts[i:i+1], 1), c.F32(z[i*dd:(i+1)*dd], 1, dd), false))
		if !slices.Equal(one, all[i*2*ch:(i+1)*2*ch]) {
			t.Errorf("row %d", i)
		}
	}
}

// The FLOPs of PyTorch's profile of the authors' code, in TFLOP per image.
func TestCountFLOPs(t *testing.T) {
	for _, c := range []struct {
		name           string
		iters, d, w    int
		guided         bool
		enc, dec, head float64
	}{
		{"mar-base", 64, 6, 1024, false, 1.77, 3.73, 1.83},
		{"mar-base", 64, 3, 1024, false, 1.77, 3.73, 1.02},
		{"mar-large", 64, 8, 1280, false, 4.14, 8.70, 3.69},
		{"mar-huge", 64, 12, 1536, false, 8.04, 16.81, 7.74},
		{"mar-base", 256, 6, 1024, false, 8.73, 14.94, 1.83},
		{"mar-base", 64, 6, 1024, true, 3.54, 7.46, 3.66},
	} {
		cfg := named(t, c.name)
		cfg.DiffLossD, cfg.DiffLossW = c.d, c.w
		f := CountFLOPs(cfg, c.iters, 100, c.guided)
		for _, v := range [][2]float64{{f.Encoder, c.enc}, {f.Decoder, c.dec}, {f.Head, c.head}} {
			if math.Abs(v[0]/1e12-v[1]) > 0.011 {
				t.Errorf("%+v: %.3f %.3f %.3f", c, f.Encoder/1e12, f.Decoder/1e12, f.Head/1e12)
				break
			}
		}
	}
}
