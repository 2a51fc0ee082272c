package bench

import (
	"math"
	"sort"
)

// Median is the middle value, the mean of the two middle ones for an even
// count; NaN for none.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := append([]float64(nil), v...)
	sort.Float64s(s)
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Spread is (max − min)/median: how noisy the repetitions were.
func Spread(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	lo, hi := v[0], v[0]
	for _, x := range v {
		lo, hi = math.Min(lo, x), math.Max(hi, x)
	}
	return (hi - lo) / Median(v)
}

// Stratum is one iteration that stands for Weight iterations of a long run.
type Stratum struct{ Iteration, Weight int }

// Strata picks at most k of n iterations, the middle one of each of k runs of
// neighbours. Cost changes smoothly over the iterations of a sample (more
// visible tokens, more predicted ones), so the middle stands for its run. With
// k <= 0 or k >= n every iteration is taken, with weight 1.
func Strata(n, k int) []Stratum {
	if k <= 0 || k > n {
		k = n
	}
	out := make([]Stratum, k)
	for i := range out {
		lo, hi := i*n/k, (i+1)*n/k
		out[i] = Stratum{(lo + hi - 1) / 2, hi - lo}
	}
	return out
}
