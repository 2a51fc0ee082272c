package engine

import "math"

// Purpose says what a random number is for; it is part of the counter, so two
// purposes never share a draw. Values are fixed forever.
type Purpose uint32

const (
	PurposeOrder      Purpose = 1  // generation order of the tokens
	PurposeInitNoise  Purpose = 2  // x_T of the diffusion head
	PurposeStepNoise  Purpose = 3  // δ of a reverse step
	PurposeLatent     Purpose = 4  // posterior sample of a tokenizer
	PurposeInit       Purpose = 5  // random weights
	PurposeTest       Purpose = 6  // generators of tests
	PurposeCategory   Purpose = 10 // category of a token, or component of a mixture
	PurposeConfidence Purpose = 11 // noise of the confidence that orders tokens
)

// Philox is Philox4x32-10 (Salmon et al. 2011): ten rounds over a counter of
// four words under a key of two.
func Philox(counter [4]uint32, key uint64) [4]uint32 {
	const m0, m1, w0, w1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
	k0, k1 := uint32(key), uint32(key>>32)
	a, b, c, d := counter[0], counter[1], counter[2], counter[3] // in registers
	for i := 0; i < 10; i++ {
		p0, p1 := uint64(m0)*uint64(a), uint64(m1)*uint64(c)
		a, b, c, d = uint32(p1>>32)^b^k0, uint32(p1), uint32(p0>>32)^d^k1, uint32(p0)
		k0, k1 = k0+w0, k1+w1
	}
	return [4]uint32{a, b, c, d}
}

// Counter is the layout of Philox's counter: word 0 is element/4, word 1 is
// purpose<<24 | step, word 2 the token, word 3 the image. Steps are below 2^24.
func Counter(p Purpose, step, element, token, image int) [4]uint32 {
	return [4]uint32{uint32(element / 4), uint32(p)<<24 | uint32(step)&0xffffff, uint32(token), uint32(image)}
}

// Uniform maps a word to (0,1): (⌊w/2^8⌋ + ½)·2^-24. It takes 25
// bits: computed in float64 everywhere.
func Uniform(w uint32) float64 { return (float64(w>>8) + 0.5) / (1 << 24) }

// NormalAt is element e of the normal draws of (rng, token, image), by
// Box–Muller on the words of Philox at Counter: words 0 and 1 give elements 0
// and 1 (cosine, sine) of each group of four, words 2 and 3 elements 2 and 3:
//
//	√(−2 ln u₁)·cos 2πu₂, √(−2 ln u₁)·sin 2πu₂
func NormalAt(r RNG, e, token, image int) float64 {
	w := Philox(Counter(r.Purpose, r.Step, e, token, image), r.Seed)
	pair := (e % 4) / 2 * 2
	rad := math.Sqrt(-2 * math.Log(Uniform(w[pair])))
	s, c := math.Sincos(2 * math.Pi * Uniform(w[pair+1]))
	if e%2 == 0 {
		return rad * c
	}
	return rad * s
}

// Permutation is the generation order of an image: Fisher–Yates from the end,
// position i swapped with ⌊w·(i+1)/2^32⌋ where w is word i%4 of the counter at
// element i (PurposeOrder).
func Permutation(seed uint64, image, n int) []int {
	p := make([]int, n)
	for i := range p {
		p[i] = i
	}
	for i := n - 1; i > 0; i-- {
		w := Philox(Counter(PurposeOrder, 0, i, 0, image), seed)[i%4]
		j := int(uint64(w) * uint64(i+1) >> 32)
		p[i], p[j] = p[j], p[i]
	}
	return p
}
