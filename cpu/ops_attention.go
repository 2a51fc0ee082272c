package cpu

// #include "ops.h"
// #cgo noescape mc_attention_run
// #cgo nocallback mc_attention_run
import "C"

import (
	"slices"
	"unsafe"

	"margo/engine"
)

// Attention is engine.Kernels.Attention.
func (s *stream) Attention(a engine.AttentionArgs) error {
	return s.do(engine.OpAttention, a.Check, func(v *views) C.int {
		x := C.struct_mc_attention{
			q: v.mat(a.Q), k: v.mat(a.K), v: v.mat(a.V), o: v.mat(a.O), qoff: v.offsets("QOff", a.QOff, a.QOffHost),
			koff: v.offsets("KOff", a.KOff, a.KOffHost), seqs: C.int64_t(len(a.QOffHost) - 1),
			heads: C.int64_t(a.Heads), dh: C.int64_t(a.Q.Cols() / a.Heads), scale: C.float(a.Scale), causal: flag(a.Causal),
		}
		if a.Blocks != nil {
			x.blocks, x.ld_blocks = v.i32(a.Blocks), C.int64_t(a.Blocks.Cols())
			x.block, x.cache = C.int64_t(a.BlockSize), C.int64_t(a.K.Rows()/a.BlockSize)
		}
		if v.err != nil {
			return 0
		}
		return C.mc_attention_run(&x, C.int(s.dev.threads))
	})
}

// offsets resolves an index tensor that must hold what the caller, whose
// numbers have been checked, said it does.
func (v *views) offsets(name string, t *engine.Tensor, host []int32) *C.int32_t {
	p := v.i32(t)
	if p != nil && !slices.Equal(unsafe.Slice((*int32)(p), len(host)), host) {
		v.fail(engine.Invalid, "%s and %sHost differ", name, name)
	}
	return p
}
