// groupnorm.inc.h: GroupNorm and activation in NHWC.
//
// Statistics are taken block by block of pixels (mean, then squared distances
// from it, while the block is in cache) and merged in float64 in the order of
// the blocks. That is as accurate as two passes over the image and reads it
// once. Blocks depend on the number of channels only.

#define GN_VECS 4 // vectors of channels whose sums are in registers together

// gn_sums adds np pixels (ld elements apart) channel by channel; with mean, the
// squares of their distances from it.
V_INLINE void gn_sums(const int dt, const struct mc_groupnorm *g, const void *x, int64_t np, const float *mean,
                      float *sum) {
	int64_t es = dt == MC_BF16 ? 2 : 4;
	for (int64_t c = 0; c < g->ch; c += GN_VECS * VL) {
		vf s[GN_VECS], m[GN_VECS];
		UNROLL for (int j = 0; j < GN_VECS; j++) {
			s[j] = v_zero();
			m[j] = mean ? v_load_n(mean + c + j * VL, g->ch - c - j * VL) : v_zero();
		}
		const char *p = (const char *)x;
		if (g->ch - c >= GN_VECS * VL) {
			for (int64_t i = 0; i < np; i++, p += g->x.ld * es)
				UNROLL for (int j = 0; j < GN_VECS; j++) {
					vf t = ld(dt, p, c + j * VL, VL) - m[j];
					s[j] = mean ? v_fma(t, t, s[j]) : s[j] + t;
				}
		} else {
			for (int64_t i = 0; i < np; i++, p += g->x.ld * es)
				for (int j = 0; j < GN_VECS && c + j * VL < g->ch; j++) {
					vf t = ld(dt, p, c + j * VL, g->ch - c - j * VL) - m[j];
					s[j] = mean ? v_fma(t, t, s[j]) : s[j] + t;
				}
		}
		UNROLL for (int j = 0; j < GN_VECS; j++) v_store_n(sum + c + j * VL, s[j], g->ch - c - j * VL);
	}
}

// gn_block leaves the moments of np pixels in out[group]. mean and sum have
// room for a float per channel.
V_INLINE void gn_block(const int dt, const struct mc_groupnorm *g, const void *x, int64_t np, float *mean, float *sum,
                       struct mc_moments *out) {
	int64_t per = g->ch / g->groups;
	gn_sums(dt, g, x, np, NULL, sum);
	for (int64_t k = 0; k < g->groups; k++) {
		double s = 0;
		for (int64_t c = k * per; c < (k + 1) * per; c++) s += sum[c];
		float m = (float)(s / (double)(np * per));
		for (int64_t c = k * per; c < (k + 1) * per; c++) mean[c] = m;
		out[k].mean = m;
	}
	gn_sums(dt, g, x, np, mean, sum);
	for (int64_t k = 0; k < g->groups; k++) {
		double s = 0;
		for (int64_t c = k * per; c < (k + 1) * per; c++) s += sum[c];
		out[k].m2 = s;
	}
}

// gn_merge adds the moments of nb numbers to those of na (Chan et al. 1979).
static void gn_merge(struct mc_moments *a, double na, const struct mc_moments *b, double nb) {
	double d = b->mean - a->mean, n = na + nb;
	a->mean += d * nb / n;
	a->m2 += b->m2 + d * d * na * nb / n;
}

// gn_apply normalises np pixels. mean, scale and shift: one float per channel.
V_INLINE void gn_apply(const int act, const int xt, const int yt, const struct mc_groupnorm *g, const char *x, char *y,
                       int64_t np, const float *mean, const float *scale, const float *shift) {
	int64_t xs = g->x.ld * (xt == MC_BF16 ? 2 : 4), ys = g->y.ld * (yt == MC_BF16 ? 2 : 4);
	for (int64_t i = 0; i < np; i++, x += xs, y += ys)
		for (int64_t c = 0; c < g->ch; c += VL) {
			int64_t n = g->ch - c;
			vf t = ld(xt, x, c, n) - ld(MC_F32, mean, c, n);
			st(yt, y, c, v_act(act, v_fma(t, ld(MC_F32, scale, c, n), ld(MC_F32, shift, c, n))), n);
		}
}

V_INLINE void gn_apply_act(const int act, const struct mc_groupnorm *g, const char *x, char *y, int64_t np,
                           const float *mean, const float *scale, const float *shift) {
	switch (g->x.dtype << 1 | g->y.dtype) {
	case MC_F32 << 1 | MC_F32: gn_apply(act, MC_F32, MC_F32, g, x, y, np, mean, scale, shift); break;
	case MC_F32 << 1 | MC_BF16: gn_apply(act, MC_F32, MC_BF16, g, x, y, np, mean, scale, shift); break;
	case MC_BF16 << 1 | MC_F32: gn_apply(act, MC_BF16, MC_F32, g, x, y, np, mean, scale, shift); break;
	default: gn_apply(act, MC_BF16, MC_BF16, g, x, y, np, mean, scale, shift);
	}
}

static void groupnorm(struct mc_worker *w, void *ctx) {
	const struct mc_groupnorm *g = ctx;
	int64_t blocks = mc_ceil(g->pixels, g->block), per = g->ch / g->groups;
	float *mean = w->scratch, *scale = mean + g->ch, *shift = scale + g->ch;

	// Moments of each block …
	for (int64_t t = mc_take(w); t < g->n * blocks; t = mc_take(w)) {
		int64_t p0 = t % blocks * g->block, np = mc_min(g->block, g->pixels - p0);
		const void *x = row(&g->x, t / blocks * g->pixels + p0);
		if (g->x.dtype == MC_BF16) gn_block(MC_BF16, g, x, np, mean, scale, g->stats + t * g->groups);
		else gn_block(MC_F32, g, x, np, mean, scale, g->stats + t * g->groups);
	}
	mc_take_reset(w);
	// … merged into those of the first …
	for (int64_t t = mc_take(w); t < g->n * g->groups; t = mc_take(w)) {
		struct mc_moments *m = g->stats + t / g->groups * blocks * g->groups + t % g->groups;
		for (int64_t b = 1; b < blocks; b++) {
			int64_t np = mc_min(g->block, g->pixels - b * g->block);
			gn_merge(m, (double)(b * g->block * per), m + b * g->groups, (double)(np * per));
		}
	}
	mc_take_reset(w);
	// … and used.
	int64_t image = -1;
	for (int64_t t = mc_take(w); t < g->n * blocks; t = mc_take(w)) {
		int64_t p0 = t % blocks * g->block, np = mc_min(g->block, g->pixels - p0);
		if (image != t / blocks) {
			image = t / blocks;
			for (int64_t c = 0; c < g->ch; c++) {
				const struct mc_moments *m = g->stats + image * blocks * g->groups + c / per;
				float var = (float)(m->m2 / (double)(g->pixels * per));
				mean[c] = (float)m->mean;
				v_store_n(scale + c, v_set1(g->weight ? g->weight[c] : 1) / v_sqrt(v_set1(var + g->eps)), 1);
				shift[c] = g->bias ? g->bias[c] : 0;
			}
		}
		const char *x = row(&g->x, image * g->pixels + p0);
		char *y = row(&g->y, image * g->pixels + p0);
		switch (g->act) {
		case MC_GELU_ERF: gn_apply_act(MC_GELU_ERF, g, x, y, np, mean, scale, shift); break;
		case MC_GELU_TANH: gn_apply_act(MC_GELU_TANH, g, x, y, np, mean, scale, shift); break;
		case MC_SILU: gn_apply_act(MC_SILU, g, x, y, np, mean, scale, shift); break;
		default: gn_apply_act(MC_NONE, g, x, y, np, mean, scale, shift);
		}
	}
}
