package ref

import "margo/engine"

// Conv2D: Y[n,oy,ox,o] = Residual + Bias[o] + Σ_{ky,kx,c} up(X)[n, oy·Stride+ky−PadTop,
// ox·Stride+kx−PadLeft, c]·W[o,(ky,kx,c)], where up doubles height and width
// by repetition if Upsample, and pixels outside are 0.
func (s *stream[F]) Conv2D(a engine.Conv2DArgs) error {
	return s.do(engine.OpConv2D, a.Check(), func() {
		wt, bf16 := weights[F](s.dev, a.W, a.Packed)
		x := load[F](s.dev, a.X)
		if bf16 {
			toBF16(x)
		}
		bias, residual := load[F](s.dev, a.Bias), load[F](s.dev, a.Residual)
		h, w, cin := a.X.Shape[1], a.X.Shape[2], a.X.Shape[3]
		ho, wo, cout := a.Y.Shape[1], a.Y.Shape[2], a.Y.Shape[3]
		up := 1
		if a.Upsample {
			up = 2
		}
		k := a.Kernel * a.Kernel * cin
		y := make([]F, a.Y.Elems())
		parallel(a.Y.Shape[0]*ho, func(lo, hi int) {
			patch := make([]F, wo*k) // what each output pixel of a row sees
			for line := lo; line < hi; line++ {
				image, oy := line/ho, line%ho
				clear(patch)
				for i := 0; i < wo*a.Kernel*a.Kernel; i++ {
					ox, ky, kx := i/(a.Kernel*a.Kernel), i/a.Kernel%a.Kernel, i%a.Kernel
					iy, ix := oy*a.Stride+ky-a.PadTop, ox*a.Stride+kx-a.PadLeft
					if iy >= 0 && iy < h*up && ix >= 0 && ix < w*up {
						from := ((image*h+iy/up)*w + ix/up) * cin
						copy(patch[i*cin:(i+1)*cin], x[from:from+cin])
					}
				}
				out := y[line*wo*cout : (line+1)*wo*cout]
				multiply(out, patch, wt, cout, k)
				for i := range out {
					if bias != nil {
						out[i] += bias[i%cout]
					}
					if residual != nil {
						out[i] = residual[line*wo*cout+i] + out[i]
					}
				}
			}
		})
		store(s.dev, a.Y, 0, y)
	})
}
