package nn

import (
	"math"

	"margo/engine"
)

// Spans says where the sequences of a ragged batch begin: sequence s owns rows
// Host[s] … Host[s+1]-1. Off holds the same numbers on the device.
type Spans struct {
	Off  *engine.Tensor // I32 [S+1]
	Host []int32
}

// Rows is the number of rows of all sequences.
func (s Spans) Rows() int { return int(s.Host[len(s.Host)-1]) }

// Attn is multi-head self-attention; qkv [3D, D] stacks queries, keys and
// values, each with head h in columns h·D/H … (h+1)·D/H-1
// (timm vision_transformer.py Attention).
type Attn struct {
	QKV   Linear `param:"qkv"`
	Proj  Linear `param:"proj"`
	Heads int
}

// MLP is fc2(GELU(fc1(x))), with the exact GELU (timm Mlp).
type MLP struct {
	Fc1 Linear `param:"fc1"`
	Fc2 Linear `param:"fc2"`
}

// Block is the pre-norm Transformer block of MAR's encoder and decoder:
//
//	x ← x + proj(attn(LN₁(x))), x ← x + fc2(GELU(fc1(LN₂(x))))
//
// (timm vision_transformer.py Block with qkv_bias.)
type Block struct {
	Norm1 LayerNorm `param:"norm1"`
	Attn  Attn      `param:"attn"`
	Norm2 LayerNorm `param:"norm2"`
	MLP   MLP       `param:"mlp"`
}

// NewBlock describes a block of width dim with a hidden layer of dim·ratio.
func NewBlock(dim, heads int, ratio, eps float64) *Block {
	hidden := int(float64(dim) * ratio)
	return &Block{
		Norm1: NewLayerNorm(dim, eps),
		Attn:  Attn{NewLinear(dim, 3*dim), NewLinear(dim, dim), heads},
		Norm2: NewLayerNorm(dim, eps),
		MLP:   MLP{NewLinear(dim, hidden), NewLinear(hidden, dim)},
	}
}

// Fixed names rows of x that are the same at every call, whose queries, keys and
// values are therefore computed once (see QKV).
type Fixed struct {
	Table    *engine.Tensor // [·, 3D] in the compute dtype
	To, From *engine.Tensor // I32: rows of x, and the row of Table of each
	Others   *engine.Tensor // I32: the remaining rows of x
}

// QKV computes queries, keys and values of the rows of x [M, D]: [M, 3D].
func (b *Block) QKV(c *engine.Ctx, x *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	y := c.New(c.Compute, x.Rows(), b.Attn.QKV.Out())
	c.Scoped(func() {
		c.Gemm(b.Attn.QKV.Args(b.Norm1.Forward(c, x, c.Compute), y))
	})
	return y
}

// Forward runs the block over the sequences of x [M, D] F32 and returns the new
// residual stream, which takes x's place.
func (b *Block) Forward(c *engine.Ctx, x *engine.Tensor, s Spans) *engine.Tensor {
	return b.ForwardFixed(c, x, s, nil)
}

// ForwardFixed is Forward with less work for the rows that f names, if not nil;
// it changes no bit of the result.
func (b *Block) ForwardFixed(c *engine.Ctx, x *engine.Tensor, s Spans, f *Fixed) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	m, d := x.Rows(), x.Cols()
	c.Scoped(func() {
		var qkv *engine.Tensor
		if f == nil {
			qkv = b.QKV(c, x)
		} else {
			qkv = c.New(c.Compute, m, 3*d)
			c.Scoped(func() {
				own := b.QKV(c, Gather(c, x, f.Others))
				c.Rows(engine.RowsArgs{Y: qkv, A: own, IY: f.Others, Count: f.Others.Elems()})
				c.Rows(engine.RowsArgs{Y: qkv, A: f.Table, IA: f.From, IY: f.To, Count: f.To.Elems()})
			})
		}
		o := c.New(c.Compute, m, d)
		b.attend(c, qkv.Slice(0, d), qkv.Slice(d, 2*d), qkv.Slice(2*d, 3*d), o, s, s)
		proj := b.Attn.Proj.Args(o, x)
		proj.Residual = x
		c.Gemm(proj)
	})
	b.mlp(c, x, m)
	return x
}

// ForwardRows is Forward for the rows listed in q only, the others being needed
// as keys and values alone: ids I32 [n] are rows of x, sequence by sequence as
// qs says. It returns the new residual stream [n, D] of those rows; x is left as
// it is.
func (b *Block) ForwardRows(c *engine.Ctx, x *engine.Tensor, s Spans, ids *engine.Tensor, qs Spans) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	m, d, n := x.Rows(), x.Cols(), qs.Rows()
	y := Gather(c, x, ids)
	c.Scoped(func() {
		h := b.Norm1.Forward(c, x, c.Compute)
		kv := c.New(c.Compute, m, 2*d)
		a := b.Attn.QKV.Args(h, kv)
		a.N0 = d // columns of keys and values
		c.Gemm(a)
		hq := Gather(c, h, ids)
		q := c.New(c.Compute, n, d)
		c.Gemm(b.Attn.QKV.Args(hq, q))
		b.attend(c, q, kv.Slice(0, d), kv.Slice(d, 2*d), hq, qs, s)
		proj := b.Attn.Proj.Args(hq, y)
		proj.Residual = y
		c.Gemm(proj)
	})
	b.mlp(c, y, n)
	return y
}

func (b *Block) attend(c *engine.Ctx, q, k, v, o *engine.Tensor, qs, ks Spans) {
	if c.Err() == nil {
		c.Attention(b.attention(q, k, v, o, qs, ks))
	}
}

func (b *Block) attention(q, k, v, o *engine.Tensor, qs, ks Spans) engine.AttentionArgs {
	return engine.AttentionArgs{Q: q, K: k, V: v, O: o, Heads: b.Attn.Heads,
		Scale: float32(1 / math.Sqrt(float64(o.Cols()/b.Attn.Heads))),
		QOff:  qs.Off, KOff: ks.Off, QOffHost: qs.Host, KOffHost: ks.Host}
}

// mlpRows bounds the rows whose hidden layer exists at once: rows are
// independent, so pieces give the same result and keep activations small.
const mlpRows = 4096

// mlp adds the second half of the block to x [m, D].
func (b *Block) mlp(c *engine.Ctx, x *engine.Tensor, m int) {
	for r := 0; r < m; r += mlpRows {
		part := x.RowsAt(r, min(r+mlpRows, m))
		c.Scoped(func() {
			h := b.Norm2.Forward(c, part, c.Compute)
			if c.Err() != nil {
				return
			}
			f := c.New(c.Compute, part.Rows(), b.MLP.Fc1.Out())
			a := b.MLP.Fc1.Args(h, f)
			a.Act = engine.GELUErf
			c.Gemm(a)
			a = b.MLP.Fc2.Args(f, part)
			a.Residual = part
			c.Gemm(a)
		})
	}
}
