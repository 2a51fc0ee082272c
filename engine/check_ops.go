package engine

import (
	"fmt"
	"math"
)

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a PackArgs) Check() error {
	c := check{op: "pack"}
	c.tensor("W", a.W, floats)
	if floats>>a.DType&1 == 0 {
		c.fail("DType is %v, want %v", a.DType, floats)
	}
	if a.FP8 && a.DType != BF16 {
		c.fail("DType of a W in FP8 is %v, want %v", a.DType, BF16)
	}
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a GemmArgs) Check() error {
	c := check{op: OpGemm}
	c.tensor("X", a.X, floats)
	c.weight("W", a.W, a.Packed)
	c.tensor("Y", a.Y, floats)
	c.optional("Gate", a.Gate, onlyF32)
	c.optional("Residual", a.Residual, onlyF32)
	c.act(a.Act)
	if c.err != nil {
		return c.err
	}
	m, n := a.Y.Rows(), a.Y.Cols()
	c.list("Bias", a.Bias, onlyF32, a.W.Rows())
	c.matrix("X", a.X, m, a.W.Cols())
	if a.N0 < 0 || a.N0 > a.W.Rows()-n {
		c.fail("N0 %d and %d columns of Y leave the %d rows of W", a.N0, n, a.W.Rows())
	}
	c.groups("Gate", a.Gate, "GateRows", a.GateRows, m, n)
	c.matrix("Residual", a.Residual, m, n)
	c.apart("Y", a.Y, "X", a.X)
	c.apart("Y", a.Y, "W", a.W)
	c.apart("Y", a.Y, "Bias", a.Bias)
	c.apart("Y", a.Y, "Gate", a.Gate)
	c.sameOrApart("Y", a.Y, "Residual", a.Residual)
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a AttentionArgs) Check() error {
	c := check{op: OpAttention}
	c.tensor("Q", a.Q, floats)
	c.tensor("K", a.K, floats)
	c.tensor("V", a.V, floats)
	c.tensor("O", a.O, floats)
	c.tensor("QOff", a.QOff, onlyI32)
	c.tensor("KOff", a.KOff, onlyI32)
	c.atLeast("Heads", a.Heads, 1)
	c.finite("Scale", float64(a.Scale))
	if c.err != nil {
		return c.err
	}
	if d := a.Q.DType; a.K.DType != d || a.V.DType != d || a.O.DType != d {
		c.fail("Q, K, V and O have different dtypes")
	}
	width := a.Q.Cols()
	if width%a.Heads != 0 || width/a.Heads > 512 || width == 0 {
		c.fail("%d columns for %d heads: want heads of 1 to 512", width, a.Heads)
	}
	c.matrix("K", a.K, a.K.Rows(), width)
	c.matrix("V", a.V, a.K.Rows(), width)
	c.matrix("O", a.O, a.Q.Rows(), width)
	c.offsets("QOff", a.QOff, a.QOffHost, a.Q.Rows())
	if a.Blocks == nil {
		c.offsets("KOff", a.KOff, a.KOffHost, a.K.Rows())
	} else {
		c.offsets("KOff", a.KOff, a.KOffHost, math.MaxInt32)
	}
	c.eq("KOffHost length", len(a.KOffHost), len(a.QOffHost))
	c.blocks(&a)
	c.apart("O", a.O, "Q", a.Q)
	c.apart("O", a.O, "K", a.K)
	c.apart("O", a.O, "V", a.V)
	return c.err
}

// blocks demands a table that has room for the keys of every sequence.
func (c *check) blocks(a *AttentionArgs) {
	if a.Blocks == nil || c.err != nil {
		return
	}
	c.atLeast("BlockSize", a.BlockSize, 1)
	c.tensor("Blocks", a.Blocks, onlyI32)
	if c.err != nil {
		return
	}
	if a.K.Rows()%a.BlockSize != 0 {
		c.fail("%d rows of K are no blocks of %d", a.K.Rows(), a.BlockSize)
	}
	c.matrix("Blocks", a.Blocks, len(a.QOffHost)-1, a.Blocks.Cols())
	c.contiguous("Blocks", a.Blocks)
	room := volume(a.Blocks.Cols(), a.BlockSize)
	for s := 1; s < len(a.KOffHost) && c.err == nil; s++ {
		if keys := int(a.KOffHost[s] - a.KOffHost[s-1]); keys > room {
			c.fail("sequence %d has %d keys, its %d blocks of %d hold %d", s-1, keys, a.Blocks.Cols(), a.BlockSize, room)
		} else if keys > 0 && a.K.Rows() == 0 { // nor can a device read another block in place of a bad one
			c.fail("sequence %d has %d keys, K has no block", s-1, keys)
		}
	}
}

// offsets demands S+1 numbers that rise from 0 or more to rows or less.
func (c *check) offsets(name string, t *Tensor, host []int32, rows int) {
	c.atLeast(name+"Host length", len(host), 1)
	c.list(name, t, onlyI32, len(host))
	last := int32(0)
	for i, o := range host {
		if o < last || int(o) > rows {
			c.fail("%sHost[%d] is %d after %d, with %d rows", name, i, o, last, rows)
			return
		}
		last = o
	}
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a NormArgs) Check() error {
	c := check{op: OpNorm}
	c.tensor("X", a.X, floats)
	c.tensor("Y", a.Y, floats)
	c.optional("Scale", a.Scale, onlyF32)
	c.optional("Shift", a.Shift, onlyF32)
	c.finite("Eps", float64(a.Eps))
	if c.err != nil {
		return c.err
	}
	m, d := a.Y.Rows(), a.Y.Cols()
	c.atLeast("columns", d, 1)
	c.matrix("X", a.X, m, d)
	c.list("Weight", a.Weight, onlyF32, d)
	c.list("Bias", a.Bias, onlyF32, d)
	c.groups("Scale", a.Scale, "ModRows", a.ModRows, m, d)
	c.groups("Shift", a.Shift, "ModRows", a.ModRows, m, d)
	c.apart("Y", a.Y, "X", a.X)
	c.apart("Y", a.Y, "Weight", a.Weight)
	c.apart("Y", a.Y, "Bias", a.Bias)
	c.apart("Y", a.Y, "Scale", a.Scale)
	c.apart("Y", a.Y, "Shift", a.Shift)
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a GatedAddArgs) Check() error {
	c := check{op: OpGatedAdd}
	c.tensor("X", a.X, onlyF32)
	c.tensor("H", a.H, floats)
	c.tensor("Y", a.Y, onlyF32)
	c.optional("Gate", a.Gate, onlyF32)
	if c.err != nil {
		return c.err
	}
	m, d := a.Y.Rows(), a.Y.Cols()
	c.matrix("X", a.X, m, d)
	c.matrix("H", a.H, m, d)
	c.groups("Gate", a.Gate, "GateRows", a.GateRows, m, d)
	c.sameOrApart("Y", a.Y, "X", a.X)
	c.apart("Y", a.Y, "H", a.H)
	c.apart("Y", a.Y, "Gate", a.Gate)
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
// That indices are in range is for the device to see.
func (a RowsArgs) Check() error {
	c := check{op: OpRows}
	c.tensor("Y", a.Y, floats)
	c.tensor("A", a.A, floats)
	c.optional("B", a.B, floats)
	c.atLeast("Count", a.Count, 0)
	c.act(a.Act)
	if c.err != nil {
		return c.err
	}
	d := a.Y.Cols()
	c.index("IY", a.IY, "Y", a.Y, a.Count, d)
	c.index("IA", a.IA, "A", a.A, a.Count, d)
	c.index("IB", a.IB, "B", a.B, a.Count, d)
	c.apart("Y", a.Y, "A", a.A)
	c.apart("Y", a.Y, "B", a.B)
	return c.err
}

// index demands that t has d columns and, without an index, count rows.
func (c *check) index(iName string, i *Tensor, name string, t *Tensor, count, d int) {
	c.list(iName, i, onlyI32, count)
	if t == nil || c.err != nil {
		return
	}
	c.eq(name+" columns", t.Cols(), d)
	if i == nil {
		c.atLeast(name+" rows", t.Rows(), count)
	}
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a CastArgs) Check() error {
	c := check{op: OpCast}
	c.tensor("X", a.X, floats)
	c.tensor("Y", a.Y, floats)
	if c.err != nil {
		return c.err
	}
	c.matrix("X", a.X, a.Y.Rows(), a.Y.Cols())
	c.apart("Y", a.Y, "X", a.X)
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a TimestepEmbeddingArgs) Check() error {
	c := check{op: OpTimestepEmbedding}
	c.tensor("T", a.T, onlyF32)
	c.tensor("Y", a.Y, onlyF32)
	if c.err != nil {
		return c.err
	}
	c.list("T", a.T, onlyF32, a.Y.Rows())
	if a.Y.Cols()%2 != 0 {
		c.fail("Y has %d columns, want an even number", a.Y.Cols())
	}
	if !(a.MaxPeriod > 0) {
		c.fail("MaxPeriod is %v, want above 0", a.MaxPeriod)
	}
	c.finite("MaxPeriod", float64(a.MaxPeriod))
	c.apart("Y", a.Y, "T", a.T)
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a NormalArgs) Check() error {
	c := check{op: OpNormal}
	c.tensor("Y", a.Y, onlyF32)
	c.tensor("IDs", a.IDs, onlyI32)
	c.rng(a.RNG, 1)
	if c.err != nil {
		return c.err
	}
	c.ids(a.IDs, a.Y.Rows())
	return c.err
}

// ids demands IDs [n,2].
func (c *check) ids(t *Tensor, n int) {
	c.matrix("IDs", t, n, 2)
	c.contiguous("IDs", t)
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a DiffusionStepArgs) Check() error {
	c := check{op: OpDiffusionStep}
	c.tensor("X", a.X, onlyF32)
	c.tensor("Y", a.Y, onlyF32)
	c.tensor("Out", a.Out, onlyF32)
	c.optional("Noise", a.Noise, onlyF32)
	c.optional("IDs", a.IDs, onlyI32)
	c.coef("Coef", &a.Coef)
	c.finite("Temperature", float64(a.Temperature))
	if c.err != nil {
		return c.err
	}
	n, ch := a.Y.Rows(), a.Y.Cols()
	c.matrix("X", a.X, n, ch)
	c.matrix("Out", a.Out, pairRows(n, a.Guidance), 2*ch)
	c.list("Guidance", a.Guidance, onlyF32, n)
	if !a.Coef.Last {
		c.noise(a.Noise, a.IDs, a.RNG, n, 1, ch)
	}
	c.sameOrApart("Y", a.Y, "X", a.X)
	c.apart("Y", a.Y, "Out", a.Out)
	c.apart("Y", a.Y, "Guidance", a.Guidance)
	c.apart("Y", a.Y, "Noise", a.Noise)
	return c.err
}

// pairRows is the number of head rows of n tokens.
func pairRows(n int, guidance *Tensor) int {
	if guidance != nil {
		return 2 * n
	}
	return n
}

// noise demands the given noise, or what it takes to draw it.
func (c *check) noise(noise, ids *Tensor, r RNG, n, steps, ch int) {
	if noise != nil {
		c.matrix("Noise", noise, steps*n, ch)
		return
	}
	if ids == nil {
		c.fail("neither Noise nor IDs are given")
	}
	c.ids(ids, n)
	c.rng(r, steps)
}

func (c *check) coef(name string, s *StepCoef) {
	if v := s.A + s.B + s.MinLog + s.MaxLog; v-v != 0 {
		c.fail("%s is not finite: %+v", name, *s)
	}
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a HeadStepsArgs) Check() error {
	c := check{op: OpHeadSteps}
	c.tensor("X", a.X, onlyF32)
	c.tensor("Cond", a.Cond, onlyF32)
	c.tensor("Time", a.Time, onlyF32)
	c.optional("Noise", a.Noise, onlyF32)
	c.optional("IDs", a.IDs, onlyI32)
	c.optional("Trace", a.Trace, onlyF32)
	c.finite("Temperature", float64(a.Temperature))
	c.atLeast("Scratch", a.Scratch, 0)
	if c.err != nil {
		return c.err
	}
	n, ch, w, steps := a.X.Rows(), a.X.Cols(), a.Cond.Cols(), len(a.Steps)
	c.atLeast("columns of X", ch, 1)
	c.atLeast("columns of Cond", w, 1)
	c.matrix("Cond", a.Cond, pairRows(n, a.Guidance), w)
	c.matrix("Time", a.Time, steps, w)
	c.list("Guidance", a.Guidance, onlyF32, n)
	c.matrix("Trace", a.Trace, steps*n, ch)
	exact, last := false, true
	for i := range a.Steps {
		c.coef(fmt.Sprintf("Steps[%d]", i), &a.Steps[i])
		last = last && a.Steps[i].Last
	}
	if !last {
		c.noise(a.Noise, a.IDs, a.RNG, n, steps, ch)
	}
	if a.ExactStep != nil {
		c.eq("ExactStep length", len(a.ExactStep), steps)
		for _, e := range a.ExactStep {
			exact = exact || e
		}
	}
	c.headWeights("Weights", a.Weights, ch, w)
	if exact {
		c.headWeights("Exact", a.Exact, ch, w)
		if c.err == nil && a.Exact.Ada.W.DType != F32 {
			c.fail("Exact weights are %v, want f32", a.Exact.Ada.W.DType)
		}
	}
	c.apart("X", a.X, "Cond", a.Cond)
	c.apart("X", a.X, "Time", a.Time)
	c.apart("X", a.X, "Guidance", a.Guidance)
	c.apart("X", a.X, "Noise", a.Noise)
	c.apart("Trace", a.Trace, "X", a.X)
	c.apart("Trace", a.Trace, "Cond", a.Cond)
	c.apart("Trace", a.Trace, "Time", a.Time)
	c.apart("Trace", a.Trace, "Noise", a.Noise)
	return c.err
}

// headWeights demands the shapes of a head with ch channels and width w.
func (c *check) headWeights(name string, h *HeadWeights, ch, w int) {
	if c.err != nil {
		return
	}
	if h == nil {
		c.fail("%s is nil", name)
		return
	}
	c.n = min(c.n, 8) // leave room for the tensors of the part at fault
	c.linear(name+".Input", h.Input, w, ch)
	c.linear(name+".Final", h.Final, 2*ch, w)
	c.linear(name+".Ada", h.Ada, (3*len(h.Blocks)+2)*w, w)
	for i := range h.Blocks {
		b := &h.Blocks[i]
		at := func(field string) string { return fmt.Sprintf("%s.Blocks[%d].%s", name, i, field) }
		c.n = min(c.n, 11)
		if b.NormWeight == nil || b.NormBias == nil {
			c.fail("%s or NormBias is nil", at("NormWeight"))
		}
		c.list(at("NormWeight"), b.NormWeight, onlyF32, w)
		c.list(at("NormBias"), b.NormBias, onlyF32, w)
		c.linear(at("Fc1"), b.Fc1, w, w)
		c.linear(at("Fc2"), b.Fc2, w, w)
		if c.err == nil && (b.Fc1.W.DType != h.Ada.W.DType || b.Fc2.W.DType != h.Ada.W.DType) {
			c.fail("%s mixes dtypes", name)
		}
	}
	if c.err == nil && (h.Input.W.DType != F32 || h.Final.W.DType != F32) {
		c.fail("%s.Input and %s.Final must be f32", name, name)
	}
	c.finite(name+".Eps", float64(h.Eps))
}

func (c *check) linear(name string, m Matrix, n, k int) {
	c.weight(name+".W", m.W, m.Packed)
	c.matrix(name+".W", m.W, n, k)
	c.list(name+".Bias", m.Bias, onlyF32, n)
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a Conv2DArgs) Check() error {
	c := check{op: OpConv2D}
	c.tensor("X", a.X, floats)
	c.weight("W", a.W, a.Packed)
	c.tensor("Y", a.Y, floats)
	c.optional("Residual", a.Residual, onlyF32)
	if c.err != nil {
		return c.err
	}
	c.eq("dimensions of X", len(a.X.Shape), 4)
	c.eq("dimensions of Y", len(a.Y.Shape), 4)
	if a.Kernel != 1 && a.Kernel != 3 {
		c.fail("Kernel is %d, want 1 or 3", a.Kernel)
	}
	if a.Stride != 1 && a.Stride != 2 {
		c.fail("Stride is %d, want 1 or 2", a.Stride)
	}
	if p := a.Kernel; min(a.PadTop, a.PadLeft, a.PadBottom, a.PadRight) < 0 || max(a.PadTop, a.PadLeft, a.PadBottom, a.PadRight) >= p {
		c.fail("padding %d,%d,%d,%d, want 0 to %d", a.PadTop, a.PadLeft, a.PadBottom, a.PadRight, p-1)
	}
	if c.err != nil {
		return c.err
	}
	cout := a.W.Rows()
	c.matrix("W", a.W, cout, a.Kernel*a.Kernel*a.X.Shape[3])
	ho, wo := a.OutSize()
	c.eq("images of Y", a.Y.Shape[0], a.X.Shape[0])
	c.eq("height of Y", a.Y.Shape[1], ho)
	c.eq("width of Y", a.Y.Shape[2], wo)
	c.eq("channels of Y", a.Y.Shape[3], cout)
	c.list("Bias", a.Bias, onlyF32, cout)
	c.matrix("Residual", a.Residual, a.Y.Rows(), cout)
	c.apart("Y", a.Y, "X", a.X)
	c.apart("Y", a.Y, "W", a.W)
	c.apart("Y", a.Y, "Bias", a.Bias)
	c.sameOrApart("Y", a.Y, "Residual", a.Residual)
	return c.err
}

// OutSize is the height and width of Y that X, Kernel, Stride, padding and
// Upsample give: ⌊(up·H + PadTop + PadBottom − Kernel)/Stride⌋ + 1, at least 0.
func (a Conv2DArgs) OutSize() (h, w int) {
	size := func(n, pad int) int {
		if a.Upsample {
			n *= 2
		}
		if n += pad - a.Kernel; n < 0 {
			return 0
		}
		return n/a.Stride + 1
	}
	return size(a.X.Shape[1], a.PadTop+a.PadBottom), size(a.X.Shape[2], a.PadLeft+a.PadRight)
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a GroupNormArgs) Check() error {
	c := check{op: OpGroupNorm}
	c.tensor("X", a.X, floats)
	c.tensor("Y", a.Y, floats)
	c.finite("Eps", float64(a.Eps))
	c.act(a.Act)
	if c.err != nil {
		return c.err
	}
	c.eq("dimensions of X", len(a.X.Shape), 4)
	c.eq("dimensions of Y", len(a.Y.Shape), 4)
	if c.err != nil {
		return c.err
	}
	ch := a.X.Cols()
	c.eq("images of Y", a.Y.Shape[0], a.X.Shape[0])
	c.matrix("Y", a.Y, a.X.Rows(), ch)
	c.list("Weight", a.Weight, onlyF32, ch)
	c.list("Bias", a.Bias, onlyF32, ch)
	if a.Groups < 1 || ch%a.Groups != 0 {
		c.fail("%d channels in %d groups", ch, a.Groups)
	}
	c.apart("Y", a.Y, "X", a.X)
	c.apart("Y", a.Y, "Weight", a.Weight)
	c.apart("Y", a.Y, "Bias", a.Bias)
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a PatchifyArgs) Check() error {
	c := check{op: OpPatchify}
	c.tensor("X", a.X, onlyF32)
	c.tensor("Y", a.Y, onlyF32)
	c.atLeast("P", a.P, 1)
	if c.err != nil {
		return c.err
	}
	c.eq("dimensions of X", len(a.X.Shape), 4)
	c.eq("dimensions of Y", len(a.Y.Shape), 3)
	if c.err != nil {
		return c.err
	}
	n, h, w, ch := a.X.Shape[0], a.X.Shape[1], a.X.Shape[2], a.X.Shape[3]
	if h%a.P != 0 || w%a.P != 0 {
		c.fail("%d×%d pixels are not whole patches of %d", h, w, a.P)
	}
	c.eq("images of Y", a.Y.Shape[0], n)
	c.eq("tokens of Y", a.Y.Shape[1], h/a.P*(w/a.P))
	c.eq("columns of Y", a.Y.Shape[2], ch*a.P*a.P)
	c.apart("Y", a.Y, "X", a.X)
	return c.err
}

// CheckFill checks the arguments of Stream.Fill.
func CheckFill(dst *Tensor) error {
	c := check{op: "fill"}
	c.tensor("dst", dst, anyType)
	return c.err
}

// CheckCopy checks the arguments of Stream.Copy.
func CheckCopy(dst, src *Tensor) error {
	c := check{op: "copy"}
	c.tensor("dst", dst, anyType)
	c.tensor("src", src, anyType)
	if c.err != nil {
		return c.err
	}
	if dst.DType != src.DType {
		c.fail("dst and src have different dtypes")
	}
	c.matrix("src", src, dst.Rows(), dst.Cols())
	c.apart("dst", dst, "src", src)
	return c.err
}

// CheckHostCopy checks the arguments of Stream.CopyIn ("copy in") or CopyOut
// ("copy out"): a contiguous tensor and as many bytes on the host.
func CheckHostCopy(op Op, t *Tensor, host []byte) error {
	c := check{op: op}
	c.tensor("tensor", t, anyType)
	if c.err != nil {
		return c.err
	}
	c.contiguous("tensor", t)
	c.eq("host bytes", len(host), t.Bytes())
	return c.err
}

// Check reports the first thing wrong with a, as an *Error of kind Invalid.
func (a CategoricalArgs) Check() error {
	c := check{op: OpCategorical}
	c.tensor("Logits", a.Logits, onlyF32)
	c.tensor("Y", a.Y, onlyI32)
	c.optional("LogProb", a.LogProb, onlyF32)
	c.optional("IDs", a.IDs, onlyI32)
	c.finite("Temperature", float64(a.Temperature))
	c.atLeast("TopK", a.TopK, 0)
	c.atLeast("Stride", a.Stride, 0)
	if c.err != nil {
		return c.err
	}
	n, k := a.Y.Elems(), a.Logits.Cols()
	c.atLeast("categories", k, 1)
	c.list("Y", a.Y, onlyI32, n)
	c.list("LogProb", a.LogProb, onlyF32, n)
	c.list("Guidance", a.Guidance, onlyF32, n)
	c.matrix("Logits", a.Logits, pairRows(n, a.Guidance), k)
	if a.Temperature < 0 {
		c.fail("Temperature is %v, want 0 or more", a.Temperature)
	}
	if !(a.TopP > 0 && a.TopP <= 1) {
		c.fail("TopP is %v, want above 0 and at most 1", a.TopP)
	}
	if a.Method > InverseTransform {
		c.fail("Method is %d, not a CategoricalMethod", a.Method)
	}
	if n > 0 && volume(max(n-1, 0), a.Stride) > math.MaxInt32-k {
		c.fail("Stride %d and %d rows of %d categories do not fit I32", a.Stride, n, k)
	}
	if a.Temperature > 0 {
		if a.IDs == nil {
			c.fail("IDs is nil")
		} else {
			c.ids(a.IDs, n)
		}
		c.rng(a.RNG, 1)
	}
	c.apart("Y", a.Y, "IDs", a.IDs)
	c.apart("LogProb", a.LogProb, "Logits", a.Logits)
	c.apart("LogProb", a.LogProb, "Guidance", a.Guidance)
	return c.err
}
