package checkpoint

import (
	"fmt"
	"strings"

	"margo/engine"
)

// MARConfig describes a MAR by its authors' argument names (models/mar.py).
// The grid has (ImgSize/VAEStride/PatchSize)² tokens of VAEEmbedDim·PatchSize²
// channels.
type MARConfig struct {
	ImgSize          int     `json:"img_size"`   // pixels
	VAEStride        int     `json:"vae_stride"` // pixels for each latent position
	PatchSize        int     `json:"patch_size"` // latent positions for each token, per side
	VAEEmbedDim      int     `json:"vae_embed_dim"`
	EncoderEmbedDim  int     `json:"encoder_embed_dim"`
	EncoderDepth     int     `json:"encoder_depth"`
	EncoderNumHeads  int     `json:"encoder_num_heads"`
	DecoderEmbedDim  int     `json:"decoder_embed_dim"`
	DecoderDepth     int     `json:"decoder_depth"`
	DecoderNumHeads  int     `json:"decoder_num_heads"`
	MLPRatio         float64 `json:"mlp_ratio"`
	ClassNum         int     `json:"class_num"`
	BufferSize       int     `json:"buffer_size"`
	DiffLossD        int     `json:"diffloss_d"` // residual blocks of the head
	DiffLossW        int     `json:"diffloss_w"` // width of the head
	NumSamplingSteps int     `json:"num_sampling_steps"`
	LayerNormEps     float64 `json:"layernorm_eps"`

	// Variants of Table 1; a field that is not there is the authors' MAR.
	Attention    string `json:"attention,omitempty"`     // Bidirectional or Causal
	Order        string `json:"order,omitempty"`         // RandomOrder or RasterOrder
	Head         string `json:"head,omitempty"`          // DiffusionHead, CategoricalHead, L2Head or GMMHead
	CodebookSize int    `json:"codebook_size,omitempty"` // codes of the categorical head
	Mixtures     int    `json:"mixtures,omitempty"`      // components of the GMM head

	// Used in training only; kept so that a converted file can be trained on.
	MaskRatioMin      float64 `json:"mask_ratio_min"`
	LabelDropProb     float64 `json:"label_drop_prob"`
	AttnDropout       float64 `json:"attn_dropout"`
	ProjDropout       float64 `json:"proj_dropout"`
	DiffusionBatchMul int     `json:"diffusion_batch_mul"`
}

// frequencies is the width of the sinusoidal timestep embedding (diffloss.py).
const frequencies = 256

// marDefaults are the defaults of the authors' constructor, with the LayerNorm
// eps that their named models use.
func marDefaults() MARConfig {
	return MARConfig{
		ImgSize: 256, VAEStride: 16, PatchSize: 1, VAEEmbedDim: 16, MLPRatio: 4, ClassNum: 1000, BufferSize: 64,
		NumSamplingSteps: 100, LayerNormEps: 1e-6,
		MaskRatioMin: 0.7, LabelDropProb: 0.1, AttnDropout: 0.1, ProjDropout: 0.1, DiffusionBatchMul: 4,
	}
}

// marSize is a named model: width, blocks of encoder and of decoder, heads, and
// the head of paper Table 4 (P40, P41).
type marSize struct{ width, depth, heads, d, w int }

var marSizes = map[string]marSize{
	"mar-base":  {768, 12, 12, 6, 1024},
	"mar-large": {1024, 16, 16, 8, 1280},
	"mar-huge":  {1280, 20, 16, 12, 1536},
}

// MARNames lists the named configurations.
func MARNames() []string { return []string{"mar-base", "mar-large", "mar-huge"} }

// NamedMAR returns a configuration at 256×256 pixels: a published one (mar-base,
// mar-large or mar-huge) or a variant of it (VariantNames).
func NamedMAR(name string) (*MARConfig, error) {
	size, change := variant(name)
	s, ok := marSizes[size]
	if !ok {
		return nil, engine.Errorf("config", engine.Invalid, "no configuration %s; there are %s, each also with -ce, -l2 or -gmm behind it", quote(name),
			strings.Join(append(MARNames(), VariantNames()...), ", "))
	}
	c := marDefaults()
	c.EncoderEmbedDim, c.EncoderDepth, c.EncoderNumHeads = s.width, s.depth, s.heads
	c.DecoderEmbedDim, c.DecoderDepth, c.DecoderNumHeads = s.width, s.depth, s.heads
	c.DiffLossD, c.DiffLossW = s.d, s.w
	change(&c)
	if c.HeadKind() != DiffusionHead {
		c.DiffLossD, c.DiffLossW = 0, 0
	}
	return &c, nil
}

// Grid is the tokens per side.
func (c *MARConfig) Grid() int { return c.ImgSize / c.VAEStride / c.PatchSize }

// Tokens is the length L of the sequence without buffer.
func (c *MARConfig) Tokens() int { return c.Grid() * c.Grid() }

// TokenDim is the channels C of a token.
func (c *MARConfig) TokenDim() int { return c.VAEEmbedDim * c.PatchSize * c.PatchSize }

// EncoderHidden and DecoderHidden are the widths inside a block's MLP.
func (c *MARConfig) EncoderHidden() int { return int(float64(c.EncoderEmbedDim) * c.MLPRatio) }

// DecoderHidden: see EncoderHidden.
func (c *MARConfig) DecoderHidden() int { return int(float64(c.DecoderEmbedDim) * c.MLPRatio) }

// Validate reports the first field that cannot be.
func (c *MARConfig) Validate() error {
	bad := func(format string, args ...any) error {
		return engine.Errorf("MAR config", engine.Invalid, format, args...)
	}
	if err := c.validateVariant(); err != nil {
		return err
	}
	encoder, net := 1, 1 // a causal model has no encoder, other heads have no network
	if c.IsCausal() {
		encoder = 0
	}
	if c.HeadKind() != DiffusionHead {
		net = 0
	}
	for _, f := range []struct {
		name           string
		v, least, most int
	}{
		{"img_size", c.ImgSize, 1, 1 << 16}, {"vae_stride", c.VAEStride, 1, 1 << 10}, {"patch_size", c.PatchSize, 1, 1 << 8},
		{"vae_embed_dim", c.VAEEmbedDim, 1, 1 << 14},
		{"encoder_embed_dim", c.EncoderEmbedDim, 1, 1 << 16}, {"encoder_depth", c.EncoderDepth, encoder, 1 << 10}, {"encoder_num_heads", c.EncoderNumHeads, 1, 1 << 10},
		{"decoder_embed_dim", c.DecoderEmbedDim, 1, 1 << 16}, {"decoder_depth", c.DecoderDepth, 1, 1 << 10}, {"decoder_num_heads", c.DecoderNumHeads, 1, 1 << 10},
		{"class_num", c.ClassNum, 1, 1 << 24}, {"diffloss_d", c.DiffLossD, net, 1 << 10}, {"diffloss_w", c.DiffLossW, net, 1 << 16},
		{"num_sampling_steps", c.NumSamplingSteps, 1, 1000},
	} {
		if f.v < f.least || f.v > f.most {
			return bad("%s is %d, it must be between %d and %d", f.name, f.v, f.least, f.most)
		}
	}
	if c.BufferSize < 0 || c.BufferSize > 1<<16 {
		return bad("buffer_size is %d, it must be between 0 and %d", c.BufferSize, 1<<16)
	}
	if c.Grid() < 1 {
		return bad("img_size %d is smaller than a token of vae_stride %d · patch_size %d pixels", c.ImgSize, c.VAEStride, c.PatchSize)
	}
	if c.Grid() > 1<<10 || c.TokenDim() > 1<<16 {
		return bad("%d×%d tokens of %d channels are too large", c.Grid(), c.Grid(), c.TokenDim())
	}
	if c.EncoderEmbedDim%c.EncoderNumHeads != 0 {
		return bad("encoder_embed_dim %d is not divisible by encoder_num_heads %d", c.EncoderEmbedDim, c.EncoderNumHeads)
	}
	if c.DecoderEmbedDim%c.DecoderNumHeads != 0 {
		return bad("decoder_embed_dim %d is not divisible by decoder_num_heads %d", c.DecoderEmbedDim, c.DecoderNumHeads)
	}
	if !(c.MLPRatio > 0 && c.MLPRatio <= 64) || c.EncoderHidden() < 1 || c.DecoderHidden() < 1 {
		return bad("mlp_ratio is %g, it must be above 0 and at most 64", c.MLPRatio)
	}
	if !(c.LayerNormEps > 0 && c.LayerNormEps < 1) {
		return bad("layernorm_eps is %g, it must be between 0 and 1", c.LayerNormEps)
	}
	for _, f := range []struct {
		name string
		v    float64
	}{{"mask_ratio_min", c.MaskRatioMin}, {"label_drop_prob", c.LabelDropProb}, {"attn_dropout", c.AttnDropout}, {"proj_dropout", c.ProjDropout}} {
		if !(f.v >= 0 && f.v <= 1) {
			return bad("%s is %g, it must be between 0 and 1", f.name, f.v)
		}
	}
	return nil
}

// Params lists the tensors of the model by the authors' keys, in the order of
// their definition. The head predicts 2·TokenDim numbers: noise and variance.
func (c *MARConfig) Params() []ParamSpec {
	var b builder
	de, dd, l := c.EncoderEmbedDim, c.DecoderEmbedDim, c.Tokens()
	if c.IsCausal() {
		b.causalParams(c)
		b.headParams(c)
		return b.out
	}
	b.add("fake_latent", 1, de)
	b.add("encoder_pos_embed_learned", 1, l+c.BufferSize, de)
	b.add("mask_token", 1, 1, dd)
	b.add("decoder_pos_embed_learned", 1, l+c.BufferSize, dd)
	b.add("diffusion_pos_embed_learned", 1, l, dd)
	b.add("class_emb.weight", c.ClassNum, de)
	b.embedding(c, de)
	for i := 0; i < c.EncoderDepth; i++ {
		b.block(numbered("encoder_blocks", i), de, c.EncoderHidden())
	}
	b.norm("encoder_norm", de)
	b.linear("decoder_embed", dd, de)
	for i := 0; i < c.DecoderDepth; i++ {
		b.block(numbered("decoder_blocks", i), dd, c.DecoderHidden())
	}
	b.norm("decoder_norm", dd)
	b.headParams(c)
	return b.out
}

func numbered(p string, i int) string { return fmt.Sprintf("%s.%d", p, i) }

// block is a pre-LN transformer block with biases (timm's Block).
func (b *builder) block(p string, width, hidden int) {
	b.norm(p+".norm1", width)
	b.linear(p+".attn.qkv", 3*width, width)
	b.linear(p+".attn.proj", width, width)
	b.norm(p+".norm2", width)
	b.linear(p+".mlp.fc1", hidden, width)
	b.linear(p+".mlp.fc2", width, hidden)
}
