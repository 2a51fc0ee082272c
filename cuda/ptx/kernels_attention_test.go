package ptx

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"margo/engine"
)

// attentionCall is a call of Attention in one of the kernels.
type attentionCall struct {
	d       engine.DType
	dh      int
	heads   int
	queries []int32
	keys    []int32
	causal  bool
	paged   bool
	wrong   bool    // the table names a block that does not exist, for keys 16 to 31 of the last sequence
	nan     bool    // the last key of each sequence is NaN: spoils who sees it, and nobody else
	scale   float32 // 0: 1/√dh
	grows   bool    // later keys are larger, so that sums are rescaled from tile to tile
	rows    int     // queries of a block
	tile    int     // keys of one tile
	threads int
	shared  int
	decode  bool
	sm90    bool // the kernels of attention_sm90a.cu, which take tensor maps
}

const cacheBlock = 16 // keys of a block of the cache

func sums(n []int32) []int32 {
	off := []int32{0}
	for _, v := range n {
		off = append(off, off[len(off)-1]+v)
	}
	return off
}

func (a attentionCall) run(t testing.TB, m *Module, name string) {
	t.Helper()
	p, f := a.launched(t, m, name)
	p.verify(f)
}

func (a attentionCall) launched(t testing.TB, m *Module, name string) (*problem, call) {
	t.Helper()
	qoff, koff := sums(a.queries), sums(a.keys)
	seqs, width := len(a.queries), a.heads*a.dh
	if a.scale == 0 {
		a.scale = float32(1 / math.Sqrt(float64(a.dh)))
	}
	// The table of blocks goes backwards, with a block of nobody between two.
	rows, perSeq := int(koff[seqs]), 0
	var table []int32
	var owned, last []bool // rows of K and V that hold keys, the last of a sequence
	if a.paged {
		for _, k := range a.keys {
			perSeq = max(perSeq, (int(k)+cacheBlock-1)/cacheBlock)
		}
		count := int32(2*seqs*perSeq + 1)
		rows = int(count) * cacheBlock
		owned, last = make([]bool, rows), make([]bool, rows)
		for s, k := range a.keys {
			for b := range perSeq {
				table = append(table, count-1-int32(2*(s*perSeq+b)))
				for j := b * cacheBlock; j < min((b+1)*cacheBlock, int(k)); j++ {
					row := int(table[len(table)-1])*cacheBlock + j%cacheBlock
					owned[row], last[row] = true, j == int(k)-1
				}
			}
		}
		if a.wrong { // the first block serves in its place
			table[(seqs-1)*perSeq+1] = 0
			for r := range cacheBlock {
				owned[r] = true
			}
		}
	} else {
		owned, last = make([]bool, rows), make([]bool, rows)
		for r := range rows {
			owned[r] = true
		}
		for _, o := range koff[1:] {
			last[int(o)-1] = true
		}
	}
	key := func(r *rand.Rand, i int) float32 {
		if row := i / width; !owned[row] || a.nan && last[row] {
			return float32(math.NaN())
		}
		return float32(r.NormFloat64())
	}
	growing := func(r *rand.Rand, i int) float32 {
		if a.grows {
			return key(r, i) * float32(1+i/width/(a.tile/2))
		}
		return key(r, i)
	}
	p := newProblem(t)
	p.gap = 8
	if a.sm90 {
		p.cc = 90
	}
	q, k, v := p.in(a.d, normal(1), int(qoff[seqs]), width), p.in(a.d, growing, rows, width), p.in(a.d, key, rows, width)
	o := p.out(a.d, int(qoff[seqs]), width)
	p.gap = 0
	pq, pk := p.in(engine.I32, fixed(qoff...), seqs+1), p.in(engine.I32, fixed(koff...), seqs+1)
	var blocks *operandOf
	at, blockCount, causal := uint64(0), 0, int32(0)
	if a.paged {
		blocks = p.in(engine.I32, fixed(table...), seqs, perSeq)
		at, blockCount = blocks.at, rows/cacheBlock
	}
	told := uint32(0)
	if a.wrong {
		b, err := p.mem.Bytes(at+uint64(4*((seqs-1)*perSeq+1)), 4)
		if err != nil {
			t.Fatal(err)
		}
		store(b, uint64(blockCount))
		told = 1<<31 + uint32(seqs-1) // DEVICE_ERROR_BLOCKS of plugin.h
	}
	if a.causal {
		causal = 1
	}
	bad := p.mem.U32([]uint32{0})
	most := int32(0)
	for _, n := range a.queries {
		most = max(most, n)
	}
	// What was not written is no NaN here but 12: the kernels compute rows anew that are not finite.
	l := Launch{Poison: 0x41, Grid: [3]int{(int(most) + a.rows - 1) / a.rows, a.heads, seqs}, Block: [3]int{a.threads}, Shared: a.shared,
		Args: []any{args(q.at, k.at, v.at, o.at, pq.at, pk.at, int32(q.ld), int32(k.ld), int32(v.ld), int32(o.ld), int32(a.dh), causal, a.scale,
			at, int32(perSeq), int32(cacheBlock), int32(blockCount), bad)}}
	if a.sm90 {
		var maps []byte
		for _, x := range []*operandOf{q, k, v} {
			maps = append(maps, headsMap(t, x.at, x.shape[0], a.heads, a.dh, x.ld, 64)...)
			if a.dh%64 == 0 {
				maps = append(maps, make([]byte, 128)...)
			} else {
				maps = append(maps, headsMap(t, x.at, x.shape[0], a.heads, a.dh, x.ld, 16)...)
			}
		}
		l.Args = append([]any{maps}, l.Args...)
	}
	if a.decode {
		l.Grid = [3]int{a.heads, seqs, 1}
	}
	launch(t, m, p.mem, l, name)
	if e := words(t, p.mem, bad, 1)[0]; e != told {
		t.Errorf("the error word is %#x, not %#x", e, told)
	}
	return p, func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		c := engine.AttentionArgs{Q: at(q), K: at(k), V: at(v), O: at(o), Heads: a.heads, Scale: a.scale, Causal: a.causal,
			QOff: at(pq), KOff: at(pk), QOffHost: qoff, KOffHost: koff}
		if a.paged {
			c.Blocks, c.BlockSize = at(blocks), cacheBlock
		}
		return s.Attention(c)
	}
}

// attentionPlan reads the plan of a bf16 kernel: D and the block's threads, rows and shared memory as attention_mma.cuh says.
func attentionPlan(name string) (a attentionCall) {
	n, _ := tile(name)
	d, keys, strips, split := n[0], n[1], n[2], n[3]
	pitch := d
	if d/8%2 == 0 {
		pitch = d + 8
	}
	a = attentionCall{d: engine.BF16, dh: d, rows: 16 * strips, tile: keys, threads: 32 * strips * split, shared: 2 * pitch * (16*strips + 4*keys)}
	flags := strings.Split(name, "Lb")
	if flags[1][0] == '0' { // no copies of 16 bytes
		a.dh = d - 3
	}
	a.paged = flags[2][0] == '1'
	return a
}

// both runs two heads: two whole tiles of keys and a cut one for a strip more than whole, and a sequence that is almost empty. Then one
// causal, with a negative scale and keys that grow: the first query sees three tiles whole, of which the kernel's loop without masks takes
// two. Then three queries of which only the last sees a key of NaN.
func (a attentionCall) both(t testing.TB, m *Module, name string) {
	t.Helper()
	a.heads, a.queries, a.keys = 2, []int32{19, 0, 3}, []int32{int32(2*a.tile + 6), 4, 9}
	if a.dh > 128 { // costs much, and shows nothing new
		a.heads, a.queries, a.keys = 1, a.queries[:2], a.keys[:2]
	}
	a.run(t, m, name)
	a.causal, a.grows, a.scale = true, true, float32(-3/math.Sqrt(float64(a.dh)))
	a.heads, a.queries, a.keys = 1, []int32{35}, []int32{int32(3*a.tile + 39)}
	a.run(t, m, name)
	a.nan, a.queries, a.keys = true, []int32{3}, []int32{int32(a.tile + 3)}
	a.run(t, m, name)
	a.wrongBlock(t, m, name, 2, 3)
}

// wrongBlock runs two sequences of a cache, the table of the second with a block that does not exist: the kernel says so and reads the first.
func (a attentionCall) wrongBlock(t testing.TB, m *Module, name string, queries ...int32) {
	t.Helper()
	if !a.paged {
		return
	}
	a.nan, a.grows, a.causal, a.scale, a.wrong = false, false, false, 0, true
	a.heads, a.queries, a.keys = 1, queries, []int32{9, 40}
	a.run(t, m, name)
}

// attentionKernel runs a bf16 kernel of attention.cu or attention_paged.cu.
func attentionKernel(t testing.TB, m *Module, name string) {
	a := attentionPlan(name)
	a.both(t, m, name)
}

// attentionF32Kernel does the same with the kernels of attention_f32.cu.
func attentionF32Kernel(t testing.TB, m *Module, name string) {
	n, paged := tile(name)
	a := attentionCall{d: engine.F32, dh: 64*n[0] - 14, paged: paged, rows: 64, tile: 64, threads: 256, shared: 2 * 64 * 68 * 4}
	a.both(t, m, name)
}

// attentionDecodeKernel runs sequences of one query beside one that other kernels do.
func attentionDecodeKernel(t testing.TB, m *Module, name string) {
	w := template(t, name, "attention_decode_kernel")
	cols := 8 * numberOf(t, w[1]) * numberOf(t, w[2])
	a := attentionCall{d: dtype(w[0]), dh: cols, paged: true, decode: true, rows: 1, threads: 256, shared: 8 * 4 * (cols + 2)}
	if w[3] == "0" {
		a.dh = cols - 3
	}
	a.heads, a.queries, a.keys = 2, []int32{1, 0, 1, 1}, []int32{75, 4, 1, 9}
	a.run(t, m, name)
	a.wrongBlock(t, m, name, 1, 1)
}
