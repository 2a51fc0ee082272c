package ptx

import (
	"math"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"margo/engine"
)

// small gives n bf16 bit patterns of whole numbers from -8 to 8: their sums of products are exact in any order.
func small(r *rand.Rand, n int) ([]uint16, []float32) {
	b, f := make([]uint16, n), make([]float32, n)
	for i := range b {
		f[i] = float32(r.IntN(17) - 8)
		b[i] = uint16(math.Float32bits(f[i]) >> 16)
	}
	return b, f
}

// fragments packs a (16×k, by rows) and b (k×8, by rows) for the lanes as margo.cuh says.
func fragments(a, b []uint16, k int) (fa, fb []uint32) {
	pair := func(lo, hi uint16) uint32 { return uint32(hi)<<16 | uint32(lo) }
	for l := range 32 {
		g, t := l/4, l%4
		for c := 2 * t; c < k; c += 8 {
			for _, row := range []int{g, g + 8} {
				fa = append(fa, pair(a[row*k+c], a[row*k+c+1]))
			}
			fb = append(fb, pair(b[c*8+g], b[(c+1)*8+g]))
		}
	}
	return fa, fb
}

// checkMMA says how many of the elements of a·b + d the kernel gets wrong.
func checkMMA(t *testing.T, m *Module, kernel string, k int) int {
	r := rand.New(rand.NewPCG(1, uint64(k)))
	a, af := small(r, 16*k)
	b, bf := small(r, k*8)
	_, df := small(r, 16*8)
	fa, fb := fragments(a, b, k)
	var d []float32
	at := func(l, i int) (row, col int) { return l/4 + 8*(i/2), 2*(l%4) + i%2 }
	for l := range 32 {
		for i := range 4 {
			row, col := at(l, i)
			d = append(d, df[row*8+col])
		}
	}
	mem := &Memory{}
	pd := mem.F32(d)
	launch(t, m, mem, Launch{Block: [3]int{32}, Args: []any{mem.U32(fa), mem.U32(fb), pd}}, kernel)
	got, wrong := floats(t, mem, pd, 128), 0
	for l := range 32 {
		for i := range 4 {
			row, col := at(l, i)
			want := df[row*8+col]
			for j := range k {
				want += af[row*k+j] * bf[j*8+col]
			}
			if got[4*l+i] != want {
				wrong++
			}
		}
	}
	return wrong
}

func TestMMA(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	for k, kernel := range map[int]string{16: "w_mma_k16", 8: "w_mma_k8"} {
		if wrong := checkMMA(t, m, kernel, k); wrong != 0 {
			t.Errorf("k = %d: %d of 128 elements are wrong", k, wrong)
		}
	}
}

func TestLdmatrix(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	if wrong := checkLdmatrix(t, m); wrong != 0 {
		t.Errorf("%d of 384 words are wrong", wrong)
	}
}

// checkLdmatrix counts wrong words. Element c of row r of matrix i is 100i + 8r + c.
func checkLdmatrix(t *testing.T, m *Module) int {
	element := func(i, r, c int) uint32 { return uint32(100*i + 8*r + c) }
	var x []uint32
	for row := range 32 {
		for c := 0; c < 8; c += 2 {
			x = append(x, element(row/8, row%8, c)|element(row/8, row%8, c+1)<<16)
		}
	}
	mem := &Memory{}
	y := mem.Alloc(4 * 12 * 32)
	launch(t, m, mem, Launch{Block: [3]int{32}, Shared: 512, Args: []any{mem.U32(x), y}}, "w_ldmatrix")
	got, wrong := words(t, mem, y, 12*32), 0
	for l := range 32 {
		var want []uint32
		for _, part := range []struct {
			n     int
			trans bool
		}{{4, false}, {4, true}, {2, false}, {2, true}} {
			for i := range part.n {
				if r, c := l/4, 2*(l%4); part.trans {
					want = append(want, element(i, c, r)|element(i, c+1, r)<<16)
				} else {
					want = append(want, element(i, r, c)|element(i, r, c+1)<<16)
				}
			}
		}
		for i := range want {
			if got[12*l+i] != want[i] {
				wrong++
			}
		}
	}
	return wrong
}

func TestCpAsync(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	for _, bytes := range []int{16, 8, 4, 0} {
		if wrong := checkCpAsync(t, m, bytes); wrong != 0 {
			t.Errorf("%d bytes: %d words are wrong", bytes, wrong)
		}
	}
}

func checkCpAsync(t *testing.T, m *Module, bytes int) int {
	x, v := make([]uint32, 128), make([]uint32, 32)
	for i := range x {
		x[i] = uint32(i + 1)
	}
	for i := range v {
		v[i] = uint32(1000 + i)
	}
	mem := &Memory{}
	y, z := mem.Alloc(512), mem.Alloc(128)
	few := bytes / 4
	launch(t, m, mem, Launch{Block: [3]int{32}, Shared: 1024, Args: []any{mem.U32(x), mem.U32(v), y, z, int32(bytes), int32(few)}}, "w_cp_async")
	wrong := 0
	for i, got := range words(t, mem, y, 128) {
		want := x[i]
		if 4*(i%4) >= bytes {
			want = 0
		}
		if got != want {
			wrong++
		}
	}
	for i, got := range words(t, mem, z, 32) {
		if got != v[i]&(1<<(8*few)-1) {
			wrong++
		}
	}
	return wrong
}

// roundBF16 rounds to nearest even by arithmetic, not by bits: bf16 has 8 bits.
func roundBF16(f float32) uint32 {
	x := float64(f)
	frac, exp := math.Frexp(x)
	return math.Float32bits(float32(math.Ldexp(math.RoundToEven(math.Ldexp(frac, 8)), exp-8))) >> 16
}

func TestConvert(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	packs, others := checkConvert(t, m)
	if packs != 0 || others != 0 {
		t.Errorf("%d pairs and %d other words are wrong", packs, others)
	}
}

func checkConvert(t *testing.T, m *Module) (packs, others int) {
	r := rand.New(rand.NewPCG(3, 4))
	x := make([]float32, 64)
	for i := range x {
		x[i] = float32(r.NormFloat64() * 9)
	}
	x[0], x[1], x[2], x[3] = 1+1.0/256, 1+3.0/256, -1-1.0/256, 0 // ties
	mem := &Memory{}
	y := mem.Alloc(4 * 128)
	launch(t, m, mem, Launch{Block: [3]int{32}, Args: []any{mem.F32(x), y}}, "w_convert")
	got := words(t, mem, y, 128)
	for l := range 32 {
		if got[4*l] != roundBF16(x[l])|roundBF16(x[l+32])<<16 {
			packs++
		}
		if got[4*l+1] != roundBF16(x[l]) {
			others++
		}
		// 2 ulp by the manual: 2^-22 of the number.
		e, want := float64(math.Float32frombits(got[4*l+2])), math.Exp2(float64(x[l]))
		if math.Abs(e-want) > want*0x1p-22 {
			others++
		}
		if got[4*l+3] != math.Float32bits(x[l])<<16 {
			others++
		}
	}
	return packs, others
}

// TestE4M3 widens all 256 codes; those of NaN give ±480 (fp8.cuh).
func TestE4M3(t *testing.T) {
	codes := make([]uint32, 64)
	for i := range 256 {
		codes[i/4] |= uint32(i) << (8 * (i % 4))
	}
	mem := &Memory{}
	y := mem.Alloc(4 * 128)
	launch(t, parsed(t, compiled(t, "test/wrappers.cu")), mem, Launch{Block: [3]int{64}, Args: []any{mem.U32(codes), y}}, "w_e4m3")
	for i, w := range words(t, mem, y, 128) {
		for half := range 2 {
			code := byte(2*i + half)
			want := engine.FromE4M3(code)
			if want != want {
				want = float32(math.Copysign(480, 64-float64(code>>1)))
			}
			if got := engine.FromBF16(uint16(w >> (16 * half))); math.Float32bits(got) != math.Float32bits(want) {
				t.Errorf("%#02x is %g, want %g", code, got, want)
			}
		}
	}
}

func TestSums(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	r := rand.New(rand.NewPCG(5, 6))
	x := make([]float32, 128)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	mem := &Memory{}
	pw, pb := mem.Alloc(512), mem.Alloc(512)
	launch(t, m, mem, Launch{Block: [3]int{128}, Shared: 16, Args: []any{mem.F32(x), pw, pb}}, "w_sums")
	var part [4]float32
	for w := range 4 { // the butterfly, in its order
		v := [32]float32(x[32*w : 32*w+32])
		for d := 16; d > 0; d /= 2 {
			var next [32]float32
			for l := range next {
				next[l] = v[l] + v[l^d]
			}
			v = next
		}
		part[w] = v[0]
	}
	total := part[0] + part[1]
	total += part[2]
	total += part[3]
	warp, block := floats(t, mem, pw, 128), floats(t, mem, pb, 128)
	for i := range warp {
		if warp[i] != part[i/32] || block[i] != total {
			t.Fatalf("thread %d: sums %g and %g, not %g and %g", i, warp[i], block[i], part[i/32], total)
		}
	}
}

func TestPhilox(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	const key = 0x123456789abcdef0
	mem := &Memory{}
	y := mem.Alloc(4 * 128)
	launch(t, m, mem, Launch{Block: [3]int{32}, Args: []any{y, uint64(key)}}, "w_philox")
	got := words(t, mem, y, 128)
	for l := range uint32(32) {
		if want := engine.Philox([4]uint32{l, l + 1, 7 * l, 9}, key); [4]uint32(got[4*l:4*l+4]) != want {
			t.Fatalf("thread %d: %x, not %x", l, got[4*l:4*l+4], want)
		}
	}
}

func TestBarSync(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	x := make([]uint32, 128)
	for i := range x {
		x[i] = uint32(i * i)
	}
	mem := &Memory{}
	y := mem.Alloc(512)
	launch(t, m, mem, Launch{Block: [3]int{128}, Shared: 512, Args: []any{mem.U32(x), y}}, "w_bar_sync")
	for i, v := range words(t, mem, y, 128) {
		if want := x[i/64*64+63-i%64]; v != want {
			t.Fatalf("thread %d: %d, not %d", i, v, want)
		}
	}
}

func TestMemoryWrappers(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	mem := &Memory{}
	p, q, seen := mem.U32([]uint32{5}), mem.U32(make([]uint32, 2*128)), mem.Alloc(512)
	launch(t, m, mem, Launch{Grid: [3]int{2}, Block: [3]int{64}, Args: []any{p, q, seen}}, "w_memory")
	const each = 63 * 64 / 2
	s, v := words(t, mem, seen, 128), words(t, mem, q, 256)
	for i := range s {
		if want := uint32(5 + each*(1+i/64)); s[i] != want || v[2*i] != 0 || v[2*i+1] != uint32(i) {
			t.Fatalf("thread %d: %d, not %d; word %d %d", i, s[i], want, v[2*i], v[2*i+1])
		}
	}
}

func TestTime(t *testing.T) {
	m := parsed(t, compiled(t, "test/wrappers.cu"))
	mem := &Memory{}
	y := mem.Alloc(8 * 3 * 64)
	launch(t, m, mem, Launch{Block: [3]int{64}, Args: []any{y}}, "w_time")
	w := words(t, mem, y, 2*3*64)
	for i := range uint32(64) {
		if got, want := [6]uint32(w[6*i:]), [6]uint32{i, 0, 7, i << 8, 1, 0}; got != want {
			t.Fatalf("thread %d: words %v, not %v", i, got, want)
		}
	}
}

// TestSeededBugs breaks the inline assembly as a typing error would: the comparisons above must see each.
func TestSeededBugs(t *testing.T) {
	text := compiled(t, "test/wrappers.cu")
	broken := func(pattern, with string) *Module {
		t.Helper()
		re := regexp.MustCompile(pattern)
		if !re.MatchString(text) {
			t.Fatalf("%s is not in the PTX", pattern)
		}
		return parsed(t, re.ReplaceAllString(text, with))
	}
	if packs, _ := checkConvert(t, broken(`(cvt\.rn\.bf16x2\.f32 %\w+), *(%\w+), *(%\w+);`, "$1,$3,$2;")); packs == 0 {
		t.Error("swapped halves of pack_bf16 were not seen")
	}
	if checkLdmatrix(t, broken(`x4\.trans`, "x4")) == 0 {
		t.Error("a lost .trans was not seen")
	}
	if checkMMA(t, broken(`(m16n8k16.*\},\{)(%\w+),(%\w+),(%\w+),(%\w+)(\},)`, "${1}${3},${2},${4},${5}${6}"), "w_mma_k16", 16) == 0 {
		t.Error("swapped fragments of mma were not seen")
	}
	if checkCpAsync(t, broken(`cp\.async\.wait_group 1`, "cp.async.wait_group 2"), 16) == 0 {
		t.Error("a wait for too few groups was not seen")
	}
	k, err := broken(`add\.f32 `, "add.wrong.f32 ").Kernel("w_sums")
	if err == nil || !strings.Contains(err.Error(), "add.wrong") || !strings.Contains(err.Error(), "line") {
		t.Errorf("an unknown instruction gives %v, %v", k, err)
	}
	k, err = parsed(t, text).Kernel("w_cp_async")
	if err != nil {
		t.Fatal(err)
	}
	mem := &Memory{}
	x := mem.U32(make([]uint32, 128))
	err = k.Run(mem, Launch{Block: [3]int{32}, Shared: 1024, Args: []any{x, x, mem.Alloc(500), x, int32(16), int32(4)}})
	if err == nil || !strings.Contains(err.Error(), "outside every buffer") {
		t.Errorf("a store past the end gives %v", err)
	}
}
