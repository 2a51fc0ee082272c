package checkpoint

import (
	"encoding/binary"
	"math"

	"margo/engine"
)

// DType is how a file stores elements, by its safetensors name. An unknown
// PyTorch storage keeps its own name; such a tensor can be listed, not read.
type DType string

// The dtypes with a known size. F64, F32, F16 and BF16 can be read as floats,
// BOOL and the integers as int64; the others only raw.
const (
	F64    DType = "F64"
	F32    DType = "F32"
	F16    DType = "F16"
	BF16   DType = "BF16"
	I64    DType = "I64"
	I32    DType = "I32"
	I16    DType = "I16"
	I8     DType = "I8"
	U64    DType = "U64"
	U32    DType = "U32"
	U16    DType = "U16"
	U8     DType = "U8"
	Bool   DType = "BOOL"
	F8E5M2 DType = "F8_E5M2"
	F8E4M3 DType = "F8_E4M3"
)

var dtypeSizes = map[DType]int64{
	F64: 8, I64: 8, U64: 8,
	F32: 4, I32: 4, U32: 4,
	F16: 2, BF16: 2, I16: 2, U16: 2,
	I8: 1, U8: 1, Bool: 1, F8E5M2: 1, F8E4M3: 1,
}

// Size is the bytes of one element, 0 for an unknown dtype.
func (d DType) Size() int64 { return dtypeSizes[d] }

// Float reports whether elements can be read as floating-point numbers.
func (d DType) Float() bool { return d == F64 || d == F32 || d == F16 || d == BF16 }

// fileDType is the stored form of a compute dtype.
func fileDType(d engine.DType) DType {
	switch d {
	case engine.BF16:
		return BF16
	case engine.I32:
		return I32
	}
	return F32
}

var le = binary.LittleEndian

// convert writes the elements of src, stored as from, to dst, stored as to,
// rounding to nearest even once. It reports whether it knows the conversion.
func convert(dst []byte, to DType, src []byte, from DType) bool {
	if to == from {
		copy(dst, src)
		return true
	}
	// Advancing slices keep bounds checks out of the loops.
	switch {
	case from == F32 && to == BF16:
		for ; len(dst) >= 2 && len(src) >= 4; dst, src = dst[2:], src[4:] {
			le.PutUint16(dst, engine.ToBF16(math.Float32frombits(le.Uint32(src))))
		}
	case from == BF16 && to == F32:
		for ; len(dst) >= 4 && len(src) >= 2; dst, src = dst[4:], src[2:] {
			le.PutUint32(dst, uint32(le.Uint16(src))<<16)
		}
	case from == F16 && to == F32:
		for ; len(dst) >= 4 && len(src) >= 2; dst, src = dst[4:], src[2:] {
			le.PutUint32(dst, math.Float32bits(halfToF32(le.Uint16(src))))
		}
	case from == F16 && to == BF16:
		for ; len(dst) >= 2 && len(src) >= 2; dst, src = dst[2:], src[2:] {
			le.PutUint16(dst, engine.ToBF16(halfToF32(le.Uint16(src))))
		}
	case from == F64 && to == F32:
		for ; len(dst) >= 4 && len(src) >= 8; dst, src = dst[4:], src[8:] {
			le.PutUint32(dst, math.Float32bits(float32(math.Float64frombits(le.Uint64(src)))))
		}
	case from == F64 && to == BF16:
		for ; len(dst) >= 2 && len(src) >= 8; dst, src = dst[2:], src[8:] {
			le.PutUint16(dst, engine.ToBF16(roundToOdd(math.Float64frombits(le.Uint64(src)))))
		}
	default:
		return false
	}
	return true
}

// halfToF32 widens IEEE binary16 exactly.
func halfToF32(h uint16) float32 {
	sign := uint32(h&0x8000) << 16
	exp, frac := uint32(h>>10)&0x1f, uint32(h&0x3ff)
	switch exp {
	case 0: // zero or subnormal: frac · 2^-24 is exact in binary32
		f := float32(frac) * (1.0 / (1 << 24))
		return math.Float32frombits(math.Float32bits(f) | sign)
	case 31:
		return math.Float32frombits(sign | 0x7f800000 | frac<<13)
	}
	return math.Float32frombits(sign | (exp+127-15)<<23 | frac<<13)
}

// roundToOdd narrows v to binary32 so that a later rounding to bfloat16 gives
// what rounding v once would: an inexact result gets an odd last bit, so it
// can't be taken for a tie.
func roundToOdd(v float64) float32 {
	f := float32(v)
	if float64(f) == v || v != v || math.IsInf(v, 0) {
		return f
	}
	u := math.Float32bits(f)
	if math.Abs(float64(f)) > math.Abs(v) {
		u-- // towards zero: sign-magnitude bits shrink
	}
	return math.Float32frombits(u | 1)
}

// intAt reads element i of src as int64. ok is false for a value or dtype that
// int64 can't hold.
func intAt(src []byte, d DType, i int) (v int64, ok bool) {
	switch d {
	case Bool:
		return int64(src[i]), src[i] <= 1
	case U8:
		return int64(src[i]), true
	case I8:
		return int64(int8(src[i])), true
	case U16:
		return int64(le.Uint16(src[2*i:])), true
	case I16:
		return int64(int16(le.Uint16(src[2*i:]))), true
	case U32:
		return int64(le.Uint32(src[4*i:])), true
	case I32:
		return int64(int32(le.Uint32(src[4*i:]))), true
	case U64, I64:
		u := le.Uint64(src[8*i:])
		return int64(u), d == I64 || u <= math.MaxInt64
	}
	return 0, false
}
