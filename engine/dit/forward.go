package dit

import (
	"math"

	"margo/engine"
	"margo/engine/nn"
)

// Time embeds timesteps [T]: [T, D] F32 (models.py TimestepEmbedder).
func (m *Model) Time(c *engine.Ctx, t []float32) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n, d := len(t), m.Config.HiddenSize
	y := c.New(engine.F32, n, d)
	c.Scoped(func() {
		e := c.New(engine.F32, n, frequencyDim)
		c.TimestepEmbedding(engine.TimestepEmbeddingArgs{T: c.F32(t, n), Y: e, MaxPeriod: maxTimePeriod})
		f := c.New(engine.F32, n, d)
		a := m.Time1.Args(e, f)
		a.Act = engine.SiLU
		c.Gemm(a)
		c.Gemm(m.Time2.Args(f, y))
	})
	return y
}

// Modulations of every pair (times[i], classes[i]) of rows of Time's result and
// classes; -1 is no class. [n, (6·depth+2)·D] F32: shift, scale and gate of both
// halves of every block, then shift and scale of the final layer.
func (m *Model) Modulations(c *engine.Ctx, time *engine.Tensor, times, classes []int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	ia, ib := make([]int32, len(times)), make([]int32, len(times))
	for i, k := range classes {
		if k < -1 || k >= m.Config.NumClasses {
			c.Fail(engine.Errorf("class embedding", engine.Invalid, "class %d; the model has 0 to %d", k, m.Config.NumClasses-1))
			return nil
		}
		if k < 0 {
			k = m.Config.NumClasses
		}
		ia[i], ib[i] = int32(times[i]), int32(k)
	}
	return m.modulate(c, engine.RowsArgs{A: time, IA: c.I32(ia), B: m.Table.T, IB: c.I32(ib), Count: len(ia)})
}

// Modulate is Modulations of conditions cond [n, D] F32, the sums of both embeddings.
func (m *Model) Modulate(c *engine.Ctx, cond *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	return m.modulate(c, engine.RowsArgs{A: cond, Count: cond.Rows()})
}

func (m *Model) modulate(c *engine.Ctx, sum engine.RowsArgs) *engine.Tensor {
	mods := c.New(engine.F32, sum.Count, m.adaW.Shape[0])
	c.Scoped(func() {
		sum.Y, sum.Act = c.New(c.Compute, sum.Count, m.Config.HiddenSize), engine.SiLU
		c.Rows(sum)
		c.Gemm(nn.Gemm(m.adaW.Matrix(m.adaB, false), sum.Y, mods))
	})
	return mods
}

// ModulationBytes is the size of one row of Modulations.
func (m *Model) ModulationBytes() int { return 4 * m.adaW.Shape[0] }

// Embed makes the transformer's input [S·L, D] F32 of images' tokens x [n·L, C·p²]
// F32: linear(x) + position. Sequence s sees image s mod n, so that with S = 2n both
// halves of a guided pair share the embedding.
func (m *Model) Embed(c *engine.Ctx, x *engine.Tensor, sequences int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	l, n, rows := m.Config.Tokens(), x.Rows(), sequences*m.Config.Tokens()
	s := c.New(engine.F32, rows, m.Config.HiddenSize)
	c.Scoped(func() {
		e := m.Patch.Forward(c, x, engine.F32)
		ia, ib := make([]int32, rows), make([]int32, rows)
		for r := range ia {
			ia[r], ib[r] = int32(r%max(n, 1)), int32(r%l)
		}
		c.Rows(engine.RowsArgs{Y: s, A: e, IA: c.I32(ia), B: m.Pos.T.Reshape(l, m.Config.HiddenSize), IB: c.I32(ib), Count: rows})
	})
	return s
}

// Spans are n sequences of the model's length.
func (m *Model) Spans(c *engine.Ctx, n int) nn.Spans {
	host := make([]int32, n+1)
	for i := range host {
		host[i] = int32(i * m.Config.Tokens())
	}
	return nn.Spans{Off: c.I32(host), Host: host}
}

// mlpRows bounds the rows whose hidden layer exists at once, as in package nn; pieces
// are whole sequences, for the gates.
const mlpRows = 4096

// Block runs block i over x [S·L, D] F32, which becomes the result; mods has a row of
// Modulations for each sequence.
func (m *Model) Block(c *engine.Ctx, i int, x, mods *engine.Tensor, s nn.Spans) {
	if c.Poll() {
		return
	}
	b, l, d := m.Layers[i], m.Config.Tokens(), m.Config.HiddenSize
	mod := func(k int) *engine.Tensor { return mods.Slice((6*i+k)*d, (6*i+k+1)*d) }
	c.Scoped(func() {
		h := c.New(c.Compute, x.Rows(), d)
		c.Norm(engine.NormArgs{X: x, Y: h, Shift: mod(0), Scale: mod(1), ModRows: l, Eps: normEps})
		qkv := c.New(c.Compute, x.Rows(), 3*d)
		c.Gemm(b.Attn.QKV.Args(h, qkv))
		if c.Err() != nil {
			return
		}
		c.Attention(engine.AttentionArgs{Q: qkv.Slice(0, d), K: qkv.Slice(d, 2*d), V: qkv.Slice(2*d, 3*d), O: h, Heads: b.Attn.Heads,
			Scale: float32(1 / math.Sqrt(float64(d/b.Attn.Heads))), QOff: s.Off, KOff: s.Off, QOffHost: s.Host, KOffHost: s.Host})
		a := b.Attn.Proj.Args(h, x)
		a.Gate, a.GateRows, a.Residual = mod(2), l, x
		c.Gemm(a)
	})
	step := max(1, mlpRows/l)
	for from := 0; from < x.Rows()/l; from += step {
		to := min(from+step, x.Rows()/l)
		part := x.RowsAt(from*l, to*l)
		mod := func(k int) *engine.Tensor { return mods.RowsAt(from, to).Slice((6*i+k)*d, (6*i+k+1)*d) }
		c.Scoped(func() {
			h, f := c.New(c.Compute, part.Rows(), d), c.New(c.Compute, part.Rows(), b.MLP.Fc1.Out())
			c.Norm(engine.NormArgs{X: part, Y: h, Shift: mod(3), Scale: mod(4), ModRows: l, Eps: normEps})
			a := b.MLP.Fc1.Args(h, f)
			a.Act = engine.GELUTanh
			c.Gemm(a)
			a = b.MLP.Fc2.Args(f, part)
			a.Gate, a.GateRows, a.Residual = mod(5), l, part
			c.Gemm(a)
		})
	}
}

// Output runs blocks and final layer over x [S·L, D], whose memory it uses, into out
// [S·L, 2·C·p²] F32, columns as FinalOrder says.
func (m *Model) Output(c *engine.Ctx, x, mods, out *engine.Tensor) {
	if c.Err() != nil || x.Rows() == 0 {
		return
	}
	l, d := m.Config.Tokens(), m.Config.HiddenSize
	c.Scoped(func() {
		s := m.Spans(c, x.Rows()/l)
		for i := range m.Layers {
			m.Block(c, i, x, mods, s)
		}
		if c.Err() != nil {
			return
		}
		k := 6 * len(m.Layers) * d
		v := c.New(engine.F32, x.Rows(), d)
		c.Norm(engine.NormArgs{X: x, Y: v, Shift: mods.Slice(k, k+d), Scale: mods.Slice(k+d, k+2*d), ModRows: l, Eps: normEps})
		c.Gemm(m.Final.Linear.Args(v, out))
	})
}

// Forward is the network: tokens x [S·L, C·p²] F32 with a row of Modulations for each
// of the S sequences give [S·L, 2·C·p²] F32 (models.py DiT.forward).
func (m *Model) Forward(c *engine.Ctx, x, mods *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	out := c.New(engine.F32, x.Rows(), 2*m.Config.TokenDim())
	c.Scoped(func() { m.Output(c, m.Embed(c, x, x.Rows()/m.Config.Tokens()), mods, out) })
	return out
}

// Step is one reverse step of n images' tokens: x [n·L, C·p²] F32, in place. out is the
// network's output of n sequences, or of 2n with guidance, the second half without a
// class. scale [n·L] guides the channels of GuidedChannels, or all of them; nil: no
// guidance. noise [n·L, C·p²] is not read if k.Last.
func (m *Model) Step(c *engine.Ctx, x, out, noise, scale *engine.Tensor, all bool, k engine.StepCoef, temperature float32) {
	if c.Err() != nil {
		return
	}
	for i, g := range Groups(&m.Config) {
		w := g.To - g.From
		a := engine.DiffusionStepArgs{X: x.Slice(g.From, g.To), Y: x.Slice(g.From, g.To), Out: out.Slice(g.Out, g.Out+2*w),
			Guidance: scale, Coef: k, Temperature: temperature}
		if !k.Last {
			a.Noise = noise.Slice(g.From, g.To)
		}
		if scale != nil && i > 0 && !all {
			a.Guidance, a.Out = nil, a.Out.RowsAt(0, x.Rows())
		}
		c.DiffusionStep(a)
	}
}
