// gemm.inc.h: epilogue and the GEMM loop.

// One vector of the epilogue, n elements of it (all: the whole vector).
V_INLINE void epi_vec(const int act, const int all, const int f32, const float *t, const float *bias,
                      const float *gate, const float *res, void *y, int64_t n) {
	vf v = all ? v_load(t) : v_load_n(t, n);
	if (bias) v = v + (all ? v_load(bias) : v_load_n(bias, n));
	v = v_act(act, v);
	if (gate) v = v * (all ? v_load(gate) : v_load_n(gate, n));
	if (res) v = v + (all ? v_load(res) : v_load_n(res, n));
	if (f32) {
		if (all) v_store(y, v);
		else v_store_n(y, v, n);
	} else {
		if (all) v_storeb(y, v);
		else v_storeb_n(y, v, n);
	}
}

V_INLINE void epi_tile(const int act, const int gated, const int f32, const struct mc_epilogue *e, int64_t r0,
                       int64_t c0, int64_t m, int64_t n, const float *t, int64_t ldt) {
	const float *bias = AT(e->bias, c0);
	for (int64_t i = 0; i < m; i++, t += ldt) {
		int64_t r = r0 + i, j = 0, g = (e->row0 + r) / mc_max(e->gate_rows, 1);
		const float *gate = gated ? AT(e->gate, g * e->ldg + c0) : NULL;
		const float *res = gated ? AT(e->res, r * e->ldr + c0) : NULL;
		const int64_t es = f32 ? 4 : 2;
		char *y = (char *)e->y + (r * e->ldy + c0) * es;
		for (; j + VL <= n; j += VL)
			epi_vec(act, 1, f32, t + j, AT(bias, j), AT(gate, j), AT(res, j), y + j * es, VL);
		if (j < n) epi_vec(act, 0, f32, t + j, AT(bias, j), AT(gate, j), AT(res, j), y + j * es, n - j);
	}
}

// epilogue works on m rows and n <= 32 columns of a tile t (row stride ldt floats; t
// is read in whole vectors up to column 32) whose first element is (r0, c0).
static void epilogue(const struct mc_epilogue *e, int64_t r0, int64_t c0, int64_t m, int64_t n, const float *t,
                     int64_t ldt) {
	// One loop for each combination, without tests inside.
#define EPI_TILE(act)                                                                             \
	switch ((e->gate || e->res ? 2 : 0) + (e->y_dtype == MC_F32)) {                           \
	case 0: epi_tile(act, 0, 0, e, r0, c0, m, n, t, ldt); break;                             \
	case 1: epi_tile(act, 0, 1, e, r0, c0, m, n, t, ldt); break;                             \
	case 2: epi_tile(act, 1, 0, e, r0, c0, m, n, t, ldt); break;                             \
	default: epi_tile(act, 1, 1, e, r0, c0, m, n, t, ldt);                                    \
	}
	switch (e->act) {
	case MC_GELU_ERF: EPI_TILE(MC_GELU_ERF) break;
	case MC_GELU_TANH: EPI_TILE(MC_GELU_TANH) break;
	case MC_SILU: EPI_TILE(MC_SILU) break;
	default: EPI_TILE(MC_NONE)
	}
#undef EPI_TILE
}

// epi_direct tells whether n columns need no more than their bias, and can go
// straight to Y as a whole panel.
V_INLINE int epi_direct(const struct mc_epilogue *e, int64_t n) {
	return n == MC_NR && e->y_dtype == MC_F32 && e->act == MC_NONE && !e->gate && !e->res;
}

// epi_fetch asks for what the epilogue of a tile will read, while the tile is
// computed: gate and residual rows lie far apart, and no hardware prefetcher
// finds them.
V_INLINE void epi_fetch(const struct mc_epilogue *e, int64_t r0, int64_t c0, int64_t m) {
	if (!e->gate && !e->res) return;
	for (int64_t r = r0; r < r0 + m; r++) {
		const float *gate = AT(e->gate, (e->row0 + r) / mc_max(e->gate_rows, 1) * e->ldg + c0);
		const float *res = AT(e->res, r * e->ldr + c0);
		if (gate) __builtin_prefetch(gate), __builtin_prefetch(gate + 16);
		if (res) __builtin_prefetch(res), __builtin_prefetch(res + 16);
	}
}

#if defined(KBLOCK)
enum { GEMM_BLOCKED = 1 };

// epi_claim is epi_fetch, and asks for the lines of Y that the epilogue will write.
V_INLINE void epi_claim(const struct mc_epilogue *e, int64_t r0, int64_t c0, int64_t m) {
	epi_fetch(e, r0, c0, m);
	int64_t es = e->y_dtype == MC_F32 ? 4 : 2;
	for (int64_t r = r0; r < r0 + m; r++)
		for (int64_t b = 0; b < MC_NR * es; b += MC_LINE)
			__builtin_prefetch((const char *)e->y + (r * e->ldy + c0) * es + b, 1);
}

// round_bf16 rounds n elements to bf16 and leaves them f32.
static void round_bf16(float *dst, const float *src, int64_t n) {
	int64_t i = 0;
	for (; i + VL <= n; i += VL) v_store(dst + i, v_to_bf16(v_load(src + i)));
	if (i < n) v_store_n(dst + i, v_to_bf16(v_load_n(src + i, n - i)), n - i);
}

// to_product brings n elements x of A into f32, as the product takes them.
static void to_product(const struct mc_gemm *g, float *dst, const char *x, int64_t n) {
	if (g->x_dtype == MC_BF16) to_f32(dst, (const mc_bf16 *)x, n);
	else if (g->w_dtype == MC_BF16) round_bf16(dst, (const float *)x, n);
	else memcpy(dst, x, (size_t)n * 4);
}

// block_a is columns k0 … k0+k-1 of m rows of A (x, row stride *ld) in f32: where
// they lie, or widened or rounded to bf16 in ax, at stride KBLOCK (*ld then).
static const float *block_a(const struct mc_gemm *g, const char *x, int64_t *ld, int64_t m, int64_t k0, int64_t k, float *ax) {
	int64_t ldx = *ld;
	if (g->x_dtype == MC_F32 && g->w_dtype == MC_F32) return (const float *)x + k0;
	*ld = KBLOCK;
	for (int64_t i = 0; i < m; i++) to_product(g, ax + i * KBLOCK, x + (i * ldx + k0) * (g->x_dtype == MC_F32 ? 4 : 2), k);
	return ax;
}

// gemm_blocks is gemm_core for more rows, in blocks of k. A block of A stays in L2
// while MC_GEMM_PANELS panels pass; so do their tiles of C. x has the dtype g says.
static void gemm_blocks(const struct mc_gemm *g, const char *x, int64_t ldx, int64_t r0, int64_t m, int64_t p0,
                        int64_t p1, float *tiles) {
	int64_t panel = mc_panel_bytes(g->w_dtype, g->k), row = MC_NR * (g->w_dtype == MC_F32 ? 4 : 2); // bytes
	float *ax = tiles + MC_GEMM_PANELS * MC_GEMM_BLOCK_ROWS * MC_NR, *bx = ax + MC_GEMM_BLOCK_ROWS * KBLOCK;
	int64_t block = m > 32 || g->streams ? KBLOCK : KBLOCK / 2; // few rows leave little time to fetch what follows
	int64_t sets = mc_ceil(p1 - p0, MC_GEMM_PANELS);
	for (int64_t i = 0; i < sets; i++) {
		int64_t q0 = p0 + (p1 - p0) * i / sets, q1 = p0 + (p1 - p0) * (i + 1) / sets;
		for (int64_t k0 = 0, kn; k0 < g->k; k0 += kn) {
			kn = mc_min(block, g->k - k0);
			int64_t lda = ldx, last = k0 + kn == g->k;
			const float *a;
			if (g->streams) a = g->streams + r0 * g->k + m * k0, lda = kn;
			else a = block_a(g, x, &lda, m, k0, kn, ax);
			for (int64_t p = q0; p < q1; p++) {
				const char *w = g->w, *b = w + p * panel + k0 * row;
				// What comes after this block; blocks are even, so that pairs stay whole.
				const char *next = p + 1 < q1 ? b + panel : !last ? w + q0 * panel + (k0 + kn) * row : q1 < p1 ? w + q1 * panel : NULL;
				const float *bf = (const float *)b;
				float *c = tiles + (p - q0) * m * MC_NR;
				int64_t c0 = mc_max(p * MC_NR, g->n0), n = mc_min((p + 1) * MC_NR, g->n0 + g->n) - c0;
				if (g->w_dtype == MC_BF16) {
					widen_pairs((const uint32_t *)b, kn, bx);
					bf = bx;
				}
				int direct = last && epi_direct(&g->epi, n);
				float *y = direct ? (float *)g->epi.y + r0 * g->epi.ldy + c0 - g->n0 : c;
				if (last) epi_claim(&g->epi, r0, c0 - g->n0, m);
				block_f32(m, kn, a, lda, g->streams != NULL, bf, c, MC_NR, k0 > 0, y, direct ? g->epi.ldy : MC_NR,
				          direct ? AT(g->epi.bias, c0 - g->n0) : NULL, next, next ? kn * row : 0);
				if (last && !direct) epilogue(&g->epi, r0, c0 - g->n0, m, n, c + c0 - p * MC_NR, MC_NR);
			}
		}
	}
}

// gemm_streams writes A into g->streams: for each group of rows the blocks of k, one after
// the other, and in each the rows in stream_at's order.
static void gemm_streams(struct mc_worker *w, const struct mc_gemm *g) {
	int64_t groups = mc_gemm_groups(g, 1), parts = mc_ceil(g->m, MC_GEMM_STREAM_ROWS), es = g->x_dtype == MC_F32 ? 4 : 2;
	for (int64_t t = mc_take(w); t < parts; t = mc_take(w)) {
		int64_t rg = 0;
		for (int64_t r = g->m * t / parts; r < g->m * (t + 1) / parts; r++) {
			while (r >= g->m * (rg + 1) / groups) rg++;
			int64_t lo = g->m * rg / groups, m = g->m * (rg + 1) / groups - lo, at = stream_at(r - lo, m);
			const char *x = (const char *)g->x + r * g->ldx * es;
			float *dst = g->streams + lo * g->k;
			for (int64_t k0 = 0, kn; k0 < g->k; k0 += kn) {
				kn = mc_min(KBLOCK, g->k - k0);
				to_product(g, dst + m * k0 + at * kn, x + k0 * es, kn);
			}
		}
	}
}

#else
enum { GEMM_BLOCKED = 0 };
#endif

// gemm_cut tells whether a product of m rows of A goes by blocks of k.
static int gemm_cut(const struct mc_gemm *g, int64_t m) { return GEMM_BLOCKED && m > KROWS(g->w_dtype) && g->k > 0; }

// gemm_core multiplies m rows of x by panels p0 … p1-1 of g; they are rows r0 … r0+m-1
// of Y. x has the dtype of W, or any if gemm_cut. tile has MC_GEMM_TILE bytes.
static void gemm_core(const struct mc_gemm *g, const void *x, int64_t ldx, int64_t r0, int64_t m, int64_t p0,
                      int64_t p1, float *tile) {
#if defined(KBLOCK)
	if (gemm_cut(g, m)) {
		int64_t groups = mc_ceil(m, MC_GEMM_BLOCK_ROWS), es = g->x_dtype == MC_F32 ? 4 : 2;
		for (int64_t i = 0; i < groups; i++) {
			int64_t lo = m * i / groups, hi = m * (i + 1) / groups;
			gemm_blocks(g, (const char *)x + lo * ldx * es, ldx, r0 + lo, hi - lo, p0, p1, tile);
		}
		return;
	}
#endif
	int64_t blocks = mc_ceil(m, KMR), panel = mc_panel_bytes(g->w_dtype, g->k);
	// In one pass B streams through, and is fetched some way ahead. In more, it
	// streams with the first and comes from L2 for the others; so each fetches its
	// part of the next panel.
	int64_t passes = blocks * (MC_NR / KN);
	int64_t part = panel / passes / MC_LINE * MC_LINE, step = 2 * MC_LINE / passes;
	const char *end = (const char *)g->w + p1 * panel;
	for (int64_t p = p0; p < p1; p++) {
		const char *b = (const char *)g->w + p * panel, *pf = passes == 1 ? b + MC_GEMM_AHEAD : p + 1 < p1 ? b + panel : b;
		int64_t c0 = mc_max(p * MC_NR, g->n0), c1 = mc_min((p + 1) * MC_NR, g->n0 + g->n);
		int64_t pfs = passes > 1 && p + 1 == p1 ? 0 : step;
		int direct = epi_direct(&g->epi, c1 - c0);
		for (int64_t i = 0; i < blocks; i++) {
			int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
			epi_fetch(&g->epi, r0 + lo, c0 - g->n0, hi - lo);
			float *c = direct ? (float *)g->epi.y + (r0 + lo) * g->epi.ldy + c0 - g->n0 : tile;
			int64_t ldc = direct ? g->epi.ldy : MC_NR;
			const float *bias = direct ? AT(g->epi.bias, c0 - g->n0) : NULL;
			for (int64_t j = 0; j < MC_NR; j += KN) {
				if (g->w_dtype == MC_F32)
					kern_f32_table[hi - lo](1, g->k, (const float *)x + lo * ldx, ldx, 0, (const float *)b + j,
					                        MC_NR, c + j, ldc, 0, c + j, ldc, AT(bias, j), pf, end, pfs);
				else
					kern_bf16_table[hi - lo](1, g->k, (const mc_bf16 *)x + lo * ldx, ldx, 0,
					                         (const uint32_t *)b + j, MC_NR, c + j, ldc, 0, c + j, ldc, AT(bias, j), pf, end, pfs);
				if (pfs) pf += part;
			}
			if (!direct) epilogue(&g->epi, r0 + lo, c0 - g->n0, hi - lo, c1 - c0, tile + c0 - p * MC_NR, MC_NR);
		}
	}
}

// gemm_part computes rows r0 … r0+m-1 of panels p0 … p1-1 of g on one worker,
// whose scratch has mc_gemm_scratch(g) bytes.
static void gemm_part(const struct mc_gemm *g, int64_t r0, int64_t m, int64_t p0, int64_t p1, void *scratch) {
	int es = g->x_dtype == MC_F32 ? 4 : 2;
	const char *x = (const char *)g->x + r0 * g->ldx * es;
	int64_t ldx = g->ldx;
	if (!gemm_cut(g, m) && mc_gemm_copies(g, m)) {
		// Into rows that start in different cache sets, in the dtype of the product.
		char *copy = (char *)scratch + MC_GEMM_TILE;
		ldx = mc_gemm_ldcopy(g->k);
		for (int64_t i = 0; i < m; i++) {
			const void *from = x + i * g->ldx * es;
			if (g->w_dtype == MC_BF16 && g->x_dtype == MC_F32)
				to_bf16((mc_bf16 *)copy + i * ldx, from, g->k);
			else if (g->w_dtype == MC_BF16)
				memcpy((mc_bf16 *)copy + i * ldx, from, (size_t)g->k * 2);
			else if (g->x_dtype == MC_BF16)
				to_f32((float *)copy + i * ldx, from, g->k);
			else
				memcpy((float *)copy + i * ldx, from, (size_t)g->k * 4);
		}
		x = copy;
	}
	gemm_core(g, x, ldx, r0, m, p0, p1, scratch);
}

static void gemm(struct mc_worker *w, const struct mc_gemm *g) {
	struct mc_gemm_plan plan = mc_gemm_split(g, w->nt, GEMM_BLOCKED);
	for (int64_t t = mc_take(w); t < plan.groups * plan.chunks; t = mc_take(w)) {
		int64_t rg = plan.by_chunks ? t % plan.groups : t / plan.chunks, ch = plan.by_chunks ? t / plan.groups : t % plan.chunks;
		int64_t lo = g->m * rg / plan.groups, hi = g->m * (rg + 1) / plan.groups;
		int64_t np = plan.p1 - plan.p0;
		gemm_part(g, lo, hi - lo, plan.p0 + np * ch / plan.chunks, plan.p0 + np * (ch + 1) / plan.chunks, w->scratch);
	}
}
