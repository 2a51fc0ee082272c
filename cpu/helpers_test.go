package cpu

import (
	"math"
	"math/rand"
	"testing"
	"unsafe"

	"margo/engine"
)

// fixture is a device with a stream, and tensors that are freed with the test.
type fixture struct {
	testing.TB
	d *Device
	s engine.Stream
}

func open(t testing.TB, threads int) *fixture {
	t.Helper()
	d, err := New(Options{Threads: threads, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	return &fixture{t, d, s}
}

// tensor makes a tensor [rows, cols] whose rows are stride apart.
func (f *fixture) tensor(dt engine.DType, rows, cols, stride int) *engine.Tensor {
	f.Helper()
	b, err := f.d.Alloc(max(rows*stride*dt.Size(), 1))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { b.Free() })
	return &engine.Tensor{Buf: b, DType: dt, Shape: []int{rows, cols}, RowStride: stride}
}

// put makes a contiguous tensor of v, rounded to dt.
func (f *fixture) put(dt engine.DType, v []float32, rows, cols int) *engine.Tensor {
	t := f.tensor(dt, rows, cols, cols)
	f.set(t, v)
	return t
}

func (f *fixture) set(t *engine.Tensor, v []float32) {
	for r := 0; r < t.Rows(); r++ {
		for c := 0; c < t.Cols(); c++ {
			i := t.Off/t.DType.Size() + r*t.RowStride + c
			if x := v[r*t.Cols()+c]; t.DType == engine.BF16 {
				elems[uint16](t)[i] = engine.ToBF16(x)
			} else {
				elems[float32](t)[i] = x
			}
		}
	}
}

// get reads a tensor, widened.
func (f *fixture) get(t *engine.Tensor) []float32 {
	out := make([]float32, 0, t.Elems())
	for r := 0; r < t.Rows(); r++ {
		for c := 0; c < t.Cols(); c++ {
			i := t.Off/t.DType.Size() + r*t.RowStride + c
			if t.DType == engine.BF16 {
				out = append(out, engine.FromBF16(elems[uint16](t)[i]))
			} else {
				out = append(out, elems[float32](t)[i])
			}
		}
	}
	return out
}

// elems views the whole buffer of t.
func elems[E any](t *engine.Tensor) []E {
	b := t.Buf.(*buffer)
	var e E
	return unsafe.Slice((*E)(b.p), b.bytes/int(unsafe.Sizeof(e)))
}

func (f *fixture) pack(w *engine.Tensor, dt engine.DType) engine.Packed {
	f.Helper()
	p, err := f.d.Pack(engine.PackArgs{W: w, DType: dt})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { p.Free() })
	return p
}

func (f *fixture) ok(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func randn(r *rand.Rand, n int, scale float64) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(r.NormFloat64() * scale)
	}
	return v
}

// rounded is v as dt holds it.
func rounded(v []float32, dt engine.DType) []float32 {
	if dt == engine.F32 {
		return v
	}
	out := make([]float32, len(v))
	for i, x := range v {
		out[i] = engine.FromBF16(engine.ToBF16(x))
	}
	return out
}

func activate(a engine.Activation, x float64) float64 {
	switch a {
	case engine.GELUErf:
		return x / 2 * (1 + math.Erf(x/math.Sqrt2))
	case engine.GELUTanh:
		return x / 2 * (1 + math.Tanh(math.Sqrt(2/math.Pi)*(x+0.044715*x*x*x)))
	case engine.SiLU:
		return x / (1 + math.Exp(-x))
	}
	return x
}

// eachISA runs f under every instruction set of the machine.
func eachISA(t *testing.T, f func(t *testing.T)) {
	for _, isa := range ISAs() {
		t.Run(isa, func(t *testing.T) {
			if !forceISA(isa) {
				t.Fatalf("cannot run %s", isa)
			}
			defer forceISA("")
			f(t)
		})
	}
}

func sameBits(a, b []float32) int {
	for i := range a {
		if math.Float32bits(a[i]) != math.Float32bits(b[i]) {
			return i
		}
	}
	return -1
}
