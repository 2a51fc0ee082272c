package diffusion

import (
	"math"

	"margo/engine"
)

// Process holds the tables of a respaced diffusion process; index i is a
// respaced step, Timesteps[i] the original timestep that the network sees
// (gaussian_diffusion.py GaussianDiffusion, respace.py SpacedDiffusion).
type Process struct {
	Timesteps                   []int
	Betas                       []float64
	AlphasCumprod               []float64 // ᾱ
	AlphasCumprodPrev           []float64
	SqrtAlphasCumprod           []float64
	SqrtOneMinusAlphasCumprod   []float64
	SqrtRecipAlphasCumprod      []float64 // √(1/ᾱ)
	SqrtRecipm1AlphasCumprod    []float64 // √(1/ᾱ − 1)
	PosteriorVariance           []float64
	PosteriorLogVarianceClipped []float64
	PosteriorMeanCoef1          []float64 // of x₀
	PosteriorMeanCoef2          []float64 // of x_t
}

// New builds the process over the ascending timesteps use of base schedule
// betas. Two steps at least: the variance of step 0 is clipped to that of step 1.
func New(betas []float64, use []int) (*Process, error) {
	if len(use) < 2 {
		return nil, engine.Errorf("diffusion process", engine.Invalid, "%d steps; it takes at least 2", len(use))
	}
	p := &Process{Timesteps: append([]int(nil), use...)}
	bar, last, next := 1.0, 1.0, 0
	for i, b := range betas {
		bar *= 1 - b
		if next < len(use) && use[next] == i {
			p.Betas = append(p.Betas, 1-bar/last)
			last = bar
			next++
		}
	}
	if next != len(use) {
		return nil, engine.Errorf("diffusion process", engine.Invalid,
			"timestep %d is out of order or beyond the %d of the schedule", use[next], len(betas))
	}
	p.tables()
	return p, nil
}

// MAR is the process that MAR samples with: the cosine schedule over 1000
// steps, respaced to steps timesteps from 0 to last (P13, P14).
func MAR(steps, last int) (*Process, error) {
	use, err := Spaced(TrainSteps, steps, last)
	if err != nil {
		return nil, err
	}
	return New(Cosine(TrainSteps), use)
}

func (p *Process) tables() {
	n := len(p.Betas)
	bar := 1.0
	for _, b := range p.Betas {
		prev := bar
		bar *= 1 - b
		p.AlphasCumprod = append(p.AlphasCumprod, bar)
		p.AlphasCumprodPrev = append(p.AlphasCumprodPrev, prev)
		p.SqrtAlphasCumprod = append(p.SqrtAlphasCumprod, math.Sqrt(bar))
		p.SqrtOneMinusAlphasCumprod = append(p.SqrtOneMinusAlphasCumprod, math.Sqrt(1-bar))
		p.SqrtRecipAlphasCumprod = append(p.SqrtRecipAlphasCumprod, math.Sqrt(1/bar))
		p.SqrtRecipm1AlphasCumprod = append(p.SqrtRecipm1AlphasCumprod, math.Sqrt(1/bar-1))
		p.PosteriorVariance = append(p.PosteriorVariance, b*(1-prev)/(1-bar))
		p.PosteriorMeanCoef1 = append(p.PosteriorMeanCoef1, b*math.Sqrt(prev)/(1-bar))
		p.PosteriorMeanCoef2 = append(p.PosteriorMeanCoef2, (1-prev)*math.Sqrt(1-b)/(1-bar))
	}
	for i := range n {
		// The variance of step 0 is 0: its logarithm is clipped to that of step 1.
		p.PosteriorLogVarianceClipped = append(p.PosteriorLogVarianceClipped, math.Log(p.PosteriorVariance[max(i, 1)]))
	}
}

// Len is the number of steps.
func (p *Process) Len() int { return len(p.Timesteps) }

// Step is the reverse step at respaced index i: x₀ = √(1/ᾱ)·x − √(1/ᾱ−1)·ε put
// into the posterior's mean gives mean = A·x − B·ε.
func (p *Process) Step(i int) engine.StepCoef {
	return engine.StepCoef{
		Timestep: p.Timesteps[i],
		A:        p.PosteriorMeanCoef1[i]*p.SqrtRecipAlphasCumprod[i] + p.PosteriorMeanCoef2[i],
		B:        p.PosteriorMeanCoef1[i] * p.SqrtRecipm1AlphasCumprod[i],
		MinLog:   p.PosteriorLogVarianceClipped[i],
		MaxLog:   math.Log(p.Betas[i]),
		Last:     i == 0,
	}
}

// Steps lists the reverse steps in the order they are taken, noise first.
func (p *Process) Steps() []engine.StepCoef {
	s := make([]engine.StepCoef, p.Len())
	for i := range s {
		s[i] = p.Step(p.Len() - 1 - i)
	}
	return s
}

// Amplification is by how much a step multiplies an error of ε: B.
func Amplification(s engine.StepCoef) float64 { return s.B }

// ExactAbove is the amplification from which a step is computed in F32 whatever
// the compute dtype: BF16 operands err by about 2⁻⁹, and 8·2⁻⁹ of a standard
// deviation still drowns in the noise of the step.
const ExactAbove = 8

// ExactSteps tells which steps are to be computed in F32.
func ExactSteps(steps []engine.StepCoef) []bool {
	e := make([]bool, len(steps))
	for i, s := range steps {
		e[i] = Amplification(s) > ExactAbove
	}
	return e
}
