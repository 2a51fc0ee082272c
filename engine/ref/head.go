package ref

import (
	"sync/atomic"

	"margo/engine"
)

// HeadSteps is a composition of the other ops, and this is its definition. For
// every step i, with the weights of that step (MAR §4.1, diffloss.py
// SimpleMLPAdaLN.forward_with_cfg):
//
//	y = SiLU(Time[i] + Cond)                       Rows
//	m = Ada·y, split into shift, scale, gate …     Gemm, F32
//	h = Input·x, for both halves of a pair         Gemm, F32
//	per block: u = Norm(h; shift, scale)           Norm, compute dtype
//	           u = SiLU(Fc1·u)                     Gemm, compute dtype
//	           h = h + gate ⊙ (Fc2·u)              Gemm, F32
//	out = Final·Norm(h; shift, scale)              Norm, Gemm, F32
//	x = reverse step of out                        DiffusionStep
func (s *stream[F]) HeadSteps(a engine.HeadStepsArgs) error {
	return s.do(engine.OpHeadSteps, a.Check(), func() {
		h := newHead(&stream[F]{dev: s.dev}, a)
		defer h.c.Close()
		for i := range a.Steps {
			if a.Cancel != nil && atomic.LoadUint32(a.Cancel) != 0 {
				panic(s.dev.errorf("", engine.Cancelled, "after %d of %d steps", i, len(a.Steps)))
			}
			h.step(i)
			if err := h.c.Err(); err != nil {
				panic(s.dev.errorf("", engine.Internal, "step %d: %w", i, err))
			}
		}
	})
}

// head is the state of a HeadSteps call.
type head struct {
	a       engine.HeadStepsArgs
	c       *engine.Ctx
	n, r, w int // tokens, rows, width
	same    *engine.Tensor
}

func newHead(s engine.Stream, a engine.HeadStepsArgs) *head {
	h := &head{a: a, n: a.X.Rows(), r: a.Cond.Rows(), w: a.Cond.Cols()}
	h.c = &engine.Ctx{Stream: s, Arena: engine.NewArena(s.Device())}
	token := make([]int32, h.r) // row r belongs to token r, or r-n
	for i := range token {
		token[i] = int32(i % h.n)
	}
	h.same = h.c.I32(token)
	return h
}

// step runs step i. Errors stick to h.c.
func (h *head) step(i int) {
	c, a := h.c, &h.a
	mark := c.Arena.Mark()
	defer c.Arena.Release(mark)
	wt := a.Weights
	if a.ExactStep != nil && a.ExactStep[i] {
		wt = a.Exact
	}
	compute := wt.Ada.W.DType
	W := h.w

	y := c.New(engine.F32, h.r, W)
	step := make([]int32, h.r)
	for r := range step {
		step[r] = int32(i)
	}
	c.Rows(engine.RowsArgs{Y: y, A: a.Cond, B: a.Time, IB: c.I32(step), Count: h.r, Act: engine.SiLU})
	mod := h.linear(y, wt.Ada, engine.F32, engine.Identity)
	part := func(k int) *engine.Tensor { return mod.Slice(k*W, (k+1)*W) }

	in := h.linear(a.X, wt.Input, engine.F32, engine.Identity)
	x := c.New(engine.F32, h.r, W)
	c.Rows(engine.RowsArgs{Y: x, A: in, IA: h.same, Count: h.r})

	for k, b := range wt.Blocks {
		u := h.norm(x, compute, b.NormWeight, b.NormBias, part(3*k), part(3*k+1), wt.Eps)
		u = h.linear(u, b.Fc1, compute, engine.SiLU)
		c.Gemm(engine.GemmArgs{X: u, W: b.Fc2.W, Packed: b.Fc2.Packed, Bias: b.Fc2.Bias,
			Gate: part(3*k + 2), GateRows: 1, Residual: x, Y: x})
	}
	last := 3 * len(wt.Blocks)
	u := h.norm(x, engine.F32, nil, nil, part(last), part(last+1), wt.Eps)
	out := h.linear(u, wt.Final, engine.F32, engine.Identity)

	d := engine.DiffusionStepArgs{X: a.X, Y: a.X, Out: out, Guidance: a.Guidance, IDs: a.IDs, RNG: a.RNG,
		Coef: a.Steps[i], Temperature: a.Temperature}
	d.RNG.Step += i
	if a.Noise != nil {
		d.Noise = a.Noise.RowsAt(i*h.n, (i+1)*h.n)
	}
	c.DiffusionStep(d)
	if a.Trace != nil {
		c.Rows(engine.RowsArgs{Y: a.Trace.RowsAt(i*h.n, (i+1)*h.n), A: a.X, Count: h.n})
	}
}

func (h *head) linear(x *engine.Tensor, m engine.Matrix, d engine.DType, act engine.Activation) *engine.Tensor {
	y := h.c.New(d, x.Rows(), m.W.Rows())
	h.c.Gemm(engine.GemmArgs{X: x, W: m.W, Packed: m.Packed, Bias: m.Bias, Act: act, Y: y})
	return y
}

func (h *head) norm(x *engine.Tensor, d engine.DType, w, b, shift, scale *engine.Tensor, eps float32) *engine.Tensor {
	y := h.c.New(d, h.r, h.w)
	h.c.Norm(engine.NormArgs{X: x, Y: y, Weight: w, Bias: b, Shift: shift, Scale: scale, ModRows: 1, Eps: eps})
	return y
}
