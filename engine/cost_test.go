package engine

import "testing"

func shaped(d DType, shape ...int) *Tensor { return NewTensor(nil, 0, d, shape...) }

func TestCostGemm(t *testing.T) {
	a := GemmArgs{X: shaped(F32, 5, 7), W: shaped(BF16, 11, 7), N0: 2, Bias: shaped(F32, 11),
		Gate: shaped(F32, 1, 3), Residual: shaped(F32, 5, 3), Y: shaped(F32, 5, 3)}
	want := Cost{BF16: 2 * 5 * 7 * 3, Bytes: 5*7*4 + 3*7*2 + 3*4 + 3*4 + 2*5*3*4}
	if got := a.Cost(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// The formula against a count of visible pairs, query by query.
func TestCostAttention(t *testing.T) {
	q, k := []int32{0, 3, 3, 10, 12}, []int32{0, 3, 5, 9, 17}
	for _, causal := range []bool{false, true} {
		pairs := 0
		for s := 0; s+1 < len(q); s++ {
			nq, nk := int(q[s+1]-q[s]), int(k[s+1]-k[s])
			for i := 0; i < nq; i++ {
				for j := 0; j < nk; j++ {
					if !causal || j <= nk-nq+i {
						pairs++
					}
				}
			}
		}
		a := AttentionArgs{Q: shaped(F32, 12, 6), K: shaped(F32, 17, 6), V: shaped(F32, 17, 6), O: shaped(F32, 12, 6),
			Heads: 2, Causal: causal, QOffHost: q, KOffHost: k}
		want := Cost{F32: int64(4 * pairs * 6), Bytes: 4 * 6 * (12 + 17 + 17 + 12)}
		if got := a.Cost(); got != want {
			t.Errorf("causal %v: %+v, want %+v", causal, got, want)
		}
	}
}

// One step of the head of MAR-B for 3 guided tokens, written out.
func TestCostHeadSteps(t *testing.T) {
	const n, ch, w, d, steps = 3, 16, 1024, 6, 4
	head := func(t DType) *HeadWeights {
		return &HeadWeights{Blocks: make([]HeadBlock, d), Ada: Matrix{W: shaped(t, (3*d+2)*w, w)}}
	}
	a := HeadStepsArgs{X: shaped(F32, n, ch), Cond: shaped(F32, 2*n, w), Time: shaped(F32, steps, w),
		Weights: head(BF16), Exact: head(F32), Steps: make([]StepCoef, steps), ExactStep: []bool{true, false, false, false},
		Guidance: shaped(F32, n)}
	ada, blocks := int64(2*2*n*20*w*w), int64(2*2*n*12*w*w)
	inOut := int64(2*n*w*ch + 2*n*w*2*ch + 2*n*w*ch) // input; conditional ε and v; unconditional ε
	got := a.Cost()
	if got.BF16 != 3*(ada+blocks) || got.F32 != ada+blocks+steps*inOut {
		t.Errorf("%+v, want bf16 %d, f32 %d", got, 3*(ada+blocks), ada+blocks+steps*inOut)
	}
	a.Guidance, a.Cond, a.ExactStep = nil, shaped(F32, n, w), nil
	got = a.Cost()
	if got.BF16 != steps*(ada+blocks)/2 || got.F32 != steps*2*n*w*3*ch {
		t.Errorf("without guidance %+v", got)
	}
	weights := int64(20*w*w*2 + steps*(12*w*w*2+3*ch*w*4)) // modulations once, the rest every step
	mods := int64(steps * n * 20 * w * 4 * 2)
	rest := int64(2*n*ch*4 + n*w*4 + steps*w*4)
	if got.Bytes != weights+mods+rest {
		t.Errorf("%d bytes, want %d", got.Bytes, weights+mods+rest)
	}
}

func TestCostRest(t *testing.T) {
	conv := Conv2DArgs{X: shaped(F32, 2, 8, 8, 4), W: shaped(F32, 6, 36), Y: shaped(F32, 2, 4, 4, 6), Kernel: 3, Stride: 2}
	if got, want := conv.Cost(), (Cost{F32: 2 * 2 * 16 * 6 * 36, Bytes: 4 * (2*64*4 + 6*36 + 2*16*6)}); got != want {
		t.Errorf("conv: %+v, want %+v", got, want)
	}
	rows := RowsArgs{Y: shaped(F32, 100, 4), A: shaped(BF16, 50, 4), IA: shaped(I32, 7), Count: 7}
	if got, want := rows.Cost(), (Cost{Bytes: 7*4*4 + 7*4*2 + 7*4}); got != want {
		t.Errorf("rows: %+v, want %+v", got, want)
	}
	c := Cost{1, 2, 3}
	if c.FLOPs() != 3 || c.Add(c) != (Cost{2, 4, 6}) || c.Add(c).Sub(c) != c {
		t.Error("arithmetic of costs")
	}
}
