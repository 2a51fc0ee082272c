package cpu

// #include "ops.h"
// #cgo noescape mc_conv_run
// #cgo nocallback mc_conv_run
// #cgo noescape mc_groupnorm_run
// #cgo nocallback mc_groupnorm_run
import "C"

import (
	"margo/engine"
)

// Conv2D is engine.Kernels.Conv2D.
func (s *stream) Conv2D(a engine.Conv2DArgs) error {
	return s.do(engine.OpConv2D, a.Check, func(v *views) C.int {
		var temp []*packed
		w, dtype := v.weight(a.W, a.Packed, &temp)
		defer func() { freeAll(temp) }()
		in, out := a.X.Shape, a.Y.Shape
		x := C.struct_mc_conv{
			n: C.int64_t(in[0]), h: C.int64_t(in[1]), w: C.int64_t(in[2]), cin: C.int64_t(in[3]),
			ho: C.int64_t(out[1]), wo: C.int64_t(out[2]), cout: C.int64_t(out[3]),
			kernel: C.int64_t(a.Kernel), stride: C.int64_t(a.Stride), pad_top: C.int64_t(a.PadTop), pad_left: C.int64_t(a.PadLeft),
			up: flag(a.Upsample), x: v.mat(a.X), weight: w, w_dtype: C.int(dtype),
			epi: C.struct_mc_epilogue{y: v.ptr(a.Y), ldy: C.int64_t(a.Y.RowStride), y_dtype: C.int(a.Y.DType), bias: v.f32(a.Bias)},
		}
		if a.Residual != nil {
			x.epi.res, x.epi.ldr = v.f32(a.Residual), C.int64_t(a.Residual.RowStride)
		}
		if v.err != nil {
			return 0
		}
		return C.mc_conv_run(&x, C.int(s.dev.threads))
	})
}

// GroupNorm is engine.Kernels.GroupNorm.
func (s *stream) GroupNorm(a engine.GroupNormArgs) error {
	return s.do(engine.OpGroupNorm, a.Check, func(v *views) C.int {
		d := a.X.Shape
		x := C.struct_mc_groupnorm{n: C.int64_t(d[0]), pixels: C.int64_t(d[1] * d[2]), ch: C.int64_t(d[3]), groups: C.int64_t(a.Groups),
			x: v.mat(a.X), y: v.mat(a.Y), weight: v.f32(a.Weight), bias: v.f32(a.Bias), eps: C.float(a.Eps), act: C.int(a.Act)}
		if v.err != nil {
			return 0
		}
		return C.mc_groupnorm_run(&x, C.int(s.dev.threads))
	})
}
