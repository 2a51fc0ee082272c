package conformance

import (
	"fmt"
	"math"

	"margo/engine"
)

// attention is a case of Attention.
type attention struct {
	heads, dh int
	q, k      []int // lengths of the sequences
	d         engine.DType
	causal    bool
	separate  bool    // Q, K, V apart, not slices of one tensor
	aligned   bool    // every row begins at a multiple of 16 bytes, as whole tiles' do
	sharp     float64 // σ of Q and K, 1 if 0
	note      string
	exact     bool
	nan       bool
	bench     bool
	large     bool
	huge      bool
}

// wholeTiles marks cases whose rows are all aligned to 16 bytes, with enough keys for a loop over whole tiles.
const wholeTiles = "whole tiles"

// inAlignedRows: every row begins at a multiple of 16 bytes, as those of models do. Kernels have paths for that.
func (a attention) inAlignedRows() bool {
	return a.aligned || a.bench || a.large || a.note == wholeTiles
}

// rowGaps are the elements between rows of Q, K and V, where these are no slices of one tensor, and between rows of O.
func rowGaps(aligned bool) [2]int {
	if aligned {
		return [2]int{8, 8}
	}
	return [2]int{3, 2}
}

func (a attention) cases() *Case {
	s := fmt.Sprintf("attention/%v/%dx%d", a.d, a.heads, a.dh)
	if len(a.q) <= 6 {
		s += fmt.Sprintf(" q=%v k=%v", a.q, a.k)
	}
	if a.causal {
		s += " causal"
	}
	if a.note != "" {
		s += " " + a.note
	}
	return &Case{Name: s, Op: engine.OpAttention, DType: a.d, aligned: a.inAlignedRows(), Bench: a.bench || a.large, Large: a.large, Huge: a.huge, exact: a.exact, build: a.build}
}

// offsets are where sequences of these lengths start, after skip rows that
// belong to none.
func offsets(skip int, lengths []int) []int32 {
	off := []int32{int32(skip)}
	for _, n := range lengths {
		off = append(off, off[len(off)-1]+int32(n))
	}
	return off
}

func (a attention) build(e *env) work {
	width := a.heads * a.dh
	sigma := a.sharp
	if sigma == 0 {
		sigma = 1
	}
	q, k, v := bell(sigma), bell(sigma), bell(1)
	if a.exact { // equal weights, and a power of two of them
		q, v = constant(0), odd(2000)
		if a.d == engine.BF16 {
			v = integers(100)
		}
	}
	args := engine.AttentionArgs{Heads: a.heads, Causal: a.causal, Scale: float32(1 / math.Sqrt(float64(a.dh)))}
	gaps := rowGaps(a.inAlignedRows())
	same := len(a.q) == len(a.k) && !a.separate
	for i := range a.q {
		same = same && a.q[i] == a.k[i]
	}
	if same {
		off := offsets(0, a.q)
		rows := int(off[len(off)-1])
		if a.nan {
			// The last key of the first sequence, head 0, and a value of head 1 in
			// the middle of the second.
			all := bell(1)
			q = all.with(map[int]float32{(a.q[0]-1)*3*width + width: nan, (a.q[0]+a.q[1]/2)*3*width + 2*width + a.dh: nan})
		} else {
			q = wide(q, k, v, width)
		}
		qkv := e.in("QKV", a.d, q, rows, 3*width)
		args.Q, args.K, args.V = qkv.Slice(0, width), qkv.Slice(width, 2*width), qkv.Slice(2*width, 3*width)
		args.QOffHost, args.KOffHost = off, off
	} else {
		args.QOffHost, args.KOffHost = offsets(2, a.q), offsets(1, a.k)
		mq, mk := int(args.QOffHost[len(a.q)])+1, int(args.KOffHost[len(a.k)])+2
		e.gap = gaps[0]
		args.Q = e.in("Q", a.d, q, mq, width)
		args.K = e.in("K", a.d, k, mk, width)
		args.V = e.in("V", a.d, v, mk, width)
	}
	args.QOff, args.KOff = e.ints("QOff", args.QOffHost), e.ints("KOff", args.KOffHost)
	e.gap = gaps[1]
	args.O = e.inout("O", a.d, constant(5), args.Q.Rows(), width) // rows of no sequence stay 5
	return work{cost: args.Cost(), n: len(a.q), run: func(s engine.Stream) error { return s.Attention(args) },
		part: func(s engine.Stream, lo, hi int) error {
			b := args
			b.QOff, b.KOff = args.QOff.Slice(lo, hi+1), args.KOff.Slice(lo, hi+1)
			b.QOffHost, b.KOffHost = args.QOffHost[lo:hi+1], args.KOffHost[lo:hi+1]
			return s.Attention(b)
		}}
}

// wide makes rows of three parts of width elements.
func wide(q, k, v gen, width int) gen {
	return func(r *random, i int) float32 { return [...]gen{q, k, v}[i/width%3](r, i) }
}

func attentionCases() (cs []*Case) {
	add := func(a attention) { cs = append(cs, a.cases()) }
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		for _, dh := range []int{1, 8, 33, 64, 72, 80, 128, 512} {
			add(attention{heads: 2, dh: dh, q: []int{37, 1, 12}, k: []int{37, 1, 12}, d: d})
			add(attention{heads: 3, dh: dh, q: []int{5, 0, 33}, k: []int{70, 9, 17}, d: d, note: "cross"})
			add(attention{heads: 2, dh: dh, q: []int{21, 40}, k: []int{21, 40}, d: d, causal: true})
		}
		add(attention{heads: 1, dh: 64, q: []int{1}, k: []int{1}, d: d})
		add(attention{heads: 4, dh: 16, q: nil, k: nil, d: d, note: "no sequence"})
		add(attention{heads: 4, dh: 16, q: []int{0, 0}, k: []int{3, 0}, d: d, note: "no query"})
		add(attention{heads: 2, dh: 64, q: []int{3, 4, 0, 2}, k: []int{5, 0, 0, 1}, d: d, note: "no key"})
		add(attention{heads: 2, dh: 64, q: []int{3, 9, 1}, k: []int{8, 4, 7}, d: d, causal: true, note: "more and fewer keys"})
		add(attention{heads: 2, dh: 64, q: []int{113}, k: []int{203}, d: d, causal: true})
		add(attention{heads: 12, dh: 64, q: []int{113}, k: []int{203}, d: d})
		add(attention{heads: 2, dh: 64, q: []int{67, 20}, k: []int{67, 20}, d: d, sharp: 6, note: "sharp"})
		add(attention{heads: 2, dh: 80, q: []int{33}, k: []int{65}, d: d, sharp: 6, causal: true, note: "sharp"})
		add(attention{heads: 2, dh: 64, q: []int{7}, k: []int{400}, d: d, sharp: 6, note: "sharp, many keys"})
		add(attention{heads: 2, dh: 72, q: []int{25, 20}, k: []int{25, 20}, d: d, nan: true, note: "nan"})
		add(attention{heads: 2, dh: 64, q: []int{70, 20}, k: []int{70, 20}, d: d, nan: true, causal: true, note: "nan in the future"})
		add(attention{heads: 3, dh: 40, q: []int{9, 5, 66}, k: []int{8, 32, 64}, d: d, exact: true, note: "exact mean"})
		add(attention{heads: 2, dh: 16, q: []int{7, 2}, k: []int{1300, 1100}, d: d, note: "many keys"})
		add(attention{heads: 1, dh: 512, q: []int{3}, k: []int{1030}, d: d, note: "many keys"})
		many := make([]int, 40)
		for i := range many {
			many[i] = i * 7 % 13
		}
		add(attention{heads: 2, dh: 64, q: many, k: many, d: d, note: "40 sequences"})
		add(attention{heads: 12, dh: 64, q: []int{128}, k: []int{320}, d: d, bench: true, note: "last decoder block"})
		add(attention{heads: 12, dh: 64, q: []int{320, 100}, k: []int{320, 100}, d: d, bench: true, note: "trunk"})
		add(attention{heads: 1, dh: 512, q: []int{256}, k: []int{256}, d: d, bench: true, note: "tokenizer"})
		full := []int{320, 320, 320, 320, 320, 320, 320, 320}
		add(attention{heads: 12, dh: 64, q: full, k: full, d: d, large: true, note: "trunk, 4 images"})
		huge := make([]int, 64)
		for i := range huge {
			huge[i] = 320
		}
		add(attention{heads: 12, dh: 64, q: huge, k: huge, d: d, large: true, huge: true, note: "trunk, 32 images"})
		add(attention{heads: 16, dh: 80, q: huge, k: huge, d: d, large: true, huge: true, note: "MAR-H, 32 images"})
		add(attention{heads: 16, dh: 80, q: []int{320, 320}, k: []int{320, 320}, d: d, large: true, note: "MAR-H"})
	}
	for _, dh := range []int{16, 32, 48, 64, 72, 80, 96, 128, 192, 256} {
		add(attention{heads: 1, dh: dh, q: []int{200, 20}, k: []int{200, 20}, d: engine.BF16, causal: dh%3 == 0, note: wholeTiles})
	}
	add(attention{heads: 1, dh: 512, q: []int{40, 3}, k: []int{40, 3}, d: engine.BF16, causal: true, note: wholeTiles})
	add(attention{heads: 2, dh: 40, q: []int{70, 9}, k: []int{131, 9}, d: engine.BF16, aligned: true, note: "aligned"})
	add(attention{heads: 2, dh: 64, q: []int{70, 20}, k: []int{70, 20}, d: engine.BF16, nan: true, causal: true, aligned: true, note: "aligned, nan in the future"})
	return cs
}
