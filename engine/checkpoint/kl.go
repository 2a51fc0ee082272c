package checkpoint

import (
	"fmt"
	"slices"
	"strings"

	"margo/engine"
)

// KLConfig describes a tokenizer in the layout of latent diffusion: the KL
// autoencoder (MAR models/vae.py, LDM autoencoder.py) or, with NEmbed, the
// vector-quantised one (taming models/vqgan.py VQModel). Level i works at 1/2^i
// of the image's resolution with Ch·ChMult[i] channels. All of it is told by
// shapes.
type KLConfig struct {
	Ch           int   `json:"ch"`
	ChMult       []int `json:"ch_mult"`
	NumResBlocks int   `json:"num_res_blocks"`
	InChannels   int   `json:"in_channels"`
	OutChannels  int   `json:"out_ch"`
	ZChannels    int   `json:"z_channels"`
	EmbedDim     int   `json:"embed_dim"` // channels of the latents
	// Levels whose residual blocks are each followed by attention. LDM's
	// decoder has it at the lowest resolution, MAR's has none.
	EncoderAttn []int `json:"encoder_attn_levels"`
	DecoderAttn []int `json:"decoder_attn_levels"`
	Resolution  int   `json:"resolution,omitempty"` // of its training images; 0 unknown
	// NEmbed is the number of codes of a VQ tokenizer; 0: a KL tokenizer, whose
	// encoder gives means and log variances.
	NEmbed int `json:"n_embed,omitempty"`
	// NoQuantConv: there is neither quant_conv nor post_quant_conv (diffusers
	// use_quant_conv and use_post_quant_conv false); EmbedDim is ZChannels then.
	NoQuantConv bool `json:"no_quant_conv,omitempty"`
}

// codebook is the key that tells a VQ tokenizer from a KL one.
const codebook = "quantize.embedding.weight"

// groups is the number of groups of every GroupNorm (vae.py Normalize).
const groups = 32

// KL16 is the tokenizer of the published MARs: stride 16, 16 channels (P43).
func KL16() *KLConfig {
	return &KLConfig{Ch: 128, ChMult: []int{1, 1, 2, 2, 4}, NumResBlocks: 2, InChannels: 3, OutChannels: 3,
		ZChannels: 16, EmbedDim: 16, EncoderAttn: []int{4}, DecoderAttn: []int{}, Resolution: 256}
}

// KL8 is the tokenizer of the published DiTs, sd-vae-ft-mse and -ema: stride 8, 4
// channels (LDM's kl-f8).
func KL8() *KLConfig {
	return &KLConfig{Ch: 128, ChMult: []int{1, 2, 4, 4}, NumResBlocks: 2, InChannels: 3, OutChannels: 3,
		ZChannels: 4, EmbedDim: 4, EncoderAttn: []int{}, DecoderAttn: []int{}, Resolution: 256}
}

// Stride is the pixels for each latent position, per side.
func (c *KLConfig) Stride() int { return 1 << (len(c.ChMult) - 1) }

// Kind is KindVQ with a codebook, else KindKL.
func (c *KLConfig) Kind() string {
	if c.NEmbed > 0 {
		return KindVQ
	}
	return KindKL
}

// perLatent is what the encoder gives for each channel of a latent: a mean and a
// log variance, or the value that is quantised.
func (c *KLConfig) perLatent() int {
	if c.NEmbed > 0 {
		return 1
	}
	return 2
}

// EncoderOut is the number of channels that the encoder's last convolution gives.
func (c *KLConfig) EncoderOut() int { return c.perLatent() * c.ZChannels }

// Moments is the number of channels after quant_conv: 2·EmbedDim of a KL
// tokenizer, EmbedDim of a VQ one.
func (c *KLConfig) Moments() int { return c.perLatent() * c.EmbedDim }

// Validate reports the first field that cannot be.
func (c *KLConfig) Validate() error {
	bad := func(format string, args ...any) error {
		return engine.Errorf("KL config", engine.Invalid, format, args...)
	}
	if len(c.ChMult) < 1 || len(c.ChMult) > 10 {
		return bad("ch_mult has %d levels, it must have between 1 and 10", len(c.ChMult))
	}
	for _, f := range []struct {
		name    string
		v, most int
	}{
		{"ch", c.Ch, 1 << 13}, {"num_res_blocks", c.NumResBlocks, 64}, {"in_channels", c.InChannels, 1 << 10}, {"out_ch", c.OutChannels, 1 << 10},
		{"z_channels", c.ZChannels, 1 << 13}, {"embed_dim", c.EmbedDim, 1 << 13}, {"ch_mult", slices.Min(c.ChMult), 1 << 6}, {"ch_mult", slices.Max(c.ChMult), 1 << 6},
	} {
		if f.v < 1 || f.v > f.most {
			return bad("%s is %d, it must be between 1 and %d", f.name, f.v, f.most)
		}
	}
	for i, m := range c.ChMult {
		if c.Ch*m%groups != 0 || c.Ch%groups != 0 {
			return bad("ch · ch_mult[%d] = %d: channels must be divisible by the %d groups of GroupNorm", i, c.Ch*m, groups)
		}
	}
	for _, i := range append(slices.Clone(c.EncoderAttn), c.DecoderAttn...) {
		if i < 0 || i >= len(c.ChMult) {
			return bad("attention at level %d of %d", i, len(c.ChMult))
		}
	}
	if c.NEmbed < 0 || c.NEmbed > 1<<24 {
		return bad("n_embed is %d, it must be between 0 and %d", c.NEmbed, 1<<24)
	}
	if c.NoQuantConv && c.EmbedDim != c.ZChannels {
		return bad("embed_dim is %d and z_channels %d: they are the same without quant_conv", c.EmbedDim, c.ZChannels)
	}
	if c.Resolution < 0 || c.Resolution > 1<<16 {
		return bad("resolution is %d", c.Resolution)
	}
	return nil
}

// Params lists the tensors of encoder, decoder, quant_conv, post_quant_conv and
// codebook.
func (c *KLConfig) Params() []ParamSpec {
	var b builder
	n := len(c.ChMult)
	at := func(level int) int { return c.Ch * c.ChMult[level] }
	low := at(n - 1)

	b.conv("encoder.conv_in", c.Ch, c.InChannels, 3)
	in := c.Ch
	for i := 0; i < n; i++ {
		in = b.level(fmt.Sprintf("encoder.down.%d", i), in, at(i), c.NumResBlocks, slices.Contains(c.EncoderAttn, i))
		if i < n-1 {
			b.conv(fmt.Sprintf("encoder.down.%d.downsample.conv", i), in, in, 3)
		}
	}
	b.middle("encoder.mid", low)
	b.norm("encoder.norm_out", low)
	b.conv("encoder.conv_out", c.EncoderOut(), low, 3)

	b.conv("decoder.conv_in", low, c.ZChannels, 3)
	b.middle("decoder.mid", low)
	in = low
	for i := n - 1; i >= 0; i-- {
		in = b.level(fmt.Sprintf("decoder.up.%d", i), in, at(i), c.NumResBlocks+1, slices.Contains(c.DecoderAttn, i))
		if i > 0 {
			b.conv(fmt.Sprintf("decoder.up.%d.upsample.conv", i), in, in, 3)
		}
	}
	b.norm("decoder.norm_out", in)
	b.conv("decoder.conv_out", c.OutChannels, in, 3)
	if !c.NoQuantConv {
		b.conv("quant_conv", c.Moments(), c.EncoderOut(), 1)
		b.conv("post_quant_conv", c.ZChannels, c.EmbedDim, 1)
	}
	if c.NEmbed > 0 {
		b.add(codebook, c.NEmbed, c.EmbedDim)
	}
	return b.out
}

// level is a run of residual blocks at one resolution; it returns its channels.
func (b *builder) level(p string, in, out, blocks int, attention bool) int {
	for j := 0; j < blocks; j++ {
		b.resnet(fmt.Sprintf("%s.block.%d", p, j), in, out)
		in = out
	}
	for j := 0; attention && j < blocks; j++ {
		b.attention(fmt.Sprintf("%s.attn.%d", p, j), out)
	}
	return out
}

func (b *builder) resnet(p string, in, out int) {
	b.norm(p+".norm1", in)
	b.conv(p+".conv1", out, in, 3)
	b.norm(p+".norm2", out)
	b.conv(p+".conv2", out, out, 3)
	if in != out {
		b.conv(p+".nin_shortcut", out, in, 1)
	}
}

func (b *builder) attention(p string, ch int) {
	b.norm(p+".norm", ch)
	for _, s := range []string{"q", "k", "v", "proj_out"} {
		b.conv(p+"."+s, ch, ch, 1)
	}
}

func (b *builder) middle(p string, ch int) {
	b.resnet(p+".block_1", ch, ch)
	b.attention(p+".attn_1", ch)
	b.resnet(p+".block_2", ch, ch)
}

// IgnorableKL tells the keys that training leaves in a tokenizer's state dict:
// the discriminator and perceptual loss (with LDM's learned log variance), and a
// trainer's averaged copy.
func IgnorableKL(name string) bool {
	return strings.HasPrefix(name, "loss.") || strings.HasPrefix(name, "model_ema.")
}

// InferKL reads the configuration of a KL or VQ tokenizer from names and shapes;
// only the resolution comes from metadata.
func InferKL(f *File) (*KLConfig, error) {
	c := &KLConfig{EncoderAttn: []int{}, DecoderAttn: []int{}}
	var err error
	dim := func(name string, axis int) int {
		info, ok := f.Tensor(name)
		if err != nil {
			return 0
		}
		rank := 4
		if name == codebook {
			rank = 2
		}
		if !ok {
			err = badFile(f.path, "not a tokenizer: no tensor %s", quote(f.stored(name)))
		} else if len(info.Shape) != rank || info.Shape[axis] < 1 {
			err = badFile(f.path, "not a tokenizer: tensor %s has shape %s", quote(f.stored(name)), engine.ShapeString(info.Shape))
		} else {
			return info.Shape[axis]
		}
		return 0
	}
	c.Ch = dim("encoder.conv_in.weight", 0)
	c.InChannels = dim("encoder.conv_in.weight", 1)
	c.ZChannels = dim("decoder.conv_in.weight", 1)
	if f.tensors["quant_conv.weight"] == nil && f.tensors["post_quant_conv.weight"] == nil {
		c.NoQuantConv, c.EmbedDim = true, c.ZChannels
	} else {
		c.EmbedDim = dim("post_quant_conv.weight", 1)
	}
	if f.tensors[codebook] != nil {
		c.NEmbed = dim(codebook, 0)
	}
	c.OutChannels = dim("decoder.conv_out.weight", 0)
	levels := f.count("encoder.down.%d.block.0.norm1.weight")
	c.NumResBlocks = f.count("encoder.down.0.block.%d.norm1.weight")
	for i := 0; i < levels; i++ {
		w := dim(fmt.Sprintf("encoder.down.%d.block.0.conv1.weight", i), 0)
		if err == nil && w%c.Ch != 0 {
			err = badFile(f.path, "level %d has %d channels, not a multiple of the first convolution's %d", i, w, c.Ch)
		}
		if err != nil {
			return nil, err
		}
		c.ChMult = append(c.ChMult, w/c.Ch)
		if f.tensors[fmt.Sprintf("encoder.down.%d.attn.0.norm.weight", i)] != nil {
			c.EncoderAttn = append(c.EncoderAttn, i)
		}
		if f.tensors[fmt.Sprintf("decoder.up.%d.attn.0.norm.weight", i)] != nil {
			c.DecoderAttn = append(c.DecoderAttn, i)
		}
	}
	if err != nil {
		return nil, err
	}
	recorded, err := f.recordedConfig()
	if err != nil {
		return nil, err
	}
	only := struct {
		Resolution int `json:"resolution"`
		ZChannels  int `json:"z_channels"`
	}{}
	if err := setFields(&only, recorded); err != nil {
		return nil, badFile(f.path, "config: %w", err)
	}
	// A file that records its config and has lost the two convolutions is cut,
	// not a tokenizer without them.
	if without, _ := recorded["no_quant_conv"].(bool); c.NoQuantConv && only.ZChannels > 0 && !without {
		return nil, badFile(f.path, "no tensor %q, which the file's config has", "post_quant_conv.weight")
	}
	c.Resolution = only.Resolution
	if err := c.Validate(); err != nil {
		return nil, badFile(f.path, "%w", err)
	}
	return c, nil
}
