package ref

import (
	"math"

	"margo/engine"
)

// TimestepEmbedding: Y[i] = [cos(t f_j)…, sin(t f_j)…], f_j = MaxPeriod^(−j/half).
func (s *stream[F]) TimestepEmbedding(a engine.TimestepEmbeddingArgs) error {
	return s.do(engine.OpTimestepEmbedding, a.Check(), func() {
		t := load[F](s.dev, a.T)
		dim := a.Y.Cols()
		half := dim / 2
		y := make([]F, a.Y.Elems())
		for j := 0; j < half; j++ {
			f := fn(math.Exp, -fn(math.Log, F(a.MaxPeriod))*F(j)/F(half))
			for i := range t {
				y[i*dim+j] = fn(math.Cos, F(t[i]*f))
				y[i*dim+half+j] = fn(math.Sin, F(t[i]*f))
			}
		}
		store(s.dev, a.Y, 0, y)
	})
}

// Normal: Y[r,c] = NormalAt(RNG, c, token, image) with (token, image) = IDs[r].
func (s *stream[F]) Normal(a engine.NormalArgs) error {
	return s.do(engine.OpNormal, a.Check(), func() {
		store(s.dev, a.Y, 0, normals[F](s.dev, a.RNG, a.IDs, a.Y.Cols()))
	})
}

func normals[F number](d *Device, r engine.RNG, idTensor *engine.Tensor, ch int) []F {
	ids := ints(d, "IDs", idTensor, -1<<31, 1<<31)
	out := make([]F, len(ids)/2*ch)
	for i := range out {
		out[i] = normal[F](r, i%ch, ids[i/ch*2], ids[i/ch*2+1])
	}
	return out
}

// normal is engine.NormalAt in the arithmetic of F: √(−2 ln u₁)·cos or sin 2πu₂.
func normal[F number](r engine.RNG, e, token, image int) F {
	w := engine.Philox(engine.Counter(r.Purpose, r.Step, e, token, image), r.Seed)
	pair := e % 4 / 2 * 2
	radius := fn(math.Sqrt, -2*fn(math.Log, F(engine.Uniform(w[pair]))))
	angle := F(2*math.Pi) * F(engine.Uniform(w[pair+1]))
	if e%2 == 0 {
		return radius * fn(math.Cos, angle)
	}
	return radius * fn(math.Sin, angle)
}

// DiffusionStep, per token with ε_c, v from the conditional row of Out and ε_u
// from the unconditional one:
//
//	ε = ε_u + s(ε_c − ε_u), or ε_c without guidance
//	f = (v + 1)/2, logvar = f·MaxLog + (1 − f)·MinLog
//	Y = A·X − B·ε + exp(logvar/2)·Temperature·δ, without the last term if Last
func (s *stream[F]) DiffusionStep(a engine.DiffusionStepArgs) error {
	return s.do(engine.OpDiffusionStep, a.Check(), func() {
		x, out, guidance := load[F](s.dev, a.X), load[F](s.dev, a.Out), load[F](s.dev, a.Guidance)
		n, ch, k := a.Y.Rows(), a.Y.Cols(), a.Coef
		var delta []F
		if a.Noise != nil {
			delta = load[F](s.dev, a.Noise)
		} else if !k.Last {
			delta = normals[F](s.dev, a.RNG, a.IDs, ch)
		}
		for i := range x {
			r, c := i/ch, i%ch
			eps, v := out[r*2*ch+c], out[r*2*ch+ch+c]
			if guidance != nil {
				uncond := out[(n+r)*2*ch+c]
				eps = uncond + F(guidance[r]*(eps-uncond))
			}
			y := F(F(k.A)*x[i]) - F(F(k.B)*eps)
			if !k.Last {
				f := (v + 1) / 2
				logvar := F(f*F(k.MaxLog)) + F((1-f)*F(k.MinLog))
				y += F(F(fn(math.Exp, logvar/2)*F(a.Temperature)) * delta[i])
			}
			x[i] = y
		}
		store(s.dev, a.Y, 0, x)
	})
}
