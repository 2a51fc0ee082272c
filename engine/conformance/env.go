package conformance

import (
	"encoding/binary"
	"fmt"
	"math"

	"margo/engine"
	"margo/engine/ref"
)

// env is one device with the tensors of one case. A case builds its tensors
// through env; what fails panics with a fatal, which the runner catches.
type env struct {
	dev   engine.Device
	s     engine.Stream
	name  string // of the case
	rep   int    // repetition, other data
	exact bool   // dev is the float64 oracle
	gap   int    // elements between the rows of tensors made from now on
	guard int    // elements before and behind each tensor
	args  []*arg
	free  []func() error
}

// newEnv makes the environment of a case on a device. Cases differ in whether
// their tensors are aligned as an arena aligns them, or hardly at all, so that
// both are seen; shapes to be timed are.
func newEnv(dev engine.Device, c *Case, rep int) *env {
	e := &env{dev: dev, s: must(dev.NewStream()), name: c.Name, rep: rep, guard: 128}
	if !c.Bench && !c.aligned && newRandom(0, c.Name).next()&1 != 0 {
		e.guard = 67
	}
	return e
}

type fatal struct{ err error }

func must[T any](v T, err error) T {
	check(err)
	return v
}

func check(err error) {
	if err != nil {
		panic(fatal{err})
	}
}

// arg is a tensor in a buffer of its own with guards before, behind and in the
// gaps of its rows.
type arg struct {
	name   string
	t      *engine.Tensor // as the op gets it
	whole  *engine.Tensor // with guards, one contiguous row
	image  []uint32       // contents of whole before the op, see word
	guard  int            // elements of whole before and behind t
	output bool
}

const (
	sentinel = 0xc6120000 // of outputs; a number in F32 and BF16
	poison   = 0x7fc00000 // NaN: of inputs, and of outputs before they are written
)

// word is a number as it is compared: F32 or I32 bits, or BF16 bits << 16.
func word(v float32, d engine.DType) uint32 {
	if d == engine.BF16 {
		return uint32(engine.ToBF16(v)) << 16
	}
	return math.Float32bits(v)
}

// floatOf is the number that a word of F32 or BF16 stands for.
func floatOf(w uint32) float32 { return math.Float32frombits(w) }

// place makes a tensor whose element i, without gaps, is the word at(i).
func (e *env) place(name string, d engine.DType, gap int, output bool, shape []int, at func(i int) uint32) *engine.Tensor {
	t := &engine.Tensor{Off: e.guard * d.Size(), DType: d, Shape: shape}
	rows, cols := t.Rows(), t.Cols()
	t.RowStride = cols + gap
	span := 0
	if rows > 0 {
		span = (rows-1)*t.RowStride + cols
	}
	a := &arg{name: name, t: t, output: output, guard: e.guard, image: make([]uint32, span+2*e.guard)}
	around := uint32(poison)
	if output {
		around = sentinel
	} else if d == engine.I32 {
		around = 0 // a wrong index gives a wrong result, not a crash
	}
	for i := range a.image {
		a.image[i] = around
	}
	n := 0
	a.each(func(i int) { a.image[i] = at(n); n++ })
	t.Buf = must(e.dev.Alloc(len(a.image) * d.Size()))
	e.free = append(e.free, t.Buf.Free)
	a.whole = engine.NewTensor(t.Buf, 0, d, len(a.image))
	e.args = append(e.args, a)
	return t
}

// each visits the positions in whole of the elements of t, in order.
func (a *arg) each(f func(i int)) {
	for r, rows, cols := 0, a.t.Rows(), a.t.Cols(); r < rows; r++ {
		for c := 0; c < cols; c++ {
			f(a.guard + r*a.t.RowStride + c)
		}
	}
}

// in is an input. Tensors of one dimension never have gaps.
func (e *env) in(name string, d engine.DType, g gen, shape ...int) *engine.Tensor {
	return e.made(name, d, g, false, shape)
}

// inout is an output with contents.
func (e *env) inout(name string, d engine.DType, g gen, shape ...int) *engine.Tensor {
	return e.made(name, d, g, true, shape)
}

// out is an output full of NaN.
func (e *env) out(name string, d engine.DType, shape ...int) *engine.Tensor {
	return e.made(name, d, constant(nan), true, shape)
}

func (e *env) made(name string, d engine.DType, g gen, output bool, shape []int) *engine.Tensor {
	r, gap := newRandom(e.rep, e.name, name), e.gap
	if len(shape) == 1 {
		gap = 0
	}
	return e.place(name, d, gap, output, shape, func(i int) uint32 { return word(g(r, i), d) })
}

// operand is an input that meets a weight of dtype w. Rounding it to BF16 is
// part of the op when w is; the float64 oracle gets it rounded, so that the
// limit need not allow for what is defined.
func (e *env) operand(name string, d, w engine.DType, g gen, shape ...int) *engine.Tensor {
	if e.exact && w == engine.BF16 {
		g = g.toBF16()
	}
	return e.in(name, d, g, shape...)
}

// ints is an index tensor.
func (e *env) ints(name string, v []int32, shape ...int) *engine.Tensor {
	if shape == nil {
		shape = []int{len(v)}
	}
	return e.place(name, engine.I32, 0, false, shape, func(i int) uint32 { return uint32(v[i]) })
}

// random is a generator of numbers that belong to the case, not to a tensor.
func (e *env) random(name string) *random { return newRandom(e.rep, e.name, name) }

// packed is a weight in dtype d, made from a tensor of dtype from. Where the
// device packs, the source is overwritten and freed before the op runs.
func (e *env) packed(name string, d, from engine.DType, g gen, n, k int) (*engine.Tensor, engine.Packed) {
	return e.packedAs(name, d, from, false, g, n, k)
}

// packedAs is packed; fp8 rounds the numbers to e4m3 first, for the oracle as for the device, and says so to Pack.
func (e *env) packedAs(name string, d, from engine.DType, fp8 bool, g gen, n, k int) (*engine.Tensor, engine.Packed) {
	src := &engine.Tensor{DType: from, Shape: []int{n, k}, RowStride: k}
	src.Buf = must(e.dev.Alloc(max(src.Bytes(), 4)))
	r := newRandom(e.rep, e.name, name)
	words := make([]uint32, n*k)
	row, codes := make([]float32, k), make([]byte, k)
	for at := 0; at < n; at++ {
		for i := range row {
			row[i] = g(r, at*k+i)
		}
		if fp8 {
			engine.RoundE4M3(row, codes)
		}
		for i, v := range row {
			words[at*k+i] = word(v, from)
		}
	}
	check(e.s.CopyIn(src, toBytes(words, from)))
	check(e.s.Sync())
	p := must(e.dev.Pack(engine.PackArgs{W: src, DType: d, FP8: fp8}))
	if p == nil {
		e.free = append(e.free, src.Buf.Free)
		return src, nil
	}
	e.free = append(e.free, p.Free)
	check(e.s.Fill(src, nan))
	check(e.s.Sync())
	check(src.Buf.Free())
	return engine.NewTensor(nil, 0, d, n, k), p
}

// scratch is memory that is neither input nor output of the case.
func (e *env) scratch(d engine.DType, shape ...int) *engine.Tensor {
	t := engine.NewTensor(nil, 0, d, shape...)
	t.Buf = must(e.dev.Alloc(max(t.Bytes(), 4)))
	e.free = append(e.free, t.Buf.Free)
	return t
}

// upload puts every tensor into the state before the op.
func (e *env) upload() {
	for _, a := range e.args {
		check(e.s.CopyIn(a.whole, toBytes(a.image, a.t.DType)))
	}
}

// run uploads, runs f and returns the outputs' memory, guards included.
func (e *env) run(f func(engine.Stream) error) map[string][]uint32 {
	e.upload()
	check(f(e.s))
	return e.download()
}

// download waits, and returns the memory of every tensor.
func (e *env) download() map[string][]uint32 {
	check(e.s.Sync())
	got := map[string][]uint32{}
	for _, a := range e.args {
		b := make([]byte, a.whole.Bytes())
		check(e.s.CopyOut(b, a.whole))
		got[a.name] = fromBytes(b, a.t.DType)
	}
	return got
}

// values are the elements of an output without gaps: as the oracle stores
// them, or out of the memory that run returned.
func (e *env) values(a *arg, memory []uint32) []float64 {
	if _, ok := e.dev.(*ref.Device); ok {
		return must(ref.Float64s(a.t))
	}
	v := make([]float64, 0, a.t.Elems())
	a.each(func(i int) {
		if a.t.DType == engine.I32 {
			v = append(v, float64(int32(memory[i])))
			return
		}
		v = append(v, float64(floatOf(memory[i])))
	})
	return v
}

// touched says what changed that should not have: anything but the elements of
// outputs.
func (e *env) touched(memory map[string][]uint32) error {
	for _, a := range e.args {
		got := memory[a.name]
		want := append([]uint32(nil), a.image...)
		if a.output {
			a.each(func(i int) { want[i] = got[i] })
		}
		for i := range want {
			if got[i] != want[i] {
				return fmt.Errorf("%s: %s changed from %#08x to %#08x", a.name, a.where(i), want[i], got[i])
			}
		}
	}
	return nil
}

// where describes position i of whole.
func (a *arg) where(i int) string {
	i -= a.guard
	rows, cols, stride := a.t.Rows(), a.t.Cols(), a.t.RowStride
	switch {
	case i < 0:
		return fmt.Sprintf("the element %d before the first", -i)
	case rows == 0 || i >= (rows-1)*stride+cols:
		return "an element after the last"
	case i%stride >= cols:
		return fmt.Sprintf("the gap behind row %d", i/stride)
	}
	return fmt.Sprintf("element (%d,%d)", i/stride, i%stride)
}

func (e *env) close() {
	for _, f := range e.free {
		check(f())
	}
	check(e.s.Close())
}

func toBytes(words []uint32, d engine.DType) []byte {
	b := make([]byte, 0, len(words)*d.Size())
	for _, w := range words {
		if d == engine.BF16 {
			b = binary.LittleEndian.AppendUint16(b, uint16(w>>16))
		} else {
			b = binary.LittleEndian.AppendUint32(b, w)
		}
	}
	return b
}

func fromBytes(b []byte, d engine.DType) []uint32 {
	words := make([]uint32, len(b)/d.Size())
	for i := range words {
		if d == engine.BF16 {
			words[i] = uint32(binary.LittleEndian.Uint16(b[2*i:])) << 16
		} else {
			words[i] = binary.LittleEndian.Uint32(b[4*i:])
		}
	}
	return words
}
