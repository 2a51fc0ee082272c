package tokenizer

import (
	"math"

	"margo/engine"
)

// Conv is a convolution with bias, torch.nn.Conv2d of kernel 1 or 3.
type Conv struct {
	Weight *engine.Param `param:"weight"` // [out, in, k, k]
	Bias   *engine.Param `param:"bias"`   // [out]
}

func newConv(in, out, kernel int) *Conv {
	return &Conv{
		Weight: &engine.Param{Shape: []int{out, in, kernel, kernel}, Role: engine.Conv},
		Bias:   &engine.Param{Shape: []int{out}},
	}
}

// exact keeps the weight in F32 whatever the compute dtype.
func (v *Conv) exact() *Conv {
	v.Weight.F32 = true
	return v
}

func (v *Conv) in() int  { return v.Weight.Shape[1] }
func (v *Conv) out() int { return v.Weight.Shape[0] }

// conv is y = v(x) with the kernel centred, so y has x's height and width.
func (v *Conv) conv(x, y *engine.Tensor) engine.Conv2DArgs {
	k := v.Weight.Shape[2]
	return engine.Conv2DArgs{X: x, W: v.Weight.T, Packed: v.Weight.Pack, Bias: v.Bias.T, Y: y, Kernel: k, Stride: 1,
		PadTop: k / 2, PadLeft: k / 2, PadBottom: k / 2, PadRight: k / 2}
}

// gemm is y = v(x) for a kernel of 1: a GEMM over all pixels.
func (v *Conv) gemm(x, y *engine.Tensor) engine.GemmArgs {
	m := v.Weight.Matrix(v.Bias, false)
	return engine.GemmArgs{X: x, W: m.W, Packed: m.Packed, Bias: m.Bias, Y: y}
}

// forward is v(x) in a new tensor of dtype d.
func (v *Conv) forward(c *engine.Ctx, x *engine.Tensor, d engine.DType) *engine.Tensor {
	y := image(c, d, x, 1, 1, v.out())
	if c.Err() == nil {
		c.Conv2D(v.conv(x, y))
	}
	return y
}

// image takes an NHWC tensor with x's number of images, x's height and width
// times num/den, and ch channels.
func image(c *engine.Ctx, d engine.DType, x *engine.Tensor, num, den, ch int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	return c.New(d, x.Shape[0], x.Shape[1]*num/den, x.Shape[2]*num/den, ch)
}

// operand is x in the compute dtype: a convolution reads each pixel up to nine
// times, so it is converted once before.
func operand(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	if c.Err() != nil || x.DType == c.Compute {
		return x
	}
	y := c.New(c.Compute, x.Shape...)
	c.Cast(engine.CastArgs{X: x, Y: y, Scale: 1})
	return y
}

// GroupNorm is torch.nn.GroupNorm(32, ch, eps=1e-6): vae.py Normalize.
type GroupNorm struct {
	Weight *engine.Param `param:"weight"`
	Bias   *engine.Param `param:"bias"`
}

const (
	normGroups = 32
	normEps    = 1e-6
)

func newGroupNorm(ch int) GroupNorm {
	return GroupNorm{&engine.Param{Shape: []int{ch}}, &engine.Param{Shape: []int{ch}}}
}

// forward is act(GN(x)) in a new tensor of the compute dtype.
func (g GroupNorm) forward(c *engine.Ctx, x *engine.Tensor, act engine.Activation) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	y := c.New(c.Compute, x.Shape...)
	c.GroupNorm(engine.GroupNormArgs{X: x, Y: y, Weight: g.Weight.T, Bias: g.Bias.T, Groups: normGroups, Eps: normEps, Act: act})
	return y
}

// ResBlock is the residual block (vae.py ResnetBlock without time embedding):
//
//	skip(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x))))))
//
// skip is a 1×1 convolution where the number of channels changes.
type ResBlock struct {
	Norm1    GroupNorm `param:"norm1"`
	Conv1    *Conv     `param:"conv1"`
	Norm2    GroupNorm `param:"norm2"`
	Conv2    *Conv     `param:"conv2"`
	Shortcut *Conv     `param:"nin_shortcut"`
}

func newResBlock(in, out int) *ResBlock {
	b := &ResBlock{Norm1: newGroupNorm(in), Conv1: newConv(in, out, 3), Norm2: newGroupNorm(out), Conv2: newConv(out, out, 3)}
	if in != out {
		b.Shortcut = newConv(in, out, 1)
	}
	return b
}

// Forward turns x [N,H,W,in] F32 into [N,H,W,out] F32: in place, or with a
// shortcut in a new tensor.
func (b *ResBlock) Forward(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	out := x
	if b.Shortcut != nil {
		out = image(c, engine.F32, x, 1, 1, b.Shortcut.out())
	}
	c.Scoped(func() {
		h := image(c, c.Compute, x, 1, 1, b.Conv1.out())
		c.Scoped(func() {
			if a := b.Norm1.forward(c, x, engine.SiLU); c.Err() == nil {
				c.Conv2D(b.Conv1.conv(a, h))
			}
		})
		if b.Shortcut != nil && c.Err() == nil {
			c.Gemm(b.Shortcut.gemm(x, out))
		}
		if a := b.Norm2.forward(c, h, engine.SiLU); c.Err() == nil {
			args := b.Conv2.conv(a, out)
			args.Residual = out
			c.Conv2D(args)
		}
	})
	return out
}

// AttnBlock is self-attention with one head over all pixels of an image
// (vae.py AttnBlock): x + proj(softmax(q·kᵀ/√C)·v), q, k, v of GN(x). The three
// 1×1 convolutions run as one GEMM.
type AttnBlock struct {
	Norm GroupNorm `param:"norm"`
	Q    *Conv     `param:"q"`
	K    *Conv     `param:"k"`
	V    *Conv     `param:"v"`
	Proj *Conv     `param:"proj_out"`

	qkv *Conv // Q, K and V stacked
}

// maxHeadDim is the widest head of engine.AttentionArgs.
const maxHeadDim = 512

func newAttnBlock(ch int) (*AttnBlock, error) {
	if ch > maxHeadDim {
		return nil, engine.Errorf("KL tokenizer", engine.Unsupported, "attention over %d channels; at most %d", ch, maxHeadDim)
	}
	b := &AttnBlock{Norm: newGroupNorm(ch), Q: newConv(ch, ch, 1), K: newConv(ch, ch, 1), V: newConv(ch, ch, 1), Proj: newConv(ch, ch, 1)}
	w, err := engine.NewStack(b.Q.Weight, b.K.Weight, b.V.Weight)
	if err != nil {
		return nil, err
	}
	bias, err := engine.NewStack(b.Q.Bias, b.K.Bias, b.V.Bias)
	if err != nil {
		return nil, err
	}
	b.qkv = &Conv{Weight: w, Bias: bias}
	return b, nil
}

// Forward adds the attention to x [N,H,W,C] F32, in place.
func (b *AttnBlock) Forward(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	c.Scoped(func() {
		ch, tokens := x.Cols(), x.Shape[1]*x.Shape[2]
		qkv, o := c.New(c.Compute, x.Rows(), 3*ch), c.New(c.Compute, x.Rows(), ch)
		c.Scoped(func() {
			if a := b.Norm.forward(c, x, engine.Identity); c.Err() == nil {
				c.Gemm(b.qkv.gemm(a, qkv))
			}
		})
		host := make([]int32, x.Shape[0]+1)
		for i := range host {
			host[i] = int32(i * tokens)
		}
		off := c.I32(host)
		c.Attention(engine.AttentionArgs{Q: qkv.Slice(0, ch), K: qkv.Slice(ch, 2*ch), V: qkv.Slice(2*ch, 3*ch), O: o,
			Heads: 1, Scale: float32(1 / math.Sqrt(float64(ch))), QOff: off, KOff: off, QOffHost: host, KOffHost: host})
		args := b.Proj.gemm(o, x)
		args.Residual = x
		c.Gemm(args)
	})
	return x
}
