// pack.inc.h: conversion between f32 and bf16, and packing of panels.

// Conversions of n elements; bf16 rounds to nearest even, NaN stays NaN.
static void to_bf16(mc_bf16 *dst, const float *src, int64_t n) {
	int64_t i = 0;
	for (; i + VL <= n; i += VL) v_storeb(dst + i, v_load(src + i));
	if (i < n) v_storeb_n(dst + i, v_load_n(src + i, n - i), n - i);
}

static void to_f32(float *dst, const mc_bf16 *src, int64_t n) {
	int64_t i = 0;
	for (; i + VL <= n; i += VL) v_store(dst + i, v_loadb(src + i));
	if (i < n) v_store_n(dst + i, v_loadb_n(src + i, n - i), n - i);
}

#define PACK_K 64 // columns of W handled at once, so that writes stay in L1

// pack_rows brings up to PACK_K elements of each of n rows into f[j][0 … kn-1].
V_INLINE void pack_rows(float f[MC_NR][PACK_K], const void *src, int src_dtype, int64_t ld, int64_t n, int64_t k0,
                        int64_t kn) {
	for (int64_t j = 0; j < n; j++) {
		if (src_dtype == MC_F32)
			memcpy(f[j], (const float *)src + j * ld + k0, (size_t)kn * 4);
		else
			to_f32(f[j], (const mc_bf16 *)src + j * ld + k0, kn);
	}
}

// pack_nk makes one panel of n <= 32 rows of k elements (row stride ld), zero
// padded: column j is row j of src. For W, and for K of Q·Kᵀ.
static void pack_nk_f32(float *dst, const void *src, int src_dtype, int64_t ld, int64_t n, int64_t k) {
	float f[MC_NR][PACK_K];
	memset(f, 0, sizeof f);
	for (int64_t k0 = 0; k0 < k; k0 += PACK_K) {
		int64_t kn = mc_min(PACK_K, k - k0);
		pack_rows(f, src, src_dtype, ld, n, k0, kn);
		for (int64_t kk = 0; kk < kn; kk++)
			for (int64_t j = 0; j < MC_NR; j++) dst[(k0 + kk) * MC_NR + j] = f[j][kk];
	}
}

static void pack_nk_bf16(uint32_t *dst, const void *src, int src_dtype, int64_t ld, int64_t n, int64_t k) {
	mc_bf16 h[MC_NR][PACK_K];
	memset(h, 0, sizeof h);
	for (int64_t k0 = 0; k0 < k; k0 += PACK_K) {
		int64_t kn = mc_min(PACK_K, k - k0);
		for (int64_t j = 0; j < n; j++) {
			if (src_dtype == MC_F32)
				to_bf16(h[j], (const float *)src + j * ld + k0, kn);
			else
				memcpy(h[j], (const mc_bf16 *)src + j * ld + k0, (size_t)kn * 2);
			if (kn % 2) h[j][kn] = 0;
		}
		for (int64_t kk = 0; kk < kn; kk += 2)
			for (int64_t j = 0; j < MC_NR; j++)
				dst[(k0 + kk) / 2 * MC_NR + j] = h[j][kk] | (uint32_t)h[j][kk + 1] << 16;
	}
}

// pack_kn_bf16 makes one panel of k rows of n <= 32 elements (row stride ld), zero
// padded: row kk is row kk of src. For V of P·V.
static void pack_kn_bf16(uint32_t *dst, const void *src, int src_dtype, int64_t ld, int64_t n, int64_t k) {
	mc_bf16 h[2][MC_NR];
	memset(h, 0, sizeof h);
	for (int64_t kk = 0; kk < k; kk += 2) {
		for (int64_t i = 0; i < 2; i++) {
			if (kk + i >= k)
				memset(h[i], 0, sizeof h[i]);
			else if (src_dtype == MC_F32)
				to_bf16(h[i], (const float *)src + (kk + i) * ld, n);
			else
				memcpy(h[i], (const mc_bf16 *)src + (kk + i) * ld, (size_t)n * 2);
		}
		for (int64_t j = 0; j < MC_NR; j++) dst[kk / 2 * MC_NR + j] = h[0][j] | (uint32_t)h[1][j] << 16;
	}
}
