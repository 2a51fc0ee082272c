package ref

import (
	"math"

	"margo/engine"
)

// Attention, for every sequence, head and query i of q with keys 0 … n-1:
//
//	s_j = Scale·(Q_i·K_j)     n = k, or k-q+i+1 if Causal
//	p_j = exp(s_j − max s)
//	O_i = Σ p_j V_j / Σ p_j   0 if n ≤ 0
//
// In BF16 the p_j of the numerator are rounded to BF16.
func (s *stream[F]) Attention(a engine.AttentionArgs) error {
	return s.do(engine.OpAttention, a.Check(), func() {
		d := s.dev
		q, k, v, o := load[F](d, a.Q), load[F](d, a.K), load[F](d, a.V), load[F](d, a.O)
		qOff, kOff := s.offsets("QOff", a.QOff, a.QOffHost), s.offsets("KOff", a.KOff, a.KOffHost)
		blocks := load[float64](d, a.Blocks)
		bf16 := a.Q.DType == engine.BF16 && d.mode == Rounded
		width := a.Q.Cols()
		dh := width / a.Heads
		for i := 0; i+1 < len(qOff); i++ {
			queries, keys := qOff[i+1]-qOff[i], kOff[i+1]-kOff[i]
			rows := make([]int, keys) // of K and V
			for j := range rows {
				rows[j] = kOff[i] + j
				if a.Blocks != nil && queries > 0 {
					rows[j] = s.block(&a, blocks[i*a.Blocks.Cols()+j/a.BlockSize])*a.BlockSize + j%a.BlockSize
				}
			}
			parallel(queries*a.Heads, func(lo, hi int) {
				p := make([]F, keys)
				for j := lo; j < hi; j++ {
					row, head := j/a.Heads, j%a.Heads*dh
					at := (qOff[i]+row)*width + head
					n := keys
					if a.Causal {
						n = min(max(keys-queries+row+1, 0), keys)
					}
					attend(o[at:at+dh], q[at:at+dh], k, v, rows, head, width, p[:n], F(a.Scale), bf16)
				}
			})
		}
		store(d, a.O, 0, o)
	})
}

// block is a number out of Blocks that must be one of the cache.
func (s *stream[F]) block(a *engine.AttentionArgs, b float64) int {
	if n := a.K.Rows() / a.BlockSize; !(b >= 0 && b < float64(n)) {
		s.dev.fault("Blocks has %v, the cache %d blocks", b, n)
	}
	return int(b)
}

// attend computes one query of one head with len(p) keys; key j starts at
// rows[j]·stride + head of k and v.
func attend[F number](o, q, k, v []F, rows []int, head, stride int, p []F, scale F, bf16 bool) {
	top := F(math.Inf(-1))
	for j := range p {
		p[j] = F(dot(q, k[rows[j]*stride+head:]) * scale)
		if p[j] > top || p[j] != p[j] {
			top = p[j]
		}
	}
	var sum F
	for j := range p {
		p[j] = fn(math.Exp, p[j]-top)
		sum += p[j]
		if bf16 {
			p[j] = F(round(float64(p[j]), engine.BF16))
		}
	}
	clear(o)
	for j := range p {
		for c, x := range v[rows[j]*stride+head:][:len(o)] {
			o[c] += F(p[j] * x)
		}
	}
	if len(p) > 0 {
		for c := range o {
			o[c] /= sum
		}
	}
}

// offsets reads an offset tensor and demands that host says the same.
func (s *stream[F]) offsets(name string, t *engine.Tensor, host []int32) []int {
	v := ints(s.dev, name, t, 0, math.MaxInt32)
	for i := range v {
		if v[i] != int(host[i]) {
			s.dev.fault("%s[%d] is %d on the device, %d on the host", name, i, v[i], host[i])
		}
	}
	return v
}
