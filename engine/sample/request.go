package sample

import (
	"math"
	"time"

	"margo/engine"
	"margo/engine/diffusion"
)

// Schedules of guidance over the iterations (P54).
const (
	Linear   = "linear"
	Constant = "constant"
)

// Samplers of a DiT, and what its guidance covers: the first three channels as the
// authors' (DiT models.py forward_with_cfg), or all as in diffusers.
const (
	DDPM       = "ddpm"
	DDIM       = "ddim"
	GuideThree = "3"
	GuideAll   = "all"
)

// Request says what to sample. All fields are taken as they are: start from
// Defaults.
type Request struct {
	Labels      []int // image i has class Labels[i mod len]; -1, or no labels: unconditional
	N           int   // images FirstIndex … FirstIndex+N-1
	FirstIndex  int
	Batch       int     // images made together; changes speed and memory, not images
	CFG         float64 // ω; 1: no guidance
	Temperature float64 // of the noise of the reverse steps (P9)
	Seed        uint64

	// Of a MAR.
	Iters       int // autoregressive iterations
	HeadSteps   int // diffusion steps of the head, from MaxTimestep down to 0
	MaxTimestep int
	CFGSchedule string // Linear or Constant
	Order       string // RandomOrder, RasterOrder or ConfidenceOrder; "": the model's

	// Of a MAR's categorical head; Temperature is that of the softmax (P3).
	TopK              int     // of the codes, the likeliest; 0: all
	TopP              float64 // the likeliest codes that make up this probability; 0 or 1: all
	CodeSampler       string  // Gumbel or Inverse; "": Gumbel
	ChoiceTemperature float64 // ConfidenceOrder: of the confidence's noise, which falls to 0 with the iterations

	// Of a DiT.
	Steps       string  // respacing as diffusion.Respace takes it: a count, counts of sections, or ddimN
	Sampler     string  // DDPM or DDIM
	Eta         float64 // of DDIM, 0 to 1
	CFGChannels string  // GuideThree or GuideAll

	Known        *Known                           // in- and outpainting: what is known already
	Draws        Draws                            // nil: the generator
	Only         []int                            // for timing: run these iterations alone; the others' tokens are unit normal noise
	AfterIterate func(iter int, tokens []float32) // for tests: tokens [batch·L, C] so far
}

// Known is an image of which a part is to be kept (P104).
type Known struct {
	Tokens  []float32 // [L,C]; values at unknown positions are not read
	Codes   []int32   // [L], in the place of Tokens where tokens are codes
	Unknown []bool    // [L]: to be sampled
}

// Defaults are the settings of the authors' evaluation for one image, without
// guidance.
func Defaults() Request {
	return Request{N: 1, Batch: 1, Iters: 64, HeadSteps: 100, MaxTimestep: diffusion.TrainSteps - 1,
		CFG: 1, CFGSchedule: Linear, Temperature: 1, ChoiceTemperature: 4.5, // MaskGIT's
		Steps: "250", Sampler: DDPM, CFGChannels: GuideThree}
}

// Image is a finished image.
type Image struct {
	Index, Class int // Class -1: unconditional
	H, W         int
	Pixels       []float32 // [H,W,3] RGB, -1 to 1 but not clipped; nil without a tokenizer, unless tokens are pixels
	Tokens       []float32 // [L,C]; nil where tokens are codes
	Codes        []int32   // [L], of the categorical head
	MaxToken     float32   // largest |token|
	Warning      string    // what is wrong with it and what may cure it; "" if nothing
}

// Progress is told after every iteration of a batch and after its decoding.
type Progress struct {
	Done, Total int // images
	Iter, Iters int // of the current batch; Iter = Iters while it is decoded
	Elapsed     time.Duration
	Left        time.Duration // estimated from the FLOPs done and to do
	Rate        float64       // images/s so far, counting started ones by their share
}

func (r *Request) class(i int) int {
	if len(r.Labels) == 0 {
		return -1
	}
	return r.Labels[i%len(r.Labels)]
}

func invalid(format string, a ...any) error {
	return engine.Errorf("sample", engine.Invalid, format, a...)
}

func finite(v float64) bool { return !math.IsNaN(v) && !math.IsInf(v, 0) }

// validate reports the first setting that cannot be, for a model.
func (r *Request) validate(m family) error {
	switch {
	case r.N < 1:
		return invalid("%d images", r.N)
	case r.Batch < 1:
		return invalid("batch of %d", r.Batch)
	case r.FirstIndex < 0 || int64(r.FirstIndex)+int64(r.N) > 1<<32:
		return invalid("images %d to %d; indices go from 0 to 2^32-1", r.FirstIndex, r.FirstIndex+r.N-1)
	case !finite(r.CFG) || math.Abs(r.CFG) > 1e6:
		return invalid("guidance %g", r.CFG)
	case !finite(r.Temperature) || r.Temperature < 0 || r.Temperature > 1e6:
		return invalid("temperature %g", r.Temperature)
	}
	for _, k := range r.Labels {
		if n := m.shape().classes; k < -1 || k >= n {
			return invalid("class %d; the model has 0 to %d, and -1 for none", k, n-1)
		}
	}
	return m.check(r)
}

func (f marFamily) check(r *Request) error {
	cfg := &f.model.Config
	switch {
	case r.Iters < 1 || r.Iters > 1<<20:
		return invalid("%d iterations", r.Iters)
	case r.CFGSchedule != Linear && r.CFGSchedule != Constant:
		return invalid("guidance schedule %q; there are %q and %q", r.CFGSchedule, Linear, Constant)
	}
	if err := r.validateVariant(cfg); err != nil {
		return err
	}
	if r.Known != nil {
		if err := r.Known.fits(cfg); err != nil {
			return err
		}
	}
	for _, s := range r.Only {
		if s < 0 || s >= r.Iters {
			return invalid("iteration %d of %d", s, r.Iters)
		}
	}
	return nil
}
