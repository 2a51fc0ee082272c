package cuda

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/conformance"
)

// ltDevice opens the test device with cuBLASLt, which must be left as it was found.
func ltDevice(t *testing.T, use string) *Device {
	t.Helper()
	t.Setenv("MARGO_CUBLASLT", use)
	t.Setenv("XDG_CACHE_HOME", t.TempDir()) // what autotune finds
	return testDevice(t)
}

// ltGemm is a product of small integers, which any order of sums gets right, and what must come of it.
type ltGemm struct {
	m, n, k         int
	in, out         engine.DType
	bias            bool
	residual        int // 0: none, 1: another matrix, 2: Y itself
	gap, n0, more   int // columns between rows of X and Y; first of W's rows and those beyond the last
	gate, silu, off bool
	served          bool // by cuBLASLt
}

// run computes the product on a stream; got and want are the whole memory of Y, gaps included.
func (g ltGemm) run(t *testing.T, d *Device, s engine.Stream) (got, want []float32) {
	t.Helper()
	var free []engine.Buffer
	defer func() {
		for _, b := range free {
			if err := b.Free(); err != nil {
				t.Fatal(err)
			}
		}
	}()
	// put makes a matrix whose rows are gap elements apart, off elements into its memory.
	put := func(dt engine.DType, rows, cols, gap, off int, f func(i, j int) float32) *engine.Tensor {
		stride := cols + gap
		size := dt.Size()
		buf, err := d.Alloc((rows*stride + off) * size)
		if err != nil {
			t.Fatal(err)
		}
		free = append(free, buf)
		raw := make([]byte, (rows*stride+off)*size)
		for i := range rows {
			for j := range stride {
				v := float32(-77) // what lies between rows
				if j < cols {
					v = f(i, j)
				}
				bits, at := math.Float32bits(v), (off+i*stride+j)*size
				if dt == engine.BF16 {
					bits >>= 16 // exact: small integers
				}
				for b := range size {
					raw[at+b] = byte(bits >> (8 * b))
				}
			}
		}
		if err := s.CopyIn(engine.NewTensor(buf, 0, dt, 1, rows*stride+off), raw); err != nil {
			t.Fatal(err)
		}
		return &engine.Tensor{Buf: buf, Off: off * size, DType: dt, Shape: []int{rows, cols}, RowStride: stride}
	}
	x := func(i, j int) float32 { return float32((i*7+j*3)%11 - 5) }
	w := func(i, j int) float32 { return float32((i*5+j*2)%7 - 3) }
	bias := func(_, j int) float32 { return float32(j%13 - 6) }
	rest := func(i, j int) float32 { return float32((i+2*j)%9 - 4) }
	off := 0
	if g.off {
		off = 1
	}
	rows := g.n0 + g.n + g.more
	a := engine.GemmArgs{N0: g.n0, X: put(g.in, g.m, g.k, g.gap, off, x), W: put(g.in, rows, g.k, 2*g.gap+g.gap%2, 0, w)}
	if g.bias {
		a.Bias = put(engine.F32, 1, rows, 0, 0, bias)
		a.Bias = engine.NewTensor(a.Bias.Buf, 0, engine.F32, rows)
	}
	a.Y = put(g.out, g.m, g.n, g.gap, 0, rest)
	switch g.residual {
	case 1:
		a.Residual = put(engine.F32, g.m, g.n, g.gap+4, 0, rest)
	case 2:
		a.Residual = a.Y
	}
	if g.gate {
		a.Gate, a.GateRows = put(engine.F32, 1, g.n, 0, 0, func(_, _ int) float32 { return 2 }), g.m
	}
	if g.silu {
		a.Act = engine.SiLU
	}
	if err := s.Gemm(a); err != nil {
		t.Fatal(err)
	}
	whole := engine.NewTensor(a.Y.Buf, 0, g.out, 1, g.m*(g.n+g.gap))
	raw := make([]byte, g.m*(g.n+g.gap)*g.out.Size())
	if err := s.CopyOut(raw, whole); err != nil {
		t.Fatal(err)
	}
	got, want = make([]float32, g.m*(g.n+g.gap)), make([]float32, g.m*(g.n+g.gap))
	for i := range g.m {
		for j := range g.n + g.gap {
			at := i*(g.n+g.gap) + j
			if g.out == engine.BF16 {
				got[at] = math.Float32frombits(uint32(raw[2*at])<<16 | uint32(raw[2*at+1])<<24)
			} else {
				got[at] = math.Float32frombits(uint32(raw[4*at]) | uint32(raw[4*at+1])<<8 | uint32(raw[4*at+2])<<16 | uint32(raw[4*at+3])<<24)
			}
			v := float32(-77)
			if j < g.n {
				v = 0
				for k := range g.k {
					v += x(i, k) * w(g.n0+j, k)
				}
				if g.bias {
					v += bias(0, g.n0+j)
				}
				if g.silu {
					v = float32(float64(v) / (1 + math.Exp(-float64(v))))
				}
				if g.gate {
					v *= 2
				}
				if g.residual > 0 {
					v += rest(i, j)
				}
				if g.out == engine.BF16 {
					bits := math.Float32bits(v)
					v = math.Float32frombits((bits + 0x7fff + bits>>16&1) &^ 0xffff)
				}
			}
			want[at] = v
		}
	}
	return got, want
}

// check runs the product and says how many of the products of its shape cuBLASLt has made.
func (g ltGemm) check(t *testing.T, d *Device, s engine.Stream) {
	t.Helper()
	got, want := g.run(t, d, s)
	for i := range got {
		if diff := math.Abs(float64(got[i] - want[i])); diff > 1e-6*math.Abs(float64(want[i])) || diff > 0 && !g.silu {
			t.Fatalf("%+v: element %d is %v, want %v", g, i, got[i], want[i])
		}
	}
}

var ltCases = []ltGemm{
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.F32, served: true},
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.BF16, served: true},
	{m: 8, n: 64, k: 64, in: engine.F32, out: engine.F32, served: true},
	{m: 1, n: 8, k: 8, in: engine.BF16, out: engine.F32, bias: true, served: true},
	{m: 70, n: 40, k: 104, in: engine.BF16, out: engine.F32, bias: true, served: true}, // the algorithm that takes workspace
	{m: 70, n: 40, k: 104, in: engine.F32, out: engine.F32, bias: true, residual: 1, served: true},
	{m: 21, n: 24, k: 16, in: engine.BF16, out: engine.F32, bias: true, residual: 2, gap: 8, served: true},
	{m: 21, n: 24, k: 16, in: engine.F32, out: engine.F32, residual: 2, gap: 8, served: true},
	{m: 9, n: 24, k: 32, in: engine.BF16, out: engine.F32, bias: true, served: true},
	{m: 9, n: 24, k: 32, in: engine.BF16, out: engine.F32, bias: true, n0: 4, more: 3, served: true}, // a bias less aligned than before
	{m: 9, n: 24, k: 33, in: engine.F32, out: engine.F32, gap: 3, n0: 5, bias: false, served: false}, // Y's rows
	{m: 9, n: 21, k: 33, in: engine.F32, out: engine.F32, gap: 3, n0: 5, served: true},
	// What is left to our kernels.
	{m: 9, n: 24, k: 32, in: engine.BF16, out: engine.F32, bias: true, n0: 5}, // the bias is not aligned
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.BF16, bias: true},       // the library refuses: bias and Y of two types
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.F32, silu: true},        // activation
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.F32, gate: true},        // gate
	{m: 8, n: 64, k: 64, in: engine.F32, out: engine.BF16},                    // types
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.F32, off: true},         // X is not aligned
	{m: 8, n: 62, k: 64, in: engine.BF16, out: engine.F32},                    // nor Y's rows
	{m: 8, n: 64, k: 60, in: engine.BF16, out: engine.F32},                    // nor X's
	{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.BF16, residual: 1},      // residual and Y of two types
}

// served counts the products that cuBLASLt has made.
func served(d *Device) (n uint64) {
	for _, p := range d.products() {
		n += p.uses
	}
	return n
}

// TestCuBLASLt: products come out right whoever makes them, cuBLASLt makes those that it should, and a stream that
// captures gets our kernels.
func TestCuBLASLt(t *testing.T) {
	for _, use := range []string{"1", "autotune"} {
		t.Run(use, func(t *testing.T) {
			d := ltDevice(t, use)
			s, err := d.NewStream()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if d.Used() != int64(d.lt.workspace) || d.lt.workspace < 4<<20 {
				t.Errorf("%d bytes are counted, of a workspace of %d", d.Used(), d.lt.workspace)
			}
			for _, c := range ltCases {
				before := served(d)
				c.check(t, d, s)
				c.check(t, d, s) // by the cache of choices
				n := served(d) - before
				if want := map[bool]uint64{true: 2}[c.served]; n != want && os.Getenv("MARGO_CUDA_TEST_DEVICE") == "" {
					t.Errorf("%+v: cuBLASLt made %d of 2 products, want %d", c, n, want)
				}
			}
			seen := map[product]bool{}
			for _, p := range d.products() {
				if seen[p.shape()] {
					t.Errorf("%+v was chosen for twice", p)
				}
				seen[p.shape()] = true
				if want := map[string]int32{"1": heuristic, "autotune": tuned}[use]; p.choice != want && p.choice != ours {
					t.Errorf("%+v: choice %d, want %d", p, p.choice, want)
				}
			}
		})
	}
}

// TestCuBLASLtTable: the table of products holds with cuBLASLt on. What it cannot keep is that a row's bits do not
// depend on the rows beside it, so that mode is not asked for.
func TestCuBLASLtTable(t *testing.T) {
	d := ltDevice(t, "1")
	checked := 0
	for _, r := range conformance.Check(d, conformance.Options{Match: regexp.MustCompile(`^gemm/|^system/`), Quick: true}).Results {
		checked++
		if r.Status == conformance.Fail && r.Mode != conformance.Batch {
			t.Error(r)
		}
	}
	if n := served(d); n == 0 || checked < 500 {
		t.Errorf("%d products by cuBLASLt in %d checks", n, checked)
	}
}

// TestCuBLASLtBatch: the stand-in's order of sums depends on the number of rows, as the library's may: the reason
// why cuBLASLt is off unless it is asked for.
func TestCuBLASLtBatch(t *testing.T) {
	emulatorOnly(t)
	row := func(use string, rows int) []byte {
		t.Helper()
		d := ltDevice(t, use)
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var b [3]engine.Buffer
		for i, n := range []int{rows * 512, 64 * 512, rows * 64} {
			if b[i], err = d.Alloc(4 * n); err != nil {
				t.Fatal(err)
			}
			defer b[i].Free()
		}
		x, w, y := engine.NewTensor(b[0], 0, engine.F32, rows, 512), engine.NewTensor(b[1], 0, engine.F32, 64, 512), engine.NewTensor(b[2], 0, engine.F32, rows, 64)
		out := make([]byte, 4*64)
		fill := func(to *engine.Tensor) error {
			raw := make([]byte, 4*to.Elems())
			for i := range to.Elems() {
				bits := math.Float32bits(float32(math.Sin(float64(i % (7 * 512)))))
				raw[4*i], raw[4*i+1], raw[4*i+2], raw[4*i+3] = byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24)
			}
			return s.CopyIn(to, raw)
		}
		if err := errors.Join(fill(x), fill(w), s.Gemm(engine.GemmArgs{X: x, W: w, Y: y}), s.CopyOut(out, y.RowsAt(0, 1))); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if string(row("0", 8)) != string(row("0", 80)) {
		t.Error("our kernels: a row depends on the number of rows")
	}
	if string(row("1", 8)) == string(row("1", 80)) {
		t.Error("the stand-in: a row of 8 and of 80 has the same bits, so the test above shows nothing")
	}
	if string(row("1", 8)) != string(row("1", 8)) {
		t.Error("a product does not repeat bit for bit")
	}
}

// TestCuBLASLtCapture: a graph holds our kernels only, and gives what they give.
func TestCuBLASLtCapture(t *testing.T) {
	d := ltDevice(t, "1")
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b, err := d.Alloc(3 * 4 * 64 * 64)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	at := func(i int) *engine.Tensor { return engine.NewTensor(b, i*4*64*64, engine.F32, 64, 64) }
	a := engine.GemmArgs{X: at(0), W: at(1), Y: at(2)}
	if err := errors.Join(s.Fill(at(0), 2), s.Fill(at(1), 3), s.Fill(at(2), 0), s.Gemm(a)); err != nil {
		t.Fatal(err)
	}
	n := served(d)
	g, err := s.Capture(func() error { return s.Gemm(a) })
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	out := make([]byte, 4*64*64)
	if err := errors.Join(s.Fill(at(2), 0), s.Launch(g), s.CopyOut(out, at(2))); err != nil {
		t.Fatal(err)
	}
	if got := math.Float32frombits(uint32(out[0]) | uint32(out[1])<<8 | uint32(out[2])<<16 | uint32(out[3])<<24); got != 384 {
		t.Errorf("the graph's product is %v, want 384", got)
	}
	if n != 1 || served(d) != 1 {
		t.Errorf("cuBLASLt made %d products before and %d after the graph, want 1", n, served(d))
	}
}

// TestCuBLASLtRefused: what is asked for and cannot be had is an error that says why; what nobody asked for is none.
func TestCuBLASLtRefused(t *testing.T) {
	emulatorOnly(t)
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.so")
	source := filepath.Join(dir, "empty.c")
	if err := os.WriteFile(source, []byte("int cublasLtCreate(void) { return 0; }"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command("gcc", "-shared", "-fPIC", "-o", empty, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	for _, c := range []struct {
		use, library, inject string
		kind                 engine.Kind
		text                 string
	}{
		{"maybe", "", "", engine.Invalid, `MARGO_CUBLASLT is "maybe"; use 0, 1 or autotune`},
		{"1", filepath.Join(dir, "none.so"), "", engine.Unsupported, "none.so: cannot open shared object file"},
		{"1", empty, "", engine.Unsupported, "has no function cublasLtGetVersion"},
		{"1", "", "GetVersion:111103", engine.Unsupported, "version 111103, 12.0 to 13.x are known"},
		{"1", "", "Create:1", engine.DeviceFault, "cublasLtCreate: the library was not initialized (1)"},
		{"autotune", "", "Create:3", engine.OutOfMemory, "cublasLtCreate"},
	} {
		t.Setenv("MARGO_CUBLASLT", c.use)
		t.Setenv("MARGO_CUBLASLT_LIB", c.library)
		t.Setenv("MARGO_EMU_CUBLASLT", c.inject)
		_, err := Open("emu:0", Options{})
		wantError(t, c.text, err, c.kind, c.text)
		if c.use == "maybe" {
			continue
		}
		t.Setenv("MARGO_CUBLASLT", "")
		d, err := Open("emu:0", Options{})
		if err != nil {
			t.Fatalf("not asked for: %v", err)
		}
		if have, err := d.CuBLASLt(); strings.HasPrefix(c.inject, "Create") {
			if err != nil || have.Version != "13.0.0" || have.Use != "off" {
				t.Errorf("%+v, %v", have, err)
			}
		} else {
			wantError(t, "CuBLASLt", err, c.kind, c.text)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCuBLASLtFaults: a product that the library will not make after all is ours; other failures are errors with
// the library's words.
func TestCuBLASLtFaults(t *testing.T) {
	emulatorOnly(t)
	for _, f := range []struct {
		inject string
		kind   engine.Kind // 0: the product comes out right
		text   string
	}{
		{"Matmul:15", 0, ""},
		{"Matmul:8", 0, ""},
		{"MatmulAlgoGetHeuristic:15", 0, ""},
		{"Matmul:3", engine.OutOfMemory, "cublasLtMatmul: an allocation failed (3)"},
		{"Matmul:14", engine.Internal, "cublasLtMatmul: internal error (14)"},
		{"MatmulAlgoGetHeuristic:7", engine.Internal, "cublasLtMatmulAlgoGetHeuristic: an invalid value"},
		{"MatmulDescCreate:3", engine.OutOfMemory, "cublasLtMatmulDescCreate"},
		{"MatrixLayoutCreate:3", engine.OutOfMemory, "cublasLtMatrixLayoutCreate"},
		{"MatmulPreferenceCreate:3", engine.OutOfMemory, "cublasLtMatmulPreferenceCreate"},
	} {
		d := ltDevice(t, "1")
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("MARGO_EMU_CUBLASLT", f.inject)
		if f.inject == "MatmulAlgoGetHeuristic:7" { // of types that the library may refuse this way too
			ltGemm{m: 8, n: 64, k: 64, in: engine.BF16, out: engine.BF16, bias: true}.check(t, d, s)
		}
		if f.kind == 0 {
			ltCases[0].check(t, d, s)
		} else {
			b, err := d.Alloc(3 * 4 * 64 * 64)
			if err != nil {
				t.Fatal(err)
			}
			at := func(i int) *engine.Tensor { return engine.NewTensor(b, i*4*64*64, engine.F32, 64, 64) }
			a := engine.GemmArgs{X: at(0), W: at(1), Y: at(2)}
			wantError(t, f.inject, errors.Join(s.Fill(at(0), 1), s.Fill(at(1), 1), s.Gemm(a)), f.kind, f.text)
			t.Setenv("MARGO_EMU_CUBLASLT", "")
			if err := errors.Join(s.Gemm(a), s.Sync(), b.Free()); err != nil {
				t.Errorf("after %s: %v", f.inject, err)
			}
			if n := served(d); n != 1 {
				t.Errorf("after %s: cuBLASLt made %d products, want 1", f.inject, n)
			}
		}
		t.Setenv("MARGO_EMU_CUBLASLT", "")
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCuBLASLtFile: what was timed is kept by device and versions and taken by the next process; what does not fit
// is timed anew, and a file that is none is an error.
func TestCuBLASLtFile(t *testing.T) {
	emulatorOnly(t)
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("MARGO_CUBLASLT", "autotune")
	trace := filepath.Join(t.TempDir(), "trace")
	t.Setenv("MARGO_EMU_TRACE", trace)
	once := func(cases ...ltGemm) (all []product) {
		t.Helper()
		d, err := Open("emu:0", Options{})
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range cases {
			c.check(t, d, s)
		}
		all = d.products()
		if err := errors.Join(s.Close(), d.Close()); err != nil {
			t.Fatal(err)
		}
		return all
	}
	first := once(ltCases[0], ltCases[4])
	if len(first) != 2 || first[0].choice != tuned || first[1].choice != tuned {
		t.Fatalf("%+v: want two shapes that were timed", first)
	}
	files, err := filepath.Glob(filepath.Join(cache, "margo", "*"))
	if err != nil || len(files) != 1 || filepath.Base(files[0]) != "cublaslt-margo-emulator-13000-130000.json" {
		t.Fatalf("files %v, %v", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	// Another algorithm in the file shows that the file counts, and not the clock.
	algorithm := regexp.MustCompile(`("algorithm": \[\s*\d+,\s*)\d+`)
	write := func(id string) {
		t.Helper()
		if err := os.WriteFile(files[0], algorithm.ReplaceAll(text, []byte("${1}"+id)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"0", "2"} {
		write(id)
		if err := os.Remove(trace); err != nil {
			t.Fatal(err)
		}
		second := once(ltCases[0], ltCases[4], ltCases[2])
		if len(second) != 3 || second[0].choice != stored || second[1].choice != stored || second[2].choice != tuned {
			t.Errorf("%+v: want two choices from the file and a new one", second)
		}
		ran, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		if names := regexp.MustCompile(`cublaslt_\d`).FindAllString(string(ran), 2); strings.Join(names, " ") != "cublaslt_"+id+" cublaslt_"+id {
			t.Errorf("the file says algorithm %s, %v ran", id, names)
		}
	}
	if third := once(ltCases[0], ltCases[2]); third[0].choice != stored || third[1].choice != stored {
		t.Errorf("%+v: want both from the file, which grows", third)
	}
	write("9") // an algorithm that this version does not have
	if p := once(ltCases[0]); p[0].choice != tuned {
		t.Errorf("%+v: want a new choice", p)
	}
	for _, c := range []struct{ text, want string }{
		{"{", "is not what autotune wrote"},
		{strings.Replace(string(text), "130000", "120900", 1), "cuBLASLt 120900; remove it"},
	} {
		if err := os.WriteFile(files[0], []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open("emu:0", Options{})
		wantError(t, c.text, err, engine.Invalid, c.want)
	}
	// A place that cannot be written is an error of Close, not of the sample.
	if err := os.RemoveAll(filepath.Join(cache, "margo")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cache, "margo"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open("emu:0", Options{})
	if err == nil {
		t.Fatal("a file in the folder's place was not noticed")
	}
	wantError(t, "no folder", err, engine.IO, "margo")
	if d != nil {
		t.Error("an error and a device")
	}
}

// TestCuBLASLtStreams: streams that multiply at the same time share handle and choices.
func TestCuBLASLtStreams(t *testing.T) {
	d := ltDevice(t, "1")
	for i := range 4 {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			t.Parallel()
			s, err := d.NewStream()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for range 3 {
				for _, c := range ltCases {
					c.check(t, d, s)
				}
			}
		})
	}
	t.Cleanup(func() { // before the device is closed
		want := 0
		for _, c := range ltCases {
			if c.served {
				want += 12
			}
		}
		if n := served(d); n != uint64(want) && os.Getenv("MARGO_CUDA_TEST_DEVICE") == "" {
			t.Errorf("cuBLASLt made %d products, want %d", n, want)
		}
	})
}
