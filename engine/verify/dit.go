package verify

import (
	"fmt"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/dit"
	"margo/engine/sample"
)

// columns lists, for every column of a token of a DiT, its channel and its place in
// the patch.
func columns(cfg *dit.Config) [][2]int {
	var out [][2]int
	for k := range cfg.TokenDim() {
		out = append(out, [2]int{k / (cfg.PatchSize * cfg.PatchSize), k % (cfg.PatchSize * cfg.PatchSize)})
	}
	return out
}

// outColumns does so for the network's output, as the final layer's order says.
func outColumns(cfg *dit.Config) [][2]int {
	var out [][2]int
	for _, row := range dit.FinalOrder(cfg) { // (py, px, c) of 2C channels
		out = append(out, [2]int{row % (2 * cfg.InChannels), row / (2 * cfg.InChannels)})
	}
	return out
}

// asTokens turns images [n, channels, side, side] into tokens [n·L, len(cols)].
func asTokens(cfg *dit.Config, img []float32, channels int, cols [][2]int) []float32 {
	p, side, l := cfg.PatchSize, cfg.InputSize, cfg.Tokens()
	n := len(img) / (channels * side * side)
	out := make([]float32, n*l*len(cols))
	for i := range out {
		r, col := i/len(cols), cols[i%len(cols)]
		y, x := r%l/cfg.Grid()*p+col[1]/p, r%l%cfg.Grid()*p+col[1]%p
		out[i] = img[((r/l*channels+col[0])*side+y)*side+x]
	}
	return out
}

// guide is the authors' guidance on rows of the network's output, the second half
// unconditional: ε of the first three channels, by column of the token, and ε of the
// others as it is. The first half of the rows alone.
func guide(cfg *dit.Config, out []float64, scale float64) []float64 {
	w := 2 * cfg.TokenDim()
	n := len(out) / w / 2
	eps := make([]float64, n*cfg.TokenDim())
	for i, g := range dit.Groups(cfg) {
		for r := range n {
			for k := range g.To - g.From {
				e := out[r*w+g.Out+k]
				if u := out[(n+r)*w+g.Out+k]; i == 0 {
					e = u + scale*(e-u)
				}
				eps[r*cfg.TokenDim()+g.From+k] = e
			}
		}
	}
	return eps
}

// ditClasses reads labels; the class beyond the last is none.
func (v *verifier) ditClasses(err *error, n int) []int {
	y := v.t.ints(err, "y", 1, v.model.DiT.NumClasses+1)
	if *err == nil && (len(y) != n || n == 0) {
		*err = v.t.unknown("tensor y has %d labels for %d images", len(y), n)
	}
	for i := range y {
		if y[i] == v.model.DiT.NumClasses {
			y[i] = -1
		}
	}
	return y
}

// forward is the network on a side: tokens of each sequence, timesteps and classes.
func (s *side) forward(x []float32, times []int, classes []int) *engine.Tensor {
	m := s.m.dit
	t, rows := make([]float32, len(times)), make([]int, len(times))
	for i := range times {
		t[i], rows[i] = float32(times[i]), i
	}
	mods := m.Modulations(s.c, m.Time(s.c, t), rows, classes)
	return m.Forward(s.c, s.c.F32(x, len(times)*m.Config.Tokens(), m.Config.TokenDim()), mods)
}

// ditForward compares a forward pass, block by block, and the network with the
// authors' guidance.
func (v *verifier) ditForward() error {
	var err error
	cfg := v.model.DiT
	d, l, width := cfg.HiddenSize, cfg.Tokens(), cfg.InputSize
	x := v.t.get(&err, "x", 4)
	times := v.t.ints(&err, "t", 1, diffusion.TrainSteps)
	n := len(times)
	y := v.ditClasses(&err, n)
	temb, out := v.t.get(&err, "t_embed", 2), v.t.get(&err, "out", 4)
	v.t.is(&err, "x", x, n, cfg.InChannels, width, width)
	v.t.is(&err, "t_embed", temb, n, d)
	v.t.is(&err, "out", out, n, 2*cfg.InChannels, width, width)
	if err != nil {
		return err
	}
	in := asTokens(cfg, x.v, cfg.InChannels, columns(cfg))
	checks := []check{one("time MLP", temb.v, func(s *side) *engine.Tensor {
		f := make([]float32, n)
		for i, k := range times {
			f[i] = float32(k)
		}
		return s.m.dit.Time(s.c, f)
	})}
	for i := range cfg.Depth {
		name := fmt.Sprintf("block%d", i)
		if !v.t.has(name + "_in") {
			continue
		}
		bi, bc, bo := v.t.get(&err, name+"_in", 3), v.t.get(&err, name+"_c", 2), v.t.get(&err, name+"_out", 3)
		v.t.is(&err, name+"_in", bi, n, l, d)
		v.t.is(&err, name+"_c", bc, n, d)
		v.t.is(&err, name+"_out", bo, n, l, d)
		if err != nil {
			return err
		}
		if i == 0 {
			checks = append(checks, one("input", bi.v, func(s *side) *engine.Tensor {
				return s.m.dit.Embed(s.c, s.c.F32(in, n*l, cfg.TokenDim()), n)
			}))
		}
		checks = append(checks, one(fmt.Sprintf("block %d", i), bo.v, func(s *side) *engine.Tensor {
			h := s.upload(bi, engine.F32)
			s.m.dit.Block(s.c, i, h, s.m.dit.Modulate(s.c, s.upload(bc, engine.F32)), s.m.dit.Spans(s.c, n))
			return h
		}))
	}
	checks = append(checks, one("network", asTokens(cfg, out.v, 2*cfg.InChannels, outColumns(cfg)), func(s *side) *engine.Tensor {
		return s.forward(in, times, y)
	}))
	if v.t.has("out_with_cfg4") {
		guided, t := v.t.get(&err, "out_with_cfg4", 4), v.t.ints(&err, "cfg_t", 1, diffusion.TrainSteps)
		v.t.is(&err, "out_with_cfg4", guided, n, 2*cfg.InChannels, width, width)
		if err == nil && (n%2 != 0 || len(t) != n) {
			err = v.t.unknown("tensor cfg_t has %d timesteps for %d images; guidance needs pairs", len(t), n)
		}
		if err != nil {
			return err
		}
		half := in[:len(in)/2]
		both := append(append([]float32(nil), half...), half...)
		checks = append(checks, check{names: []string{"ε with guidance 4 on 3 channels"},
			goldens: [][]float32{asTokens(cfg, guided.v[:len(guided.v)/2], 2*cfg.InChannels, columns(cfg))},
			run: func(s *side) [][]float64 {
				return [][]float64{guide(cfg, s.read(s.forward(both, t, y)), 4)}
			}})
	}
	return v.all(checks)
}

// ditRun is a recorded sampling loop.
type ditRun struct {
	cfg                *dit.Config
	n                  int // images: the first half of the recorded rows
	scale, eta         float64
	respacing, sampler string
	proc               *diffusion.Process
	steps              []engine.StepCoef
	classes            []int // of all rows
	z                  []float32
	noise, samples     [][]float32 // by step
	start, final       []float32
}

// ditLoop reads the trace. The recorded second half is not an image: guidance feeds the
// network the first half twice, and only the first half's rows are kept (sample.py).
func (v *verifier) ditLoop(err *error) ditRun {
	cfg := v.model.DiT
	r := ditRun{cfg: cfg, scale: v.t.number(err, "cfg_scale", 1, -1e6, 1e6), sampler: sample.DDPM, respacing: v.t.Metadata()["respacing"]}
	if e := v.t.Metadata()["eta"]; e != "" && e != "n/a" {
		r.sampler, r.eta = sample.DDIM, v.t.number(err, "eta", 0, 0, 1)
	}
	z := v.t.get(err, "z", 4)
	if *err != nil {
		return r
	}
	var e error
	if r.proc, e = diffusion.DiT(r.respacing); e != nil {
		*err = v.t.unknown("metadata respacing: %w", e)
		return r
	}
	if r.steps = r.proc.Steps(); r.sampler == sample.DDIM {
		if r.steps, e = r.proc.DDIMSteps(r.eta); e != nil {
			*err = v.t.unknown("metadata eta: %w", e)
			return r
		}
	}
	rows, side, k := z.shape[0], cfg.InputSize, len(r.steps)
	r.classes = v.ditClasses(err, rows)
	noise, samples, start := v.t.get(err, "step_noise", 5), v.t.get(err, "step_samples", 5), v.t.get(err, "step_pred_xstart", 5)
	final := v.t.get(err, "final", 4)
	v.t.is(err, "z", z, rows, cfg.InChannels, side, side)
	v.t.is(err, "final", final, rows, cfg.InChannels, side, side)
	v.t.is(err, "step_noise", noise, k, rows, cfg.InChannels, side, side)
	v.t.is(err, "step_samples", samples, k, rows, cfg.InChannels, side, side)
	v.t.is(err, "step_pred_xstart", start, k, rows, cfg.InChannels, side, side)
	if *err == nil && rows%2 != 0 {
		*err = v.t.unknown("tensor z has %d images; guidance needs pairs", rows)
	}
	if *err != nil {
		return r
	}
	r.n = rows / 2
	for i := range r.n {
		if r.classes[r.n+i] != -1 && *err == nil {
			*err = v.t.unknown("tensor y: row %d of the unconditional half has a class", r.n+i)
		}
	}
	half := func(d data, step int) []float32 {
		size := rows * cfg.InChannels * side * side
		return asTokens(cfg, d.v[step*size:step*size+size/2], cfg.InChannels, columns(cfg))
	}
	r.z, r.final = half(z, 0), half(final, 0)
	for s := range k {
		r.noise, r.samples = append(r.noise, half(noise, s)), append(r.samples, half(samples, s))
		r.start = append(r.start, half(start, s)...)
	}
	return r
}

// Order of a DiT's tokens there is none.
func (r ditRun) Order(_, n int) []int { return nil }

// Noise is what the run drew.
func (r ditRun) Noise(_ int, ids []sample.TokenID, steps, ch int) (x, noise []float32, err error) {
	for _, v := range r.noise {
		noise = append(noise, v...)
	}
	return r.z, noise, nil
}

// ditSampling compares every step of a loop from its recorded input, then lets the
// whole loop run free.
func (v *verifier) ditSampling() error {
	var err error
	r := v.ditLoop(&err)
	if err != nil {
		return err
	}
	ch, rows := r.cfg.TokenDim(), r.n*r.cfg.Tokens()
	flat := make([]float32, 0, len(r.start))
	for _, s := range r.samples {
		flat = append(flat, s...)
	}
	steps := check{names: []string{"steps, one by one: sample", "steps, one by one: x_0"}, goldens: [][]float32{flat, r.start}}
	steps.run = func(s *side) [][]float64 {
		var sampled, start []float64
		scale := make([]float32, rows)
		for i := range scale {
			scale[i] = float32(r.scale)
		}
		for k, coef := range r.steps {
			from := r.z
			if k > 0 {
				from = r.samples[k-1]
			}
			s.c.Scoped(func() {
				m := s.m.dit
				x := s.c.F32(from, rows, ch)
				mods := m.Modulations(s.c, m.Time(s.c, []float32{float32(coef.Timestep)}), make([]int, 2*r.n), r.classes)
				out := s.c.New(engine.F32, 2*rows, 2*ch)
				if s.c.Err() != nil {
					return
				}
				m.Output(s.c, m.Embed(s.c, x, 2*r.n), mods, out)
				m.Step(s.c, x, out, s.c.F32(r.noise[k], rows, ch), s.c.F32(scale, rows), false, coef, 1)
				sampled = append(sampled, s.read(x)...)
				net := s.read(out)
				if s.c.Err() != nil {
					return
				}
				i := len(r.steps) - 1 - k
				for j, e := range guide(r.cfg, net, r.scale) {
					start = append(start, r.proc.SqrtRecipAlphasCumprod[i]*float64(from[j])-r.proc.SqrtRecipm1AlphasCumprod[i]*e)
				}
			})
		}
		return [][]float64{sampled, start}
	}
	q := sample.Defaults()
	q.N, q.Batch, q.Labels, q.CFG, q.Draws = r.n, r.n, r.classes[:r.n], r.scale, r
	q.Steps, q.Sampler, q.Eta = r.respacing, r.sampler, r.eta
	whole := check{names: []string{fmt.Sprintf("whole run of %d steps", len(r.steps))}, goldens: [][]float32{r.final}, free: true}
	whole.run = func(s *side) [][]float64 {
		e, err := sample.OpenDiT(s.m.dit, nil, s.dev, sample.Options{Compute: s.compute})
		if err != nil {
			s.c.Fail(err)
			return nil
		}
		defer e.Close()
		out := make([]float64, 0, len(r.final))
		s.c.Fail(e.Run(v.ctx, q, nil, func(im sample.Image) error {
			out = append(out, widen(im.Tokens)...)
			return nil
		}))
		return [][]float64{out}
	}
	return v.all([]check{steps, whole})
}

// kindOf is the kind of model that a trace is of; KindKL stands for any tokenizer.
func kindOf(k Kind) string {
	switch k {
	case Tokenizer:
		return checkpoint.KindKL
	case DiTForward, DiTSampling:
		return checkpoint.KindDiT
	}
	return checkpoint.KindMAR
}
