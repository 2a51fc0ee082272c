// norm.inc.h: LayerNorm with modulation, row by row.

// Statistics are taken in four vectors of partial sums, added in a fixed order,
// mean first and then the squared distances from it.
V_INLINE void norm_row(const int xt, const int yt, const struct mc_norm *a, const void *x, void *y,
                       const float *scale, const float *shift) {
	int64_t d = a->d, i;
	vf s[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
	for (i = 0; i + 4 * VL <= d; i += 4 * VL)
		UNROLL for (int j = 0; j < 4; j++) s[j] = s[j] + ld(xt, x, i + j * VL, VL);
	for (; i < d; i += VL) s[0] = s[0] + ld(xt, x, i, d - i);
	float mean = v_sum((s[0] + s[1]) + (s[2] + s[3])) / (float)d;

	vf m = v_set1(mean), q[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
	for (i = 0; i + 4 * VL <= d; i += 4 * VL)
		UNROLL for (int j = 0; j < 4; j++) {
			vf t = ld(xt, x, i + j * VL, VL) - m;
			q[j] = v_fma(t, t, q[j]);
		}
	for (; i < d; i += VL) {
		vf t = ld(xt, x, i, d - i) - m;
		if (d - i < VL) t = v_sel(v_first(d - i), t, v_zero()); // beyond the row
		q[0] = v_fma(t, t, q[0]);
	}
	float var = v_sum((q[0] + q[1]) + (q[2] + q[3])) / (float)d;
	vf r = v_set1(1.0f) / v_sqrt(v_set1(var + a->eps));

	for (i = 0; i < d; i += VL) {
		int64_t n = d - i;
		vf t = (ld(xt, x, i, n) - m) * r;
		if (a->weight) t = v_fma(t, ld(MC_F32, a->weight, i, n), ldf(a->bias, 0, i, n));
		else if (a->bias) t = t + ld(MC_F32, a->bias, i, n);
		if (scale) t = v_fma(t, ld(MC_F32, scale, i, n) + v_set1(1.0f), ldf(shift, 0, i, n));
		else if (shift) t = t + ld(MC_F32, shift, i, n);
		st(yt, y, i, t, n);
	}
}

static void norm(struct mc_worker *w, void *ctx) {
	const struct mc_norm *a = ctx;
	int64_t lo, hi;
	mc_share(w, a->m, 1, &lo, &hi);
	for (int64_t r = lo; r < hi; r++) {
		const void *x = row(&a->x, r);
		void *y = row(&a->y, r);
		int64_t g = r / mc_max(a->mod_rows, 1);
		const float *scale = row(&a->scale, g), *shift = row(&a->shift, g);
		switch (a->x.dtype << 1 | a->y.dtype) {
		case MC_F32 << 1 | MC_F32: norm_row(MC_F32, MC_F32, a, x, y, scale, shift); break;
		case MC_F32 << 1 | MC_BF16: norm_row(MC_F32, MC_BF16, a, x, y, scale, shift); break;
		case MC_BF16 << 1 | MC_F32: norm_row(MC_BF16, MC_F32, a, x, y, scale, shift); break;
		default: norm_row(MC_BF16, MC_BF16, a, x, y, scale, shift);
		}
	}
}
