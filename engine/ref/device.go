package ref

import (
	"math"
	"runtime"
	"sync"

	"margo/engine"
)

// Mode says in what arithmetic a Device computes.
type Mode uint8

const (
	Exact   Mode = iota // float64, nothing is rounded
	Rounded             // every operation rounded, as doc.go says
)

// Device is the oracle. Its streams execute every call before they return.
type Device struct {
	mode Mode
	mu   sync.Mutex
	used int
}

// New makes an oracle. It needs no Close.
func New(m Mode) *Device { return &Device{mode: m} }

// memory is what the device pretends to have, in declared bytes; slots take
// four times as much.
const memory = 4 << 30

// Name is "ref" or, when Rounded, "ref-rounded".
func (d *Device) Name() string {
	if d.mode == Rounded {
		return "ref-rounded"
	}
	return "ref"
}

// Info describes the device.
func (d *Device) Info() engine.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	return engine.Info{Name: d.Name(), Model: "float64 oracle", Arch: "go", Threads: runtime.GOMAXPROCS(0),
		MemTotal: memory, MemFree: int64(memory - d.used)}
}

// Supports is true: the oracle has every op in every dtype.
func (d *Device) Supports(_ engine.Op, t engine.DType) bool {
	return t == engine.F32 || t == engine.BF16
}

// NewStream makes a stream.
func (d *Device) NewStream() (engine.Stream, error) {
	if d.mode == Rounded {
		return &stream[float32]{dev: d}, nil
	}
	return &stream[float64]{dev: d}, nil
}

// Close frees nothing: buffers belong to the garbage collector.
func (d *Device) Close() error { return nil }

// buffer is memory: slot i holds the element at byte 2·i.
type buffer struct {
	dev   *Device
	bytes int
	slots []float64 // nil once freed
}

// Alloc returns memory full of NaN.
func (d *Device) Alloc(bytes int) (engine.Buffer, error) {
	if bytes < 0 {
		return nil, d.errorf("alloc", engine.Invalid, "%d bytes", bytes)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if bytes > memory-d.used {
		return nil, d.errorf("alloc", engine.OutOfMemory, "%d bytes asked, %d of %d in use", bytes, d.used, memory)
	}
	d.used += bytes
	b := &buffer{dev: d, bytes: bytes, slots: make([]float64, bytes/2+1)}
	for i := range b.slots {
		b.slots[i] = math.NaN()
	}
	return b, nil
}

func (b *buffer) Bytes() int { return b.bytes }

// Free gives the memory back. The second time is an error.
func (b *buffer) Free() error {
	b.dev.mu.Lock()
	defer b.dev.mu.Unlock()
	if b.slots == nil {
		return b.dev.errorf("free", engine.Invalid, "buffer of %d bytes is freed twice", b.bytes)
	}
	b.dev.used -= b.bytes
	b.slots = nil
	return nil
}

// packed is a weight [N,K] as GEMM reads it: its elements, rounded to dtype.
type packed struct {
	dev   *Device
	dtype engine.DType
	n     int
	v     any // []float64 when Exact, []float32 when Rounded, nil once freed
}

// Pack copies the weight, rounded to the dtype in mode Rounded.
func (d *Device) Pack(a engine.PackArgs) (p engine.Packed, err error) {
	if err := d.named(a.Check()); err != nil {
		return nil, err
	}
	defer d.catch("pack", &err)
	q := &packed{dev: d, dtype: a.DType, n: a.W.Elems()}
	if d.mode == Exact {
		q.v = load[float64](d, a.W)
		return q, nil
	}
	v := load[float32](d, a.W)
	if a.DType == engine.BF16 {
		toBF16(v)
	}
	q.v = v
	return q, nil
}

func (p *packed) Bytes() int { return p.n * p.dtype.Size() }

func (p *packed) Free() error {
	if p.v == nil {
		return p.dev.errorf("free", engine.Invalid, "packed weight is freed twice")
	}
	p.v = nil
	return nil
}

// Float64s returns the elements of a tensor of a ref device as they are
// stored, row after row without gaps.
func Float64s(t *engine.Tensor) (v []float64, err error) {
	if err := engine.CheckFill(t); err != nil {
		return nil, err
	}
	b, ok := t.Buf.(*buffer)
	if !ok {
		return nil, engine.Errorf("read", engine.Invalid, "%v is not in memory of ref", t)
	}
	defer b.dev.catch("read", &err)
	return load[float64](b.dev, t), nil
}

// errorf makes an error that names the device.
func (d *Device) errorf(op engine.Op, k engine.Kind, format string, args ...any) *engine.Error {
	e := engine.Errorf(string(op), k, format, args...)
	e.Device = d.Name()
	return e
}

// named puts the device's name into an error of the engine.
func (d *Device) named(err error) error {
	if e, ok := err.(*engine.Error); ok && e.Device == "" {
		e.Device = d.Name()
	}
	return err
}

// catch turns a fault thrown below into an error of op.
func (d *Device) catch(op engine.Op, err *error) {
	switch r := recover().(type) {
	case nil:
	case *engine.Error:
		r.Op = string(op)
		*err = r
	default:
		panic(r)
	}
}

// fault stops the op that is running; catch returns it as an error.
func (d *Device) fault(format string, args ...any) {
	panic(d.errorf("", engine.Invalid, format, args...))
}
