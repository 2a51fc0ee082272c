// peak.inc.h: what the machine can do at most, for comparison.

// peak keeps KMR·KNV accumulators busy, as the micro-kernels do, without memory.
// Where bf16 has no instruction of its own its products are f32 multiply-adds.
static double peak(int dtype, int64_t iters) {
#if !defined(MC_HAS_DOT)
	dtype = MC_F32;
#endif
	vf acc[KMR][KNV], x = v_set1(0.5f), y = v_set1(1e-3f);
	UNROLL for (int i = 0; i < KMR; i++) UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_set1((float)(i * KNV + j)); // all different, or they are shared
	for (int64_t n = 0; n < iters; n++) {
		__asm__ volatile("" : "+x"(x), "+x"(y)); // or one round would do
		UNROLL for (int i = 0; i < KMR; i++) {
			UNROLL for (int j = 0; j < KNV; j++)
				acc[i][j] = dtype == MC_BF16 ? v_dot(acc[i][j], v_bits(x), v_bits(y)) : v_fma(acc[i][j], x, y);
		}
	}
	vf s = v_zero();
	UNROLL for (int i = 0; i < KMR; i++) UNROLL for (int j = 0; j < KNV; j++) s = s + acc[i][j];
	volatile float keep = v_sum(s);
	(void)keep;
	return (double)iters * KMR * KNV * VL * (dtype == MC_BF16 ? 4 : 2);
}

static float stream(const float *p, int64_t bytes) {
	vf s[8];
	UNROLL for (int i = 0; i < 8; i++) s[i] = v_zero();
	for (int64_t n = 0; n + 8 * VL * 4 <= bytes; n += 8 * VL * 4, p += 8 * VL) {
		for (int i = 0; i < 8 * VL * 4; i += MC_LINE) __builtin_prefetch((const char *)p + 4096 + i);
		UNROLL for (int i = 0; i < 8; i++) s[i] = s[i] + v_load(p + i * VL);
	}
	UNROLL for (int i = 1; i < 8; i++) s[0] = s[0] + s[i];
	return v_sum(s[0]);
}
