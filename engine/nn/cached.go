package nn

import "margo/engine"

// Paging says where the keys and values of causal sequences lie (engine.
// AttentionArgs.Blocks) and where those of new rows go.
type Paging struct {
	KV        *engine.Tensor // [·, 2D] in the compute dtype: keys, values
	Rows      *engine.Tensor // I32 [M]: row of KV of each new row
	Keys      Spans          // sums of the sequences' lengths, the new rows counted
	Blocks    *engine.Tensor // I32 [S, ·], or nil: the device has no paged attention
	BlockSize int
	All       *engine.Tensor // without Blocks: I32 [Keys.Rows()], row of KV of every key
}

// ForwardCached is Forward with causal attention for the rows x [M, D] F32 that
// are appended to sequences, as s says: their keys and values go into the cache,
// and each sees the rows of its sequence up to itself.
func (b *Block) ForwardCached(c *engine.Ctx, x *engine.Tensor, s Spans, p *Paging) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	m, d := x.Rows(), x.Cols()
	c.Scoped(func() {
		qkv := b.QKV(c, x)
		if c.Err() != nil {
			return
		}
		c.Rows(engine.RowsArgs{Y: p.KV, A: qkv.Slice(d, 3*d), IY: p.Rows, Count: m})
		kv := p.KV
		if p.Blocks == nil {
			kv = Gather(c, p.KV, p.All)
		}
		o := c.New(c.Compute, m, d)
		if c.Err() != nil {
			return
		}
		a := b.attention(qkv.Slice(0, d), kv.Slice(0, d), kv.Slice(d, 2*d), o, s, p.Keys)
		a.Causal, a.Blocks, a.BlockSize = true, p.Blocks, p.BlockSize
		c.Attention(a)
		proj := b.Attn.Proj.Args(o, x)
		proj.Residual = x
		c.Gemm(proj)
	})
	b.mlp(c, x, m)
	return x
}
