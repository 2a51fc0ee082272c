package mar

import (
	"math"

	"margo/engine"
	"margo/engine/nn"
)

// The heads beside the diffusion network, each a linear map of z and a way to
// draw from what it says. All stay F32 in every compute dtype. z [R, Dd] has
// R = n rows for n tokens, or 2n with guidance [n]: rows n … 2n-1 unconditional.

// Projection is a head that is one layer.
type Projection struct {
	Proj nn.Linear `param:"proj"`
}

func newProjection(in, out int, bias bool) *Projection {
	p := &Projection{nn.NewLinear(in, out).InF32()}
	if !bias {
		p.Proj.Bias = nil
	}
	return p
}

// Category draws a code of each token from softmax(W z/τ) (P1–P4). a says how;
// its Logits, Guidance and Y are filled in. It returns the codes, I32 [n].
func (m *Model) Category(c *engine.Ctx, z, guidance *engine.Tensor, a engine.CategoricalArgs) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n := z.Rows()
	if guidance != nil {
		n /= 2
	}
	y := c.New(engine.I32, n)
	c.Scoped(func() {
		a.Logits, a.Guidance, a.Y = m.CELoss.Proj.Forward(c, z, engine.F32), guidance, y
		c.Categorical(a)
	})
	return y
}

// direct makes DiffusionStep return its Out: X' = 0·X − (−1)·ε, and a log
// variance between −1 and 1 that f = (v+1)/2 turns into v itself.
var direct = engine.StepCoef{A: 0, B: -1, MinLog: -1, MaxLog: 1}

// Regress gives each token as W z + b: [n, C] F32, nothing random about it (P10).
// With guidance x_u + s(x_c − x_u).
func (m *Model) Regress(c *engine.Ctx, z, guidance *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n, ch := z.Rows(), m.Config.TokenDim()
	if guidance != nil {
		n /= 2
	}
	x := c.New(engine.F32, n, ch)
	c.Scoped(func() {
		out := c.New(engine.F32, z.Rows(), 2*ch)
		if c.Err() != nil {
			return
		}
		c.Fail(c.Stream.Fill(out, 0))
		c.Fail(c.Stream.Fill(x, 0))
		c.Gemm(m.L2Loss.Proj.Args(z, out.Slice(0, ch)))
		coef := direct
		coef.Last = true
		c.DiffusionStep(engine.DiffusionStepArgs{X: x, Y: x, Out: out, Guidance: guidance, Coef: coef, Temperature: 1})
	})
	return x
}

// Mixture draws each token from a mixture of diagonal Gaussians (P11; GIVT): a
// component by its logits, then mean + τ·exp(logvar/2)·δ. The projection's rows
// are the logits, then for each component the means and the log variances of all
// channels. z [n, Dd] without guidance: a guided mixture is none.
func (m *Model) Mixture(c *engine.Ctx, z, ids *engine.Tensor, seed uint64, temperature float32) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	n, ch, k := z.Rows(), m.Config.TokenDim(), m.Config.Mixtures
	x := c.New(engine.F32, n, ch)
	c.Scoped(func() {
		logits, table := c.New(engine.F32, n, k), c.New(engine.F32, n, 2*ch*k)
		pick, out := c.New(engine.I32, n), c.New(engine.F32, n, 2*ch)
		if c.Err() != nil {
			return
		}
		c.Gemm(m.GMMLoss.Proj.Args(z, logits))
		a := m.GMMLoss.Proj.Args(z, table)
		a.N0 = k
		c.Gemm(a)
		c.Categorical(engine.CategoricalArgs{Logits: logits, Y: pick, Stride: k, Temperature: 1, TopP: 1, IDs: ids,
			RNG: engine.RNG{Seed: seed, Purpose: engine.PurposeCategory}})
		c.Rows(engine.RowsArgs{Y: out, A: table.Reshape(n*k, 2*ch), IA: pick, Count: n})
		c.Fail(c.Stream.Fill(x, 0))
		c.DiffusionStep(engine.DiffusionStepArgs{X: x, Y: x, Out: out, Coef: direct, IDs: ids, Temperature: temperature,
			RNG: engine.RNG{Seed: seed, Purpose: engine.PurposeStepNoise}})
	})
	return x
}

// Confidence is MaskGIT's: the log-probability of the code drawn plus t·g, g the
// Gumbel draw of (seed, step, token, image) (P35).
func Confidence(logProb float32, t float64, seed uint64, step, token, image int) float64 {
	w := engine.Philox(engine.Counter(engine.PurposeConfidence, step, 0, token, image), seed)
	return float64(logProb) - t*math.Log(-math.Log(engine.Uniform(w[0])))
}
