package engine

import "math"

// DType is the type of a tensor's elements.
type DType uint8

const (
	F32  DType = iota // IEEE binary32
	BF16              // upper half of binary32, rounded to nearest even
	I32               // ids and indices
)

// Size returns the bytes of one element.
func (d DType) Size() int {
	if d == BF16 {
		return 2
	}
	return 4
}

func (d DType) String() string {
	switch d {
	case F32:
		return "f32"
	case BF16:
		return "bf16"
	case I32:
		return "i32"
	}
	return "dtype?"
}

// ParseDType reads "f32" or "bf16", the dtypes a user may ask for.
func ParseDType(s string) (DType, error) {
	switch s {
	case "f32", "fp32", "float32":
		return F32, nil
	case "bf16", "bfloat16":
		return BF16, nil
	}
	return 0, Errorf("dtype", Invalid, "%q is not a dtype; use f32 or bf16", s)
}

// ToBF16 rounds to nearest even; a NaN stays a (quiet) NaN.
func ToBF16(f float32) uint16 {
	u := math.Float32bits(f)
	if u&0x7fffffff > 0x7f800000 {
		return uint16(u>>16) | 0x40
	}
	return uint16((u + 0x7fff + (u>>16)&1) >> 16)
}

// FromBF16 widens exactly.
func FromBF16(h uint16) float32 { return math.Float32frombits(uint32(h) << 16) }
