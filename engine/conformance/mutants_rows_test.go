package conformance

import (
	"math"

	"margo/engine"
)

// singlePass computes plain LayerNorm rows with var = E[x²] − E[x]² in float32.
func singlePass(s engine.Stream, x, y *engine.Tensor, eps float32) error {
	wide := tensor(s.Device(), engine.F32, x.Rows(), x.Cols())
	check(s.Cast(engine.CastArgs{X: x, Y: wide, Scale: 1}))
	for r := 0; r < wide.Rows(); r++ {
		b := make([]byte, 4*wide.Cols())
		check(s.CopyOut(b, wide.RowsAt(r, r+1)))
		var sum, square float32
		w := fromBytes(b, engine.F32)
		for _, v := range w {
			sum += floatOf(v)
			square += floatOf(v) * floatOf(v)
		}
		n := float32(len(w))
		mean := sum / n
		rstd := float32(1 / math.Sqrt(float64(square/n-mean*mean+eps)))
		for i, v := range w {
			w[i] = math.Float32bits((floatOf(v) - mean) * rstd)
		}
		check(s.CopyIn(wide.RowsAt(r, r+1), toBytes(w, engine.F32)))
	}
	return s.Cast(engine.CastArgs{X: wide, Y: y, Scale: 1})
}

func rowMutants() []mutant {
	plain := func(a engine.NormArgs) bool { return a.Weight == nil && a.Scale == nil }
	return []mutant{
		{name: "norm forgets 1+ of the scale", match: "^norm/", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error {
				a.Scale = changed(s, a.Scale, func(_, _ int, v float32) float32 { return v - 1 })
				return s.Norm(a)
			}},
		{name: "norm swaps scale and shift", match: "^norm/", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error {
				a.Scale, a.Shift = a.Shift, a.Scale
				return s.Norm(a)
			}},
		{name: "norm has unbiased variance", match: "^norm/", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error {
				d := float64(a.X.Cols())
				if err := s.Norm(a); err != nil || !plain(a) || d < 2 {
					return err
				}
				f := float32(math.Sqrt((d - 1) / d))
				return edit(s, a.Y, func(_, _ int, v float32) float32 { return v * f })
			}},
		{name: "norm takes one pass", match: "^norm/.*large mean", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error { return singlePass(s, a.X, a.Y, a.Eps) }},
		{name: "norm has no eps", match: "^norm/", modes: []Mode{Oracle, NaN},
			norm: func(s engine.Stream, a engine.NormArgs) error { a.Eps = 0; return s.Norm(a) }},
		{name: "norm modulates all rows alike", match: "^norm/", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error { a.ModRows = max(a.X.Rows(), 1); return s.Norm(a) }},
		{name: "norm takes the modulation as dense", match: "^norm/", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error {
				a.Scale, a.Shift = dense(a.Scale), dense(a.Shift)
				return s.Norm(a)
			}},
		{name: "norm truncates to BF16", match: "^norm/", modes: []Mode{Oracle},
			norm: func(s engine.Stream, a engine.NormArgs) error {
				return truncated(s, a.Y, func(y *engine.Tensor) error { a.Y = y; return s.Norm(a) })
			}},
		{name: "norm spreads NaN to the next row", match: "^norm/.*nan", modes: []Mode{NaN},
			norm: func(s engine.Stream, a engine.NormArgs) error {
				if err := s.Norm(a); err != nil || a.Y.Rows() != 6 {
					return err
				}
				return s.Fill(a.Y.RowsAt(2, 3).Slice(0, 1), nan)
			}},
		{name: "gated_add ignores the gate", match: "^gated_add/", modes: []Mode{Oracle, Exact},
			gatedAdd: func(s engine.Stream, a engine.GatedAddArgs) error { a.Gate = nil; return s.GatedAdd(a) }},
		{name: "gated_add uses one gate row for all", match: "^gated_add/", modes: []Mode{Oracle},
			gatedAdd: func(s engine.Stream, a engine.GatedAddArgs) error {
				a.GateRows = max(a.Y.Rows(), 1)
				return s.GatedAdd(a)
			}},
		{name: "gated_add ignores the stride of Y", match: "^gated_add/.*strided$", modes: []Mode{Guards},
			gatedAdd: func(s engine.Stream, a engine.GatedAddArgs) error {
				if a.Y != a.X {
					a.Y = dense(a.Y)
				}
				return s.GatedAdd(a)
			}},
		{name: "rows takes a negative index for 0", match: "^rows/", modes: []Mode{Exact, Oracle},
			rows: func(s engine.Stream, a engine.RowsArgs) error {
				a.IA = changed(s, a.IA, func(_, _ int, v float32) float32 { return max(v, 0) })
				return s.Rows(a)
			}},
		{name: "rows clears what is not named", match: "^rows/", modes: []Mode{Exact},
			rows: func(s engine.Stream, a engine.RowsArgs) error {
				if err := s.Fill(a.Y, 0); err != nil {
					return err
				}
				return s.Rows(a)
			}},
		{name: "rows does not scatter", match: "^rows/", modes: []Mode{Exact},
			rows: func(s engine.Stream, a engine.RowsArgs) error { a.IY = nil; return s.Rows(a) }},
		{name: "rows forgets B", match: "^rows/", modes: []Mode{Exact, Oracle},
			rows: func(s engine.Stream, a engine.RowsArgs) error { a.B, a.IB = nil, nil; return s.Rows(a) }},
		{name: "rows forgets the activation", match: "^rows/", modes: []Mode{Oracle},
			rows: func(s engine.Stream, a engine.RowsArgs) error { a.Act = engine.Identity; return s.Rows(a) }},
		{name: "cast truncates", match: "^cast/", modes: []Mode{Exact, Oracle},
			cast: func(s engine.Stream, a engine.CastArgs) error {
				return truncated(s, a.Y, func(y *engine.Tensor) error { a.Y = y; return s.Cast(a) })
			}},
		{name: "cast forgets the shift", match: "^cast/", modes: []Mode{Exact, Oracle},
			cast: func(s engine.Stream, a engine.CastArgs) error { a.Shift = 0; return s.Cast(a) }},
		{name: "cast turns NaN into a number", match: "^cast/", modes: []Mode{NaN},
			cast: func(s engine.Stream, a engine.CastArgs) error {
				if err := s.Cast(a); err != nil {
					return err
				}
				return edit(s, a.Y, func(_, _ int, v float32) float32 {
					if v != v {
						return float32(math.Inf(1)) // what rounding without a test does
					}
					return v
				})
			}},
	}
}

func systemMutants() []mutant {
	var later func() error // a copy that waits for the next one
	return []mutant{
		{name: "copy in takes the data later", match: "^system/copies", modes: []Mode{System},
			copyIn: func(s engine.Stream, t *engine.Tensor, b []byte) error {
				if later != nil {
					check(later())
				}
				later = func() error { return s.CopyIn(t, b) }
				return nil
			}},
		{name: "copy ignores strides", match: "^system/copies", modes: []Mode{System},
			copy: func(s engine.Stream, dst, src *engine.Tensor) error { return s.Copy(dense(dst), dense(src)) }},
		{name: "fill ignores strides", match: "^system/fill", modes: []Mode{System},
			fill: func(s engine.Stream, t *engine.Tensor, v float32) error { return s.Fill(dense(t), v) }},
		{name: "capture runs the kernels", match: "^system/graphs", modes: []Mode{System},
			capture: func(s engine.Stream, f func() error) (engine.Graph, error) {
				if err := f(); err != nil {
					return nil, err
				}
				return s.Capture(func() error { return nil })
			}},
		{name: "alloc calls too much memory invalid", match: "^system/memory", modes: []Mode{System},
			alloc: func(d engine.Device, n int) (engine.Buffer, error) {
				if n > 1<<40 {
					return nil, engine.Errorf("alloc", engine.Invalid, "%d bytes", n)
				}
				return d.Alloc(n)
			}},
		{name: "gemm accepts anything", match: "^system/refusals", modes: []Mode{System},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if a.Check() != nil {
					return nil
				}
				return s.Gemm(a)
			}},
		{name: "head_steps cannot be cancelled", match: "^system/cancel", modes: []Mode{System},
			head: func(s engine.Stream, a engine.HeadStepsArgs) error { a.Cancel = nil; return s.HeadSteps(a) }},
	}
}
