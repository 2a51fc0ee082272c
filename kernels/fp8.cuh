// fp8.cuh: weights in FP8: e4m3 numbers with a power of two for each row (engine/fp8.go).
#pragma once

#include "margo.cuh"

// e4m3_to_bf16 makes bf16 pairs of four e4m3 codes, exactly and on every architecture: low of bytes 0 and 1, high of bytes 2 and
// 3, the first in the lower half. Shifted to the place of a binary32's fields a code is the number times 2^-120, subnormals
// included; the product takes that back (and needs subnormals: no -ftz). The codes of NaN, 0x7f and 0xff, give ±480: a row with a NaN has a NaN
// for its scale.
MARGO_DEVICE uint32_t e4m3_top(uint32_t codes) { // of the uppermost byte: a binary32 whose upper half is the bf16
	return f32_to_bits(bits_to_f32(uint32_t(int32_t(codes) >> 4) & 0x87f00000u) * 0x1p120f);
}
MARGO_DEVICE void e4m3_to_bf16(uint32_t codes, uint32_t &low, uint32_t &high) {
	low = e4m3_top(codes << 24) >> 16 | (e4m3_top(codes << 16) & 0xffff0000u);
	high = e4m3_top(codes << 8) >> 16 | (e4m3_top(codes) & 0xffff0000u);
}
