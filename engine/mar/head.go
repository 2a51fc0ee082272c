package mar

import (
	"margo/engine"
	"margo/engine/nn"
)

const (
	headEps       = 1e-6  // of the head's norms; fixed in the authors' code
	frequencyDim  = 256   // of the sinusoidal timestep embedding
	maxTimePeriod = 10000 // slowest frequency of it
)

// Head is the denoising network ε_θ(x, t, z) of the Diffusion Loss: residual
// MLP blocks of width W with AdaLN (P17, P18; diffloss.py SimpleMLPAdaLN). Its
// first and last layers and the embeddings of t and z stay F32 in every compute
// dtype; the blocks and the AdaLN stack have an F32 copy for exact steps.
type Head struct {
	TimeEmbed TimeEmbed  `param:"time_embed"`
	CondEmbed nn.Linear  `param:"cond_embed"` // Dd → W
	InputProj nn.Linear  `param:"input_proj"` // C → W
	Blocks    []ResBlock `param:"res_blocks"`
	Final     FinalLayer `param:"final_layer"`

	Channels, Width int

	adaW, adaB *engine.Param // all AdaLN layers, stacked: [(3d+2)W, W]
}

// TimeEmbed is the MLP over the sinusoidal embedding of t.
type TimeEmbed struct {
	Fc1 nn.Linear `param:"mlp.0"` // 256 → W
	Fc2 nn.Linear `param:"mlp.2"` // W → W
}

// ResBlock is x + gate ⊙ fc2(SiLU(fc1(LN(x)·(1+scale) + shift))) with shift,
// scale, gate = Ada(SiLU(y)), y = time + condition.
type ResBlock struct {
	Norm nn.LayerNorm `param:"in_ln"`
	Fc1  nn.Linear    `param:"mlp.0"`
	Fc2  nn.Linear    `param:"mlp.2"`
	Ada  nn.Linear    `param:"adaLN_modulation.1"` // W → 3W: shift, scale, gate
}

// FinalLayer is linear(LN(x)·(1+scale) + shift), LN without parameters.
type FinalLayer struct {
	Linear nn.Linear `param:"linear"`             // W → 2C: ε, v
	Ada    nn.Linear `param:"adaLN_modulation.1"` // W → 2W: shift, scale
}

// NewHead describes a head for tokens of channels columns, conditions of cond
// columns, depth blocks of width columns.
func NewHead(channels, cond, width, depth int) (*Head, error) {
	exact := func(l nn.Linear) nn.Linear { l.Weight.Exact = true; return l }
	h := &Head{
		TimeEmbed: TimeEmbed{nn.NewLinear(frequencyDim, width).InF32(), nn.NewLinear(width, width).InF32()},
		CondEmbed: nn.NewLinear(cond, width).InF32(),
		InputProj: nn.NewLinear(channels, width).InF32(),
		Final:     FinalLayer{nn.NewLinear(width, 2*channels).InF32(), exact(nn.NewLinear(width, 2*width))},
		Channels:  channels, Width: width,
	}
	var w, b []*engine.Param
	for range depth {
		r := ResBlock{nn.NewLayerNorm(width, headEps), exact(nn.NewLinear(width, width)),
			exact(nn.NewLinear(width, width)), exact(nn.NewLinear(width, 3*width))}
		h.Blocks = append(h.Blocks, r)
		w, b = append(w, r.Ada.Weight), append(b, r.Ada.Bias)
	}
	w, b = append(w, h.Final.Ada.Weight), append(b, h.Final.Ada.Bias)
	var err error
	if h.adaW, err = engine.NewStack(w...); err != nil {
		return nil, err
	}
	h.adaB, err = engine.NewStack(b...)
	return h, err
}

// FP8 makes the loader round the weights of the residual blocks' linears, the serial part of a step, to FP8
// (engine.Param.FP8). AdaLN layers, which are one large product for all steps, and what is F32 stay as they are.
func (h *Head) FP8() {
	for _, b := range h.Blocks {
		b.Fc1.Weight.FP8, b.Fc2.Weight.FP8 = true, true
	}
}

// Weights collects the head's weights for HeadSteps; exact picks the F32 copies.
func (h *Head) Weights(exact bool) *engine.HeadWeights {
	w := &engine.HeadWeights{
		Input: h.InputProj.Matrix(false),
		Ada:   h.adaW.Matrix(h.adaB, exact),
		Final: h.Final.Linear.Matrix(false),
		Eps:   headEps,
	}
	for _, b := range h.Blocks {
		w.Blocks = append(w.Blocks, engine.HeadBlock{
			NormWeight: b.Norm.Weight.T, NormBias: b.Norm.Bias.T,
			Fc1: b.Fc1.Matrix(exact), Fc2: b.Fc2.Matrix(exact)})
	}
	return w
}

// Time embeds timesteps t [T] F32: [T, W] F32. They are known before sampling
// starts, so one table serves a whole run.
func (h *Head) Time(c *engine.Ctx, t *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n := t.Elems()
	y := c.New(engine.F32, n, h.Width)
	c.Scoped(func() {
		e := c.New(engine.F32, n, frequencyDim)
		c.TimestepEmbedding(engine.TimestepEmbeddingArgs{T: t, Y: e, MaxPeriod: maxTimePeriod})
		f := c.New(engine.F32, n, h.Width)
		a := h.TimeEmbed.Fc1.Args(e, f)
		a.Act = engine.SiLU
		c.Gemm(a)
		c.Gemm(h.TimeEmbed.Fc2.Args(f, y))
	})
	return y
}

// Cond embeds conditions z [R, Dd]: [R, W] F32. It doesn't depend on the
// timestep: once per token.
func (h *Head) Cond(c *engine.Ctx, z *engine.Tensor) *engine.Tensor {
	return h.CondEmbed.Forward(c, z, engine.F32)
}

// Denoise is the network: tokens x [R, C] F32, a timestep for each row t [R] F32
// and conditions z [R, Dd] give ε and v side by side, [R, 2C] F32
// (SimpleMLPAdaLN.forward). exact computes in F32 whatever the compute dtype.
func (h *Head) Denoise(c *engine.Ctx, x, t, z *engine.Tensor, exact bool) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	out := c.New(engine.F32, x.Rows(), 2*h.Channels)
	c.Scoped(func() {
		h.net(c, headPass{w: h.Weights(exact), x: x, time: h.Time(c, t), cond: h.Cond(c, z), out: out, exact: exact})
	})
	return out
}

// DenoiseCFG is Denoise for n tokens x with conditions z [2n, Dd], the second
// half unconditional, both halves seeing the same x; ε of both becomes
// ε_u + scale·(ε_c − ε_u), v stays (SimpleMLPAdaLN.forward_with_cfg, P53). t has
// 2n timesteps.
func (h *Head) DenoiseCFG(c *engine.Ctx, x, t, z *engine.Tensor, scale float32, exact bool) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n, ch := x.Rows(), h.Channels
	out := c.New(engine.F32, 2*n, 2*ch)
	c.Scoped(func() {
		h.net(c, headPass{w: h.Weights(exact), x: x, time: h.Time(c, t), cond: h.Cond(c, z), out: out, exact: exact})
		if c.Err() != nil {
			return
		}
		cond, uncond := out.RowsAt(0, n).Slice(0, ch), out.RowsAt(n, 2*n).Slice(0, ch)
		neg, diff, eps := c.New(engine.F32, n, ch), c.New(engine.F32, n, ch), c.New(engine.F32, n, ch)
		gate := make([]float32, ch)
		for i := range gate {
			gate[i] = scale
		}
		c.Cast(engine.CastArgs{X: uncond, Y: neg, Scale: -1})
		c.GatedAdd(engine.GatedAddArgs{X: cond, H: neg, Y: diff})
		c.GatedAdd(engine.GatedAddArgs{X: uncond, H: diff, Gate: c.F32(gate, 1, ch), GateRows: max(n, 1), Y: eps})
		c.Cast(engine.CastArgs{X: eps, Y: cond, Scale: 1})
		c.Cast(engine.CastArgs{X: eps, Y: uncond, Scale: 1})
	})
	return out
}

// headPass is one evaluation of the network. x has n rows, cond and out R = n or
// 2n; row r of cond meets row r mod n of x and row r of time, or row step of it
// for all if oneTime is set.
type headPass struct {
	w                  *engine.HeadWeights
	x, time, cond, out *engine.Tensor
	oneTime            bool
	step               int
	exact              bool
}

// net evaluates the network by single ops: the definition of a step of
// HeadSteps.
func (h *Head) net(c *engine.Ctx, p headPass) {
	if c.Err() != nil {
		return
	}
	n, r, w := p.x.Rows(), p.cond.Rows(), h.Width
	d := c.Compute
	if p.exact {
		d = engine.F32
	}
	y := c.New(d, r, w) // SiLU(time + cond), input of every AdaLN layer
	add := engine.RowsArgs{Y: y, A: p.cond, B: p.time, Count: r, Act: engine.SiLU}
	if p.oneTime {
		add.IB = c.I32(fill(r, func(int) int { return p.step }))
	}
	c.Rows(add)
	mods := c.New(engine.F32, r, (3*len(h.Blocks)+2)*w)
	c.Gemm(nn.Gemm(p.w.Ada, y, mods))
	mod := func(i int) *engine.Tensor { return mods.Slice(i*w, (i+1)*w) }

	s := c.New(engine.F32, n, w) // the residual stream
	c.Gemm(nn.Gemm(p.w.Input, p.x, s))
	if r != n && n > 0 { // both halves of a guided pair begin with the same x
		s = nn.Gather(c, s, c.I32(fill(r, func(i int) int { return i % n })))
	}
	u, f := c.New(d, r, w), c.New(d, r, w)
	for i, b := range p.w.Blocks {
		c.Norm(engine.NormArgs{X: s, Y: u, Weight: b.NormWeight, Bias: b.NormBias,
			Shift: mod(3 * i), Scale: mod(3*i + 1), ModRows: 1, Eps: p.w.Eps})
		a := nn.Gemm(b.Fc1, u, f)
		a.Act = engine.SiLU
		c.Gemm(a)
		a = nn.Gemm(b.Fc2, f, s)
		a.Gate, a.GateRows, a.Residual = mod(3*i+2), 1, s
		c.Gemm(a)
	}
	k := 3 * len(p.w.Blocks)
	v := c.New(engine.F32, r, w)
	c.Norm(engine.NormArgs{X: s, Y: v, Shift: mod(k), Scale: mod(k + 1), ModRows: 1, Eps: p.w.Eps})
	c.Gemm(nn.Gemm(p.w.Final, v, p.out))
}

func fill(n int, f func(int) int) []int32 {
	v := make([]int32, n)
	for i := range v {
		v[i] = int32(f(i))
	}
	return v
}
