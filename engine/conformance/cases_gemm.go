package conformance

import (
	"fmt"
	"math"

	"margo/engine"
)

// gemm is a case of Gemm. Weights have σ = 1/√K, so that results have σ = 1.
type gemm struct {
	m, n, k  int
	x, w, y  engine.DType
	note     string // what is special, for the name
	act      engine.Activation
	bias     bool
	gateRows int // 0: no gate
	residual int // 0: none, 1: another tensor, 2: Y itself
	n0, more int // first column, and rows of W beyond the last
	gap      int
	unpacked bool
	wideW    bool // BF16 weight packed from an F32 tensor
	exact    bool
	nan      bool
	raw      bool // an F32 X for a BF16 W that has to be rounded
	bench    bool
	large    bool
	huge     bool
}

func (g gemm) name() string {
	s := fmt.Sprintf("gemm/%v/%dx%dx%d", g.w, g.m, g.n, g.k)
	if g.x != g.w {
		s += fmt.Sprintf(" x=%v", g.x)
	}
	if g.y != engine.F32 {
		s += fmt.Sprintf(" y=%v", g.y)
	}
	if g.note != "" {
		s += " " + g.note
	}
	return s
}

func (g gemm) cases() *Case {
	return &Case{Name: g.name(), Op: engine.OpGemm, DType: g.w, Bench: g.bench || g.large, Large: g.large, Huge: g.huge, exact: g.exact, build: g.build}
}

func (g gemm) build(e *env) work {
	x, w, rest := bell(1), bell(1/math.Sqrt(float64(max(g.k, 1)))), bell(1)
	if g.exact {
		// Products of X (13 bits in F32) and W (3 bits) sum without rounding.
		x, w, rest = odd(2000), integers(4), integers(64)
		if g.x == engine.BF16 {
			x = integers(100)
		}
	} else if !g.raw && g.w == engine.BF16 {
		x = x.toBF16()
	}
	if g.nan {
		x = x.with(map[int]float32{g.k + 1: nan, 3*g.k + 2: inf, 5 * g.k: -inf})
	}
	e.gap = g.gap
	a := engine.GemmArgs{N0: g.n0, Act: g.act, GateRows: g.gateRows,
		X: e.operand("X", g.x, g.w, x, g.m, g.k)}
	rows := g.n0 + g.n + g.more
	switch {
	case g.unpacked:
		a.W = e.in("W", g.w, w, rows, g.k)
	case g.wideW:
		a.W, a.Packed = e.packed("W", g.w, engine.F32, w.toBF16(), rows, g.k)
		a.W = engine.NewTensor(a.W.Buf, a.W.Off, g.w, rows, g.k)
	default:
		a.W, a.Packed = e.packed("W", g.w, g.w, w, rows, g.k)
	}
	if g.bias {
		a.Bias = e.in("Bias", engine.F32, rest, rows)
	}
	if g.gateRows > 0 {
		a.Gate = e.in("Gate", engine.F32, rest, (g.m+g.gateRows-1)/g.gateRows, g.n)
	}
	if g.residual == 2 {
		a.Y = e.inout("Y", g.y, rest, g.m, g.n)
		a.Residual = a.Y
	} else {
		a.Y = e.out("Y", g.y, g.m, g.n)
	}
	if g.residual == 1 {
		a.Residual = e.in("Residual", engine.F32, rest, g.m, g.n)
	}
	return work{cost: a.Cost(), n: g.m, grain: max(g.gateRows, 1),
		run: func(s engine.Stream) error { return s.Gemm(a) },
		part: func(s engine.Stream, lo, hi int) error {
			b := a
			b.X, b.Y, b.Residual = a.X.RowsAt(lo, hi), a.Y.RowsAt(lo, hi), rowsAt(a.Residual, lo, hi)
			b.Gate = groupsAt(a.Gate, a.GateRows, lo, hi)
			return s.Gemm(b)
		}}
}

// rowsAt is Tensor.RowsAt of a tensor that may be nil.
func rowsAt(t *engine.Tensor, lo, hi int) *engine.Tensor {
	if t == nil {
		return nil
	}
	return t.RowsAt(lo, hi)
}

// groupsAt are the rows of a gate or modulation for rows lo … hi-1, per of
// which share one.
func groupsAt(t *engine.Tensor, per, lo, hi int) *engine.Tensor {
	if t == nil {
		return nil
	}
	return t.RowsAt(lo/per, (hi+per-1)/per)
}

func gemmCases() (cs []*Case) {
	const f32, bf16 = engine.F32, engine.BF16
	add := func(g gemm) { cs = append(cs, g.cases()) }
	for _, w := range []engine.DType{f32, bf16} {
		// Shapes, with the epilogues that a plain linear layer has.
		for _, s := range [][3]int{{0, 8, 8}, {1, 1, 1}, {1, 33, 7}, {5, 7, 0}, {7, 0, 5}, {2, 31, 64}, {3, 65, 33},
			{8, 64, 1}, {12, 96, 129}, {33, 7, 203}, {113, 203, 71}, {16, 40, 1153}, {129, 32, 16}, {1000, 3, 20}, {700, 33, 9}} {
			add(gemm{m: s[0], n: s[1], k: s[2], x: w, w: w, y: f32, bias: true, note: "bias"})
		}
		// Dtypes of X and Y.
		for _, x := range []engine.DType{f32, bf16} {
			for _, y := range []engine.DType{f32, bf16} {
				add(gemm{m: 37, n: 75, k: 67, x: x, w: w, y: y, bias: true, act: engine.SiLU, gap: 5, note: "bias silu strided"})
			}
		}
		// Epilogues.
		for _, act := range []engine.Activation{engine.Identity, engine.GELUErf, engine.GELUTanh, engine.SiLU} {
			add(gemm{m: 21, n: 70, k: 48, x: w, w: w, y: w, act: act, note: act.String() + " alone"})
			for residual, rname := range []string{"", " residual", " residual=y"} {
				for _, gate := range []int{0, 1, 5, 21} {
					if act != engine.Identity && gate == 5 || residual == 2 && gate == 21 {
						continue
					}
					add(gemm{m: 21, n: 70, k: 48, x: w, w: w, y: f32, act: act, bias: true, residual: residual, gateRows: gate,
						gap: 3 * (gate & 1), note: fmt.Sprintf("bias %v gate/%d%s", act, gate, rname)})
				}
			}
		}
		add(gemm{m: 9, n: 40, k: 32, x: w, w: w, y: bf16, bias: true, gateRows: 3, residual: 1, note: "bias gate residual"})
		// A range of columns.
		for _, r := range [][3]int{{0, 32, 64}, {32, 64, 0}, {1, 30, 2}, {31, 33, 7}, {40, 7, 0}} {
			add(gemm{m: 11, n: r[1], k: 50, n0: r[0], more: r[2], x: w, w: w, y: f32, bias: true, gateRows: 2, residual: 1, gap: 1,
				note: fmt.Sprintf("columns %d..%d of %d", r[0], r[0]+r[1], r[0]+r[1]+r[2])})
		}
		add(gemm{m: 10, n: 45, k: 37, x: w, w: w, y: f32, bias: true, gap: 3, unpacked: true, note: "unpacked"})
		add(gemm{m: 10, n: 45, k: 37, n0: 3, more: 4, x: f32, w: w, y: f32, unpacked: true, note: "unpacked columns"})
		// Exact data: sums that any order and any correct rounding get right.
		for _, x := range []engine.DType{f32, bf16} {
			for _, y := range []engine.DType{f32, bf16} {
				add(gemm{m: 19, n: 77, k: 101, x: x, w: w, y: y, bias: true, gateRows: 4, residual: 1, exact: true, note: "exact"})
				add(gemm{m: 8, n: 64, k: 64, x: x, w: w, y: y, exact: true, note: "exact plain"})
			}
		}
		for _, m := range []int{1, 2, 3, 4, 6, 9, 14, 17, 31} { // remainders of any row tile
			add(gemm{m: m, n: 48, k: 39, x: w, w: w, y: w, bias: true, exact: true, note: "exact rows"})
		}
		add(gemm{m: 7, n: 40, k: 33, x: w, w: w, y: f32, bias: true, nan: true, note: "nan"})
		add(gemm{m: 7, n: 40, k: 33, x: f32, w: w, y: bf16, bias: true, nan: true, residual: 1, gateRows: 1, note: "nan"})
		// Real shapes: MAR-B's trunk and head.
		add(gemm{m: 320, n: 2304, k: 768, x: w, w: w, y: w, bias: true, bench: true, note: "trunk qkv"})
		add(gemm{m: 77, n: 768, k: 3072, x: w, w: w, y: f32, bias: true, residual: 2, bench: true, note: "trunk fc2"})
		add(gemm{m: 8, n: 1024, k: 1024, x: w, w: w, y: w, bias: true, act: engine.SiLU, bench: true, note: "head fc1"})
		add(gemm{m: 8, n: 1024, k: 1024, x: w, w: w, y: f32, bias: true, gateRows: 1, residual: 2, bench: true, note: "head fc2"})
		for _, l := range []gemm{
			{m: 1280, n: 3072, k: 768, y: w, act: engine.GELUErf, note: "trunk fc1, 4 images"},
			{m: 1280, n: 768, k: 3072, y: f32, residual: 2, note: "trunk fc2, 4 images"},
			{m: 320, n: 3072, k: 768, y: w, act: engine.GELUErf, note: "trunk fc1"},
			{m: 1, n: 1024, k: 1024, y: f32, note: "head, 1 row"},
			{m: 32, n: 1024, k: 1024, y: w, act: engine.SiLU, note: "head fc1"},
			{m: 256, n: 1024, k: 1024, y: w, act: engine.SiLU, note: "head fc1"},
			{m: 32, n: 20480, k: 1024, y: f32, note: "head modulations"},
			{m: 1280, n: 4096, k: 1024, y: w, act: engine.GELUErf, note: "MAR-L fc1, 4 images"},
		} {
			l.x, l.w, l.bias, l.large = w, w, true, true
			add(l)
		}
		for _, l := range []gemm{
			{m: 20480, n: 2304, k: 768, y: w, note: "trunk qkv, 32 images"},
			{m: 20480, n: 768, k: 768, y: f32, residual: 2, note: "trunk proj, 32 images"},
			{m: 20480, n: 3072, k: 768, y: w, act: engine.GELUErf, note: "trunk fc1, 32 images"},
			{m: 20480, n: 768, k: 3072, y: f32, residual: 2, note: "trunk fc2, 32 images"},
			{m: 512, n: 1024, k: 1024, y: w, act: engine.SiLU, note: "head fc1, 64 images"},
			{m: 512, n: 1024, k: 1024, y: f32, gateRows: 1, residual: 2, note: "head fc2, 64 images"},
			{m: 5120, n: 20480, k: 1024, y: f32, note: "head modulations, 64 images"},
			{m: 4096, n: 4096, k: 4096, y: w, note: "square"},
		} {
			l.x, l.w, l.bias, l.large, l.huge = w, w, true, true, true
			add(l)
		}
	}
	// More steps of k than stages of a pipeline, rows aligned to 16 bytes, and a last step of one unit or of part of one.
	add(gemm{m: 45, n: 75, k: 840, x: bf16, w: bf16, y: f32, exact: true, note: "exact long sums"})
	add(gemm{m: 45, n: 75, k: 837, x: bf16, w: bf16, y: f32, gap: 3, unpacked: true, exact: true, note: "exact long sums"})
	add(gemm{m: 29, n: 83, k: 117, x: f32, w: bf16, y: f32, raw: true, bias: true, note: "operand to be rounded"})
	add(gemm{m: 29, n: 83, k: 117, x: f32, w: bf16, y: bf16, wideW: true, bias: true, note: "packed from f32"})
	return cs
}
