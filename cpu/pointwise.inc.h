// pointwise.inc.h: ops that combine rows element by element.

static void gated(struct mc_worker *w, void *ctx) {
	const struct mc_gated *a = ctx;
	int64_t lo, hi;
	mc_share(w, a->m, 1, &lo, &hi);
	for (int64_t r = lo; r < hi; r++) {
		const float *x = row(&a->x, r), *gate = row(&a->gate, r / mc_max(a->gate_rows, 1));
		const void *h = row(&a->h, r);
		float *y = row(&a->y, r);
		for (int64_t i = 0; i < a->d; i += VL) {
			int64_t n = a->d - i;
			vf t = ld(MC_F32, x, i, n), u = ld(a->h.dtype, h, i, n);
			st(MC_F32, y, i, gate ? v_fma(ld(MC_F32, gate, i, n), u, t) : t + u, n);
		}
	}
}

V_INLINE void rows_row(const int act, const struct mc_rows *a, const void *p, const void *q, void *y) {
	for (int64_t i = 0; i < a->d; i += VL) {
		int64_t n = a->d - i;
		vf t = p ? ld(a->a.dtype, p, i, n) : v_zero();
		if (q) t = t + ld(a->b.dtype, q, i, n);
		st(a->y.dtype, y, i, v_act(act, t), n);
	}
}

static void rows(struct mc_worker *w, void *ctx) {
	const struct mc_rows *a = ctx;
	int64_t lo, hi;
	mc_share(w, a->count, 1, &lo, &hi);
	for (int64_t r = lo; r < hi; r++) {
		int64_t ia = a->ia ? a->ia[r] : r, ib = a->ib ? a->ib[r] : r;
		const void *p = ia < 0 ? NULL : row(&a->a, ia), *q = ib < 0 ? NULL : row(&a->b, ib);
		void *y = row(&a->y, a->iy ? a->iy[r] : r);
		switch (a->act) {
		case MC_GELU_ERF: rows_row(MC_GELU_ERF, a, p, q, y); break;
		case MC_GELU_TANH: rows_row(MC_GELU_TANH, a, p, q, y); break;
		case MC_SILU: rows_row(MC_SILU, a, p, q, y); break;
		default: rows_row(MC_NONE, a, p, q, y);
		}
	}
}

static void cast(struct mc_worker *w, void *ctx) {
	const struct mc_cast *a = ctx;
	int64_t lo, hi;
	int same = a->scale == 1 && a->shift == 0; // no arithmetic: −0 stays −0
	vf scale = v_set1(a->scale), shift = v_set1(a->shift);
	mc_share(w, a->m, 1, &lo, &hi);
	for (int64_t r = lo; r < hi; r++) {
		const void *x = row(&a->x, r);
		void *y = row(&a->y, r);
		for (int64_t i = 0; i < a->d; i += VL) {
			vf t = ld(a->x.dtype, x, i, a->d - i);
			st(a->y.dtype, y, i, same ? t : v_fma(t, scale, shift), a->d - i);
		}
	}
}
