package ref

import (
	"errors"
	"math"
	"strings"
	"testing"

	"margo/engine"
)

var devices = []Mode{Exact, Rounded}

// ctx is a context on a fresh device.
func ctx(t *testing.T, m Mode) *engine.Ctx {
	t.Helper()
	c, err := engine.NewCtx(New(m), engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// want compares a tensor with numbers worked out by hand.
func want(t *testing.T, c *engine.Ctx, x *engine.Tensor, tol float64, want ...float64) {
	t.Helper()
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	got, err := Float64s(x)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("%d values, want %d", len(got), len(want))
	}
	for i, w := range want {
		if !(math.Abs(got[i]-w) <= tol) {
			t.Errorf("[%d] is %v, want %v", i, got[i], w)
		}
	}
}

func TestGemm(t *testing.T) {
	for _, m := range devices {
		c := ctx(t, m)
		x := c.F32([]float32{1, 2, 3, 4}, 2, 2)
		w := c.F32([]float32{9, 9, 1, 0, 0, 1, 1, -1}, 4, 2)
		bias := c.F32([]float32{99, 10, 20, 30}, 4)
		gate := c.F32([]float32{1, 2, 3}, 1, 3)
		res := c.F32([]float32{100, 200, 300, 400, 500, 600}, 2, 3)
		y := c.New(engine.F32, 2, 3)
		c.Gemm(engine.GemmArgs{X: x, W: w, N0: 1, Bias: bias, Gate: gate, GateRows: 2, Residual: res, Y: y})
		want(t, c, y, 0, 100+11, 200+2*22, 300+3*29, 400+13, 500+2*24, 600+3*29)
	}
}

// TestGemmBF16 shows where rounding happens: 1+2^-9 is not a BF16.
func TestGemmBF16(t *testing.T) {
	v := float32(1 + 1.0/512 + 1.0/1024)
	for _, m := range devices {
		c := ctx(t, m)
		x := c.F32([]float32{v}, 1, 1)
		w := c.New(engine.BF16, 1, 1)
		c.Upload(w, []float32{1})
		p, err := c.Stream.Device().Pack(engine.PackArgs{W: w, DType: engine.BF16})
		if err != nil {
			t.Fatal(err)
		}
		y, yb := c.New(engine.F32, 1, 1), c.New(engine.BF16, 1, 1)
		c.Gemm(engine.GemmArgs{X: x, W: w, Y: y})
		c.Gemm(engine.GemmArgs{X: x, W: engine.NewTensor(nil, 0, engine.BF16, 1, 1), Packed: p, Y: yb})
		if m == Exact {
			want(t, c, y, 0, float64(v))
			want(t, c, yb, 0, float64(v))
		} else {
			want(t, c, y, 0, 1)
			want(t, c, yb, 0, 1)
		}
	}
}

func TestActivations(t *testing.T) {
	for _, tc := range []struct {
		a    engine.Activation
		want float64 // at 1.5
	}{{engine.Identity, 1.5}, {engine.GELUErf, 1.5 * 0.9331927987311419},
		{engine.GELUTanh, 1.39957}, {engine.SiLU, 1.5 / (1 + math.Exp(-1.5))}} {
		if got := act(tc.a, 1.5); math.Abs(got-tc.want) > 1e-5 {
			t.Errorf("%v(1.5) = %v, want %v", tc.a, got, tc.want)
		}
		if got := act(tc.a, float32(1.5)); math.Abs(float64(got)-tc.want) > 1e-5 {
			t.Errorf("%v(1.5) = %v in float32, want %v", tc.a, got, tc.want)
		}
	}
}

// TestAttention has two sequences of two heads of one column, the second
// without keys; weights are 1/4 and 3/4.
func TestAttention(t *testing.T) {
	ln3 := float32(math.Log(3))
	for _, causal := range []bool{false, true} {
		c := ctx(t, Exact)
		q := c.F32([]float32{1, 1, 1, -1, 5, 5}, 3, 2)
		k := c.F32([]float32{0, 0, ln3, ln3}, 2, 2)
		v := c.F32([]float32{4, 8, 8, 12}, 2, 2)
		o := c.New(engine.F32, 3, 2)
		off := [2][]int32{{0, 2, 3}, {0, 2, 2}}
		c.Attention(engine.AttentionArgs{Q: q, K: k, V: v, O: o, Heads: 2, Scale: 1, Causal: causal,
			QOff: c.I32(off[0]), KOff: c.I32(off[1]), QOffHost: off[0], KOffHost: off[1]})
		first := []float64{7, 11}
		if causal {
			first = []float64{4, 8}
		}
		want(t, c, o, 1e-6, first[0], first[1], 7, 9, 0, 0)
	}
}

func TestNorm(t *testing.T) {
	c := ctx(t, Exact)
	x := c.F32([]float32{1, 3, -5, 5}, 2, 2)
	y := c.New(engine.F32, 2, 2)
	c.Norm(engine.NormArgs{X: x, Y: y, Weight: c.F32([]float32{1, 2}, 2), Bias: c.F32([]float32{0, 1}, 2),
		Scale: c.F32([]float32{1, 1, 0, 0}, 2, 2), Shift: c.F32([]float32{0, 0, 10, 10}, 2, 2), ModRows: 1})
	want(t, c, y, 1e-12, -2, 6, 9, 13)

	// Two images of 1×2 pixels, 4 channels in 2 groups.
	g := c.F32([]float32{1, 3, 10, 10, 1, 3, 30, 30, 0, 0, 0, 0, 2, 2, 2, 2}, 2, 1, 2, 4)
	out := c.New(engine.F32, 2, 1, 2, 4)
	c.GroupNorm(engine.GroupNormArgs{X: g, Y: out, Groups: 2, Weight: c.F32([]float32{1, 1, 1, 2}, 4)})
	want(t, c, out, 1e-12, -1, 1, -1, -2, -1, 1, 1, 2, -1, -1, -1, -2, 1, 1, 1, 2)
}

func TestPointwise(t *testing.T) {
	c := ctx(t, Exact)
	x := c.F32([]float32{1, 2, 3, 4, 5, 6}, 3, 2)
	c.GatedAdd(engine.GatedAddArgs{X: x, H: c.F32([]float32{1, 1, 1, 1, 1, 1}, 3, 2),
		Gate: c.F32([]float32{10, 20, 30, 40}, 2, 2), GateRows: 2, Y: x})
	want(t, c, x, 0, 11, 22, 13, 24, 35, 46)

	y := c.New(engine.F32, 3, 2)
	c.Rows(engine.RowsArgs{Y: y, IY: c.I32([]int32{2, 0}), A: x, IA: c.I32([]int32{1, -1}),
		B: c.F32([]float32{100, 200}, 1, 2), IB: c.I32([]int32{-7, 0}), Count: 2})
	got, _ := Float64s(y)
	if got[2] == got[2] {
		t.Errorf("row 1 was not named and yet written: %v", got)
	}
	want(t, c, y.RowsAt(0, 1), 0, 100, 200)
	want(t, c, y.RowsAt(2, 3), 0, 13, 24)

	z := c.New(engine.F32, 3, 2)
	c.Cast(engine.CastArgs{X: x, Y: z, Scale: 2, Shift: 1})
	want(t, c, z, 0, 23, 45, 27, 49, 71, 93)
}

// TestPatchify follows one pixel of a 2×4 image with 2 channels and P = 2.
func TestPatchify(t *testing.T) {
	c := ctx(t, Exact)
	v := make([]float32, 16)
	for i := range v {
		v[i] = float32(i)
	}
	x, y, back := c.F32(v, 1, 2, 4, 2), c.New(engine.F32, 1, 2, 8), c.New(engine.F32, 1, 2, 4, 2)
	c.Patchify(engine.PatchifyArgs{X: x, Y: y, P: 2})
	// Token 1 is pixels x = 2, 3; channel 0 is even: (c, py, px).
	want(t, c, y, 0, 0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15)
	c.Patchify(engine.PatchifyArgs{X: back, Y: y, P: 2, Inverse: true})
	same, _ := Float64s(x)
	want(t, c, back, 0, same...)
}

// TestConv2D uses a 2×2 image of one channel.
func TestConv2D(t *testing.T) {
	c := ctx(t, Exact)
	x := c.F32([]float32{1, 2, 3, 4}, 1, 2, 2, 1)
	right := c.F32([]float32{0, 0, 0, 0, 0, 1, 0, 0, 0}, 1, 9) // the pixel to the right
	y := c.New(engine.F32, 1, 2, 2, 1)
	a := engine.Conv2DArgs{X: x, W: right, Bias: c.F32([]float32{10}, 1), Residual: c.F32([]float32{100, 200, 300, 400}, 1, 2, 2, 1),
		Y: y, Kernel: 3, Stride: 1, PadTop: 1, PadLeft: 1, PadBottom: 1, PadRight: 1}
	c.Conv2D(a)
	want(t, c, y, 0, 112, 210, 314, 410)

	up := c.New(engine.F32, 1, 4, 4, 1)
	c.Conv2D(engine.Conv2DArgs{X: x, W: right, Y: up, Kernel: 3, Stride: 1, PadTop: 1, PadLeft: 1, PadBottom: 1, PadRight: 1, Upsample: true})
	want(t, c, up, 0, 1, 2, 2, 0, 1, 2, 2, 0, 3, 4, 4, 0, 3, 4, 4, 0)

	down := c.New(engine.F32, 1, 1, 1, 1)
	first := c.F32([]float32{1, 10, 0, 100, 1000, 0, 0, 0, 0}, 1, 9)
	c.Conv2D(engine.Conv2DArgs{X: x, W: first, Y: down, Kernel: 3, Stride: 2, PadBottom: 1, PadRight: 1})
	want(t, c, down, 0, 1+20+300+4000)
}

func TestTimestepEmbedding(t *testing.T) {
	c := ctx(t, Exact)
	y := c.New(engine.F32, 2, 4)
	c.TimestepEmbedding(engine.TimestepEmbeddingArgs{T: c.F32([]float32{0, 7}, 2), Y: y, MaxPeriod: 10000})
	want(t, c, y, 1e-12, 1, 1, 0, 0, math.Cos(7), math.Cos(.07), math.Sin(7), math.Sin(.07))
}

func TestNormal(t *testing.T) {
	c := ctx(t, Exact)
	y := c.New(engine.F32, 2, 6)
	r := engine.RNG{Seed: 1<<40 + 3, Purpose: engine.PurposeStepNoise, Step: 9}
	c.Normal(engine.NormalArgs{Y: y, IDs: c.I32([]int32{5, 1, 0, 2}, 2, 2), RNG: r})
	var w []float64
	for _, id := range [][2]int{{5, 1}, {0, 2}} {
		for e := 0; e < 6; e++ {
			w = append(w, engine.NormalAt(r, e, id[0], id[1]))
		}
	}
	want(t, c, y, 1e-13, w...)
}

func TestDiffusionStep(t *testing.T) {
	c := ctx(t, Exact)
	x := c.F32([]float32{1, 2}, 2, 1)
	a := engine.DiffusionStepArgs{X: x, Y: x, Out: c.F32([]float32{3, 1, 5, -1, 1, 77, 1, 77}, 4, 2),
		Guidance: c.F32([]float32{2, 0}, 2), Noise: c.F32([]float32{1, -1}, 2, 1),
		Coef: engine.StepCoef{A: 10, B: 1, MinLog: 0, MaxLog: 2 * math.Ln2}, Temperature: 3}
	c.DiffusionStep(a)
	want(t, c, x, 1e-6, 10-5+2*3, 20-1-1*3)
	a.Coef.Last, a.Noise = true, nil
	c.DiffusionStep(a)
	want(t, c, x, 1e-6, 110-5, 160-1)
}

// TestHeadSteps works a head of width 1 and no blocks by hand: LayerNorm of one
// column is 0, so that out = Final·shift + bias.
func TestHeadSteps(t *testing.T) {
	c := ctx(t, Exact)
	lin := func(n, k int, w, b []float32) engine.Matrix {
		return engine.Matrix{W: c.F32(w, n, k), Bias: c.F32(b, n)}
	}
	h := &engine.HeadWeights{Input: lin(1, 1, []float32{1}, []float32{0}), Ada: lin(2, 1, []float32{1, 0}, []float32{0, 0}),
		Final: lin(2, 1, []float32{1, 0}, []float32{0, 1}), Eps: 1e-6}
	x, trace := c.F32([]float32{8}, 1, 1), c.New(engine.F32, 2, 1)
	a := engine.HeadStepsArgs{X: x, Cond: c.F32([]float32{1}, 1, 1), Time: c.F32([]float32{1, 3}, 2, 1), Weights: h,
		Steps: []engine.StepCoef{{A: 2, B: 1}, {A: 1, B: 1, Last: true}}, Noise: c.F32([]float32{0.5, 9}, 2, 1),
		Temperature: 1, Trace: trace}
	silu := func(v float64) float64 { return v / (1 + math.Exp(-v)) }
	c.HeadSteps(a)
	x1 := 16 - silu(2) + 0.5
	want(t, c, trace, 1e-12, x1, x1-silu(4))
	want(t, c, x, 1e-12, x1-silu(4))

	stop := uint32(1)
	a.Cancel = &stop
	if err := c.Stream.HeadSteps(a); !errors.Is(err, engine.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestMistakes(t *testing.T) {
	c := ctx(t, Rounded)
	d := c.Stream.Device()
	x := c.F32([]float32{1, 2}, 2, 1)
	free, _ := d.Alloc(64)
	gone := engine.NewTensor(free, 0, engine.F32, 2, 1)
	if err := free.Free(); err != nil {
		t.Fatal(err)
	}
	other, _ := New(Exact).Alloc(64)
	graph, err := c.Stream.Capture(func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	_ = graph.Close()
	closed, _ := d.NewStream()
	_ = closed.Close()
	for want, err := range map[string]error{
		"after its buffer was freed": c.Stream.Copy(gone, x),
		"freed twice":                free.Free(),
		"not in memory":              c.Stream.Copy(engine.NewTensor(other, 0, engine.F32, 2, 1), x),
		"never written":              c.Stream.Rows(engine.RowsArgs{Y: c.New(engine.F32, 1, 1), A: x, IA: c.New(engine.I32, 1), Count: 1}),
		"IA[0] is 2, want":           c.Stream.Rows(engine.RowsArgs{Y: c.New(engine.F32, 1, 1), A: x, IA: c.I32([]int32{2}), Count: 1}),
		"row 0 twice":                c.Stream.Rows(engine.RowsArgs{Y: c.New(engine.F32, 1, 1), A: x, IY: c.I32([]int32{0, 0}), Count: 2}),
		"graph is closed":            c.Stream.Launch(graph),
		"stream is closed":           closed.Fill(x, 1),
	} {
		var e *engine.Error
		if !errors.As(err, &e) || e.Device != "ref-rounded" || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error with %q, got %v", want, err)
		}
	}
	if _, err := d.Alloc(memory); !errors.Is(err, engine.OutOfMemory) {
		t.Errorf("all of memory: %v", err)
	}
}

func TestCapture(t *testing.T) {
	c := ctx(t, Exact)
	x, y := c.F32([]float32{1}, 1, 1), c.F32([]float32{1}, 1, 1)
	g, err := c.Stream.Capture(func() error {
		c.GatedAdd(engine.GatedAddArgs{X: x, H: y, Y: x})
		if err := c.Stream.Sync(); err == nil {
			t.Error("Sync inside Capture")
		}
		return c.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	want(t, c, x, 0, 1)
	for i := 0; i < 3; i++ {
		if err := c.Stream.Launch(g); err != nil {
			t.Fatal(err)
		}
	}
	want(t, c, x, 0, 4)
}
