package ptx

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"margo/engine"
)

// tensorMap encodes a matrix of bf16 as margo_sm90.cuh's tensor_map_bf16 asks the driver to: boxes of 64 columns, swizzled by 128 bytes.
func tensorMap(t testing.TB, at uint64, rows, cols, ld, boxRows int) []byte {
	t.Helper()
	return encode(t, TensorMap{Base: at, Elem: 2, Dims: []uint64{uint64(cols), uint64(rows)}, Strides: []uint64{uint64(2 * ld)}, Box: []int{64, boxRows}, Swizzle: 128})
}

func encode(t testing.TB, m TensorMap) []byte {
	t.Helper()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// gemmSm90Kernel runs a tile of gemm_sm90a.cu with bias, GELU, gate and residual over two tiles in rows and in columns, the second of each
// cut, by three blocks, one of which computes two tiles; k goes around the ring of stages, and its last step is cut. Then on
// small whole numbers without the rest, a bf16 output, k of one short step, and columns that no vector of four fits.
func gemmSm90Kernel(t testing.TB, m *Module, name string) {
	n, _ := tile(name)
	wgs, bn, stages := n[0], n[1], n[2]
	bm := 64 * wgs
	chunk := 32
	if bn == 128 {
		chunk = 64
	}
	shared := (stages*(bm+bn)*64*2+wgs*4*16*(chunk+8)*4+stages*16+1023)/1024*1024 + 1024
	whole := gen(func(r *rand.Rand, _ int) float32 { return float32(r.IntN(17) - 8) })
	for _, exact := range []bool{false, true} {
		const gateRows = 10
		rows, cols, k, out := bm+37, bn+12, 64*(stages+1)+24, engine.F32
		g, act, vector := normal(1), engine.GELUErf, int32(1)
		if exact {
			rows, cols, k, out, g, act, vector = 19, bn-3, 40, engine.BF16, whole, engine.Identity, 0
		}
		p := newProblem(t)
		p.gap, p.cc = 16, 90
		px, pw := p.in(engine.BF16, g, rows, k), p.in(engine.BF16, g, cols, k)
		p.gap = 4
		bias, gate, residual := p.in(engine.F32, whole, cols), p.f32((rows+gateRows-1)/gateRows, cols), p.f32(rows, cols)
		y := p.out(out, rows, cols)
		pg, pr, half := gate.at, residual.at, int32(0)
		if exact {
			pg, pr, half = 0, 0, 1
		}
		tilesM, tilesN := (rows+bm-1)/bm, (cols+bn-1)/bn
		launch(t, m, p.mem, Launch{Grid: [3]int{min(tilesM*tilesN, 3)}, Block: [3]int{128*wgs + 128}, Shared: shared,
			Args: []any{tensorMap(t, px.at, rows, k, px.ld, bm), tensorMap(t, pw.at, cols, k, pw.ld, bn),
				args(bias.at, pg, pr, y.at, int64(gate.ld), int64(gateRows), int64(residual.ld), int64(y.ld), int32(act), half, vector, int32(0),
					int32(rows), int32(cols), int32(tilesM), int32(tilesN), int32((k+63)/64), int32(0))}}, name)
		p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			a := engine.GemmArgs{X: at(px), W: at(pw), Bias: at(bias), Act: act, Y: at(y)}
			if !exact {
				a.Gate, a.GateRows, a.Residual = at(gate), gateRows, at(residual)
			}
			return s.Gemm(a)
		})
	}
	emulatedKernel(t, 90, "gemm_sm90a")
}

// headsMap encodes rows of heads of bf16 as margo_sm90.cuh's tensor_map_heads_bf16 asks the driver to: boxes of 64 rows and 64 or 16 columns.
func headsMap(t testing.TB, at uint64, rows, heads, cols, ld, boxCols int) []byte {
	t.Helper()
	return encode(t, TensorMap{Base: at, Elem: 2, Dims: []uint64{uint64(cols), uint64(heads), uint64(rows)}, Strides: []uint64{uint64(2 * cols), uint64(2 * ld)},
		Box: []int{boxCols, 1, 64}, Swizzle: 2 * boxCols})
}

// attentionSm90Kernel runs a kernel of attention_sm90a.cu: two heads, of which sequences end within tiles of keys and within the queries of a
// warpgroup; one causal with keys that grow, once around the ring of stages, so that sums are rescaled and a warpgroup ends before another; and three
// queries of which only the last sees a key of NaN.
func attentionSm90Kernel(t testing.TB, m *Module, name string) {
	n, _ := tile(name)
	d, wgs, stages := n[0], n[1], n[2]
	a := attentionCall{d: engine.BF16, dh: d, sm90: true, rows: 64 * wgs, tile: 64, threads: 128*wgs + 32,
		shared: (2*64*d*(wgs+2*stages)+8*(2+3*stages)+1023)/1024*1024 + 1024}
	most := int32(64*wgs - 40)
	a.heads, a.queries, a.keys = 2, []int32{most, 0, 3}, []int32{134, 4, 9}
	a.run(t, m, name)
	if d == 80 { // the last 8 columns of a box are zeros
		b := a
		b.dh = 72
		b.run(t, m, name)
	}
	a.causal, a.grows, a.scale = true, true, float32(3/math.Sqrt(float64(d)))
	a.heads, a.queries, a.keys = 1, []int32{most}, []int32{int32(64*stages) + 71}
	a.run(t, m, name)
	a.nan, a.queries, a.keys = true, []int32{3}, []int32{67}
	a.run(t, m, name)
	emulatedKernel(t, 90, "attention_sm90a")
}

// emulatedKernel sees to it that the emulator has run a kernel, and not another that serves as well.
func emulatedKernel(t testing.TB, cc int, name string) {
	t.Helper()
	if emulator(t, cc) == nil {
		return
	}
	for _, k := range emulated[cc].Kernels() {
		if strings.HasPrefix(k.Name, name) {
			return
		}
	}
	t.Errorf("the emulator of sm_%d has not run %s", cc, name)
}
