package engine

// Cost is what an op must do, whatever the device: the arithmetic of its matrix
// products and the memory traffic that no implementation can avoid. Every args
// struct of Kernels has a Cost method; they are the only place where margo's
// FLOP formulas are written down.
type Cost struct {
	// FLOPs of matrix products by the dtype of the weight or, without one, of the
	// operands; a multiply-add counts 2. Elementwise work is not counted: the
	// peaks that shares refer to are those of multiply-adds.
	F32, BF16 int64
	// Bytes is what is read and written when every input is read once and every
	// output written once.
	Bytes int64
}

// FLOPs is the total over dtypes.
func (c Cost) FLOPs() int64 { return c.F32 + c.BF16 }

// Add is the sum of two costs.
func (c Cost) Add(o Cost) Cost {
	return Cost{c.F32 + o.F32, c.BF16 + o.BF16, c.Bytes + o.Bytes}
}

// Sub is the difference of two costs.
func (c Cost) Sub(o Cost) Cost {
	return Cost{c.F32 - o.F32, c.BF16 - o.BF16, c.Bytes - o.Bytes}
}

func (c *Cost) flops(d DType, n int64) {
	if d == BF16 {
		c.BF16 += n
	} else {
		c.F32 += n
	}
}

// touch counts tensors once; nil ones are absent.
func (c *Cost) touch(ts ...*Tensor) {
	for _, t := range ts {
		if t != nil {
			c.Bytes += int64(t.Bytes())
		}
	}
}

// Cost is 2·M·N·K, N the columns of Y; only the rows of W in use are read.
func (a GemmArgs) Cost() (c Cost) {
	m, n, k := int64(a.Y.Rows()), int64(a.Y.Cols()), int64(a.W.Cols())
	c.flops(a.W.DType, 2*m*n*k)
	c.Bytes = n * k * int64(a.W.DType.Size())
	if a.Bias != nil {
		c.Bytes += n * 4
	}
	c.touch(a.X, a.Gate, a.Residual, a.Y)
	return c
}

// Cost is 4·Heads·Dh for every pair of a query and a key it sees: one product
// for the score and one for the value.
func (a AttentionArgs) Cost() (c Cost) {
	pairs := int64(0)
	for s := 0; s+1 < min(len(a.QOffHost), len(a.KOffHost)); s++ {
		q, k := int64(a.QOffHost[s+1]-a.QOffHost[s]), int64(a.KOffHost[s+1]-a.KOffHost[s])
		if !a.Causal {
			pairs += q * k
			continue
		}
		// Query i sees k-q+i+1 keys; the first q-k queries of q > k see none.
		m := min(q, k)
		pairs += m*k - m*(m-1)/2
	}
	c.flops(a.Q.DType, 4*pairs*int64(a.Q.Cols()))
	if a.Blocks != nil { // of the cache, the rows in use
		keys := int64(0)
		if n := len(a.KOffHost); n > 0 {
			keys = int64(a.KOffHost[n-1] - a.KOffHost[0])
		}
		c.Bytes += 2 * keys * int64(a.K.Cols()*a.K.DType.Size())
		c.touch(a.Q, a.O, a.QOff, a.KOff, a.Blocks)
		return c
	}
	c.touch(a.Q, a.K, a.V, a.O, a.QOff, a.KOff)
	return c
}

// Cost is memory traffic.
func (a NormArgs) Cost() (c Cost) {
	c.touch(a.X, a.Y, a.Weight, a.Bias, a.Scale, a.Shift)
	return c
}

// Cost is memory traffic.
func (a GatedAddArgs) Cost() (c Cost) {
	c.touch(a.X, a.H, a.Gate, a.Y)
	return c
}

// Cost is the memory traffic of Count rows.
func (a RowsArgs) Cost() (c Cost) {
	for _, t := range []*Tensor{a.Y, a.A, a.B} {
		if t != nil {
			c.Bytes += int64(a.Count) * int64(t.Cols()*t.DType.Size())
		}
	}
	c.touch(a.IY, a.IA, a.IB)
	return c
}

// Cost is memory traffic.
func (a CastArgs) Cost() (c Cost) {
	c.touch(a.X, a.Y)
	return c
}

// Cost is memory traffic.
func (a TimestepEmbeddingArgs) Cost() (c Cost) {
	c.touch(a.T, a.Y)
	return c
}

// Cost is memory traffic.
func (a NormalArgs) Cost() (c Cost) {
	c.touch(a.Y, a.IDs)
	return c
}

// Cost is memory traffic.
func (a DiffusionStepArgs) Cost() (c Cost) {
	c.touch(a.X, a.Y, a.Out, a.Guidance, a.Noise, a.IDs)
	return c
}

// Cost per step, with R rows for n tokens, d blocks of width W, C channels:
//
//	modulations  2·R·(3d+2)·W²    in the dtype of the step
//	blocks       2·R·2d·W²        in the dtype of the step
//	input        2·n·C·W          F32; the halves of a guided pair share x
//	final        2·n·2C·W         F32, and 2·n·C·W more with guidance: of the
//	                              unconditional rows only ε is used
//
// Bytes: the serial weights once per step, those of the modulations once per
// dtype, the modulations written and read, x and the noise.
func (a HeadStepsArgs) Cost() (c Cost) {
	n, ch, w := int64(a.X.Rows()), int64(a.X.Cols()), int64(a.Cond.Cols())
	rows, steps := int64(a.Cond.Rows()), int64(len(a.Steps))
	final := 2 * ch
	if a.Guidance != nil {
		final += ch
	}
	c.F32 = steps * 2 * n * w * (ch + final)
	count := func(h *HeadWeights, times int64) {
		if h == nil || times == 0 {
			return
		}
		d, size := int64(len(h.Blocks)), int64(h.Ada.W.DType.Size())
		ada, serial := (3*d+2)*w*w, 2*d*w*w
		c.flops(h.Ada.W.DType, times*2*rows*(ada+serial))
		c.Bytes += ada*size + times*(serial*size+3*ch*w*4+rows*(3*d+2)*w*4*2)
	}
	exact := int64(0)
	for i := 0; i < min(len(a.Steps), len(a.ExactStep)); i++ {
		if a.ExactStep[i] {
			exact++
		}
	}
	count(a.Exact, exact)
	count(a.Weights, steps-exact)
	c.Bytes += int64(a.X.Bytes()) // read; written below
	c.touch(a.X, a.Cond, a.Time, a.Guidance, a.Noise, a.IDs, a.Trace)
	return c
}

// Cost is 2·pixels of Y·Cout·k²·Cin, taps in the padding included.
func (a Conv2DArgs) Cost() (c Cost) {
	c.flops(a.W.DType, 2*int64(a.Y.Rows())*int64(a.W.Elems()))
	c.touch(a.X, a.W, a.Bias, a.Residual, a.Y)
	return c
}

// Cost is memory traffic.
func (a GroupNormArgs) Cost() (c Cost) {
	c.touch(a.X, a.Y, a.Weight, a.Bias)
	return c
}

// Cost is memory traffic.
func (a CategoricalArgs) Cost() (c Cost) {
	c.touch(a.Logits, a.Guidance, a.IDs, a.Y, a.LogProb)
	return c
}

// Cost is memory traffic.
func (a PatchifyArgs) Cost() (c Cost) {
	c.touch(a.X, a.Y)
	return c
}
