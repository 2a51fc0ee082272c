// act.cuh: engine.Activation in f32, with the library's erf, tanh and exp (no
// approximations: outputs may be f32), and loads and stores of four elements.
#pragma once

#include <math.h>

#include "margo.cuh"
#include "margo_abi.h"

// activate applies one of MARGO_IDENTITY … MARGO_SILU. With a constant kind the
// others vanish at compile time.
MARGO_DEVICE float activate(int kind, float x) {
	switch (kind) {
	case MARGO_GELU_ERF: return (x * 0.5f) * (1.0f + erff(x * 0.70710678f));
	case MARGO_GELU_TANH: return (x * 0.5f) * (1.0f + tanhf(0.79788456f * (x + (x * x) * x * 0.044715f)));
	case MARGO_SILU: return x / (1.0f + expf(-x));
	}
	return x;
}

// load4 reads p[0..3], of which the first n exist (the others are 0). With VEC all do and
// p is a multiple of 4 elements: one load of 16 bytes (f32) or 8 (bf16). Same values.
template <bool VEC> MARGO_DEVICE void load4(float (&v)[4], const float *p, int64_t n) {
	if constexpr (VEC) {
		float4 q = *reinterpret_cast<const float4 *>(p);
		v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] = i < n ? p[i] : 0.0f;
	}
}
template <bool VEC> MARGO_DEVICE void load4(float (&v)[4], const bf16 *p, int64_t n) {
	if constexpr (VEC) {
		uint2 q = *reinterpret_cast<const uint2 *>(p);
		v[0] = bits_to_f32(q.x << 16), v[1] = bits_to_f32(q.x & 0xffff0000u);
		v[2] = bits_to_f32(q.y << 16), v[3] = bits_to_f32(q.y & 0xffff0000u);
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] = i < n ? to_f32(p[i]) : 0.0f;
	}
}
template <bool VEC> MARGO_DEVICE void store4(float *p, const float (&v)[4], int64_t n) {
	if constexpr (VEC) {
		*reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]);
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++)
			if (i < n) p[i] = v[i];
	}
}
template <bool VEC> MARGO_DEVICE void store4(bf16 *p, const float (&v)[4], int64_t n) {
	if constexpr (VEC) {
		*reinterpret_cast<uint2 *>(p) = make_uint2(gpu::pack_bf16(v[0], v[1]), gpu::pack_bf16(v[2], v[3]));
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++)
			if (i < n) p[i] = to_bf16(v[i]);
	}
}
