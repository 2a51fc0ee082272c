package diffusion

import (
	"math"

	"margo/engine"
)

// DiT is the process that DiT samples with: the linear schedule over 1000 steps,
// respaced as Respace says (DiT diffusion/__init__.py create_diffusion).
func DiT(respacing string) (*Process, error) {
	use, err := Respace(TrainSteps, respacing)
	if err != nil {
		return nil, err
	}
	return New(Linear(TrainSteps), use)
}

// DDIMStep is the step of DDIM at respaced index i (Song et al. 2021, eq. 12;
// gaussian_diffusion.py ddim_sample), from ᾱ to ᾱ' = AlphasCumprodPrev:
//
//	x' = √ᾱ'·x₀ + √(1 − ᾱ' − σ²)·ε + σ·δ, σ = η·√((1−ᾱ')/(1−ᾱ))·√(1 − ᾱ/ᾱ')
//
// With x₀ = √(1/ᾱ)·x − √(1/ᾱ−1)·ε that is A·x − B·ε with a fixed variance, so the
// op that takes DDPM's steps takes this one. Without noise (η = 0, or ᾱ' = 1) it is
// marked Last.
func (p *Process) DDIMStep(i int, eta float64) engine.StepCoef {
	bar, prev := p.AlphasCumprod[i], p.AlphasCumprodPrev[i]
	sigma := eta * math.Sqrt((1-prev)/(1-bar)) * math.Sqrt(1-bar/prev)
	k := engine.StepCoef{
		Timestep: p.Timesteps[i],
		A:        math.Sqrt(prev) * p.SqrtRecipAlphasCumprod[i],
		// 1 − ᾱ' − σ² is never below 0 for η up to 1, but for rounding.
		B:    math.Sqrt(prev)*p.SqrtRecipm1AlphasCumprod[i] - math.Sqrt(math.Max(0, 1-prev-sigma*sigma)),
		Last: sigma == 0,
	}
	if !k.Last {
		k.MinLog = 2 * math.Log(sigma)
		k.MaxLog = k.MinLog
	}
	return k
}

// DDIMSteps lists the steps of DDIM in the order they are taken, noise first. η is
// 0 (deterministic) to 1 (as much noise as DDPM's posterior has).
func (p *Process) DDIMSteps(eta float64) ([]engine.StepCoef, error) {
	if !(eta >= 0 && eta <= 1) {
		return nil, engine.Errorf("ddim", engine.Invalid, "eta is %g, it must be between 0 and 1", eta)
	}
	s := make([]engine.StepCoef, p.Len())
	for i := range s {
		s[i] = p.DDIMStep(p.Len()-1-i, eta)
	}
	return s, nil
}
