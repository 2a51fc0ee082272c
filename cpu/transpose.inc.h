// transpose.inc.h: transposition of 32-bit words, in registers.

// transpose_square transposes VL vectors.
#if defined(MC_ISA_AVX2)
V_INLINE void transpose_square(vf a[VL]) {
	vf b[VL];
	UNROLL for (int i = 0; i < VL; i += 2) { // words of two rows side by side, in both halves
		b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
		b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
	}
	UNROLL for (int i = 0; i < VL; i += 4) // of four rows
		UNROLL for (int j = 0; j < 2; j++) {
			a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
			a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
		}
	UNROLL for (int i = 0; i < 4; i++) {
		b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
		b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
	}
	UNROLL for (int i = 0; i < VL; i++) a[i] = b[i];
}
#else
// v_zip_lo and v_zip_hi interleave the lower and the upper halves of a and b:
// a0 b0 a1 b1 …
#if defined(MC_ISA_AVX512)
V_INLINE vf v_zip_lo(vf a, vf b) {
	const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
	return _mm512_permutex2var_ps(a, i, b);
}
V_INLINE vf v_zip_hi(vf a, vf b) {
	const __m512i i = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
	return _mm512_permutex2var_ps(a, i, b);
}
#else
V_INLINE vf v_zip_lo(vf a, vf b) { return (vf){a[0], b[0], a[1], b[1]}; }
V_INLINE vf v_zip_hi(vf a, vf b) { return (vf){a[2], b[2], a[3], b[3]}; }
#endif

V_INLINE void transpose_square(vf a[VL]) {
	vf b[VL];
	// Interleaving rows i and i + VL/2 turns the address of an element,
	// row bits before column bits, by one bit.
	for (int s = 1; s < VL; s *= 2) {
		UNROLL for (int i = 0; i < VL / 2; i++) {
			b[2 * i] = v_zip_lo(a[i], a[i + VL / 2]);
			b[2 * i + 1] = v_zip_hi(a[i], a[i + VL / 2]);
		}
		UNROLL for (int i = 0; i < VL; i++) a[i] = b[i];
	}
}
#endif

// transpose writes dst[w][0 … VL-1] = word w of rows 0 … n-1 of src (row stride
// ld bytes), zero for rows n … VL-1, for w below words. n may be below 0 or
// above VL; ldd is in words.
static void transpose(float *dst, int64_t ldd, const char *src, int64_t ld, int64_t n, int64_t words) {
	for (int64_t w = 0; w < words; w += VL, dst += VL * ldd) {
		vf a[VL];
		if (n >= VL && words - w >= VL) {
			UNROLL for (int i = 0; i < VL; i++) a[i] = v_load((const float *)(src + i * ld) + w);
			transpose_square(a);
			UNROLL for (int i = 0; i < VL; i++) v_store(dst + i * ldd, a[i]);
			continue;
		}
		UNROLL for (int i = 0; i < VL; i++) a[i] = i < n ? v_load_n((const float *)(src + i * ld) + w, words - w) : v_zero();
		transpose_square(a);
		UNROLL for (int i = 0; i < VL; i++)
			if (w + i < words) v_store(dst + i * ldd, a[i]);
	}
}
