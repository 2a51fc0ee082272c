package engine

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// e4m3 is code by the definition of the format.
func e4m3(code byte) float64 {
	e, m := int(code>>3&15), float64(code&7)
	v := math.Ldexp(1+m/8, e-7)
	switch {
	case e == 0:
		v = math.Ldexp(m/8, -6)
	case e == 15 && m == 7:
		v = math.NaN()
	}
	if code >= 0x80 {
		v = -v
	}
	return v
}

// All 256 codes: by the definition, there and back, and all are BF16 numbers.
func TestE4M3(t *testing.T) {
	for i := range 256 {
		c := byte(i)
		v, want := FromE4M3(c), e4m3(c)
		if float64(v) != want && (v == v || want == want) || math.Signbit(float64(v)) != (c >= 0x80) && v == v {
			t.Errorf("%#02x is %g, want %g", c, v, want)
		}
		if v == v && (ToE4M3(v) != c || FromBF16(ToBF16(v)) != v) {
			t.Errorf("%#02x goes to %g and %#02x", c, v, ToE4M3(v))
		}
	}
}

// Rounding against the nearest of all codes; ties and their neighbours, limits.
func TestToE4M3(t *testing.T) {
	var values []float32
	for c := byte(0); c < 0x7e; c++ { // between two neighbours
		mid := (FromE4M3(c) + FromE4M3(c+1)) / 2
		values = append(values, mid, math.Nextafter32(mid, 0), math.Nextafter32(mid, 1000))
	}
	values = append(values, 0, 448, 449, 463.9, 464, 500, 1e38, math.MaxFloat32, float32(math.Inf(1)), 1e-45, 0x1p-10, 0x1p-9)
	r := rand.New(rand.NewPCG(1, 2))
	for range 10000 {
		values = append(values, float32(math.Exp2(r.Float64()*22-12)))
	}
	for _, v := range values {
		best, off := byte(0), math.Inf(1)
		for c := byte(0); c < 0x7f; c++ { // of two that are as near, the one with an even mantissa
			if d := math.Abs(e4m3(c) - min(float64(v), 448)); d < off || d == off && c&1 == 0 {
				best, off = c, d
			}
		}
		if got := ToE4M3(v); got != best {
			t.Errorf("%g gives %#02x = %g, want %#02x = %g", v, got, e4m3(got), best, e4m3(best))
		}
		if got := ToE4M3(-v); got != best|0x80 {
			t.Errorf("%g gives %#02x, want %#02x", -v, got, best|0x80)
		}
	}
	if c := ToE4M3(float32(math.NaN())); c&0x7f != 0x7f {
		t.Errorf("a NaN gives %#02x", c)
	}
}

func TestQuantiseE4M3(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	codes := make([]byte, 257)
	for _, sigma := range []float64{1, 0.02, 1e-6, 3e30, 1e-36} {
		row := make([]float32, 257)
		for i := range row {
			row[i] = float32(sigma * r.NormFloat64())
		}
		most := slices.Max(row)
		most = max(most, -slices.Min(row))
		rounded := slices.Clone(row)
		scale := QuantiseE4M3(codes, row)
		RoundE4M3(rounded, make([]byte, len(row)))
		if frac, k := math.Frexp(float64(scale)); frac != 0.5 || k < 2-fp8Scale-1 {
			t.Fatalf("σ %g: scale %g", sigma, scale)
		}
		if top := most / scale; k110(scale) && (top > 448 || top <= 224) {
			t.Errorf("σ %g: the largest number is %g of the scale", sigma, top)
		}
		for i, v := range row {
			// Half of the last of 3 bits of mantissa, or half the smallest step.
			if limit := max(math.Abs(float64(v))/16, float64(scale)*0x1p-10); math.Abs(float64(rounded[i]-v)) > limit {
				t.Fatalf("σ %g: %g became %g", sigma, v, rounded[i])
			}
			if rounded[i] != FromE4M3(codes[i])*scale || FromBF16(ToBF16(rounded[i])) != rounded[i] {
				t.Fatalf("σ %g: %g is not a code times the scale, or no BF16", sigma, rounded[i])
			}
		}
		again := slices.Clone(rounded)
		if RoundE4M3(again, codes); !slices.Equal(again, rounded) {
			t.Errorf("σ %g: rounding twice is not rounding once", sigma)
		}
	}
	for most, want := range map[float32]float32{448: 1, 449: 2, 224: 0.5, 225: 1, 1: 1.0 / 256, 0: 1, 1e38: 0x1p110, 1e-38: 0x1p-110} {
		if s := QuantiseE4M3(codes, []float32{0, -most}); s != want {
			t.Errorf("a largest number of %g gives the scale %g, want %g", most, s, want)
		}
	}
	for _, bad := range []float32{float32(math.NaN()), float32(math.Inf(-1))} {
		row := []float32{1, bad, 2}
		if RoundE4M3(row, codes); row[0] == row[0] || row[1] == row[1] || row[2] == row[2] {
			t.Errorf("a row with %g is %g", bad, row)
		}
	}
}

// k110: the scale is not at the end of its range.
func k110(scale float32) bool { return scale > 0x1p-110 && scale < 0x1p110 }
