package cpu

// #include "ops.h"
// #cgo noescape mc_embed_run
// #cgo nocallback mc_embed_run
// #cgo noescape mc_normal_run
// #cgo nocallback mc_normal_run
// #cgo noescape mc_step_run
// #cgo nocallback mc_step_run
// #cgo noescape mc_categorical_run
// #cgo nocallback mc_categorical_run
import "C"

import (
	"margo/engine"
)

// TimestepEmbedding is engine.Kernels.TimestepEmbedding.
func (s *stream) TimestepEmbedding(a engine.TimestepEmbeddingArgs) error {
	return s.do(engine.OpTimestepEmbedding, a.Check, func(v *views) C.int {
		x := C.struct_mc_embed{m: C.int64_t(a.Y.Rows()), dim: C.int64_t(a.Y.Cols()), t: v.f32(a.T), y: v.mat(a.Y),
			max_period: C.float(a.MaxPeriod)}
		if v.err != nil {
			return 0
		}
		return C.mc_embed_run(&x, C.int(s.dev.threads))
	})
}

// Normal is engine.Kernels.Normal.
func (s *stream) Normal(a engine.NormalArgs) error {
	return s.do(engine.OpNormal, a.Check, func(v *views) C.int {
		x := C.struct_mc_normal{m: C.int64_t(a.Y.Rows()), c: C.int64_t(a.Y.Cols()), y: v.mat(a.Y), ids: v.i32(a.IDs), rng: draws(a.RNG)}
		if v.err != nil {
			return 0
		}
		return C.mc_normal_run(&x, C.int(s.dev.threads))
	})
}

// DiffusionStep is engine.Kernels.DiffusionStep.
func (s *stream) DiffusionStep(a engine.DiffusionStepArgs) error {
	return s.do(engine.OpDiffusionStep, a.Check, func(v *views) C.int {
		c := a.Coef
		x := C.struct_mc_step{n: C.int64_t(a.Y.Rows()), c: C.int64_t(a.Y.Cols()), x: v.mat(a.X), y: v.mat(a.Y), out: v.mat(a.Out),
			noise: v.mat(a.Noise), guidance: v.f32(a.Guidance), ids: v.i32(a.IDs), rng: draws(a.RNG),
			coef_a: C.double(c.A), coef_b: C.double(c.B), min_log: C.double(c.MinLog), max_log: C.double(c.MaxLog),
			last: flag(c.Last), temperature: C.float(a.Temperature)}
		if v.err != nil {
			return 0
		}
		return C.mc_step_run(&x, C.int(s.dev.threads))
	})
}

func draws(r engine.RNG) C.struct_mc_rng {
	return C.struct_mc_rng{seed: C.uint64_t(r.Seed), purpose: C.uint32_t(r.Purpose), step: C.uint32_t(r.Step)}
}

// Categorical is engine.Kernels.Categorical.
func (s *stream) Categorical(a engine.CategoricalArgs) error {
	return s.do(engine.OpCategorical, a.Check, func(v *views) C.int {
		x := C.struct_mc_categorical{n: C.int64_t(a.Y.Elems()), k: C.int64_t(a.Logits.Cols()), logits: v.mat(a.Logits),
			guidance: v.f32(a.Guidance), y: v.i32(a.Y), log_prob: v.f32(a.LogProb), stride: C.int64_t(a.Stride),
			top_k: C.int64_t(a.TopK), temperature: C.float(a.Temperature), top_p: C.float(a.TopP),
			inverse: flag(a.Method == engine.InverseTransform), ids: v.i32(a.IDs), rng: draws(a.RNG)}
		if v.err != nil {
			return 0
		}
		return C.mc_categorical_run(&x, C.int(s.dev.threads))
	})
}
