package ptx

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"margo/engine"
)

// head is a small diffusion head: of guided pairs, both halves share x.
type headProblem struct {
	*problem
	n, w, c, depth, count          int
	x, mods, wi, bi, wf, bf        *operandOf
	guidance, noise, ids           *operandOf
	h, u, f, out                   *operandOf // scratch of the oracle
	fc1, fc2, b1, b2, normW, normB []*operandOf
	time, cond, ada, adaB          *operandOf // give mods: adaptive sets them
	coef                           []engine.StepCoef
	rng                            engine.RNG
	state                          uint64
	first                          int // step of the state that the first of count is
	given                          bool
	compute                        engine.DType
}

const headEps, headTemperature = 1e-6, 0.9

// newHead makes the operands of count steps, and the state of one step more.
func newHead(t testing.TB, n, w, c, depth, count int, compute engine.DType, given bool) *headProblem {
	t.Helper()
	return newHeadOf(t, n, w, c, depth, count, compute, given, normal(1/math.Sqrt(float64(w))))
}

// newHeadOf is newHead with blocks' weights that block makes.
func newHeadOf(t testing.TB, n, w, c, depth, count int, compute engine.DType, given bool, block gen) *headProblem {
	t.Helper()
	p := newProblem(t)
	h := &headProblem{problem: p, n: n, w: w, c: c, depth: depth, count: count, given: given, compute: compute,
		rng: engine.RNG{Seed: 0x1122334455667788, Purpose: engine.PurposeStepNoise, Step: 17}}
	h.x, h.ids = p.inout(engine.F32, normal(1), n, c), p.ids(n)
	h.guidance, h.noise = p.in(engine.F32, uniform(1, 3), n), p.f32(count*n, c)
	h.mods = p.in(engine.F32, normal(0.3).bf16Of(), count*2*n, (3*depth+2)*w)
	p.gap = 4
	weight := normal(1 / math.Sqrt(float64(w)))
	h.wi, h.bi = p.in(engine.F32, normal(1/math.Sqrt(float64(c))), w, c), p.f32(w)
	h.wf, h.bf = p.in(engine.F32, weight, 2*c, w), p.f32(2*c)
	for range depth {
		h.fc1, h.fc2 = append(h.fc1, p.in(compute, block, w, w)), append(h.fc2, p.in(compute, block, w, w))
		h.b1, h.b2 = append(h.b1, p.f32(w)), append(h.b2, p.f32(w))
		h.normW, h.normB = append(h.normW, p.f32(w)), append(h.normB, p.f32(w))
	}
	p.gap = 0
	h.h, h.out = p.scratch(engine.F32, 2*n, w), p.scratch(engine.F32, 2*n, 2*c)
	h.u, h.f = p.scratch(engine.F32, 2*n, w), p.scratch(compute, 2*n, w)
	b := args(h.rng.Seed, uint32(h.rng.Purpose), uint32(h.rng.Step), float32(headTemperature), int32(0))
	for i := range count + 1 {
		s := engine.StepCoef{A: 1.01 - 0.1*float64(i), B: 0.13, MinLog: -6.5, MaxLog: -4.5, Last: i == count && count > 1}
		h.coef = append(h.coef, s)
		last := int32(0)
		if s.Last {
			last = 1
		}
		b = append(b, args(float32(s.A), float32(s.B), float32(s.MinLog), float32(s.MaxLog), last, int32(0))...)
	}
	h.state = p.mem.Alloc(len(b))
	to, err := p.mem.Bytes(h.state, len(b))
	if err != nil {
		t.Fatal(err)
	}
	copy(to, b)
	return h
}

// scratch is memory that only the oracle needs.
func (p *problem) scratch(d engine.DType, shape ...int) *operandOf {
	return p.add(&operandOf{d: d, shape: shape})
}

// project enqueues the input projection of x into both halves of y.
func (h *headProblem) project(s engine.Stream, at func(*operandOf) *engine.Tensor, y *operandOf) error {
	for half := range 2 {
		if err := s.Gemm(engine.GemmArgs{X: at(h.x), W: at(h.wi), Bias: at(h.bi), Y: at(y).RowsAt(half*h.n, (half+1)*h.n)}); err != nil {
			return err
		}
	}
	return nil
}

// mod is modulation k of step i.
func (h *headProblem) mod(at func(*operandOf) *engine.Tensor, i, k int) *engine.Tensor {
	return at(h.mods).RowsAt(2*h.n*i, 2*h.n*(i+1)).Slice(k*h.w, (k+1)*h.w)
}

// finish enqueues what follows the blocks of step i, with the modulations from mod on: norm, final layer, guidance, reverse step.
func (h *headProblem) finish(s engine.Stream, at func(*operandOf) *engine.Tensor, residual *operandOf, i, mod int) error {
	err := s.Norm(engine.NormArgs{X: at(residual), Y: at(h.u), Shift: h.mod(at, i, mod), Scale: h.mod(at, i, mod+1), ModRows: 1, Eps: headEps})
	if err == nil {
		err = s.Gemm(engine.GemmArgs{X: at(h.u), W: at(h.wf), Bias: at(h.bf), Y: at(h.out)})
	}
	a := engine.DiffusionStepArgs{X: at(h.x), Y: at(h.x), Out: at(h.out), Guidance: at(h.guidance), IDs: at(h.ids), RNG: h.rng, Coef: h.coef[h.first+i],
		Temperature: headTemperature}
	a.RNG.Step += h.first + i
	if h.given {
		a.Noise = at(h.noise).RowsAt(i*h.n, (i+1)*h.n)
	}
	if err == nil {
		err = s.DiffusionStep(a)
	}
	return err
}

// adaptive makes what HeadSteps computes the modulations from, so that they are h.mods to the bit: the sum of time embedding and condition
// is 32 in one column for each step and row, and so far below 0 elsewhere that SiLU gives 0.
func (h *headProblem) adaptive(t testing.TB) {
	t.Helper()
	const on, off = 32, -500
	rows := 2 * h.n
	if h.count*rows > h.w {
		t.Fatalf("%d steps of %d rows do not fit a width of %d", h.count, rows, h.w)
	}
	h.time = h.in(engine.F32, func(_ *rand.Rand, i int) float32 {
		if i%h.w/rows == i/h.w {
			return on
		}
		return off
	}, h.count, h.w)
	h.cond = h.in(engine.F32, func(_ *rand.Rand, i int) float32 {
		if i%h.w%rows == i/h.w {
			return 0
		}
		return off
	}, rows, h.w)
	mods := (3*h.depth + 2) * h.w
	h.ada = h.in(h.compute, func(_ *rand.Rand, i int) float32 {
		if col := i % h.w; col < h.count*rows {
			return math.Float32frombits(h.mods.made[col*mods+i/h.w]) / on
		}
		return 0
	}, mods, h.w)
	h.adaB = h.in(engine.F32, func(*rand.Rand, int) float32 { return 0 }, mods)
}

// emulated compares x and trace with HeadSteps, of the oracle and of the emulator, which runs the kernels of a path.
func (h *headProblem) emulated(t testing.TB, path int, kernel string, trace *operandOf) {
	t.Helper()
	if emulator(t, 80) != nil {
		headPath.Lock()
		defer headPath.Unlock()
		emulated[80].SetHeadPath(path)
	}
	h.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		w := &engine.HeadWeights{Input: engine.Matrix{W: at(h.wi), Bias: at(h.bi)}, Final: engine.Matrix{W: at(h.wf), Bias: at(h.bf)},
			Ada: engine.Matrix{W: at(h.ada), Bias: at(h.adaB)}, Eps: headEps}
		for i := range h.depth {
			w.Blocks = append(w.Blocks, engine.HeadBlock{NormWeight: at(h.normW[i]), NormBias: at(h.normB[i]),
				Fc1: engine.Matrix{W: at(h.fc1[i]), Bias: at(h.b1[i])}, Fc2: engine.Matrix{W: at(h.fc2[i]), Bias: at(h.b2[i])}})
		}
		a := engine.HeadStepsArgs{X: at(h.x), Cond: at(h.cond), Time: at(h.time), Weights: w, Steps: h.coef[h.first : h.first+h.count], Guidance: at(h.guidance),
			IDs: at(h.ids), RNG: h.rng, Temperature: headTemperature, Trace: at(trace)}
		a.RNG.Step += h.first
		if h.given {
			a.Noise = at(h.noise)
		}
		return s.HeadSteps(a)
	})
	emulatedKernel(t, 80, kernel)
}

var headPath sync.Mutex // of the emulated device

// final are the parameters of head_input and head_final for step i, whose coefficients are those of a step of the state.
func (h *headProblem) final(residual, next, trace uint64, i int, step int32) []byte {
	mods, noise := h.mods.at+uint64(4*i*2*h.n*h.mods.ld), h.noise.at+uint64(4*i*h.n*h.noise.ld)
	if !h.given {
		noise = 0
	}
	flag := func(b bool) int32 {
		if b {
			return 1
		}
		return 0
	}
	return args(residual, mods, int64(h.w), int64(h.mods.ld), h.wf.at, h.bf.at, h.wi.at, h.bi.at, int64(h.wf.ld), int64(h.wi.ld), h.x.at, next,
		h.guidance.at, noise, trace, h.ids.at, int64(h.noise.ld), int64(h.c), h.state, step, int32(h.n), int32(h.c), int32(h.w), int32(2),
		flag(h.w%4 == 0), flag(h.c%4 == 0), float32(headEps))
}

func headInputKernel(t testing.TB, m *Module, name string) {
	for _, d := range [][2]int{{40, 6}, {37, 8}} {
		h := newHead(t, 3, d[0], d[1], 0, 1, engine.F32, false)
		y := h.problem.out(engine.F32, 2*h.n, h.w)
		launch(t, m, h.mem, Launch{Grid: [3]int{h.n}, Block: [3]int{256}, Shared: 4 * h.c, Args: []any{h.final(0, y.at, 0, 0, 0)}}, name)
		h.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error { return h.project(s, at, y) })
	}
}

// headFinalKernel runs the end of a step for 5 guided tokens, the last block of four cut, and the projection for the next step:
// with drawn and with given noise, rows of the matrices in fours and by element.
func headFinalKernel(t testing.TB, m *Module, name string) {
	tokens, _ := tile(name)
	tok := tokens[0]
	for _, d := range []struct {
		w, c  int
		given bool
	}{{40, 6, false}, {37, 8, true}} {
		h := newHead(t, 5, d.w, d.c, 0, 1, engine.F32, d.given)
		h.first = 1
		residual, next, trace := h.f32(2*h.n, h.w), h.problem.out(engine.F32, 2*h.n, h.w), h.problem.out(engine.F32, h.n, h.c)
		launch(t, m, h.mem, Launch{Grid: [3]int{(h.n + tok - 1) / tok}, Block: [3]int{256}, Shared: 4 * tok * (2*h.w + 5*h.c),
			Args: []any{h.final(residual.at, next.at, trace.at, 0, 1)}}, name)
		h.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			err := h.finish(s, at, residual, 0, 0)
			if err == nil {
				err = s.Copy(at(trace), at(h.x))
			}
			if err == nil {
				err = h.project(s, at, next)
			}
			return err
		})

		// Two steps of a head without blocks, from head_input on: what the emulator's kernels do for HeadSteps.
		h = newHead(t, 5, d.w, d.c, 0, 2, engine.F32, d.given)
		h.adaptive(t)
		trace = h.problem.out(engine.F32, h.count*h.n, h.c)
		launch(t, m, h.mem, Launch{Grid: [3]int{h.n}, Block: [3]int{256}, Shared: 4 * h.c, Args: []any{h.final(0, h.h.at, 0, 0, 0)}}, "head_input")
		for i := range h.count {
			launch(t, m, h.mem, Launch{Grid: [3]int{(h.n + tok - 1) / tok}, Block: [3]int{256}, Shared: 4 * tok * (2*h.w + 5*h.c),
				Args: []any{h.final(h.h.at, h.h.at, trace.at+uint64(4*i*h.n*h.c), i, int32(i))}}, name)
		}
		h.emulated(t, 1, "head_final", trace)
	}
}

func headSiLUKernel(t testing.TB, m *Module, name string) {
	const steps, r, w = 3, 4, 300
	p := newProblem(t)
	p.gap = 4
	time, cond, y := p.f32(steps, w), p.f32(r, w), p.out(dtype(template(t, name, "head_silu")[0]), steps*r, w)
	launch(t, m, p.mem, Launch{Grid: [3]int{steps * r}, Block: [3]int{256},
		Args: []any{y.at, int64(y.ld), time.at, int64(time.ld), cond.at, int64(cond.ld), int32(r), int32(w)}}, name)
	p.gap = 0
	var it, ir []int32
	for i := range int32(steps * r) {
		it, ir = append(it, i/r), append(ir, i%r)
	}
	ia, ib := p.in(engine.I32, fixed(it...), steps*r), p.in(engine.I32, fixed(ir...), steps*r)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.Rows(engine.RowsArgs{Y: at(y), A: at(time), IA: at(ia), B: at(cond), IB: at(ib), Count: steps * r, Act: engine.SiLU})
	})
}

// fp8Scale is the power of two of a row of a weight in FP8.
func fp8Scale(row int) float32 { return float32(math.Ldexp(1, row%3-10)) }

// fp8Of makes weights of w columns in FP8, of all codes but those of NaN.
func fp8Of(w int) gen {
	return func(r *rand.Rand, i int) float32 {
		c := byte(r.IntN(127) | r.IntN(2)<<7)
		return engine.FromE4M3(c) * fp8Scale(i/w)
	}
}

// fp8 puts the codes of o, as the fragments of margo_fp8, and its scales into memory.
func (p *problem) fp8(o *operandOf) (codes, scales uint64) {
	n, k := o.shape[0], o.shape[1]
	words, s, v := make([]uint32, n*k/4), make([]float32, n), o.words(0)
	for row := range n {
		s[row] = fp8Scale(row)
		for col := range k {
			c := col % 16
			word := (row/8*(k/16)+col/16)*32 + row%8*4 + c%8/2
			code := engine.ToE4M3(math.Float32frombits(v[row*k+col]) / s[row])
			words[word] |= uint32(code) << (8 * (c/8*2 + c%2))
		}
	}
	return p.mem.U32(words), p.mem.F32(s)
}

// headLatencyKernel runs two steps of a head of two blocks with three guided tokens, all blocks of the grid taking turns. One of
// the four layers lies in shared memory. Noise is given in the first run; in the second it is drawn, and the last step is the last of all. In
// a third the blocks run one after the other: the first waits in vain for the rest, until its time is over, and all must say so and end.
func headLatencyKernel(t testing.TB, m *Module, name string) {
	n, fp8 := tile(name)
	for run := range 3 {
		given, stalls, stepTime := run == 0, run == 2, 0
		if stalls {
			stepTime = 50_000
		}
		const tokens, w, c, depth, count, resident, most = 3, 32, 6, 2, 2, 1, 160
		own := 8 * n[0]
		block, size := normal(1/math.Sqrt(w)), 2
		if fp8 {
			block, size = fp8Of(w), 1
		}
		h := newHeadOf(t, tokens, w, c, depth, count, engine.BF16, given, block)
		if !given {
			h.first = 1
		}
		h.adaptive(t)
		trace := h.problem.out(engine.F32, count*tokens, c)
		var b []byte
		for i := range 16 {
			if i < depth {
				w1, w2, s1, s2 := h.fc1[i].at, h.fc2[i].at, uint64(0), uint64(0)
				if fp8 {
					w1, s1 = h.fp8(h.fc1[i])
					w2, s2 = h.fp8(h.fc2[i])
				}
				b = append(b, args(w1, w2, int64(h.fc1[i].ld), int64(h.fc2[i].ld), s1, s2, h.b1[i].at, h.b2[i].at, h.normW[i].at, h.normB[i].at)...)
			} else {
				b = append(b, make([]byte, 80)...)
			}
		}
		zeros := func(words int) uint64 { return h.mem.U32(make([]uint32, 2*words)) }
		noise := h.noise.at
		if !given {
			noise = 0
		}
		// The state's coefficients begin with the first step of the run, its generator counts from the same.
		state := h.state
		if h.first > 0 {
			state = h.later(t)
		}
		bad := h.mem.U32([]uint32{0})
		b = append(b, args(state, h.mods.at, h.x.at, h.guidance.at, noise, trace.at, h.ids.at, int64(h.mods.ld), int64(h.noise.ld), int64(c),
			int32(tokens), int32(2*tokens), int32(c), int32(w), int32(count))...)
		b = append(b, args(h.wi.at, h.bi.at, h.wf.at, h.bf.at, int64(h.wi.ld), int64(h.wf.ld),
			zeros(2*tokens*most), zeros(2*tokens*w/2), zeros(2*tokens*w/2), zeros(2*tokens*2*c*most), zeros(2*tokens*2*c), bad,
			int32(depth), int32(resident), float32(headEps))...)
		fixed := 4 * (2*8*16*own + 16*(own+1) + 16*2 + 16*2*32 + 16*32 + 64*(own+1) + own*33)
		launch(t, m, h.mem, Launch{Grid: [3]int{w / own}, Block: [3]int{256}, Shared: fixed + resident*own*w*size, Cooperative: !stalls, MaxSteps: 1 << 24,
			StepTime: stepTime, Args: []any{b}}, name)
		if e := words(t, h.mem, bad, 1)[0]; stalls != (e == math.MaxUint32) || !stalls && e != 0 { // DEVICE_ERROR_STALLED of plugin.h
			t.Errorf("the error word is %#x", e)
		}
		if stalls {
			return
		}
		h.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			for i := range count {
				if err := h.step(s, at, i); err != nil {
					return err
				}
				if err := s.Copy(at(trace).RowsAt(i*tokens, (i+1)*tokens), at(h.x)); err != nil {
					return err
				}
			}
			return nil
		})
		h.emulated(t, 2, "head_latency", trace)
	}
}

// later is the state of a run that begins with the second coefficient.
func (h *headProblem) later(t testing.TB) uint64 {
	t.Helper()
	all, err := h.mem.Bytes(h.state, 24+24*len(h.coef))
	if err != nil {
		t.Fatal(err)
	}
	at := h.mem.Alloc(24 + 24*(len(h.coef)-1))
	b, err := h.mem.Bytes(at, 24+24*(len(h.coef)-1))
	if err != nil {
		t.Fatal(err)
	}
	copy(b, all[:24])
	copy(b[24:], all[48:])
	binary.LittleEndian.PutUint32(b[12:], uint32(h.rng.Step+1))
	return at
}

// step enqueues step i as engine/ref composes it (HeadSteps), with the modulations given.
func (h *headProblem) step(s engine.Stream, at func(*operandOf) *engine.Tensor, i int) error {
	err := h.project(s, at, h.h)
	half := h.f
	for k := range h.depth {
		if err == nil {
			err = s.Norm(engine.NormArgs{X: at(h.h), Y: at(half), Weight: at(h.normW[k]), Bias: at(h.normB[k]), Shift: h.mod(at, i, 3*k), Scale: h.mod(at, i, 3*k+1),
				ModRows: 1, Eps: headEps})
		}
		if err == nil {
			err = s.Gemm(engine.GemmArgs{X: at(half), W: at(h.fc1[k]), Bias: at(h.b1[k]), Act: engine.SiLU, Y: at(h.u)})
		}
		// fc1's output is rounded to bf16 as it meets fc2's weights.
		if err == nil {
			err = s.Gemm(engine.GemmArgs{X: at(h.u), W: at(h.fc2[k]), Bias: at(h.b2[k]), Gate: h.mod(at, i, 3*k+2), GateRows: 1, Residual: at(h.h), Y: at(h.h)})
		}
	}
	if err == nil {
		err = h.finish(s, at, h.h, i, 3*h.depth)
	}
	return err
}
