package ref

import (
	"cmp"
	"math"
	"slices"

	"margo/engine"
)

// Categorical draws a category per row in float64, whatever the mode: see
// engine.CategoricalArgs, whose formulas this follows line by line.
func (s *stream[F]) Categorical(a engine.CategoricalArgs) error {
	return s.do(engine.OpCategorical, a.Check(), func() {
		logits, guidance := load[float64](s.dev, a.Logits), load[float64](s.dev, a.Guidance)
		ids := ints(s.dev, "IDs", a.IDs, -1<<31, 1<<31)
		n, k := a.Y.Elems(), a.Logits.Cols()
		y, logProb := make([]float64, n), make([]float64, n)
		for r := range n {
			l := slices.Clone(logits[r*k : (r+1)*k])
			for j := range l {
				if guidance != nil {
					u := logits[(n+r)*k+j]
					l[j] = u + guidance[r]*(l[j]-u)
				}
			}
			c := drawing{a: &a}
			if ids != nil {
				c.token, c.image = ids[2*r], ids[2*r+1]
			}
			best, ok := c.draw(l)
			y[r], logProb[r] = float64(r*a.Stride+best), math.NaN()
			if ok {
				logProb[r] = l[best] - logSumExp(l)
			}
		}
		store(s.dev, a.Y, 0, y)
		if a.LogProb != nil {
			store(s.dev, a.LogProb, 0, logProb)
		}
	})
}

func logSumExp(l []float64) float64 {
	top, sum := slices.Max(l), 0.0
	for _, v := range l {
		sum += math.Exp(v - top)
	}
	return top + math.Log(sum)
}

// drawing is one row of Categorical.
type drawing struct {
	a            *engine.CategoricalArgs
	token, image int
}

func (d drawing) uniform(element int) float64 {
	r := d.a.RNG
	w := engine.Philox(engine.Counter(r.Purpose, r.Step, element, d.token, d.image), r.Seed)
	return engine.Uniform(w[element%4])
}

// draw picks a category of logits l; not ok if they are no distribution.
func (d drawing) draw(l []float64) (best int, ok bool) {
	for _, v := range l {
		if v != v || math.IsInf(v, 1) {
			return 0, false
		}
	}
	if math.IsInf(slices.Max(l), -1) {
		return 0, false
	}
	t := float64(d.a.Temperature)
	if t == 0 {
		return slices.Index(l, slices.Max(l)), true
	}
	scaled := make([]float64, len(l))
	for k, v := range l {
		scaled[k] = v / t
	}
	least, top := d.least(scaled), slices.Max(scaled)
	if d.a.Method == engine.Gumbel {
		most := math.Inf(-1)
		for k, v := range scaled {
			if v < least || math.IsInf(v, -1) {
				continue
			}
			if g := v - math.Log(-math.Log(d.uniform(k))); g > most {
				best, most = k, g
			}
		}
		return best, true
	}
	sums := make([]float64, len(l)) // cumulative
	sum := 0.0
	for k, v := range scaled {
		if v >= least {
			sum += math.Exp(v - top)
		}
		sums[k] = sum
	}
	u := d.uniform(0) * sum
	return slices.IndexFunc(sums, func(c float64) bool { return c > u }), true
}

// least is the smallest scaled logit that TopK and TopP let stay.
func (d drawing) least(scaled []float64) float64 {
	v := slices.Clone(scaled)
	slices.SortFunc(v, func(a, b float64) int { return cmp.Compare(b, a) })
	least := v[len(v)-1]
	if k := d.a.TopK; k > 0 && k < len(v) {
		least = v[k-1]
	}
	if d.a.TopP == 1 {
		return least
	}
	sum := 0.0
	for _, x := range v {
		if x >= least {
			sum += math.Exp(x - v[0])
		}
	}
	likelier, group := 0.0, 0.0 // of all that are larger than x; of those equal to it
	for i, x := range v {
		if i > 0 && x < v[i-1] {
			likelier, group = likelier+group, 0
			if x < least || likelier >= float64(d.a.TopP)*sum {
				return v[i-1]
			}
		}
		group += math.Exp(x - v[0])
	}
	return least
}
