package tokenizer

import (
	"fmt"
	"slices"
	"strings"

	"margo/engine"
	"margo/engine/checkpoint"
)

// KL is the autoencoder of latent diffusion with a KL penalty (LDM
// autoencoder.py AutoencoderKL; MAR vae.py; diffusers autoencoder_kl.py, whose
// names package checkpoint translates). Encoder and QuantConv are nil when it
// was made to decode only, QuantConv and PostQuantConv where the configuration
// has none.
type KL struct {
	Encoder       *Encoder `param:"encoder"`
	QuantConv     *Conv    `param:"quant_conv"`
	PostQuantConv *Conv    `param:"post_quant_conv"`
	Decoder       *Decoder `param:"decoder"`

	// ChunkBytes bounds the activations: images are worked on together as long as
	// they stay below, else one by one. Results don't depend on it.
	ChunkBytes int

	cfg   checkpoint.KLConfig
	scale float32
}

// Level is a run of residual blocks at one resolution, with attention after
// each if the level has it, then a change of resolution except at the last.
type Level struct {
	Block      []*ResBlock  `param:"block"`
	Attn       []*AttnBlock `param:"attn"`
	Downsample *Conv        `param:"downsample.conv"`
	Upsample   *Conv        `param:"upsample.conv"`
}

// Middle is the part at the lowest resolution.
type Middle struct {
	Block1 *ResBlock  `param:"block_1"`
	Attn1  *AttnBlock `param:"attn_1"`
	Block2 *ResBlock  `param:"block_2"`
}

// Encoder maps images to moments (vae.py Encoder). Level i is Down[i].
type Encoder struct {
	ConvIn  *Conv     `param:"conv_in"`
	Down    []*Level  `param:"down"`
	Mid     *Middle   `param:"mid"`
	NormOut GroupNorm `param:"norm_out"`
	ConvOut *Conv     `param:"conv_out"`
}

// Decoder maps latents to images (vae.py Decoder). Level i is Up[i]; the lowest
// resolution, the last of Up, runs first.
type Decoder struct {
	ConvIn  *Conv     `param:"conv_in"`
	Mid     *Middle   `param:"mid"`
	Up      []*Level  `param:"up"`
	NormOut GroupNorm `param:"norm_out"`
	ConvOut *Conv     `param:"conv_out"`
}

// defaultChunk holds one 256×256 image of KL-16's top level and keeps many
// small images together.
const defaultChunk = 64 << 20

// NewKL describes the tokenizer of a configuration, without values: package
// load fills engine.Params of it. Latents are multiplied by latentScale before
// a MAR sees them. encode says whether the encoder is wanted too. A config that
// cannot be is an error of kind Invalid, attention over more than 512 channels
// one of kind Unsupported.
func NewKL(cfg *checkpoint.KLConfig, latentScale float64, encode bool) (*KL, error) {
	if cfg.NEmbed > 0 {
		return nil, engine.Errorf("KL tokenizer", engine.Invalid, "the configuration has a codebook: it is of a VQ tokenizer")
	}
	return newKL(cfg, latentScale, encode)
}

// newKL describes the networks that KL and VQ have in common.
func newKL(cfg *checkpoint.KLConfig, latentScale float64, encode bool) (*KL, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if !(latentScale > 0) {
		return nil, engine.Errorf("tokenizer", engine.Invalid, "latent scale %g is not above 0", latentScale)
	}
	k := &KL{cfg: *cfg, scale: float32(latentScale), ChunkBytes: defaultChunk}
	// The two 1×1 convolutions on latents cost nothing and stay exact.
	if !cfg.NoQuantConv {
		k.PostQuantConv = newConv(cfg.EmbedDim, cfg.ZChannels, 1).exact()
	}
	n := len(cfg.ChMult)
	var err error
	if k.Decoder, err = newDecoder(cfg, n); err != nil {
		return nil, err
	}
	if encode {
		if !cfg.NoQuantConv {
			k.QuantConv = newConv(cfg.EncoderOut(), cfg.Moments(), 1).exact()
		}
		if k.Encoder, err = newEncoder(cfg, n); err != nil {
			return nil, err
		}
	}
	return k, nil
}

func newEncoder(cfg *checkpoint.KLConfig, n int) (*Encoder, error) {
	e := &Encoder{ConvIn: newConv(cfg.InChannels, cfg.Ch, 3)}
	in := cfg.Ch
	for i := 0; i < n; i++ {
		l, err := newLevel(in, cfg.Ch*cfg.ChMult[i], cfg.NumResBlocks, slices.Contains(cfg.EncoderAttn, i))
		if err != nil {
			return nil, err
		}
		in = cfg.Ch * cfg.ChMult[i]
		if i < n-1 {
			l.Downsample = newConv(in, in, 3)
		}
		e.Down = append(e.Down, l)
	}
	var err error
	if e.Mid, err = newMiddle(in); err != nil {
		return nil, err
	}
	e.NormOut, e.ConvOut = newGroupNorm(in), newConv(in, cfg.EncoderOut(), 3)
	return e, nil
}

func newDecoder(cfg *checkpoint.KLConfig, n int) (*Decoder, error) {
	in := cfg.Ch * cfg.ChMult[n-1]
	d := &Decoder{ConvIn: newConv(cfg.ZChannels, in, 3), Up: make([]*Level, n)}
	var err error
	if d.Mid, err = newMiddle(in); err != nil {
		return nil, err
	}
	for i := n - 1; i >= 0; i-- {
		l, err := newLevel(in, cfg.Ch*cfg.ChMult[i], cfg.NumResBlocks+1, slices.Contains(cfg.DecoderAttn, i))
		if err != nil {
			return nil, err
		}
		in = cfg.Ch * cfg.ChMult[i]
		if i > 0 {
			l.Upsample = newConv(in, in, 3)
		}
		d.Up[i] = l
	}
	d.NormOut, d.ConvOut = newGroupNorm(in), newConv(in, cfg.OutChannels, 3)
	return d, nil
}

func newLevel(in, out, blocks int, attention bool) (*Level, error) {
	l := &Level{}
	for j := 0; j < blocks; j++ {
		l.Block = append(l.Block, newResBlock(in, out))
		in = out
		if attention {
			a, err := newAttnBlock(out)
			if err != nil {
				return nil, err
			}
			l.Attn = append(l.Attn, a)
		}
	}
	return l, nil
}

func newMiddle(ch int) (*Middle, error) {
	a, err := newAttnBlock(ch)
	return &Middle{newResBlock(ch, ch), a, newResBlock(ch, ch)}, err
}

// Unused reports whether a tensor of a tokenizer's checkpoint is not needed by
// k: what training left there and, for a tokenizer that decodes only, the
// encoder. It is meant as load.Options.Ignore.
func (k *KL) Unused(name string) bool {
	if checkpoint.IgnorableKL(name) {
		return true
	}
	return k.Encoder == nil && (strings.HasPrefix(name, "encoder.") || strings.HasPrefix(name, "quant_conv."))
}

// Config is what the tokenizer was made from.
func (k *KL) Config() checkpoint.KLConfig { return k.cfg }

// Stride is 2 for each level but the last.
func (k *KL) Stride() int { return k.cfg.Stride() }

// Channels of a latent position: embed_dim.
func (k *KL) Channels() int { return k.cfg.EmbedDim }

// LatentScale is the factor from latents to what a MAR models.
func (k *KL) LatentScale() float32 { return k.scale }

// Encode gives the posterior of img [N,H,W,in_channels] F32; H and W must be
// multiples of Stride.
func (k *KL) Encode(c *engine.Ctx, img *engine.Tensor) *Posterior {
	var p *Posterior
	k.encode(c, img, func(n, h, w int) { p = newPosterior(n, h, w, k.Channels()) }, func(first int, m []float32) { p.set(first, m) })
	if c.Err() != nil {
		return nil
	}
	return p
}

// encode runs the encoder over images, as many together as fit: begin is told
// their number and the size of the latents, then set gets the moments from
// position first on, piece by piece.
func (k *KL) encode(c *engine.Ctx, img *engine.Tensor, begin func(n, h, w int), set func(first int, moments []float32)) {
	if c.Poll() {
		return
	}
	s := k.Stride()
	switch {
	case k.Encoder == nil:
		c.Fail(engine.Errorf("encode", engine.Invalid, "the tokenizer was loaded without its encoder"))
		return
	case img == nil || len(img.Shape) != 4 || img.Cols() != k.cfg.InChannels || img.DType != engine.F32 || img.Shape[1]%s != 0 || img.Shape[2]%s != 0:
		c.Fail(shapeError("encode", img, fmt.Sprintf("f32[N,H,W,%d] with H and W multiples of %d", k.cfg.InChannels, s)))
		return
	}
	n, h, w := img.Shape[0], img.Shape[1]/s, img.Shape[2]/s
	begin(n, h, w)
	for i, step := 0, k.together(h, w); i < n && c.Err() == nil; i += step {
		c.Scoped(func() {
			if m := c.Download(k.Moments(c, images(img, i, min(i+step, n)))); m != nil {
				set(i*h*w, m)
			}
		})
	}
}

// Moments is quant_conv(encoder(x)), [N,h,w,2·embed_dim]: means, then log
// variances; of a VQ tokenizer the latents before quantisation,
// [N,h,w,embed_dim].
func (k *KL) Moments(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	h := k.Encoder.Forward(c, x)
	if k.QuantConv == nil {
		return h
	}
	y := image(c, engine.F32, h, 1, 1, k.QuantConv.out())
	if c.Err() == nil {
		c.Gemm(k.QuantConv.gemm(h, y))
	}
	return y
}

// Decode turns latents z [N,h,w,embed_dim] F32, as Encode gives them (without
// LatentScale), into images [N,h·Stride,w·Stride,out_ch].
func (k *KL) Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	if z == nil || len(z.Shape) != 4 || z.Cols() != k.Channels() || z.DType != engine.F32 {
		c.Fail(shapeError("decode", z, fmt.Sprintf("f32[N,h,w,%d]", k.Channels())))
		return nil
	}
	out := image(c, engine.F32, z, k.Stride(), 1, k.cfg.OutChannels)
	n := z.Shape[0]
	for i, step := 0, k.together(z.Shape[1], z.Shape[2]); i < n && c.Err() == nil; i += step {
		c.Scoped(func() {
			h := images(z, i, min(i+step, n))
			if k.PostQuantConv != nil {
				x := h
				if h = image(c, engine.F32, x, 1, 1, k.cfg.ZChannels); c.Err() == nil {
					c.Gemm(k.PostQuantConv.gemm(x, h))
				}
			}
			k.Decoder.Forward(c, h, images(out, i, min(i+step, n)))
		})
	}
	if c.Err() != nil {
		return nil
	}
	return out
}

// together is how many images with latents h×w are worked on at once: as many
// as keep below ChunkBytes with three F32 tensors of the largest level.
func (k *KL) together(h, w int) int {
	most := 1
	for i, m := range k.cfg.ChMult {
		side := k.Stride() >> i
		most = max(most, h*side*w*side*k.cfg.Ch*m)
	}
	return max(1, k.ChunkBytes/(most*3*4))
}

// images views images [from, to) of an NHWC tensor.
func images(t *engine.Tensor, from, to int) *engine.Tensor {
	one := t.Elems() / max(t.Shape[0], 1)
	return engine.NewTensor(t.Buf, t.Off+from*one*t.DType.Size(), t.DType, append([]int{to - from}, t.Shape[1:]...)...)
}

// Forward maps images [N,H,W,in_channels] F32 to [N,h,w,2·z_channels] F32.
func (e *Encoder) Forward(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	x = e.ConvIn.forward(c, operand(c, x), engine.F32)
	for _, l := range e.Down {
		x = l.forward(c, x)
	}
	x = e.Mid.forward(c, x)
	return e.ConvOut.forward(c, e.NormOut.forward(c, x, engine.SiLU), engine.F32)
}

// Forward maps latents z [N,h,w,z_channels] F32 to images out [N,H,W,out_ch].
func (d *Decoder) Forward(c *engine.Ctx, z, out *engine.Tensor) {
	x := d.ConvIn.forward(c, operand(c, z), engine.F32)
	x = d.Mid.forward(c, x)
	for i := len(d.Up) - 1; i >= 0; i-- {
		x = d.Up[i].forward(c, x)
	}
	if x = d.NormOut.forward(c, x, engine.SiLU); c.Err() == nil {
		c.Conv2D(d.ConvOut.conv(x, out))
	}
}

func (m *Middle) forward(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	return m.Block2.Forward(c, m.Attn1.Forward(c, m.Block1.Forward(c, x)))
}

// forward runs the level's blocks, then halves or doubles height and width.
func (l *Level) forward(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	for j, b := range l.Block {
		x = b.Forward(c, x)
		if j < len(l.Attn) {
			x = l.Attn[j].Forward(c, x)
		}
	}
	switch {
	case l.Downsample != nil:
		y := image(c, engine.F32, x, 1, 2, l.Downsample.out())
		c.Scoped(func() {
			// The authors pad right and below only (vae.py Downsample).
			args := l.Downsample.conv(operand(c, x), y)
			args.Stride, args.PadTop, args.PadLeft = 2, 0, 0
			c.Conv2D(args)
		})
		return y
	case l.Upsample != nil:
		y := image(c, engine.F32, x, 2, 1, l.Upsample.out())
		c.Scoped(func() {
			args := l.Upsample.conv(operand(c, x), y)
			args.Upsample = true
			c.Conv2D(args)
		})
		return y
	}
	return x
}
