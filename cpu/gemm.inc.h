// gemm.inc.h: packing, micro-kernels, epilogue and the GEMM loop.
//
// A micro-kernel multiplies up to KMR rows of A with KNV vectors of columns of
// one packed panel, all accumulators in registers, k in order, one
// multiply-add per element and step. So an element's value depends on its row
// and column only, never on tile shape, thread count or batch.

#if defined(MC_ISA_AVX512)
#define KMR 14 // 28 accumulators + 2 of B + 1 of A = 31 registers
#define KNV 2
#elif defined(MC_ISA_AVX2)
#define KMR 6 // 12 + 2 + 1
#define KNV 2
#elif defined(__aarch64__)
#define KMR 8 // 16 + 2 + 1 of 32
#define KNV 2
#else
#define KMR 4 // 8 + 2 + 1 of 16
#define KNV 2
#endif
#define KN (KNV * VL) // columns of one micro-kernel call; MC_NR / KN calls make a panel

#define UNROLL _Pragma("GCC unroll 16")

// Rows of A are reached from every third one, so that few registers hold
// addresses (base + stride, base + 2·stride). The asm keeps the compiler from
// seeing through that.
#define KBASES ((KMR + 2) / 3)
#define A_ROW(i) (ar[(i) / 3] + (i) % 3 * lda)

typedef void (*kern_f32_fn)(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                            int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs);
typedef void (*kern_bf16_fn)(int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                             int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs);

#define KERN_BEGIN(atype)                                                                         \
	vf acc[KMR][KNV];                                                                         \
	const atype *ar[KBASES];                                                                  \
	UNROLL for (int i = 0; i < mr; i++) {                                                     \
		UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = add ? v_load(c + i * ldc + j * VL) : v_zero(); \
	}                                                                                         \
	UNROLL for (int i = 0; i < (mr + 2) / 3; i++) {                                           \
		ar[i] = a + 3 * i * lda;                                                          \
		__asm__("" : "+r"(ar[i]));                                                        \
	}

#define KERN_END                                                                                  \
	if (bias) {                                                                               \
		UNROLL for (int j = 0; j < KNV; j++) {                                            \
			vf bj = v_load(bias + j * VL);                                            \
			UNROLL for (int i = 0; i < mr; i++) acc[i][j] = acc[i][j] + bj;           \
		}                                                                                 \
	}                                                                                         \
	UNROLL for (int i = 0; i < mr; i++) {                                                     \
		UNROLL for (int j = 0; j < KNV; j++) v_store(c + i * ldc + j * VL, acc[i][j]);    \
	}

// Each step fetches ahead two lines at pf, which the caller places: on the
// same panel when B streams from memory, else on a part of the next panel.
#define KERN_PREFETCH                                                                             \
	__builtin_prefetch(pf);                                                                   \
	__builtin_prefetch(pf + MC_LINE);                                                         \
	pf += pfs;

V_INLINE void kern_f32(const int mr, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                       int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {
	KERN_BEGIN(float)
	for (int64_t kk = 0; kk < k; kk++) {
		vf bv[KNV];
		UNROLL for (int j = 0; j < KNV; j++) bv[j] = v_load(b + j * VL);
		KERN_PREFETCH
		UNROLL for (int i = 0; i < mr; i++) {
			vf x = v_set1(A_ROW(i)[kk]);
			UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_fma(x, bv[j], acc[i][j]);
		}
		b += ldb;
	}
	KERN_END
}

V_INLINE void kern_bf16(const int mr, int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb,
                        float *c, int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {
	KERN_BEGIN(mc_bf16)
	int64_t kk = 0;
	for (; kk + 1 < k; kk += 2) {
		vi bv[KNV];
		UNROLL for (int j = 0; j < KNV; j++) bv[j] = v_loadi(b + j * VL);
		KERN_PREFETCH
		UNROLL for (int i = 0; i < mr; i++) {
			vi x = v_set1_pair(A_ROW(i) + kk);
			UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_dot(acc[i][j], x, bv[j]);
		}
		b += ldb;
	}
	if (kk < k) {
		UNROLL for (int i = 0; i < mr; i++) {
			vi x = v_set1i(A_ROW(i)[kk]);
			UNROLL for (int j = 0; j < KNV; j++)
				acc[i][j] = v_dot(acc[i][j], x, v_and(v_loadi(b + j * VL), v_set1i(0xffff)));
		}
	}
	KERN_END
}

#define KERN_OF(mr)                                                                               \
	static void kern_f32_##mr(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, \
	                          int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {            \
		kern_f32(mr, k, a, lda, b, ldb, c, ldc, add, bias, pf, pfs);                            \
	}                                                                                         \
	static void kern_bf16_##mr(int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, \
	                           int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {           \
		kern_bf16(mr, k, a, lda, b, ldb, c, ldc, add, bias, pf, pfs);                           \
	}

KERN_OF(1) KERN_OF(2) KERN_OF(3) KERN_OF(4)
#if KMR > 4
KERN_OF(5) KERN_OF(6)
#endif
#if KMR > 6
KERN_OF(7) KERN_OF(8)
#endif
#if KMR > 8
KERN_OF(9) KERN_OF(10) KERN_OF(11) KERN_OF(12) KERN_OF(13) KERN_OF(14)
#endif

#if KMR == 14
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4, kern_##d##_5, kern_##d##_6, kern_##d##_7, \
	kern_##d##_8, kern_##d##_9, kern_##d##_10, kern_##d##_11, kern_##d##_12, kern_##d##_13, kern_##d##_14}
#elif KMR == 8
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4, kern_##d##_5, kern_##d##_6, kern_##d##_7, kern_##d##_8}
#elif KMR == 6
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4, kern_##d##_5, kern_##d##_6}
#else
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4}
#endif
static const kern_f32_fn kern_f32_table[KMR + 1] = KERN_TABLE(f32);
static const kern_bf16_fn kern_bf16_table[KMR + 1] = KERN_TABLE(bf16);

static void mul_f32(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                    int64_t ldc, int add) {
	int64_t blocks = mc_ceil(m, KMR);
	for (int64_t i = 0; i < blocks; i++) {
		int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
		for (int64_t j = 0; j < MC_NR; j += KN)
			kern_f32_table[hi - lo](k, a + lo * lda, lda, b + j, ldb, c + lo * ldc + j, ldc, add,
			                        NULL, (const char *)b, 0);
	}
}

static void mul_bf16(int64_t m, int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                     int64_t ldc, int add) {
	int64_t blocks = mc_ceil(m, KMR);
	for (int64_t i = 0; i < blocks; i++) {
		int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
		for (int64_t j = 0; j < MC_NR; j += KN)
			kern_bf16_table[hi - lo](k, a + lo * lda, lda, b + j, ldb, c + lo * ldc + j, ldc, add,
			                         NULL, (const char *)b, 0);
	}
}

// ---- conversion and packing -------------------------------------------------

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

// ---- epilogue ----------------------------------------------------------------

// One vector of the epilogue, n elements of it (all: the whole vector).
V_INLINE void epi_vec(const int act, const int all, const float *t, const float *bias, const float *gate,
                      const float *res, float *yf, mc_bf16 *yb, int64_t n) {
	vf v = all ? v_load(t) : v_load_n(t, n);
	if (bias) v = v + (all ? v_load(bias) : v_load_n(bias, n));
	v = v_act(act, v);
	if (gate) v = v * (all ? v_load(gate) : v_load_n(gate, n));
	if (res) v = v + (all ? v_load(res) : v_load_n(res, n));
	if (yf) {
		if (all) v_store(yf, v);
		else v_store_n(yf, v, n);
	} else {
		if (all) v_storeb(yb, v);
		else v_storeb_n(yb, v, n);
	}
}

#define AT(p, i) ((p) ? (p) + (i) : (p))

V_INLINE void epi_tile(const int act, const struct mc_epilogue *e, int64_t r0, int64_t c0, int64_t m, int64_t n,
                       const float *t, int64_t ldt) {
	const float *bias = AT(e->bias, c0);
	for (int64_t i = 0; i < m; i++, t += ldt) {
		int64_t r = r0 + i, j = 0, g = e->gate_rows > 1 ? r / e->gate_rows : r;
		const float *gate = AT(e->gate, g * e->ldg + c0);
		const float *res = AT(e->res, r * e->ldr + c0);
		float *yf = e->y_dtype == MC_F32 ? (float *)e->y + r * e->ldy + c0 : 0;
		mc_bf16 *yb = e->y_dtype == MC_F32 ? 0 : (mc_bf16 *)e->y + r * e->ldy + c0;
		for (; j + VL <= n; j += VL)
			epi_vec(act, 1, t + j, AT(bias, j), AT(gate, j), AT(res, j), AT(yf, j), AT(yb, j), VL);
		if (j < n) epi_vec(act, 0, t + j, AT(bias, j), AT(gate, j), AT(res, j), AT(yf, j), AT(yb, j), n - j);
	}
}

static void epilogue(const struct mc_epilogue *e, int64_t r0, int64_t c0, int64_t m, int64_t n, const float *t,
                     int64_t ldt) {
	switch (e->act) {
	case MC_GELU_ERF: epi_tile(MC_GELU_ERF, e, r0, c0, m, n, t, ldt); break;
	case MC_GELU_TANH: epi_tile(MC_GELU_TANH, e, r0, c0, m, n, t, ldt); break;
	case MC_SILU: epi_tile(MC_SILU, e, r0, c0, m, n, t, ldt); break;
	default: epi_tile(MC_NONE, e, r0, c0, m, n, t, ldt);
	}
}

// ---- GEMM ----------------------------------------------------------------------

// epi_fetch asks for what the epilogue of a tile will read, while the tile is
// computed: gate and residual rows lie far apart, and no hardware prefetcher
// finds them.
V_INLINE void epi_fetch(const struct mc_epilogue *e, int64_t r0, int64_t c0, int64_t m) {
	if (!e->gate && !e->res) return;
	for (int64_t r = r0; r < r0 + m; r++) {
		const float *gate = AT(e->gate, (e->gate_rows > 1 ? r / e->gate_rows : r) * e->ldg + c0);
		const float *res = AT(e->res, r * e->ldr + c0);
		if (gate) __builtin_prefetch(gate), __builtin_prefetch(gate + 16);
		if (res) __builtin_prefetch(res), __builtin_prefetch(res + 16);
	}
}

// gemm_core multiplies m rows of x, in the dtype of W, by panels p0 … p1-1 of g;
// they are rows r0 … r0+m-1 of Y. tile has MC_GEMM_TILE bytes.
static void gemm_core(const struct mc_gemm *g, const void *x, int64_t ldx, int64_t r0, int64_t m, int64_t p0,
                      int64_t p1, float *tile) {
	int64_t blocks = mc_ceil(m, KMR), panel = mc_panel_bytes(g->w_dtype, g->k);
	// With one block of rows B streams through once, and is fetched some way
	// ahead. With more, it streams while the first block passes and comes from
	// L2 for the others; so each block fetches its part of the next panel.
	int64_t part = panel / blocks / MC_LINE * MC_LINE, step = 2 * MC_LINE / blocks;
	int plain = g->epi.y_dtype == MC_F32 && g->epi.act == MC_NONE && !g->epi.gate && !g->epi.res;
	for (int64_t p = p0; p < p1; p++) {
		const char *b = (const char *)g->w + p * panel;
		int64_t c0 = mc_max(p * MC_NR, g->n0), c1 = mc_min((p + 1) * MC_NR, g->n0 + g->n);
		// A whole panel that needs no more than its bias goes straight to Y.
		int direct = plain && c1 - c0 == MC_NR;
		for (int64_t i = 0; i < blocks; i++) {
			int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
			const char *pf = blocks == 1 ? b + MC_GEMM_AHEAD : p + 1 < p1 ? b + panel + i * part : b;
			int64_t pfs = blocks > 1 && p + 1 == p1 ? 0 : step;
			epi_fetch(&g->epi, r0 + lo, c0 - g->n0, hi - lo);
			float *c = direct ? (float *)g->epi.y + (r0 + lo) * g->epi.ldy + c0 - g->n0 : tile;
			int64_t ldc = direct ? g->epi.ldy : MC_NR;
			const float *bias = direct ? AT(g->epi.bias, c0 - g->n0) : NULL;
			for (int64_t j = 0; j < MC_NR; j += KN) {
				if (g->w_dtype == MC_F32)
					kern_f32_table[hi - lo](g->k, (const float *)x + lo * ldx, ldx, (const float *)b + j,
					                        MC_NR, c + j, ldc, 0, AT(bias, j), pf, pfs);
				else
					kern_bf16_table[hi - lo](g->k, (const mc_bf16 *)x + lo * ldx, ldx,
					                         (const uint32_t *)b + j, MC_NR, c + j, ldc, 0, AT(bias, j), pf, pfs);
			}
			if (!direct) epilogue(&g->epi, r0 + lo, c0 - g->n0, hi - lo, c1 - c0, tile + c0 - p * MC_NR, MC_NR);
		}
	}
}

// gemm_part computes rows r0 … r0+m-1 of panels p0 … p1-1 of g on one worker,
// whose scratch has mc_gemm_scratch(g) bytes.
static void gemm_part(const struct mc_gemm *g, int64_t r0, int64_t m, int64_t p0, int64_t p1, void *scratch) {
	const char *x = (const char *)g->x + r0 * g->ldx * (g->x_dtype == MC_F32 ? 4 : 2);
	int64_t ldx = g->ldx;
	if (mc_gemm_copies(g, m)) {
		// Into rows that start in different cache sets, in the dtype of W.
		char *copy = (char *)scratch + MC_GEMM_TILE;
		ldx = mc_gemm_ldcopy(g->k);
		for (int64_t i = 0; i < m; i++) {
			if (g->x_dtype == MC_F32 && g->w_dtype == MC_BF16)
				to_bf16((mc_bf16 *)copy + i * ldx, (const float *)x + i * g->ldx, g->k);
			else if (g->x_dtype == MC_BF16 && g->w_dtype == MC_F32)
				to_f32((float *)copy + i * ldx, (const mc_bf16 *)x + i * g->ldx, g->k);
			else if (g->w_dtype == MC_F32)
				memcpy((float *)copy + i * ldx, (const float *)x + i * g->ldx, (size_t)g->k * 4);
			else
				memcpy((mc_bf16 *)copy + i * ldx, (const mc_bf16 *)x + i * g->ldx, (size_t)g->k * 2);
		}
		x = copy;
	}
	gemm_core(g, x, ldx, r0, m, p0, p1, scratch);
}

static void gemm(struct mc_worker *w, const struct mc_gemm *g) {
	struct mc_gemm_plan plan = mc_gemm_split(g, w->nt);
	for (int64_t t = mc_take(w); t < plan.groups * plan.chunks; t = mc_take(w)) {
		int64_t rg = t / plan.chunks, ch = t % plan.chunks;
		int64_t lo = g->m * rg / plan.groups, hi = g->m * (rg + 1) / plan.groups;
		int64_t np = plan.p1 - plan.p0;
		gemm_part(g, lo, hi - lo, plan.p0 + np * ch / plan.chunks, plan.p0 + np * (ch + 1) / plan.chunks, w->scratch);
	}
}
