package cpu

import (
	"fmt"
	"math"
	"math/rand"
	"testing"
	"time"

	"margo/engine"
)

// gemmCase is a product with everything that GemmArgs allows.
type gemmCase struct {
	m, n, k, n0, extra int // extra rows of W behind the last one used
	x, w, y            engine.DType
	act                engine.Activation
	bias, res, inPlace bool
	gateRows           int // 0: no gate
	pad                int // of row strides
	every              int // the oracle computes every such element of a row, from another one in each; 0: all
}

func (c gemmCase) String() string {
	return fmt.Sprintf("%dx%dx%d n0=%d %v·%v→%v %v bias=%v gate=%d res=%v,%v", c.m, c.k, c.n, c.n0, c.x, c.w, c.y, c.act, c.bias, c.gateRows, c.res, c.inPlace)
}

// check computes the case and compares its elements with float64 sums. An
// f32 sum of k products, in any order, errs by no more than k·2⁻²⁴·Σ|xw|; sums
// of random terms stay far below, and the factor 4·√k is what is allowed.
func (c gemmCase) check(t *testing.T, threads int) {
	t.Helper()
	f := open(t, threads)
	r := rand.New(rand.NewSource(int64(c.m*7919 + c.n*31 + c.k)))
	rows := c.n0 + c.n + c.extra
	xv, wv := randn(r, c.m*c.k, 1), randn(r, rows*c.k, 1)
	bv, gv, rv := randn(r, rows, 1), randn(r, (c.m+1)*c.n, 1), randn(r, c.m*c.n, 1)

	x := f.tensor(c.x, c.m, c.k, c.k+c.pad)
	f.set(x, xv)
	w := f.put(engine.F32, wv, rows, c.k)
	y := f.tensor(c.y, c.m, c.n, c.n+c.pad)
	a := engine.GemmArgs{X: x, W: w, Packed: f.pack(w, c.w), N0: c.n0, Act: c.act, Y: y}
	if c.bias {
		a.Bias = f.put(engine.F32, bv, 1, rows)
	}
	if c.gateRows > 0 {
		g := (c.m + c.gateRows - 1) / c.gateRows
		a.Gate, a.GateRows = f.put(engine.F32, gv[:g*c.n], g, c.n), c.gateRows
	}
	if c.inPlace {
		f.set(y, rv)
		a.Residual = y
	} else if c.res {
		a.Residual = f.put(engine.F32, rv, c.m, c.n)
	}
	f.ok(f.s.Gemm(a))
	got := f.get(y)

	xr, wr := rounded(rounded(xv, c.x), c.w), rounded(wv, c.w)
	step := max(c.every, 1)
	for i := 0; i < c.m; i++ {
		for j := i % step; j < c.n; j += step {
			var sum, mag float64
			for k := 0; k < c.k; k++ {
				p := float64(xr[i*c.k+k]) * float64(wr[(c.n0+j)*c.k+k])
				sum, mag = sum+p, mag+math.Abs(p)
			}
			if c.bias {
				sum, mag = sum+float64(bv[c.n0+j]), mag+math.Abs(float64(bv[c.n0+j]))
			}
			want, scale := activate(c.act, sum), 1.0
			if c.gateRows > 0 {
				scale = float64(gv[i/c.gateRows*c.n+j])
				want *= scale
			}
			if c.res || c.inPlace {
				want += float64(rv[i*c.n+j])
			}
			tol := 4*math.Sqrt(float64(c.k)+1)*mag*math.Abs(scale)/(1<<24) + 4*math.Abs(want)/(1<<24) + 1e-6*math.Abs(scale)
			if c.y == engine.BF16 {
				tol += math.Abs(want) / 256
			}
			if e := math.Abs(float64(got[i*c.n+j]) - want); !(e <= tol) {
				t.Fatalf("%v: [%d,%d] = %v, want %v ± %.2g", c, i, j, got[i*c.n+j], want, tol)
			}
		}
	}
	if c.pad > 0 && c.m > 1 { // what lies between the rows must be as it was
		for i := 0; i < c.m; i++ {
			for j := c.n; j < c.n+c.pad; j++ {
				untouched := c.y == engine.BF16 && elems[uint16](y)[i*y.RowStride+j] == 0xffff ||
					c.y == engine.F32 && math.IsNaN(float64(elems[float32](y)[i*y.RowStride+j]))
				if !untouched {
					t.Fatalf("%v: row %d is written beyond its end", c, i)
				}
			}
		}
	}
}

const (
	f32  = engine.F32
	bf16 = engine.BF16
)

func TestGemm(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, w := range []engine.DType{f32, bf16} {
			for _, m := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 33} {
				gemmCase{m: m, n: 33, k: 17, x: w, w: w, bias: true}.check(t, 1)
			}
			for _, n := range []int{1, 3, 32, 33, 203} {
				for _, k := range []int{1, 2, 15, 16, 113} {
					gemmCase{m: 7, n: n, k: k, x: w, w: w, pad: 5}.check(t, 2)
				}
			}
			gemmCase{m: 113, n: 203, k: 113, x: w, w: w, bias: true, pad: 1}.check(t, 3)
			gemmCase{m: 300, n: 40, k: 64, x: w, w: w, bias: true}.check(t, 2)
			gemmCase{m: 20, n: 64, k: 1024, x: w, w: w, bias: true}.check(t, 2) // rows alias in L1: copied
			gemmCase{m: 33, n: 65, k: 31, x: f32, w: w, y: bf16, bias: true, act: engine.SiLU}.check(t, 2)
			gemmCase{m: 33, n: 65, k: 31, x: bf16, w: w, y: f32, bias: true, act: engine.GELUErf}.check(t, 2)
			for _, act := range []engine.Activation{engine.Identity, engine.GELUErf, engine.GELUTanh, engine.SiLU} {
				gemmCase{m: 9, n: 50, k: 24, x: w, w: w, act: act, bias: true, gateRows: 1, inPlace: true}.check(t, 2)
				gemmCase{m: 9, n: 50, k: 24, x: w, w: w, act: act, gateRows: 4, res: true}.check(t, 2)
			}
			// Large enough for streams, which are written by ranges of rows.
			gemmCase{m: 131, n: 1030, k: 515, n0: 3, extra: 2, x: w, w: w, y: w, bias: true, act: engine.GELUTanh, pad: 3, every: 17}.check(t, 2)
			gemmCase{m: 181, n: 728, k: 515, x: f32, w: w, bias: true, gateRows: 7, inPlace: true, every: 17}.check(t, 3)
			for _, n0 := range []int{0, 1, 31, 32, 40, 100} {
				gemmCase{m: 5, n: 37, k: 20, n0: n0, extra: 9, x: w, w: w, bias: true}.check(t, 2)
			}
		}
	})
}

// TestGemmSlabs: rows in slabs, because A's streams have a limit, and gates that do not
// change where slabs do. No other instruction set brings A into streams.
func TestGemmSlabs(t *testing.T) {
	if !forceISA("avx2") {
		t.Skip("this machine has no AVX2")
	}
	defer forceISA("")
	gemmCase{m: 1031, n: 515, k: 4099, x: bf16, w: bf16, y: f32, bias: true, gateRows: 7, res: true, every: 97}.check(t, 2)
}

// TestGemmFixedOrder: the bits of a row do not depend on the batch, the range
// of columns or the number of threads.
func TestGemmFixedOrder(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		fixedOrder(t, 61, 203, 115)
		fixedOrder(t, 131, 1030, 515) // large enough for streams
	})
}

func fixedOrder(t *testing.T, m, n, k int) {
	r := rand.New(rand.NewSource(1))
	xv, wv, bv := randn(r, m*k, 1), randn(r, n*k, 1), randn(r, n, 1)
	for _, dt := range []engine.DType{f32, bf16} {
		var want []float32
		for _, threads := range []int{1, 2, 3, 8} {
			f := open(t, threads)
			x, w := f.put(dt, xv, m, k), f.put(f32, wv, n, k)
			p, b := f.pack(w, dt), f.put(f32, bv, 1, n)
			y := f.tensor(f32, m, n, n)
			f.ok(f.s.Gemm(engine.GemmArgs{X: x, W: w, Packed: p, Bias: b, Act: engine.GELUErf, Y: y}))
			got := f.get(y)
			if want == nil {
				want = got
			}
			if i := sameBits(want, got); i >= 0 {
				t.Fatalf("%v: %d threads change element %d: %v, %v", dt, threads, i, want[i], got[i])
			}
			for _, rows := range []int{1, 2, 5, 14, 15, 30} {
				for _, n0 := range []int{0, 45, 64} {
					part := f.tensor(f32, rows, n-n0-7, n-n0-7)
					f.ok(f.s.Gemm(engine.GemmArgs{X: x.RowsAt(m-rows, m), W: w, Packed: p, Bias: b, N0: n0, Act: engine.GELUErf, Y: part}))
					for i, g := range f.get(part) {
						at := (m-rows+i/part.Cols())*n + n0 + i%part.Cols()
						if math.Float32bits(g) != math.Float32bits(want[at]) {
							t.Fatalf("%v: %d rows from column %d, %d threads: element %d is %v, was %v", dt, rows, n0, threads, i, g, want[at])
						}
					}
				}
			}
		}
	}
}

// TestGemmBias: a contiguous bias may have any shape.
func TestGemmBias(t *testing.T) {
	f := open(t, 1)
	const n, n0 = 40, 4
	x, w := f.put(f32, []float32{1}, 1, 1), f.put(f32, make([]float32, n), n, 1)
	bv := make([]float32, n)
	for i := range bv {
		bv[i] = float32(i + 1)
	}
	for _, shape := range [][]int{{n}, {1, n}, {n, 1}, {n / 8, 8}, {2, 2, n / 4}} {
		bias, y := f.put(f32, bv, 1, n), f.tensor(f32, 1, n-n0, n-n0)
		bias = bias.Reshape(shape...)
		f.ok(f.s.Gemm(engine.GemmArgs{X: x, W: w, N0: n0, Bias: bias, Y: y}))
		if i := sameBits(f.get(y), bv[n0:]); i >= 0 {
			t.Errorf("bias %v: element %d is %v, want %v", shape, i, f.get(y)[i], bv[n0+i])
		}
	}
}

// TestGemmNaN: what is not a number stays so, and stays in its row.
func TestGemmNaN(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		nan, inf := float32(math.NaN()), float32(math.Inf(1))
		for _, dt := range []engine.DType{f32, bf16} {
			for _, act := range []engine.Activation{engine.Identity, engine.GELUErf, engine.GELUTanh, engine.SiLU} {
				f := open(t, 1)
				const m, n, k = 5, 40, 19
				xv, wv := randn(rand.New(rand.NewSource(2)), m*k, 1), make([]float32, n*k)
				for i := range wv {
					wv[i] = 1
				}
				xv[1*k+18] = nan // the odd last element
				xv[2*k+3] = inf
				xv[3*k+3] = -inf
				w := f.put(f32, wv, n, k)
				for _, ydt := range []engine.DType{f32, bf16} {
					y := f.tensor(ydt, m, n, n)
					f.ok(f.s.Gemm(engine.GemmArgs{X: f.put(dt, xv, m, k), W: w, Packed: f.pack(w, dt), Act: act, Y: y}))
					got := f.get(y)
					for i, g := range got {
						v := float64(g)
						lowest := activate(act, math.Inf(-1)) // −Inf, or −Inf·0
						switch i / n {
						case 1:
							if !math.IsNaN(v) {
								t.Fatalf("%v %v: NaN became %v", dt, act, v)
							}
						case 2:
							if !math.IsInf(v, 1) {
								t.Fatalf("%v %v: Inf became %v", dt, act, v)
							}
						case 3:
							if math.IsNaN(v) != math.IsNaN(lowest) || !math.IsNaN(v) && v != lowest {
								t.Fatalf("%v %v: −Inf became %v, want %v", dt, act, v, lowest)
							}
						default:
							if math.IsNaN(v) || math.IsInf(v, 0) {
								t.Fatalf("%v %v: row %d got %v from another row", dt, act, i/n, v)
							}
						}
					}
				}
			}
		}
	})
}

// TestActivations: the functions of the epilogue over their whole range,
// reached through a product with 1.
func TestActivations(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		f := open(t, 1)
		var v []float32
		for x := -110.0; x <= 110; x += 0.0137 {
			v = append(v, float32(x), float32(x/50))
		}
		w := f.put(f32, []float32{1}, 1, 1)
		p := f.pack(w, f32)
		x, y := f.put(f32, v, len(v), 1), f.tensor(f32, len(v), 1, 1)
		for _, act := range []engine.Activation{engine.GELUErf, engine.GELUTanh, engine.SiLU} {
			f.ok(f.s.Gemm(engine.GemmArgs{X: x, W: w, Packed: p, Act: act, Y: y}))
			for i, g := range f.get(y) {
				// Relative to |x|: 1 + erf and the like lose digits near -1, in
				// any f32 evaluation of these formulas.
				want := activate(act, float64(v[i]))
				if e := math.Abs(float64(g) - want); !(e <= 2.5e-7*math.Abs(float64(v[i]))) {
					t.Fatalf("%v(%v) = %v, want %v", act, v[i], g, want)
				}
			}
		}
	})
}

// TestRoundBF16: nearest, ties to even, NaN kept.
func TestRoundBF16(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		f := open(t, 1)
		r := rand.New(rand.NewSource(3))
		v := []float32{0, 1, 1.00390625, 1.01171875, -1.00390625, 65504, 3.4e38, float32(math.Inf(-1)), 1e-30}
		for len(v) < 1000 {
			if x := math.Float32frombits(r.Uint32()); math.Abs(float64(x)) > 1e-37 { // subnormals may become 0
				v = append(v, x)
			}
		}
		w := f.put(f32, []float32{1}, 1, 1)
		y := f.tensor(bf16, len(v), 1, 1)
		f.ok(f.s.Gemm(engine.GemmArgs{X: f.put(f32, v, len(v), 1), W: w, Packed: f.pack(w, f32), Y: y}))
		for i, h := range elems[uint16](y)[:len(v)] {
			if math.IsNaN(float64(v[i])) {
				if !math.IsNaN(float64(engine.FromBF16(h))) {
					t.Fatalf("NaN became %#x", h)
				}
			} else if h != engine.ToBF16(v[i]) {
				t.Fatalf("%v became %#x, want %#x", v[i], h, engine.ToBF16(v[i]))
			}
		}
	})
}

// BenchmarkGemm gives GF/s and the share of the peak measured in the same run,
// with one weight matrix (hot) and with a ring of them larger than the caches.
func BenchmarkGemm(b *testing.B) {
	for _, dt := range []engine.DType{f32, bf16} {
		for _, s := range [][3]int{{1, 1024, 1024}, {4, 1024, 1024}, {8, 1024, 1024}, {14, 1024, 1024}, {32, 1024, 1024},
			{56, 1024, 1024}, {400, 192, 576}, {320, 768, 2304}, {320, 768, 768}, {320, 768, 3072}, {320, 3072, 768},
			{512, 1024, 4096}, {512, 4096, 1024}, {512, 768, 2304}, {512, 768, 3072}, {512, 3072, 768}, {512, 1152, 1152}, {512, 1152, 3456}, {512, 1152, 4608}, {512, 4608, 1152}} {
			for _, cold := range []bool{false, true} {
				name := fmt.Sprintf("%v/%dx%dx%d/%s", dt, s[0], s[1], s[2], map[bool]string{false: "hot", true: "cold"}[cold])
				b.Run(name, func(b *testing.B) { benchGemm(b, dt, s[0], s[1], s[2], cold) })
			}
		}
	}
}

func benchGemm(b *testing.B, dt engine.DType, m, k, n int, cold bool) {
	f := open(b, DefaultThreads())
	w := f.put(f32, randn(rand.New(rand.NewSource(1)), n*k, 1), n, k)
	ring := []engine.Packed{f.pack(w, dt)}
	for size := ring[0].Bytes(); cold && size*len(ring) < 160<<20; {
		ring = append(ring, f.pack(w, dt))
	}
	x, y := f.put(dt, randn(rand.New(rand.NewSource(2)), m*k, 1), m, k), f.tensor(f32, m, n, n)
	flops := 2 * float64(m) * float64(k) * float64(n)
	batch := max(len(ring), int(4e8/flops)+1)
	best := 0.0
	b.ResetTimer()
	for range b.N {
		start := time.Now()
		for i := range batch {
			f.ok(f.s.Gemm(engine.GemmArgs{X: x, W: w, Packed: ring[i%len(ring)], Y: y}))
		}
		best = max(best, flops*float64(batch)/time.Since(start).Seconds())
	}
	b.StopTimer()
	b.ReportMetric(best/1e9, "GF/s")
	peak := PeakFLOPS(dt, f.d.threads)
	b.ReportMetric(100*best/peak, "%peak")
}
