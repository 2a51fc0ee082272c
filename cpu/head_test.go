package cpu

import (
	"errors"
	"fmt"
	"math/rand"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/mar"
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

// strided copies t into a tensor whose rows are stride apart.
func (f *fixture) strided(t *engine.Tensor, stride int) *engine.Tensor {
	out := f.tensor(t.DType, t.Rows(), t.Cols(), stride)
	f.set(out, f.get(t))
	return out
}

// TestHeadComposition: the loop gives the bits of the single ops, also where
// rows of X are as far apart as a GEMM of its own would not leave them.
func TestHeadComposition(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, c := range []struct{ threads, n, width, ch, stride int }{
			{1, 12, 72, 5, 5}, {1, 12, 72, 512, 512}, {3, 40, 72, 512, 1024}, {2, 1, 72, 512, 512}, // rows, and columns for one
			{2, 24, 640, 512, 512}, // columns: the weights are large, in f32
		} {
			for _, dt := range []engine.DType{f32, bf16} {
				if c.width > 100 && (dt == bf16 || testing.Short()) {
					continue
				}
				const depth, steps = 2, 3
				f := newHeadFixture(t, c.threads, c.n, c.width, depth, c.ch, steps, dt)
				a := f.args(0, c.n)
				a.X = f.strided(a.X, c.stride)
				f.ok(f.s.HeadSteps(a))
				got := f.get(a.X)

				ctx, err := engine.NewCtx(f.d, dt)
				f.ok(err)
				f.set(a.X, f.x)
				h := mar.Head{Channels: c.ch, Width: c.width, Blocks: make([]mar.ResBlock, depth)}
				h.Compose(ctx, a)
				f.ok(ctx.Err())
				if i := sameBits(got, f.get(a.X)); i >= 0 {
					t.Fatalf("%+v %v: element %d is %v, single ops give %v", c, dt, i, got[i], f.get(a.X)[i])
				}
				f.ok(ctx.Close())
			}
		}
	})
}

// TestHeadBudget: with little memory the tokens run range by range, and the bits
// stay.
func TestHeadBudget(t *testing.T) {
	const threads, n, width, depth, ch, steps = 64, 60, 72, 1, 5, 3 // more threads than tokens: columns
	for _, c := range []struct {
		dt            engine.DType
		guided, given bool
	}{{f32, true, true}, {bf16, true, false}, {f32, false, false}} {
		f := newHeadFixture(t, threads, n, width, depth, ch, steps, c.dt)
		f.guided = c.guided
		noise := f.put(f32, randn(rand.New(rand.NewSource(5)), steps*n*ch, 1), steps*n, ch)
		var want [2][]float32
		for _, budget := range []int{0, 1, 200000} {
			a := f.args(0, n)
			a.X, a.Cond = f.strided(a.X, ch+3), f.strided(a.Cond, width+1)
			if c.given {
				a.IDs, a.Noise = nil, f.strided(noise, ch+2)
			}
			a.Trace = f.tensor(f32, steps*n, ch, ch+4)
			a.Scratch = budget
			f.ok(f.s.HeadSteps(a))
			got := [2][]float32{f.get(a.X), f.get(a.Trace)}
			if want[0] == nil {
				want = got
			}
			for k, name := range []string{"x", "trace"} {
				if i := sameBits(got[k], want[k]); i >= 0 {
					t.Fatalf("%+v: %d bytes change element %d of %s: %v, was %v", c, budget, i, name, got[k][i], want[k][i])
				}
			}
		}
	}
	if tokens, _, _ := headPlan(width, depth, ch, n, true, steps, 1, threads); tokens >= n {
		t.Errorf("%d tokens run together: nothing was tested", tokens)
	}
}

// TestHeadPlan: the loop keeps to its budget, whatever the batch, and does not
// cut up what fits.
func TestHeadPlan(t *testing.T) {
	for _, c := range []struct{ width, depth, n int }{
		{1024, 6, 1}, {1024, 6, 4}, {1280, 8, 4}, {1280, 8, 300}, {1280, 8, 64 * 64}, {1536, 12, 7}, {1536, 12, 256 * 256},
	} {
		tokens, chunk, bytes := headPlan(c.width, c.depth, 16, c.n, true, 100, headBytes, 2)
		if bytes <= 0 || bytes > headBytes {
			t.Errorf("%+v takes %d bytes", c, bytes)
		}
		if tokens > c.n || chunk < 1 || chunk > 100 {
			t.Errorf("%+v: %d tokens, %d steps", c, tokens, chunk)
		}
		if tokens < c.n && tokens < 100 {
			t.Errorf("%+v is cut into ranges of %d tokens", c, tokens)
		}
	}
	// Without enough for a good size, what a block of rows takes.
	if tokens, chunk, bytes := headPlan(1536, 12, 16, 1000, true, 100, 1, 2); tokens > 28 || chunk != 1 || bytes > 16<<20 {
		t.Errorf("budget 1: %d tokens, %d steps, %d bytes", tokens, chunk, bytes)
	}
}

// TestHeadFirstError: what is reported is what went wrong first.
func TestHeadFirstError(t *testing.T) {
	f := newHeadFixture(t, 1, 3, 64, 1, 4, 2, bf16)
	a := f.args(0, 3)
	f.ok(a.Weights.Ada.Packed.Free())
	if err := f.s.HeadSteps(a); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "was freed") {
		t.Errorf("freed weight: %v", err)
	}
}

// TestHeadCancel: a request to stop ends the loop soon, in both schedules.
func TestHeadCancel(t *testing.T) {
	for _, n := range []int{1, 40} {
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
					peak := PeakFLOPS(dt, f.d.threads)
					b.ReportMetric(100*rate/peak, "%peak")
					b.ReportMetric(serial*float64(dt.Size())*steps/best.Seconds()/1e9, "GB/s")
				})
			}
		}
	}
}
