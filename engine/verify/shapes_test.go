package verify

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"math"
	"math/rand"
	"path/filepath"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/ref"
	"margo/engine/sample"
)

// record writes tensors of float32.
type record map[string]data

func (r record) add(name string, v []float32, shape ...int) { r[name] = data{shape, v} }

func (r record) save(t *testing.T, name string, meta map[string]string) string {
	t.Helper()
	var entries []checkpoint.Entry
	for n, d := range r {
		entries = append(entries, checkpoint.Entry{Info: checkpoint.Info{Name: n, DType: checkpoint.F32, Shape: d.shape},
			Write: func(w io.Writer) error { return binary.Write(w, binary.LittleEndian, d.v) }})
	}
	path := filepath.Join(t.TempDir(), name)
	if err := checkpoint.Save(context.Background(), path, entries, meta); err != nil {
		t.Fatal(err)
	}
	return path
}

// odd is a model in which no two sizes are equal that need not be.
func odd(t *testing.T) (*mar.Model, engine.Device, string) {
	t.Helper()
	cfg := &checkpoint.MARConfig{ImgSize: 24, VAEStride: 4, PatchSize: 2, VAEEmbedDim: 5, EncoderEmbedDim: 24, EncoderDepth: 1,
		EncoderNumHeads: 3, DecoderEmbedDim: 40, DecoderDepth: 2, DecoderNumHeads: 2, MLPRatio: 1.5, ClassNum: 7, BufferSize: 3,
		DiffLossD: 1, DiffLossW: 28, NumSamplingSteps: 9, LayerNormEps: 1e-5, DiffusionBatchMul: 1}
	m, err := mar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewSource(1))
	weights := record{}
	for _, s := range cfg.Params() {
		n := 1
		for _, k := range s.Shape {
			n *= k
		}
		v := make([]float32, n)
		for i := range v {
			v[i] = float32(rng.NormFloat64() / math.Sqrt(float64(s.Shape[len(s.Shape)-1])))
		}
		weights.add(s.Name, v, s.Shape...)
	}
	text, _ := json.Marshal(cfg)
	path := weights.save(t, "odd.safetensors", map[string]string{"kind": "mar", "config": string(text)})
	f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dev := ref.New(ref.Rounded)
	if err := load.Bind(engine.Params(m), f, dev, engine.F32, load.Options{}); err != nil {
		t.Fatal(err)
	}
	return m, dev, path
}

// simulate is sample_tokens of mar.py, recording what the goldens record.
func simulate(t *testing.T, m *mar.Model, dev engine.Device, iters, steps int, cfg float64, labels []int) record {
	t.Helper()
	const b = 2
	l, ch, dd, de := m.Config.Tokens(), m.Config.TokenDim(), m.Config.DecoderEmbedDim, m.Config.EncoderEmbedDim
	rng := rand.New(rand.NewSource(2))
	normal := func(n int) []float32 {
		v := make([]float32, n)
		for i := range v {
			v[i] = float32(rng.NormFloat64())
		}
		return v
	}
	c, err := engine.NewCtx(dev, engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	proc, err := diffusion.MAR(steps, diffusion.TrainSteps-1)
	if err != nil {
		t.Fatal(err)
	}
	r := record{}
	k, classes := 1, []int{-1, -1}
	if labels != nil {
		classes = slices.Clone(labels)
		var v []float32
		for _, x := range labels {
			v = append(v, float32(x))
		}
		r.add("labels", v, len(v))
	}
	if cfg != 1 {
		k, classes = 2, append(classes, -1, -1)
	}
	orders := [b][]int{rng.Perm(l), rng.Perm(l)}
	var flat []float32
	for _, o := range orders {
		for _, p := range o {
			flat = append(flat, float32(p))
		}
	}
	r.add("orders", flat, b, l)
	tokens := make([]float32, b*l*ch)
	left := l
	for i, next := range sample.MaskLens(l, iters) {
		mask, due := make([]float32, k*b*l), make([]bool, k*b*l)
		for s := range k * b {
			for j, p := range orders[s%b][:left] {
				mask[s*l+p], due[s*l+p] = 1, j >= next
			}
		}
		var seqs []mar.Seq
		var rows []int
		for s := range k * b {
			q := mar.Seq{Class: s, Image: s % b}
			for p := range l {
				q.Want = append(q.Want, int32(p))
				if mask[s*l+p] == 0 {
					q.Visible = append(q.Visible, int32(p))
				}
				if due[s*l+p] {
					rows = append(rows, s*l+p)
				}
			}
			seqs = append(seqs, q)
		}
		n := len(rows) / k
		class := m.ClassRows(c, classes)
		lay := m.NewLayout(c, seqs)
		pos := make([]int32, b*l)
		for j := range pos {
			pos[j] = int32(j % l)
		}
		enc := m.Encode(c, m.EncoderInput(c, m.EmbedBuffer(c, class), m.EmbedTokens(c, c.F32(tokens, b*l, ch), pos), lay), lay)
		z := c.Download(m.Decode(c, m.DecoderInput(c, enc, lay), lay))
		add := func(name string, v []float32, shape ...int) { r.add(key(i, name), slices.Clone(v), shape...) }
		add("tokens_in", slices.Concat(slices.Repeat([][]float32{tokens}, k)...), k*b, l, ch)
		add("mask", mask, k*b, l)
		add("class_embedding", c.Download(class), k*b, de)
		add("enc_out", c.Download(enc), k*b, m.Config.BufferSize+l-left, de)
		add("dec_out_z", z, k*b, l, dd)
		zsel := pick(z, rows, dd)
		add("z_selected", zsel, len(rows), dd)
		add("cfg_iter", []float32{float32(cfg)})
		x, all := normal(n*ch), normal(steps*len(rows)*ch)
		add("init_noise", x, n, ch)
		add("step_noise", all, steps, len(rows), ch)
		var samples []float32
		cond := m.Head.Cond(c, c.F32(zsel, len(rows), dd))
		for s, coef := range proc.Steps() {
			st := proc.Steps()[s : s+1]
			a := engine.HeadStepsArgs{X: c.F32(x, n, ch), Cond: cond, Time: m.Head.Time(c, c.F32([]float32{float32(coef.Timestep)}, 1)),
				Steps: st, ExactStep: diffusion.ExactSteps(st), Temperature: 0.8, Noise: c.F32(all[s*len(rows)*ch:][:n*ch], n, ch)}
			if k == 2 {
				a.Guidance = c.F32(slices.Repeat([]float32{float32(cfg)}, n), n)
			}
			m.Head.Steps(c, a)
			if x = c.Download(a.X); c.Err() != nil {
				t.Fatal(c.Err())
			}
			samples = append(samples, slices.Concat(slices.Repeat([][]float32{x}, k)...)...)
		}
		add("step_samples", samples, steps, len(rows), ch)
		add("sampled", samples[(steps-1)*len(rows)*ch:], len(rows), ch)
		for j, row := range rows[:n] {
			copy(tokens[row*ch:], x[j*ch:(j+1)*ch])
		}
		left = next
	}
	// unpatchify: nhwcpq -> nchpwq.
	g, p, v := m.Config.Grid(), m.Config.PatchSize, m.Config.VAEEmbedDim
	final := make([]float32, len(tokens))
	for j := range final {
		im, tok, cc, py, px := j/(l*ch), j/ch%l, j%ch/(p*p), j%(p*p)/p, j%p
		final[((im*v+cc)*g*p+tok/g*p+py)*g*p+tok%g*p+px] = tokens[j]
	}
	r.add("final_tokens", final, b, v, g*p, g*p)
	return r
}

// A model whose widths, heads, patches, buffer and classes differ from the
// goldens' replays, with and without guidance and classes, and with more
// iterations than tokens.
func TestOtherShapes(t *testing.T) {
	m, dev, path := odd(t)
	for _, c := range []struct {
		iters  int
		cfg    string
		scale  float64
		labels []int
	}{{3, "1", 1, []int{6, 0}}, {3, "2.5", 2.5, []int{6, 0}}, {2, "2.5", 2.5, nil}, {12, "1.0", 1, []int{1, 5}}} {
		r := simulate(t, m, dev, c.iters, 4, c.scale, c.labels)
		trace := r.save(t, "trace.safetensors", map[string]string{"diffusion_steps": "4", "cfg": c.cfg, "cfg_schedule": "constant", "temperature": "0.8"})
		for _, d := range []engine.DType{engine.F32, engine.BF16} {
			res, err := Run(context.Background(), Options{Model: path, Trace: trace, Device: ref.New(ref.Rounded), DType: d})
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range res.Stages {
				if s.Gated && !s.Pass {
					t.Errorf("%d iterations, cfg %s, %v: %+v", c.iters, c.cfg, d, s)
				}
			}
			last := res.Stages[len(res.Stages)-1]
			if !res.Pass || d == engine.F32 && last.MaxAbs != 0 {
				t.Errorf("%d iterations, cfg %s, %v: pass %v, the whole run differs by %g", c.iters, c.cfg, d, res.Pass, last.MaxAbs)
			}
		}
		// The encoder and decoder alone.
		enc := record{}
		for from, to := range map[string]string{"tokens_in": "tokens", "mask": "mask", "class_embedding": "class_embedding", "enc_out": "enc_out", "dec_out_z": "dec_out_z"} {
			enc[to] = r[key(1, from)]
		}
		res, err := Run(context.Background(), Options{Model: path, Trace: enc.save(t, "encdec.safetensors", nil), Device: ref.New(ref.Exact), DType: engine.F32})
		if err != nil || !res.Pass {
			t.Errorf("encoder and decoder: %+v, %v", res, err)
		}
	}
}
