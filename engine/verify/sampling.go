package verify

import (
	"fmt"
	"slices"

	"margo/engine"
	"margo/engine/diffusion"
)

// loop is what a sampling trace records of one AR iteration.
type loop struct {
	s                          scene
	enc, z, zsel               data
	init, noise, steps, result data
	guidance                   float32
	rows                       []int // (sequence, position) rows that are predicted, guided pairs included
	n                          int   // tokens predicted
}

// settings of the recorded run.
type settings struct {
	iters, headSteps, images int
	cfg, temperature         float64
	schedule                 string
	proc                     *diffusion.Process
}

func (v *verifier) settings(err *error) settings {
	t := v.t
	s := settings{
		iters: int(t.number(err, "num_iter", 0)), images: int(t.number(err, "bsz", 0)),
		headSteps: int(t.number(err, "diffusion_steps", float64(v.model.MAR.NumSamplingSteps))),
		cfg:       t.number(err, "cfg", 1), temperature: t.number(err, "temperature", 1), schedule: t.Metadata()["cfg_schedule"],
	}
	for s.iters == 0 || t.has(key(s.iters, "tokens_in")) { // older traces do not say
		s.iters++
		if !t.has(key(s.iters, "tokens_in")) {
			break
		}
	}
	if *err == nil {
		s.proc, *err = diffusion.MAR(s.headSteps, diffusion.TrainSteps-1)
	}
	return s
}

func (v *verifier) loop(err *error, i int, st settings, orders [][]int) loop {
	cfg := v.model.MAR
	l := loop{s: v.scene(err, key(i, "tokens_in"), key(i, "mask"), key(i, "class_embedding")),
		enc: v.t.get(err, key(i, "enc_out"), 3), z: v.t.get(err, key(i, "dec_out_z"), 3), zsel: v.t.get(err, key(i, "z_selected"), 2),
		init: v.t.get(err, key(i, "init_noise"), 2), noise: v.t.get(err, key(i, "step_noise"), 3),
		steps: v.t.get(err, key(i, "step_samples"), 3), result: v.t.get(err, key(i, "sampled"), 2)}
	g := v.t.get(err, key(i, "cfg_iter"), -1)
	if *err != nil {
		return l
	}
	if len(g.v) != 1 {
		*err = v.t.unknown("tensor %s has %d values, expected 1", key(i, "cfg_iter"), len(g.v))
		return l
	}
	l.guidance = g.v[0]
	seqs := len(l.s.seqs)
	if seqs != len(orders) && seqs != 2*len(orders) {
		*err = v.t.unknown("tensor %s has %d sequences for %d images", key(i, "tokens_in"), seqs, len(orders))
		return l
	}
	l.rows = v.predicted(err, i, l.s, st, orders)
	rows := len(l.rows)
	l.n = rows * len(orders) / seqs
	v.t.is(err, key(i, "z_selected"), l.zsel, rows, cfg.DecoderEmbedDim)
	v.t.is(err, key(i, "init_noise"), l.init, l.n, cfg.TokenDim())
	v.t.is(err, key(i, "step_noise"), l.noise, st.headSteps, rows, cfg.TokenDim())
	v.t.is(err, key(i, "step_samples"), l.steps, st.headSteps, rows, cfg.TokenDim())
	v.t.is(err, key(i, "sampled"), l.result, rows, cfg.TokenDim())
	return l
}

// predicted lists the rows that iteration i predicts: masked now, and known in
// the next recorded state (all that is masked, in the last iteration).
func (v *verifier) predicted(err *error, i int, s scene, st settings, orders [][]int) []int {
	if i == st.iters-1 {
		return s.masked
	}
	l := v.model.MAR.Tokens()
	next := v.scene(err, key(i+1, "tokens_in"), key(i+1, "mask"), key(i+1, "class_embedding"))
	var out []int
	for _, r := range s.masked {
		if *err == nil && !slices.Contains(next.masked, r%(l*len(next.seqs))) {
			out = append(out, r)
		}
	}
	return out
}

// conditional keeps the rows of conditional sequences of a [steps, rows, C]
// record: with guidance the others are by-products that nobody uses.
func (l loop) conditional(d data) []float32 {
	ch := d.shape[len(d.shape)-1]
	rows := len(l.rows)
	var out []float32
	for at := 0; at < len(d.v); at += rows * ch {
		out = append(out, d.v[at:at+l.n*ch]...)
	}
	return out
}

// args prepares reverse steps from to of the iteration on a side, from state x.
func (l loop) args(s *side, st settings, x []float32, from, to int) engine.HeadStepsArgs {
	ch := l.init.shape[1]
	h := s.m.mar.Head
	steps := st.proc.Steps()[from:to]
	times := make([]float32, len(steps))
	for i, c := range steps {
		times[i] = float32(c.Timestep)
	}
	noise := l.conditional(l.noise)
	a := engine.HeadStepsArgs{
		X: s.c.F32(x, l.n, ch), Cond: h.Cond(s.c, s.upload(l.zsel, engine.F32)), Time: h.Time(s.c, s.c.F32(times, len(times))),
		Steps: steps, ExactStep: diffusion.ExactSteps(steps), Temperature: float32(st.temperature),
		Noise: s.c.F32(noise[from*l.n*ch:to*l.n*ch], (to-from)*l.n, ch),
	}
	if len(l.rows) != l.n {
		g := make([]float32, l.n)
		for i := range g {
			g[i] = l.guidance
		}
		a.Guidance = s.c.F32(g, l.n)
	}
	return a
}

// sampling compares every iteration of a recorded run stage by stage, then lets
// the whole loop run free.
func (v *verifier) sampling() error {
	var err error
	cfg := v.model.MAR
	st := v.settings(&err)
	flat := v.t.ints(&err, "orders", 2, cfg.Tokens())
	if err != nil {
		return err
	}
	if len(flat) == 0 || len(flat)%cfg.Tokens() != 0 {
		return v.t.unknown("tensor orders has %d values for %d tokens an image", len(flat), cfg.Tokens())
	}
	var orders [][]int
	for o := range slices.Chunk(flat, cfg.Tokens()) {
		orders = append(orders, o)
	}
	loops := make([]loop, st.iters)
	for i := range loops {
		if loops[i] = v.loop(&err, i, st, orders); err != nil {
			return err
		}
		if err := v.all(v.iteration(i, loops[i], st)); err != nil {
			return err
		}
	}
	free, err := v.freeRun(st, orders, loops)
	if err != nil {
		return err
	}
	return v.all([]check{free})
}

// iteration lists the stages of one AR iteration.
func (v *verifier) iteration(i int, l loop, st settings) []check {
	ch := l.init.shape[1]
	name := fmt.Sprintf("iteration %d: ", i)
	samples := l.conditional(l.steps)
	at := func(k int) []float32 { return samples[k*l.n*ch : (k+1)*l.n*ch] }
	checks := v.trunkStages(name, l.s, l.enc, l.z, l.rows)
	checks = append(checks, check{names: []string{name + "head steps, one by one"}, goldens: [][]float32{samples},
		run: func(s *side) [][]float64 {
			var out []float64
			for k := range st.headSteps {
				x := l.init.v
				if k > 0 {
					x = at(k - 1)
				}
				s.c.Scoped(func() {
					a := l.args(s, st, x, k, k+1)
					s.m.mar.Head.Steps(s.c, a)
					out = append(out, s.read(a.X)...)
				})
			}
			return [][]float64{out}
		}})
	loop := one(name+"head loop", l.conditional(l.result), func(s *side) *engine.Tensor {
		a := l.args(s, st, l.init.v, 0, st.headSteps)
		s.m.mar.Head.Steps(s.c, a)
		return a.X
	})
	loop.free = true
	return append(checks, loop)
}
