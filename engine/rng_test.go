package engine

import (
	"math"
	"slices"
	"testing"
)

// TestPhilox checks the three philox4x32-10 vectors of Random123's
// tests/kat_vectors (D. E. Shaw Research).
func TestPhilox(t *testing.T) {
	const ones = 0xffffffff
	for _, v := range []struct {
		counter [4]uint32
		key     [2]uint32
		want    [4]uint32
	}{
		{[4]uint32{}, [2]uint32{}, [4]uint32{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
		{[4]uint32{ones, ones, ones, ones}, [2]uint32{ones, ones}, [4]uint32{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
		{[4]uint32{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, [2]uint32{0xa4093822, 0x299f31d0},
			[4]uint32{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
	} {
		if got := Philox(v.counter, uint64(v.key[1])<<32|uint64(v.key[0])); got != v.want {
			t.Errorf("counter %#x: %#x, want %#x", v.counter, got, v.want)
		}
	}
}

// TestPinned holds draws that must never change: images of a seed depend on
// them. The numbers come from another implementation of the documentation.
func TestPinned(t *testing.T) {
	for _, v := range []struct {
		r               RNG
		e, token, image int
		want            float64
	}{
		{RNG{0, PurposeStepNoise, 0}, 0, 0, 0, -0.26865719228384627},
		{RNG{0, PurposeStepNoise, 0}, 1, 0, 0, 0.7815182836686322},
		{RNG{0, PurposeStepNoise, 0}, 2, 0, 0, 2.01337411442146},
		{RNG{0, PurposeStepNoise, 0}, 7, 0, 0, -0.9930174698562928},
		{RNG{12345678901234567890, PurposeInitNoise, 99}, 15, 255, 1000000, -1.1045662600296775},
	} {
		if got := NormalAt(v.r, v.e, v.token, v.image); math.Abs(got-v.want) > 1e-14 {
			t.Errorf("NormalAt(%+v, %d, %d, %d) = %v, want %v", v.r, v.e, v.token, v.image, got, v.want)
		}
	}
	if got, want := Permutation(0, 0, 16), []int{13, 4, 5, 3, 1, 9, 12, 0, 8, 11, 10, 7, 2, 15, 6, 14}; !slices.Equal(got, want) {
		t.Errorf("permutation %v, want %v", got, want)
	}
	if got, want := Permutation(7, 3, 16), []int{0, 14, 8, 5, 11, 3, 12, 10, 13, 9, 6, 4, 7, 2, 15, 1}; !slices.Equal(got, want) {
		t.Errorf("permutation %v, want %v", got, want)
	}
}

func TestUniform(t *testing.T) {
	for w, want := range map[uint32]float64{0: 0x1p-25, 255: 0x1p-25, 256: 3 * 0x1p-25, math.MaxUint32: 1 - 0x1p-25} {
		got := Uniform(w)
		if got != want {
			t.Errorf("Uniform(%#x) = %v, want %v", w, got, want)
		}
	}
}

// TestCounter shows that no two draws share a counter.
func TestCounter(t *testing.T) {
	got := Counter(PurposeStepNoise, 0x123456, 13, 77, 99)
	if want := [4]uint32{3, 0x03123456, 77, 99}; got != want {
		t.Errorf("%#x, want %#x", got, want)
	}
}

// TestNormalMoments looks at 40,000 draws.
func TestNormalMoments(t *testing.T) {
	const n = 40000
	var sum, square, fourth, neighbours float64
	last := 0.0
	for i := 0; i < n; i++ {
		v := NormalAt(RNG{Seed: 3, Purpose: PurposeTest}, i%16, i/16%256, i/4096)
		sum += v
		square += v * v
		fourth += v * v * v * v
		neighbours += v * last
		last = v
	}
	for _, m := range []struct {
		name            string
		got, want, sdev float64
	}{{"mean", sum / n, 0, 1}, {"variance", square / n, 1, math.Sqrt2}, {"fourth moment", fourth / n, 3, math.Sqrt(96)},
		{"covariance of neighbours", neighbours / n, 0, 1}} {
		if math.Abs(m.got-m.want) > 4*m.sdev/math.Sqrt(n) {
			t.Errorf("%s is %v, want %v", m.name, m.got, m.want)
		}
	}
}

// TestPermutation checks that every order is one, and that first places are
// spread evenly over images.
func TestPermutation(t *testing.T) {
	const n, images = 8, 8000
	count := make([]int, n)
	for image := 0; image < images; image++ {
		p := Permutation(1, image, n)
		count[p[0]]++
		slices.Sort(p)
		for i, v := range p {
			if i != v {
				t.Fatalf("image %d: not a permutation: %v", image, p)
			}
		}
	}
	for i, c := range count {
		if math.Abs(float64(c)-images/n) > 5*math.Sqrt(images/n) {
			t.Errorf("token %d is first %d times of %d", i, c, images)
		}
	}
	if len(Permutation(1, 0, 0)) != 0 || Permutation(1, 0, 1)[0] != 0 {
		t.Error("orders of 0 and 1 tokens")
	}
}
