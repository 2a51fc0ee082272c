package mar

import "margo/engine"

// Steps runs the reverse steps of a, with the device's fused loop where it has
// one and by single ops elsewhere. Weights and Exact are filled in.
func (h *Head) Steps(c *engine.Ctx, a engine.HeadStepsArgs) {
	if c.Poll() {
		return
	}
	a.Weights, a.Exact = h.Weights(false), h.Weights(true)
	a.Cancel = c.Cancel
	if c.Stream.Device().Supports(engine.OpHeadSteps, c.Compute) {
		c.HeadSteps(a)
		return
	}
	h.Compose(c, a)
}

// Compose is HeadSteps written with the other ops: what the fused loop is
// compared with, and what runs on a device that has none.
func (h *Head) Compose(c *engine.Ctx, a engine.HeadStepsArgs) {
	if c.Err() != nil || a.X.Rows() == 0 {
		return
	}
	n := a.X.Rows()
	out := c.New(engine.F32, a.Cond.Rows(), 2*h.Channels)
	for i, coef := range a.Steps {
		if c.Poll() {
			return
		}
		c.Scoped(func() {
			p := headPass{w: a.Weights, x: a.X, time: a.Time, cond: a.Cond, out: out, oneTime: true, step: i}
			if i < len(a.ExactStep) && a.ExactStep[i] {
				p.w, p.exact = a.Exact, true
			}
			h.net(c, p)
			step := engine.DiffusionStepArgs{X: a.X, Y: a.X, Out: out, Guidance: a.Guidance, IDs: a.IDs,
				RNG: a.RNG, Coef: coef, Temperature: a.Temperature}
			step.RNG.Step += i
			if a.Noise != nil {
				step.Noise = a.Noise.RowsAt(i*n, (i+1)*n)
			}
			c.DiffusionStep(step)
			if a.Trace != nil && c.Err() == nil {
				c.Fail(c.Stream.Copy(a.Trace.RowsAt(i*n, (i+1)*n), a.X))
			}
		})
	}
}
