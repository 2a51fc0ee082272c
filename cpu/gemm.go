package cpu

// #include "core.h"
// #cgo noescape mc_gemm_run
// #cgo nocallback mc_gemm_run
import "C"

import (
	"unsafe"

	"margo/engine"
)

// Gemm is engine.Kernels.Gemm.
func (s *stream) Gemm(a engine.GemmArgs) error {
	return s.do(engine.OpGemm, a.Check, func(v *views) C.int {
		var temp []*packed
		w, dtype := v.weight(a.W, a.Packed, &temp)
		defer freeAll(temp)
		g := C.struct_mc_gemm{
			m: C.int64_t(a.Y.Rows()), n: C.int64_t(a.Y.Cols()), k: C.int64_t(a.W.Cols()), n0: C.int64_t(a.N0),
			x: v.ptr(a.X), ldx: C.int64_t(a.X.RowStride), x_dtype: C.int(a.X.DType),
			w: w, w_dtype: C.int(dtype),
			epi: C.struct_mc_epilogue{y: v.ptr(a.Y), ldy: C.int64_t(a.Y.RowStride), y_dtype: C.int(a.Y.DType), act: C.int(a.Act)},
		}
		if a.Bias != nil {
			// Contiguous, of any shape: of column N0 on.
			if p := v.ptr(a.Bias); p != nil {
				g.epi.bias = (*C.float)(unsafe.Add(p, a.N0*4))
			}
		}
		if a.Gate != nil {
			g.epi.gate, g.epi.ldg, g.epi.gate_rows = v.f32(a.Gate), C.int64_t(a.Gate.RowStride), C.int64_t(a.GateRows)
		}
		if a.Residual != nil {
			g.epi.res, g.epi.ldr = v.f32(a.Residual), C.int64_t(a.Residual.RowStride)
		}
		if v.err != nil {
			return 0
		}
		return C.mc_gemm_run(&g, C.int(s.dev.threads))
	})
}
