package diffusion

import (
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
)

// Every table of the authors' create_diffusion. Sums and products are the same,
// operation by operation; what remains is the last bit of cos, which 1 − ᾱ/ᾱ
// magnifies where β is small.
func TestTables(t *testing.T) {
	cosine := func(spec string) (*Process, error) {
		n, err := strconv.Atoi(spec)
		if err != nil {
			return nil, err
		}
		return MAR(n, TrainSteps-1)
	}
	compare(t, "mar_diffusion_tables", "cosine_", cosine, "10", "25", "50", "100", "250", "1000")
	compare(t, "dit_diffusion_tables", "linear_", DiT, "10", "50", "250", "ddim10", "ddim50", "1000")
}

// compare holds the processes of specs against the tables of a golden.
func compare(t *testing.T, file, schedule string, process func(spec string) (*Process, error), specs ...string) {
	f, err := checkpoint.Open("../../testdata/goldens/"+file+".safetensors", checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, spec := range specs {
		p, err := process(spec)
		if err != nil {
			t.Fatal(err)
		}
		n := p.Len()
		prefix := schedule + spec + "."
		if n == TrainSteps {
			prefix = schedule + "full1000."
		}
		steps := make([]int64, n)
		if err := f.ReadI64(prefix+"timestep_map", steps); err != nil {
			t.Fatal(err)
		}
		for i, s := range steps {
			if int(s) != p.Timesteps[i] {
				t.Fatalf("%stimestep_map[%d] is %d, want %d", prefix, i, p.Timesteps[i], s)
			}
		}
		for name, got := range map[string][]float64{
			"betas": p.Betas, "alphas_cumprod": p.AlphasCumprod, "alphas_cumprod_prev": p.AlphasCumprodPrev,
			"sqrt_alphas_cumprod": p.SqrtAlphasCumprod, "sqrt_one_minus_alphas_cumprod": p.SqrtOneMinusAlphasCumprod,
			"sqrt_recip_alphas_cumprod": p.SqrtRecipAlphasCumprod, "sqrt_recipm1_alphas_cumprod": p.SqrtRecipm1AlphasCumprod,
			"posterior_variance": p.PosteriorVariance, "posterior_log_variance_clipped": p.PosteriorLogVarianceClipped,
			"posterior_mean_coef1": p.PosteriorMeanCoef1, "posterior_mean_coef2": p.PosteriorMeanCoef2,
		} {
			want := make([]float64, n)
			if err := f.ReadF64(prefix+name, want); err != nil {
				t.Fatal(err)
			}
			for i, w := range want {
				if d := math.Abs(got[i] - w); !(d <= 1e-11*math.Abs(w)) {
					t.Errorf("%s%s[%d] is %.17g, want %.17g (relative %.2g)", prefix, name, i, got[i], w, d/math.Abs(w))
					break
				}
			}
		}
	}
}

// The reverse step in one formula against the two of the authors.
func TestStep(t *testing.T) {
	p, err := MAR(100, 999)
	if err != nil {
		t.Fatal(err)
	}
	steps := p.Steps()
	for k, s := range steps {
		i := 99 - k
		x, eps := 0.7, -0.3
		x0 := p.SqrtRecipAlphasCumprod[i]*x - p.SqrtRecipm1AlphasCumprod[i]*eps
		want := p.PosteriorMeanCoef1[i]*x0 + p.PosteriorMeanCoef2[i]*x
		if got := s.A*x - s.B*eps; math.Abs(got-want) > 1e-12*(1+math.Abs(want)) {
			t.Errorf("step %d: mean %g, want %g", k, got, want)
		}
		if s.Timestep != p.Timesteps[i] || s.Last != (i == 0) || s.MinLog > s.MaxLog {
			t.Errorf("step %d: %+v", k, s)
		}
	}
}

// Amplification at the first step, as design and field reports have it.
func TestAmplification(t *testing.T) {
	for n, want := range map[int]float64{100: 316, 50: 632, 25: 1327, 10: 3493} {
		p, err := MAR(n, 999)
		if err != nil {
			t.Fatal(err)
		}
		s := p.Steps()
		if got := Amplification(s[0]); math.Abs(got-want) > 0.01*want {
			t.Errorf("%d steps: %g, want %g", n, got, want)
		}
		if n == 100 {
			if e := ExactSteps(s); !e[0] || slices.Contains(e[1:], true) {
				t.Errorf("exact steps of 100: %v", e)
			}
		}
	}
	p, err := MAR(100, 950)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(ExactSteps(p.Steps()), true) {
		t.Error("from timestep 950 no step needs to be exact")
	}
}

func TestSpaced(t *testing.T) {
	// 950·i/4: halves go to the even neighbour, as Python rounds.
	if got, err := Spaced(1000, 5, 950); err != nil || !slices.Equal(got, []int{0, 238, 475, 712, 950}) {
		t.Errorf("%v %v", got, err)
	}
	for _, c := range []struct{ steps, last int }{{1, 950}, {0, 999}, {1001, 999}, {12, 10}, {10, 1000}, {10, 0}, {2, -5}} {
		if got, err := Spaced(1000, c.steps, c.last); !errors.Is(err, engine.Invalid) {
			t.Errorf("%d steps to %d: %v %v", c.steps, c.last, got, err)
		}
	}
	for last := 1; last < 1000; last += 7 {
		for steps := 2; steps <= last+1; steps += 13 {
			got, err := Spaced(1000, steps, last)
			if err != nil || got[0] != 0 || got[steps-1] != last {
				t.Fatalf("%d to %d: %v %v", steps, last, got, err)
			}
			if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != steps {
				t.Fatalf("%d to %d repeats: %v", steps, last, got)
			}
		}
	}
}

// Cases worked out by hand from respace.py's rule.
func TestRespace(t *testing.T) {
	for _, c := range []struct {
		n    int
		spec string
		want []int
	}{
		{10, "4", []int{0, 3, 6, 9}},
		{10, "3", []int{0, 4, 9}}, // 4.5 goes to 4
		{10, "2,3", []int{0, 4, 5, 7, 9}},
		{11, "1,1", []int{0, 6}}, // the first section is the longer one
		{10, "ddim5", []int{0, 2, 4, 6, 8}},
		{10, "ddim4", []int{0, 3, 6, 9}},
		{3, "", []int{0, 1, 2}},
	} {
		if got, err := Respace(c.n, c.spec); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%d %q: %v %v, want %v", c.n, c.spec, got, err, c.want)
		}
	}
	for _, spec := range []string{"11", "6,6", "x", "ddim", "ddim7", "-1", ","} {
		if got, err := Respace(10, spec); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), strconv.Quote(spec)) {
			t.Errorf("%q: %v %v", spec, got, err)
		}
	}
}

func TestLinear(t *testing.T) {
	b := Linear(1000)
	if b[0] != 0.0001 || b[999] != 0.02 || math.Abs(b[500]-(0.0001+500*0.0199/999)) > 1e-15 {
		t.Errorf("%g %g %g", b[0], b[500], b[999])
	}
}

func TestNewErrors(t *testing.T) {
	for _, use := range [][]int{nil, {5}, {3, 2}, {0, 1000}, {2, 2}} {
		if _, err := New(Cosine(1000), use); !errors.Is(err, engine.Invalid) {
			t.Errorf("%v: %v", use, err)
		}
	}
}

// DDIM's step in one formula against the authors' ddim_sample: x₀ from ε, ε again from
// x₀, then the mean and σ.
func TestDDIM(t *testing.T) {
	p, err := DiT("50")
	if err != nil {
		t.Fatal(err)
	}
	for _, eta := range []float64{0, 0.3, 1} {
		steps, err := p.DDIMSteps(eta)
		if err != nil {
			t.Fatal(err)
		}
		for k, s := range steps {
			i := p.Len() - 1 - k
			x, eps := 0.7, -0.3
			x0 := p.SqrtRecipAlphasCumprod[i]*x - p.SqrtRecipm1AlphasCumprod[i]*eps
			again := (p.SqrtRecipAlphasCumprod[i]*x - x0) / p.SqrtRecipm1AlphasCumprod[i]
			bar, prev := p.AlphasCumprod[i], p.AlphasCumprodPrev[i]
			sigma := eta * math.Sqrt((1-prev)/(1-bar)) * math.Sqrt(1-bar/prev)
			want := x0*math.Sqrt(prev) + math.Sqrt(1-prev-sigma*sigma)*again
			if got := s.A*x - s.B*eps; math.Abs(got-want) > 1e-11*(1+math.Abs(want)) {
				t.Errorf("eta %g step %d: mean %g, want %g", eta, k, got, want)
			}
			if s.Last != (sigma == 0) || !s.Last && math.Abs(math.Exp(s.MinLog/2)-sigma) > 1e-14 || s.MinLog != s.MaxLog || s.Timestep != p.Timesteps[i] {
				t.Errorf("eta %g step %d: %+v, sigma %g", eta, k, s, sigma)
			}
		}
	}
	// With η = 1 DDIM is DDPM with the posterior's variance.
	one, _ := p.DDIMSteps(1)
	for k, s := range p.Steps() {
		if math.Abs(one[k].A-s.A) > 1e-12*s.A || math.Abs(one[k].B-s.B) > 1e-10 || !s.Last && math.Abs(one[k].MinLog-s.MinLog) > 1e-9 {
			t.Errorf("step %d: DDIM %+v, DDPM %+v", k, one[k], s)
		}
	}
	for _, eta := range []float64{-0.1, 1.1, math.NaN()} {
		if _, err := p.DDIMSteps(eta); !errors.Is(err, engine.Invalid) {
			t.Errorf("eta %g: %v", eta, err)
		}
	}
}
