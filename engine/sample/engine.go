package sample

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"margo/engine"
	"margo/engine/dit"
	"margo/engine/mar"
)

// Decoder turns latents into pixels: a tokenizer as the sampler needs it.
type Decoder interface {
	// Decode maps latents [N,h,w,C] F32 to pixels [N,H,W,3] F32.
	Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor
}

// Options of an Engine.
type Options struct {
	Compute     engine.DType // dtype the model's weights were loaded for
	LatentScale float64      // latents were multiplied by it before the model saw them; 0: the tokenizer's, or 1
	Profile     bool         // measure Parts: waits for the device after each stage
}

// Parts is where the time of a run went: of a MAR in Encoder, Decoder and Head, of a
// DiT in Denoiser. Rest is what the others leave: plans, uploads, results.
type Parts struct{ Encoder, Decoder, Head, Denoiser, Tokenizer, Rest time.Duration }

// Engine samples from one model, a MAR or a DiT, on one device. One run at a time; further calls
// wait. The model, the tokenizer and the device stay the caller's.
type Engine struct {
	model family
	tok   Decoder
	dev   engine.Device
	opt   Options

	mu    sync.Mutex
	c     *engine.Ctx
	parts Parts
}

// Open prepares sampling from a loaded MAR. tok may be nil: images then have
// tokens but no pixels, unless tokens are pixels themselves (P49). Fails with
// Invalid if a parameter has no value.
func Open(m *mar.Model, tok Decoder, dev engine.Device, o Options) (*Engine, error) {
	if err := decodes(&m.Config, tok); err != nil {
		return nil, err
	}
	return open(marFamily{m}, tok, dev, o)
}

// OpenDiT is Open for a DiT.
func OpenDiT(m *dit.Model, tok Decoder, dev engine.Device, o Options) (*Engine, error) {
	return open(ditFamily{m}, tok, dev, o)
}

func open(m family, tok Decoder, dev engine.Device, o Options) (*Engine, error) {
	if err := m.loaded(); err != nil {
		return nil, err
	}
	if t, ok := tok.(interface{ LatentScale() float32 }); ok && o.LatentScale == 0 {
		o.LatentScale = float64(t.LatentScale())
	}
	if o.LatentScale == 0 {
		o.LatentScale = 1
	}
	c, err := engine.NewCtx(dev, o.Compute)
	if err != nil {
		return nil, err
	}
	return &Engine{model: m, tok: tok, dev: dev, opt: o, c: c}, nil
}

// Close frees the engine's memory and stream.
func (e *Engine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.c == nil {
		return nil
	}
	err := e.c.Close()
	e.c = nil
	return err
}

// Parts is where the time of the last run went, with Options.Profile.
func (e *Engine) Parts() Parts {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.parts
}

// Run samples r.N images and gives them to sink in the order of their indices;
// progress may be nil. An error of sink ends the run. When ctx is done the run
// stops within a layer or a diffusion step, with an error of kind Cancelled that
// wraps the context's cause. Whatever happens, no memory stays behind beyond
// what Close frees.
func (e *Engine) Run(ctx context.Context, r Request, progress func(Progress), sink func(Image) error) (err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.c == nil {
		return engine.Errorf("sample", engine.Invalid, "the engine is closed")
	}
	if err := r.validate(e.model); err != nil {
		return err
	}
	est, err := e.estimate(&r, 0)
	if err != nil {
		return err
	}
	if err := e.fits(est); err != nil {
		return err
	}

	var stop uint32
	defer context.AfterFunc(ctx, func() { atomic.StoreUint32(&stop, 1) })()
	c := e.c
	c.Cancel = &stop
	defer func() {
		err = e.finish(ctx, err)
	}()
	if err := c.Arena.Reserve(int(est.Activations)); err != nil {
		return err
	}
	start := time.Now()
	e.parts = Parts{}
	w := e.newRun(&r, c)
	w.clock.on = e.opt.Profile
	p := newMeter(progress, start, &r, est)
	constants := est.constants
	for done := 0; done < r.N; {
		n := min(r.Batch, r.N-done)
		t, err := e.model.schedule(&r, r.FirstIndex+done, n)
		if err != nil {
			return err
		}
		if c.Constants = constants; constants != nil {
			constants.Load(c)
		}
		w.enqueued = func() {
			if constants == nil || done+n >= r.N {
				return
			}
			next, err := e.estimate(&r, done+n)
			c.Fail(err)
			constants = next.constants
		}
		images, err := w.batch(t, r.FirstIndex+done, n, func(iter int) {
			p.tell(done, n, iter)
			w.clock.lap(c, nil) // what progress does is no part
		})
		if err != nil {
			return err
		}
		for i := range images {
			if err := sink(images[i]); err != nil {
				return err
			}
		}
		done += n
		p.tell(done, 0, 0)
		if err := c.Arena.Reset(); err != nil {
			return err
		}
	}
	e.parts = w.clock.parts
	e.parts.Rest = time.Since(start) - e.parts.Encoder - e.parts.Decoder - e.parts.Head - e.parts.Denoiser - e.parts.Tokenizer
	return nil
}

func (e *Engine) newRun(r *Request, c *engine.Ctx) *run {
	return &run{shape: e.model.shape(), tok: e.tok, opt: e.opt, r: r, c: c, set: e.dev.Info().WorkingSet,
		paged: e.dev.Supports(engine.OpPagedAttention, e.opt.Compute)}
}

// finish brings the context back to where a run may begin and says Cancelled in
// the caller's words.
func (e *Engine) finish(ctx context.Context, err error) error {
	c := e.c
	c.Cancel, c.Constants = nil, nil
	c.ClearErr()
	if err == nil {
		return c.Arena.Reset()
	}
	sync, free := c.Stream.Sync(), c.Arena.Close()
	if errors.Is(err, engine.Cancelled) && ctx.Err() != nil {
		err = &engine.Error{Op: "sample", Kind: engine.Cancelled, Err: context.Cause(ctx)}
	}
	if sync != nil && !errors.Is(sync, engine.Cancelled) {
		err = errors.Join(err, sync)
	}
	return errors.Join(err, free)
}
