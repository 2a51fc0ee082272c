package engine

import "math"

// Weights in FP8 are e4m3 numbers, each row of a matrix times a power of two of
// its own. e4m3 (OCP 8-bit floating point, as NVIDIA's, "e4m3fn") has a sign,
// 4 exponent bits of bias 7 and 3 bits of mantissa: 2^-9 to 448, no infinity.
// A floating-point grid looks the same at every power of two, so a scale that is
// one loses no precision against any other; and the products e4m3 · 2^k are BF16
// numbers, so a matrix in FP8 means the same wherever it is computed with.
const (
	MaxE4M3  = 448
	nanE4M3  = 0x7f
	fp8Scale = 110 // scales are 2^-110 … 2^110: the products stay normal BF16 numbers
)

// FromE4M3 widens exactly.
func FromE4M3(code byte) float32 {
	if code&0x7f == nanE4M3 {
		return float32(math.NaN())
	}
	// The same fields in a binary32 make a number that is 2^120 smaller, subnormals too.
	f := math.Float32frombits(uint32(code&0x7f) << 20)
	return math.Float32frombits(math.Float32bits(f*0x1p120) | uint32(code>>7)<<31)
}

// ToE4M3 rounds to nearest even and saturates at ±448; a NaN stays one.
func ToE4M3(f float32) byte {
	u := math.Float32bits(f)
	sign, u := byte(u>>31<<7), u&0x7fffffff
	switch {
	case u > 0x7f800000:
		return sign | nanE4M3
	case u >= math.Float32bits(MaxE4M3):
		return sign | 0x7e
	case u < math.Float32bits(0x1p-6): // subnormal: a multiple of 2^-9, the last place of 2^14
		return sign | byte(math.Float32bits(math.Float32frombits(u)+0x1p14))
	}
	return sign | byte((u+0x7ffff+u>>20&1)>>20-120<<3)
}

// QuantiseE4M3 stores row as codes[i] · scale, nearest even, with the smallest
// power of two that brings the row's largest number to at most 448 (2^-110 to 2^110;
// what is larger then saturates). A row with a NaN or an infinity gets the
// scale NaN and codes 0: all that is computed from it is NaN.
func QuantiseE4M3(codes []byte, row []float32) (scale float32) {
	most := float32(0)
	for _, v := range row {
		if v-v != 0 {
			clear(codes[:len(row)])
			return float32(math.NaN())
		}
		most = max(most, max(v, -v))
	}
	if most == 0 {
		clear(codes[:len(row)])
		return 1
	}
	frac, k := math.Frexp(float64(most) / MaxE4M3) // most/448 = frac·2^k, frac in [½, 1)
	if frac == 0.5 {
		k--
	}
	k = min(max(k, -fp8Scale), fp8Scale)
	down := float32(math.Ldexp(1, -k))
	for i, v := range row {
		codes[i] = ToE4M3(v * down)
	}
	return float32(math.Ldexp(1, k))
}

// RoundE4M3 replaces row by the numbers that QuantiseE4M3 stores; doing it again
// changes nothing. codes is room for as many codes.
func RoundE4M3(row []float32, codes []byte) {
	scale := QuantiseE4M3(codes, row)
	for i := range row {
		row[i] = FromE4M3(codes[i]) * scale
	}
}
