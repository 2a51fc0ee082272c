// simd.h: the vectors that kernels are written in. Including it defines, for
// the instruction set chosen by MC_ISA_AVX512, MC_ISA_AVX2 or neither:
//
//	VL           floats per vector (16, 8, 4)
//	vf, vi, vm   vectors of float and int32, and a comparison result
//	v_*          operations; every multiply-add is an explicit v_fma, because
//	             contraction chosen by a compiler could differ between two
//	             copies of one expression, and results must not depend on tiles
//
// MC_HAS_DOT says that bf16 pairs are multiplied by one instruction.
// v_max and v_min return the second operand if one is NaN (as x86 does), so
// v_min(limit, x) keeps a NaN x.
#ifndef MARGO_CPU_SIMD_H
#define MARGO_CPU_SIMD_H

#include <string.h>

#include "core.h"

#define V_INLINE static inline __attribute__((always_inline, unused))

#if defined(MC_ISA_AVX512)

#include <immintrin.h>
#define VL 16
typedef float vf __attribute__((vector_size(64))); // not __m512, whose sums have another type
typedef __m512i vi;
typedef __mmask16 vm;

V_INLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
V_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
V_INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
V_INLINE vm v_first(int64_t n) { return n >= VL ? 0xffff : n <= 0 ? 0 : (vm)((1u << n) - 1); }
// v_load_n reads only the first n elements (0 … VL, or more), the rest is 0;
// v_store_n writes only the first n.
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, v_first(n), x); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   // a·b + c
V_INLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } // c − a·b
V_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
V_INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
V_INLINE vi v_bits(vf a) { return _mm512_castps_si512(a); }
V_INLINE vf v_float(vi a) { return _mm512_castsi512_ps(a); }
V_INLINE vi v_set1i(int32_t x) { return _mm512_set1_epi32(x); }
V_INLINE vi v_addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_INLINE vi v_and(vi a, vi b) { return _mm512_and_si512(a, b); }
V_INLINE vi v_or(vi a, vi b) { return _mm512_or_si512(a, b); }
#define v_shl(a, n) _mm512_slli_epi32(a, n)
#define v_shr(a, n) _mm512_srli_epi32(a, n) // logical
V_INLINE vf v_from_i(vi a) { return _mm512_cvtepi32_ps(a); }
V_INLINE vm v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
V_INLINE vm v_isnan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
V_INLINE vf v_sel(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
V_INLINE vi v_seli(vm m, vi yes, vi no) { return _mm512_mask_blend_epi32(m, no, yes); }
// v_ldexp is x·2ⁿ for integral n, also where 2ⁿ itself is out of range.
V_INLINE vf v_ldexp(vf x, vf n) { return _mm512_scalef_ps(x, n); }
V_INLINE vi v_widen16(__m256i h) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
V_INLINE vf v_loadb(const mc_bf16 *p) { return v_float(v_widen16(_mm256_loadu_si256((const void *)p))); }
V_INLINE vf v_loadb_n(const mc_bf16 *p, int64_t n) { return v_float(v_widen16(_mm256_maskz_loadu_epi16(v_first(n), p))); }

#elif defined(MC_ISA_AVX2)

#include <immintrin.h>
#define VL 8
typedef float vf __attribute__((vector_size(32)));
typedef float vf_u __attribute__((vector_size(32), aligned(4), may_alias)); // in memory
typedef __m256i vi;
typedef __m256 vm;

V_INLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
V_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
V_INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
V_INLINE vm v_first(int64_t n) {
	vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
	return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)mc_min(n, VL)), lane));
}
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, _mm256_castps_si256(v_first(n))); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) { _mm256_maskstore_ps(p, _mm256_castps_si256(v_first(n)), x); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
V_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
V_INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
V_INLINE vi v_bits(vf a) { return _mm256_castps_si256(a); }
V_INLINE vf v_float(vi a) { return _mm256_castsi256_ps(a); }
V_INLINE vi v_set1i(int32_t x) { return _mm256_set1_epi32(x); }
V_INLINE vi v_addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
V_INLINE vi v_and(vi a, vi b) { return _mm256_and_si256(a, b); }
V_INLINE vi v_or(vi a, vi b) { return _mm256_or_si256(a, b); }
#define v_shl(a, n) _mm256_slli_epi32(a, n)
#define v_shr(a, n) _mm256_srli_epi32(a, n)
V_INLINE vf v_from_i(vi a) { return _mm256_cvtepi32_ps(a); }
V_INLINE vm v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
V_INLINE vm v_isnan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
V_INLINE vf v_sel(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
V_INLINE vi v_seli(vm m, vi yes, vi no) { return v_bits(v_sel(m, v_float(yes), v_float(no))); }
V_INLINE vi v_widen16(__m128i h) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16); }
V_INLINE vf v_loadb(const mc_bf16 *p) { return v_float(v_widen16(_mm_loadu_si128((const void *)p))); }

#else // portable: GCC and Clang vector extensions, 4 lanes

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
#include <math.h>
#define VL 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t v_uint __attribute__((vector_size(16)));
typedef vi vm;

V_INLINE vf v_set1(float x) { return (vf){x, x, x, x}; }
V_INLINE vf v_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
V_INLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
V_INLINE vm v_first(int64_t n) { return (vi){0, 1, 2, 3} < (vi){(int)mc_min(n, VL), (int)mc_min(n, VL), (int)mc_min(n, VL), (int)mc_min(n, VL)}; }
V_INLINE vf v_load_n(const float *p, int64_t n) {
	vf v = {0};
	if (n > 0) memcpy(&v, p, (size_t)mc_min(n, VL) * 4);
	return v;
}
V_INLINE void v_store_n(float *p, vf x, int64_t n) {
	if (n > 0) memcpy(p, &x, (size_t)mc_min(n, VL) * 4);
}
#if defined(__aarch64__)
V_INLINE vf v_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
V_INLINE vf v_fnma(vf a, vf b, vf c) { return (vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
V_INLINE vf v_sqrt(vf a) { return (vf)vsqrtq_f32((float32x4_t)a); }
#else
V_INLINE vf v_fma(vf a, vf b, vf c) { vf p = a * b; return p + c; }
V_INLINE vf v_fnma(vf a, vf b, vf c) { vf p = a * b; return c - p; }
#if defined(__SSE2__)
V_INLINE vf v_sqrt(vf a) { return (vf)_mm_sqrt_ps((__m128)a); }
#else
V_INLINE vf v_sqrt(vf a) { return (vf){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
#endif
#endif
V_INLINE vi v_bits(vf a) { return (vi)a; }
V_INLINE vf v_float(vi a) { return (vf)a; }
V_INLINE vi v_set1i(int32_t x) { return (vi){x, x, x, x}; }
V_INLINE vi v_addi(vi a, vi b) { return (vi)((v_uint)a + (v_uint)b); }
V_INLINE vi v_and(vi a, vi b) { return a & b; }
V_INLINE vi v_or(vi a, vi b) { return a | b; }
#define v_shl(a, n) ((vi)((v_uint)(a) << (n)))
#define v_shr(a, n) ((vi)((v_uint)(a) >> (n)))
V_INLINE vf v_from_i(vi a) { return __builtin_convertvector(a, vf); }
V_INLINE vm v_lt(vf a, vf b) { return a < b; }
V_INLINE vm v_isnan(vf a) { return a != a; }
V_INLINE vi v_seli(vm m, vi yes, vi no) { return (m & yes) | (~m & no); }
V_INLINE vf v_sel(vm m, vf yes, vf no) { return (vf)v_seli(m, (vi)yes, (vi)no); }
V_INLINE vf v_max(vf a, vf b) { return v_sel(b < a, a, b); }
V_INLINE vf v_min(vf a, vf b) { return v_sel(a < b, a, b); }
V_INLINE vf v_loadb(const mc_bf16 *p) {
	return (vf)(v_uint){(uint32_t)p[0] << 16, (uint32_t)p[1] << 16, (uint32_t)p[2] << 16, (uint32_t)p[3] << 16};
}

#endif

V_INLINE vf v_zero(void) { return v_set1(0); }
V_INLINE vf v_abs(vf a) { return v_float(v_and(v_bits(a), v_set1i(0x7fffffff))); }

#if !defined(MC_ISA_AVX512)
V_INLINE vf v_loadb_n(const mc_bf16 *p, int64_t n) {
	mc_bf16 t[VL] = {0};
	if (n > 0) memcpy(t, p, (size_t)mc_min(n, VL) * 2);
	return v_loadb(t);
}
#endif

// v_round_bf16 leaves the bf16 nearest to x (ties to even, NaN quiet) in the
// upper half of each element; the lower half is not cleared.
V_INLINE vi v_round_bf16(vf x) {
	vi u = v_bits(x);
	vi r = v_addi(v_addi(u, v_set1i(0x7fff)), v_and(v_shr(u, 16), v_set1i(1)));
	return v_seli(v_isnan(x), v_or(u, v_set1i(0x400000)), r);
}

// v_to_bf16 rounds to bf16 and stays f32.
V_INLINE vf v_to_bf16(vf x) { return v_float(v_and(v_round_bf16(x), v_set1i((int32_t)0xffff0000u))); }

#if defined(MC_HAS_DOT)
V_INLINE __m256i v_narrow(vf x) {
	// vcvtneps2bf16 flushes subnormals to zero; so does vdpbf16ps that will
	// read them, and elsewhere 1e-38 is below every tolerance.
	return (__m256i)_mm512_cvtneps_pbh(x);
}
V_INLINE void v_storeb(mc_bf16 *p, vf x) { _mm256_storeu_si256((void *)p, v_narrow(x)); }
V_INLINE void v_storeb_n(mc_bf16 *p, vf x, int64_t n) { _mm256_mask_storeu_epi16(p, v_first(n), v_narrow(x)); }
#elif defined(MC_ISA_AVX512)
V_INLINE __m256i v_narrow(vf x) { return _mm512_cvtepi32_epi16(v_shr(v_round_bf16(x), 16)); }
V_INLINE void v_storeb(mc_bf16 *p, vf x) { _mm256_storeu_si256((void *)p, v_narrow(x)); }
V_INLINE void v_storeb_n(mc_bf16 *p, vf x, int64_t n) { _mm256_mask_storeu_epi16(p, v_first(n), v_narrow(x)); }
#else
V_INLINE void v_storeb(mc_bf16 *p, vf x) {
	vi r = v_shr(v_round_bf16(x), 16);
	int32_t t[VL];
	memcpy(t, &r, sizeof t);
	for (int i = 0; i < VL; i++) p[i] = (mc_bf16)t[i];
}
V_INLINE void v_storeb_n(mc_bf16 *p, vf x, int64_t n) {
	mc_bf16 t[VL];
	v_storeb(t, x);
	if (n > 0) memcpy(p, t, (size_t)mc_min(n, VL) * 2);
}
#endif

// v_dot adds the products of VL bf16 pairs (low half: even element) to acc.
V_INLINE vf v_dot(vf acc, vi a, vi b) {
#if defined(MC_HAS_DOT)
	return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
	vi hi = v_set1i((int32_t)0xffff0000u);
	acc = v_fma(v_float(v_shl(a, 16)), v_float(v_shl(b, 16)), acc);
	return v_fma(v_float(v_and(a, hi)), v_float(v_and(b, hi)), acc);
#endif
}

// v_loadi loads VL int32 (or bf16 pairs) from any address; v_set1_pair
// broadcasts the pair p[0], p[1].
V_INLINE vi v_loadi(const void *p) { return v_bits(v_load((const float *)p)); }
V_INLINE vi v_set1_pair(const mc_bf16 *p) {
	int32_t x;
	memcpy(&x, p, 4);
	return v_set1i(x);
}

// v_sum adds the elements in a fixed order, halves to halves; v_hmax is their
// maximum, if none is NaN.
#define V_FOLD(op256, op128, op)                                                                      \
	float t[4];                                                                               \
	V_FOLD4(op256, op128)                                                                     \
	memcpy(t, &q, sizeof t);                                                                  \
	return op(op(t[0], t[2]), op(t[1], t[3]));
#if defined(MC_ISA_AVX512)
#define V_FOLD4(op256, op128)                                                                         \
	__m256 h = op256(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));                \
	__m128 q = op128(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif defined(MC_ISA_AVX2)
#define V_FOLD4(op256, op128) __m128 q = op128(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#else
#define V_FOLD4(op256, op128) vf q = a;
#endif
V_INLINE float f_add(float a, float b) { return a + b; }
V_INLINE float f_max(float a, float b) { return a > b ? a : b; }
V_INLINE float v_sum(vf a) { V_FOLD(_mm256_add_ps, _mm_add_ps, f_add) }
V_INLINE float v_hmax(vf a) { V_FOLD(_mm256_max_ps, _mm_max_ps, f_max) }

// Scalar conversions with the same rounding.
V_INLINE float f_from_bf16(mc_bf16 h) {
	uint32_t u = (uint32_t)h << 16;
	float f;
	memcpy(&f, &u, 4);
	return f;
}
V_INLINE mc_bf16 f_to_bf16(float f) {
	uint32_t u;
	memcpy(&u, &f, 4);
	if ((u & 0x7fffffff) > 0x7f800000) return (mc_bf16)(u >> 16 | 0x40);
	return (mc_bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#endif
