package cpu

// #include "ops.h"
// #cgo noescape mc_norm_run
// #cgo nocallback mc_norm_run
// #cgo noescape mc_gated_run
// #cgo nocallback mc_gated_run
// #cgo noescape mc_rows_run
// #cgo nocallback mc_rows_run
// #cgo noescape mc_cast_run
// #cgo nocallback mc_cast_run
// #cgo noescape mc_patchify_run
// #cgo nocallback mc_patchify_run
import "C"

import (
	"margo/engine"
)

// Norm is engine.Kernels.Norm.
func (s *stream) Norm(a engine.NormArgs) error {
	return s.do(engine.OpNorm, a.Check, func(v *views) C.int {
		x := C.struct_mc_norm{m: C.int64_t(a.Y.Rows()), d: C.int64_t(a.Y.Cols()), x: v.mat(a.X), y: v.mat(a.Y),
			weight: v.f32(a.Weight), bias: v.f32(a.Bias), scale: v.mat(a.Scale), shift: v.mat(a.Shift),
			mod_rows: C.int64_t(a.ModRows), eps: C.float(a.Eps)}
		if v.err != nil {
			return 0
		}
		return C.mc_norm_run(&x, C.int(s.dev.threads))
	})
}

// GatedAdd is engine.Kernels.GatedAdd.
func (s *stream) GatedAdd(a engine.GatedAddArgs) error {
	return s.do(engine.OpGatedAdd, a.Check, func(v *views) C.int {
		x := C.struct_mc_gated{m: C.int64_t(a.Y.Rows()), d: C.int64_t(a.Y.Cols()), x: v.mat(a.X), h: v.mat(a.H),
			y: v.mat(a.Y), gate: v.mat(a.Gate), gate_rows: C.int64_t(a.GateRows)}
		if v.err != nil {
			return 0
		}
		return C.mc_gated_run(&x, C.int(s.dev.threads))
	})
}

// Rows is engine.Kernels.Rows. An index outside its tensor is an error, and
// then nothing is written.
func (s *stream) Rows(a engine.RowsArgs) error {
	return s.do(engine.OpRows, a.Check, func(v *views) C.int {
		x := C.struct_mc_rows{count: C.int64_t(a.Count), d: C.int64_t(a.Y.Cols()), y: v.mat(a.Y), a: v.mat(a.A), b: v.mat(a.B),
			iy: v.i32(a.IY), ia: v.i32(a.IA), ny: C.int64_t(a.Y.Rows()), na: C.int64_t(a.A.Rows()), act: C.int(a.Act)}
		if a.B != nil {
			x.ib, x.nb = v.i32(a.IB), C.int64_t(a.B.Rows())
		}
		if v.err != nil {
			return 0
		}
		return C.mc_rows_run(&x, C.int(s.dev.threads))
	})
}

// Cast is engine.Kernels.Cast.
func (s *stream) Cast(a engine.CastArgs) error {
	return s.do(engine.OpCast, a.Check, func(v *views) C.int {
		x := C.struct_mc_cast{m: C.int64_t(a.Y.Rows()), d: C.int64_t(a.Y.Cols()), x: v.mat(a.X), y: v.mat(a.Y),
			scale: C.float(a.Scale), shift: C.float(a.Shift)}
		if v.err != nil {
			return 0
		}
		return C.mc_cast_run(&x, C.int(s.dev.threads))
	})
}

// Patchify is engine.Kernels.Patchify.
func (s *stream) Patchify(a engine.PatchifyArgs) error {
	return s.do(engine.OpPatchify, a.Check, func(v *views) C.int {
		d := a.X.Shape
		x := C.struct_mc_patchify{n: C.int64_t(d[0]), h: C.int64_t(d[1]), w: C.int64_t(d[2]), c: C.int64_t(d[3]),
			p: C.int64_t(a.P), x: v.mat(a.X), y: v.mat(a.Y), inverse: flag(a.Inverse)}
		if v.err != nil {
			return 0
		}
		return C.mc_patchify_run(&x, C.int(s.dev.threads))
	})
}
