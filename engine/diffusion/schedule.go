package diffusion

import (
	"math"
	"strconv"
	"strings"

	"margo/engine"
)

// TrainSteps is the number of timesteps that MAR and DiT are trained with.
const TrainSteps = 1000

// Cosine returns the betas of the cosine schedule of improved DDPM over n steps:
// β_i = min(1 − ᾱ((i+1)/n)/ᾱ(i/n), 0.999), ᾱ(t) = cos²((t+0.008)/1.008·π/2)
// (gaussian_diffusion.py betas_for_alpha_bar; P13).
func Cosine(n int) []float64 {
	bar := func(t float64) float64 {
		c := math.Cos((t + 0.008) / 1.008 * math.Pi / 2)
		return c * c
	}
	b := make([]float64, n)
	for i := range b {
		t1, t2 := float64(i)/float64(n), float64(i+1)/float64(n)
		b[i] = math.Min(1-bar(t2)/bar(t1), 0.999)
	}
	return b
}

// Linear returns betas evenly spaced from 1e-4·1000/n to 0.02·1000/n (DDPM's
// schedule at n = 1000; DiT's default).
func Linear(n int) []float64 {
	scale := 1000 / float64(n)
	lo, hi := scale*0.0001, scale*0.02
	b := make([]float64, n)
	step := (hi - lo) / float64(max(n-1, 1))
	for i := range b {
		b[i] = float64(i)*step + lo
	}
	if n > 1 {
		b[n-1] = hi // as numpy.linspace
	}
	return b
}

// Respace picks timesteps of 0 … n-1, ascending. spec is "" (all), a count, a
// comma list of counts for sections of equal size, or "ddimN" for a fixed
// integer stride that gives exactly N (respace.py space_timesteps). Within a
// section of size s, count k, the picks are the running sums of (s−1)/(k−1),
// rounded half to even.
func Respace(n int, spec string) ([]int, error) {
	if spec == "" {
		spec = strconv.Itoa(n)
	}
	bad := func(format string, a ...any) ([]int, error) {
		return nil, engine.Errorf("respace "+strconv.Quote(spec), engine.Invalid, format, a...)
	}
	if k, ok := strings.CutPrefix(spec, "ddim"); ok {
		want, err := strconv.Atoi(k)
		if err != nil || want < 1 {
			return bad("%q is not a count", k)
		}
		for stride := 1; stride < n; stride++ {
			if (n+stride-1)/stride == want {
				var t []int
				for i := 0; i < n; i += stride {
					t = append(t, i)
				}
				return t, nil
			}
		}
		return bad("no integer stride gives %d of %d steps", want, n)
	}
	sections := strings.Split(spec, ",")
	size, extra := n/len(sections), n%len(sections)
	var out []int
	start := 0
	for i, s := range sections {
		count, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || count < 0 {
			return bad("%q is not a count", s)
		}
		sz := size
		if i < extra {
			sz++
		}
		if count > sz {
			return bad("%d steps do not fit in a section of %d", count, sz)
		}
		stride := 1.0
		if count > 1 {
			stride = float64(sz-1) / float64(count-1)
		}
		at := 0.0
		for range count {
			out = append(out, start+int(math.RoundToEven(at)))
			at += stride
		}
		start += sz
	}
	return out, nil
}

// Spaced picks steps timesteps from 0 to last: round(i·last/(steps−1)), half to
// even. With last = n−1 that is Respace(n, steps), in every bit. A smaller last
// starts the reverse process below pure noise, where an error of ε is amplified
// less (DiSA; field.md issues #36, #76, #80).
func Spaced(n, steps, last int) ([]int, error) {
	op := "timesteps"
	switch {
	case last < 1 || last > n-1:
		return nil, engine.Errorf(op, engine.Invalid, "the largest timestep is 1 to %d, not %d", n-1, last)
	case steps < 2 || steps > last+1:
		return nil, engine.Errorf(op, engine.Invalid, "2 to %d steps fit in timesteps 0 to %d, not %d", last+1, last, steps)
	case last == n-1:
		return Respace(n, strconv.Itoa(steps))
	}
	t := make([]int, steps)
	for i := range t {
		t[i] = int(math.RoundToEven(float64(i*last) / float64(steps-1)))
	}
	return t, nil
}
