package sample

import (
	"math"
	"slices"

	"margo/engine"
	"margo/engine/diffusion"
	"margo/engine/dit"
)

// ditFamily samples from a DiT: joint diffusion of all tokens of an image (P12; DiT
// sample.py, gaussian_diffusion.py p_sample_loop and ddim_sample_loop).
type ditFamily struct{ model *dit.Model }

func (f ditFamily) loaded() error { return f.model.Loaded() }

func (f ditFamily) shape() shape {
	c := &f.model.Config
	return shape{c.Grid(), c.PatchSize, c.InChannels, c.VAEStride, c.NumClasses}
}

func (f ditFamily) check(r *Request) error {
	switch {
	case r.Sampler != DDPM && r.Sampler != DDIM:
		return invalid("sampler %q; there are %q and %q", r.Sampler, DDPM, DDIM)
	case r.Sampler != DDIM && r.Eta != 0:
		return invalid("eta %g is for the sampler %q; %q has a learned variance", r.Eta, DDIM, DDPM)
	case r.CFGChannels != GuideThree && r.CFGChannels != GuideAll:
		return invalid("guidance of channels %q; there are %q and %q", r.CFGChannels, GuideThree, GuideAll)
	case r.Known != nil:
		return invalid("a DiT samples whole images: nothing can be kept")
	case r.Order != "":
		return invalid("%s order, but a DiT denoises all tokens at once: it has none", r.Order)
	case r.TopK > 0 || r.TopP > 0 && r.TopP < 1 || r.CodeSampler != "":
		return invalid("top-k, top-p or a sampler of codes, which a DiT does not have")
	}
	steps, err := f.steps(r)
	if err != nil {
		return err
	}
	for _, s := range r.Only {
		if s < 0 || s >= len(steps) {
			return invalid("step %d of %d", s, len(steps))
		}
	}
	return nil
}

// steps are the reverse steps, noise first.
func (f ditFamily) steps(r *Request) ([]engine.StepCoef, error) {
	proc, err := diffusion.DiT(r.Steps)
	if err != nil {
		return nil, err
	}
	if r.Sampler == DDIM {
		return proc.DDIMSteps(r.Eta)
	}
	return proc.Steps(), nil
}

func (f ditFamily) schedule(r *Request, first, n int) (task, error) {
	steps, err := f.steps(r)
	if err != nil {
		return nil, err
	}
	t := &ditTask{model: f.model, coef: steps, first: first, n: n, guided: r.CFG != 1}
	for i := range n {
		t.ask(r.class(first + i))
	}
	if t.guided {
		for range n {
			t.ask(-1)
		}
	}
	return t, nil
}

// ditTask is a batch of a DiT.
type ditTask struct {
	model    *dit.Model
	coef     []engine.StepCoef
	first, n int
	guided   bool
	classes  []int   // that occur, each once
	of       []int32 // of classes, for each sequence: conditional ones, then unconditional
}

// ask adds a sequence of a class.
func (t *ditTask) ask(class int) {
	k := slices.Index(t.classes, class)
	if k < 0 {
		k = len(t.classes)
		t.classes = append(t.classes, class)
	}
	t.of = append(t.of, int32(k))
}

func (t *ditTask) steps() int { return len(t.coef) }

func (t *ditTask) advice() string {
	return ": the model seems untrained, or guidance or temperature too high"
}

// modulationBytes bounds the table of modulations that is computed at once.
const modulationBytes = 64 << 20

// sample runs the reverse process. Modulations depend on class and timestep alone: they
// are computed for as many steps at once as the budget holds.
func (t *ditTask) sample(w *run, tell func(iter int)) *engine.Tensor {
	c, m := w.c, t.model
	rows, ch := t.n*m.Config.Tokens(), m.Config.TokenDim()
	x := c.New(engine.F32, rows, ch)
	noise := c.New(engine.F32, rows, ch)
	out := c.New(engine.F32, len(t.of)*m.Config.Tokens(), 2*ch)
	ids := make([]int32, 0, 2*rows)
	for i := range rows {
		ids = append(ids, int32(i%m.Config.Tokens()), int32(uint32(t.first+i/m.Config.Tokens())))
	}
	z := engine.NormalArgs{Y: x, IDs: c.I32(ids, rows, 2), RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeInitNoise}}
	var given []float32
	if w.r.Draws == nil {
		c.Normal(z)
	} else {
		given = t.draws(w, x)
	}
	var scale *engine.Tensor
	if t.guided {
		g := make([]float32, rows)
		for i := range g {
			g[i] = float32(w.r.CFG)
		}
		scale = c.F32(g, rows)
	}
	times := make([]float32, len(t.coef))
	for i, k := range t.coef {
		times[i] = float32(k.Timestep)
	}
	embedded := m.Time(c, times)
	w.clock.lap(c, nil)
	var wanted []int // the steps that are run
	for k := range t.coef {
		if len(w.r.Only) == 0 || slices.Contains(w.r.Only, k) {
			wanted = append(wanted, k)
		}
	}
	for part := range slices.Chunk(wanted, max(1, modulationBytes/(m.ModulationBytes()*len(t.classes)))) {
		if c.Err() != nil {
			break
		}
		c.Scoped(func() {
			mods := t.modulations(c, embedded, part)
			for i, k := range part {
				if c.Poll() {
					return
				}
				c.Scoped(func() {
					t.denoise(w, x, t.rows(c, mods, i), out)
					switch {
					case t.coef[k].Last:
					case given != nil:
						c.Upload(noise, given[k*rows*ch:(k+1)*rows*ch])
					default:
						z.Y, z.RNG.Purpose, z.RNG.Step = noise, engine.PurposeStepNoise, k
						c.Normal(z)
					}
					m.Step(c, x, out, noise, scale, w.r.CFGChannels == GuideAll, t.coef[k], float32(w.r.Temperature))
				})
				w.clock.lap(c, &w.clock.parts.Denoiser)
				if c.Err() != nil {
					return
				}
				if w.r.AfterIterate != nil {
					w.r.AfterIterate(k, c.Download(x))
				}
				tell(k + 1)
			}
		})
	}
	if c.Err() != nil {
		return nil
	}
	return x
}

// modulations of every class at some steps: row i·classes + class of the i-th.
func (t *ditTask) modulations(c *engine.Ctx, embedded *engine.Tensor, steps []int) *engine.Tensor {
	var times, classes []int
	for _, k := range steps {
		for _, class := range t.classes {
			times, classes = append(times, k), append(classes, class)
		}
	}
	return t.model.Modulations(c, embedded, times, classes)
}

// rows are the modulations of each sequence at a step of the table.
func (t *ditTask) rows(c *engine.Ctx, mods *engine.Tensor, step int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n := len(t.classes)
	own := mods.RowsAt(step*n, (step+1)*n)
	if n == len(t.of) { // every sequence its own class: in the same order
		return own
	}
	y := c.New(engine.F32, len(t.of), mods.Cols())
	c.Rows(engine.RowsArgs{Y: y, A: own, IA: c.I32(t.of), Count: len(t.of)})
	return y
}

// denoise runs the network on the images' tokens x. Sequences are independent, so a
// large batch goes through in groups whose activations a CPU's cache holds; the result
// does not depend on them.
func (t *ditTask) denoise(w *run, x, mods, out *engine.Tensor) {
	c, cfg := w.c, &t.model.Config
	if c.Err() != nil {
		return
	}
	s := t.model.Embed(c, x, len(t.of))
	l, per := cfg.Tokens(), sequences(cfg.HiddenSize, cfg.MLPRatio, cfg.Tokens(), c.Compute, w.set)
	k := (len(t.of) + per - 1) / per
	for i := range k {
		if c.Poll() {
			return
		}
		from, to := i*len(t.of)/k, (i+1)*len(t.of)/k
		t.model.Output(c, s.RowsAt(from*l, to*l), mods.RowsAt(from, to), out.RowsAt(from*l, to*l))
	}
}

// sequences is how many sequences of rows rows go through a transformer at a time on a
// device that is best given set bytes (0: a CPU's cache).
func sequences(width int, ratio float64, rows int, d engine.DType, set int64) int {
	if set == 0 {
		set = groupBytes
	}
	// The residual stream, a normalised copy and the MLP's hidden layer.
	row := width * (4 + (1+int(math.Ceil(ratio)))*d.Size())
	return max(1, max(groupRows, int(set)/row)/rows)
}

// draws sets x to given noise and returns that of the steps.
func (t *ditTask) draws(w *run, x *engine.Tensor) []float32 {
	l := t.model.Config.Tokens()
	ids := make([]TokenID, 0, x.Rows())
	for i := range x.Rows() {
		ids = append(ids, TokenID{t.first + i/l, i % l})
	}
	init, noise, err := w.r.Draws.Noise(0, ids, len(t.coef), x.Cols())
	if err != nil {
		w.c.Fail(err)
		return nil
	}
	if len(noise) != len(t.coef)*x.Elems() {
		w.c.Fail(invalid("%d numbers of noise are given for %d steps of %d", len(noise), len(t.coef), x.Elems()))
		return nil
	}
	w.c.Upload(x, init)
	return noise
}
