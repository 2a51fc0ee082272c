package checkpoint

import (
	"slices"
	"strings"

	"margo/engine"
)

// Values of MARConfig.Attention.
const (
	// Bidirectional is MAR: an encoder over the known tokens, a decoder over all
	// positions (P25).
	Bidirectional = "bidirectional"
	// Causal is one stack in which every row sees those before it (P22): the
	// buffer, then the tokens in the order of generation.
	Causal = "causal"
)

// Values of MARConfig.Order: what the model was trained on.
const (
	RandomOrder = "random" // a permutation for each image (P28); raster order is one of them
	RasterOrder = "raster" // row by row only (P27)
)

// Values of MARConfig.Head: the distribution of a token given z.
const (
	DiffusionHead   = "diffusion"   // the Diffusion Loss (P5)
	CategoricalHead = "categorical" // softmax(W z) over codebook_size codes (P1)
	L2Head          = "l2"          // a linear map of z, deterministic (P10)
	GMMHead         = "gmm"         // a mixture of diagonal Gaussians (P11; GIVT)
)

// IsCausal reports whether attention is causal.
func (c *MARConfig) IsCausal() bool { return c.Attention == Causal }

// Discrete reports whether tokens are codes of a codebook, not vectors.
func (c *MARConfig) Discrete() bool { return c.HeadKind() == CategoricalHead }

// HeadKind is Head with its default.
func (c *MARConfig) HeadKind() string { return orElse(c.Head, DiffusionHead) }

// TrainedOrder is Order with its default.
func (c *MARConfig) TrainedOrder() string { return orElse(c.Order, RandomOrder) }

func orElse(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// MixtureOut is what the GMM head says about a token: for each component a
// logit, a mean and a log variance of each channel.
func (c *MARConfig) MixtureOut() int { return c.Mixtures * (1 + 2*c.TokenDim()) }

// validateVariant reports the first field of attention, order and head that
// cannot be.
func (c *MARConfig) validateVariant() error {
	bad := func(format string, args ...any) error {
		return engine.Errorf("MAR config", engine.Invalid, format, args...)
	}
	one := func(field, v string, of ...string) error {
		if v != "" && !slices.Contains(of, v) {
			return bad("%s is %s, it must be one of %s", field, quote(v), strings.Join(of, ", "))
		}
		return nil
	}
	if err := one("attention", c.Attention, Bidirectional, Causal); err != nil {
		return err
	}
	if err := one("order", c.Order, RandomOrder, RasterOrder); err != nil {
		return err
	}
	if err := one("head", c.Head, DiffusionHead, CategoricalHead, L2Head, GMMHead); err != nil {
		return err
	}
	if c.IsCausal() {
		switch {
		case c.EncoderDepth != 0:
			return bad("attention is causal: one stack of decoder_depth blocks, but encoder_depth is %d, not 0", c.EncoderDepth)
		case c.EncoderEmbedDim != c.DecoderEmbedDim:
			return bad("attention is causal: one width, but encoder_embed_dim is %d and decoder_embed_dim %d", c.EncoderEmbedDim, c.DecoderEmbedDim)
		case c.BufferSize < 1:
			return bad("attention is causal: the first token is predicted from the last buffer row, but buffer_size is %d", c.BufferSize)
		}
	}
	switch c.HeadKind() {
	case CategoricalHead:
		if c.CodebookSize < 2 || c.CodebookSize > 1<<20 {
			return bad("head is categorical and codebook_size %d, it must be between 2 and %d", c.CodebookSize, 1<<20)
		}
		if c.PatchSize != 1 {
			return bad("head is categorical: a token is one code, but patch_size is %d, not 1", c.PatchSize)
		}
	case GMMHead:
		if c.Mixtures < 1 || c.Mixtures > 1<<10 {
			return bad("head is gmm and mixtures %d, it must be between 1 and %d", c.Mixtures, 1<<10)
		}
	}
	return nil
}

// causalParams are the trunk's tensors with causal attention.
func (b *builder) causalParams(c *MARConfig) {
	d, l := c.DecoderEmbedDim, c.Tokens()
	b.add("fake_latent", 1, d)
	b.add("decoder_pos_embed_learned", 1, l+c.BufferSize, d)
	b.add("target_pos_embed_learned", 1, l, d)
	b.add("diffusion_pos_embed_learned", 1, l, d)
	b.add("class_emb.weight", c.ClassNum, d)
	b.embedding(c, d)
	for i := range c.DecoderDepth {
		b.block(numbered("decoder_blocks", i), d, c.DecoderHidden())
	}
	b.norm("decoder_norm", d)
}

// embedding is how tokens come into a trunk of width d.
func (b *builder) embedding(c *MARConfig, d int) {
	if c.Discrete() {
		b.add("token_emb.weight", c.CodebookSize, d)
	} else {
		b.linear("z_proj", d, c.TokenDim())
	}
	b.norm("z_proj_ln", d)
}

// headParams are the head's tensors.
func (b *builder) headParams(c *MARConfig) {
	d, w := c.DecoderEmbedDim, c.DiffLossW
	switch c.HeadKind() {
	case CategoricalHead:
		b.add("celoss.proj.weight", c.CodebookSize, d)
		return
	case L2Head:
		b.linear("l2loss.proj", c.TokenDim(), d)
		return
	case GMMHead:
		b.linear("gmmloss.proj", c.MixtureOut(), d)
		return
	}
	b.linear("diffloss.net.time_embed.mlp.0", w, frequencies)
	b.linear("diffloss.net.time_embed.mlp.2", w, w)
	b.linear("diffloss.net.cond_embed", w, d)
	b.linear("diffloss.net.input_proj", w, c.TokenDim())
	for i := range c.DiffLossD {
		p := numbered("diffloss.net.res_blocks", i)
		b.norm(p+".in_ln", w)
		b.linear(p+".mlp.0", w, w)
		b.linear(p+".mlp.2", w, w)
		b.linear(p+".adaLN_modulation.1", 3*w, w)
	}
	b.linear("diffloss.net.final_layer.linear", 2*c.TokenDim(), w)
	b.linear("diffloss.net.final_layer.adaLN_modulation.1", 2*w, w)
}

// familyNames are the named configurations beside the published ones: the
// variants of Table 1 at the published sizes, as ar-raster-base or mar-large-ce.
var families = map[string]func(*MARConfig){
	"mar":       func(*MARConfig) {},
	"ar-raster": func(c *MARConfig) { c.causal(); c.Order = RasterOrder },
	"ar-random": (*MARConfig).causal,
}

// causal turns encoder and decoder into one stack.
func (c *MARConfig) causal() {
	c.Attention, c.DecoderDepth, c.EncoderDepth = Causal, c.EncoderDepth+c.DecoderDepth, 0
}

// heads are the suffixes of named configurations.
var heads = map[string]func(*MARConfig){
	"-ce":  func(c *MARConfig) { c.Head, c.CodebookSize, c.VAEEmbedDim = CategoricalHead, 16384, 8 },
	"-l2":  func(c *MARConfig) { c.Head = L2Head },
	"-gmm": func(c *MARConfig) { c.Head, c.Mixtures = GMMHead, 16 },
}

// variant splits a name like ar-raster-base-ce into what makes it: the
// published size's name and the changes. ar-base is ar-raster-base.
func variant(name string) (size string, change func(*MARConfig)) {
	base, head := name, func(*MARConfig) {}
	for suffix, f := range heads {
		if s, ok := strings.CutSuffix(base, suffix); ok {
			base, head = s, f
			break
		}
	}
	for family, f := range families {
		if s, ok := strings.CutPrefix(base, family+"-"); ok && marSizes["mar-"+s].width > 0 {
			return "mar-" + s, func(c *MARConfig) { f(c); head(c) }
		}
	}
	if s, ok := strings.CutPrefix(base, "ar-"); ok {
		return "mar-" + s, func(c *MARConfig) { families["ar-raster"](c); head(c) }
	}
	return base, head
}

// VariantNames lists the named configurations of Table 1's variants with the
// diffusion head; -ce, -l2 or -gmm behind any name of a MAR or a variant gives it
// another head.
func VariantNames() []string {
	return []string{"ar-raster-base", "ar-raster-large", "ar-raster-huge", "ar-random-base", "ar-random-large", "ar-random-huge"}
}

// Named reports whether name is that of a configuration.
func Named(name string) bool {
	size, _ := variant(name)
	return marSizes[size].width > 0
}
