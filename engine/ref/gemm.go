package ref

import (
	"math"

	"margo/engine"
)

// Gemm: Y = Residual + Gate ⊙ act(X·Wᵀ + Bias).
func (s *stream[F]) Gemm(a engine.GemmArgs) error {
	return s.do(engine.OpGemm, a.Check(), func() {
		w, bf16 := weights[F](s.dev, a.W, a.Packed)
		x := load[F](s.dev, a.X)
		if bf16 {
			toBF16(x)
		}
		m, n, k := a.Y.Rows(), a.Y.Cols(), a.X.Cols()
		y := make([]F, m*n)
		bias, gate, residual := load[F](s.dev, a.Bias), load[F](s.dev, a.Gate), load[F](s.dev, a.Residual)
		parallel(m, func(lo, hi int) { multiply(y[lo*n:hi*n], x[lo*k:hi*k], w[a.N0*k:(a.N0+n)*k], n, k) })
		for r := 0; r < m; r++ {
			for c := 0; c < n; c++ {
				v := y[r*n+c]
				if bias != nil {
					v += bias[a.N0+c]
				}
				v = act(a.Act, v)
				if gate != nil {
					v = F(gate[r/a.GateRows*n+c] * v)
				}
				if residual != nil {
					v = residual[r*n+c] + v
				}
				y[r*n+c] = v
			}
		}
		store(s.dev, a.Y, 0, y)
	})
}

// multiply sets y[r,c] = Σ_k x[r,k]·w[c,k], k in order from 0. Four columns at
// a time, because a processor can add for each independently.
func multiply[F number](y, x, w []F, n, k int) {
	for r := 0; r*n < len(y); r++ {
		xr := x[r*k : r*k+k]
		c := 0
		for ; c+4 <= n; c += 4 {
			w0, w1 := w[c*k:][:len(xr)], w[(c+1)*k:][:len(xr)]
			w2, w3 := w[(c+2)*k:][:len(xr)], w[(c+3)*k:][:len(xr)]
			var s0, s1, s2, s3 F
			for i, v := range xr {
				s0 += F(v * w0[i])
				s1 += F(v * w1[i])
				s2 += F(v * w2[i])
				s3 += F(v * w3[i])
			}
			y[r*n+c], y[r*n+c+1], y[r*n+c+2], y[r*n+c+3] = s0, s1, s2, s3
		}
		for ; c < n; c++ {
			y[r*n+c] = dot(xr, w[c*k:c*k+k])
		}
	}
}

func dot[F number](a, b []F) (sum F) {
	for i, v := range a {
		sum += F(v * b[i])
	}
	return sum
}

// act is the activation:
//
//	GELUErf   x·½(1 + erf(x/√2))
//	GELUTanh  x·½(1 + tanh(√(2/π)(x + 0.044715x³)))
//	SiLU      x/(1 + e^-x)
func act[F number](a engine.Activation, x F) F {
	switch a {
	case engine.GELUErf:
		return F(F(x*0.5) * (1 + fn(math.Erf, F(x*F(math.Sqrt2/2)))))
	case engine.GELUTanh:
		cube := F(F(F(x*x)*x) * F(0.044715))
		return F(F(x*0.5) * (1 + fn(math.Tanh, F(F(math.Sqrt(2/math.Pi))*(x+cube)))))
	case engine.SiLU:
		return x / (1 + fn(math.Exp, -x))
	}
	return x
}

// fn computes f in float64 and rounds once.
func fn[F number](f func(float64) float64, x F) F { return F(f(float64(x))) }
