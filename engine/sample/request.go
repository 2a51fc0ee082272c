package sample

import (
	"math"
	"time"

	"margo/engine"
	"margo/engine/diffusion"
	"margo/engine/mar"
)

// Schedules of guidance over the iterations (P54).
const (
	Linear   = "linear"
	Constant = "constant"
)

// Request says what to sample. All fields are taken as they are: start from
// Defaults.
type Request struct {
	Labels       []int // image i has class Labels[i mod len]; -1, or no labels: unconditional
	N            int   // images FirstIndex … FirstIndex+N-1
	FirstIndex   int
	Batch        int // images made together; changes speed and memory, not images
	Iters        int // autoregressive iterations
	HeadSteps    int // diffusion steps of the head, from MaxTimestep down to 0
	MaxTimestep  int
	CFG          float64 // ω; 1: no guidance
	CFGSchedule  string  // Linear or Constant
	Temperature  float64 // of the noise of the head's steps (P9)
	Seed         uint64
	Known        *Known                           // in- and outpainting: what is known already
	Draws        Draws                            // nil: the generator
	Only         []int                            // for timing: run these iterations alone; the others' tokens stay 0
	AfterIterate func(iter int, tokens []float32) // for tests: tokens [batch·L, C] so far
}

// Known is an image of which a part is to be kept (P104).
type Known struct {
	Tokens  []float32 // [L,C]; values at unknown positions are not read
	Unknown []bool    // [L]: to be sampled
}

// Defaults are the settings of the authors' evaluation for one image, without
// guidance.
func Defaults() Request {
	return Request{N: 1, Batch: 1, Iters: 64, HeadSteps: 100, MaxTimestep: diffusion.TrainSteps - 1,
		CFG: 1, CFGSchedule: Linear, Temperature: 1}
}

// Image is a finished image.
type Image struct {
	Index, Class int // Class -1: unconditional
	H, W         int
	Pixels       []float32 // [H,W,3] RGB, -1 to 1 but not clipped; nil without a tokenizer, unless tokens are pixels
	Tokens       []float32 // [L,C]
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

// validate reports the first setting that cannot be, for a model.
func (r *Request) validate(cfg *mar.Config) error {
	bad := func(format string, a ...any) error { return engine.Errorf("sample", engine.Invalid, format, a...) }
	finite := func(v float64) bool { return !math.IsNaN(v) && !math.IsInf(v, 0) }
	l := cfg.Tokens()
	switch {
	case r.N < 1:
		return bad("%d images", r.N)
	case r.Batch < 1:
		return bad("batch of %d", r.Batch)
	case r.FirstIndex < 0 || int64(r.FirstIndex)+int64(r.N) > 1<<32:
		return bad("images %d to %d; indices go from 0 to 2^32-1", r.FirstIndex, r.FirstIndex+r.N-1)
	case r.Iters < 1 || r.Iters > 1<<20:
		return bad("%d iterations", r.Iters)
	case !finite(r.CFG) || math.Abs(r.CFG) > 1e6:
		return bad("guidance %g", r.CFG)
	case r.CFGSchedule != Linear && r.CFGSchedule != Constant:
		return bad("guidance schedule %q; there are %q and %q", r.CFGSchedule, Linear, Constant)
	case !finite(r.Temperature) || r.Temperature < 0 || r.Temperature > 1e6:
		return bad("temperature %g", r.Temperature)
	}
	for _, k := range r.Labels {
		if k < -1 || k >= cfg.ClassNum {
			return bad("class %d; the model has 0 to %d, and -1 for none", k, cfg.ClassNum-1)
		}
	}
	if k := r.Known; k != nil {
		if len(k.Unknown) != l || len(k.Tokens) != l*cfg.TokenDim() {
			return bad("the known image has %d positions and %d token values, the model %d and %d",
				len(k.Unknown), len(k.Tokens), l, l*cfg.TokenDim())
		}
		for i, v := range k.Tokens {
			if !k.Unknown[i/cfg.TokenDim()] && !finite(float64(v)) {
				return bad("the known token %d is not finite", i/cfg.TokenDim())
			}
		}
	}
	for _, s := range r.Only {
		if s < 0 || s >= r.Iters {
			return bad("iteration %d of %d", s, r.Iters)
		}
	}
	return nil
}
