// Package tokenizer turns images into latents and back: KL autoencoders in the
// layout of MAR and of latent diffusion (KL-16, KL-8 and their relatives of any
// channels, multipliers, blocks and attention levels), VQ autoencoders in that of
// taming-transformers, and raw pixels.
//
// Images are NHWC, RGB in [-1, 1]; latents [N,h,w,C] likewise. The residual
// stream is F32, operands of convolutions are in the compute dtype. A MAR sees
// latents multiplied by LatentScale, cut into tokens of p×p positions: see
// Tokens and FromTokens.
package tokenizer

import (
	"fmt"
	"math"

	"margo/engine"
	"margo/engine/checkpoint"
)

// Autoencoder is a tokenizer with parameters: *KL or *VQ.
type Autoencoder interface {
	Tokenizer
	// Config is what the tokenizer was made from.
	Config() checkpoint.KLConfig
	// Unused reports whether a tensor of a tokenizer's checkpoint is not needed.
	Unused(name string) bool
}

// New describes the tokenizer of a configuration: NewVQ if it has a codebook,
// else NewKL.
func New(cfg *checkpoint.KLConfig, latentScale float64, encode bool) (Autoencoder, error) {
	if cfg.NEmbed > 0 {
		return NewVQ(cfg, latentScale, encode)
	}
	return NewKL(cfg, latentScale, encode)
}

// Tokenizer is a pair of maps between images and latents. Height and width are
// free, as long as the image's are multiples of Stride.
type Tokenizer interface {
	// Stride is the pixels for each latent position, per side.
	Stride() int
	// Channels of a latent position.
	Channels() int
	// LatentScale is the factor from latents to what a MAR models.
	LatentScale() float32
	// Encode gives the distribution of the latents of img [N,H,W,3] F32. It waits
	// for the device. nil after an error, which c holds.
	Encode(c *engine.Ctx, img *engine.Tensor) *Posterior
	// Decode turns latents z [N,h,w,Channels] F32 into images [N,H,W,3] F32, not
	// clipped. z may be returned itself where there is nothing to decode.
	Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor
}

// Posterior is the distribution of the latents of N images on the host: an
// independent normal for each value, arrays [N,H,W,C] (vae.py
// DiagonalGaussianDistribution).
type Posterior struct {
	N, H, W, C int
	Mean       []float32
	LogVar     []float32 // clamped to [-30, 20]
	Std        []float32 // exp(LogVar/2)
}

// newPosterior splits moments [n,h,w,2·ch]: means first, then log variances.
func newPosterior(n, h, w, ch int) *Posterior {
	k := n * h * w * ch
	return &Posterior{N: n, H: h, W: w, C: ch, Mean: make([]float32, k), LogVar: make([]float32, k), Std: make([]float32, k)}
}

// set fills the posterior from position first on.
func (p *Posterior) set(first int, moments []float32) {
	for r := 0; r < len(moments)/(2*p.C); r++ {
		row, at := moments[r*2*p.C:], (first+r)*p.C
		copy(p.Mean[at:at+p.C], row)
		for i, v := range row[p.C : 2*p.C] {
			v = min(max(v, -30), 20)
			p.LogVar[at+i] = v
			p.Std[at+i] = float32(math.Exp(float64(v) / 2))
		}
	}
}

// spread computes the standard deviations from the log variances.
func (p *Posterior) spread() {
	for i, v := range p.LogVar {
		p.Std[i] = float32(math.Exp(float64(v) / 2))
	}
}

// certain makes the standard deviation 0.
func (p *Posterior) certain() {
	clear(p.Std)
	for i := range p.LogVar {
		p.LogVar[i] = float32(math.Inf(-1))
	}
}

// Sample draws mean + std·δ with the given δ, as many as there are values.
func (p *Posterior) Sample(noise []float32) ([]float32, error) {
	if len(noise) != len(p.Mean) {
		return nil, engine.Errorf("sample latents", engine.Invalid, "%d numbers of noise for %d values", len(noise), len(p.Mean))
	}
	out := make([]float32, len(p.Mean))
	for i, m := range p.Mean {
		out[i] = m + p.Std[i]*noise[i]
	}
	return out, nil
}

// Draw is Sample with noise from seed: that of image i depends on seed and
// first+i only (engine.PurposeLatent).
func (p *Posterior) Draw(seed uint64, first int) []float32 {
	out := make([]float32, len(p.Mean))
	rng := engine.RNG{Seed: seed, Purpose: engine.PurposeLatent}
	for i, m := range p.Mean {
		pos := i / p.C
		d := engine.NormalAt(rng, i%p.C, pos%(p.H*p.W), first+pos/(p.H*p.W))
		out[i] = m + p.Std[i]*float32(d)
	}
	return out
}

// Tokens cuts latents z [N,h,w,C] F32 into tokens [N, (h/p)·(w/p), C·p·p] F32
// and multiplies them by scale: what a MAR models. nil after an error.
func Tokens(c *engine.Ctx, z *engine.Tensor, p int, scale float32) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	if len(z.Shape) != 4 || p < 1 || z.Shape[1]%p != 0 || z.Shape[2]%p != 0 {
		c.Fail(shapeError("tokens", z, fmt.Sprintf("[N,h,w,C] with h and w multiples of %d", p)))
		return nil
	}
	y := c.New(engine.F32, z.Shape[0], z.Shape[1]/p*(z.Shape[2]/p), z.Shape[3]*p*p)
	c.Scoped(func() {
		c.Patchify(engine.PatchifyArgs{X: scaled(c, z, scale), Y: y, P: p})
	})
	return y
}

// FromTokens puts tokens [N, (h/p)·(w/p), C·p·p] F32 together to latents
// [N,h,w,C] F32 and divides them by scale. nil after an error.
func FromTokens(c *engine.Ctx, tokens *engine.Tensor, h, w, p int, scale float32) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	if p < 1 || len(tokens.Shape) != 3 || tokens.Shape[1]*p*p != h*w || h%p != 0 || w%p != 0 || tokens.Cols()%(p*p) != 0 {
		c.Fail(shapeError("latents", tokens, fmt.Sprintf("[N, (%d/%d)·(%d/%d), C·%d²]", h, p, w, p, p)))
		return nil
	}
	z := c.New(engine.F32, tokens.Shape[0], h, w, tokens.Cols()/(p*p))
	c.Scoped(func() {
		c.Patchify(engine.PatchifyArgs{X: z, Y: scaled(c, tokens, 1/scale), P: p, Inverse: true})
	})
	return z
}

// scaled is t·s; t itself for a factor of 1.
func scaled(c *engine.Ctx, t *engine.Tensor, s float32) *engine.Tensor {
	if s == 1 || c.Err() != nil {
		return t
	}
	y := c.New(engine.F32, t.Shape...)
	c.Cast(engine.CastArgs{X: t, Y: y, Scale: s})
	return y
}

func shapeError(op string, t *engine.Tensor, want string) error {
	return &engine.Error{Op: op, Kind: engine.Invalid, Shapes: t.String(), Err: fmt.Errorf("want %s", want)}
}

// Pixels is the tokenizer of models that work on pixels (P49): latents are the
// image itself.
type Pixels struct{}

// Stride is 1.
func (Pixels) Stride() int { return 1 }

// Channels is 3: red, green, blue.
func (Pixels) Channels() int { return 3 }

// LatentScale is 1.
func (Pixels) LatentScale() float32 { return 1 }

// Encode gives the pixels as means, with a standard deviation of 0.
func (Pixels) Encode(c *engine.Ctx, img *engine.Tensor) *Posterior {
	if c.Err() != nil {
		return nil
	}
	if len(img.Shape) != 4 || img.Cols() != 3 {
		c.Fail(shapeError("encode", img, "[N,H,W,3]"))
		return nil
	}
	p := newPosterior(img.Shape[0], img.Shape[1], img.Shape[2], 3)
	if p.Mean = c.Download(img); p.Mean == nil {
		return nil
	}
	p.certain()
	return p
}

// Decode returns z.
func (Pixels) Decode(_ *engine.Ctx, z *engine.Tensor) *engine.Tensor { return z }
