package conformance

import (
	"math"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

// categoricalMutant changes the arguments of Categorical.
func categoricalMutant(name, match string, mode Mode, f func(s engine.Stream, a *engine.CategoricalArgs)) mutant {
	return mutant{name: "categorical " + name, match: "^categorical/" + match, modes: []Mode{mode},
		categorical: func(s engine.Stream, a engine.CategoricalArgs) error { f(s, &a); return s.Categorical(a) }}
}

func categoricalMutants() []mutant {
	return []mutant{
		categoricalMutant("ignores the temperature", "", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.Temperature = 1 }),
		categoricalMutant("ignores top-k", "", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.TopK = 0 }),
		categoricalMutant("keeps one too few", ".*top-k=5", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.TopK = max(a.TopK-1, 0) }),
		categoricalMutant("ignores top-p", "", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.TopP = 1 }),
		categoricalMutant("takes the other method", "", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.Method ^= 1 }),
		categoricalMutant("ignores the stride", ".*stride", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.Stride = 0 }),
		categoricalMutant("is guided the wrong way", ".*guidance=true", Exact, func(s engine.Stream, a *engine.CategoricalArgs) {
			a.Guidance = changed(s, a.Guidance, func(_, _ int, v float32) float32 { return 1 - v })
		}),
		categoricalMutant("counts the step wrongly", "", Exact, func(_ engine.Stream, a *engine.CategoricalArgs) { a.RNG.Step ^= 1 }),
		categoricalMutant("depends on the row", "", Batch, func(s engine.Stream, a *engine.CategoricalArgs) {
			a.IDs = changed(s, a.IDs, func(r, c int, v float32) float32 { return v + float32(r*(1-c)) })
		}),
		categoricalMutant("takes NaN for a small number", ".*special", Exact, func(s engine.Stream, a *engine.CategoricalArgs) {
			a.Logits = changed(s, a.Logits, func(_, _ int, v float32) float32 {
				if v != v {
					return -9
				}
				return v
			})
		}),
		{name: "categorical has the probability of another", match: "^categorical/", modes: []Mode{Oracle},
			categorical: func(s engine.Stream, a engine.CategoricalArgs) error {
				if err := s.Categorical(a); err != nil || a.LogProb == nil || a.LogProb.Elems() < 2 {
					return err
				}
				return s.Copy(a.LogProb.Slice(0, 1), a.LogProb.Slice(1, 2))
			}},
	}
}

// A device may round: a temperature or top-p that is one unit in the last place
// of F32 away, which is 2^29 times the rounding of float64, changes no index of
// the table. So no case depends on rounding, and comparing exactly is fair.
func TestCategoricalMargins(t *testing.T) {
	for _, n := range []int{-1, 1} {
		m := mutant{categorical: func(s engine.Stream, a engine.CategoricalArgs) error {
			if a.Temperature > 0 {
				a.Temperature = ulps(a.Temperature, n)
			}
			if a.TopP < 1 {
				a.TopP = ulps(a.TopP, n)
			}
			return s.Categorical(a)
		}}
		for _, c := range categoricalCases() {
			for _, r := range c.Check(faulty{ref.New(ref.Rounded), &m}) {
				if r.Status == Fail {
					t.Errorf("%+d: %v", n, r)
				}
			}
		}
	}
}

func pagedMutants() []mutant {
	table := func(name, match string, mode Mode, f func(a engine.AttentionArgs, r, c int, v float32) float32) mutant {
		return mutant{name: "paged_attention " + name, match: "^paged_attention/" + match, modes: []Mode{mode},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				a.Blocks = changed(s, a.Blocks, func(r, c int, v float32) float32 { return f(a, r, c, v) })
				return s.Attention(a)
			}}
	}
	return []mutant{
		table("takes another sequence's block", "", NaN, func(a engine.AttentionArgs, _, _ int, v float32) float32 {
			if v < 0 {
				return v
			}
			return float32(int(v+1) % (a.K.Rows() / a.BlockSize))
		}),
		{name: "paged_attention reads one key too many", match: "^paged_attention/.*k=", modes: []Mode{NaN},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				k := append([]int32(nil), a.KOffHost...)
				for i := 1; i < len(k); i++ {
					n := a.KOffHost[i] - a.KOffHost[i-1]
					if n%int32(a.BlockSize) != 0 {
						n++
					}
					k[i] = k[i-1] + n
				}
				return s.Attention(withOffsets(s, a, a.QOffHost, k))
			}},
		{name: "paged_attention forgets the newest key", match: "^paged_attention/", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error {
				k := append([]int32(nil), a.KOffHost...)
				for i := 1; i < len(k); i++ {
					k[i] = k[i-1] + max(a.KOffHost[i]-a.KOffHost[i-1]-1, 0)
				}
				return s.Attention(withOffsets(s, a, a.QOffHost, k))
			}},
		{name: "paged_attention ignores causal", match: "^paged_attention/", modes: []Mode{Oracle},
			attention: func(s engine.Stream, a engine.AttentionArgs) error { a.Causal = false; return s.Attention(a) }},
	}
}

// TestPagedIsAttention: blocks one after the other are plain attention, bit for bit.
func TestPagedIsAttention(t *testing.T) {
	dev := ref.New(ref.Rounded)
	s := must(dev.NewStream())
	const block, width = 4, 16
	off := offsets(0, []int{8, 12})
	e := &env{dev: dev, s: s, name: "paged", guard: 64}
	qkv := e.in("QKV", engine.F32, bell(1), 20, 3*width)
	a := engine.AttentionArgs{Q: qkv.Slice(0, width), K: qkv.Slice(width, 2*width), V: qkv.Slice(2*width, 3*width), O: e.out("O", engine.F32, 20, width),
		Heads: 2, Scale: float32(1 / math.Sqrt(8)), Causal: true, QOff: e.ints("QOff", off), KOff: e.ints("KOff", off), QOffHost: off, KOffHost: off}
	plain := e.run(func(s engine.Stream) error { return s.Attention(a) })
	a.Blocks, a.BlockSize = e.ints("Blocks", []int32{0, 1, -1, 2, 3, 4}, 2, 3), block
	if err := e.differ(plain, e.run(func(s engine.Stream) error { return s.Attention(a) })); err != nil {
		t.Error(err)
	}
	bad := a
	bad.Blocks = e.ints("Bad", []int32{0, 5, -1, 2, 3, 4}, 2, 3)
	e.upload()
	if err := s.Attention(bad); err == nil {
		t.Error("block 5 of 5 is accepted")
	}
	bad.KOffHost = []int32{0, 13, 20}
	if err := bad.Check(); err == nil {
		t.Error("13 keys in 3 blocks of 4 are accepted")
	}
	e.close()
}
