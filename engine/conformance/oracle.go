package conformance

import (
	"fmt"
	"math"
	"sync"

	"margo/engine"
	"margo/engine/ref"
)

// expected is what the oracle says about one output.
type expected struct {
	exact   []float64
	rounded []float64
	limit   float64
	bias    float64 // limit of what bias says; 0 without one
	apart   float64 // twice the distance of rounded from exact: what limit allows beyond the output's rounding
}

const (
	samples = 4096 // elements that a limit comes from, at least
	repeats = 16   // but no more repetitions than this
)

// oracles remembers what the oracle said: the same for every device.
var oracles sync.Map // case name → map[string]*expected

// oracle computes the case with both modes of ref.
func (c *Case) oracle() map[string]*expected {
	if v, ok := oracles.Load(c.Name); ok {
		return v.(map[string]*expected)
	}
	want := map[string]*expected{}
	for rep, reps := 0, 1; rep < reps; rep++ {
		exact, elems := c.compute(ref.Exact, rep)
		rounded, _ := c.compute(ref.Rounded, rep)
		for name, x := range exact {
			if rep == 0 {
				want[name] = &expected{exact: x.v, rounded: rounded[name].v}
			}
			w := want[name]
			apart := 2 * distance(x.v, rounded[name].v)
			w.apart = max(w.apart, apart)
			w.limit = max(w.limit, apart+largest(x.v)*unit(x.d))
			if x.d == engine.BF16 && len(x.v) >= 1000 {
				w.bias = 1.0/2048 + 2*math.Abs(bias(rounded[name].v, x.v))
			}
		}
		if rep == 0 && !c.exact && elems > 0 {
			reps = min(max(samples/elems, 1), repeats)
		}
	}
	oracles.Store(c.Name, want)
	return want
}

type output struct {
	d engine.DType
	v []float64
}

// compute runs the case on an oracle; elems is the size of its smallest output.
func (c *Case) compute(mode ref.Mode, rep int) (out map[string]output, elems int) {
	dev := ref.New(mode)
	e := newEnv(dev, c, rep)
	e.exact = mode == ref.Exact
	defer e.close()
	w := c.build(e)
	e.upload()
	check(w.run(e.s))
	out = map[string]output{}
	for _, a := range e.args {
		if a.output {
			v := e.values(a, nil)
			out[a.name] = output{a.t.DType, v}
			if elems == 0 || len(v) < elems {
				elems = len(v)
			}
		}
	}
	return out, elems
}

// unit is the largest relative error of one rounding.
func unit(d engine.DType) float64 {
	if d == engine.BF16 {
		return 1.0 / 512
	}
	return 1.0 / (1 << 24)
}

func finite(v float64) bool { return v-v == 0 }

// distance is the largest difference where both are finite.
func distance(a, b []float64) (d float64) {
	for i, v := range a {
		if finite(v) && finite(b[i]) {
			d = max(d, math.Abs(v-b[i]))
		}
	}
	return d
}

func largest(a []float64) (m float64) {
	for _, v := range a {
		if finite(v) {
			m = max(m, math.Abs(v))
		}
	}
	return m
}

// bias is the error away from zero, relative to the numbers' size as a whole: a mean
// of relative errors would hang on the few numbers that are nearly zero.
func bias(got, want []float64) float64 {
	sum, size := 0.0, 0.0
	for i, w := range want {
		if finite(w) && finite(got[i]) {
			sum += math.Copysign(1, w) * (got[i] - w)
			size += math.Abs(w)
		}
	}
	if size == 0 {
		return 0
	}
	return sum / size
}

// pattern tells NaN and the infinities apart from numbers.
func pattern(v float64) int {
	switch {
	case v != v:
		return 1
	case math.IsInf(v, 1):
		return 2
	case math.IsInf(v, -1):
		return 3
	}
	return 0
}

// on is the same for a device. The oracle rounds every sum to nearest, with an error
// of at most half a unit in the last place; a device that truncates errs by up to a
// whole one, so twice as much is allowed of what sums can contribute.
func (w *expected) on(dev engine.Device, c *Case) *expected {
	if c.DType != engine.BF16 || !dev.Info().Truncates {
		return w
	}
	v := *w
	v.limit += v.apart
	return &v
}

// compare judges an output. The mode says which rule was broken.
func (w *expected) compare(name string, cols int, got []float64, exact bool) (mode Mode, worst float64, err error) {
	at, biased := 0, 0.0
	for i, g := range got {
		if want := w.rounded[i]; pattern(g) != pattern(want) {
			return NaN, 0, fmt.Errorf("%s(%d,%d) is %v, want %v", name, i/cols, i%cols, g, want)
		} else if exact && g != want && g == g {
			return Exact, 0, fmt.Errorf("%s(%d,%d) is %v, want exactly %v", name, i/cols, i%cols, g, want)
		}
		if d := math.Abs(g - w.exact[i]); finite(g) && finite(w.exact[i]) && d > worst {
			worst, at = d, i
		}
	}
	if exact {
		return Exact, 0, nil
	}
	if worst > w.limit {
		return Oracle, worst, fmt.Errorf("%s(%d,%d) is %.9g, want %.9g: off by %.3g, limit %.3g",
			name, at/cols, at%cols, got[at], w.exact[at], worst, w.limit)
	}
	if w.bias > 0 {
		if biased = bias(got, w.exact); math.Abs(biased) > w.bias {
			return Oracle, worst, fmt.Errorf("%s is biased by %.3g of each number, limit %.3g: not rounded to nearest", name, biased, w.bias)
		}
	}
	return Oracle, worst, nil
}
