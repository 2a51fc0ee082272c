package nn

import "margo/engine"

// Vec makes a vector-like parameter: bias, norm, embedding table.
func Vec(shape ...int) *engine.Param { return &engine.Param{Shape: shape} }

// Linear is y = x·Wᵀ + b, W [out, in] as PyTorch has it.
type Linear struct {
	Weight *engine.Param `param:"weight"`
	Bias   *engine.Param `param:"bias"`
}

// NewLinear describes a layer from in to out columns.
func NewLinear(in, out int) Linear {
	return Linear{&engine.Param{Shape: []int{out, in}, Role: engine.Weight}, Vec(out)}
}

// InF32 keeps the weight in F32 whatever the compute dtype: for small layers
// next to values that rounding would hurt (tokens, timesteps).
func (l Linear) InF32() Linear {
	l.Weight.F32 = true
	return l
}

// Out is the number of columns of the result.
func (l Linear) Out() int { return l.Weight.Shape[0] }

// Matrix is the layer as ops take it; exact picks the F32 copy, if there is one.
func (l Linear) Matrix(exact bool) engine.Matrix { return l.Weight.Matrix(l.Bias, exact) }

// Args is y = x·Wᵀ + b as a GEMM, ready for an epilogue to be added.
func (l Linear) Args(x, y *engine.Tensor) engine.GemmArgs { return Gemm(l.Matrix(false), x, y) }

// Gemm is y = x·Wᵀ + b for a matrix m.
func Gemm(m engine.Matrix, x, y *engine.Tensor) engine.GemmArgs {
	return engine.GemmArgs{X: x, W: m.W, Packed: m.Packed, Bias: m.Bias, Y: y}
}

// Forward computes x [M, in] → [M, out] of dtype d.
func (l Linear) Forward(c *engine.Ctx, x *engine.Tensor, d engine.DType) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	y := c.New(d, x.Rows(), l.Out())
	c.Gemm(l.Args(x, y))
	return y
}

// LayerNorm is torch.nn.LayerNorm over the last dimension.
type LayerNorm struct {
	Weight *engine.Param `param:"weight"`
	Bias   *engine.Param `param:"bias"`
	Eps    float64
}

// NewLayerNorm describes a norm over dim columns.
func NewLayerNorm(dim int, eps float64) LayerNorm { return LayerNorm{Vec(dim), Vec(dim), eps} }

// Args is y = LN(x).
func (n LayerNorm) Args(x, y *engine.Tensor) engine.NormArgs {
	return engine.NormArgs{X: x, Y: y, Weight: n.Weight.T, Bias: n.Bias.T, Eps: float32(n.Eps)}
}

// Forward normalises x [M, dim] into a new tensor of dtype d.
func (n LayerNorm) Forward(c *engine.Ctx, x *engine.Tensor, d engine.DType) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	y := c.New(d, x.Rows(), x.Cols())
	c.Norm(n.Args(x, y))
	return y
}

// Gather copies rows ids (I32 [n]) of x into a new tensor of x's dtype.
func Gather(c *engine.Ctx, x, ids *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	y := c.New(x.DType, ids.Elems(), x.Cols())
	c.Rows(engine.RowsArgs{Y: y, A: x, IA: ids, Count: ids.Elems()})
	return y
}
