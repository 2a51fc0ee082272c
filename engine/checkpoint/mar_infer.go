package checkpoint

import (
	"fmt"
	"math"
	"strings"

	"margo/engine"
)

// MAROptions supply what shapes cannot tell. A zero leaves it to the file.
type MAROptions struct {
	Heads     int // of encoder and decoder: --heads
	PatchSize int // --patch-size
	VAEStride int // --vae-stride
}

// InferMAR finds the configuration of a MAR. Widths, depths and counts come
// from shapes; settings recorded in the file (metadata "config", or the args of
// a PyTorch checkpoint) add what shapes don't tell; o overrides both. What is
// then still open is taken from the authors' models if the width is one of
// theirs, else it is an error (Kind Invalid) that names the option to pass.
func InferMAR(f *File, o MAROptions) (*MARConfig, error) {
	recorded, err := f.recordedConfig()
	if err != nil {
		return nil, err
	}
	c, known, err := f.marFromShapes()
	if err != nil {
		return nil, err
	}
	if s, ok := marSizes[known]; ok {
		c.EncoderNumHeads, c.DecoderNumHeads = s.heads, s.heads
	}
	// Zero marks what is open until the record and the options had their say.
	tokenDim, side := c.VAEEmbedDim, c.ImgSize
	if c.Discrete() {
		c.PatchSize = 1
	}
	c.PatchSize, c.VAEEmbedDim, c.VAEStride, c.ImgSize = 0, 0, 0, 0
	if c.Discrete() { // a token is one code, whatever its vector
		c.PatchSize = 1
	}
	shapes := *c
	if err := setFields(c, recorded); err != nil {
		return nil, badFile(f.path, "config: %w", err)
	}
	if o.Heads > 0 {
		c.EncoderNumHeads, c.DecoderNumHeads = o.Heads, o.Heads
	}
	if o.PatchSize > 0 {
		c.PatchSize, c.VAEEmbedDim, c.ImgSize = o.PatchSize, 0, 0
	}
	if o.VAEStride > 0 {
		c.VAEStride, c.ImgSize = o.VAEStride, 0
	}
	if c.EncoderNumHeads == 0 || c.DecoderNumHeads == 0 {
		return nil, engine.Errorf("open "+f.path, engine.Invalid, "the file does not say how many attention heads the width %d has; pass --heads", c.EncoderEmbedDim)
	}
	if c.PatchSize == 0 {
		switch {
		case c.VAEEmbedDim > 0:
			c.PatchSize = int(math.Round(math.Sqrt(float64(tokenDim) / float64(c.VAEEmbedDim))))
		case known != "" && tokenDim == 16 || squareFree(tokenDim):
			c.PatchSize = 1
		default:
			return nil, engine.Errorf("open "+f.path, engine.Invalid, "the file does not say how its tokens of %d channels cover the latents; pass --patch-size (1 for a token per latent position)", tokenDim)
		}
	}
	if c.PatchSize < 1 || c.PatchSize > 1<<8 || !c.Discrete() && tokenDim%(c.PatchSize*c.PatchSize) != 0 {
		return nil, engine.Errorf("open "+f.path, engine.Invalid, "patch size %d does not divide tokens of %d channels", c.PatchSize, tokenDim)
	}
	if c.Discrete() && c.VAEEmbedDim > 0 { // no tensor tells the width of a code's vector
		tokenDim = c.VAEEmbedDim
	}
	if c.VAEEmbedDim == 0 {
		c.VAEEmbedDim = tokenDim / (c.PatchSize * c.PatchSize)
	}
	if c.VAEStride == 0 {
		c.VAEStride = 16
	}
	if c.ImgSize == 0 {
		c.ImgSize = side * c.VAEStride * c.PatchSize
	}
	if err := c.Validate(); err != nil {
		return nil, badFile(f.path, "%w", err)
	}
	return c, c.agrees(f, &shapes, tokenDim, side)
}

// squareFree reports whether only patches of one position fit n channels.
func squareFree(n int) bool {
	for p := 2; p*p <= n; p++ {
		if n%(p*p) == 0 {
			return false
		}
	}
	return true
}

// agrees compares the recorded settings with the shapes.
func (c *MARConfig) agrees(f *File, s *MARConfig, tokenDim, side int) error {
	for _, x := range [][3]string{{"attention", orElse(c.Attention, Bidirectional), orElse(s.Attention, Bidirectional)}, {"head", c.HeadKind(), s.HeadKind()}} {
		if x[1] != x[2] {
			return badFile(f.path, "the config says %s = %s, the tensors say %s", x[0], quote(x[1]), x[2])
		}
	}
	for _, x := range []struct {
		field    string
		got, had int
	}{
		{"encoder_embed_dim", c.EncoderEmbedDim, s.EncoderEmbedDim}, {"decoder_embed_dim", c.DecoderEmbedDim, s.DecoderEmbedDim},
		{"encoder_depth", c.EncoderDepth, s.EncoderDepth}, {"decoder_depth", c.DecoderDepth, s.DecoderDepth},
		{"mlp_ratio · encoder_embed_dim", c.EncoderHidden(), s.EncoderHidden()},
		{"mlp_ratio · decoder_embed_dim", c.DecoderHidden(), s.DecoderHidden()},
		{"class_num", c.ClassNum, s.ClassNum}, {"buffer_size", c.BufferSize, s.BufferSize},
		{"diffloss_d", c.DiffLossD, s.DiffLossD}, {"diffloss_w", c.DiffLossW, s.DiffLossW},
		{"vae_embed_dim · patch_size²", c.TokenDim(), tokenDim}, {"img_size / vae_stride / patch_size", c.Grid(), side},
		{"codebook_size", c.CodebookSize, s.CodebookSize}, {"mixtures", c.Mixtures, s.Mixtures},
	} {
		if x.got != x.had {
			return badFile(f.path, "the config says %s = %d, the tensors say %d", x.field, x.got, x.had)
		}
	}
	return nil
}

// marFromShapes reads what shapes tell. VAEEmbedDim holds the token's channels
// and ImgSize the tokens per side; known names the published model whose widths
// these are.
func (f *File) marFromShapes() (*MARConfig, string, error) {
	c := marDefaults()
	var err error
	dim := func(name string, rank, axis int) int {
		info, ok := f.Tensor(name)
		if err != nil {
			return 0
		}
		if !ok {
			err = badFile(f.path, "not a MAR: no tensor %s", quote(name))
		} else if len(info.Shape) != rank || info.Shape[axis] < 1 {
			err = badFile(f.path, "not a MAR: tensor %s has shape %s", quote(name), engine.ShapeString(info.Shape))
		} else {
			return info.Shape[axis]
		}
		return 0
	}
	has := func(name string) bool { return f.tensors[name] != nil }
	c.ClassNum = dim("class_emb.weight", 2, 0)
	c.EncoderEmbedDim = dim("class_emb.weight", 2, 1)
	c.DecoderEmbedDim = dim("diffusion_pos_embed_learned", 3, 2)
	tokens := dim("diffusion_pos_embed_learned", 3, 1)
	decHidden := dim("decoder_blocks.0.mlp.fc1.weight", 2, 0)
	encHidden := decHidden
	if has("target_pos_embed_learned") {
		c.Attention = Causal
		c.BufferSize = dim("decoder_pos_embed_learned", 3, 1) - tokens
	} else {
		c.BufferSize = dim("encoder_pos_embed_learned", 3, 1) - tokens
		encHidden = dim("encoder_blocks.0.mlp.fc1.weight", 2, 0)
	}
	if !has("token_emb.weight") {
		c.VAEEmbedDim = dim("z_proj.weight", 2, 1)
	}
	switch {
	case has("celoss.proj.weight"):
		c.Head, c.VAEEmbedDim = CategoricalHead, 1
		c.CodebookSize = dim("celoss.proj.weight", 2, 0)
	case has("l2loss.proj.weight"):
		c.Head = L2Head
	case has("gmmloss.proj.weight"):
		c.Head = GMMHead
		c.Mixtures = dim("gmmloss.proj.weight", 2, 0) / (1 + 2*max(c.VAEEmbedDim, 1))
	default:
		c.DiffLossW = dim("diffloss.net.input_proj.weight", 2, 0)
	}
	if err != nil {
		return nil, "", err
	}
	// Hidden widths are cut down to integers: the larger quotient serves both.
	c.MLPRatio = max(float64(encHidden)/float64(c.EncoderEmbedDim), float64(decHidden)/float64(c.DecoderEmbedDim))
	if c.EncoderHidden() != encHidden || c.DecoderHidden() != decHidden { // the quotient was rounded down
		c.MLPRatio = math.Nextafter(c.MLPRatio, math.Inf(1))
	}
	c.EncoderDepth = f.count("encoder_blocks.%d.norm1.weight")
	c.DecoderDepth = f.count("decoder_blocks.%d.norm1.weight")
	c.DiffLossD = f.count("diffloss.net.res_blocks.%d.in_ln.weight")
	c.ImgSize = int(math.Round(math.Sqrt(float64(tokens))))
	if c.ImgSize*c.ImgSize != tokens {
		return nil, "", badFile(f.path, "%d tokens are not a square grid", tokens)
	}
	known := ""
	for name, s := range marSizes {
		if c.EncoderEmbedDim == s.width && c.DecoderEmbedDim == s.width {
			known = name
		}
	}
	return &c, known, nil
}

// count is the number of consecutive keys of a numbered pattern, from 0.
func (f *File) count(pattern string) int {
	n := 0
	for f.tensors[fmt.Sprintf(pattern, n)] != nil {
		n++
	}
	return n
}

// recordedConfig is what the file says about its configuration: metadata
// "config" of safetensors, else "args" of a PyTorch file, where the authors'
// trainer stores its Namespace with the model's name (mar_base …).
func (f *File) recordedConfig() (map[string]any, error) {
	if text, ok := f.meta["config"]; ok {
		m, err := parseObject(text)
		if err != nil {
			return nil, badFile(f.path, "metadata config: %w", err)
		}
		return m, nil
	}
	for _, key := range []string{"config", "args"} {
		v, _ := f.Value(key)
		m, ok := v.(map[string]any)
		if !ok {
			continue
		}
		if name, ok := m["model"].(string); ok {
			if s, ok := marSizes[strings.ReplaceAll(name, "_", "-")]; ok && m["encoder_num_heads"] == nil {
				m["encoder_num_heads"], m["decoder_num_heads"] = int64(s.heads), int64(s.heads)
			}
		}
		return m, nil
	}
	return nil, nil
}
