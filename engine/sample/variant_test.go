package sample

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/ref"
	"margo/engine/tokenizer"
)

// randomWeights gives parameters values until the test ends.
func randomWeights(t *testing.T, params []engine.NamedParam, dev engine.Device, d engine.DType, seed uint64) {
	t.Helper()
	if err := load.Random(params, dev, d, seed); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(params) })
}

// tinyVariant is a model of 9 tokens, with random weights.
func tinyVariant(t *testing.T, dev engine.Device, d engine.DType, change func(*mar.Config)) *mar.Model {
	t.Helper()
	cfg, err := checkpoint.NamedMAR("mar-base")
	if err != nil {
		t.Fatal(err)
	}
	cfg.ImgSize, cfg.VAEStride, cfg.VAEEmbedDim = 6, 2, 4
	cfg.EncoderEmbedDim, cfg.DecoderEmbedDim, cfg.EncoderNumHeads, cfg.DecoderNumHeads = 16, 16, 2, 2
	cfg.EncoderDepth, cfg.DecoderDepth, cfg.ClassNum, cfg.BufferSize, cfg.DiffLossD, cfg.DiffLossW = 1, 2, 4, 3, 1, 16
	change(cfg)
	m, err := mar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	randomWeights(t, engine.Params(m), dev, d, 5)
	return m
}

// tinyTokenizer decodes 3×3 latents of 4 channels, or codes.
func tinyTokenizer(t *testing.T, dev engine.Device, d engine.DType, kind string) Decoder {
	t.Helper()
	cfg := checkpoint.KL16()
	cfg.Ch, cfg.ChMult, cfg.NumResBlocks, cfg.EmbedDim, cfg.ZChannels, cfg.Resolution = 32, []int{1, 2}, 1, 4, 4, 6
	cfg.EncoderAttn, cfg.DecoderAttn = nil, nil
	switch kind {
	case "none":
		return nil
	case "vq":
		cfg.NEmbed = 11
	}
	tok, err := tokenizer.New(cfg, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	randomWeights(t, engine.Params(tok), dev, d, 6)
	return tok
}

// variantOf changes the tiny model; order is what it is trained on.
func variantOf(attention, order, head string) func(*mar.Config) {
	return func(c *mar.Config) {
		c.Attention, c.Order, c.Head = attention, order, head
		if attention == checkpoint.Causal {
			c.EncoderDepth = 0
		}
		switch head {
		case checkpoint.CategoricalHead:
			c.CodebookSize = 11
		case checkpoint.GMMHead:
			c.Mixtures = 3
		}
	}
}

var (
	attentions = []string{checkpoint.Bidirectional, checkpoint.Causal}
	heads      = []string{checkpoint.DiffusionHead, checkpoint.CategoricalHead, checkpoint.L2Head, checkpoint.GMMHead}
	orderKinds = []string{RandomOrder, RasterOrder, ConfidenceOrder}
	tokenizers = []string{"none", "kl", "vq"}
)

// refusal is a piece of the message with which a combination is refused, "" if
// it is legal.
func refusal(attention, trained, order, head, tok string) string {
	switch {
	case head == checkpoint.CategoricalHead && tok == "kl":
		return "must have a codebook"
	case order == ConfidenceOrder && attention == checkpoint.Causal:
		return "confidence order with causal attention"
	case order == ConfidenceOrder && head != checkpoint.CategoricalHead:
		return "needs the categorical head"
	case order != RasterOrder && trained == RasterOrder:
		return "trained in raster order alone"
	}
	return ""
}

// variantRequest is a short run with guidance where the head has it.
func variantRequest(cfg *mar.Config, order string, n int) Request {
	r := Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.Labels, r.Seed, r.Order = n, n, 4, 3, 900, 2, []int{3, -1, 1}, 11, order
	if cfg.IsCausal() {
		r.Iters = cfg.Tokens()
	}
	if cfg.HeadKind() == checkpoint.GMMHead {
		r.CFG = 1
	}
	return r
}

// alike compares images bit for bit, codes and pixels included.
func alike(a, b Image) bool {
	return a.Index == b.Index && a.Class == b.Class && slices.Equal(a.Tokens, b.Tokens) && slices.Equal(a.Codes, b.Codes) && slices.Equal(a.Pixels, b.Pixels)
}

// checkCombination samples from a combination, alone and in a batch, or sees it refused.
func checkCombination(t *testing.T, dev engine.Device, d engine.DType, attention, trained, order, head, tok string) {
	t.Helper()
	m := tinyVariant(t, dev, d, variantOf(attention, trained, head))
	why := refusal(attention, trained, order, head, tok)
	e, err := Open(m, tinyTokenizer(t, dev, d, tok), dev, Options{Compute: d})
	if err == nil {
		defer e.Close()
		_, err = e.Estimate(variantRequest(&m.Config, order, 3))
	}
	if why != "" {
		if !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), why) {
			t.Errorf("refused with %v, want %q", err, why)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	r := variantRequest(&m.Config, order, 3)
	est, _ := e.Estimate(r)
	all := collect(t, e, r)
	if peak := int64(e.c.Arena.Peak()); peak > est.Activations {
		t.Errorf("%d bytes taken, %d estimated", peak, est.Activations)
	}
	for i, im := range all {
		if m.Config.Discrete() != (im.Codes != nil) || m.Config.Discrete() == (im.Tokens != nil) || (tok != "none") != (im.Pixels != nil) {
			t.Fatalf("image %d has %d tokens, %d codes, %d pixels", i, len(im.Tokens), len(im.Codes), len(im.Pixels))
		}
		for _, v := range append(slices.Clone(im.Tokens), im.Pixels...) {
			if v-v != 0 {
				t.Fatalf("image %d is not finite", i)
			}
		}
		one := r
		one.N, one.Batch, one.FirstIndex = 1, 1, i
		if alone := collect(t, e, one); !alike(alone[0], im) {
			t.Errorf("image %d is another when it is made alone", i)
		}
	}
	if order == RasterOrder && head == checkpoint.L2Head { // no randomness at all (P10)
		r.Seed++
		if again := collect(t, e, r); !alike(again[1], all[1]) {
			t.Error("raster order with the L2 head depends on the seed")
		}
	} else if r.Seed++; alike(collect(t, e, r)[0], all[0]) {
		t.Error("the seed has no influence")
	}
}

// Every combination of attention, order and head is sampled from or refused with
// a clear message, and the image is the same alone and in a batch; with every
// tokenizer too.
func TestCombinations(t *testing.T) {
	dev := ref.New(ref.Rounded)
	legal := 0
	for _, attention := range attentions {
		for _, trained := range []string{RandomOrder, RasterOrder} {
			for _, order := range orderKinds {
				for _, head := range heads {
					for _, tok := range tokenizers {
						if refusal(attention, trained, order, head, tok) == "" {
							legal++
						}
						t.Run(strings.Join([]string{attention, trained, order, head, tok}, "/"), func(t *testing.T) {
							checkCombination(t, dev, engine.F32, attention, trained, order, head, tok)
						})
					}
				}
			}
		}
	}
	// random, raster of models for all orders, raster of the others: 3 for each
	// attention and head; confidence for one; with 3 tokenizers, 2 for codes.
	if want := 2*3*(3*3+2) + 2; legal != want {
		t.Errorf("%d combinations are legal, want %d", legal, want)
	}
}

// Settings that do not go with a model are refused.
func TestVariantSettings(t *testing.T) {
	dev := ref.New(ref.Rounded)
	for _, x := range []struct {
		attention, head, why string
		change               func(*Request)
	}{
		{checkpoint.Causal, "", "predicts one token at a time, so 9", func(r *Request) { r.Iters = 4 }},
		{"", checkpoint.GMMHead, "guided mixture", func(r *Request) { r.CFG = 2 }},
		{"", "", "which the categorical head has", func(r *Request) { r.TopK = 3 }},
		{"", checkpoint.L2Head, "which the categorical head has", func(r *Request) { r.TopP = 0.5 }},
		{"", checkpoint.CategoricalHead, "top-p 2", func(r *Request) { r.TopP = 2 }},
		{"", checkpoint.CategoricalHead, `sampler "x"`, func(r *Request) { r.CodeSampler = "x" }},
		{"", "", `order "x"`, func(r *Request) { r.Order = "x" }},
		{"", checkpoint.CategoricalHead, "0 codes", func(r *Request) { r.Known = &Known{Unknown: make([]bool, 9)} }},
		{"", checkpoint.CategoricalHead, "known code 2 is 11", func(r *Request) {
			r.Known = &Known{Unknown: make([]bool, 9), Codes: []int32{0, 10, 11, 0, 0, 0, 0, 0, 0}}
		}},
		{"", checkpoint.CategoricalHead, "single iterations", func(r *Request) { r.Order, r.Only = ConfidenceOrder, []int{1} }},
	} {
		m := tinyVariant(t, dev, engine.F32, variantOf(x.attention, "", x.head))
		e := openEngine(t, m, dev, engine.F32)
		r := variantRequest(&m.Config, "", 2)
		x.change(&r)
		if _, err := e.Estimate(r); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), x.why) {
			t.Errorf("%v, want %q", err, x.why)
		}
	}
}

// A causal model completes an image: known tokens stay, others fit them, in
// raster order too, where known and unknown ones alternate. Codes likewise.
func TestVariantInpainting(t *testing.T) {
	dev := ref.New(ref.Rounded)
	for _, attention := range attentions {
		for _, head := range []string{checkpoint.DiffusionHead, checkpoint.CategoricalHead} {
			for _, order := range []string{RandomOrder, RasterOrder} {
				m := tinyVariant(t, dev, engine.F32, variantOf(attention, "", head))
				e := openEngine(t, m, dev, engine.F32)
				r := variantRequest(&m.Config, order, 3)
				k := &Known{Unknown: make([]bool, 9), Tokens: make([]float32, 36), Codes: make([]int32, 9)}
				for p := range 9 {
					k.Unknown[p] = p%3 == 1
					k.Codes[p] = int32(p)
					k.Tokens[4*p] = float32(p)
				}
				r.Known = k
				a := collect(t, e, r)
				one := r
				one.N, one.Batch, one.FirstIndex = 1, 1, 2
				if !alike(collect(t, e, one)[0], a[2]) {
					t.Error("alone it is another")
				}
				for _, im := range a {
					for p := range 9 {
						if m.Config.Discrete() && !k.Unknown[p] && im.Codes[p] != k.Codes[p] ||
							!m.Config.Discrete() && k.Unknown[p] == slices.Equal(im.Tokens[4*p:4*p+4], k.Tokens[4*p:4*p+4]) {
							t.Errorf("%s %s %s: position %d, unknown %v", attention, head, order, p, k.Unknown[p])
						}
					}
				}
				// What comes first in the order is seen: tokens depend on what is known.
				other := *k
				other.Tokens, other.Codes = slices.Clone(k.Tokens), slices.Clone(k.Codes)
				other.Tokens[0], other.Codes[0] = 9, 7
				r.Known, r.Temperature = &other, 1
				b := collect(t, e, r)
				if !m.Config.Discrete() && slices.Equal(a[0].Tokens[4:8], b[0].Tokens[4:8]) {
					t.Errorf("%s %s: position 1 does not depend on position 0", attention, order)
				}
			}
		}
	}
}

// Codes have the right distribution: a causal model whose z does not depend on
// tokens gives one categorical distribution, computed here. Gumbel and the
// inverse transform pass the same chi-square test, at several temperatures, with
// top-k and top-p. Seeds are fixed.
func TestCategoricalDistribution(t *testing.T) {
	dev := ref.New(ref.Exact)
	c, err := engine.NewCtx(dev, engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n, k = 20000, 8
	logits := []float32{1, 0.5, -1, 0, 2, -2, 0.5, -0.3}
	rows, ids := make([]float32, 0, n*k), make([]int32, 0, 2*n)
	for i := range n {
		rows, ids = append(rows, logits...), append(ids, int32(i%256), int32(i/256))
	}
	l, id := c.F32(rows, n, k), c.I32(ids, n, 2)
	for _, x := range []struct {
		temperature float32
		topK        int
		topP        float32
	}{{1, 0, 1}, {0.5, 0, 1}, {2, 0, 1}, {1, 3, 1}, {1, 1, 1}, {1, 0, 0.7}, {1.5, 5, 0.8}, {1, 2, 1}} {
		want := truncated(logits, float64(x.temperature), x.topK, float64(x.topP))
		for _, method := range []engine.CategoricalMethod{engine.Gumbel, engine.InverseTransform} {
			c.Scoped(func() {
				y := c.New(engine.I32, n)
				c.Categorical(engine.CategoricalArgs{Logits: l, Y: y, Temperature: x.temperature, TopK: x.topK, TopP: x.topP, Method: method,
					IDs: id, RNG: engine.RNG{Seed: 42, Purpose: engine.PurposeCategory}})
				got := make([]float64, k)
				for _, v := range ints(c, y) {
					got[v]++
				}
				chi, free := 0.0, -1.0
				for i, p := range want {
					if p == 0 && got[i] > 0 {
						t.Errorf("%+v method %d: category %d was drawn and must not be", x, method, i)
					}
					if p > 0 {
						free++
						chi += (got[i] - n*p) * (got[i] - n*p) / (n * p)
					}
				}
				// A chi-square has mean free and variance 2·free; 4 deviations and the skew.
				if limit := free + 4*math.Sqrt(2*free) + 6; chi > limit {
					t.Errorf("%+v method %d: chi-square %.1f of %g degrees, limit %.1f", x, method, chi, free, limit)
				}
			})
		}
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}

// truncated are the probabilities of softmax(l/t) within top-k and top-p, by
// sorting: another way than the kernels'.
func truncated(l []float32, t float64, topK int, topP float64) []float64 {
	order := make([]int, len(l))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		if l[a] > l[b] {
			return -1
		}
		return 1
	})
	p := make([]float64, len(l))
	stay := len(l)
	if topK > 0 {
		stay = topK
		for stay < len(l) && l[order[stay]] == l[order[topK-1]] { // equals stay together
			stay++
		}
	}
	sum := 0.0
	for _, i := range order[:stay] {
		p[i] = math.Exp(float64(l[i]) / t)
		sum += p[i]
	}
	before, kept := 0.0, 0.0
	for j, i := range order[:stay] {
		tied := j > 0 && l[i] == l[order[j-1]] && p[order[j-1]] > 0
		if before >= topP*sum && !tied {
			p[i] = 0
			continue
		}
		before += p[i]
		kept += p[i]
	}
	for i := range p {
		p[i] /= kept
	}
	return p
}

// In confidence order every iteration keeps as many codes as the cosine schedule
// says, and without noise those that the model is surest of.
func TestConfidenceOrder(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m := tinyVariant(t, dev, engine.F32, variantOf("", "", checkpoint.CategoricalHead))
	r := variantRequest(&m.Config, ConfidenceOrder, 2)
	b, err := newBatch(&m.Config, &r, 0, 2)
	if err != nil {
		t.Fatal(err)
	}
	var left []int
	for s := range r.Iters {
		it := b.schedule(s)
		if len(it.rows) != 2*b.images[0].left {
			t.Errorf("iteration %d asks for %d tokens, %d of each image are unknown", s, len(it.rows), b.images[0].left)
		}
		b.advance()
		left = append(left, b.images[0].left)
	}
	if !slices.Equal(left, MaskLens(9, r.Iters)) {
		t.Errorf("%v are left, want %v", left, MaskLens(9, r.Iters))
	}
	e := openEngine(t, m, dev, engine.F32)
	base := collect(t, e, r)
	r.ChoiceTemperature = 0
	if alike(collect(t, e, r)[0], base[0]) {
		t.Error("the choice temperature has no influence")
	}
	if p := mar.Confidence(-2, 0, 1, 2, 3, 4); p != -2 {
		t.Errorf("confidence without noise is %g", p)
	}
	r.N, r.Batch = 1, 1
	ctx, cancel := context.WithCancel(context.Background())
	err = e.Run(ctx, r, func(p Progress) {
		if p.Iter == 2 {
			cancel()
		}
	}, func(Image) error { return fmt.Errorf("an image of a cancelled run") })
	if !errors.Is(err, engine.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
}
