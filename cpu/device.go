package cpu

// #include "core.h"
// #include "gemm.h"
// #cgo noescape mc_pack
// #cgo nocallback mc_pack
import "C"

import (
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"margo/engine"
)

// Options of a Device. The zero value uses all CPUs the process may use.
type Options struct {
	Threads int  // worker threads of a kernel at most; 0: DefaultThreads()
	Poison  bool // fill new memory with NaN, to find reads of undefined contents
}

// Device is the machine's CPU cores and memory.
type Device struct {
	threads int
	poison  bool
	used    atomic.Int64 // bytes of buffers and packed weights

	peakLock sync.Mutex
	peaks    struct{ f32, bf16, read float64 } // the highest measured
}

// New opens the CPU device.
func New(o Options) (*Device, error) {
	if o.Threads < 0 || o.Threads > 1024 {
		return nil, engine.Errorf("open cpu", engine.Invalid, "%d threads; use 1 to 1024, or 0 for all CPUs", o.Threads)
	}
	if isa := os.Getenv("MARGO_CPU_ISA"); isa != "" && !slices.Contains(ISAs(), isa) {
		return nil, engine.Errorf("open cpu", engine.Invalid, "MARGO_CPU_ISA is %q; this machine runs %s", isa, strings.Join(ISAs(), ", "))
	}
	if o.Threads == 0 {
		o.Threads = DefaultThreads()
	}
	poolCPUs()
	return &Device{threads: o.Threads, poison: o.Poison}, nil
}

// Name is "cpu".
func (d *Device) Name() string { return "cpu" }

// Info describes the machine. Peaks are there after MeasurePeaks.
func (d *Device) Info() engine.Info {
	info := engine.Info{Name: d.Name(), Model: cpuModel(), Arch: ISA(), Threads: d.threads}
	info.MemTotal, info.MemFree = Memory()
	d.peakLock.Lock()
	defer d.peakLock.Unlock()
	info.PeakF32, info.PeakBF16, info.PeakMemory = d.peaks.f32, d.peaks.bf16, d.peaks.read
	return info
}

// MeasurePeaks measures what the device's threads can do at most, for Info, which
// has the highest ever measured; it takes about a third of a second and 256 MiB.
func (d *Device) MeasurePeaks() {
	d.ProbePeak(engine.F32)
	d.ProbePeak(engine.BF16)
	read := PeakRead(256<<20, d.threads)
	d.peakLock.Lock()
	defer d.peakLock.Unlock()
	d.peaks.read = max(d.peaks.read, read)
}

// ProbePeak measures PeakFLOPS, for Info.
func (d *Device) ProbePeak(t engine.DType) {
	best := PeakFLOPS(t, d.threads)
	d.peakLock.Lock()
	defer d.peakLock.Unlock()
	if t == engine.BF16 {
		d.peaks.bf16 = max(d.peaks.bf16, best)
	} else {
		d.peaks.f32 = max(d.peaks.f32, best)
	}
}

// Arithmetic is MeanFLOPS of the device's threads: what the machine, shared perhaps,
// gives at this moment.
func (d *Device) Arithmetic(t engine.DType, over time.Duration) float64 {
	return MeanFLOPS(t, d.threads, over)
}

// Supports is true for all ops, in both dtypes.
func (d *Device) Supports(op engine.Op, t engine.DType) bool {
	return t == engine.F32 || t == engine.BF16
}

// NewStream makes a stream. Streams of one device or several may be used at the
// same time; their kernels share the machine.
func (d *Device) NewStream() (engine.Stream, error) {
	return &stream{Unimplemented: engine.Unimplemented{DeviceName: d.Name()}, dev: d}, nil
}

// Close frees nothing: buffers are freed one by one, and the pool stays.
func (d *Device) Close() error { return nil }

// Used is the number of bytes in buffers and packed weights.
func (d *Device) Used() int64 { return d.used.Load() }

// block is memory from mc_alloc.
type block struct {
	dev   *Device
	p     unsafe.Pointer // nil once freed
	bytes int
}

func (b *block) Bytes() int { return b.bytes }

// Free gives the memory back; a second time it is an error. Kernels have
// finished when their call returns, so nothing can still be using it.
func (b *block) Free() error {
	if b.p == nil {
		return b.dev.errorf("free", engine.Invalid, "memory was freed before")
	}
	C.mc_free(b.p)
	b.dev.used.Add(-int64(b.bytes))
	b.p, b.bytes = nil, 0
	return nil
}

func (d *Device) alloc(op engine.Op, bytes int) (block, error) {
	if bytes < 0 {
		return block{}, d.errorf(op, engine.Invalid, "%d bytes", bytes)
	}
	p := C.mc_alloc(C.size_t(bytes))
	if p == nil {
		return block{}, d.errorf(op, engine.OutOfMemory, "%d bytes asked", bytes)
	}
	d.used.Add(int64(bytes))
	return block{dev: d, p: p, bytes: bytes}, nil
}

// buffer is engine.Buffer.
type buffer struct{ block }

// Alloc returns memory aligned to a cache line; from 1 MiB on it lies on huge
// pages where the system grants them.
func (d *Device) Alloc(bytes int) (engine.Buffer, error) {
	b, err := d.alloc("alloc", bytes)
	if err != nil {
		return nil, err
	}
	if d.poison {
		all := unsafe.Slice((*byte)(b.p), bytes)
		for i := range all {
			all[i] = 0xff // a NaN in F32 and BF16, −1 in I32
		}
	}
	return &buffer{b}, nil
}

// packed is a weight in panels (core.h).
type packed struct {
	block
	dtype engine.DType
	n, k  int
}

// Pack lays W out in panels of 32 rows, in the dtype asked for.
func (d *Device) Pack(a engine.PackArgs) (engine.Packed, error) {
	if err := d.named(a.Check()); err != nil {
		return nil, err
	}
	return d.pack(a.W, a.DType)
}

func (d *Device) pack(w *engine.Tensor, t engine.DType) (*packed, error) {
	n, k := w.Rows(), w.Cols()
	b, err := d.alloc("pack", int(C.mc_packed_bytes(C.int(t), C.int64_t(n), C.int64_t(k))))
	if err != nil {
		return nil, err
	}
	p := &packed{b, t, n, k}
	v := views{dev: d}
	src := v.ptr(w)
	status := C.int(C.MC_OK)
	if v.err == nil {
		status = C.mc_pack(p.p, C.int(t), src, C.int64_t(w.RowStride), C.int(w.DType), C.int64_t(n), C.int64_t(k), C.int(d.threads))
	}
	if err := d.outcome("pack", v.err, status); err != nil {
		p.Free()
		return nil, err
	}
	return p, nil
}

// weight gives the packed form of a weight and its dtype; without a Packed it
// packs into temp, which the caller frees.
func (v *views) weight(w *engine.Tensor, p engine.Packed, temp *[]*packed) (unsafe.Pointer, engine.DType) {
	if v.err != nil {
		return nil, 0
	}
	q, ok := p.(*packed)
	if p == nil {
		var err error
		if q, err = v.dev.pack(w, w.DType); err != nil {
			v.err = err
			return nil, 0
		}
		*temp = append(*temp, q)
	} else if !ok || q.dev != v.dev || q.p == nil || q.n != w.Rows() || q.k != w.Cols() {
		v.fail(engine.Invalid, "Packed of W %v is not from %s, was freed, or is of another weight", w, v.dev.Name())
		return nil, 0
	}
	return q.p, q.dtype
}

func freeAll(temp []*packed) {
	for _, p := range temp {
		p.Free()
	}
}

// outcome is the error of a call: of its arguments, or of the native status.
func (d *Device) outcome(op engine.Op, err error, status C.int) error {
	if err == nil {
		return d.failed(op, status)
	}
	if e, ok := err.(*engine.Error); ok {
		e.Op = string(op)
	}
	return d.named(err)
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
