package verify

import (
	"fmt"

	"margo/engine"
	"margo/engine/sample"
)

// replay supplies the recorded draws to the sampler.
type replay struct {
	orders [][]int
	loops  []loop
}

// Order is the recorded generation order of an image.
func (r replay) Order(image, n int) []int { return r.orders[image] }

// Noise is what the recorded iteration drew.
func (r replay) Noise(iter int, ids []sample.TokenID, steps, ch int) (x, noise []float32, err error) {
	l := r.loops[iter]
	if l.n != len(ids) {
		return nil, nil, engine.Errorf("replay", engine.IO, "iteration %d: the trace predicts %d tokens, the schedule %d", iter, l.n, len(ids))
	}
	return l.init.v, l.conditional(l.noise), nil
}

// freeRun is the whole loop from the first draw to the final tokens.
func (v *verifier) freeRun(st settings, loops []loop) (check, error) {
	var err error
	orders := st.orders
	cfg := v.model.MAR
	final := v.t.get(&err, "final_tokens", 4)
	width := cfg.Grid() * cfg.PatchSize
	v.t.is(&err, "final_tokens", final, len(orders), cfg.VAEEmbedDim, width, width)
	r := sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps = len(orders), len(orders), st.iters, st.headSteps
	r.CFG, r.Temperature, r.Draws = st.cfg, st.temperature, replay{orders, loops}
	r.CFGSchedule = st.schedule
	if v.t.has("labels") {
		r.Labels = v.t.ints(&err, "labels", 1, cfg.ClassNum)
		if n := len(r.Labels); err == nil && n != 1 && n != len(orders) {
			err = v.t.unknown("tensor labels has %d labels for %d images", n, len(orders))
		}
	}
	if err != nil {
		return check{}, err
	}
	c := check{names: []string{fmt.Sprintf("whole run of %d iterations", st.iters)}, goldens: [][]float32{final.v}, free: true}
	c.run = func(s *side) [][]float64 {
		e, err := sample.Open(s.m.mar, nil, s.dev, sample.Options{Compute: s.compute})
		if err != nil {
			s.c.Fail(err)
			return nil
		}
		defer e.Close()
		out := make([]float64, len(final.v))
		per := len(final.v) / len(orders)
		s.c.Fail(e.Run(v.ctx, r, nil, func(im sample.Image) error {
			unpatchify(out[im.Index*per:(im.Index+1)*per], im.Tokens, cfg.Grid(), cfg.PatchSize, cfg.VAEEmbedDim)
			return nil
		}))
		return [][]float64{out}
	}
	return c, nil
}

// unpatchify puts tokens [g·g, C·p·p] into an image [C, g·p, g·p]
// (mar.py unpatchify).
func unpatchify(dst []float64, tokens []float32, g, p, ch int) {
	side := g * p
	for i := range dst {
		x, y, c := i%side, i/side%side, i/(side*side)
		token := y/p*g + x/p
		dst[i] = float64(tokens[token*ch*p*p+c*p*p+y%p*p+x%p])
	}
}
