package conformance

import (
	"math"

	"margo/engine"
)

func gemmMutants() []mutant {
	call := 0
	return []mutant{
		{name: "gemm drops the bias", match: "^gemm/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error { a.Bias = nil; return s.Gemm(a) }},
		{name: "gemm takes the first columns", match: "^gemm/.* columns ", modes: []Mode{Oracle},
			gemm: func(s engine.Stream, a engine.GemmArgs) error { a.N0 = 0; return s.Gemm(a) }},
		{name: "gemm takes the bias from 0", match: "^gemm/.* columns ", modes: []Mode{Oracle},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if a.Bias != nil {
					n0 := a.N0
					a.Bias = changed(s, a.Bias, func(_, c int, v float32) float32 { return v })
					check(s.Copy(a.Bias.Slice(n0, n0+a.Y.Cols()), changed(s, a.Bias.Slice(0, a.Y.Cols()), func(_, _ int, v float32) float32 { return v })))
				}
				return s.Gemm(a)
			}},
		{name: "gemm uses one gate row for all", match: "^gemm/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error { a.GateRows = max(a.Y.Rows(), 1); return s.Gemm(a) }},
		{name: "gemm has tanh GELU for erf GELU", match: "^gemm/", modes: []Mode{Oracle},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if a.Act == engine.GELUErf {
					a.Act = engine.GELUTanh
				}
				return s.Gemm(a)
			}},
		{name: "gemm ignores the stride of X", match: "^gemm/.*strided", modes: []Mode{NaN},
			gemm: func(s engine.Stream, a engine.GemmArgs) error { a.X = dense(a.X); return s.Gemm(a) }},
		{name: "gemm ignores the stride of Y", match: "^gemm/.*strided", modes: []Mode{Guards},
			gemm: func(s engine.Stream, a engine.GemmArgs) error { a.Y = dense(a.Y); return s.Gemm(a) }},
		{name: "gemm writes one element too many", match: "^gemm/", modes: []Mode{Guards},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil {
					return err
				}
				return behind(s, a.Y)
			}},
		{name: "gemm overwrites its input", match: "^gemm/", modes: []Mode{Guards},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil {
					return err
				}
				return edit(s, a.X, func(_, _ int, v float32) float32 { return v / 2 })
			}},
		{name: "gemm adds to what Y held", match: "^gemm/", modes: []Mode{NaN},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if a.Residual == nil && a.Y.DType == engine.F32 {
					a.Residual = a.Y
				}
				return s.Gemm(a)
			}},
		{name: "gemm forgets a last odd row", match: "^gemm/", modes: []Mode{NaN},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if m := a.Y.Rows(); m%2 == 1 {
					a.X, a.Y, a.Residual = a.X.RowsAt(0, m-1), a.Y.RowsAt(0, m-1), rowsAt(a.Residual, 0, m-1)
				}
				return s.Gemm(a)
			}},
		{name: "gemm forgets the last of an odd K", match: "^gemm/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if k := a.X.Cols(); k%2 == 1 {
					a.X = changed(s, a.X, func(_, c int, v float32) float32 {
						if c == k-1 {
							return 0
						}
						return v
					})
				}
				return s.Gemm(a)
			}},
		{name: "gemm is not deterministic", match: "^gemm/", modes: []Mode{Determinism},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil || a.Y.Elems() == 0 {
					return err
				}
				call++
				first := a.Y.RowsAt(0, 1).Slice(0, 1)
				return edit(s, first, func(_, _ int, v float32) float32 { return ulps(v, call&1<<16) })
			}},
		{name: "gemm has another kernel for one row", match: "^gemm/", modes: []Mode{Batch},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil || a.Y.Rows() != 1 {
					return err
				}
				return edit(s, a.Y, func(_, _ int, v float32) float32 { return ulps(v, 1<<16) })
			}},
		{name: "gemm truncates its results to BF16", match: "^gemm/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				return truncated(s, a.Y, func(y *engine.Tensor) error { a.Y = y; return s.Gemm(a) })
			}},
		{name: "gemm truncates its operands to BF16", match: "^gemm/bf16/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if a.X.DType == engine.F32 {
					a.X = changed(s, a.X, func(_, _ int, v float32) float32 { return math.Float32frombits(math.Float32bits(v) &^ 0xffff) })
				}
				return s.Gemm(a)
			}},
		{name: "gemm does not round its operands to BF16", match: "^gemm/bf16/", modes: []Mode{Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if a.X.DType == engine.F32 && a.W.Buf != nil { // unpacked: W as F32
					w := tensor(s.Device(), engine.F32, a.W.Shape...)
					check(s.Cast(engine.CastArgs{X: a.W, Y: w, Scale: 1}))
					a.W = w
				} else if a.X.DType == engine.F32 { // as near as can be had: BF16 with 4 more bits
					a.X = changed(s, a.X, func(_, _ int, v float32) float32 { return v * 1.001 })
				}
				return s.Gemm(a)
			}},
		{name: "gemm uses TF32", match: "^gemm/f32/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				a.X = changed(s, a.X, func(_, _ int, v float32) float32 { return tf32(v) })
				return s.Gemm(a)
			}},
		{name: "gemm swallows NaN", match: "^gemm/", modes: []Mode{NaN},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil {
					return err
				}
				return edit(s, a.Y, func(_, _ int, v float32) float32 {
					if v != v {
						return 0
					}
					return v
				})
			}},
		{name: "gemm saturates infinities", match: "^gemm/", modes: []Mode{NaN},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil {
					return err
				}
				return edit(s, a.Y, func(_, _ int, v float32) float32 { return max(min(v, 3e38), -3e38) })
			}},
		{name: "gemm sums in BF16", match: "^gemm/f32/", modes: []Mode{Oracle, Exact},
			gemm: func(s engine.Stream, a engine.GemmArgs) error {
				if err := s.Gemm(a); err != nil {
					return err
				}
				return edit(s, a.Y, func(_, _ int, v float32) float32 { return engine.FromBF16(engine.ToBF16(v)) })
			}},
	}
}

// oneByOne calls Attention for every sequence by itself, with the rows of keys
// that f gives.
func oneByOne(s engine.Stream, a engine.AttentionArgs, f func(q0, q1, k0, k1 int32) (int32, int32, bool)) error {
	for i := 0; i+1 < len(a.QOffHost); i++ {
		q0, q1 := a.QOffHost[i], a.QOffHost[i+1]
		k0, k1, run := f(q0, q1, a.KOffHost[i], a.KOffHost[i+1])
		if !run {
			continue
		}
		b := withOffsets(s, a, []int32{q0, q1}, []int32{k0, k1})
		if err := s.Attention(b); err != nil {
			return err
		}
	}
	return nil
}

func withOffsets(s engine.Stream, a engine.AttentionArgs, q, k []int32) engine.AttentionArgs {
	put := func(v []int32) *engine.Tensor {
		t := tensor(s.Device(), engine.I32, len(v))
		w := make([]uint32, len(v))
		for i, x := range v {
			w[i] = uint32(x)
		}
		check(s.CopyIn(t, toBytes(w, engine.I32)))
		return t
	}
	a.QOff, a.KOff, a.QOffHost, a.KOffHost = put(q), put(k), q, k
	return a
}

func attentionMutants() []mutant {
	return []mutant{
		{name: "attention ignores causal", match: "^attention/", modes: []Mode{Oracle, NaN},
			attention: func(s engine.Stream, a engine.AttentionArgs) error { a.Causal = false; return s.Attention(a) }},
		{name: "attention's causal mask is off by one", match: "^attention/.*causal", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				return oneByOne(s, a, func(q0, q1, k0, k1 int32) (int32, int32, bool) { return k0, max(k1-1, k0), true })
			}},
		{name: "attention has no scale", match: "^attention/", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error { a.Scale = 1; return s.Attention(a) }},
		{name: "attention lets sequences see each other", match: "^attention/", modes: []Mode{Oracle, NaN},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				n := len(a.QOffHost) - 1
				return s.Attention(withOffsets(s, a, []int32{a.QOffHost[0], a.QOffHost[n]}, []int32{a.KOffHost[0], a.KOffHost[n]}))
			}},
		{name: "attention reads one key too many", match: "^attention/", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				return oneByOne(s, a, func(q0, q1, k0, k1 int32) (int32, int32, bool) { return k0, min(k1+1, int32(a.K.Rows())), true })
			}},
		{name: "attention leaves queries without keys alone", match: "^attention/", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				return oneByOne(s, a, func(q0, q1, k0, k1 int32) (int32, int32, bool) { return k0, k1, k1 > k0 })
			}},
		{name: "attention clears rows of no sequence", match: "^attention/", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				if err := s.Fill(a.O, 0); err != nil {
					return err
				}
				return s.Attention(a)
			}},
		{name: "attention rounds V to BF16", match: "^attention/f32/", modes: []Mode{Oracle, Exact},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				a.V = changed(s, a.V, func(_, _ int, v float32) float32 { return engine.FromBF16(engine.ToBF16(v)) })
				return s.Attention(a)
			}},
		{name: "attention truncates to BF16", match: "^attention/bf16/", modes: []Mode{Oracle, Exact},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				wide := func(t *engine.Tensor) *engine.Tensor {
					u := tensor(s.Device(), engine.F32, t.Shape...)
					check(s.Cast(engine.CastArgs{X: t, Y: u, Scale: 1}))
					return u
				}
				a.Q, a.K, a.V = wide(a.Q), wide(a.K), wide(a.V)
				keep := a.O
				return truncated(s, keep, func(y *engine.Tensor) error {
					check(s.Cast(engine.CastArgs{X: keep, Y: y, Scale: 1}))
					a.O = y
					return s.Attention(a)
				})
			}},
		{name: "attention ignores the stride of O", match: "^attention/", modes: []Mode{Guards},
			attention: func(s engine.Stream, a engine.AttentionArgs) error { a.O = dense(a.O); return s.Attention(a) }},
		{name: "attention splits keys when there is one sequence", match: "^attention/", modes: []Mode{Batch},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				if err := s.Attention(a); err != nil || len(a.QOffHost) != 2 {
					return err
				}
				rows := a.O.RowsAt(int(a.QOffHost[0]), int(a.QOffHost[1]))
				return edit(s, rows, func(_, _ int, v float32) float32 { return ulps(v, 1<<16) })
			}},
	}
}
