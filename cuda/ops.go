package cuda

// #include "calls.h"
import "C"

import (
	"runtime"
	"sync/atomic"
	"unsafe"

	"margo/engine"
)

// headBytes is the workspace of HeadSteps if the caller does not say: room for the
// modulations of many steps at once, since one large GEMM is what a GPU wants.
const headBytes = 512 << 20

// weight describes W, in the device's layout if it was packed.
func (s *Stream) weight(w *engine.Tensor, p engine.Packed, err *error) C.margo_mat {
	if p == nil || *err != nil {
		return s.mat(w, err)
	}
	q, ok := p.(*packed)
	if !ok || q.dev != s.dev || q.addr == 0 || q.n != w.Rows() || q.k != w.Cols() {
		*err = s.dev.errorf("", engine.Invalid, "Packed of W %v is not from %s, was freed, or is of another weight", w, s.dev.name)
		return C.margo_mat{}
	}
	return C.margo_mat{p: q.addr, rows: C.int64_t(q.n), cols: C.int64_t(q.k), ld: C.int64_t(q.ld), dtype: C.int32_t(q.dtype)}
}

// Gemm is engine.Kernels.Gemm.
func (s *Stream) Gemm(a engine.GemmArgs) error {
	err := s.ready(engine.OpGemm, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_gemm_args{size: C.sizeof_margo_gemm_args, act: C.int32_t(a.Act), x: s.mat(a.X, &err), w: s.weight(a.W, a.Packed, &err),
		bias: s.mat(a.Bias, &err), gate: s.mat(a.Gate, &err), residual: s.mat(a.Residual, &err), y: s.mat(a.Y, &err),
		n0: C.int64_t(a.N0), gate_rows: C.int64_t(a.GateRows)}
	return s.run(engine.OpGemm, unsafe.Pointer(&x), err)
}

// Attention is engine.Kernels.Attention. The next wait reports a block outside the
// cache.
func (s *Stream) Attention(a engine.AttentionArgs) error {
	err := s.ready(engine.OpAttention, a.Check())
	if err != nil {
		return err
	}
	longest := func(off []int32) (most C.int64_t) {
		for i := 1; i < len(off); i++ {
			most = max(most, C.int64_t(off[i]-off[i-1]))
		}
		return most
	}
	x := C.margo_attention_args{size: C.sizeof_margo_attention_args, causal: flag(a.Causal), q: s.mat(a.Q, &err), k: s.mat(a.K, &err),
		v: s.mat(a.V, &err), o: s.mat(a.O, &err), qoff: s.mat(a.QOff, &err), koff: s.mat(a.KOff, &err), seqs: C.int64_t(len(a.QOffHost) - 1),
		heads: C.int64_t(a.Heads), max_q: longest(a.QOffHost), max_k: longest(a.KOffHost), scale: C.float(a.Scale),
		blocks: s.mat(a.Blocks, &err), block_size: C.int64_t(a.BlockSize)}
	return s.run(engine.OpAttention, unsafe.Pointer(&x), err)
}

// Norm is engine.Kernels.Norm.
func (s *Stream) Norm(a engine.NormArgs) error {
	err := s.ready(engine.OpNorm, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_norm_args{size: C.sizeof_margo_norm_args, eps: C.float(a.Eps), x: s.mat(a.X, &err), y: s.mat(a.Y, &err),
		weight: s.mat(a.Weight, &err), bias: s.mat(a.Bias, &err), scale: s.mat(a.Scale, &err), shift: s.mat(a.Shift, &err),
		mod_rows: C.int64_t(a.ModRows)}
	return s.run(engine.OpNorm, unsafe.Pointer(&x), err)
}

// GatedAdd is engine.Kernels.GatedAdd.
func (s *Stream) GatedAdd(a engine.GatedAddArgs) error {
	err := s.ready(engine.OpGatedAdd, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_gated_add_args{size: C.sizeof_margo_gated_add_args, x: s.mat(a.X, &err), h: s.mat(a.H, &err), gate: s.mat(a.Gate, &err),
		y: s.mat(a.Y, &err), gate_rows: C.int64_t(a.GateRows)}
	return s.run(engine.OpGatedAdd, unsafe.Pointer(&x), err)
}

// Rows is engine.Kernels.Rows. The next wait reports an index outside its tensor;
// that row is not written.
func (s *Stream) Rows(a engine.RowsArgs) error {
	err := s.ready(engine.OpRows, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_rows_args{size: C.sizeof_margo_rows_args, act: C.int32_t(a.Act), y: s.mat(a.Y, &err), a: s.mat(a.A, &err), b: s.mat(a.B, &err),
		iy: s.mat(a.IY, &err), ia: s.mat(a.IA, &err), ib: s.mat(a.IB, &err), count: C.int64_t(a.Count)}
	return s.run(engine.OpRows, unsafe.Pointer(&x), err)
}

// Cast is engine.Kernels.Cast.
func (s *Stream) Cast(a engine.CastArgs) error {
	err := s.ready(engine.OpCast, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_cast_args{size: C.sizeof_margo_cast_args, scale: C.float(a.Scale), shift: C.float(a.Shift), x: s.mat(a.X, &err), y: s.mat(a.Y, &err)}
	return s.run(engine.OpCast, unsafe.Pointer(&x), err)
}

// TimestepEmbedding is engine.Kernels.TimestepEmbedding.
func (s *Stream) TimestepEmbedding(a engine.TimestepEmbeddingArgs) error {
	err := s.ready(engine.OpTimestepEmbedding, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_timestep_args{size: C.sizeof_margo_timestep_args, max_period: C.float(a.MaxPeriod), t: s.mat(a.T, &err), y: s.mat(a.Y, &err)}
	return s.run(engine.OpTimestepEmbedding, unsafe.Pointer(&x), err)
}

func rng(r engine.RNG) C.margo_rng {
	return C.margo_rng{seed: C.uint64_t(r.Seed), purpose: C.uint32_t(r.Purpose), step: C.uint32_t(r.Step)}
}

func coef(c engine.StepCoef, exact bool) C.margo_coef {
	return C.margo_coef{a: C.double(c.A), b: C.double(c.B), min_log: C.double(c.MinLog), max_log: C.double(c.MaxLog), last: flag(c.Last), exact: flag(exact)}
}

func flag(b bool) C.int32_t {
	if b {
		return 1
	}
	return 0
}

// Normal is engine.Kernels.Normal.
func (s *Stream) Normal(a engine.NormalArgs) error {
	err := s.ready(engine.OpNormal, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_normal_args{size: C.sizeof_margo_normal_args, y: s.mat(a.Y, &err), ids: s.mat(a.IDs, &err), rng: rng(a.RNG)}
	return s.run(engine.OpNormal, unsafe.Pointer(&x), err)
}

// Categorical is engine.Kernels.Categorical.
func (s *Stream) Categorical(a engine.CategoricalArgs) error {
	err := s.ready(engine.OpCategorical, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_categorical_args{size: C.sizeof_margo_categorical_args, method: C.int32_t(a.Method), logits: s.mat(a.Logits, &err),
		guidance: s.mat(a.Guidance, &err), y: s.mat(a.Y, &err), log_prob: s.mat(a.LogProb, &err), ids: s.mat(a.IDs, &err), rng: rng(a.RNG),
		stride: C.int64_t(a.Stride), top_k: C.int64_t(a.TopK), temperature: C.float(a.Temperature), top_p: C.float(a.TopP)}
	return s.run(engine.OpCategorical, unsafe.Pointer(&x), err)
}

// DiffusionStep is engine.Kernels.DiffusionStep.
func (s *Stream) DiffusionStep(a engine.DiffusionStepArgs) error {
	err := s.ready(engine.OpDiffusionStep, a.Check())
	if err != nil {
		return err
	}
	x := C.margo_diffusion_step_args{size: C.sizeof_margo_diffusion_step_args, temperature: C.float(a.Temperature), x: s.mat(a.X, &err),
		y: s.mat(a.Y, &err), out: s.mat(a.Out, &err), guidance: s.mat(a.Guidance, &err), noise: s.mat(a.Noise, &err), ids: s.mat(a.IDs, &err),
		rng: rng(a.RNG), coef: coef(a.Coef, false)}
	return s.run(engine.OpDiffusionStep, unsafe.Pointer(&x), err)
}

// HeadSteps is engine.Kernels.HeadSteps. Cancel is polled while steps are enqueued.
func (s *Stream) HeadSteps(a engine.HeadStepsArgs) error {
	err := s.ready(engine.OpHeadSteps, a.Check())
	if err != nil {
		return err
	}
	if a.Cancel != nil && atomic.LoadUint32(a.Cancel) != 0 {
		return s.dev.errorf(engine.OpHeadSteps, engine.Cancelled, "before the first of %d steps", len(a.Steps))
	}
	if len(a.Steps) == 0 || a.X.Rows() == 0 {
		return nil
	}
	// Arrays that the arguments point to are Go memory, pinned for the call.
	var pin runtime.Pinner
	defer pin.Unpin()
	steps := make([]C.margo_coef, len(a.Steps))
	exact := false
	for i, c := range a.Steps {
		e := a.ExactStep != nil && a.ExactStep[i]
		steps[i], exact = coef(c, e), exact || e
	}
	pin.Pin(&steps[0])
	x := C.margo_head_steps_args{size: C.sizeof_margo_head_steps_args, temperature: C.float(a.Temperature), x: s.mat(a.X, &err),
		cond: s.mat(a.Cond, &err), time: s.mat(a.Time, &err), guidance: s.mat(a.Guidance, &err), noise: s.mat(a.Noise, &err),
		ids: s.mat(a.IDs, &err), trace: s.mat(a.Trace, &err), rng: rng(a.RNG), weights: s.head(a.Weights, &pin, &err),
		steps: &steps[0], step_count: C.int64_t(len(steps)), path: C.int32_t(s.dev.HeadPath())}
	if exact {
		x.exact = s.head(a.Exact, &pin, &err)
	}
	if x.path == 2 {
		x.fp8 = fp8(a.Weights, &pin)
	}
	if a.Cancel != nil {
		pin.Pin(a.Cancel)
		x.cancel = (*C.uint32_t)(unsafe.Pointer(a.Cancel))
	}
	if err != nil {
		return s.named(engine.OpHeadSteps, err)
	}
	need, take, err := s.dev.headWorkspace(&x, a.Scratch)
	if err != nil {
		return err
	}
	if x.workspace, err = s.workspace(engine.OpHeadSteps, need, take); err != nil {
		return err
	}
	x.workspace_bytes = need
	return s.run(engine.OpHeadSteps, unsafe.Pointer(&x), nil)
}

// head describes the weights of a head.
func (s *Stream) head(w *engine.HeadWeights, pin *runtime.Pinner, err *error) C.margo_head_weights {
	linear := func(m engine.Matrix) C.margo_linear {
		return C.margo_linear{w: s.weight(m.W, m.Packed, err), bias: s.mat(m.Bias, err)}
	}
	h := C.margo_head_weights{input: linear(w.Input), ada: linear(w.Ada), final: linear(w.Final), depth: C.int32_t(len(w.Blocks)), eps: C.float(w.Eps)}
	if len(w.Blocks) > 0 {
		blocks := make([]C.margo_head_block, len(w.Blocks))
		for i, b := range w.Blocks {
			blocks[i] = C.margo_head_block{norm_weight: s.mat(b.NormWeight, err), norm_bias: s.mat(b.NormBias, err), fc1: linear(b.Fc1), fc2: linear(b.Fc2)}
		}
		pin.Pin(&blocks[0])
		h.blocks = &blocks[0]
	}
	return h
}

// fp8 describes the blocks' weights as codes, nil unless Pack has kept those of all. head has checked that they are this device's.
func fp8(w *engine.HeadWeights, pin *runtime.Pinner) *C.margo_head_fp8 {
	var all []C.margo_head_fp8
	for _, b := range w.Blocks {
		var pair [2]C.margo_fp8
		for i, m := range []engine.Packed{b.Fc1.Packed, b.Fc2.Packed} {
			p, ok := m.(*packed)
			if !ok || p.codes == 0 {
				return nil
			}
			pair[i] = C.margo_fp8{codes: p.addr + p.codes, scales: p.addr + p.scales}
		}
		all = append(all, C.margo_head_fp8{fc1: pair[0], fc2: pair[1]})
	}
	if all == nil {
		return nil
	}
	pin.Pin(&all[0])
	return &all[0]
}

// Conv2D is engine.Kernels.Conv2D.
func (s *Stream) Conv2D(a engine.Conv2DArgs) error {
	err := s.ready(engine.OpConv2D, a.Check())
	if err != nil {
		return err
	}
	in, out := a.X.Shape, a.Y.Shape
	x := C.margo_conv2d_args{size: C.sizeof_margo_conv2d_args, upsample: flag(a.Upsample), x: s.mat(a.X, &err), w: s.weight(a.W, a.Packed, &err),
		bias: s.mat(a.Bias, &err), residual: s.mat(a.Residual, &err), y: s.mat(a.Y, &err), n: C.int64_t(in[0]), h: C.int64_t(in[1]), wd: C.int64_t(in[2]),
		ho: C.int64_t(out[1]), wo: C.int64_t(out[2]), kernel: C.int32_t(a.Kernel), stride: C.int32_t(a.Stride), pad_top: C.int32_t(a.PadTop), pad_left: C.int32_t(a.PadLeft)}
	return s.run(engine.OpConv2D, unsafe.Pointer(&x), err)
}

// GroupNorm is engine.Kernels.GroupNorm.
func (s *Stream) GroupNorm(a engine.GroupNormArgs) error {
	err := s.ready(engine.OpGroupNorm, a.Check())
	if err != nil {
		return err
	}
	x := groupNormShape(a)
	x.x, x.y, x.weight, x.bias = s.mat(a.X, &err), s.mat(a.Y, &err), s.mat(a.Weight, &err), s.mat(a.Bias, &err)
	var bytes C.uint64_t
	if err == nil {
		err = s.dev.status(engine.OpGroupNorm, C.m_group_norm_workspace(s.dev.p.api, s.dev.ctx, &x, &bytes))
	}
	if err == nil {
		x.workspace, err = s.workspace(engine.OpGroupNorm, bytes, bytes)
		x.workspace_bytes = bytes
	}
	return s.run(engine.OpGroupNorm, unsafe.Pointer(&x), err)
}

// groupNormShape is what the workspace of GroupNorm follows from.
func groupNormShape(a engine.GroupNormArgs) C.margo_group_norm_args {
	d := a.X.Shape
	pixels := 1
	for _, n := range d[1 : len(d)-1] {
		pixels *= n
	}
	return C.margo_group_norm_args{size: C.sizeof_margo_group_norm_args, act: C.int32_t(a.Act), n: C.int64_t(d[0]), pixels: C.int64_t(pixels),
		groups: C.int32_t(a.Groups), eps: C.float(a.Eps)}
}

// Patchify is engine.Kernels.Patchify.
func (s *Stream) Patchify(a engine.PatchifyArgs) error {
	err := s.ready(engine.OpPatchify, a.Check())
	if err != nil {
		return err
	}
	d := a.X.Shape
	x := C.margo_patchify_args{size: C.sizeof_margo_patchify_args, inverse: flag(a.Inverse), x: s.mat(a.X, &err), y: s.mat(a.Y, &err),
		n: C.int64_t(d[0]), h: C.int64_t(d[1]), w: C.int64_t(d[2]), c: C.int64_t(d[3]), p: C.int64_t(a.P)}
	return s.run(engine.OpPatchify, unsafe.Pointer(&x), err)
}
