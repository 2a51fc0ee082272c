package sample

import (
	"fmt"
	"math"
	"slices"
	"time"

	"margo/engine"
	"margo/engine/diffusion"
	"margo/engine/mar"
)

// run is the work of one call of Run, or of its dry run.
type run struct {
	model *mar.Model
	tok   Decoder
	opt   Options
	r     *Request
	c     *engine.Ctx
	proc  *diffusion.Process
	clock clock
	set   int64 // Info.WorkingSet
}

// clock adds the time between two calls of lap to a part.
type clock struct {
	on    bool
	last  time.Time
	parts Parts
}

func (k *clock) lap(c *engine.Ctx, part *time.Duration) {
	if !k.on {
		return
	}
	c.Sync()
	now := time.Now()
	if part != nil {
		*part += now.Sub(k.last)
	}
	k.last = now
}

// tables are what a batch keeps on the device.
type tables struct {
	buffers  *engine.Tensor // [classes·B, De]: encoder rows of the buffer tokens
	embedded *engine.Tensor // [N·L, De]: encoder rows of the known tokens
	tokens   *engine.Tensor // [N·L, C]
	time     *engine.Tensor // [T, W]
	maskQKV  *engine.Tensor // [B+L, 3·Dd]
	steps    []engine.StepCoef
	exact    []bool
}

// batch makes the images of b. tell is called after each iteration.
func (w *run) batch(b *batch, tell func(iter int)) ([]Image, error) {
	c := w.c
	t := w.tables(b)
	w.clock.lap(c, nil)
	for i := range b.iters {
		it := &b.iters[i]
		if len(w.r.Only) == 0 || slices.Contains(w.r.Only, it.number) {
			c.Scoped(func() { w.iterate(it, t) })
		}
		if c.Err() != nil {
			return nil, c.Err()
		}
		if w.r.AfterIterate != nil {
			w.r.AfterIterate(it.number, c.Download(t.tokens))
		}
		tell(it.number + 1)
	}
	return w.images(b, t)
}

// tables embeds what doesn't change during a batch, and the known tokens.
func (w *run) tables(b *batch) *tables {
	c, m, cfg := w.c, w.model, &w.model.Config
	n, l, ch := len(b.images), cfg.Tokens(), cfg.TokenDim()
	t := &tables{steps: w.proc.Steps()}
	t.exact = diffusion.ExactSteps(t.steps)
	t.tokens = c.New(engine.F32, n*l, ch)
	t.embedded = c.New(engine.F32, n*l, cfg.EncoderEmbedDim)
	steps := make([]float32, len(t.steps))
	for i, s := range t.steps {
		steps[i] = float32(s.Timestep)
	}
	t.time = m.Head.Time(c, c.F32(steps, len(steps)))
	t.maskQKV = m.MaskQKV(c)
	t.buffers = m.EmbedBuffer(c, m.ClassRows(c, b.classes))
	if c.Err() != nil {
		return t
	}
	for _, z := range []*engine.Tensor{t.tokens, t.embedded} {
		c.Fail(c.Stream.Fill(z, 0))
	}
	if k := w.r.Known; k != nil {
		w.known(k, n, t)
	}
	return t
}

// known puts the tokens to be kept into every image of the batch.
func (w *run) known(k *Known, n int, t *tables) {
	c, l, ch := w.c, w.model.Config.Tokens(), w.model.Config.TokenDim()
	var pos, rows []int32
	var values []float32
	for i := range n {
		for p, unknown := range k.Unknown {
			if !unknown {
				pos, rows = append(pos, int32(p)), append(rows, int32(i*l+p))
				values = append(values, k.Tokens[p*ch:(p+1)*ch]...)
			}
		}
	}
	if len(pos) > 0 {
		c.Scoped(func() { w.learn(c.F32(values, len(pos), ch), pos, c.I32(rows), t) })
	}
}

// learn writes sampled or given tokens x into rows, and what the encoder will
// see of them.
func (w *run) learn(x *engine.Tensor, pos []int32, rows *engine.Tensor, t *tables) {
	c := w.c
	c.Rows(engine.RowsArgs{Y: t.tokens, A: x, IY: rows, Count: len(pos)})
	c.Rows(engine.RowsArgs{Y: t.embedded, A: w.model.EmbedTokens(c, x, pos), IY: rows, Count: len(pos)})
}

// iterate is one autoregressive iteration: the trunk gives z for the tokens that
// are due, the head samples them.
func (w *run) iterate(it *iteration, t *tables) {
	c, m, n := w.c, w.model, len(it.rows)
	w.clock.lap(c, nil)
	cond := c.New(engine.F32, len(it.cond), m.Head.Width)
	c.Scoped(func() {
		z := w.trunk(it.seqs, t)
		c.Rows(engine.RowsArgs{Y: cond, A: m.Head.Cond(c, z), IA: c.I32(it.cond), Count: len(it.cond)})
	})
	a := engine.HeadStepsArgs{Cond: cond, Time: t.time, Steps: t.steps, ExactStep: t.exact, Scratch: headScratch,
		Temperature: float32(w.r.Temperature), RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeStepNoise}}
	if it.guidance != nil {
		a.Guidance = c.F32(it.guidance, n)
	}
	w.draw(it, &a)
	m.Head.Steps(c, a)
	w.clock.lap(c, &w.clock.parts.Head)
	w.learn(a.X, it.pos, c.I32(it.rows), t)
}

// trunk gives z of all wanted positions, sequence by sequence: [n, Dd]. Sequences
// are independent, so a large batch goes through in groups whose activations a
// CPU's cache holds; the result does not depend on them.
func (w *run) trunk(seqs []mar.Seq, t *tables) *engine.Tensor {
	c, m, want := w.c, w.model, 0
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
	if set == 0 {
		set = groupBytes
	}
	// The residual stream, a normalised copy and the MLP's hidden layer.
	wide := max(cfg.EncoderEmbedDim, cfg.DecoderEmbedDim)
	row := wide * (4 + (1+int(math.Ceil(cfg.MLPRatio)))*d.Size())
	return max(1, max(groupRows, int(set)/row)/(cfg.BufferSize+cfg.Tokens()))
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
func (w *run) draw(it *iteration, a *engine.HeadStepsArgs) {
	c, n, ch := w.c, len(it.rows), w.model.Config.TokenDim()
	if w.r.Draws == nil {
		ids := make([]int32, 0, 2*n)
		for _, t := range it.ids {
			ids = append(ids, int32(t.Token), int32(uint32(t.Image)))
		}
		a.IDs = c.I32(ids, n, 2)
		a.X = c.New(engine.F32, n, ch)
		c.Normal(engine.NormalArgs{Y: a.X, IDs: a.IDs, RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeInitNoise}})
		return
	}
	x, noise, err := w.r.Draws.Noise(it.number, it.ids, len(a.Steps), ch)
	if err != nil {
		c.Fail(err)
		return
	}
	a.X, a.Noise = c.F32(x, n, ch), c.F32(noise, len(a.Steps)*n, ch)
}

// Range of tokens that is no reason to worry: data has a standard deviation of
// about 1, so 20 of them are no image any more.
const maxToken = 20

// images reads the tokens back and decodes them.
func (w *run) images(b *batch, t *tables) ([]Image, error) {
	c, cfg := w.c, &w.model.Config
	l, ch := cfg.Tokens(), cfg.TokenDim()
	all := c.Download(t.tokens)
	if c.Err() != nil {
		return nil, c.Err()
	}
	out := make([]Image, len(b.images))
	for i, im := range b.images {
		out[i] = Image{Index: im.index, Class: im.class, Tokens: all[i*l*ch : (i+1)*l*ch : (i+1)*l*ch]}
		for _, v := range out[i].Tokens {
			if a := float32(math.Abs(float64(v))); a > out[i].MaxToken || a != a {
				out[i].MaxToken = a
			}
		}
		out[i].Warning = w.warning(out[i].MaxToken)
	}
	w.clock.lap(c, nil)
	for i := 0; i < len(out); {
		n := min(w.decodeBatch(), len(out)-i)
		c.Scoped(func() { w.decode(out[i:i+n], t.tokens.RowsAt(i*l, (i+n)*l)) })
		i += n
	}
	w.clock.lap(c, &w.clock.parts.Tokenizer)
	return out, c.Err()
}

func (w *run) warning(most float32) string {
	if most <= maxToken {
		return ""
	}
	s := fmt.Sprintf("tokens reach ±%.4g, far outside the data's range (a standard deviation of about 1)", most)
	if w.r.MaxTimestep > 950 {
		return s + ": the first diffusion steps amplify the model's errors, which young checkpoints suffer from; try --max-timestep 950"
	}
	return s + ": the model seems untrained, or guidance or temperature too high"
}

// decodeBatch is how many images the tokenizer takes at once: about one of
// 256×256 pixels' worth, which keeps its activations small beside the trunk's.
func (w *run) decodeBatch() int {
	return max(1, 1<<16/(w.model.Config.ImgSize*w.model.Config.ImgSize))
}

// decode fills in the pixels of images from their tokens [n·L, C].
func (w *run) decode(out []Image, tokens *engine.Tensor) {
	c, cfg := w.c, &w.model.Config
	pixels := w.tok == nil && cfg.VAEStride == 1 && cfg.VAEEmbedDim == 3
	if c.Poll() || w.tok == nil && !pixels {
		return
	}
	n, side := len(out), cfg.Grid()*cfg.PatchSize
	x := c.New(engine.F32, n, side, side, cfg.VAEEmbedDim)
	c.Patchify(engine.PatchifyArgs{X: x, Y: tokens.Reshape(n, cfg.Tokens(), cfg.TokenDim()), P: cfg.PatchSize, Inverse: true})
	if !pixels {
		z := c.New(engine.F32, n, side, side, cfg.VAEEmbedDim)
		c.Cast(engine.CastArgs{X: x, Y: z, Scale: float32(1 / w.opt.LatentScale)})
		if x = w.tok.Decode(c, z); c.Err() != nil {
			return
		}
	}
	v := c.Download(x)
	if c.Err() != nil {
		return
	}
	h, wd := x.Shape[1], x.Shape[2]
	for i := range out {
		out[i].H, out[i].W, out[i].Pixels = h, wd, v[i*h*wd*3:(i+1)*h*wd*3:(i+1)*h*wd*3]
	}
}
