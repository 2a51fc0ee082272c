package verify

import (
	"fmt"
	"math"
	"slices"

	"margo/engine"
	"margo/engine/diffusion"
	"margo/engine/sample"
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
	iters, headSteps int
	cfg, temperature float64
	schedule         string
	proc             *diffusion.Process
	orders           [][]int
}

// settings reads metadata and orders. The number of iterations is that of the
// recorded ones: metadata may only confirm it.
func (v *verifier) settings(err *error) settings {
	t, l := v.t, v.model.MAR.Tokens()
	s := settings{cfg: t.number(err, "cfg", 1, -1e6, 1e6), temperature: t.number(err, "temperature", 1, 0, 1e6),
		schedule: sample.Linear, proc: v.process(err)}
	if text, ok := t.Metadata()["cfg_schedule"]; ok && *err == nil {
		if s.schedule = text; text != sample.Linear && text != sample.Constant {
			*err = t.unknown("metadata cfg_schedule is %q, expected %s or %s", text, sample.Linear, sample.Constant)
		}
	}
	for t.has(key(s.iters, "tokens_in")) {
		s.iters++
	}
	if n := t.number(err, "num_iter", float64(s.iters), 1, math.MaxInt32); *err == nil && n != float64(s.iters) {
		*err = t.unknown("metadata num_iter is %g, but the trace records %d iterations (iter0.tokens_in and on)", n, s.iters)
	}
	orders := t.get(err, "orders", 2)
	flat := t.ints(err, "orders", 2, l)
	if *err != nil {
		return s
	}
	s.headSteps = s.proc.Len()
	images := orders.shape[0]
	if t.is(err, "orders", orders, images, l); *err == nil && images == 0 {
		*err = t.unknown("tensor orders has no images")
	}
	if n := t.number(err, "bsz", float64(images), 1, math.MaxInt32); *err == nil && n != float64(images) {
		*err = t.unknown("metadata bsz is %g, but the tensor orders has %d images", n, images)
	}
	if *err != nil {
		return s
	}
	for o := range slices.Chunk(flat, l) {
		seen := make([]bool, l)
		for _, p := range o {
			if seen[p] {
				*err = t.unknown("tensor orders: image %d has position %d twice", len(s.orders), p)
				return s
			}
			seen[p] = true
		}
		s.orders = append(s.orders, o)
	}
	return s
}

// scenes reads the state at the beginning of every iteration: as many sequences
// as images, and without guidance (CFG 1) no more.
func (v *verifier) scenes(err *error, st settings) []scene {
	want := len(st.orders)
	if st.cfg != 1 {
		want *= 2
	}
	var out []scene
	for i := range st.iters {
		s := v.scene(err, key(i, "tokens_in"), key(i, "mask"), key(i, "class_embedding"))
		if *err == nil && len(s.seqs) != want {
			*err = v.t.unknown("tensor %s has %d sequences; %d images (tensor orders) at cfg %g (metadata) need %d",
				key(i, "tokens_in"), len(s.seqs), len(st.orders), st.cfg, want)
		}
		if *err != nil {
			return nil
		}
		out = append(out, s)
	}
	return out
}

func (v *verifier) loop(err *error, i int, st settings, scenes []scene) loop {
	cfg := v.model.MAR
	l := loop{s: scenes[i], zsel: v.t.get(err, key(i, "z_selected"), 2),
		init: v.t.get(err, key(i, "init_noise"), 2), noise: v.t.get(err, key(i, "step_noise"), 3),
		steps: v.t.get(err, key(i, "step_samples"), 3), result: v.t.get(err, key(i, "sampled"), 2)}
	l.enc, l.z = v.recorded(err, l.s, key(i, "enc_out"), key(i, "dec_out_z"))
	g := v.t.get(err, key(i, "cfg_iter"), -1)
	if *err != nil {
		return l
	}
	if len(g.v) != 1 {
		*err = v.t.unknown("tensor %s has %d values, expected 1", key(i, "cfg_iter"), len(g.v))
		return l
	}
	l.guidance = g.v[0]
	l.rows = v.predicted(err, i, st, scenes)
	rows := len(l.rows)
	l.n = rows * len(st.orders) / len(l.s.seqs)
	v.t.is(err, key(i, "z_selected"), l.zsel, rows, cfg.DecoderEmbedDim)
	v.t.is(err, key(i, "init_noise"), l.init, l.n, cfg.TokenDim())
	v.t.is(err, key(i, "step_noise"), l.noise, st.headSteps, rows, cfg.TokenDim())
	v.t.is(err, key(i, "step_samples"), l.steps, st.headSteps, rows, cfg.TokenDim())
	v.t.is(err, key(i, "sampled"), l.result, rows, cfg.TokenDim())
	return l
}

// predicted lists the rows that iteration i predicts: masked now, and known in
// the next recorded state (all that is masked, in the last iteration). With
// guidance the second half of the sequences predicts what the first does.
func (v *verifier) predicted(err *error, i int, st settings, scenes []scene) []int {
	s := scenes[i]
	rows := s.masked
	if i < st.iters-1 {
		rows = nil
		for _, r := range s.masked {
			if _, masked := slices.BinarySearch(scenes[i+1].masked, r); !masked {
				rows = append(rows, r)
			}
		}
	}
	if half := len(st.orders) * v.model.MAR.Tokens(); len(s.seqs) > len(st.orders) {
		n := len(rows) / 2
		paired := len(rows)%2 == 0
		for k := 0; k < n && paired; k++ {
			paired = rows[n+k] == rows[k]+half
		}
		if !paired && *err == nil {
			*err = v.t.unknown("tensor %s: the guided pairs do not predict the same tokens", s.mask)
		}
	}
	return rows
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
	st := v.settings(&err)
	if err != nil {
		return err
	}
	scenes := v.scenes(&err, st)
	if err != nil {
		return err
	}
	loops := make([]loop, st.iters) // all are read first: nothing is computed from a bad trace
	for i := range loops {
		if loops[i] = v.loop(&err, i, st, scenes); err != nil {
			return err
		}
	}
	free, err := v.freeRun(st, loops)
	if err != nil {
		return err
	}
	for i, l := range loops {
		if err := v.all(v.iteration(i, l, st)); err != nil {
			return err
		}
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
	if l.n == 0 { // more iterations than tokens
		return checks
	}
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
