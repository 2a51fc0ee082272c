package ptx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"margo/cuda"
	"margo/engine"
	"margo/engine/ref"
)

// problem is one call of an op: its operands in the interpreter's memory, and the same numbers for the oracle.
type problem struct {
	t   testing.TB
	mem *Memory
	gap int // elements between the rows of operands made from now on: 0xff, which nobody may change
	cc  int // compute capability of the emulator: 0 is 80
	all []*operandOf
}

// operandOf is a tensor. A word holds F32 or I32 bits, or BF16 bits << 16.
type operandOf struct {
	d      engine.DType
	shape  []int
	ld     int
	gen    gen // nil: an output that begins as NaN
	out    bool
	at     uint64
	stream uint64
	rep    int // of made, the words that were asked for last
	made   []uint32
}

// gen makes element i of an operand.
type gen func(r *rand.Rand, i int) float32

func normal(sigma float64) gen {
	return func(r *rand.Rand, _ int) float32 { return float32(sigma * r.NormFloat64()) }
}

func uniform(lo, hi float64) gen {
	return func(r *rand.Rand, _ int) float32 { return float32(lo + (hi-lo)*r.Float64()) }
}

func fixed[E int | int32 | float32](v ...E) gen {
	return func(_ *rand.Rand, i int) float32 { return float32(v[i]) }
}

// bf16Of makes numbers that bf16 holds: of operands that a kernel rounds when it loads them.
func (g gen) bf16Of() gen {
	return func(r *rand.Rand, i int) float32 { return engine.FromBF16(engine.ToBF16(g(r, i))) }
}

func newProblem(t testing.TB) *problem { return &problem{t: t, mem: &Memory{}} }

func (p *problem) add(o *operandOf) *operandOf {
	p.t.Helper()
	rows, cols := o.view().Rows(), o.view().Cols()
	o.ld, o.stream = cols+p.gap, uint64(len(p.all)+1)
	size := o.d.Size()
	o.at = p.mem.Alloc(size * (max(rows-1, 0)*o.ld + cols))
	for i, w := range o.words(0) {
		b, err := p.mem.Bytes(o.at+uint64(size*(i/cols*o.ld+i%cols)), size)
		if err != nil {
			p.t.Fatal(err)
		}
		if o.d == engine.BF16 {
			w >>= 16
		}
		store(b, uint64(w))
	}
	p.all = append(p.all, o)
	return o
}

// in is an operand, inout one that the kernel changes, out one that it writes.
func (p *problem) in(d engine.DType, g gen, shape ...int) *operandOf {
	return p.add(&operandOf{d: d, gen: g, shape: shape})
}
func (p *problem) inout(d engine.DType, g gen, shape ...int) *operandOf {
	return p.add(&operandOf{d: d, gen: g, shape: shape, out: true})
}
func (p *problem) out(d engine.DType, shape ...int) *operandOf {
	return p.add(&operandOf{d: d, shape: shape, out: true})
}
func (p *problem) f32(shape ...int) *operandOf { return p.in(engine.F32, normal(1), shape...) }

// ids are token and image of n rows.
func (p *problem) ids(n int) *operandOf {
	gap := p.gap
	p.gap = 0
	defer func() { p.gap = gap }()
	return p.in(engine.I32, func(_ *rand.Rand, i int) float32 { return float32(3*i + 1) }, n, 2)
}

func (o *operandOf) view() *engine.Tensor { return engine.NewTensor(nil, 0, o.d, o.shape...) }

// words are the elements in repetition rep, without gaps; of an output nothing.
func (o *operandOf) words(rep int) []uint32 {
	if o.gen == nil {
		return nil
	}
	if o.made != nil && o.rep == rep {
		return o.made
	}
	r, w := rand.New(rand.NewPCG(uint64(rep), o.stream)), make([]uint32, o.view().Elems())
	for i := range w {
		switch v := o.gen(r, i); o.d {
		case engine.I32:
			w[i] = uint32(int32(v))
		case engine.BF16:
			w[i] = uint32(engine.ToBF16(v)) << 16
		default:
			w[i] = math.Float32bits(v)
		}
	}
	o.rep, o.made = rep, w
	return w
}

func number(w uint32, d engine.DType) float64 {
	if d == engine.I32 {
		return float64(int32(w))
	}
	return float64(math.Float32frombits(w))
}

// got reads an operand from the interpreter's memory and checks the gaps of its rows.
func (p *problem) got(o *operandOf) []float64 {
	p.t.Helper()
	rows, cols, size := o.view().Rows(), o.view().Cols(), o.d.Size()
	var v []float64
	for r := range rows {
		for c := range o.ld {
			if r == rows-1 && c >= cols {
				break
			}
			b, err := p.mem.Bytes(o.at+uint64(size*(r*o.ld+c)), size)
			if err != nil {
				p.t.Fatal(err)
			}
			w := uint32(load(b))
			if c >= cols {
				if w != uint32(load(poisoned(size))) {
					p.t.Fatalf("the gap behind row %d was written", r)
				}
				continue
			}
			if o.d == engine.BF16 {
				w <<= 16
			}
			v = append(v, number(w, o.d))
		}
	}
	return v
}

// call enqueues the op; at gives the tensors of the operands on the device.
type call func(s engine.Stream, at func(*operandOf) *engine.Tensor) error

// compute runs the op on a device with the numbers of a repetition and gives its outputs.
func (p *problem) compute(dev engine.Device, rep int, f call) [][]float64 {
	p.t.Helper()
	fatal := func(err error) {
		if err != nil {
			p.t.Helper()
			p.t.Fatal(err)
		}
	}
	s, err := dev.NewStream()
	fatal(err)
	defer s.Close()
	tensors := map[*operandOf]*engine.Tensor{}
	for _, o := range p.all {
		x := o.view()
		x.Buf, err = dev.Alloc(max(x.Bytes(), 4))
		fatal(err)
		defer x.Buf.Free()
		tensors[o] = x
		if o.gen != nil {
			var b []byte
			for _, w := range o.words(rep) {
				if o.d == engine.BF16 {
					b = binary.LittleEndian.AppendUint16(b, uint16(w>>16))
				} else {
					b = binary.LittleEndian.AppendUint32(b, w)
				}
			}
			fatal(s.CopyIn(x, b))
		}
	}
	fatal(f(s, func(o *operandOf) *engine.Tensor { return tensors[o] }))
	fatal(s.Sync())
	var outs [][]float64
	for _, o := range p.all {
		if !o.out {
			continue
		}
		if _, ok := dev.(*ref.Device); ok {
			v, err := ref.Float64s(tensors[o])
			fatal(err)
			outs = append(outs, v)
			continue
		}
		b := make([]byte, tensors[o].Bytes())
		fatal(s.CopyOut(b, tensors[o]))
		var v []float64
		for size := o.d.Size(); len(b) > 0; b = b[size:] {
			w := uint32(load(b[:size]))
			if o.d == engine.BF16 {
				w <<= 16
			}
			v = append(v, number(w, o.d))
		}
		outs = append(outs, v)
	}
	return outs
}

// verify compares the outputs in the interpreter's memory with the oracle in float64, and with the emulator, which compiles the
// same source for the host and computes the op by the same rules. They may differ from each other as from the oracle: nvcc fuses
// products and sums that the host's compiler does not, and exp and its like are other libraries'.
func (p *problem) verify(f call) {
	p.t.Helper()
	if err := p.disagreement(f); err != nil {
		p.t.Fatal(err)
	}
}

// disagreement is the first difference from the oracle that is larger than the limit of the table in engine/conformance: twice the
// oracle's own distance when it rounds every operation as a device would, from at least 4096 elements of other random numbers, and
// one rounding of the output.
func (p *problem) disagreement(f call) error {
	p.t.Helper()
	var outputs []*operandOf
	least := math.MaxInt
	for _, o := range p.all {
		if o.out {
			outputs = append(outputs, o)
			least = min(least, o.view().Elems())
		}
	}
	limit := make([]float64, len(outputs))
	var want, rounded [][]float64
	for rep := range min(max(4096/least, 1), 16) {
		e, r := p.compute(ref.New(ref.Exact), rep, f), p.compute(ref.New(ref.Rounded), rep, f)
		if rep == 0 {
			want, rounded = e, r
		}
		for i, o := range outputs {
			apart, largest := 0.0, 0.0
			for j, v := range e[i] {
				if d := math.Abs(v - r[i][j]); d < math.Inf(1) {
					apart = max(apart, d)
				}
				if !math.IsInf(v, 0) && v == v {
					largest = max(largest, math.Abs(v))
				}
			}
			unit := map[engine.DType]float64{engine.F32: 0x1p-24, engine.BF16: 0x1p-9}[o.d]
			limit[i] = max(limit[i], 2*apart+unit*largest)
		}
	}
	differ := func(whom string, i, j int, v, w float64) error {
		if (v == v) != (w == w) || math.Abs(v-w) > limit[i] {
			return fmt.Errorf("output %d: element %d of %v is %g, %s has %g: apart %.3g, limit %.3g", i, j, outputs[i].shape, v, whom, w, math.Abs(v-w), limit[i])
		}
		return nil
	}
	for i, o := range outputs {
		for j, v := range p.got(o) {
			w := want[i][j]
			if rounded[i][j] != rounded[i][j] {
				w = rounded[i][j]
			}
			if err := differ("the oracle", i, j, v, w); err != nil {
				return err
			}
		}
	}
	dev := emulator(p.t, p.cc)
	if dev == nil {
		return nil
	}
	equal, all := 0, 0
	for i, e := range p.compute(dev, 0, f) {
		for j, v := range p.got(outputs[i]) {
			if err := differ("the emulator", i, j, v, e[j]); err != nil {
				return err
			}
			if math.Float64bits(v) == math.Float64bits(e[j]) || v != v && e[j] != e[j] {
				equal++
			}
			all++
		}
	}
	p.t.Logf("emulation: %d of %d elements have the same bits", equal, all)
	return nil
}

var (
	emulated     map[int]*cuda.Device // by compute capability
	emulatedOnce sync.Once
	emulatedErr  error
)

// openEmulators opens the emulated plugin as a device of 8.0 and, for the kernels that only Hopper runs, a copy of it as one of 9.0: the
// emulator is one kind of device in a process.
func openEmulators() error {
	path := os.Getenv("MARGO_EMU_PLUGIN")
	if path == "" {
		var err error
		if path, err = filepath.Abs("../../bin/libmargo_emu.so"); err != nil {
			return err
		}
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "margo-ptx")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) // an open library needs no name
	again := filepath.Join(dir, "libmargo_emu.so")
	if err := os.WriteFile(again, whole, 0o755); err != nil {
		return err
	}
	emulated = map[int]*cuda.Device{}
	for _, e := range []struct {
		cc   int
		path string
	}{{80, path}, {90, again}} {
		os.Setenv("MARGO_EMU_PLUGIN", e.path)
		os.Setenv("MARGO_EMU_CC", strconv.Itoa(e.cc))
		d, err := cuda.Open("emu:0", cuda.Options{Poison: true})
		if err != nil {
			return err
		}
		emulated[e.cc] = d
	}
	return nil
}

// emulator gives the emulated device of a compute capability (0: 80), if the plugin was built. In CI it was. One of other sources is an error.
func emulator(t testing.TB, cc int) engine.Device {
	t.Helper()
	emulatedOnce.Do(func() { emulatedErr = openEmulators() })
	if emulatedErr != nil {
		if os.Getenv("MARGO_NVCC_REQUIRED") != "" || !errors.Is(emulatedErr, fs.ErrNotExist) {
			t.Fatalf("no emulated plugin: make emu builds one (%v)", emulatedErr)
		}
		t.Logf("NOT COMPARED with emulation: make emu builds the plugin (%v)", emulatedErr)
		return nil
	}
	if cc == 0 {
		cc = 80
	}
	return emulated[cc]
}

// template reads what the mangled name of a kernel says of its arguments: types as f32, bf16, u32, u16, i32, numbers and truth
// values as they are. A class that comes twice is a substitution the second time: it is bf16, the only class.
func template(t testing.TB, name, kernel string) []string {
	t.Helper()
	at := strings.Index(name, kernel+"I")
	if at < 0 {
		t.Fatalf("%s has no arguments of %s", name, kernel)
	}
	var out []string
	for s := name[at+len(kernel)+1:]; s != "" && s[0] != 'E'; {
		n := 1
		switch {
		case strings.HasPrefix(s, "4bf16"):
			out, n = append(out, "bf16"), 5
		case s[0] == 'S' || s[0] == 'T':
			out, n = append(out, "bf16"), strings.IndexByte(s, '_')+1
		case s[0] == 'L':
			n = strings.IndexByte(s, 'E') + 1
			out = append(out, s[2:n-1])
		default:
			ty, ok := map[byte]string{'f': "f32", 'j': "u32", 't': "u16", 'i': "i32"}[s[0]]
			if !ok {
				t.Fatalf("%s: argument %q is not known", name, s)
			}
			out = append(out, ty)
		}
		s = s[n:]
	}
	return out
}

func dtype(s string) engine.DType {
	return map[string]engine.DType{"f32": engine.F32, "u32": engine.F32, "i32": engine.I32, "bf16": engine.BF16, "u16": engine.BF16}[s]
}

func numberOf(t testing.TB, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
