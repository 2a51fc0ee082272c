package engine_test

import (
	"errors"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

func newCtx(t *testing.T) *engine.Ctx {
	t.Helper()
	c, err := engine.NewCtx(ref.New(ref.Rounded), engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestCtxRoundTrip(t *testing.T) {
	c := newCtx(t)
	x := c.F32([]float32{1, 2, 3, 4, 5, 6}, 2, 3)
	if got := c.Download(x.Slice(1, 3)); !slices.Equal(got, []float32{2, 3, 5, 6}) {
		t.Errorf("strided download %v", got)
	}
	b := c.New(engine.BF16, 3)
	c.Upload(b, []float32{1, 257, -3})
	if got := c.Download(b); !slices.Equal(got, []float32{1, 256, -3}) {
		t.Errorf("bf16 %v", got)
	}
	if e := c.F32(nil, 0, 4); c.Err() != nil || len(c.Download(e)) != 0 {
		t.Errorf("empty tensor: %v", c.Err())
	}
	if got := c.I32([]int32{4, 5}); got.DType != engine.I32 || got.Elems() != 2 {
		t.Errorf("%v", got)
	}
	if err := c.Sync(); err != nil {
		t.Error(err)
	}
}

// Shapes whose number of elements or bytes no int holds.
func TestCtxNewTooLarge(t *testing.T) {
	c := newCtx(t)
	for _, shape := range [][]int{{1 << 33, 1 << 31}, {1 << 61}, {1 << 21, 1 << 21, 1 << 21}, {-1}, {-2, -3}} {
		if x := c.New(engine.F32, shape...); x != nil || !errors.Is(c.ClearErr(), engine.Invalid) {
			t.Errorf("%v gave %v", shape, x)
		}
	}
	if x := c.New(engine.F32, 1<<40, 0); x == nil || x.Elems() != 0 {
		t.Errorf("an empty tensor: %v, %v", x, c.Err())
	}
}

func TestCtxStickyError(t *testing.T) {
	c := newCtx(t)
	x := c.F32([]float32{1, 2}, 1, 2)
	c.Gemm(engine.GemmArgs{X: x, W: x, Y: c.New(engine.F32, 1, 3)}) // 3 columns, W has 1 row
	first := c.Err()
	if !errors.Is(first, engine.Invalid) {
		t.Fatalf("%v", first)
	}
	y := c.New(engine.F32, 1, 2)
	c.Norm(engine.NormArgs{X: x, Y: y})
	c.Fail(errors.New("later"))
	if y != nil || c.Err() != first || c.Sync() != first || c.Download(x) != nil {
		t.Errorf("after an error: tensor %v, error %v", y, c.Err())
	}
	if c.ClearErr() != first || c.Err() != nil {
		t.Error("ClearErr")
	}
	if got := c.Download(x); len(got) != 2 {
		t.Error("not usable after ClearErr")
	}
	c.Upload(x, []float32{1})
	if !errors.Is(c.ClearErr(), engine.Invalid) {
		t.Error("upload of too few values")
	}
	c.Download(nil)
	if !errors.Is(c.ClearErr(), engine.Invalid) {
		t.Error("download of nothing")
	}
}

func TestCtxScoped(t *testing.T) {
	c := newCtx(t)
	before := c.Arena.Mark()
	c.Scoped(func() { c.New(engine.F32, 1000) })
	if c.Arena.Mark() != before || c.Arena.Peak() < 4000 {
		t.Errorf("scope: %+v, peak %d", c.Arena.Mark(), c.Arena.Peak())
	}
}

// TestUnimplemented shows that a stream with nothing but the embedded struct
// refuses every op by name.
func TestUnimplemented(t *testing.T) {
	u := engine.Unimplemented{DeviceName: "new"}
	for op, err := range map[engine.Op]error{
		engine.OpGemm: u.Gemm(engine.GemmArgs{}), engine.OpAttention: u.Attention(engine.AttentionArgs{}), engine.OpNorm: u.Norm(engine.NormArgs{}),
		engine.OpGatedAdd: u.GatedAdd(engine.GatedAddArgs{}), engine.OpRows: u.Rows(engine.RowsArgs{}), engine.OpCast: u.Cast(engine.CastArgs{}),
		engine.OpTimestepEmbedding: u.TimestepEmbedding(engine.TimestepEmbeddingArgs{}), engine.OpNormal: u.Normal(engine.NormalArgs{}),
		engine.OpDiffusionStep: u.DiffusionStep(engine.DiffusionStepArgs{}), engine.OpHeadSteps: u.HeadSteps(engine.HeadStepsArgs{}),
		engine.OpConv2D: u.Conv2D(engine.Conv2DArgs{}), engine.OpGroupNorm: u.GroupNorm(engine.GroupNormArgs{}), engine.OpPatchify: u.Patchify(engine.PatchifyArgs{}),
	} {
		var e *engine.Error
		if !errors.As(err, &e) || e.Kind != engine.Unsupported || e.Op != string(op) || e.Device != "new" {
			t.Errorf("%s: %v", op, err)
		}
	}
	var _ engine.Kernels = u
}
