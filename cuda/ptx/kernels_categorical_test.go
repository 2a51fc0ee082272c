package ptx

import (
	"math"
	"math/rand/v2"
	"testing"

	"margo/engine"
)

// categoricalKernel draws from 150 categories, 64 threads a row: Gumbel's argmax with guidance, the inverse of the cumulative sum
// after top-k and top-p, and temperature 0. One row has a NaN and is no distribution, one has categories of -Inf.
func categoricalKernel(t testing.TB, m *Module, name string) {
	const n, k, stride = 4, 150, 1000
	_, cached := tile(name)
	rng := engine.RNG{Seed: 0x1122334455667788, Purpose: engine.PurposeStepNoise, Step: 17}
	for _, v := range []struct {
		guided     bool
		topK       int
		topP, temp float32
		method     engine.CategoricalMethod
	}{{true, 0, 1, 0.7, engine.Gumbel}, {false, 40, 0.8, 1.3, engine.InverseTransform}, {false, 0, 1, 0, engine.Gumbel}} {
		p := newProblem(t)
		p.gap = 3
		rows := n
		if v.guided {
			rows = 2 * n
		}
		logits := p.in(engine.F32, func(r *rand.Rand, i int) float32 {
			x := float32(2 * r.NormFloat64())
			switch {
			case i == k+17:
				return float32(math.NaN())
			case i/k == 2 && i%3 == 0 && !v.guided:
				return float32(math.Inf(-1))
			}
			return x
		}, rows, k)
		p.gap = 0
		guidance, ids := p.in(engine.F32, uniform(1, 3), n), p.ids(n)
		y, logProb := p.out(engine.I32, n), p.out(engine.F32, n)
		g := guidance.at
		if !v.guided {
			g = 0
		}
		shared := 112
		if cached {
			shared += 8 * k
		}
		launch(t, m, p.mem, Launch{Grid: [3]int{n}, Block: [3]int{64}, Shared: shared, Args: []any{args(logits.at, g, y.at, logProb.at, ids.at, int64(logits.ld),
			int64(n), int64(stride), int32(k), int32(v.topK), int32(v.method), v.temp, v.topP, rng.Seed, uint32(rng.Purpose), uint32(rng.Step))}}, name)
		p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			a := engine.CategoricalArgs{Logits: at(logits), Y: at(y), LogProb: at(logProb), Stride: stride, Temperature: v.temp, TopK: v.topK, TopP: v.topP,
				Method: v.method, IDs: at(ids), RNG: rng}
			if v.guided {
				a.Guidance = at(guidance)
			}
			return s.Categorical(a)
		})
	}
}
