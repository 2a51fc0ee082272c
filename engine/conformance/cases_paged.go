package conformance

import (
	"fmt"
	"math"

	"margo/engine"
)

// paged is a case of Attention with Blocks. Rows of the cache that belong to no
// key are NaN, as are table entries that must not be read (-1).
type paged struct {
	heads, dh, block int
	q, k             []int
	d                engine.DType
	causal, shared   bool // shared: all sequences begin with the same block
	apart            bool // K and V apart, not columns of one tensor
	aligned          bool // every row begins at a multiple of 16 bytes, as those of models do: kernels have paths for that
	bench            bool
	note             string
}

func (p paged) cases() *Case {
	s := fmt.Sprintf("paged_attention/%v/%dx%d block=%d", p.d, p.heads, p.dh, p.block)
	if len(p.q) <= 6 {
		s += fmt.Sprintf(" q=%v k=%v", p.q, p.k)
	}
	if p.causal {
		s += " causal"
	}
	if p.note != "" {
		s += " " + p.note
	}
	return &Case{Name: s, Op: engine.OpPagedAttention, DType: p.d, aligned: p.aligned, Bench: p.bench, build: p.build}
}

// table spreads the sequences' blocks over a cache with three blocks to spare.
func (p paged) table(e *env) (table []int32, width, blocks int, used map[int]bool) {
	total := 0
	for _, k := range p.k {
		n := (k + p.block - 1) / p.block
		width, total = max(width, n+1), total+n
	}
	blocks = total + 3
	free := shuffled(e.random("table"), blocks, blocks)
	used = map[int]bool{} // rows of the cache
	first := int32(-1)
	for _, k := range p.k {
		for j := range width {
			b := int32(-1) // must not be read
			if j*p.block < k {
				b, free = free[0], free[1:]
				if p.shared && j == 0 && first >= 0 {
					b = first
				} else if first < 0 {
					first = b
				}
				for r := range min(p.block, k-j*p.block) {
					used[int(b)*p.block+r] = true
				}
			}
			table = append(table, b)
		}
	}
	return table, width, blocks, used
}

func (p paged) build(e *env) work {
	width := p.heads * p.dh
	table, cols, blocks, used := p.table(e)
	a := engine.AttentionArgs{Heads: p.heads, Causal: p.causal, Scale: float32(1 / math.Sqrt(float64(p.dh))), BlockSize: p.block,
		QOffHost: offsets(2, p.q), KOffHost: offsets(5, p.k)}
	rows := int(a.QOffHost[len(p.q)]) + 1
	gaps := rowGaps(p.aligned || p.bench)
	e.gap = gaps[0]
	a.Q = e.in("Q", p.d, bell(1), rows, width)
	hidden := func(cols int) gen {
		b := bell(1)
		return func(r *random, i int) float32 {
			v := b(r, i)
			if !used[i/cols] {
				return nan
			}
			return v
		}
	}
	if p.apart {
		a.K = e.in("K", p.d, hidden(width), blocks*p.block, width)
		a.V = e.in("V", p.d, hidden(width), blocks*p.block, width)
	} else {
		kv := e.in("KV", p.d, hidden(2*width), blocks*p.block, 2*width)
		a.K, a.V = kv.Slice(0, width), kv.Slice(width, 2*width)
	}
	a.Blocks = e.ints("Blocks", table, len(p.k), cols)
	a.QOff, a.KOff = e.ints("QOff", a.QOffHost), e.ints("KOff", a.KOffHost)
	e.gap = gaps[1]
	a.O = e.inout("O", p.d, constant(5), rows, width)
	return work{cost: a.Cost(), n: len(p.q), run: func(s engine.Stream) error { return s.Attention(a) },
		part: func(s engine.Stream, lo, hi int) error {
			b := a
			b.QOff, b.KOff = a.QOff.Slice(lo, hi+1), a.KOff.Slice(lo, hi+1)
			b.QOffHost, b.KOffHost = a.QOffHost[lo:hi+1], a.KOffHost[lo:hi+1]
			b.Blocks = a.Blocks.RowsAt(lo, hi)
			return s.Attention(b)
		}}
}

func pagedCases() (cs []*Case) {
	add := func(p paged) { cs = append(cs, p.cases()) }
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		for _, dh := range []int{8, 33, 64, 72, 80, 128} {
			add(paged{heads: 2, dh: dh, block: 16, q: []int{1, 1, 1}, k: []int{37, 1, 16}, d: d, causal: true})
		}
		for _, block := range []int{1, 7, 32, 64} {
			add(paged{heads: 3, dh: 64, block: block, q: []int{1, 5, 0, 33}, k: []int{70, 9, 17, 64}, d: d, causal: true, apart: block == 7})
		}
		add(paged{heads: 2, dh: 64, block: 16, q: []int{9, 40}, k: []int{33, 20}, d: d, note: "bidirectional"})
		add(paged{heads: 2, dh: 64, block: 16, q: []int{2, 3, 1}, k: []int{0, 48, 0}, d: d, note: "no key"})
		add(paged{heads: 2, dh: 64, block: 16, q: nil, k: nil, d: d, note: "no sequence"})
		add(paged{heads: 2, dh: 64, block: 8, q: []int{1, 1, 4}, k: []int{8, 31, 20}, d: d, causal: true, shared: true, note: "shared"})
		add(paged{heads: 2, dh: 32, block: 64, q: []int{3}, k: []int{700}, d: d, causal: true, note: "many keys"})
		for _, dh := range []int{16, 40, 64, 72, 128, 256, 512} {
			add(paged{heads: 2, dh: dh, block: 16, q: []int{1, 20, 1}, k: []int{37, 70, 1}, d: d, causal: true, aligned: true, note: "aligned"})
		}
		one, keys := make([]int, 24), make([]int, 24)
		for i := range one {
			one[i], keys[i] = 1, 64+i*11
		}
		add(paged{heads: 12, dh: 64, block: 64, q: one, k: keys, d: d, causal: true, bench: true, note: "24 sequences"})
	}
	return cs
}
