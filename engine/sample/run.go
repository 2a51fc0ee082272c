package sample

import (
	"fmt"
	"math"
	"time"

	"margo/engine"
)

// family is a kind of model, as a run sees it: a MAR or a DiT.
type family interface {
	// loaded returns an error that names the first parameter without a value.
	loaded() error
	shape() shape
	// check reports the first setting of a request that this kind of model cannot have.
	check(r *Request) error
	// schedule plans images first … first+n-1 of r on the host.
	schedule(r *Request, first, n int) (task, error)
}

// shape is what images are made of.
type shape struct {
	grid, patch, channels int // tokens per side, latent positions per side of one, channels of a position
	stride                int // pixels per side of a latent position
	classes               int
}

func (s shape) tokens() int   { return s.grid * s.grid }
func (s shape) tokenDim() int { return s.channels * s.patch * s.patch }
func (s shape) side() int     { return s.grid * s.patch * s.stride }

// pixels reports whether the tokens are pixels themselves (P49).
func (s shape) pixels() bool { return s.stride == 1 && s.channels == 3 }

// task is the work of a batch of images.
type task interface {
	// steps is the number of iterations that tell counts up to.
	steps() int
	// sample makes the tokens [n·L, C] F32 of the images, or their codes I32 [n·L], in
	// w's arena; nil after an
	// error. tell is called after each iteration with how many are done.
	sample(w *run, tell func(iter int)) *engine.Tensor
	// advice is what may cure tokens far outside the data's range.
	advice() string
}

// run is the work of one call of Run, or of its dry run.
type run struct {
	shape shape
	tok   Decoder
	opt   Options
	r     *Request
	c     *engine.Ctx
	clock clock
	set   int64 // Info.WorkingSet
	paged bool  // the device has OpPagedAttention
	// enqueued, if there is one, is called when all of a batch's tokens are on their way:
	// what the host does then, a device need not wait for.
	enqueued func()
}

// clock adds the time between two calls of lap to a part.
type clock struct {
	on    bool
	last  time.Time
	parts Parts
}

func (k *clock) lap(c *engine.Ctx, part *time.Duration) {
	if !k.on {
		return
	}
	c.Sync()
	now := time.Now()
	if part != nil {
		*part += now.Sub(k.last)
	}
	k.last = now
}

// batch makes the images first … first+n-1 of t.
func (w *run) batch(t task, first, n int, tell func(iter int)) ([]Image, error) {
	tokens := t.sample(w, tell)
	if w.c.Err() == nil && w.enqueued != nil {
		w.enqueued()
	}
	if w.c.Err() != nil {
		return nil, w.c.Err()
	}
	if tokens.DType == engine.I32 {
		return w.coded(first, n, tokens)
	}
	return w.images(t, first, n, tokens)
}

// Range of tokens that is no reason to worry: data has a standard deviation of
// about 1, so 20 of them are no image any more.
const maxToken = 20

// images reads the tokens back and decodes them.
func (w *run) images(t task, first, n int, tokens *engine.Tensor) ([]Image, error) {
	c := w.c
	l, ch := w.shape.tokens(), w.shape.tokenDim()
	all := c.Download(tokens)
	if c.Err() != nil {
		return nil, c.Err()
	}
	out := make([]Image, n)
	for i := range out {
		out[i] = Image{Index: first + i, Class: w.r.class(first + i), Tokens: all[i*l*ch : (i+1)*l*ch : (i+1)*l*ch]}
		for _, v := range out[i].Tokens {
			if a := float32(math.Abs(float64(v))); a > out[i].MaxToken || a != a {
				out[i].MaxToken = a
			}
		}
		out[i].Warning = warning(out[i].MaxToken, t)
	}
	w.clock.lap(c, nil)
	for i := 0; i < len(out); {
		n := min(w.decodeBatch(), len(out)-i)
		c.Scoped(func() { w.decode(out[i:i+n], tokens.RowsAt(i*l, (i+n)*l)) })
		i += n
	}
	w.clock.lap(c, &w.clock.parts.Tokenizer)
	return out, c.Err()
}

// coded reads codes back and decodes them.
func (w *run) coded(first, n int, codes *engine.Tensor) ([]Image, error) {
	c, l, side := w.c, w.shape.tokens(), w.shape.grid
	all := ints(c, codes)
	if c.Err() != nil {
		return nil, c.Err()
	}
	out := make([]Image, n)
	for i := range out {
		out[i] = Image{Index: first + i, Class: w.r.class(first + i), Codes: all[i*l : (i+1)*l : (i+1)*l]}
	}
	w.clock.lap(c, nil)
	for i := 0; i < len(out) && w.tok != nil; {
		k := min(w.decodeBatch(), len(out)-i)
		c.Scoped(func() {
			w.pixels(out[i:i+k], w.tok.(codeDecoder).DecodeCodes(c, all[i*l:(i+k)*l], k, side, side))
		})
		i += k
	}
	w.clock.lap(c, &w.clock.parts.Tokenizer)
	return out, c.Err()
}

func warning(most float32, t interface{ advice() string }) string {
	if most <= maxToken {
		return ""
	}
	if most != most || math.IsInf(float64(most), 0) {
		return "tokens are not finite" + t.advice()
	}
	return fmt.Sprintf("tokens reach ±%.4g, far outside the data's range (a standard deviation of about 1)%s", most, t.advice())
}

// decodeBatch is how many images the tokenizer takes at once: about one of
// 256×256 pixels' worth, which keeps its activations small beside the trunk's.
func (w *run) decodeBatch() int {
	return max(1, 1<<16/(w.shape.side()*w.shape.side()))
}

// decode fills in the pixels of images from their tokens [n·L, C].
func (w *run) decode(out []Image, tokens *engine.Tensor) {
	c, sh := w.c, w.shape
	pixels := w.tok == nil && sh.pixels()
	if c.Poll() || w.tok == nil && !pixels {
		return
	}
	n, side := len(out), sh.grid*sh.patch
	x := c.New(engine.F32, n, side, side, sh.channels)
	c.Patchify(engine.PatchifyArgs{X: x, Y: tokens.Reshape(n, sh.tokens(), sh.tokenDim()), P: sh.patch, Inverse: true})
	if !pixels {
		z := c.New(engine.F32, n, side, side, sh.channels)
		c.Cast(engine.CastArgs{X: x, Y: z, Scale: float32(1 / w.opt.LatentScale)})
		if x = w.tok.Decode(c, z); c.Err() != nil {
			return
		}
	}
	w.pixels(out, x)
}

// pixels hands out the pixels x [n,H,W,3].
func (w *run) pixels(out []Image, x *engine.Tensor) {
	if w.c.Err() != nil {
		return
	}
	v := w.c.Download(x)
	if w.c.Err() != nil {
		return
	}
	h, wd := x.Shape[1], x.Shape[2]
	for i := range out {
		out[i].H, out[i].W, out[i].Pixels = h, wd, v[i*h*wd*3:(i+1)*h*wd*3:(i+1)*h*wd*3]
	}
}
