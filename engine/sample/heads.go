package sample

import (
	"math"
	"slices"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/mar"
)

// sampled draws the tokens that it asks for: [n, C] F32, or codes I32 [n]. With
// logProb, F32 [n], the codes' log-probabilities go there.
func (w *marTask) sampled(it *iteration, t *tables, logProb *engine.Tensor) *engine.Tensor {
	if w.model.Head != nil {
		return w.diffused(it, t)
	}
	c, m, n := w.c, w.model, len(it.rows)
	z := c.New(engine.F32, len(it.cond), m.Config.DecoderEmbedDim)
	c.Scoped(func() {
		c.Rows(engine.RowsArgs{Y: z, A: w.trunk(it, t), IA: c.I32(it.cond), Count: len(it.cond)})
	})
	var guidance *engine.Tensor
	if it.guidance != nil {
		guidance = c.F32(it.guidance, n)
	}
	switch m.Config.HeadKind() {
	case checkpoint.L2Head:
		return m.Regress(c, z, guidance)
	case checkpoint.GMMHead:
		return m.Mixture(c, z, w.ids(it), w.r.Seed, float32(w.r.Temperature))
	}
	a := engine.CategoricalArgs{Temperature: float32(w.r.Temperature), TopK: w.r.TopK, TopP: 1, IDs: w.ids(it), LogProb: logProb,
		RNG: engine.RNG{Seed: w.r.Seed, Purpose: engine.PurposeCategory, Step: it.number}}
	if w.r.TopP > 0 {
		a.TopP = float32(w.r.TopP)
	}
	if w.r.CodeSampler == Inverse {
		a.Method = engine.InverseTransform
	}
	return m.Category(c, z, guidance, a)
}

// ids are the token and image of every token of it, for draws on the device.
func (w *marTask) ids(it *iteration) *engine.Tensor {
	ids := make([]int32, 0, 2*len(it.ids))
	for _, t := range it.ids {
		ids = append(ids, int32(t.Token), int32(uint32(t.Image)))
	}
	return w.c.I32(ids, len(it.ids), 2)
}

// confident is an iteration in confidence order: every unknown token is drawn,
// and of each image as many as the schedule says stay, those with the largest
// confidence; its noise falls to 0 with the iterations (P35; MaskGIT). Which they
// are is decided on the host: the one place where a run waits for the device.
func (w *marTask) confident(it *iteration, b *batch, t *tables) {
	c, n := w.c, len(it.rows)
	logProb := c.New(engine.F32, n)
	codes := ints(c, w.sampled(it, t, logProb))
	p := c.Download(logProb)
	w.clock.lap(c, &w.clock.parts.Head)
	if c.Err() != nil {
		return
	}
	temperature := w.r.ChoiceTemperature * (1 - float64(it.number+1)/float64(w.r.Iters))
	var keep iteration
	var kept []int32
	for first := 0; first < n; {
		i := int(it.rows[first]) / b.tokens
		im := &b.images[i]
		mine := make([]int, im.left)
		confidence := make([]float64, n)
		for j := range mine {
			mine[j] = first + j
			id := it.ids[first+j]
			confidence[first+j] = mar.Confidence(p[first+j], temperature, w.r.Seed, it.number, id.Token, id.Image)
		}
		slices.SortStableFunc(mine, func(x, y int) int { // surest last; NaN first
			a, b := confidence[x], confidence[y]
			switch {
			case a < b || math.IsNaN(a) && !math.IsNaN(b):
				return -1
			case a > b || math.IsNaN(b) && !math.IsNaN(a):
				return 1
			}
			return 0
		})
		for j, at := range mine {
			im.order[j] = int(it.pos[at])
		}
		chosen := slices.Sorted(slices.Values(mine[im.next:]))
		for _, at := range chosen {
			keep.rows, keep.pos, kept = append(keep.rows, it.rows[at]), append(keep.pos, it.pos[at]), append(kept, codes[at])
		}
		first += im.left
	}
	if len(kept) > 0 {
		w.learn(c.I32(kept), keep.pos, keep.rows, t)
	}
}

// ints reads an I32 tensor.
func ints(c *engine.Ctx, t *engine.Tensor) []int32 {
	v := c.Download(t)
	out := make([]int32, len(v))
	for i, f := range v {
		out[i] = int32(math.Float32bits(f))
	}
	return out
}
