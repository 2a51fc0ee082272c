package dit

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
	"margo/engine/ref"
)

const goldens = "../../testdata/goldens/"

func open(t *testing.T, name string) *checkpoint.File {
	t.Helper()
	if !strings.HasSuffix(name, ".pth") {
		name += ".safetensors"
	}
	f, err := checkpoint.Open(goldens+name, checkpoint.OpenOptions{})
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
	v := make([]float32, info.Elems())
	if info.DType.Float() {
		if err := f.ReadF32(name, v); err != nil {
			t.Fatal(err)
		}
		return v, info.Shape
	}
	ints := make([]int64, len(v))
	if err := f.ReadI64(name, ints); err != nil {
		t.Fatal(err)
	}
	for i, k := range ints {
		v[i] = float32(k)
	}
	return v, info.Shape
}

// tiny loads the golden model onto dev.
func tiny(t *testing.T, file string, dev engine.Device, d engine.DType) *Model {
	t.Helper()
	f := open(t, file)
	cfg, err := checkpoint.InferDiT(f, checkpoint.MAROptions{Heads: 4})
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

// near compares with a golden in F32: the oracle's own error is nothing beside the
// golden's rounding, which the limit is.
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

// tokens turns images [n,C,H,W] into tokens [n·L, C·p²] (c, py, px), and images of both
// ε and v [n,2C,H,W] into what the network gives, by the definition of each.
func tokens(cfg *Config, img []float32, order [][2]int) []float32 {
	p, side, l := cfg.PatchSize, cfg.InputSize, cfg.Tokens()
	all := 0
	for _, o := range order {
		all = max(all, o[0]+1)
	}
	channels := max(all, cfg.InChannels)
	n := len(img) / (channels * side * side)
	out := make([]float32, n*l*len(order))
	for i := range out {
		r, k := i/len(order), i%len(order)
		b, tok := r/l, r%l
		c, pos := order[k][0], order[k][1]
		y, x := tok/cfg.Grid()*p+pos/p, tok%cfg.Grid()*p+pos%p
		out[i] = img[((b*channels+c)*side+y)*side+x]
	}
	return out
}

// columns lists channel and position within the patch of every column of a token.
func columns(cfg *Config) [][2]int {
	var o [][2]int
	for c := range cfg.InChannels {
		for p := range cfg.PatchSize * cfg.PatchSize {
			o = append(o, [2]int{c, p})
		}
	}
	return o
}

// outColumns does so for the network's output: ε and v of three channels, then of the rest.
func outColumns(cfg *Config) [][2]int {
	var o [][2]int
	pp, ch := cfg.PatchSize*cfg.PatchSize, cfg.InChannels
	for _, group := range [][2]int{{0, min(3, ch)}, {min(3, ch), ch}} {
		for _, first := range []int{0, ch} {
			for c := group[0]; c < group[1]; c++ {
				for p := range pp {
					o = append(o, [2]int{first + c, p})
				}
			}
		}
	}
	return o
}

func ints(v []float32) []int {
	out := make([]int, len(v))
	for i, x := range v {
		out[i] = int(x)
	}
	return out
}

// classes has -1 for the null class.
func classes(cfg *Config, y []float32) []int {
	out := ints(y)
	for i, k := range out {
		if k == cfg.NumClasses {
			out[i] = -1
		}
	}
	return out
}

func count(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

func TestForwardGolden(t *testing.T) {
	const limit = 2e-6 // ten or so roundings of 2^-24
	for _, file := range []string{"dit_tiny", "dit_tiny.plain.pth"} {
		f := open(t, "dit_forward")
		dev := ref.New(ref.Exact)
		m, c := tiny(t, file, dev, engine.F32), context(t, dev, engine.F32)
		cfg := &m.Config
		x, _ := values(t, f, "x")
		ts, _ := values(t, f, "t")
		y, _ := values(t, f, "y")
		want, _ := values(t, f, "t_embed")
		temb := m.Time(c, ts)
		near(t, "time embedding", c.Download(temb), want, 4e-5) // t·f is rounded at up to 999
		mods := m.Modulations(c, temb, count(len(ts)), classes(cfg, y))
		in := c.F32(tokens(cfg, x, columns(cfg)), 4*cfg.Tokens(), cfg.TokenDim())
		want, _ = values(t, f, "block0_in")
		near(t, "input", c.Download(m.Embed(c, in, 4)), want, limit)
		for i := range m.Layers {
			name := fmt.Sprintf("block%d", i)
			bi, shape := values(t, f, name+"_in")
			bc, cs := values(t, f, name+"_c")
			want, _ = values(t, f, name+"_out")
			s := c.F32(bi, shape[0]*shape[1], shape[2])
			m.Block(c, i, s, m.Modulate(c, c.F32(bc, cs...)), m.Spans(c, shape[0]))
			near(t, name, c.Download(s), want, limit)
		}
		want, _ = values(t, f, "out")
		near(t, "output", c.Download(m.Forward(c, in, mods)), tokens(cfg, want, outColumns(cfg)), 1e-5)
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
	}
}

// The loops of the authors' sampler, with their draws: DDPM and DDIM, guided on three
// channels. The second half of the guided pair is no image: the first is compared.
func TestLoopGoldens(t *testing.T) {
	for _, name := range []string{"dit_p_sample_loop_cfg4.0", "dit_p_sample_loop_cfg1.5", "dit_ddim_sample_loop_cfg4.0", "dit_ddim_sample_loop_cfg1.5"} {
		t.Run(name, func(t *testing.T) {
			f := open(t, name)
			dev := ref.New(ref.Exact)
			m, c := tiny(t, "dit_tiny", dev, engine.F32), context(t, dev, engine.F32)
			cfg := &m.Config
			z, _ := values(t, f, "z")
			y, _ := values(t, f, "y")
			noise, _ := values(t, f, "step_noise")
			samples, _ := values(t, f, "step_samples")
			proc, err := diffusion.DiT("10")
			if err != nil {
				t.Fatal(err)
			}
			steps := proc.Steps()
			if strings.Contains(name, "ddim") {
				if steps, err = proc.DDIMSteps(0); err != nil {
					t.Fatal(err)
				}
			}
			scale := float32(4)
			if strings.HasSuffix(name, "1.5") {
				scale = 1.5
			}
			n, per := 2, len(z)/4
			rows := n * cfg.Tokens()
			at := func(v []float32, k int) *engine.Tensor {
				return c.F32(tokens(cfg, v[k*4*per:k*4*per+n*per], columns(cfg)), rows, cfg.TokenDim())
			}
			guide := make([]float32, rows)
			for i := range guide {
				guide[i] = scale
			}
			g := c.F32(guide, rows)
			x := at(z, 0)
			for k, s := range steps {
				mods := m.Modulations(c, m.Time(c, []float32{float32(s.Timestep)}), make([]int, 4), classes(cfg, y))
				out := c.New(engine.F32, 2*rows, 2*cfg.TokenDim())
				m.Output(c, m.Embed(c, x, 4), mods, out)
				m.Step(c, x, out, at(noise, k), g, false, s, 1)
				near(t, fmt.Sprintf("step %d", k), c.Download(x), c.Download(at(samples, k)), 5e-6)
			}
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
		})
	}
}

// The embedding that is computed where a file has none is the authors', to the last
// bit of float32 where numpy's float64 functions differ from Go's by one of theirs.
func TestPosition(t *testing.T) {
	want, _ := values(t, open(t, "dit_tiny"), "pos_embed")
	got := checkpoint.SinCos2D(64, 4)
	for i := range want {
		if math.Abs(float64(got[i]-want[i])) > 6e-8 {
			t.Fatalf("element %d is %g, want %g", i, got[i], want[i])
		}
	}
}

func TestRefused(t *testing.T) {
	dev := ref.New(ref.Exact)
	m, c := tiny(t, "dit_tiny", dev, engine.F32), context(t, dev, engine.F32)
	for _, k := range []int{-2, 10} {
		m.Modulations(c, m.Time(c, []float32{1}), []int{0}, []int{k})
		if err := c.ClearErr(); !errors.Is(err, engine.Invalid) {
			t.Errorf("class %d: %v", k, err)
		}
	}
	cfg := m.Config
	cfg.NumHeads = 3
	if _, err := New(&cfg); !errors.Is(err, engine.Invalid) {
		t.Error(err)
	}
	m2, err := New(&m.Config)
	if err != nil {
		t.Fatal(err)
	}
	if err := m2.Loaded(); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "pos_embed") {
		t.Error(err)
	}
	stop := uint32(1)
	c.Cancel = &stop
	m.Forward(c, c.F32(make([]float32, 16*16), 16, 16), m.Modulate(c, c.F32(make([]float32, 64), 1, 64)))
	if !errors.Is(c.Err(), engine.Cancelled) {
		t.Error(c.Err())
	}
}

// A sequence's output depends on itself alone, bit for bit.
func TestSequences(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m, c := tiny(t, "dit_tiny", dev, engine.BF16), context(t, dev, engine.BF16)
	x, _ := values(t, open(t, "dit_forward"), "x")
	v := tokens(&m.Config, x, columns(&m.Config))
	ts := []float32{5, 300, 999, 0}
	run := func(from, to int) []float32 {
		mods := m.Modulations(c, m.Time(c, ts[from:to]), count(to-from), []int{1, -1, 9, 3}[from:to])
		return c.Download(m.Forward(c, c.F32(v[from*256:to*256], (to-from)*16, 16), mods))
	}
	all := run(0, 4)
	for i := range 4 {
		if !slices.Equal(run(i, i+1), all[i*512:(i+1)*512]) {
			t.Errorf("sequence %d", i)
		}
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}

// The authors' table of GFLOPs (paper, Table 4), which counts a multiply-add as 1.
func TestCountFLOPs(t *testing.T) {
	for name, g := range map[string]float64{"dit-s/2": 6.06, "dit-b/2": 23.01, "dit-l/2": 80.71, "dit-xl/2": 118.64,
		"dit-s/4": 1.41, "dit-b/4": 5.56, "dit-l/4": 19.70, "dit-xl/4": 29.05, "dit-s/8": 0.36, "dit-b/8": 1.42, "dit-l/8": 5.01, "dit-xl/8": 7.39} {
		cfg, err := checkpoint.NamedDiT(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := CountFLOPs(cfg, 1, false) / 2e9; math.Abs(got/g-1) > 0.02 {
			t.Errorf("%s: %.2f GMAC, the paper has %.2f", name, got, g)
		}
	}
}
