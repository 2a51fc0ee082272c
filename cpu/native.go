package cpu

// The flags are such that a plain go build accepts. -std=c11 rather than gnu11:
// with it the compiler does not contract a·b+c into one rounding by itself.

// #cgo CFLAGS: -O3 -std=c11 -D_GNU_SOURCE -Wall
// #cgo LDFLAGS: -lm -lpthread
// #cgo noescape mc_alloc
// #cgo nocallback mc_alloc
// #cgo noescape mc_free
// #cgo nocallback mc_free
// #cgo nocallback mc_kern
// #cgo nocallback mc_pool_cpus
// #cgo nocallback mc_pool_limit
// #cgo nocallback mc_kern_named
// #cgo nocallback mc_kern_force
// #cgo nocallback mc_peak_flops
// #cgo nocallback mc_peak_mean
// #cgo nocallback mc_peak_stream
// #include <stdlib.h>
// #include "core.h"
// #include "ops.h"
// #include "peak.h"
import "C"

import (
	"sync"
	"time"
	"unsafe"

	"margo/engine"
)

// ISA is the instruction set in use: "avx512-bf16", "avx512", "avx2" or
// "generic". The environment variable MARGO_CPU_ISA chooses another one that
// the machine can run.
func ISA() string { return C.GoString(C.mc_kern().name) }

// ISAs lists the instruction sets this machine can run, best first.
func ISAs() []string {
	var out []string
	for _, n := range []string{"avx512-bf16", "avx512", "avx2", "generic"} {
		c := C.CString(n)
		if C.mc_kern_named(c) != nil {
			out = append(out, n)
		}
		C.free(unsafe.Pointer(c))
	}
	return out
}

// forceISA switches the instruction set while no kernel runs; "" goes back to
// the default. For tests.
func forceISA(name string) bool {
	if name == "" {
		C.mc_kern_force(nil)
		return true
	}
	c := C.CString(name)
	defer C.free(unsafe.Pointer(c))
	k := C.mc_kern_named(c)
	if k != nil {
		C.mc_kern_force(k)
	}
	return k != nil
}

// poolCPUs tells the pool how many workers may run side by side.
var poolCPUs = sync.OnceFunc(func() { setPoolCPUs(DefaultThreads()) })

func setPoolCPUs(n int) (before int) { return int(C.mc_pool_cpus(C.int(n))) }

// limitPool lets the pool make no worker threads beyond n, as a system without
// resources does; below 0 takes that back. For tests.
func limitPool(n int) { C.mc_pool_limit(C.int(n)) }

// PeakFLOPS measures floating-point operations per second of threads threads
// doing nothing but multiply-adds on registers, FMA in F32, dot products of
// bf16 pairs with F32 sums in BF16: the best millisecond of a tenth of a second.
func PeakFLOPS(d engine.DType, threads int) float64 {
	poolCPUs()
	return float64(C.mc_peak_flops(C.int(d), C.int(threads)))
}

// MeanFLOPS is the mean of what PeakFLOPS measures over a time, in which no thread
// waits for another: less where others use the machine.
func MeanFLOPS(d engine.DType, threads int, over time.Duration) float64 {
	poolCPUs()
	return float64(C.mc_peak_mean(C.int(d), C.int(threads), C.double(over.Seconds())))
}

// PeakRead measures bytes per second of threads threads reading size bytes in
// order: a size beyond the last cache gives the memory's bandwidth. 0 when
// there is no memory.
func PeakRead(size, threads int) float64 {
	poolCPUs()
	return float64(C.mc_peak_stream(C.int64_t(size), C.int(threads)))
}

// failed turns a native status into an error of op.
func (d *Device) failed(op engine.Op, status C.int) error {
	switch status {
	case C.MC_OK:
		return nil
	case C.MC_NOMEM:
		return d.errorf(op, engine.OutOfMemory, "no memory for the kernel's scratch or threads")
	case C.MC_INVALID:
		return d.errorf(op, engine.Invalid, "an index lies outside its tensor")
	case C.MC_CANCELLED:
		return d.errorf(op, engine.Cancelled, "stopped between steps")
	}
	return d.errorf(op, engine.Internal, "native status %d", status)
}

// views resolves tensors to addresses for one native call, and remembers the
// first thing that is wrong with them.
type views struct {
	dev *Device
	err error
}

func (v *views) fail(k engine.Kind, format string, args ...any) {
	if v.err == nil {
		v.err = engine.Errorf("", k, format, args...)
	}
}

func (v *views) ptr(t *engine.Tensor) unsafe.Pointer {
	if t == nil || t.Elems() == 0 {
		return nil
	}
	b, ok := t.Buf.(*buffer)
	if !ok || b.dev != v.dev || b.p == nil {
		v.fail(engine.Invalid, "tensor %v is not in memory of %s, or was freed", t, v.dev.Name())
		return nil
	}
	return unsafe.Add(b.p, t.Off)
}

func (v *views) f32(t *engine.Tensor) *C.float   { return (*C.float)(v.ptr(t)) }
func (v *views) i32(t *engine.Tensor) *C.int32_t { return (*C.int32_t)(v.ptr(t)) }

// mat is the matrix view of t; the zero view for nil.
func (v *views) mat(t *engine.Tensor) (m C.struct_mc_mat) {
	if t != nil {
		m.p, m.ld, m.dtype = v.ptr(t), C.int64_t(t.RowStride), C.int(t.DType)
	}
	return m
}
