package sample

import (
	"slices"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/mar"
)

// Orders of generation.
const (
	RandomOrder     = "random"     // a permutation for each image, of its seed and index (P28, P34)
	RasterOrder     = "raster"     // row by row (P27)
	ConfidenceOrder = "confidence" // the codes that the model is surest of stay, as in MaskGIT (P35)
)

// Ways to draw a category.
const (
	Gumbel  = "gumbel"
	Inverse = "inverse"
)

// orderKind is Order with its default, what the model was trained on.
func (r *Request) orderKind(cfg *mar.Config) string {
	if r.Order == "" {
		return cfg.TrainedOrder()
	}
	return r.Order
}

// validateVariant reports the first setting that does not go with the model's
// attention, order or head.
func (r *Request) validateVariant(cfg *mar.Config) error {
	bad := func(format string, a ...any) error { return engine.Errorf("sample", engine.Invalid, format, a...) }
	order, head := r.orderKind(cfg), cfg.HeadKind()
	discrete := cfg.Discrete()
	switch {
	case !slices.Contains([]string{RandomOrder, RasterOrder, ConfidenceOrder}, order):
		return bad("order %q; there are %q, %q and %q", order, RandomOrder, RasterOrder, ConfidenceOrder)
	case order == ConfidenceOrder && cfg.IsCausal():
		return bad("confidence order with causal attention: it ranks all unknown tokens at once, and a causal model predicts one")
	case order == ConfidenceOrder && !discrete:
		return bad("confidence order with the %s head: only codes have a probability to rank; it needs the categorical head", head)
	case order == ConfidenceOrder && len(r.Only) > 0:
		return bad("confidence order and single iterations: each depends on the ones before")
	case order != RasterOrder && cfg.TrainedOrder() == checkpoint.RasterOrder:
		return bad("%s order, but the model was trained in raster order alone", order)
	case cfg.IsCausal() && r.Iters != cfg.Tokens():
		return bad("%d iterations: a causal model predicts one token at a time, so %d", r.Iters, cfg.Tokens())
	case head == checkpoint.GMMHead && r.CFG != 1:
		return bad("guidance %g with the gmm head: a guided mixture has no closed form to sample from; use 1", r.CFG)
	case r.CodeSampler != "" && r.CodeSampler != Gumbel && r.CodeSampler != Inverse:
		return bad("sampler %q; there are %q and %q", r.CodeSampler, Gumbel, Inverse)
	case r.TopK < 0 || !(r.TopP >= 0 && r.TopP <= 1):
		return bad("top-k %d, top-p %g; top-k is 0 (all) or more, top-p between 0 and 1", r.TopK, r.TopP)
	case !discrete && (r.TopK > 0 || r.TopP > 0 && r.TopP < 1 || r.CodeSampler != ""):
		return bad("top-k, top-p or a sampler with the %s head: they choose among codes, which the categorical head has", head)
	case !(r.ChoiceTemperature >= 0 && r.ChoiceTemperature <= 1e6):
		return bad("choice temperature %g", r.ChoiceTemperature)
	case r.Draws != nil && head != checkpoint.DiffusionHead:
		return bad("recorded noise with the %s head", head)
	}
	return nil
}

// fits reports whether the known image is one of the model's.
func (k *Known) fits(cfg *mar.Config) error {
	bad := func(format string, a ...any) error { return engine.Errorf("sample", engine.Invalid, format, a...) }
	l := cfg.Tokens()
	if cfg.Discrete() {
		if len(k.Unknown) != l || len(k.Codes) != l {
			return bad("the known image has %d positions and %d codes, the model %d", len(k.Unknown), len(k.Codes), l)
		}
		for i, v := range k.Codes {
			if !k.Unknown[i] && (v < 0 || int(v) >= cfg.CodebookSize) {
				return bad("the known code %d is %d; the model has 0 to %d", i, v, cfg.CodebookSize-1)
			}
		}
		return nil
	}
	if len(k.Unknown) != l || len(k.Tokens) != l*cfg.TokenDim() {
		return bad("the known image has %d positions and %d token values, the model %d and %d",
			len(k.Unknown), len(k.Tokens), l, l*cfg.TokenDim())
	}
	for i, v := range k.Tokens {
		if !k.Unknown[i/cfg.TokenDim()] && v-v != 0 {
			return bad("the known token %d is not finite", i/cfg.TokenDim())
		}
	}
	return nil
}

// codeDecoder is a tokenizer of codes.
type codeDecoder interface {
	Codes() int
	DecodeCodes(c *engine.Ctx, codes []int32, n, h, w int) *engine.Tensor
}

// decodes reports whether tok turns the model's tokens into pixels.
func decodes(cfg *mar.Config, tok Decoder) error {
	if tok == nil || !cfg.Discrete() {
		return nil
	}
	d, ok := tok.(codeDecoder)
	if !ok {
		return engine.Errorf("sample", engine.Invalid, "the model's tokens are codes: its tokenizer must have a codebook (VQ)")
	}
	if d.Codes() != cfg.CodebookSize {
		return engine.Errorf("sample", engine.Invalid, "the model has %d codes, the tokenizer %d", cfg.CodebookSize, d.Codes())
	}
	return nil
}

// extend schedules the next token of every image of a causal model: what its
// sequences have not seen yet goes in, and one position is asked for. Known
// tokens on the way are passed over.
func (b *batch) extend(s int) iteration {
	it := iteration{number: s}
	r, l := b.r, b.tokens
	guided := r.CFG != 1
	var uncond []int32
	for i := range b.images {
		im := &b.images[i]
		if im.next = im.left; im.left == 0 {
			continue
		}
		im.next--
		order := []int32{}
		if im.at >= 0 {
			order = append(order, int32(im.full[im.at]))
		}
		for im.at++; im.visible[im.full[im.at]]; im.at++ {
			order = append(order, int32(im.full[im.at]))
		}
		p := im.full[im.at]
		order = append(order, int32(p))
		ask := func(class, seq int) int32 {
			it.exts = append(it.exts, mar.Extension{Seq: seq, Class: b.row(class), Image: i, Order: order})
			return int32(len(it.exts) - 1)
		}
		c := ask(im.class, 2*i)
		u := c // without a class both halves are the same sequence
		if guided && im.class >= 0 {
			u = ask(-1, 2*i+1)
		}
		it.rows, it.pos = append(it.rows, int32(i*l+p)), append(it.pos, int32(p))
		it.ids = append(it.ids, TokenID{im.index, p})
		it.cond, uncond = append(it.cond, c), append(uncond, u)
		if guided {
			it.guidance = append(it.guidance, guidanceAt(r.CFG, r.CFGSchedule, im.next, l))
		}
	}
	if guided {
		it.cond = append(it.cond, uncond...)
	}
	return it
}

// sequences is how many sequences of a cache the batch has.
func (b *batch) sequences() int { return 2 * len(b.images) }

// cached is how many of them are in use.
func (b *batch) cached() int {
	n := len(b.images)
	for _, im := range b.images {
		if b.r.CFG != 1 && im.class >= 0 {
			n++
		}
	}
	return n
}
