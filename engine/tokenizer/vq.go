package tokenizer

import (
	"fmt"
	"math"

	"margo/engine"
	"margo/engine/checkpoint"
)

// VQ is the autoencoder with a codebook (taming-transformers vqgan.py VQModel;
// LDM autoencoder.py VQModel and VQModelInterface): the networks of KL around a
// table of NEmbed vectors. Each position of the latents is replaced by the
// nearest of them.
//
// It is a Tokenizer of continuous latents too, those before quantisation (P44):
// Encode gives them with a standard deviation of 0, Decode quantises what it is
// given and decodes that, as VQModelInterface does. It keeps what it read of the
// codebook for the next search, so one goroutine at a time may use it.
type VQ struct {
	KL                     // networks; Encode, Decode and Posterior are VQ's own
	Codebook *engine.Param `param:"quantize.embedding.weight"` // [n_embed, embed_dim]

	table *table // the codebook on the host, once it was needed
}

// table is the codebook as the search needs it, read from a tensor through a
// context: a plan's reads zeros where a device has values.
type table struct {
	from         *engine.Tensor
	by           *engine.Ctx
	ch           int
	codes        []float32
	norms, sizes []float64 // ‖e‖² and ‖e‖ of each code
	largest      float64   // ‖e‖ of any code
	shortest     int32     // the code of the least ‖e‖
}

// NewVQ describes the tokenizer of a configuration with a codebook, without
// values; latentScale and encode are as for NewKL, and so are the errors.
func NewVQ(cfg *checkpoint.KLConfig, latentScale float64, encode bool) (*VQ, error) {
	if cfg.NEmbed < 1 {
		return nil, engine.Errorf("VQ tokenizer", engine.Invalid, "n_embed is %d: the configuration has no codebook", cfg.NEmbed)
	}
	k, err := newKL(cfg, latentScale, encode)
	if err != nil {
		return nil, err
	}
	// A table that is also looked up in stays as it is: F32, not packed.
	return &VQ{KL: *k, Codebook: &engine.Param{Shape: []int{cfg.NEmbed, cfg.EmbedDim}}}, nil
}

// Codes is the number of vectors of the codebook.
func (v *VQ) Codes() int { return v.cfg.NEmbed }

// Encode gives the latents before quantisation of img [N,H,W,in_channels] F32 as
// means, with a standard deviation of 0.
func (v *VQ) Encode(c *engine.Ctx, img *engine.Tensor) *Posterior {
	var p *Posterior
	v.encode(c, img, func(n, h, w int) { p = newPosterior(n, h, w, v.Channels()) },
		func(first int, m []float32) { copy(p.Mean[first*p.C:], m) })
	if c.Err() != nil {
		return nil
	}
	p.certain()
	return p
}

// Decode quantises latents z [N,h,w,embed_dim] F32 and decodes the codes.
func (v *VQ) Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor {
	if z == nil || len(z.Shape) != 4 {
		return v.KL.Decode(c, z) // says what is wrong
	}
	codes := v.Nearest(c, z)
	if c.Err() != nil {
		return nil
	}
	return v.DecodeCodes(c, codes, z.Shape[0], z.Shape[1], z.Shape[2])
}

// DecodeCodes turns codes [N·h·w], row by row, into images
// [N,h·Stride,w·Stride,out_ch].
func (v *VQ) DecodeCodes(c *engine.Ctx, codes []int32, n, h, w int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	if len(codes) != n*h*w {
		c.Fail(engine.Errorf("decode", engine.Invalid, "%d codes for %d images of %d×%d", len(codes), n, h, w))
		return nil
	}
	out := c.New(engine.F32, n, h*v.Stride(), w*v.Stride(), v.cfg.OutChannels)
	for i, step := 0, v.together(h, w); i < n && c.Err() == nil; i += step {
		c.Scoped(func() {
			to := min(i+step, n)
			x := v.KL.Decode(c, v.Vectors(c, codes[i*h*w:to*h*w], to-i, h, w))
			if c.Err() == nil {
				c.Fail(c.Stream.Copy(images(out, i, to), x))
			}
		})
	}
	if c.Err() != nil {
		return nil
	}
	return out
}

// Vectors looks codes [N·h·w] up: [N,h,w,embed_dim] F32. A code that the
// codebook does not have is an error of kind Invalid.
func (v *VQ) Vectors(c *engine.Ctx, codes []int32, n, h, w int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	if len(codes) != n*h*w {
		c.Fail(engine.Errorf("codes", engine.Invalid, "%d codes for %d images of %d×%d", len(codes), n, h, w))
		return nil
	}
	for i, k := range codes {
		if k < 0 || int(k) >= v.cfg.NEmbed {
			c.Fail(engine.Errorf("codes", engine.Invalid, "code %d is %d; the codebook has 0 to %d", i, k, v.cfg.NEmbed-1))
			return nil
		}
	}
	y := c.New(engine.F32, n, h, w, v.Channels())
	c.Scoped(func() {
		if i := c.I32(codes); c.Err() == nil && len(codes) > 0 {
			c.Rows(engine.RowsArgs{Y: y.Reshape(len(codes), v.Channels()), A: v.Codebook.T, IA: i, Count: len(codes)})
		}
	})
	return y
}

// nearestRows is how many positions are searched together: their scores are what
// the search keeps in memory.
const nearestRows = 256

// Nearest gives for each position of z [..,embed_dim] F32 the code with the least
// ‖z − e‖² in float64, the lowest of those that are equally near (taming
// quantize.py VectorQuantizer2 computes the same in float32). It waits for the
// device. NaN has no nearest code: an error of kind Invalid.
//
// The products z·e of all positions and codes are one F32 GEMM on the device. Its
// rounding is bounded: |fl(z·e) − z·e| ≤ γ‖z‖‖e‖, γ = Ku/(1−Ku), u = 2⁻²⁴, in
// whatever order the device sums. So codes whose ‖e‖² − 2z·e can be the least
// within that bound are few; only they are compared in float64. The answer is
// that of a search in float64, and does not depend on the device.
func (v *VQ) Nearest(c *engine.Ctx, z *engine.Tensor) []int32 {
	if c.Poll() {
		return nil
	}
	if z == nil || z.Cols() != v.Channels() || z.DType != engine.F32 || !z.Contiguous() {
		c.Fail(shapeError("quantise", z, fmt.Sprintf("f32[..,%d]", v.Channels())))
		return nil
	}
	if v.table == nil || v.table.from != v.Codebook.T || v.table.by != c {
		codes := c.Download(v.Codebook.T)
		if c.Err() != nil {
			return nil
		}
		v.table = newTable(codes, v.Channels())
		v.table.from, v.table.by = v.Codebook.T, c
	}
	out := make([]int32, z.Rows())
	for i := 0; i < len(out) && !c.Poll(); i += nearestRows {
		rows := z.Reshape(len(out), z.Cols()).RowsAt(i, min(i+nearestRows, len(out)))
		c.Scoped(func() {
			y := c.New(engine.F32, rows.Rows(), v.cfg.NEmbed)
			if c.Err() == nil {
				c.Gemm(engine.GemmArgs{X: rows, W: v.Codebook.T, Y: y})
			}
			products, values := c.Download(y), c.Download(rows)
			if c.Err() == nil {
				c.Fail(v.table.nearest(out[i:i+rows.Rows()], values, products, i))
			}
		})
	}
	if c.Err() != nil {
		return nil
	}
	return out
}

func newTable(codes []float32, ch int) *table {
	t := &table{ch: ch, codes: codes, norms: make([]float64, len(codes)/ch), sizes: make([]float64, len(codes)/ch)}
	for k := range t.norms {
		e := t.code(k)
		t.norms[k] = dot(e, e)
		t.sizes[k] = math.Sqrt(t.norms[k])
		t.largest = max(t.largest, t.sizes[k])
		if t.norms[k] < t.norms[t.shortest] {
			t.shortest = int32(k)
		}
	}
	return t
}

func (t *table) code(k int) []float32 { return t.codes[k*t.ch : (k+1)*t.ch] }

// nearest searches the positions z, the first of which is the first-th, given
// their products with all codes.
func (t *table) nearest(out []int32, z, products []float32, first int) error {
	n := len(t.norms)
	if t.largest-t.largest != 0 {
		return engine.Errorf("quantise", engine.Invalid, "the codebook is not finite")
	}
	unit := float64(t.ch) / (1 << 24)
	gamma := unit / (1 - unit)
	for r := range out {
		x, p := z[r*t.ch:(r+1)*t.ch], products[r*n:(r+1)*n]
		size := math.Sqrt(dot(x, x))
		switch {
		case size-size != 0:
			return engine.Errorf("quantise", engine.Invalid, "latent position %d is not finite", first+r)
		case size == 0: // ‖0 − e‖² is ‖e‖², to the last bit
			out[r] = t.shortest
			continue
		}
		// The least upper bound of any code's score; codes whose lower bound is above
		// it are not the nearest. The constant covers products that are flushed to 0
		// and the few float64 roundings here.
		slack, tiny := 2*gamma*size*(1+1e-6), math.Ldexp(float64(t.ch), -120)
		most := math.Inf(1)
		if size*t.largest < 1e37 { // else F32 may overflow: compare with all
			for k, e := range t.norms {
				most = min(most, e-2*float64(p[k])+slack*t.sizes[k])
			}
			most += tiny + float64(t.ch)*1e-15*(size+t.largest)*(size+t.largest)
		}
		best := math.Inf(1)
		for k, e := range t.norms {
			if e-2*float64(p[k])-slack*t.sizes[k]-tiny > most {
				continue
			}
			if d := distance2(x, t.code(k)); d < best {
				best, out[r] = d, int32(k)
			}
		}
	}
	return nil
}

// dot is a·b in float64.
func dot(a, b []float32) float64 {
	s := 0.0
	for i, x := range a {
		s += float64(x) * float64(b[i])
	}
	return s
}

// distance2 is ‖a − b‖² in float64.
func distance2(a, b []float32) float64 {
	s := 0.0
	for i, x := range a {
		d := float64(x) - float64(b[i])
		s += d * d
	}
	return s
}
