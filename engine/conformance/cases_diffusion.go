package conformance

import (
	"fmt"

	"margo/engine"
)

func embeddingCase(m, dim int, t gen, period float32, note string) *Case {
	return &Case{Name: fmt.Sprintf("timestep_embedding/f32/%dx%d period=%v %s", m, dim, period, note), Op: engine.OpTimestepEmbedding,
		build: func(e *env) work {
			e.gap = 1
			a := engine.TimestepEmbeddingArgs{T: e.in("T", engine.F32, t, m), Y: e.out("Y", engine.F32, m, dim), MaxPeriod: period}
			return work{cost: a.Cost(), run: func(s engine.Stream) error { return s.TimestepEmbedding(a) }}
		}}
}

// tokenIDs are n rows of (token, image), none twice.
func tokenIDs(e *env, n int) *engine.Tensor {
	v := make([]int32, 2*n)
	for i, id := range shuffled(e.random("ids"), n, 2*n) {
		v[2*i], v[2*i+1] = id%7*31, 1000+id/7
	}
	return e.ints("IDs", v, n, 2)
}

func normalCase(m, c int, rng engine.RNG, gap int) *Case {
	return &Case{Name: fmt.Sprintf("normal/f32/%dx%d seed=%d purpose=%d step=%d", m, c, rng.Seed, rng.Purpose, rng.Step), Op: engine.OpNormal,
		build: func(e *env) work {
			e.gap = gap
			rng := rng
			rng.Seed += uint64(e.rep)
			a := engine.NormalArgs{Y: e.out("Y", engine.F32, m, c), IDs: tokenIDs(e, m), RNG: rng}
			return work{cost: a.Cost(), n: m, run: func(s engine.Stream) error { return s.Normal(a) },
				part: func(s engine.Stream, lo, hi int) error {
					b := a
					b.Y, b.IDs = a.Y.RowsAt(lo, hi), a.IDs.RowsAt(lo, hi)
					return s.Normal(b)
				}}
		}}
}

// step is a case of DiffusionStep.
type step struct {
	n, c     int
	guidance bool
	drawn    bool // noise drawn, not given
	last     bool
	inPlace  bool
	cold     float32 // 1 − temperature
	gap      int
	nan      bool
	note     string
}

func (d step) cases() *Case {
	return &Case{Name: fmt.Sprintf("diffusion_step/f32/%dx%d guidance=%v drawn=%v last=%v in place=%v %s", d.n, d.c, d.guidance, d.drawn, d.last, d.inPlace, d.note),
		Op: engine.OpDiffusionStep, build: d.build}
}

func (d step) build(e *env) work {
	e.gap = d.gap
	rows := d.n
	if d.guidance {
		rows *= 2
	}
	out := bell(1)
	if d.nan {
		out = out.with(map[int]float32{1: nan, 3*d.c - 1: nan, 4 * d.c: inf})
	}
	a := engine.DiffusionStepArgs{Out: e.in("Out", engine.F32, out, rows, 2*d.c), Temperature: 1 - d.cold,
		RNG:  engine.RNG{Seed: 77, Purpose: engine.PurposeStepNoise, Step: 12},
		Coef: engine.StepCoef{Timestep: 500, A: 1.0137, B: 0.1643, MinLog: -4.3, MaxLog: -3.9, Last: d.last}}
	if d.inPlace {
		a.X = e.inout("X", engine.F32, bell(1), d.n, d.c)
		a.Y = a.X
	} else {
		a.X, a.Y = e.in("X", engine.F32, bell(1), d.n, d.c), e.out("Y", engine.F32, d.n, d.c)
	}
	if d.guidance {
		a.Guidance = e.in("Guidance", engine.F32, uniform(1, 4), d.n)
	}
	if d.drawn {
		a.IDs = tokenIDs(e, d.n)
	} else if !d.last {
		a.Noise = e.in("Noise", engine.F32, bell(1), d.n, d.c)
	}
	return work{cost: a.Cost(), run: func(s engine.Stream) error { return s.DiffusionStep(a) }}
}

func diffusionCases() (cs []*Case) {
	for _, s := range [][2]int{{0, 4}, {1, 2}, {5, 64}, {33, 256}, {3, 326}} {
		cs = append(cs, embeddingCase(s[0], s[1], uniform(0, 1000), 10000, ""))
	}
	cs = append(cs,
		embeddingCase(100, 256, integers(500).plus(500), 10000, "whole"),
		embeddingCase(4, 8, constant(0), 10000, "zero"),
		embeddingCase(9, 30, uniform(0, 100), 100, ""))

	for _, s := range [][2]int{{0, 4}, {1, 1}, {7, 3}, {33, 16}, {113, 17}, {9, 64}} {
		cs = append(cs, normalCase(s[0], s[1], engine.RNG{Seed: 1<<40 + 5, Purpose: engine.PurposeStepNoise, Step: 17}, s[1]&1*3))
	}
	cs = append(cs,
		normalCase(500, 16, engine.RNG{Purpose: engine.PurposeInitNoise}, 0),
		normalCase(6, 5, engine.RNG{Seed: 1<<64 - 99, Purpose: engine.PurposeLatent, Step: 1<<24 - 1}, 0))

	for i := 0; i < 16; i++ {
		cs = append(cs, step{n: 13, c: 16, guidance: i&1 != 0, drawn: i&2 != 0, last: i&4 != 0, inPlace: i&8 != 0}.cases())
	}
	for i, s := range [][2]int{{0, 4}, {1, 1}, {33, 7}, {113, 3}, {5, 64}} {
		cs = append(cs, step{n: s[0], c: s[1], guidance: i&1 != 0, drawn: i&1 == 0, gap: 5, note: "strided"}.cases())
	}
	cs = append(cs,
		step{n: 20, c: 16, guidance: true, drawn: true, cold: 0.25, note: "temperature 0.75"}.cases(),
		step{n: 20, c: 16, drawn: true, cold: 1, note: "temperature 0"}.cases(),
		step{n: 6, c: 16, guidance: true, nan: true, note: "nan"}.cases())
	return cs
}
