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
		h := &head{a: a, s: &stream[F]{dev: s.dev}, n: a.X.Rows(), r: a.Cond.Rows(), w: a.Cond.Cols()}
		for i := range a.Steps {
			if a.Cancel != nil && atomic.LoadUint32(a.Cancel) != 0 {
				panic(s.dev.errorf("", engine.Cancelled, "after %d of %d steps", i, len(a.Steps)))
			}
			h.step(i)
			h.release()
			if h.err != nil {
				panic(s.dev.errorf("", engine.Internal, "step %d: %w", i, h.err))
			}
		}
	})
}

// head is the state of a HeadSteps call. The first error sticks.
type head struct {
	a       engine.HeadStepsArgs
	s       engine.Stream // runs at once
	n, r, w int           // tokens, rows, width
	temp    []engine.Buffer
	err     error
}

// step runs step i.
func (h *head) step(i int) {
	a, wt := &h.a, h.a.Weights
	if a.ExactStep != nil && a.ExactStep[i] {
		wt = a.Exact
	}
	compute := wt.Ada.W.DType

	y := h.new(engine.F32, h.r, h.w)
	ib := h.index(func(int) int { return i })
	h.do(h.s.Rows(engine.RowsArgs{Y: y, A: a.Cond, B: a.Time, IB: ib, Count: h.r, Act: engine.SiLU}))
	mod := h.linear(y, wt.Ada, engine.F32, engine.Identity)
	part := func(k int) *engine.Tensor { return mod.Slice(k*h.w, (k+1)*h.w) }

	in := h.linear(a.X, wt.Input, engine.F32, engine.Identity)
	x := h.new(engine.F32, h.r, h.w)
	token := h.index(func(r int) int { return r % h.n }) // row n+r is the other half of row r
	h.do(h.s.Rows(engine.RowsArgs{Y: x, A: in, IA: token, Count: h.r}))

	for k, b := range wt.Blocks {
		u := h.norm(x, compute, b.NormWeight, b.NormBias, part(3*k), part(3*k+1), wt.Eps)
		u = h.linear(u, b.Fc1, compute, engine.SiLU)
		h.do(h.s.Gemm(engine.GemmArgs{X: u, W: b.Fc2.W, Packed: b.Fc2.Packed, Bias: b.Fc2.Bias,
			Gate: part(3*k + 2), GateRows: 1, Residual: x, Y: x}))
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
	h.do(h.s.DiffusionStep(d))
	if a.Trace != nil {
		h.do(h.s.Copy(a.Trace.RowsAt(i*h.n, (i+1)*h.n), a.X))
	}
}

func (h *head) linear(x *engine.Tensor, m engine.Matrix, d engine.DType, act engine.Activation) *engine.Tensor {
	y := h.new(d, x.Rows(), m.W.Rows())
	h.do(h.s.Gemm(engine.GemmArgs{X: x, W: m.W, Packed: m.Packed, Bias: m.Bias, Act: act, Y: y}))
	return y
}

func (h *head) norm(x *engine.Tensor, d engine.DType, w, b, shift, scale *engine.Tensor, eps float32) *engine.Tensor {
	y := h.new(d, h.r, h.w)
	h.do(h.s.Norm(engine.NormArgs{X: x, Y: y, Weight: w, Bias: b, Shift: shift, Scale: scale, ModRows: 1, Eps: eps}))
	return y
}

// index is an index tensor with f(r) for every row.
func (h *head) index(f func(int) int) *engine.Tensor {
	t := h.new(engine.I32, h.r)
	for r := 0; r < h.r; r++ {
		h.do(h.s.Fill(t.Slice(r, r+1), float32(f(r))))
	}
	return t
}

func (h *head) do(err error) {
	if h.err == nil {
		h.err = err
	}
}

// new is a tensor until release.
func (h *head) new(d engine.DType, shape ...int) *engine.Tensor {
	t := engine.NewTensor(nil, 0, d, shape...)
	b, err := h.s.Device().Alloc(t.Bytes())
	h.do(err)
	t.Buf = b
	h.temp = append(h.temp, b)
	return t
}

func (h *head) release() {
	for _, b := range h.temp {
		h.do(b.Free())
	}
	h.temp = nil
}
