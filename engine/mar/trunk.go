package mar

import (
	"margo/engine"
	"margo/engine/nn"
)

// ClassRows makes the class table [n, De]: row i is the embedding of classes[i],
// or of "no class" (FakeLatent) for -1.
func (m *Model) ClassRows(c *engine.Ctx, classes []int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	ia, ib := make([]int32, len(classes)), make([]int32, len(classes))
	for i, k := range classes {
		if k < -1 || k >= m.Config.ClassNum {
			c.Fail(engine.Errorf("class embedding", engine.Invalid, "class %d; the model has 0 to %d", k, m.Config.ClassNum-1))
			return nil
		}
		ia[i], ib[i] = int32(k), -1 // a negative index adds nothing
		if k < 0 {
			ib[i] = 0
		}
	}
	y := c.New(engine.F32, len(classes), m.Config.EncoderEmbedDim)
	c.Scoped(func() {
		c.Rows(engine.RowsArgs{Y: y, A: m.ClassEmb.Weight.T, IA: c.I32(ia), B: m.FakeLatent.T, IB: c.I32(ib), Count: len(classes)})
	})
	return y
}

// EmbedBuffer makes the encoder's input rows of the buffer tokens of each class
// row [n, De]: [n·B, De], LN(class + position).
func (m *Model) EmbedBuffer(c *engine.Ctx, class *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	b, n := m.Config.BufferSize, class.Rows()
	ia, ib := make([]int32, n*b), make([]int32, n*b)
	for i := range ia {
		ia[i], ib[i] = int32(i/b), int32(i%b)
	}
	y := c.New(engine.F32, n*b, m.Config.EncoderEmbedDim)
	c.Scoped(func() {
		x := c.New(engine.F32, n*b, m.Config.EncoderEmbedDim)
		c.Rows(engine.RowsArgs{Y: x, A: class, IA: c.I32(ia), B: m.inputPos().T, IB: c.I32(ib), Count: n * b})
		c.Norm(m.ZProjLN.Args(x, y))
	})
	return y
}

// EmbedTokens makes the encoder's input rows of tokens [n, C] F32, or of codes
// I32 [n], at positions pos: [n, De], LN(z_proj(token) + position).
func (m *Model) EmbedTokens(c *engine.Ctx, tokens *engine.Tensor, pos []int32) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	ib := make([]int32, len(pos))
	for i, p := range pos {
		ib[i] = int32(m.Config.BufferSize) + p
	}
	y := c.New(engine.F32, len(pos), m.Config.EncoderEmbedDim)
	c.Scoped(func() {
		x := c.New(engine.F32, len(pos), m.Config.EncoderEmbedDim)
		a := engine.RowsArgs{Y: x, B: m.inputPos().T, IB: c.I32(ib), Count: len(pos)}
		if m.TokenEmb != nil {
			a.A, a.IA = m.TokenEmb.Weight.T, tokens
		} else {
			a.A = m.ZProj.Forward(c, tokens, engine.F32)
		}
		c.Rows(a)
		c.Norm(m.ZProjLN.Args(x, y))
	})
	return y
}

// EncoderInput gathers the encoder's rows of l from the buffer table (of
// EmbedBuffer) and the token table (rows of EmbedTokens; those of tokens that no
// sequence sees are not read): [M, De] F32.
func (m *Model) EncoderInput(c *engine.Ctx, buffers, tokens *engine.Tensor, l *Layout) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	x := c.New(engine.F32, l.Encoder.Rows(), m.Config.EncoderEmbedDim)
	c.Rows(engine.RowsArgs{Y: x, A: buffers, IA: l.encBuf, IY: l.encBufTo, Count: l.nBuf})
	if l.nTok > 0 {
		c.Rows(engine.RowsArgs{Y: x, A: tokens, IA: l.encTok, IY: l.encTokTo, Count: l.nTok})
	}
	return x
}

// Encode runs the encoder over x [M, De], whose memory it uses, and returns
// [M, De] in the compute dtype: per sequence the buffer, then the visible tokens
// (mar.py forward_mae_encoder).
func (m *Model) Encode(c *engine.Ctx, x *engine.Tensor, l *Layout) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	for _, b := range m.Encoder {
		x = b.Forward(c, x, l.Encoder)
	}
	return m.EncoderOut.Forward(c, x, c.Compute)
}

// DecoderInput puts the encoder's rows where they belong, mask tokens elsewhere,
// and adds the decoder's positions: [S·(B+L), Dd] F32.
func (m *Model) DecoderInput(c *engine.Ctx, enc *engine.Tensor, l *Layout) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	x := c.New(engine.F32, l.Decoder.Rows(), m.Config.DecoderEmbedDim)
	c.Scoped(func() {
		e := m.DecoderIn.Forward(c, enc, engine.F32)
		c.Rows(engine.RowsArgs{Y: x, A: e, B: m.DecoderPos.T, IB: l.decKnown, IY: l.decKnownTo, Count: l.nBuf + l.nTok})
		c.Rows(engine.RowsArgs{Y: x, A: m.MaskToken.T, IA: l.zeros, B: m.DecoderPos.T, IB: l.decMask, IY: l.decMaskTo, Count: l.nMask})
	})
	return x
}

// MaskQKV computes queries, keys and values of the first decoder block for a mask
// token at every position: [B+L, 3·Dd]. They depend on nothing but the model, so
// a batch computes them once.
func (m *Model) MaskQKV(c *engine.Ctx) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n, d := m.Config.BufferSize+m.Config.Tokens(), m.Config.DecoderEmbedDim
	x := c.New(engine.F32, n, d)
	c.Rows(engine.RowsArgs{Y: x, A: m.MaskToken.T, IA: c.I32(make([]int32, n)), B: m.DecoderPos.T, Count: n})
	return m.Decoder[0].QKV(c, x)
}

// Decode runs the decoder over x [S·(B+L), Dd], whose memory it uses, and returns
// z of the wanted positions, sequence by sequence: [n, Dd] F32
// (mar.py forward_mae_decoder). The last block, the norm and the head's positions
// are computed for these rows only.
func (m *Model) Decode(c *engine.Ctx, x *engine.Tensor, l *Layout) *engine.Tensor {
	return m.DecodeMasked(c, x, l, nil)
}

// DecodeMasked is Decode with the result of MaskQKV, which spares the masked
// tokens' share of the first block's largest layer and changes no bit.
func (m *Model) DecodeMasked(c *engine.Ctx, x *engine.Tensor, l *Layout, maskQKV *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	last := len(m.Decoder) - 1
	z := c.New(engine.F32, l.nOut, m.Config.DecoderEmbedDim)
	c.Scoped(func() {
		var f *nn.Fixed
		if maskQKV != nil {
			f = &nn.Fixed{Table: maskQKV, To: l.decMaskTo, From: l.decMask, Others: l.decKnownTo}
		}
		for _, b := range m.Decoder[:last] {
			x = b.ForwardFixed(c, x, l.Decoder, f)
			f = nil // of the first block only
		}
		y := m.Decoder[last].ForwardRows(c, x, l.Decoder, l.outRow, l.Out)
		y = m.DecoderOut.Forward(c, y, engine.F32)
		c.Rows(engine.RowsArgs{Y: z, A: y, B: m.HeadPos.T, IB: l.outPos, Count: l.nOut})
	})
	return z
}
