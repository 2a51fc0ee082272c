package cuda

// #include "calls.h"
import "C"

import (
	"margo/engine"
)

var _ engine.Footprint = (*Device)(nil)

// driverBytes is left to the driver, for kernels' code, which it loads when they are first launched, and graphs. It is an allowance
// that nobody has measured. Emulated kernels are the host's code.
const driverBytes = 64 << 20

// Block is what the pool takes for a buffer: its size in steps of an eighth of an octave, where freed memory of that size is
// cached (kernels/memory.cu: rounded).
func (d *Device) Block(bytes int64) int64 {
	if cache := int64(d.Counters().Cache); bytes > cache || cache == 0 {
		return max(bytes, 1)
	}
	step := int64(256)
	for step*16 <= bytes {
		step *= 2
	}
	return max((bytes+step-1)/step*step, 256)
}

// PackedBytes is the size of a weight whose rows begin at multiples of 16 bytes, with codes and scales of FP8 behind them where
// the latency path reads those.
func (d *Device) PackedBytes(a engine.PackArgs) int64 {
	return int64(d.packing(a).bytes)
}

// packing is how Pack lays a weight out. Codes and scales are at offsets behind the rows; 0: none.
type packing struct{ ld, codes, scales, bytes int }

func (d *Device) packing(a engine.PackArgs) (p packing) {
	n, k := a.W.Rows(), a.W.Cols()
	p.ld = packedRow(k, a.DType)
	p.bytes = max(n*p.ld*a.DType.Size(), 16)
	if a.FP8 && d.HeadPath() == 2 && n > 0 && k > 0 && n%8 == 0 && k%16 == 0 {
		p.codes = p.bytes
		p.scales = p.codes + n*k
		p.bytes = p.scales + 4*n
	}
	return p
}

// packedRow is the number of elements from one row to the next.
func packedRow(k int, t engine.DType) int {
	per := 16 / t.Size()
	return (k + per - 1) / per * per
}

// StreamBytes is the workspace of cuBLASLt, if that is on.
func (d *Device) StreamBytes() int64 {
	if d.lt == nil {
		return 0
	}
	return int64(d.lt.workspace)
}

// HeadBytes is the workspace of HeadSteps.
func (d *Device) HeadBytes(a engine.HeadStepsArgs) (need, take int64) {
	shape := func(t *engine.Tensor) C.margo_mat {
		return C.margo_mat{rows: C.int64_t(t.Rows()), cols: C.int64_t(t.Cols())}
	}
	x := C.margo_head_steps_args{size: C.sizeof_margo_head_steps_args, x: shape(a.X), cond: shape(a.Cond), step_count: C.int64_t(len(a.Steps)),
		path: C.int32_t(d.HeadPath())}
	x.weights.depth = C.int32_t(len(a.Weights.Blocks))
	bytes, most, err := d.headWorkspace(&x, a.Scratch)
	if err != nil { // the call itself will say so
		return 0, 0
	}
	return int64(bytes), int64(most)
}

// headWorkspace is what HeadSteps needs, and what it takes if the stream has less. Growing waits for the device, and graphs of
// steps hold the workspace's address: they are captured anew. A cosine schedule of 64 iterations predicts 1 token
// first and 7 at last, with guidance each of them twice: the first call takes what the last will need.
func (d *Device) headWorkspace(x *C.margo_head_steps_args, scratch int) (need, take C.uint64_t, err error) {
	budget := C.uint64_t(max(scratch, headBytes))
	err = d.status(engine.OpHeadSteps, C.m_head_workspace(d.p.api, d.ctx, x, budget, &need))
	return need, max(need, min(budget, 16*need)), err
}

// GroupNormBytes is the workspace of GroupNorm.
func (d *Device) GroupNormBytes(a engine.GroupNormArgs) int64 {
	x := groupNormShape(a)
	var bytes C.uint64_t
	if d.status(engine.OpGroupNorm, C.m_group_norm_workspace(d.p.api, d.ctx, &x, &bytes)) != nil {
		return 0
	}
	return int64(bytes)
}

// Held is what the stream takes of the device's memory for itself.
func (s *Stream) Held() (n int64) {
	for _, b := range []*buffer{s.work, s.cublasLt} {
		if b != nil {
			n += s.dev.Block(int64(b.bytes))
		}
	}
	return n
}
