package conformance

import (
	"hash/fnv"
	"math"

	"margo/engine"
)

// random is splitmix64. The data of a tensor depends on the names of case and
// tensor and on the repetition, so that every device sees the same.
type random struct{ s uint64 }

func newRandom(rep int, names ...string) *random {
	h := fnv.New64a()
	for _, n := range names {
		h.Write(append([]byte(n), 0))
	}
	return &random{h.Sum64() + uint64(rep)*0x9e3779b97f4a7c15}
}

func (r *random) next() uint64 {
	r.s += 0x9e3779b97f4a7c15
	z := r.s
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// gen makes element i of a tensor; elements are asked for in order.
type gen func(r *random, i int) float32

// bell is nearly normal: the sum of four uniform numbers, scaled to σ.
func bell(sigma float64) gen {
	scale := sigma * math.Sqrt(3) / 65536
	return func(r *random, _ int) float32 {
		w := r.next()
		sum := w&0xffff + w>>16&0xffff + w>>32&0xffff + w>>48
		return float32((float64(sum) - 131070) * scale)
	}
}

// uniform is in [lo, hi).
func uniform(lo, hi float64) gen {
	return func(r *random, _ int) float32 { return float32(lo + (hi-lo)*float64(r.next()>>11)/(1<<53)) }
}

// integers are −n … n.
func integers(n int) gen {
	return func(r *random, _ int) float32 { return float32(int(r.next()%uint64(2*n+1)) - n) }
}

// odd are the odd integers −2n+1 … 2n−1.
func odd(n int) gen {
	return func(r *random, _ int) float32 { return float32(2*(int(r.next()%uint64(2*n))-n) + 1) }
}

func constant(v float32) gen { return func(*random, int) float32 { return v } }

// plus adds a constant.
func (g gen) plus(v float32) gen {
	return func(r *random, i int) float32 { return g(r, i) + v }
}

// toBF16 makes numbers that BF16 holds.
func (g gen) toBF16() gen {
	return func(r *random, i int) float32 { return engine.FromBF16(engine.ToBF16(g(r, i))) }
}

// with replaces the elements at the given positions.
func (g gen) with(at map[int]float32) gen {
	return func(r *random, i int) float32 {
		v := g(r, i)
		if w, ok := at[i]; ok {
			return w
		}
		return v
	}
}

var (
	nan = float32(math.NaN())
	inf = float32(math.Inf(1))
)

// shuffled is n different numbers below limit.
func shuffled(r *random, n, limit int) []int32 {
	p := make([]int32, limit)
	for i := range p {
		p[i] = int32(i)
	}
	for i := range p {
		j := i + int(r.next()%uint64(limit-i))
		p[i], p[j] = p[j], p[i]
	}
	return p[:n]
}
