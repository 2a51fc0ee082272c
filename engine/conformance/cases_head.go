package conformance

import (
	"fmt"
	"math"

	"margo/engine"
)

// headCase is a case of HeadSteps. Steps are few and mild: errors are amplified
// from step to step, and the oracle's own limit must stay small.
type headCase struct {
	n, c, w, blocks, steps int
	d                      engine.DType
	guidance               bool
	exactFirst             int // leading steps in F32
	given                  bool
	trace                  bool
	cold                   float32
	amplify                bool // the first step multiplies errors, as cosine schedules do
	gap                    int
	unpacked               bool
	fp8                    bool // blocks' weights are e4m3 numbers, which a device may keep as such
	scratch                int
	nan                    bool
	bench, large, huge     bool
	note                   string
}

func (h headCase) cases() *Case {
	name := fmt.Sprintf("head_steps/%v/n=%d c=%d w=%d d=%d t=%d", h.d, h.n, h.c, h.w, h.blocks, h.steps)
	if h.guidance {
		name += " guidance"
	}
	if h.exactFirst > 0 {
		name += fmt.Sprintf(" exact=%d", h.exactFirst)
	}
	if h.given {
		name += " noise given"
	}
	if h.trace {
		name += " trace"
	}
	if h.fp8 {
		name += " fp8"
	}
	if h.note != "" {
		name += " " + h.note
	}
	return &Case{Name: name, Op: engine.OpHeadSteps, DType: h.d, Bench: h.bench || h.large, Large: h.large, Huge: h.huge, build: h.build}
}

func (h headCase) build(e *env) work {
	r := h.n
	if h.guidance {
		r *= 2
	}
	w := h.weights(e, "", h.d)
	e.gap = h.gap
	a := engine.HeadStepsArgs{
		Cond: e.in("Cond", engine.F32, bell(1), r, h.w), Time: e.in("Time", engine.F32, bell(1), h.steps, h.w),
		Weights: w, Exact: w, Temperature: 1 - h.cold, Scratch: h.scratch,
		RNG: engine.RNG{Seed: 4711, Purpose: engine.PurposeStepNoise, Step: 300},
	}
	x := bell(1)
	if h.nan {
		x = x.with(map[int]float32{h.c + 1: nan})
	}
	a.X = e.inout("X", engine.F32, x, h.n, h.c)
	if h.exactFirst > 0 && h.d != engine.F32 {
		e.gap = 0
		a.Exact = h.weights(e, "Exact.", engine.F32)
		e.gap = h.gap
	}
	for i := 0; i < h.steps; i++ {
		c := engine.StepCoef{Timestep: 900 - 100*i, A: 1.02 + 0.01*float64(i), B: 0.2, MinLog: -3, MaxLog: -2.5, Last: i == h.steps-1}
		if h.amplify && i == 0 {
			c.A, c.B = 3.2, 3.1
		}
		a.Steps = append(a.Steps, c)
	}
	if h.exactFirst > 0 {
		a.ExactStep = make([]bool, h.steps)
		for i := 0; i < h.exactFirst; i++ {
			a.ExactStep[i] = true
		}
	}
	if h.guidance {
		a.Guidance = e.in("Guidance", engine.F32, uniform(1, 2.5), h.n)
	}
	a.IDs = tokenIDs(e, h.n)
	if h.given {
		a.IDs = nil
		a.Noise = e.in("Noise", engine.F32, bell(1), h.steps*h.n, h.c)
	}
	if h.trace {
		a.Trace = e.out("Trace", engine.F32, h.steps*h.n, h.c)
	}
	out := work{cost: a.Cost(), n: h.n, run: func(s engine.Stream) error { return s.HeadSteps(a) }}
	if h.given || h.trace {
		return out // their rows of some tokens are not together
	}
	cond := e.scratch(engine.F32, r, h.w)
	out.part = func(s engine.Stream, lo, hi int) error {
		b, m := a, hi-lo
		b.X, b.IDs = a.X.RowsAt(lo, hi), a.IDs.RowsAt(lo, hi)
		b.Cond = a.Cond.RowsAt(lo, hi)
		if h.guidance {
			b.Guidance = a.Guidance.Slice(lo, hi).Reshape(m)
			b.Cond = cond.RowsAt(0, 2*m)
			if err := s.Copy(b.Cond.RowsAt(0, m), a.Cond.RowsAt(lo, hi)); err != nil {
				return err
			}
			if err := s.Copy(b.Cond.RowsAt(m, 2*m), a.Cond.RowsAt(h.n+lo, h.n+hi)); err != nil {
				return err
			}
		}
		return s.HeadSteps(b)
	}
	return out
}

// weights are random, the same values in every dtype. Modulations are small
// enough that blocks neither vanish nor explode.
func (h headCase) weights(e *env, prefix string, d engine.DType) *engine.HeadWeights {
	layer := func(name string, d engine.DType, fp8 bool, n, k int, sigma float64) engine.Matrix {
		g := bell(sigma / math.Sqrt(float64(k)))
		if h.d == engine.BF16 {
			g = g.toBF16()
		}
		m := engine.Matrix{Bias: e.in(prefix+name+".Bias", engine.F32, bell(0.1), n)}
		if h.unpacked {
			m.W = e.in(prefix+name, d, g, n, k)
		} else {
			m.W, m.Packed = e.packedAs(prefix+name, d, d, fp8, g, n, k)
		}
		return m
	}
	linear := func(name string, d engine.DType, n, k int, sigma float64) engine.Matrix {
		return layer(name, d, false, n, k, sigma)
	}
	fp8 := h.fp8 && d == engine.BF16
	out := &engine.HeadWeights{Eps: 1e-6,
		Input: linear("Input", engine.F32, h.w, h.c, 1),
		Ada:   linear("Ada", d, (3*h.blocks+2)*h.w, h.w, 0.5),
		Final: linear("Final", engine.F32, 2*h.c, h.w, 1),
	}
	for i := 0; i < h.blocks; i++ {
		name := fmt.Sprintf("Blocks[%d].", i)
		out.Blocks = append(out.Blocks, engine.HeadBlock{
			NormWeight: e.in(prefix+name+"NormWeight", engine.F32, bell(0.2).plus(1), h.w),
			NormBias:   e.in(prefix+name+"NormBias", engine.F32, bell(0.2), h.w),
			Fc1:        layer(name+"Fc1", d, fp8, h.w, h.w, 1),
			Fc2:        layer(name+"Fc2", d, fp8, h.w, h.w, 1),
		})
	}
	return out
}

func headCases() (cs []*Case) {
	add := func(h headCase) { cs = append(cs, h.cases()) }
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		base := headCase{n: 5, c: 16, w: 64, blocks: 2, steps: 3, d: d}
		for i := 0; i < 8; i++ {
			h := base
			h.guidance, h.given, h.trace = i&1 != 0, i&2 != 0, i&4 != 0
			add(h)
		}
		for _, s := range [][5]int{{0, 4, 32, 1, 2}, {1, 1, 32, 1, 1}, {3, 3, 7, 2, 2}, {33, 7, 96, 1, 2}, {1, 16, 128, 3, 4}, {40, 16, 64, 2, 2},
			{2, 64, 72, 1, 2}, {9, 4, 33, 0, 2}, {13, 16, 160, 1, 2}, {4, 16, 64, 1, 0}} {
			for _, g := range []bool{false, true} {
				add(headCase{n: s[0], c: s[1], w: s[2], blocks: s[3], steps: s[4], d: d, guidance: g})
			}
		}
		strided, cold, small, un, poisoned := base, base, base, base, base
		strided.gap, strided.guidance, strided.trace, strided.given, strided.note = 3, true, true, true, "strided"
		cold.cold, cold.guidance, cold.note = 0.3, true, "temperature 0.7"
		small.scratch, small.n, small.guidance, small.steps, small.note = 4096, 11, true, 5, "little scratch"
		un.unpacked, un.guidance, un.note = true, true, "unpacked"
		poisoned.nan, poisoned.guidance, poisoned.note = true, true, "nan"
		for _, h := range []headCase{strided, cold, small, un, poisoned} {
			add(h)
		}
		for _, g := range []bool{false, true} {
			h := base
			h.guidance, h.exactFirst, h.amplify, h.note = g, 1, true, "amplified"
			add(h)
			h.amplify, h.exactFirst, h.note = false, 3, "all exact"
			add(h)
		}
		if d == engine.BF16 {
			for _, h := range []headCase{{n: 5, c: 16, w: 64, blocks: 2, steps: 3}, {n: 5, c: 16, w: 64, blocks: 2, steps: 3, guidance: true, given: true, trace: true},
				{n: 3, c: 4, w: 48, blocks: 3, steps: 3, guidance: true, exactFirst: 1}, {n: 1, c: 16, w: 128, blocks: 1, steps: 2, guidance: true},
				{n: 9, c: 7, w: 33, blocks: 1, steps: 2, guidance: true}} {
				h.d, h.fp8 = d, true
				add(h)
			}
		}
		add(headCase{n: 4, c: 16, w: 1024, blocks: 1, steps: 2, d: d, guidance: true, bench: true, note: "MAR-B width"})
		for _, n := range []int{1, 4, 16, 64} {
			add(headCase{n: n, c: 16, w: 1024, blocks: 6, steps: 10, d: d, guidance: true, exactFirst: 1, large: true, note: "MAR-B"})
		}
		for _, n := range []int{4, 256, 1024} {
			add(headCase{n: n, c: 16, w: 1024, blocks: 6, steps: 100, d: d, guidance: true, large: true, huge: true, note: "MAR-B"})
		}
	}
	return cs
}
