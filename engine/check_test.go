package engine

import (
	"errors"
	"math"
	"strings"
	"testing"
)

// bag is a buffer of any size for arguments that are only looked at.
type bag int

func (b *bag) Bytes() int { return int(*b) }
func (b *bag) Free() error {
	return nil
}

func f32(shape ...int) *Tensor  { return typed(F32, shape...) }
func bf16(shape ...int) *Tensor { return typed(BF16, shape...) }
func i32(shape ...int) *Tensor  { return typed(I32, shape...) }

func typed(d DType, shape ...int) *Tensor {
	t := NewTensor(nil, 0, d, shape...)
	b := bag(t.Bytes())
	t.Buf = &b
	return t
}

// Good arguments, which the cases below spoil one by one.

func goodGemm() *GemmArgs {
	return &GemmArgs{X: f32(4, 6), W: bf16(9, 6), N0: 2, Bias: f32(9), Gate: f32(2, 5), GateRows: 3, Residual: f32(4, 5), Y: f32(4, 5)}
}

func goodAttention() *AttentionArgs {
	off := []int32{0, 2, 5}
	return &AttentionArgs{Q: bf16(5, 8), K: bf16(6, 8), V: bf16(6, 8), O: bf16(5, 8), Heads: 2, Scale: 1,
		QOff: i32(3), KOff: i32(3), QOffHost: off, KOffHost: []int32{1, 1, 6}}
}

func goodNorm() *NormArgs {
	return &NormArgs{X: f32(5, 4), Y: bf16(5, 4), Weight: f32(4), Bias: f32(4), Scale: f32(2, 4), Shift: f32(2, 4), ModRows: 3}
}

func goodRows() *RowsArgs {
	return &RowsArgs{Y: f32(5, 4), A: bf16(2, 4), B: f32(3, 4), IY: i32(3), IA: i32(3), Count: 3}
}

func goodStep() *DiffusionStepArgs {
	return &DiffusionStepArgs{X: f32(3, 2), Y: f32(3, 2), Out: f32(6, 4), Guidance: f32(3), IDs: i32(3, 2),
		RNG: RNG{Purpose: PurposeStepNoise}, Temperature: 1}
}

func goodHead() *HeadStepsArgs {
	w := func(d DType) *HeadWeights {
		lin := func(d DType, n, k int) Matrix { return Matrix{W: typed(d, n, k), Bias: f32(n)} }
		return &HeadWeights{Input: lin(F32, 8, 2), Final: lin(F32, 4, 8), Ada: lin(d, 5*8, 8), Eps: 1e-6,
			Blocks: []HeadBlock{{NormWeight: f32(8), NormBias: f32(8), Fc1: lin(d, 8, 8), Fc2: lin(d, 8, 8)}}}
	}
	return &HeadStepsArgs{X: f32(3, 2), Cond: f32(6, 8), Time: f32(2, 8), Weights: w(BF16), Exact: w(F32), Steps: make([]StepCoef, 2),
		ExactStep: []bool{true, false}, Guidance: f32(3), IDs: i32(3, 2), RNG: RNG{Purpose: PurposeStepNoise}, Trace: f32(6, 2)}
}

func goodConv() *Conv2DArgs {
	return &Conv2DArgs{X: f32(2, 4, 5, 3), W: bf16(7, 27), Bias: f32(7), Residual: f32(2, 8, 10, 7), Y: f32(2, 8, 10, 7),
		Kernel: 3, Stride: 1, PadTop: 1, PadLeft: 1, PadBottom: 1, PadRight: 1, Upsample: true}
}

func goodGroupNorm() *GroupNormArgs {
	return &GroupNormArgs{X: f32(2, 3, 4, 6), Y: bf16(2, 3, 4, 6), Weight: f32(6), Bias: f32(6), Groups: 3}
}

func goodPatchify() *PatchifyArgs {
	return &PatchifyArgs{X: f32(2, 4, 6, 3), Y: f32(2, 6, 12), P: 2}
}

// TestCheck spoils one thing at a time; the message must name it.
func TestCheck(t *testing.T) {
	gemm := func(f func(a *GemmArgs)) error { a := goodGemm(); f(a); return a.Check() }
	attention := func(f func(a *AttentionArgs)) error { a := goodAttention(); f(a); return a.Check() }
	norm := func(f func(a *NormArgs)) error { a := goodNorm(); f(a); return a.Check() }
	rows := func(f func(a *RowsArgs)) error { a := goodRows(); f(a); return a.Check() }
	step := func(f func(a *DiffusionStepArgs)) error { a := goodStep(); f(a); return a.Check() }
	head := func(f func(a *HeadStepsArgs)) error { a := goodHead(); f(a); return a.Check() }
	conv := func(f func(a *Conv2DArgs)) error { a := goodConv(); f(a); return a.Check() }
	group := func(f func(a *GroupNormArgs)) error { a := goodGroupNorm(); f(a); return a.Check() }
	patch := func(f func(a *PatchifyArgs)) error { a := goodPatchify(); f(a); return a.Check() }
	nan := math.NaN()

	for _, c := range []struct {
		op   Op
		err  error
		want string // "": no error
	}{
		{OpGemm, gemm(func(a *GemmArgs) {}), ""},
		{OpGemm, gemm(func(a *GemmArgs) { a.Residual = a.Y }), ""},
		{OpGemm, gemm(func(a *GemmArgs) { a.W.Buf, a.Packed = nil, packedBlock{} }), ""},
		{OpGemm, gemm(func(a *GemmArgs) { a.Bias, a.Gate, a.Residual = nil, nil, nil }), ""},
		{OpGemm, gemm(func(a *GemmArgs) { a.X, a.Y, a.Gate, a.Residual = f32(0, 6), f32(0, 5), nil, nil }), ""},
		{OpGemm, gemm(func(a *GemmArgs) { a.X = nil }), "X is nil"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y = nil }), "Y is nil"},
		{OpGemm, gemm(func(a *GemmArgs) { a.W.Buf = nil }), "W has no buffer"},
		{OpGemm, gemm(func(a *GemmArgs) { a.X = i32(4, 6) }), "X is i32, want f32 or bf16"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Bias = bf16(9) }), "Bias is bf16, want f32"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Bias = f32(5) }), "Bias elements: 5, want 9"},
		{OpGemm, gemm(func(a *GemmArgs) { a.X = f32(4, 7) }), "X is 4×7, want 4×6"},
		{OpGemm, gemm(func(a *GemmArgs) { a.N0 = 5 }), "N0 5 and 5 columns of Y leave the 9 rows of W"},
		{OpGemm, gemm(func(a *GemmArgs) { a.N0 = -1 }), "N0 -1"},
		{OpGemm, gemm(func(a *GemmArgs) { a.N0 = math.MaxInt - 2 }), "leave the 9 rows of W"},
		{OpGemm, gemm(func(a *GemmArgs) { a.GateRows = math.MaxInt }), ""},
		{OpGemm, gemm(func(a *GemmArgs) { a.Gate, a.GateRows = f32(0, 5), math.MaxInt }), "Gate has 0 rows"},
		// Products that an int cannot hold: 2^64 elements, 2^63 bytes, a stride of 2^62.
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.Shape, a.Y.RowStride = []int{1 << 33, 1 << 31}, 1<<31 }), "Y takes bytes"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.Shape, a.Y.RowStride = []int{1 << 31, 1 << 30}, 1<<30 }), "Y takes bytes"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.RowStride = 1 << 62 }), "Y takes bytes"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.Off = math.MaxInt - 3 }), "Y takes bytes"},
		{OpGemm, gemm(func(a *GemmArgs) { a.X.Shape = []int{1 << 40, 1 << 40, 6} }), "X takes bytes"},
		{OpGemm, gemm(func(a *GemmArgs) { a.GateRows = 0 }), "GateRows is 0, want at least 1 with Gate"},
		{OpGemm, gemm(func(a *GemmArgs) { a.GateRows = 1 }), "Gate has 2 rows, 4 rows in groups of 1 need 4"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Gate = f32(2, 6) }), "Gate is 2×6, want 2×5"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Residual = f32(5, 4) }), "Residual is 5×4"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Act = 9 }), "Act is 9"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.Off = 4 }), "Y takes bytes 4 to 84 of a buffer of 80"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.Off = -4 }), "Y takes bytes -4"},
		{OpGemm, gemm(func(a *GemmArgs) { b := bag(100); a.Y.Buf, a.Y.Off = &b, 2 }), "Y starts at byte 2, not a multiple of 4"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.RowStride = 4 }), "Y has row stride 4 for 5 columns"},
		{OpGemm, gemm(func(a *GemmArgs) { a.Y.Shape = []int{-4, 5} }), "Y has a negative dimension"},
		{OpGemm, gemm(func(a *GemmArgs) { b := bag(400); a.X.Buf, a.Y.Buf, a.Y.Off = &b, &b, 92 }), "Y overlaps X"},
		{OpGemm, gemm(func(a *GemmArgs) { b := bag(400); a.X.Buf, a.Y.Buf, a.Y.Off = &b, &b, 96 }), ""},
		{OpGemm, gemm(func(a *GemmArgs) { b := bag(400); a.Residual.Buf, a.Y.Buf, a.Y.Off = &b, &b, 4 }), "Y overlaps Residual"},

		{OpAttention, attention(func(a *AttentionArgs) {}), ""},
		{OpAttention, attention(func(a *AttentionArgs) {
			a.QOffHost, a.KOffHost, a.QOff, a.KOff = []int32{0}, []int32{0}, i32(1), i32(1)
		}), ""},
		{OpAttention, attention(func(a *AttentionArgs) { qkv := bf16(6, 24); a.K, a.V = qkv.Slice(8, 16), qkv.Slice(16, 24) }), ""},
		{OpAttention, attention(func(a *AttentionArgs) {
			qkv := bf16(6, 24)
			a.K, a.O = qkv.Slice(8, 16), qkv.Slice(16, 24).RowsAt(0, 5)
		}), ""},
		{OpAttention, attention(func(a *AttentionArgs) {
			qkv := bf16(6, 24)
			a.K, a.O = qkv.Slice(8, 16), qkv.Slice(15, 23).RowsAt(0, 5)
		}), "O overlaps K"},
		{OpAttention, attention(func(a *AttentionArgs) { qkv := bf16(6, 24); a.K, a.O = qkv.Slice(8, 16), qkv.Slice(1, 9).RowsAt(1, 6) }), "O overlaps K"},
		{OpAttention, attention(func(a *AttentionArgs) { a.V = f32(6, 8) }), "different dtypes"},
		{OpAttention, attention(func(a *AttentionArgs) { a.Heads = 3 }), "8 columns for 3 heads"},
		{OpAttention, attention(func(a *AttentionArgs) { a.Heads = 0 }), "Heads: 0"},
		{OpAttention, attention(func(a *AttentionArgs) { a.Scale = float32(nan) }), "Scale is NaN"},
		{OpAttention, attention(func(a *AttentionArgs) { a.V = bf16(7, 8) }), "V is 7×8, want 6×8"},
		{OpAttention, attention(func(a *AttentionArgs) { a.O = bf16(4, 8) }), "O is 4×8"},
		{OpAttention, attention(func(a *AttentionArgs) { a.QOff = nil }), "QOff is nil"},
		{OpAttention, attention(func(a *AttentionArgs) { a.QOffHost = nil }), "QOffHost length: 0"},
		{OpAttention, attention(func(a *AttentionArgs) { a.QOffHost[1] = 6 }), "QOffHost[1] is 6"},
		{OpAttention, attention(func(a *AttentionArgs) { a.KOffHost[2] = 0 }), "KOffHost[2] is 0 after 1"},
		{OpAttention, attention(func(a *AttentionArgs) { a.KOff, a.KOffHost = i32(2), []int32{0, 6} }), "KOffHost length: 2, want 3"},
		{OpAttention, attention(func(a *AttentionArgs) { a.KOff = i32(2) }), "KOff elements: 2, want 3"},
		{OpAttention, attention(func(a *AttentionArgs) { a.Blocks, a.BlockSize = i32(2, 3), 2 }), ""},
		{OpAttention, attention(func(a *AttentionArgs) { a.Blocks, a.BlockSize = i32(2, 2), 2 }), "sequence 1 has 5 keys, its 2 blocks of 2 hold 4"},
		{OpAttention, attention(func(a *AttentionArgs) { a.Blocks, a.BlockSize, a.K, a.V = i32(2, 3), 2, bf16(0, 8), bf16(0, 8) }), "sequence 1 has 5 keys, K has no block"},

		{OpNorm, norm(func(a *NormArgs) {}), ""},
		{OpNorm, norm(func(a *NormArgs) { a.Weight = f32(5) }), "Weight elements: 5"},
		{OpNorm, norm(func(a *NormArgs) { a.Shift = f32(1, 4) }), "Shift has 1 rows"},
		{OpNorm, norm(func(a *NormArgs) { a.ModRows = 0 }), "ModRows is 0"},
		{OpNorm, norm(func(a *NormArgs) { a.X = f32(5, 3) }), "X is 5×3"},
		{OpNorm, norm(func(a *NormArgs) { a.Y = a.X }), "Y overlaps X"},
		{OpNorm, NormArgs{X: f32(3, 0), Y: f32(3, 0)}.Check(), "columns: 0"},

		{OpGatedAdd, GatedAddArgs{X: f32(3, 2), H: bf16(3, 2), Y: f32(3, 2)}.Check(), ""},
		{OpGatedAdd, GatedAddArgs{X: bf16(3, 2), H: bf16(3, 2), Y: f32(3, 2)}.Check(), "X is bf16"},
		{OpGatedAdd, GatedAddArgs{X: f32(3, 2), H: bf16(3, 2), Y: f32(3, 2), Gate: f32(3, 2)}.Check(), "GateRows is 0"},

		{OpRows, rows(func(a *RowsArgs) {}), ""},
		{OpRows, rows(func(a *RowsArgs) { a.IA = nil }), "A rows: 2, want at least 3"},
		{OpRows, rows(func(a *RowsArgs) { a.IY = i32(4) }), "IY elements: 4, want 3"},
		{OpRows, rows(func(a *RowsArgs) { a.IA = f32(3) }), "IA is f32"},
		{OpRows, rows(func(a *RowsArgs) { a.B = f32(3, 5) }), "B columns: 5"},
		{OpRows, rows(func(a *RowsArgs) { a.Count = -1 }), "Count: -1"},
		{OpRows, rows(func(a *RowsArgs) { a.A = nil }), "A is nil"},

		{OpCast, CastArgs{X: f32(2, 3), Y: bf16(3, 2)}.Check(), "X is 2×3, want 3×2"},
		{OpCast, CastArgs{X: f32(2, 3), Y: bf16(2, 3)}.Check(), ""},
		{OpTimestepEmbedding, TimestepEmbeddingArgs{T: f32(3), Y: f32(3, 4), MaxPeriod: 10}.Check(), ""},
		{OpTimestepEmbedding, TimestepEmbeddingArgs{T: f32(3), Y: f32(3, 5), MaxPeriod: 10}.Check(), "5 columns, want an even number"},
		{OpTimestepEmbedding, TimestepEmbeddingArgs{T: f32(3), Y: f32(3, 4)}.Check(), "MaxPeriod is 0"},
		{OpTimestepEmbedding, TimestepEmbeddingArgs{T: f32(2), Y: f32(3, 4), MaxPeriod: 10}.Check(), "T elements: 2"},
		{OpNormal, NormalArgs{Y: f32(3, 4), IDs: i32(3, 2), RNG: RNG{Purpose: PurposeTest}}.Check(), ""},
		{OpNormal, NormalArgs{Y: f32(3, 4), IDs: i32(3, 2)}.Check(), "RNG.Purpose is 0"},
		{OpNormal, NormalArgs{Y: f32(3, 4), IDs: i32(3, 2), RNG: RNG{Purpose: 1, Step: 1 << 24}}.Check(), "RNG.Step"},
		{OpNormal, NormalArgs{Y: f32(3, 4), IDs: i32(3), RNG: RNG{Purpose: 1}}.Check(), "IDs is 1×3, want 3×2"},

		{OpDiffusionStep, step(func(a *DiffusionStepArgs) {}), ""},
		{OpDiffusionStep, step(func(a *DiffusionStepArgs) { a.Y = a.X }), ""},
		{OpDiffusionStep, step(func(a *DiffusionStepArgs) { a.IDs, a.Coef.Last = nil, true }), ""},
		{OpDiffusionStep, step(func(a *DiffusionStepArgs) { a.IDs = nil }), "neither Noise nor IDs"},
		{OpDiffusionStep, step(func(a *DiffusionStepArgs) { a.Guidance = nil }), "Out is 6×4, want 3×4"},
		{OpDiffusionStep, step(func(a *DiffusionStepArgs) { a.Coef.B = nan }), "Coef is not finite"},
		{OpDiffusionStep, step(func(a *DiffusionStepArgs) { a.Noise = f32(3, 3) }), "Noise is 3×3"},

		{OpHeadSteps, head(func(a *HeadStepsArgs) {}), ""},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.ExactStep, a.Exact = nil, nil }), ""},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Exact = nil }), "Exact is nil"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Exact = a.Weights }), "Exact weights are bf16"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.ExactStep = []bool{true} }), "ExactStep length: 1"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Weights.Blocks[0].Fc2.W = bf16(8, 9) }), "Weights.Blocks[0].Fc2.W is 8×9"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Weights.Blocks[0].NormBias = nil }), "Weights.Blocks[0].NormWeight or NormBias is nil"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Weights.Blocks[0].Fc1.W = f32(8, 8) }), "Weights mixes dtypes"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Weights.Final.W = bf16(4, 8) }), "must be f32"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Weights.Ada.W = bf16(24, 8) }), "Weights.Ada.W is 24×8, want 40×8"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Weights.Input.W = nil }), "Weights.Input.W is nil"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Time = f32(3, 8) }), "Time is 3×8, want 2×8"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Guidance = nil }), "Cond is 6×8, want 3×8"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Trace = f32(3, 2) }), "Trace is 3×2"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Steps[1].MinLog = nan }), "Steps[1] is not finite"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.IDs = nil }), "neither Noise nor IDs"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.RNG.Step = 1<<24 - 1 }), "RNG.Step"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.RNG.Step = math.MaxInt }), "RNG.Step"},
		{OpHeadSteps, head(func(a *HeadStepsArgs) { a.Scratch = -1 }), "Scratch: -1"},

		{OpConv2D, conv(func(a *Conv2DArgs) {}), ""},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.Residual = a.Y }), ""},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.Kernel = 2 }), "Kernel is 2"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.Stride = 0 }), "Stride is 0"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.PadLeft = 3 }), "padding 1,3,1,1, want 0 to 2"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.Upsample = false }), "height of Y: 8, want 4"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.PadRight = 0 }), "width of Y: 10, want 9"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.W = bf16(7, 28) }), "W is 7×28, want 7×27"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.X = f32(40, 3) }), "dimensions of X: 2, want 4"},
		{OpConv2D, conv(func(a *Conv2DArgs) { a.Bias = f32(6) }), "Bias elements: 6"},

		{OpGroupNorm, group(func(a *GroupNormArgs) {}), ""},
		{OpGroupNorm, group(func(a *GroupNormArgs) { a.Groups = 4 }), "6 channels in 4 groups"},
		{OpGroupNorm, group(func(a *GroupNormArgs) { a.Groups = 0 }), "6 channels in 0 groups"},
		{OpGroupNorm, group(func(a *GroupNormArgs) { a.X = f32(24, 6) }), "dimensions of X: 2"},
		{OpGroupNorm, group(func(a *GroupNormArgs) { a.Y = f32(2, 3, 5, 6) }), "Y is 30×6, want 24×6"},

		{OpPatchify, patch(func(a *PatchifyArgs) {}), ""},
		{OpPatchify, patch(func(a *PatchifyArgs) { a.P = 0 }), "P: 0"},
		{OpPatchify, patch(func(a *PatchifyArgs) { a.P = 3 }), "4×6 pixels are not whole patches of 3"},
		{OpPatchify, patch(func(a *PatchifyArgs) { a.Y = f32(2, 5, 12) }), "tokens of Y: 5, want 6"},
		{OpPatchify, patch(func(a *PatchifyArgs) { a.Y = f32(12, 12) }), "dimensions of Y: 2"},

		{"pack", PackArgs{W: f32(2, 3), DType: BF16}.Check(), ""},
		{"pack", PackArgs{W: f32(2, 3), DType: I32}.Check(), "DType is i32"},
		{"pack", PackArgs{}.Check(), "W is nil"},
		{"pack", PackArgs{W: f32(2, 3), DType: BF16, FP8: true}.Check(), ""},
		{"pack", PackArgs{W: f32(2, 3), DType: F32, FP8: true}.Check(), "DType of a W in FP8 is f32, want bf16"},
		{"fill", CheckFill(i32(3)), ""},
		{"copy", CheckCopy(f32(3, 2), f32(2, 3)), "src is 2×3"},
		{"copy", CheckCopy(f32(3, 2), bf16(3, 2)), "different dtypes"},
		{"copy in", CheckHostCopy("copy in", f32(3), make([]byte, 11)), "host bytes: 11, want 12"},
		{"copy out", CheckHostCopy("copy out", f32(3, 4).Slice(0, 2), make([]byte, 24)), "gaps between its rows (row stride 4)"},
	} {
		if c.want == "" {
			if c.err != nil {
				t.Errorf("%v", c.err)
			}
			continue
		}
		var e *Error
		if !errors.As(c.err, &e) || e.Kind != Invalid || e.Op != string(c.op) || !strings.Contains(e.Error(), c.want) {
			t.Errorf("error is %v, want one of %s with %q", c.err, c.op, c.want)
		}
	}
}

// TestCheckNil gives every op nothing at all.
func TestCheckNil(t *testing.T) {
	for _, a := range []interface{ Check() error }{GemmArgs{}, AttentionArgs{}, NormArgs{}, GatedAddArgs{}, RowsArgs{}, CastArgs{},
		TimestepEmbeddingArgs{}, NormalArgs{}, DiffusionStepArgs{}, HeadStepsArgs{}, Conv2DArgs{}, GroupNormArgs{}, PatchifyArgs{}, PackArgs{}} {
		if err := a.Check(); !errors.Is(err, Invalid) || !strings.Contains(err.Error(), "is nil") {
			t.Errorf("%T: %v", a, err)
		}
	}
}

// TestCheckShapes shows that messages tell the shapes involved.
func TestCheckShapes(t *testing.T) {
	a := goodGemm()
	a.N0 = 7
	if got, want := a.Check().Error(), "gemm [X f32[4,6], W bf16[9,6], Y f32[4,5], Gate f32[2,5], Residual f32[4,5], Bias f32[9]]: N0 7 and 5 columns"; !strings.HasPrefix(got, want) {
		t.Errorf("%s, want %s…", got, want)
	}
}

// BenchmarkCheck is what a device pays on entry.
func BenchmarkCheck(b *testing.B) {
	a := goodGemm()
	b.ReportAllocs()
	for b.Loop() {
		if err := a.Check(); err != nil {
			b.Fatal(err)
		}
	}
}
