package sample

import (
	"math"
	"time"

	"margo/engine"
	"margo/engine/plan"
)

// Estimate is what the largest batch of a request takes, counted by a dry run.
type Estimate struct {
	Activations int64             // bytes of tensors beside the parameters, at the peak
	Memory      int64             // bytes that the device takes for them and for what its ops need for themselves
	Work        plan.Report       // launches, FLOPs and traffic of the batch
	steps       int               // iterations of a batch
	perIter     []float64         // FLOPs done after each iteration, as a share of the batch
	iters       []int             // Request.Iters' number of each
	constants   *engine.Constants // what the batch takes from the host; nil where the device shares its memory
}

// headScratch is what a fused head loop may allocate for itself
// (HeadStepsArgs.Scratch); a device may take more, and says so (engine.Footprint).
const headScratch = 64 << 20

// Estimate counts what r takes without running it.
func (e *Engine) Estimate(r Request) (Estimate, error) {
	if err := r.validate(e.model); err != nil {
		return Estimate{}, err
	}
	return e.estimate(&r, 0)
}

// estimate runs the batch that begins with the done-th image on a device that computes
// nothing.
func (e *Engine) estimate(r *Request, done int) (est Estimate, err error) {
	dry := *r
	dry.Draws, dry.AfterIterate = nil, nil // the order is known, the rest does not change the work
	orders := *r
	first, n := r.FirstIndex+done, min(r.Batch, r.N-done)
	t, err := e.model.schedule(&orders, first, n)
	if err != nil {
		return est, err
	}
	dev := plan.For(e.dev)
	c, err := engine.NewCtx(dev, e.opt.Compute)
	if err != nil {
		return est, err
	}
	defer c.Close()
	own := engine.StreamHeld(c.Stream) // which e's stream has as well
	if e.dev.Info().OwnMemory {
		est.constants = engine.NewConstants()
		c.Constants = est.constants
	}
	w := e.newRun(&dry, c)
	est.steps = t.steps()
	_, err = w.batch(t, first, n, func(iter int) {
		est.iters = append(est.iters, iter)
		est.perIter = append(est.perIter, float64(dev.Report().Total().FLOPs()))
	})
	est.Work, est.Activations = dev.Report(), int64(c.Arena.Peak())
	if est.constants != nil {
		est.Activations += int64(est.constants.Bytes())
	}
	est.Memory = dev.Block(int64(engine.ReserveBytes(int(est.Activations)))) + engine.StreamHeld(c.Stream) - own
	if all := float64(est.Work.Total().FLOPs()); all > 0 {
		for i := range est.perIter {
			est.perIter[i] /= all
		}
	}
	return est, err
}

// fits refuses what the device has no memory for, before the first kernel. What an earlier run has left to e counts as free.
func (e *Engine) fits(est Estimate) error {
	info := e.dev.Info()
	if info.MemFree <= 0 {
		return nil
	}
	layout := plan.For(e.dev)
	held := engine.StreamHeld(e.c.Stream)
	if n := layout.StreamBytes(); n > 0 {
		held -= layout.Block(n) // which it has from the beginning
	}
	for _, n := range e.c.Arena.Chunks() {
		held += layout.Block(int64(n))
	}
	need := est.Memory - held
	if need <= info.MemFree {
		return nil
	}
	return &engine.Error{Op: "sample", Kind: engine.OutOfMemory, Device: info.Name,
		Err: needs{need, info.MemFree, info.Name}}
}

// meter turns iterations into Progress.
type meter struct {
	f     func(Progress)
	start time.Time
	r     *Request
	est   Estimate
}

func newMeter(f func(Progress), start time.Time, r *Request, est Estimate) *meter {
	return &meter{f, start, r, est}
}

// tell reports that done images are finished and that n more are after
// iteration iter.
func (m *meter) tell(done, n, iter int) {
	if m.f == nil {
		return
	}
	p := Progress{Done: done, Total: m.r.N, Iter: iter, Iters: m.est.steps, Elapsed: time.Since(m.start)}
	share := 0.0
	for i, k := range m.est.iters {
		if k <= iter {
			share = m.est.perIter[i]
		}
	}
	if at := float64(done) + float64(n)*share; at > 0 && p.Elapsed > 0 {
		p.Rate = at / p.Elapsed.Seconds()
		// 2^31 images of some seconds each are beyond a Duration.
		p.Left = time.Duration(min((float64(m.r.N)-at)/p.Rate*float64(time.Second), math.MaxInt64/2))
	}
	m.f(p)
}

type needs struct {
	need, has int64
	name      string
}

func (n needs) Error() string {
	return "needs " + plan.Size(n.need) + ", " + n.name + " has " + plan.Size(n.has)
}
