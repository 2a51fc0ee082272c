package conformance

import "margo/engine"

// stepwise calls HeadSteps once per step, as f changes the arguments.
func stepwise(s engine.Stream, a engine.HeadStepsArgs, f func(i int, b *engine.HeadStepsArgs)) error {
	n := a.X.Rows()
	for i := range a.Steps {
		b := a
		b.Steps, b.Time = a.Steps[i:i+1], a.Time.RowsAt(i, i+1)
		if a.ExactStep != nil {
			b.ExactStep = a.ExactStep[i : i+1]
		}
		b.Noise, b.Trace = rowsAt(a.Noise, i*n, (i+1)*n), rowsAt(a.Trace, i*n, (i+1)*n)
		b.RNG.Step += i
		f(i, &b)
		if err := s.HeadSteps(b); err != nil {
			return err
		}
	}
	return nil
}

func headMutants() []mutant {
	swapIDs := func(s engine.Stream, ids *engine.Tensor) *engine.Tensor {
		u := changed(s, ids, func(_, _ int, v float32) float32 { return v })
		check(s.Copy(u.Slice(0, 1), ids.Slice(1, 2)))
		check(s.Copy(u.Slice(1, 2), ids.Slice(0, 1)))
		return u
	}
	return []mutant{
		{name: "timestep_embedding has sines first", match: "^timestep_embedding/", modes: []Mode{Oracle},
			embedding: func(s engine.Stream, a engine.TimestepEmbeddingArgs) error {
				if err := s.TimestepEmbedding(a); err != nil {
					return err
				}
				half := a.Y.Cols() / 2
				u := changed(s, a.Y, func(_, _ int, v float32) float32 { return v })
				check(s.Copy(a.Y.Slice(0, half), u.Slice(half, 2*half)))
				return s.Copy(a.Y.Slice(half, 2*half), u.Slice(0, half))
			}},
		{name: "timestep_embedding has a wrong period", match: "^timestep_embedding/", modes: []Mode{Oracle},
			embedding: func(s engine.Stream, a engine.TimestepEmbeddingArgs) error {
				a.MaxPeriod *= 1.001
				return s.TimestepEmbedding(a)
			}},
		{name: "normal counts the step wrongly", match: "^normal/", modes: []Mode{Oracle},
			normal: func(s engine.Stream, a engine.NormalArgs) error { a.RNG.Step ^= 1; return s.Normal(a) }},
		{name: "normal forgets the purpose", match: "^normal/", modes: []Mode{Oracle},
			normal: func(s engine.Stream, a engine.NormalArgs) error {
				a.RNG.Purpose = engine.PurposeTest
				return s.Normal(a)
			}},
		{name: "normal has a key of 32 bits", match: "^normal/", modes: []Mode{Oracle},
			normal: func(s engine.Stream, a engine.NormalArgs) error { a.RNG.Seed &= 1<<32 - 1; return s.Normal(a) }},
		{name: "normal swaps token and image", match: "^normal/", modes: []Mode{Oracle},
			normal: func(s engine.Stream, a engine.NormalArgs) error { a.IDs = swapIDs(s, a.IDs); return s.Normal(a) }},
		{name: "normal depends on the row", match: "^normal/", modes: []Mode{Oracle, Batch},
			normal: func(s engine.Stream, a engine.NormalArgs) error {
				a.IDs = changed(s, a.IDs, func(r, c int, v float32) float32 { return v + float32(r*(1-c)) })
				return s.Normal(a)
			}},
		{name: "diffusion_step ignores guidance", match: "^diffusion_step/", modes: []Mode{Oracle},
			step: func(s engine.Stream, a engine.DiffusionStepArgs) error {
				a.Guidance = changed(s, a.Guidance, func(_, _ int, v float32) float32 { return 1 })
				return s.DiffusionStep(a)
			}},
		{name: "diffusion_step guides the wrong way", match: "^diffusion_step/", modes: []Mode{Oracle},
			step: func(s engine.Stream, a engine.DiffusionStepArgs) error {
				a.Guidance = changed(s, a.Guidance, func(_, _ int, v float32) float32 { return -v })
				return s.DiffusionStep(a)
			}},
		{name: "diffusion_step takes v from the unconditional row", match: "^diffusion_step/", modes: []Mode{Oracle},
			step: func(s engine.Stream, a engine.DiffusionStepArgs) error {
				if n, c := a.X.Rows(), a.X.Cols(); a.Guidance != nil {
					out := changed(s, a.Out, func(_, _ int, v float32) float32 { return v })
					check(s.Copy(out.RowsAt(0, n).Slice(c, 2*c), a.Out.RowsAt(n, 2*n).Slice(c, 2*c)))
					a.Out = out
				}
				return s.DiffusionStep(a)
			}},
		{name: "diffusion_step swaps the variances", match: "^diffusion_step/", modes: []Mode{Oracle},
			step: func(s engine.Stream, a engine.DiffusionStepArgs) error {
				a.Coef.MinLog, a.Coef.MaxLog = a.Coef.MaxLog, a.Coef.MinLog
				return s.DiffusionStep(a)
			}},
		{name: "diffusion_step ignores temperature", match: "^diffusion_step/", modes: []Mode{Oracle},
			step: func(s engine.Stream, a engine.DiffusionStepArgs) error { a.Temperature = 1; return s.DiffusionStep(a) }},
		{name: "diffusion_step has no noise", match: "^diffusion_step/", modes: []Mode{Oracle},
			step: func(s engine.Stream, a engine.DiffusionStepArgs) error { a.Coef.Last = true; return s.DiffusionStep(a) }},
		{name: "head_steps draws the same noise every step", match: "^head_steps/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				return stepwise(s, a, func(i int, b *engine.HeadStepsArgs) { b.RNG.Step = a.RNG.Step })
			}},
		{name: "head_steps uses the time of the first step", match: "^head_steps/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				return stepwise(s, a, func(i int, b *engine.HeadStepsArgs) { b.Time = a.Time.RowsAt(0, 1) })
			}},
		{name: "head_steps uses the coefficients of the first step", match: "^head_steps/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				return stepwise(s, a, func(i int, b *engine.HeadStepsArgs) {
					last := b.Steps[0].Last
					b.Steps = []engine.StepCoef{a.Steps[0]}
					b.Steps[0].Last = last
				})
			}},
		{name: "head_steps ignores exact steps", match: "^head_steps/bf16/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error { a.ExactStep = nil; return s.HeadSteps(a) }},
		{name: "head_steps writes no trace", match: "^head_steps/", modes: []Mode{NaN},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error { a.Trace = nil; return s.HeadSteps(a) }},
		{name: "head_steps traces x before the step", match: "^head_steps/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				trace, n := a.Trace, a.X.Rows()
				a.Trace = nil
				return stepwise(s, a, func(i int, b *engine.HeadStepsArgs) {
					if trace != nil {
						check(s.Copy(trace.RowsAt(i*n, (i+1)*n), a.X))
					}
				})
			}},
		{name: "head_steps guides all tokens alike", match: "^head_steps/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				a.Guidance = changed(s, a.Guidance, func(_, _ int, v float32) float32 { return 1.5 })
				return s.HeadSteps(a)
			}},
		{name: "head_steps takes the unconditional rows for the conditional ones", match: "^head_steps/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				if n := a.X.Rows(); a.Guidance != nil {
					cond := changed(s, a.Cond, func(_, _ int, v float32) float32 { return v })
					check(s.Copy(cond.RowsAt(0, n), a.Cond.RowsAt(n, 2*n)))
					check(s.Copy(cond.RowsAt(n, 2*n), a.Cond.RowsAt(0, n)))
					a.Cond = cond
				}
				return s.HeadSteps(a)
			}},
		{name: "head_steps rounds x between steps to BF16", match: "^head_steps/bf16/", modes: []Mode{Oracle},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				return stepwise(s, a, func(i int, b *engine.HeadStepsArgs) {
					check(edit(s, a.X, func(_, _ int, v float32) float32 { return engine.FromBF16(engine.ToBF16(v)) }))
				})
			}},
		{name: "head_steps depends on the number of tokens", match: "^head_steps/", modes: []Mode{Batch},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error {
				if err := s.HeadSteps(a); err != nil || a.X.Rows() != 1 {
					return err
				}
				return edit(s, a.X, func(_, _ int, v float32) float32 { return ulps(v, 1) })
			}},
	}
}
