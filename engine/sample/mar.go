package sample

import (
	"slices"

	"margo/engine"
	"margo/engine/diffusion"
	"margo/engine/mar"
)

// marFamily samples from a MAR.
type marFamily struct{ model *mar.Model }

func (f marFamily) loaded() error { return f.model.Loaded() }

func (f marFamily) shape() shape {
	c := &f.model.Config
	return shape{c.Grid(), c.PatchSize, c.VAEEmbedDim, c.VAEStride, c.ClassNum}
}

func (f marFamily) schedule(r *Request, first, n int) (task, error) {
	proc, err := diffusion.MAR(r.HeadSteps, r.MaxTimestep)
	if err != nil {
		return nil, err
	}
	b, err := newBatch(&f.model.Config, r, first, n)
	if err != nil {
		return nil, err
	}
	return &marTask{model: f.model, proc: proc, b: b, last: r.MaxTimestep, iters: r.Iters}, nil
}

// marTask is a batch of a MAR.
type marTask struct {
	*run  // while it samples
	model *mar.Model
	proc  *diffusion.Process
	b     *batch
	last  int // Request.MaxTimestep
	iters int
}

func (w *marTask) steps() int { return w.iters }

func (w *marTask) advice() string {
	if w.last > 950 {
		return ": the first diffusion steps amplify the model's errors, which young checkpoints suffer from; try --max-timestep 950"
	}
	return ": the model seems untrained, or guidance or temperature too high"
}

// sample runs the iterations.
func (w *marTask) sample(run *run, tell func(iter int)) *engine.Tensor {
	w.run = run
	c := w.c
	t := w.tables(w.b)
	w.clock.lap(c, nil)
	done := func(number int) bool {
		if c.Err() == nil && w.r.AfterIterate != nil && t.tokens != nil {
			w.r.AfterIterate(number, c.Download(t.tokens))
		}
		if c.Err() == nil {
			tell(number + 1)
		}
		return c.Err() == nil
	}
	for s := 0; s < w.iters && w.b.open; s++ {
		it := w.b.schedule(s)
		if len(it.rows) > 0 {
			c.Scoped(func() { w.confident(&it, w.b, t) })
		}
		w.b.advance()
		if !done(s) {
			return nil
		}
	}
	for i := range w.b.iters {
		it := &w.b.iters[i]
		c.Scoped(func() {
			if len(w.r.Only) == 0 || slices.Contains(w.r.Only, it.number) {
				w.iterate(it, t)
			} else {
				w.fill(it, t)
			}
		})
		if !done(it.number) {
			return nil
		}
	}
	if t.codes != nil {
		return t.placed(c)
	}
	return t.tokens
}

// placed are the codes by image and position; 0 where none was drawn.
func (t *tables) placed(c *engine.Ctx) *engine.Tensor {
	drawn := ints(c, t.codes)
	if c.Err() != nil {
		return nil
	}
	all := make([]int32, len(drawn))
	for i, row := range t.rows {
		all[row] = drawn[i]
	}
	return c.I32(all)
}

// tables are what a batch keeps on the device.
type tables struct {
	buffers  *engine.Tensor // [classes·B, De]: encoder rows of the buffer tokens
	embedded *engine.Tensor // [N·L, De]: encoder rows of the known tokens
	tokens   *engine.Tensor // [N·L, C]; nil where tokens are codes
	time     *engine.Tensor // [T, W]: of the diffusion head
	maskQKV  *engine.Tensor // [B+L, 3·Dd]: with bidirectional attention
	cache    *mar.Cache     // with causal attention
	codes    *engine.Tensor // I32 [N·L], in the order of rows
	rows     []int32        // image·L + position of each code so far
	steps    []engine.StepCoef
	exact    []bool
}

// tables embeds what doesn't change during a batch, and the known tokens.
func (w *marTask) tables(b *batch) *tables {
	c, m, cfg := w.c, w.model, &w.model.Config
	n, l, ch := len(b.images), cfg.Tokens(), cfg.TokenDim()
	t := &tables{}
	clean := []*engine.Tensor{}
	if cfg.Discrete() {
		t.codes = c.New(engine.I32, n*l)
	} else {
		t.tokens = c.New(engine.F32, n*l, ch)
		clean = append(clean, t.tokens)
	}
	t.embedded = c.New(engine.F32, n*l, cfg.EncoderEmbedDim)
	clean = append(clean, t.embedded)
	if m.Head != nil {
		t.steps = w.proc.Steps()
		t.exact = diffusion.ExactSteps(t.steps)
		steps := make([]float32, len(t.steps))
		for i, s := range t.steps {
			steps[i] = float32(s.Timestep)
		}
		t.time = m.Head.Time(c, c.F32(steps, len(steps)))
	}
	if cfg.IsCausal() {
		size := min(mar.CacheBlock, m.SeqRows())
		t.cache = m.NewCache(c, b.sequences(), b.cached()*m.CacheBlocks(size), size, w.paged)
	} else {
		t.maskQKV = m.MaskQKV(c)
	}
	t.buffers = m.EmbedBuffer(c, m.ClassRows(c, b.classes))
	if c.Err() != nil {
		return t
	}
	for _, z := range clean {
		c.Fail(c.Stream.Fill(z, 0))
	}
	if k := w.r.Known; k != nil {
		w.known(k, n, t)
	}
	return t
}

// known puts the tokens to be kept into every image of the batch.
func (w *marTask) known(k *Known, n int, t *tables) {
	c, l, ch := w.c, w.model.Config.Tokens(), w.model.Config.TokenDim()
	var pos, rows []int32
	var values []float32
	var codes []int32
	for i := range n {
		for p, unknown := range k.Unknown {
			if !unknown {
				pos, rows = append(pos, int32(p)), append(rows, int32(i*l+p))
				if t.codes != nil {
					codes = append(codes, k.Codes[p])
				} else {
					values = append(values, k.Tokens[p*ch:(p+1)*ch]...)
				}
			}
		}
	}
	if len(pos) == 0 {
		return
	}
	c.Scoped(func() {
		if t.codes != nil {
			w.learn(c.I32(codes), pos, rows, t)
		} else {
			w.learn(c.F32(values, len(pos), ch), pos, rows, t)
		}
	})
}

// learn writes sampled or given tokens x into rows, and what the encoder will
// see of them.
func (w *marTask) learn(x *engine.Tensor, pos, rows []int32, t *tables) {
	c := w.c
	if c.Err() != nil {
		return
	}
	if t.codes != nil {
		at := len(t.rows)
		c.Fail(c.Stream.Copy(t.codes.Slice(at, at+len(rows)), x.Reshape(1, len(rows))))
		t.rows = append(t.rows, rows...)
	}
	to := c.I32(rows)
	if t.codes == nil {
		c.Rows(engine.RowsArgs{Y: t.tokens, A: x, IY: to, Count: len(pos)})
	}
	c.Rows(engine.RowsArgs{Y: t.embedded, A: w.model.EmbedTokens(c, x, pos), IY: to, Count: len(pos)})
}

// iterate is one autoregressive iteration: the trunk gives z for the tokens that
// are due, the head samples them.
func (w *marTask) iterate(it *iteration, t *tables) {
	w.clock.lap(w.c, nil)
	x := w.sampled(it, t, nil)
	w.clock.lap(w.c, &w.clock.parts.Head)
	w.learn(x, it.pos, it.rows, t)
}

// fill stands in for an iteration that is not run: its tokens become noise of about the
// data's size, as in the PyTorch that margo bench compares with. Zeros might let a device
// run cooler, and so faster, in the iterations that are timed.
func (w *marTask) fill(it *iteration, t *tables) {
	c, n, cfg := w.c, len(it.rows), &w.model.Config
	if cfg.Discrete() {
		codes := make([]int32, n)
		for i := range codes {
			codes[i] = it.rows[i] % int32(cfg.CodebookSize)
		}
		w.learn(c.I32(codes), it.pos, it.rows, t)
		return
	}
	x := c.New(engine.F32, n, cfg.TokenDim())
	c.Normal(engine.NormalArgs{Y: x, IDs: w.ids(it), RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeInitNoise}})
	w.learn(x, it.pos, it.rows, t)
}

// diffused samples the tokens of it with the diffusion head.
func (w *marTask) diffused(it *iteration, t *tables) *engine.Tensor {
	c, m, n := w.c, w.model, len(it.rows)
	cond := c.New(engine.F32, len(it.cond), m.Head.Width)
	c.Scoped(func() {
		z := w.trunk(it, t)
		c.Rows(engine.RowsArgs{Y: cond, A: m.Head.Cond(c, z), IA: c.I32(it.cond), Count: len(it.cond)})
	})
	a := engine.HeadStepsArgs{Cond: cond, Time: t.time, Steps: t.steps, ExactStep: t.exact, Scratch: headScratch,
		Temperature: float32(w.r.Temperature), RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeStepNoise}}
	if it.guidance != nil {
		a.Guidance = c.F32(it.guidance, n)
	}
	w.draw(it, &a)
	m.Head.Steps(c, a)
	return a.X
}

// trunk gives z of all wanted positions, sequence by sequence: [n, Dd]. Sequences
// are independent, so a large batch goes through in groups whose activations a
// CPU's cache holds; the result does not depend on them.
func (w *marTask) trunk(it *iteration, t *tables) *engine.Tensor {
	c, m, want := w.c, w.model, 0
	if t.cache != nil {
		z := m.Extend(c, t.buffers, t.embedded, t.cache, it.exts)
		w.clock.lap(c, &w.clock.parts.Decoder)
		return z
	}
	seqs := it.seqs
	for _, s := range seqs {
		want += len(s.Want)
	}
	z := c.New(engine.F32, want, m.Config.DecoderEmbedDim)
	row := 0
	for _, group := range groups(seqs, groupSize(&m.Config, c.Compute, w.set)) {
		c.Scoped(func() {
			l := m.NewLayout(c, group)
			enc := m.Encode(c, m.EncoderInput(c, t.buffers, t.embedded, l), l)
			w.clock.lap(c, &w.clock.parts.Encoder)
			y := m.DecodeMasked(c, m.DecoderInput(c, enc, l), l, t.maskQKV)
			if c.Err() == nil {
				c.Fail(c.Stream.Copy(z.RowsAt(row, row+y.Rows()), y))
				row += y.Rows()
			}
			w.clock.lap(c, &w.clock.parts.Decoder)
		})
	}
	return z
}

// Bounds of a group of sequences: activations that about stay in a last-level cache
// (16 MiB were best of 2 to 16 for the demo model, by 5 %), but rows enough that
// reading a large model's weights again for each group costs little.
const (
	groupBytes = 16 << 20
	groupRows  = 4096
)

// groupSize is how many sequences go through the trunk together on a device that is
// best given set bytes at a time (0: a CPU's cache).
func groupSize(cfg *mar.Config, d engine.DType, set int64) int {
	return sequences(max(cfg.EncoderEmbedDim, cfg.DecoderEmbedDim), cfg.MLPRatio, cfg.BufferSize+cfg.Tokens(), d, set)
}

// groups cuts seqs into as few runs of at most n as there can be, of equal size
// within one.
func groups(seqs []mar.Seq, n int) [][]mar.Seq {
	k := (len(seqs) + n - 1) / n
	out := make([][]mar.Seq, 0, k)
	for i := range k {
		out = append(out, seqs[i*len(seqs)/k:(i+1)*len(seqs)/k])
	}
	return out
}

// draw sets the noise that the head starts from, and that of its steps if it is
// not drawn on the device.
func (w *marTask) draw(it *iteration, a *engine.HeadStepsArgs) {
	c, n, ch := w.c, len(it.rows), w.model.Config.TokenDim()
	if w.r.Draws == nil {
		a.IDs = w.ids(it)
		a.X = c.New(engine.F32, n, ch)
		c.Normal(engine.NormalArgs{Y: a.X, IDs: a.IDs, RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeInitNoise}})
		return
	}
	x, noise, err := w.r.Draws.Noise(it.number, it.ids, len(a.Steps), ch)
	if err != nil {
		c.Fail(err)
		return
	}
	a.X, a.Noise = c.New(engine.F32, n, ch), c.F32(noise, len(a.Steps)*n, ch) // X is written to
	c.Upload(a.X, x)
}
