package cpu

import (
	"errors"
	"fmt"
	"math/rand"
	"sync/atomic"
	"testing"
	"time"

	"margo/engine"
)

// headFixture is a random head with the inputs of n tokens. The oracle's view
// of the op is the conformance table's; here schedules are compared.
type headFixture struct {
	*fixture
	w, exact *engine.HeadWeights
	n, width int
	ch       int
	steps    int
	guided   bool
	cond     []float32 // [2n, W]
	x, time  []float32
}

func newHeadFixture(t testing.TB, threads, n, width, depth, ch, steps int, dt engine.DType) *headFixture {
	f := &headFixture{fixture: open(t, threads), n: n, width: width, ch: ch, steps: steps, guided: true}
	r := rand.New(rand.NewSource(int64(width)))
	vec := func(n int) *engine.Tensor { return f.put(f32, randn(r, n, 0.1), 1, n) }
	type pair struct{ low, full engine.Matrix }
	matrix := func(rows, cols int) pair {
		w, b := f.put(f32, randn(r, rows*cols, 0.7/float64(cols)), rows, cols), vec(rows)
		low := *w
		low.DType = dt
		return pair{engine.Matrix{W: &low, Packed: f.pack(w, dt), Bias: b}, engine.Matrix{W: w, Packed: f.pack(w, f32), Bias: b}}
	}
	in, ada, fin := matrix(width, ch), matrix((3*depth+2)*width, width), matrix(2*ch, width)
	f.w = &engine.HeadWeights{Input: in.full, Ada: ada.low, Final: fin.full, Eps: 1e-6}
	f.exact = &engine.HeadWeights{Input: in.full, Ada: ada.full, Final: fin.full, Eps: 1e-6}
	for range depth {
		nw, nb, fc1, fc2 := vec(width), vec(width), matrix(width, width), matrix(width, width)
		f.w.Blocks = append(f.w.Blocks, engine.HeadBlock{NormWeight: nw, NormBias: nb, Fc1: fc1.low, Fc2: fc2.low})
		f.exact.Blocks = append(f.exact.Blocks, engine.HeadBlock{NormWeight: nw, NormBias: nb, Fc1: fc1.full, Fc2: fc2.full})
	}
	f.cond, f.x, f.time = randn(r, 2*n*width, 1), randn(r, n*ch, 1), randn(r, steps*width, 1)
	return f
}

// args are the arguments for tokens lo … hi-1.
func (f *headFixture) args(lo, hi int) engine.HeadStepsArgs {
	n, cond := hi-lo, append([]float32(nil), f.cond[lo*f.width:hi*f.width]...)
	a := engine.HeadStepsArgs{Weights: f.w, Exact: f.exact, Temperature: 0.9,
		X:    f.put(f32, f.x[lo*f.ch:hi*f.ch], n, f.ch),
		Time: f.put(f32, f.time, f.steps, f.width),
		RNG:  engine.RNG{Seed: 7, Purpose: engine.PurposeStepNoise, Step: 3},
	}
	ids := f.tensor(engine.I32, n, 2, 2)
	for i := range n {
		elems[int32](ids)[2*i], elems[int32](ids)[2*i+1] = int32(lo+i), 5
	}
	a.IDs = ids
	if f.guided {
		cond = append(cond, f.cond[(f.n+lo)*f.width:(f.n+hi)*f.width]...)
		scale := make([]float32, n)
		for i := range scale {
			scale[i] = 1 + float32(lo+i)/8
		}
		a.Guidance = f.put(f32, scale, 1, n)
	}
	a.Cond = f.put(f32, cond, len(cond)/f.width, f.width)
	for i := range f.steps {
		a.Steps = append(a.Steps, engine.StepCoef{Timestep: f.steps - i, A: 0.98, B: 0.1, MinLog: -6, MaxLog: -3, Last: i == f.steps-1})
		a.ExactStep = append(a.ExactStep, i == 1)
	}
	return a
}

// TestHeadSchedules: both schedules, any batch, number of threads and budget
// for modulations give the same bits.
func TestHeadSchedules(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, guided := range []bool{true, false} {
			for _, dt := range []engine.DType{f32, bf16} {
				const n, width, depth, ch, steps = 37, 72, 2, 5, 5
				var want []float32
				compare := func(what string, lo int, got []float32) {
					t.Helper()
					if want == nil {
						want = got
					}
					if i := sameBits(got, want[lo*ch:]); i >= 0 {
						t.Fatalf("%v guided=%v: %s changes element %d: %v, was %v", dt, guided, what, i, got[i], want[lo*ch+i])
					}
				}
				// Few threads for many tokens: rows. Many for few: columns.
				for _, threads := range []int{1, 2, 3, 12} {
					f := newHeadFixture(t, threads, n, width, depth, ch, steps, dt)
					f.guided = guided
					for _, budget := range []int{0, 1, 300000} {
						a := f.args(0, n)
						a.Scratch = budget
						a.Trace = f.tensor(f32, steps*n, ch, ch)
						f.ok(f.s.HeadSteps(a))
						got := f.get(a.X)
						compare(fmt.Sprintf("%d threads, budget %d", threads, budget), 0, got)
						if i := sameBits(got, f.get(a.Trace)[(steps-1)*n*ch:]); i >= 0 {
							t.Fatalf("trace ends with another element %d", i)
						}
					}
					for _, part := range [][2]int{{0, 1}, {1, 3}, {30, 37}} {
						a := f.args(part[0], part[1])
						f.ok(f.s.HeadSteps(a))
						compare(fmt.Sprintf("%d threads, tokens %v", threads, part), part[0], f.get(a.X))
					}
				}
			}
		}
	})
}

// TestHeadCancel: a request to stop ends the loop soon, in both schedules.
func TestHeadCancel(t *testing.T) {
	for _, n := range []int{2, 40} {
		f := newHeadFixture(t, 2, n, 128, 3, 4, 20000, f32)
		a := f.args(0, n)
		cancel := new(uint32)
		a.Cancel = cancel
		done := make(chan error)
		start := time.Now()
		go func() { done <- f.s.HeadSteps(a) }()
		time.Sleep(20 * time.Millisecond)
		atomic.StoreUint32(cancel, 1)
		if err := <-done; !errors.Is(err, engine.Cancelled) {
			t.Fatalf("n=%d: %v, want Cancelled (after %v)", n, err, time.Since(start))
		}
	}
}

// BenchmarkHead times a step of the heads of MAR-B, MAR-L and the small model
// that ships, and gives the share of the peak counting the authors' FLOPs.
func BenchmarkHead(b *testing.B) {
	for _, c := range []struct {
		name         string
		width, depth int
		ch           int
		tokens       []int
	}{
		{"mar-b", 1024, 6, 16, []int{1, 4, 16, 28}},
		{"mar-l", 1280, 8, 16, []int{4, 16}},
		{"small", 192, 3, 16, []int{4, 16, 200}},
	} {
		for _, dt := range []engine.DType{f32, bf16} {
			for _, n := range c.tokens {
				b.Run(fmt.Sprintf("%s/%v/tokens=%d", c.name, dt, n), func(b *testing.B) {
					const steps = 50
					f := newHeadFixture(b, DefaultThreads(), n, c.width, c.depth, c.ch, steps, dt)
					a := f.args(0, n)
					a.ExactStep = nil
					best := time.Duration(1 << 62)
					b.ResetTimer()
					for range b.N {
						start := time.Now()
						f.ok(f.s.HeadSteps(a))
						best = min(best, time.Since(start))
					}
					b.StopTimer()
					w := float64(c.width)
					serial := float64(c.depth)*2*w*w + w*float64(3*c.ch)
					flops := 2 * float64(2*n) * (serial + float64(3*c.depth+2)*w*w) * steps
					rate := flops / best.Seconds()
					b.ReportMetric(best.Seconds()*1e6/steps, "µs/step")
					b.ReportMetric(rate/1e9, "GF/s")
					b.ReportMetric(100*rate/PeakFLOPS(dt, f.d.threads), "%peak")
					b.ReportMetric(serial*float64(dt.Size())*steps/best.Seconds()/1e9, "GB/s")
				})
			}
		}
	}
}
