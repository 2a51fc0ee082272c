package ref

import (
	"math"

	"margo/engine"
)

// Norm: Y = (LN(X)·Weight + Bias)·(1 + Scale) + Shift with
//
//	LN(x) = (x − mean)/√(var + Eps), var = Σ(x − mean)²/D
func (s *stream[F]) Norm(a engine.NormArgs) error {
	return s.do(engine.OpNorm, a.Check(), func() {
		x := load[F](s.dev, a.X)
		w, b := load[F](s.dev, a.Weight), load[F](s.dev, a.Bias)
		scale, shift := load[F](s.dev, a.Scale), load[F](s.dev, a.Shift)
		m, d := a.Y.Rows(), a.Y.Cols()
		parallel(m, func(lo, hi int) {
			for r := lo; r < hi; r++ {
				row := x[r*d : r*d+d]
				var sum, square F
				for _, v := range row {
					sum += v
				}
				mean := sum / F(d)
				for _, v := range row {
					square += F((v - mean) * (v - mean))
				}
				rstd := 1 / fn(math.Sqrt, square/F(d)+F(a.Eps))
				for c, v := range row {
					y := F((v - mean) * rstd)
					if w != nil {
						y = F(y * w[c])
					}
					if b != nil {
						y += b[c]
					}
					if scale != nil {
						y = F(y * (1 + scale[r/a.ModRows*d+c]))
					}
					if shift != nil {
						y += shift[r/a.ModRows*d+c]
					}
					row[c] = y
				}
			}
		})
		store(s.dev, a.Y, 0, x)
	})
}

// GroupNorm: Y = act((x − mean)/√(var + Eps)·Weight + Bias), mean and variance
// over the pixels and the channels of a group of one image. Sums are taken row
// of pixels by row of pixels.
func (s *stream[F]) GroupNorm(a engine.GroupNormArgs) error {
	return s.do(engine.OpGroupNorm, a.Check(), func() {
		x := load[F](s.dev, a.X)
		w, b := load[F](s.dev, a.Weight), load[F](s.dev, a.Bias)
		images, width, ch := a.X.Shape[0], a.X.Shape[2], a.X.Shape[3]
		pixels := a.X.Shape[1] * width
		per := ch / a.Groups
		// total sums f over the group's elements of an image.
		total := func(image, group int, f func(F) F) (sum F) {
			for p := 0; p < pixels; {
				var line F
				for end := p + width; p < end; p++ {
					at := (image*pixels+p)*ch + group*per
					for _, v := range x[at : at+per] {
						line += f(v)
					}
				}
				sum += line
			}
			return sum
		}
		parallel(images*a.Groups, func(lo, hi int) {
			for i := lo; i < hi; i++ {
				image, group := i/a.Groups, i%a.Groups
				n := F(pixels * per)
				mean := total(image, group, func(v F) F { return v }) / n
				square := total(image, group, func(v F) F { return F((v - mean) * (v - mean)) })
				rstd := 1 / fn(math.Sqrt, square/n+F(a.Eps))
				for p := 0; p < pixels; p++ {
					for c := group * per; c < (group+1)*per; c++ {
						v := &x[(image*pixels+p)*ch+c]
						y := F((*v - mean) * rstd)
						if w != nil {
							y = F(y * w[c])
						}
						if b != nil {
							y += b[c]
						}
						*v = act(a.Act, y)
					}
				}
			}
		})
		store(s.dev, a.Y, 0, x)
	})
}
