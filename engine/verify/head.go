package verify

import (
	"math"

	"margo/engine"
	"margo/engine/diffusion"
)

// headTemperature is that of head traces whose metadata do not say (the
// goldens' README); it is also in the name of the tensor ps_sample_temp0p9.
const headTemperature = 0.9

// head compares the head's network and one reverse step of it.
func (v *verifier) head() error {
	var err error
	cfg := v.model.MAR
	ch, w := cfg.TokenDim(), cfg.DiffLossW
	x, c := v.t.get(&err, "x", 2), v.t.get(&err, "c", 2)
	t := v.t.ints(&err, "t", 1, diffusion.TrainSteps)
	emb, temb := v.t.get(&err, "timestep_embedding", 2), v.t.get(&err, "time_embed_out", 2)
	out, guided := v.t.get(&err, "out", 2), v.t.get(&err, "out_with_cfg3", 2)
	n := len(t)
	v.t.is(&err, "timestep_embedding", emb, n, 256) // fixed in the authors' code
	v.t.is(&err, "x", x, n, ch)
	v.t.is(&err, "c", c, n, cfg.DecoderEmbedDim)
	v.t.is(&err, "time_embed_out", temb, n, w)
	v.t.is(&err, "out", out, n, 2*ch)
	v.t.is(&err, "out_with_cfg3", guided, n, 2*ch)
	if err != nil {
		return err
	}
	if n == 0 || n%2 != 0 {
		return v.t.unknown("tensor x has %d rows; guidance needs pairs", n)
	}
	times := func(s *side, t []int) *engine.Tensor {
		f := make([]float32, len(t))
		for i, k := range t {
			f[i] = float32(k)
		}
		return s.c.F32(f, len(t))
	}
	checks := []check{
		one("timestep embedding", emb.v, func(s *side) *engine.Tensor {
			y := s.c.New(engine.F32, emb.shape...)
			s.c.TimestepEmbedding(engine.TimestepEmbeddingArgs{T: times(s, t), Y: y, MaxPeriod: 10000})
			return y
		}),
		one("time MLP", temb.v, func(s *side) *engine.Tensor { return s.m.mar.Head.Time(s.c, times(s, t)) }),
		one("network", out.v, func(s *side) *engine.Tensor {
			return s.m.mar.Head.Denoise(s.c, s.upload(x, engine.F32), times(s, t), s.upload(c, engine.F32), false)
		}),
		one("network with guidance 3", guided.v, func(s *side) *engine.Tensor {
			return s.m.mar.Head.DenoiseCFG(s.c, s.c.F32(x.rows(ch, 0, n/2), n/2, ch), times(s, t), s.upload(c, engine.F32), 3, false)
		}),
	}
	step, err := v.reverseStep(x, c, times)
	if err != nil {
		return err
	}
	return v.all(append(checks, step))
}

// reverseStep compares p_mean_variance and p_sample at a respaced index for each
// row of the trace.
func (v *verifier) reverseStep(x, c data, times func(*side, []int) *engine.Tensor) (check, error) {
	var err error
	ch := v.model.MAR.TokenDim()
	proc := v.process(&err)
	temperature := float32(v.t.number(&err, "temperature", headTemperature, 0, 1e6))
	if err != nil {
		return check{}, err
	}
	index := v.t.ints(&err, "ps_index", 1, proc.Len())
	noise := v.t.get(&err, "ps_noise", 2)
	names := []string{"reverse step: mean", "reverse step: log variance", "reverse step: variance", "reverse step: x_0", "reverse step: sample"}
	var goldens [][]float32
	for _, k := range []string{"ps_mean", "ps_log_variance", "ps_variance", "ps_pred_xstart", "ps_sample_temp0p9"} {
		g := v.t.get(&err, k, 2)
		v.t.is(&err, k, g, len(index), ch)
		goldens = append(goldens, g.v)
	}
	v.t.is(&err, "ps_noise", noise, len(index), ch)
	if err == nil && len(index) != x.shape[0] {
		v.t.is(&err, "x", x, len(index), ch)
	}
	if err != nil {
		return check{}, err
	}
	run := func(s *side) [][]float64 {
		res := make([][]float64, len(names))
		for r, i := range index {
			coef := proc.Step(i)
			exact := diffusion.Amplification(coef) > diffusion.ExactAbove
			xr := s.c.F32(x.rows(ch, r, r+1), 1, ch)
			out := s.m.mar.Head.Denoise(s.c, xr, times(s, []int{coef.Timestep}), s.c.F32(c.rows(c.shape[1], r, r+1), 1, c.shape[1]), exact)
			sample := func(temperature float32) []float64 {
				y := s.c.New(engine.F32, 1, ch)
				s.c.DiffusionStep(engine.DiffusionStepArgs{X: xr, Y: y, Out: out, Noise: s.c.F32(noise.rows(ch, r, r+1), 1, ch), Coef: coef, Temperature: temperature})
				return s.read(y)
			}
			mean, drawn, net := sample(0), sample(temperature), s.read(out)
			if s.c.Err() != nil {
				return res
			}
			res[0] = append(res[0], mean...)
			for j := range ch {
				f := (net[ch+j] + 1) / 2
				logvar := f*coef.MaxLog + (1-f)*coef.MinLog
				res[1] = append(res[1], logvar)
				res[2] = append(res[2], math.Exp(logvar))
				res[3] = append(res[3], proc.SqrtRecipAlphasCumprod[i]*float64(x.rows(ch, r, r+1)[j])-proc.SqrtRecipm1AlphasCumprod[i]*net[j])
			}
			res[4] = append(res[4], drawn...)
		}
		return res
	}
	return check{names: names, goldens: goldens, run: run}, nil
}
