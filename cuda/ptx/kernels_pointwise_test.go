package ptx

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"margo/engine"
)

// Pointwise kernels run in one block of 4 × 8 threads, twice over the columns (gridDim.y = 2): 7 rows leave a row of threads idle,
// and 76 or 75 columns take three steps of 4·4·2, the last cut.
const pointRows = 7

func points(args ...any) Launch {
	return Launch{Grid: [3]int{1, 2}, Block: [3]int{4, 8}, Args: args}
}

// pointCols is a width for the path of four columns at a time, or of single ones.
func pointCols(vec string) int { return map[string]int{"1": 76, "0": 75}[vec] }

func castKernel(t testing.TB, m *Module, name string) {
	a := template(t, name, "cast_kernel")
	cols := pointCols(a[2])
	p := newProblem(t)
	p.gap = 4
	x, y := p.in(dtype(a[0]), normal(1), pointRows, cols), p.out(dtype(a[1]), pointRows, cols)
	launch(t, m, p.mem, points(x.at, int64(x.ld), y.at, int64(y.ld), int64(pointRows), int64(cols), float32(1.7), float32(-0.3)), name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.Cast(engine.CastArgs{X: at(x), Y: at(y), Scale: 1.7, Shift: -0.3})
	})
}

func copyKernel(t testing.TB, m *Module, name string) {
	a := template(t, name, "copy_kernel")
	cols := pointCols(a[1])
	p := newProblem(t)
	p.gap = 4
	x, y := p.in(dtype(a[0]), normal(1), pointRows, cols), p.out(dtype(a[0]), pointRows, cols)
	launch(t, m, p.mem, points(x.at, int64(x.ld), y.at, int64(y.ld), int64(pointRows), int64(cols)), name)
	p.same(x, y)
}

// same wants y to be x bit for bit.
func (p *problem) same(x, y *operandOf) {
	p.t.Helper()
	want := p.got(x)
	for i, v := range p.got(y) {
		if math.Float64bits(v) != math.Float64bits(want[i]) {
			p.t.Fatalf("element %d is %g, not %g", i, v, want[i])
		}
	}
}

func fillKernel(t testing.TB, m *Module, name string) {
	d := dtype(template(t, name, "fill_kernel")[0])
	p := newProblem(t)
	p.gap = 3
	y := p.out(d, pointRows, 75)
	launch(t, m, p.mem, points(y.at, int64(y.ld), int64(pointRows), int64(75), float32(-2.7)), name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error { return s.Fill(at(y), -2.7) })
}

func gatedAddKernel(t testing.TB, m *Module, name string) {
	a := template(t, name, "gated_add_kernel")
	cols := pointCols(a[1])
	for _, gated := range []bool{true, false} {
		p := newProblem(t)
		p.gap = 4
		x, h, gate, y := p.f32(pointRows, cols), p.in(dtype(a[0]), normal(1), pointRows, cols), p.f32(3, cols), p.out(engine.F32, pointRows, cols)
		g, rows := gate.at, int64(3)
		if !gated {
			g, rows = 0, 1
		}
		launch(t, m, p.mem, points(args(x.at, h.at, g, y.at, int64(x.ld), int64(h.ld), int64(gate.ld), int64(y.ld), int64(pointRows), int64(cols), rows)), name)
		p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			c := engine.GatedAddArgs{X: at(x), H: at(h), Y: at(y)}
			if gated {
				c.Gate, c.GateRows = at(gate), 3
			}
			return s.GatedAdd(c)
		})
	}
}

// rowsKernel gathers, adds and scatters with indices of which one of A and one of B are negative, with SiLU; then it runs with
// an index outside of A, which must be reported and its row left alone.
func rowsKernel(t testing.TB, m *Module, name string) {
	a := template(t, name, "rows_kernel")
	cols := pointCols(a[3])
	const count, ny, na, nb = pointRows, 9, 5, 6
	p := newProblem(t)
	p.gap = 4
	y := p.inout(dtype(a[0]), normal(1), ny, cols)
	x, z := p.in(dtype(a[1]), normal(1), na, cols), p.in(dtype(a[2]), normal(1), nb, cols)
	iy, ia, ib := p.in(engine.I32, fixed(8, 0, 2, 5, 4, 1, 6), count), p.in(engine.I32, fixed(4, -1, 0, 1, 1, 3, 2), count), p.in(engine.I32, fixed(0, 5, -1, 2, 3, 3, 1), count)
	bad := p.mem.U32([]uint32{0})
	row := func(ia uint64) []byte {
		return args(y.at, x.at, z.at, iy.at, ia, ib.at, int64(y.ld), int64(x.ld), int64(z.ld), int64(ny), int64(na), int64(nb), int64(count), int64(cols),
			bad, int32(engine.SiLU))
	}
	launch(t, m, p.mem, points(row(ia.at)), name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.Rows(engine.RowsArgs{Y: at(y), A: at(x), B: at(z), IY: at(iy), IA: at(ia), IB: at(ib), Count: count, Act: engine.SiLU})
	})
	if e := words(t, p.mem, bad, 1)[0]; e != 0 {
		t.Errorf("the error word is %d after indices that are right", e)
	}
	before := p.got(y)
	launch(t, m, p.mem, points(row(p.mem.U32([]uint32{4, math.MaxUint32, na, 1, 1, 3, 2}))), name)
	if e := words(t, p.mem, bad, 1)[0]; e != 3 {
		t.Errorf("the error word is %d after a wrong index in row 2", e)
	}
	for i, v := range p.got(y) {
		if v != before[i] {
			t.Fatalf("element %d changed from %g to %g with one index wrong", i, before[i], v)
		}
	}
}

func timestepKernel(t testing.TB, m *Module, name string) {
	const half = 21
	p := newProblem(t)
	p.gap = 1
	ts, y := p.in(engine.F32, func(r *rand.Rand, _ int) float32 { return float32(r.IntN(1000)) }, pointRows), p.out(engine.F32, pointRows, 2*half)
	launch(t, m, p.mem, points(ts.at, y.at, int64(y.ld), int64(pointRows), int64(half), math.Log(10000)), name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.TimestepEmbedding(engine.TimestepEmbeddingArgs{T: at(ts), Y: at(y), MaxPeriod: 10000})
	})
}

// patchifyKernel runs 2 images of 4 × 6 pixels and 9 channels in patches of 2 × 2.
func patchifyKernel(t testing.TB, m *Module, name string) {
	const n, h, w, c, side = 2, 4, 6, 9, 2
	inverse := strings.Contains(name, "Lb1E")
	p := newProblem(t)
	p.gap = 2
	var x, y *operandOf
	image, tokens := []int{n, h, w, c}, []int{n, h / side * w / side, c * side * side}
	if inverse {
		x, y = p.out(engine.F32, image...), p.f32(tokens...)
	} else {
		x, y = p.f32(image...), p.out(engine.F32, tokens...)
	}
	l := points(args(x.at, y.at, int64(x.ld), int64(y.ld), int64(n*h*w), int32(h), int32(w), int32(c), int32(side)))
	l.Grid[0] = n * h * w / 8
	launch(t, m, p.mem, l, name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.Patchify(engine.PatchifyArgs{X: at(x), Y: at(y), P: side, Inverse: inverse})
	})
}

// diffusionStepKernel runs the reverse step: with guidance and drawn noise, with given noise, and as the last step.
func diffusionStepKernel(t testing.TB, m *Module, name string) {
	const n = 5
	c := map[bool]int{true: 16, false: 13}[strings.Contains(name, "Lb1E")]
	rng := engine.RNG{Seed: 0x1122334455667788, Purpose: engine.PurposeStepNoise, Step: 17}
	for _, v := range []struct{ guided, noisy, last bool }{{true, false, false}, {false, true, false}, {true, false, true}} {
		p := newProblem(t)
		p.gap = 4
		rows := n
		if v.guided {
			rows = 2 * n
		}
		x, out, guidance, noise := p.f32(n, c), p.f32(rows, 2*c), p.in(engine.F32, uniform(1, 4), n), p.f32(n, c)
		ids, y := p.ids(n), p.out(engine.F32, n, c)
		coef := engine.StepCoef{A: 1.01, B: 0.13, MinLog: -6.5, MaxLog: -4.5, Last: v.last}
		g, z, last := guidance.at, noise.at, int32(0)
		if !v.guided {
			g = 0
		}
		if !v.noisy {
			z = 0
		}
		if v.last {
			last = 1
		}
		l := points(args(x.at, out.at, g, z, y.at, ids.at, int64(x.ld), int64(y.ld), int64(out.ld), int64(noise.ld), int64(n), int64(c),
			rng.Seed, uint32(rng.Purpose), uint32(rng.Step), float32(coef.A), float32(coef.B), float32(coef.MinLog), float32(coef.MaxLog), float32(0.9), last))
		launch(t, m, p.mem, l, name)
		p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			a := engine.DiffusionStepArgs{X: at(x), Y: at(y), Out: at(out), IDs: at(ids), RNG: rng, Coef: coef, Temperature: 0.9}
			if v.guided {
				a.Guidance = at(guidance)
			}
			if v.noisy {
				a.Noise = at(noise)
			}
			return s.DiffusionStep(a)
		})
	}
}
