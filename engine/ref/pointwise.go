package ref

import "margo/engine"

// GatedAdd: Y = X + Gate ⊙ H.
func (s *stream[F]) GatedAdd(a engine.GatedAddArgs) error {
	return s.do(engine.OpGatedAdd, a.Check(), func() {
		x, h, gate := load[F](s.dev, a.X), load[F](s.dev, a.H), load[F](s.dev, a.Gate)
		d := a.Y.Cols()
		for i := range x {
			v := h[i]
			if gate != nil {
				v = F(gate[i/d/a.GateRows*d+i%d] * v)
			}
			x[i] += v
		}
		store(s.dev, a.Y, 0, x)
	})
}

// Rows: Y[IY[r]] = act(A[IA[r]] + B[IB[r]]); a negative IA or IB adds 0.
func (s *stream[F]) Rows(a engine.RowsArgs) error {
	return s.do(engine.OpRows, a.Check(), func() {
		d := a.Y.Cols()
		sum := make([]F, a.Count*d)
		add := func(name string, t, index *engine.Tensor) {
			if t == nil {
				return
			}
			v, from := load[F](s.dev, t), ints(s.dev, name, index, -1<<31, t.Rows())
			for r := 0; r < a.Count; r++ {
				i := r
				if from != nil {
					i = from[r]
				}
				for c := 0; c < d && i >= 0; c++ {
					sum[r*d+c] += v[i*d+c]
				}
			}
		}
		add("IA", a.A, a.IA)
		add("IB", a.B, a.IB)
		to, seen := ints(s.dev, "IY", a.IY, 0, a.Y.Rows()), map[int]bool{}
		for r := 0; r < a.Count; r++ {
			row, i := sum[r*d:r*d+d], r
			for c := range row {
				row[c] = act(a.Act, row[c])
			}
			if to != nil {
				i = to[r]
			}
			if seen[i] {
				s.dev.fault("IY names row %d twice", i)
			}
			seen[i] = true
			store(s.dev, a.Y, i, row)
		}
	})
}

// Cast: Y = X·Scale + Shift.
func (s *stream[F]) Cast(a engine.CastArgs) error {
	return s.do(engine.OpCast, a.Check(), func() {
		x := load[F](s.dev, a.X)
		for i, v := range x {
			x[i] = F(v*F(a.Scale)) + F(a.Shift)
		}
		store(s.dev, a.Y, 0, x)
	})
}

// Patchify: token (y, x) of an image holds, at column (c·P + py)·P + px, the
// pixel (y·P + py, x·P + px) of channel c.
func (s *stream[F]) Patchify(a engine.PatchifyArgs) error {
	return s.do(engine.OpPatchify, a.Check(), func() {
		n, h, w, ch := a.X.Shape[0], a.X.Shape[1], a.X.Shape[2], a.X.Shape[3]
		p := a.P
		x, y := make([]F, a.X.Elems()), make([]F, a.Y.Elems())
		if a.Inverse {
			y = load[F](s.dev, a.Y)
		} else {
			x = load[F](s.dev, a.X)
		}
		for i := range x {
			c, px := i%ch, i/ch
			col, row, image := px%w, px/w%h, px/w/h
			token := (image*(h/p)+row/p)*(w/p) + col/p
			at := token*ch*p*p + (c*p+row%p)*p + col%p
			if a.Inverse {
				x[i] = y[at]
			} else {
				y[at] = x[i]
			}
		}
		if a.Inverse {
			store(s.dev, a.X, 0, x)
		} else if n > 0 {
			store(s.dev, a.Y, 0, y)
		}
	})
}
