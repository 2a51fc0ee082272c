package conformance

import (
	"fmt"

	"margo/engine"
)

// categorical is a case of Categorical. No row of any case has two candidates
// within rounding (TestCategoricalMargins), so indices are compared exactly.
type categorical struct {
	n, k        int
	temperature float32
	topK        int
	topP        float32 // 0: 1
	method      engine.CategoricalMethod
	guidance    bool
	stride      int
	noProb      bool
	ties        bool // logits are whole numbers of few values
	special     bool // NaN, infinities and rows without a number
	gap         int
	bench       bool
	note        string
}

func (c categorical) cases() *Case {
	method := "gumbel"
	if c.method == engine.InverseTransform {
		method = "inverse"
	}
	name := fmt.Sprintf("categorical/f32/%dx%d %s temperature=%v top-k=%d top-p=%v guidance=%v", c.n, c.k, method, c.temperature, c.topK, c.p(), c.guidance)
	if c.note != "" {
		name += " " + c.note
	}
	return &Case{Name: name, Op: engine.OpCategorical, Bench: c.bench, build: c.build}
}

func (c categorical) p() float32 {
	if c.topP == 0 {
		return 1
	}
	return c.topP
}

func (c categorical) build(e *env) work {
	rows := c.n
	if c.guidance {
		rows *= 2
	}
	g := bell(2)
	if c.ties {
		g = integers(2)
	}
	if c.special { // rows: NaN; +Inf; nothing but −Inf; a few −Inf
		at := map[int]float32{3: nan, c.k + 1: inf}
		for j := range c.k {
			at[2*c.k+j] = -inf
			if j%3 != 1 {
				at[3*c.k+j] = -inf
			}
		}
		g = g.with(at)
	}
	e.gap = c.gap
	a := engine.CategoricalArgs{Logits: e.in("Logits", engine.F32, g, rows, c.k), Temperature: c.temperature, TopK: c.topK, TopP: c.p(),
		Method: c.method, Stride: c.stride, IDs: tokenIDs(e, c.n),
		RNG: engine.RNG{Seed: 1<<40 + 9 + uint64(e.rep), Purpose: engine.PurposeCategory, Step: 3}}
	if c.guidance {
		a.Guidance = e.in("Guidance", engine.F32, uniform(1, 4), c.n)
	}
	a.Y = e.out("Y", engine.I32, c.n)
	if !c.noProb {
		a.LogProb = e.out("LogProb", engine.F32, c.n)
	}
	w := work{cost: a.Cost(), run: func(s engine.Stream) error { return s.Categorical(a) }}
	if !c.guidance && c.stride == 0 {
		w.n = c.n
		w.part = func(s engine.Stream, lo, hi int) error {
			b := a
			b.Logits, b.IDs, b.Y = a.Logits.RowsAt(lo, hi), a.IDs.RowsAt(lo, hi), a.Y.Slice(lo, hi)
			if a.LogProb != nil {
				b.LogProb = a.LogProb.Slice(lo, hi)
			}
			return s.Categorical(b)
		}
	}
	return w
}

func categoricalCases() (cs []*Case) {
	add := func(c categorical) { cs = append(cs, c.cases()) }
	for _, m := range []engine.CategoricalMethod{engine.Gumbel, engine.InverseTransform} {
		for _, s := range [][2]int{{0, 4}, {1, 1}, {7, 3}, {33, 10}, {113, 203}, {5, 1030}} {
			add(categorical{n: s[0], k: s[1], temperature: 1, method: m, gap: s[1] & 1 * 3})
		}
		add(categorical{n: 200, k: 33, temperature: 0.7, method: m, guidance: true})
		add(categorical{n: 200, k: 33, temperature: 1.5, topK: 5, method: m})
		add(categorical{n: 200, k: 33, temperature: 1, topK: 1, method: m})
		add(categorical{n: 200, k: 33, temperature: 1, topP: 0.8, method: m})
		add(categorical{n: 200, k: 33, temperature: 1, topP: 1e-6, method: m})
		add(categorical{n: 200, k: 33, temperature: 2, topK: 20, topP: 0.6, method: m, guidance: true})
		add(categorical{n: 200, k: 33, temperature: 1, topK: 4, topP: 0.9, method: m, ties: true, note: "ties"})
		add(categorical{n: 50, k: 17, temperature: 1, stride: 17, method: m, noProb: true, note: "stride"})
		add(categorical{n: 9, k: 12, temperature: 1, topK: 6, method: m, special: true, note: "special"})
		add(categorical{n: 64, k: 16384, temperature: 1, method: m, bench: true, note: "VQ-16"})
	}
	add(categorical{n: 60, k: 40, temperature: 0, note: "greedy"})
	add(categorical{n: 60, k: 40, temperature: 0, guidance: true, ties: true, note: "greedy with ties"})
	return cs
}
