package mar

import (
	"math"

	"margo/engine/checkpoint"
)

// FLOPs are the multiply-adds, counted as 2, of the authors' algorithm.
type FLOPs struct{ Encoder, Decoder, Head float64 }

// Total is the sum.
func (f FLOPs) Total() float64 { return f.Encoder + f.Decoder + f.Head }

// CountFLOPs counts what the authors' code computes for one image
// (mar.py sample_tokens): every decoder block at all positions, the head with
// its time and condition layers for every token at every step, and everything
// twice with guidance. It is the work that speeds are compared by, not what
// margo does.
func CountFLOPs(cfg *Config, iters, headSteps int, guided bool) FLOPs {
	l, b, c := float64(cfg.Tokens()), float64(cfg.BufferSize), float64(cfg.TokenDim())
	de, dd := float64(cfg.EncoderEmbedDim), float64(cfg.DecoderEmbedDim)
	// A block over n rows: QKV and proj, MLP, scores and values.
	block := func(n, d, hidden float64) float64 { return 2*n*d*(4*d+2*hidden) + 4*n*n*d }
	f := FLOPs{}
	if cfg.IsCausal() { // every row once, over the rows up to itself, which the cache keeps
		rows := b + l - 1
		f.Decoder = float64(cfg.DecoderDepth)*(block(rows, dd, float64(cfg.DecoderHidden()))-4*rows*rows*dd+2*rows*(rows+1)*dd) + 2*l*c*dd
		f.Head = headFLOPs(cfg, headSteps)
		if guided {
			f.Decoder, f.Head = 2*f.Decoder, 2*f.Head
		}
		return f
	}
	left := cfg.Tokens()
	for s := range iters {
		n := b + l - float64(left)
		f.Encoder += 2*l*c*de + float64(cfg.EncoderDepth)*block(n, de, float64(cfg.EncoderHidden()))
		f.Decoder += 2*n*de*dd + float64(cfg.DecoderDepth)*block(b+l, dd, float64(cfg.DecoderHidden()))
		ratio := math.Cos(math.Pi / 2 * float64(s+1) / float64(iters))
		left = max(1, min(left-1, int(math.Floor(l*ratio))))
	}
	f.Head = headFLOPs(cfg, headSteps)
	if guided {
		f.Encoder, f.Decoder, f.Head = 2*f.Encoder, 2*f.Decoder, 2*f.Head
	}
	return f
}

// headFLOPs are the head's for all tokens, once.
func headFLOPs(cfg *Config, headSteps int) float64 {
	l, c, dd, w := float64(cfg.Tokens()), float64(cfg.TokenDim()), float64(cfg.DecoderEmbedDim), float64(cfg.DiffLossW)
	switch cfg.HeadKind() {
	case checkpoint.CategoricalHead:
		return 2 * l * dd * float64(cfg.CodebookSize)
	case checkpoint.L2Head:
		return 2 * l * dd * c
	case checkpoint.GMMHead:
		return 2 * l * dd * float64(cfg.MixtureOut())
	}
	row := 256*w + w*w + dd*w + c*w + float64(cfg.DiffLossD)*5*w*w + 2*w*w + 2*c*w
	return 2 * row * l * float64(headSteps)
}
