package cpu

// #include "head.h"
// #cgo noescape mc_head_run
// #cgo nocallback mc_head_run
import "C"

import (
	"runtime"
	"unsafe"

	"margo/engine"
)

// headBytes is how much memory the head loop may take if the caller does not say.
const headBytes = 64 << 20

// HeadSteps is engine.Kernels.HeadSteps, as one native call.
func (s *stream) HeadSteps(a engine.HeadStepsArgs) error {
	return s.do(engine.OpHeadSteps, a.Check, func(v *views) C.int {
		var temp []*packed
		defer func() { freeAll(temp) }()
		depth := len(a.Weights.Blocks)
		// Arrays that the arguments point to may not lie in Go memory.
		const wb, bb, sb = int(unsafe.Sizeof(C.struct_mc_head_weights{})), int(unsafe.Sizeof(C.struct_mc_head_block{})),
			int(unsafe.Sizeof(C.struct_mc_head_step{}))
		mem, err := v.dev.alloc(engine.OpHeadSteps, 2*(wb+depth*bb)+len(a.Steps)*sb)
		if err != nil {
			v.err = err
			return 0
		}
		defer mem.Free()
		weights := unsafe.Slice((*C.struct_mc_head_weights)(mem.p), 2)
		blocks := unsafe.Slice((*C.struct_mc_head_block)(unsafe.Add(mem.p, 2*wb)), 2*depth)
		steps := unsafe.Slice((*C.struct_mc_head_step)(unsafe.Add(mem.p, 2*(wb+depth*bb))), len(a.Steps))
		v.head(a.Weights, &weights[0], blocks[:depth], &temp)
		exact := a.Exact
		for i, c := range a.Steps {
			steps[i] = C.struct_mc_head_step{a: C.double(c.A), b: C.double(c.B), min_log: C.double(c.MinLog),
				max_log: C.double(c.MaxLog), last: flag(c.Last), exact: flag(a.ExactStep != nil && a.ExactStep[i])}
			if steps[i].exact != 0 && exact != nil {
				if len(exact.Blocks) != depth {
					v.fail(engine.Invalid, "Exact has %d blocks, Weights has %d", len(exact.Blocks), depth)
					return 0
				}
				v.head(exact, &weights[1], blocks[depth:], &temp)
				exact = nil
			}
		}
		h := C.struct_mc_head{
			n: C.int64_t(a.X.Rows()), rows: C.int64_t(a.Cond.Rows()), width: C.int64_t(a.Cond.Cols()),
			ch: C.int64_t(a.X.Cols()), steps: C.int64_t(len(a.Steps)),
			x: v.mat(a.X), cond: v.mat(a.Cond), time: v.mat(a.Time), noise: v.mat(a.Noise), trace: v.mat(a.Trace),
			w: &weights[0], exact: &weights[1], guidance: v.f32(a.Guidance), ids: v.i32(a.IDs),
			rng:         C.struct_mc_rng{seed: C.uint64_t(a.RNG.Seed), purpose: C.uint32_t(a.RNG.Purpose), step: C.uint32_t(a.RNG.Step)},
			temperature: C.float(a.Temperature), cancel: (*C.uint32_t)(unsafe.Pointer(a.Cancel)),
			budget: C.int64_t(a.Scratch),
		}
		if a.Scratch == 0 {
			h.budget = headBytes
		}
		if len(steps) > 0 {
			h.step = &steps[0]
		}
		if v.err != nil {
			return 0
		}
		if a.Cancel != nil { // lies in Go memory
			var pin runtime.Pinner
			pin.Pin(a.Cancel)
			defer pin.Unpin()
		}
		return C.mc_head_run(&h, C.int(s.dev.threads))
	})
}

// headPlan tells for a head in F32 of the given shape, n tokens (twice the rows
// if guided) and steps, how many tokens and steps run together, and the bytes
// that takes. For tests.
func headPlan(width, depth, ch, n int, guided bool, steps, budget, threads int) (tokens, chunk, bytes int) {
	w := C.struct_mc_head_weights{depth: C.int64_t(depth)}
	w.ada = C.struct_mc_matrix{n: C.int64_t((3*depth + 2) * width), k: C.int64_t(width)}
	blocks := make([]C.struct_mc_head_block, depth)
	w.blocks = unsafe.SliceData(blocks)
	h := C.struct_mc_head{n: C.int64_t(n), rows: C.int64_t(n), width: C.int64_t(width), ch: C.int64_t(ch),
		steps: C.int64_t(steps), budget: C.int64_t(budget), w: &w}
	if guided {
		h.rows *= 2
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&w)
	if depth > 0 {
		pin.Pin(&blocks[0])
	}
	b := C.mc_head_plan(&h, C.int(threads))
	return int(h._range), int(h.chunk), int(b)
}

func flag(b bool) C.int {
	if b {
		return 1
	}
	return 0
}

// head resolves the weights of a head into w and its blocks into b.
func (v *views) head(h *engine.HeadWeights, w *C.struct_mc_head_weights, b []C.struct_mc_head_block, temp *[]*packed) {
	matrix := func(m engine.Matrix) C.struct_mc_matrix {
		p, dtype := v.weight(m.W, m.Packed, temp)
		return C.struct_mc_matrix{w: p, bias: v.f32(m.Bias), n: C.int64_t(m.W.Rows()), k: C.int64_t(m.W.Cols()), dtype: C.int(dtype)}
	}
	for i, e := range h.Blocks {
		b[i] = C.struct_mc_head_block{norm_w: v.f32(e.NormWeight), norm_b: v.f32(e.NormBias), fc1: matrix(e.Fc1), fc2: matrix(e.Fc2)}
	}
	*w = C.struct_mc_head_weights{input: matrix(h.Input), ada: matrix(h.Ada), final: matrix(h.Final), blocks: unsafe.SliceData(b),
		depth: C.int64_t(len(b)), eps: C.float(h.Eps)}
	for i := range b {
		if b[i].fc1.dtype != w.ada.dtype || b[i].fc2.dtype != w.ada.dtype {
			v.fail(engine.Unsupported, "blocks and Ada of a head packed in different dtypes")
		}
	}
	if w.input.dtype != C.MC_F32 || w.final.dtype != C.MC_F32 {
		v.fail(engine.Unsupported, "input and final layer of a head packed in other than f32")
	}
}
