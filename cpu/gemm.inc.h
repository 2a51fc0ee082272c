// gemm.inc.h: packing, micro-kernels, epilogue and the GEMM loop.
//
// A micro-kernel multiplies up to KMR rows of A with KNV_OF(rows) vectors of
// columns of one packed panel, all accumulators in registers, k in order, one
// multiply-add per element and step. So an element's value depends on its row
// and column only, never on tile shape, thread count or batch.

#if defined(MC_ISA_AVX512)
#define KMR 14 // 28 accumulators + 2 of B + 1 of A = 31 registers
#define KNV 2
#elif defined(MC_ISA_AVX2)
#define KMR 6 // 12 + 2 + 1
#define KNV 2
#define KWIDE 2 // 8 + 4 + 1
#define KBLOCK // see "Blocks of k" below
#elif defined(__aarch64__)
#define KMR 8 // 16 + 2 + 1 of 32
#define KNV 2
#else
#define KMR 4 // 8 + 2 + 1 of 16
#define KNV 2
#endif
#define KN (KNV * VL) // columns of one micro-kernel call; MC_NR / KN calls make a panel

// Up to KWIDE rows take a whole panel in one call: they are bound by reading B,
// which then streams by once.
#ifndef KWIDE
#define KWIDE 0
#endif
#define KNV_OF(mr) ((mr) <= KWIDE ? MC_NR / VL : KNV)
#define KN_OF(mr) (KNV_OF(mr) * VL)

#define UNROLL _Pragma("GCC unroll 16")
#define AT(p, i) ((p) ? (p) + (i) : (p))

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
	const int nv = KNV_OF(mr);                                                                \
	vf acc[KMR][MC_NR / VL];                                                                   \
	const atype *ar[KBASES];                                                                  \
	UNROLL for (int i = 0; i < mr; i++) {                                                     \
		UNROLL for (int j = 0; j < nv; j++) acc[i][j] = add ? v_load(c + i * ldc + j * VL) : v_zero(); \
	}                                                                                         \
	UNROLL for (int i = 0; i < (mr + 2) / 3; i++) {                                           \
		ar[i] = a + 3 * i * lda;                                                          \
		__asm__("" : "+r"(ar[i]));                                                        \
	}

#define KERN_END                                                                                  \
	if (bias) {                                                                               \
		UNROLL for (int j = 0; j < nv; j++) {                                            \
			vf bj = v_load(bias + j * VL);                                            \
			UNROLL for (int i = 0; i < mr; i++) acc[i][j] = acc[i][j] + bj;           \
		}                                                                                 \
	}                                                                                         \
	UNROLL for (int i = 0; i < mr; i++) {                                                     \
		UNROLL for (int j = 0; j < nv; j++) v_store(c + i * ldc + j * VL, acc[i][j]);    \
	}

// Each step fetches ahead two lines at pf, which the caller places: on the
// same panel when B streams from memory, else on a part of the next panel. NULL,
// a constant where it matters: none.
#define KERN_PREFETCH                                                                             \
	if (pf) {                                                                                 \
		__builtin_prefetch(pf);                                                           \
		__builtin_prefetch(pf + MC_LINE);                                                 \
		pf += pfs;                                                                        \
	}

V_INLINE void kern_f32(const int mr, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                       int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {
	KERN_BEGIN(float)
	for (int64_t kk = 0; kk < k; kk++) {
		vf bv[MC_NR / VL];
		UNROLL for (int j = 0; j < nv; j++) bv[j] = v_load(b + j * VL);
		KERN_PREFETCH
		UNROLL for (int i = 0; i < mr; i++) {
			vf x = v_set1(A_ROW(i)[kk]);
			UNROLL for (int j = 0; j < nv; j++) acc[i][j] = v_fma(x, bv[j], acc[i][j]);
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
		vi bv[MC_NR / VL];
		UNROLL for (int j = 0; j < nv; j++) bv[j] = v_loadi(b + j * VL);
		KERN_PREFETCH
		UNROLL for (int i = 0; i < mr; i++) {
			vi x = v_set1_pair(A_ROW(i) + kk);
			UNROLL for (int j = 0; j < nv; j++) acc[i][j] = v_dot(acc[i][j], x, bv[j]);
		}
		b += ldb;
	}
	if (kk < k) {
		UNROLL for (int i = 0; i < mr; i++) {
			vi x = v_set1i(A_ROW(i)[kk]);
			UNROLL for (int j = 0; j < nv; j++)
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

// ---- Blocks of k ---------------------------------------------------------------
//
// Without AVX-512 a panel passes the micro-kernel in parts of KN of its 32
// columns, once for each block of rows: too much of it for L1, and with k of
// thousands for L2. There k is cut into blocks, and all rows pass before the
// next: a part of a block of B stays in L1, and C is the accumulators' memory
// between blocks, which changes no bit. One core of Zen 3, 96 rows: products of
// k = 3072 and 4096 go from 68 and 56 to 89 and 94 GF/s of 102; 768 stays at 95.
#if defined(KBLOCK)
enum { GEMM_BLOCKED = 1 };

// gemm_cut tells whether a product of m rows cuts k: always in bf16, for which
// a block is widened, and in f32 if a panel would fill a good part of L2.
static int gemm_cut(int64_t m, int64_t k, int dtype) { return m > KMR && (dtype == MC_BF16 ? k > 0 : k > 1024); }

#define KERN_BLOCK_OF(mr)                                                                         \
	static void kern_block_##mr(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, \
	                            int64_t ldc, int add) {                                             \
		kern_f32(mr, k, a, lda, b, ldb, c, ldc, add, NULL, NULL, 0);                            \
	}
typedef void (*kern_block_fn)(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                              int64_t ldc, int add);
KERN_BLOCK_OF(3) KERN_BLOCK_OF(4) KERN_BLOCK_OF(5) KERN_BLOCK_OF(6)
static const kern_block_fn kern_block[KMR + 1] = {0, 0, 0, kern_block_3, kern_block_4, kern_block_5, kern_block_6};

// block_rows multiplies m > KMR rows with KN columns of k <= MC_GEMM_KC rows of
// B, while it fetches lines of MC_LINE bytes, next + i·stride, for what follows.
static void block_rows(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                       int64_t ldc, int add, const char *next, int64_t stride, int64_t lines) {
	int64_t blocks = mc_ceil(m, KMR);
	for (int64_t i = 0; i < blocks; i++) {
		int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
		for (int64_t q = lines * i / blocks; q < lines * (i + 1) / blocks; q++) __builtin_prefetch(next + q * stride);
		kern_block[hi - lo](k, a + lo * lda, lda, b, ldb, c + lo * ldc, ldc, add);
	}
}

// block_f32 multiplies m > KMR rows of A with a panel; next is the panel that
// follows, NULL for none.
static void block_f32(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                      int64_t ldc, int add, const float *next) {
	for (int64_t k0 = 0; k0 < k; k0 += MC_GEMM_KC) {
		int64_t kn = mc_min(MC_GEMM_KC, k - k0);
		const float *bk = b + k0 * ldb, *after = k0 + kn == k ? next : bk + kn * ldb;
		for (int64_t j = 0; j < MC_NR; j += KN) {
			const float *fetch = j + KN < MC_NR ? bk + j + KN : after;
			block_rows(m, kn, a + k0, lda, bk + j, ldb, c + j, ldc, add || k0 > 0, (const char *)fetch, ldb * 4,
			           fetch ? kn : 0);
		}
	}
}

#else
enum { GEMM_BLOCKED = 0 };
#endif

static void mul_f32(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                    int64_t ldc, int add) {
#if defined(KBLOCK)
	if (gemm_cut(m, k, MC_F32)) {
		block_f32(m, k, a, lda, b, ldb, c, ldc, add, NULL);
		return;
	}
#endif
	int64_t blocks = mc_ceil(m, KMR);
	for (int64_t i = 0; i < blocks; i++) {
		int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
		for (int64_t j = 0; j < MC_NR; j += KN_OF(hi - lo))
			kern_f32_table[hi - lo](k, a + lo * lda, lda, b + j, ldb, c + lo * ldc + j, ldc, add,
			                        NULL, (const char *)b, 0);
	}
}

static void mul_bf16(int64_t m, int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                     int64_t ldc, int add) {
	int64_t blocks = mc_ceil(m, KMR);
	for (int64_t i = 0; i < blocks; i++) {
		int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
		for (int64_t j = 0; j < MC_NR; j += KN_OF(hi - lo))
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

#if defined(KBLOCK)

// round_bf16 rounds n elements to bf16 and leaves them f32.
static void round_bf16(float *dst, const float *src, int64_t n) {
	vi hi = v_set1i((int32_t)0xffff0000u);
	int64_t i = 0;
	for (; i + VL <= n; i += VL) v_store(dst + i, v_float(v_and(v_round_bf16(v_load(src + i)), hi)));
	if (i < n) v_store_n(dst + i, v_float(v_and(v_round_bf16(v_load_n(src + i, n - i)), hi)), n - i);
}

// block_bf16 is block_f32 for a panel of bf16. There is no instruction for
// bf16 products, so each part of a block of B is widened to f32 once for all
// rows (bx, MC_GEMM_KC × KN), and so is A unless it is f32 already (ax,
// m × MC_GEMM_KC). v_dot gives the same bits: pairs are summed in order.
static void block_bf16(int64_t m, int64_t k, const void *a, int a_dtype, int64_t lda, const uint32_t *b, float *c,
                       int64_t ldc, const uint32_t *next, float *ax, float *bx) {
	vi hi = v_set1i((int32_t)0xffff0000u);
	for (int64_t k0 = 0; k0 < k; k0 += MC_GEMM_KC) {
		int64_t kn = mc_min(MC_GEMM_KC, k - k0), pairs = (kn + 1) / 2;
		const uint32_t *bk = b + k0 / 2 * MC_NR, *after = k0 + kn == k ? next : bk + pairs * MC_NR;
		const float *af = a_dtype == MC_F32 ? (const float *)a + k0 : ax;
		if (a_dtype == MC_BF16)
			for (int64_t i = 0; i < m; i++) to_f32(ax + i * MC_GEMM_KC, (const mc_bf16 *)a + i * lda + k0, kn);
		for (int64_t j = 0; j < MC_NR; j += KN) {
			for (int64_t p = 0; p < pairs; p++)
				UNROLL for (int v = 0; v < KN; v += VL) {
					vi u = v_loadi(bk + p * MC_NR + j + v);
					v_store(bx + 2 * p * KN + v, v_float(v_shl(u, 16)));
					v_store(bx + (2 * p + 1) * KN + v, v_float(v_and(u, hi)));
				}
			const uint32_t *fetch = j + KN < MC_NR ? bk + j + KN : after;
			block_rows(m, kn, af, a_dtype == MC_F32 ? lda : MC_GEMM_KC, bx, KN, c + j, ldc, k0 > 0,
			           (const char *)fetch, MC_NR * 4, fetch ? pairs : 0);
		}
	}
}

// gemm_blocks is gemm_core for m > KMR rows, in groups whose tile and block of
// A stay in L2.
static void gemm_blocks(const struct mc_gemm *g, const void *x, int x_dtype, int64_t ldx, int64_t r0, int64_t m,
                        int64_t p0, int64_t p1, float *tile) {
	int64_t groups = mc_ceil(m, MC_GEMM_ROWS), panel = mc_panel_bytes(g->w_dtype, g->k);
	float *ax = tile + MC_GEMM_ROWS * MC_NR, *bx = ax + MC_GEMM_ROWS * MC_GEMM_KC;
	for (int64_t i = 0; i < groups; i++) {
		int64_t lo = m * i / groups, n = m * (i + 1) / groups - lo;
		const char *a = (const char *)x + lo * ldx * (x_dtype == MC_F32 ? 4 : 2);
		for (int64_t p = p0; p < p1; p++) {
			const char *b = (const char *)g->w + p * panel, *next = p + 1 < p1 ? b + panel : NULL;
			int64_t c0 = mc_max(p * MC_NR, g->n0), c1 = mc_min((p + 1) * MC_NR, g->n0 + g->n);
			if (g->w_dtype == MC_F32)
				block_f32(n, g->k, (const float *)a, ldx, (const float *)b, MC_NR, tile, MC_NR, 0, (const float *)next);
			else
				block_bf16(n, g->k, a, x_dtype, ldx, (const uint32_t *)b, tile, MC_NR, (const uint32_t *)next, ax, bx);
			epilogue(&g->epi, r0 + lo, c0 - g->n0, n, c1 - c0, tile + c0 - p * MC_NR, MC_NR);
		}
	}
}

#endif

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
// they are rows r0 … r0+m-1 of Y. tile has MC_GEMM_TILE bytes. mc_gemm_wide rows
// may also be f32 that are rounded to bf16.
static void gemm_core(const struct mc_gemm *g, const void *x, int x_dtype, int64_t ldx, int64_t r0, int64_t m,
                      int64_t p0, int64_t p1, float *tile) {
#if defined(KBLOCK)
	if (gemm_cut(m, g->k, g->w_dtype)) {
		gemm_blocks(g, x, x_dtype, ldx, r0, m, p0, p1, tile);
		return;
	}
#endif
	int64_t blocks = mc_ceil(m, KMR), panel = mc_panel_bytes(g->w_dtype, g->k);
	// In one pass B streams through, and is fetched some way ahead. In more, it
	// streams with the first and comes from L2 for the others; so each fetches its
	// part of the next panel.
	int64_t passes = blocks * (MC_NR / KN_OF(mc_ceil(m, blocks)));
	int64_t part = panel / passes / MC_LINE * MC_LINE, step = 2 * MC_LINE / passes;
	int plain = g->epi.y_dtype == MC_F32 && g->epi.act == MC_NONE && !g->epi.gate && !g->epi.res;
	for (int64_t p = p0; p < p1; p++) {
		const char *b = (const char *)g->w + p * panel, *pf = passes == 1 ? b + MC_GEMM_AHEAD : p + 1 < p1 ? b + panel : b;
		int64_t c0 = mc_max(p * MC_NR, g->n0), c1 = mc_min((p + 1) * MC_NR, g->n0 + g->n);
		int64_t pfs = passes > 1 && p + 1 == p1 ? 0 : step;
		// A whole panel that needs no more than its bias goes straight to Y.
		int direct = plain && c1 - c0 == MC_NR;
		for (int64_t i = 0; i < blocks; i++) {
			int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
			epi_fetch(&g->epi, r0 + lo, c0 - g->n0, hi - lo);
			float *c = direct ? (float *)g->epi.y + (r0 + lo) * g->epi.ldy + c0 - g->n0 : tile;
			int64_t ldc = direct ? g->epi.ldy : MC_NR;
			const float *bias = direct ? AT(g->epi.bias, c0 - g->n0) : NULL;
			for (int64_t j = 0; j < MC_NR; j += KN_OF(hi - lo)) {
				if (g->w_dtype == MC_F32)
					kern_f32_table[hi - lo](g->k, (const float *)x + lo * ldx, ldx, (const float *)b + j,
					                        MC_NR, c + j, ldc, 0, AT(bias, j), pf, pfs);
				else
					kern_bf16_table[hi - lo](g->k, (const mc_bf16 *)x + lo * ldx, ldx,
					                         (const uint32_t *)b + j, MC_NR, c + j, ldc, 0, AT(bias, j), pf, pfs);
				if (pfs) pf += part;
			}
			if (!direct) epilogue(&g->epi, r0 + lo, c0 - g->n0, hi - lo, c1 - c0, tile + c0 - p * MC_NR, MC_NR);
		}
	}
}

// gemm_operand is the dtype in which gemm_core is given m rows.
static int gemm_operand(const struct mc_gemm *g, int64_t m) {
#if defined(KBLOCK)
	if (gemm_cut(m, g->k, g->w_dtype)) return MC_F32;
#endif
	return g->w_dtype;
}

// gemm_part computes rows r0 … r0+m-1 of panels p0 … p1-1 of g on one worker,
// whose scratch has mc_gemm_scratch(g) bytes.
static void gemm_part(const struct mc_gemm *g, int64_t r0, int64_t m, int64_t p0, int64_t p1, void *scratch) {
	int dtype = gemm_operand(g, m), es = g->x_dtype == MC_F32 ? 4 : 2;
	const char *x = (const char *)g->x + r0 * g->ldx * es;
	int64_t ldx = g->ldx;
	if (mc_gemm_copies(g, m, dtype)) {
		// Into rows that start in different cache sets, in the dtype of the product.
		char *copy = (char *)scratch + MC_GEMM_TILE;
		ldx = mc_gemm_ldcopy(g->k);
		for (int64_t i = 0; i < m; i++) {
			const void *from = x + i * g->ldx * es;
			if (dtype == MC_BF16 && g->x_dtype == MC_F32)
				to_bf16((mc_bf16 *)copy + i * ldx, from, g->k);
			else if (dtype == MC_BF16)
				memcpy((mc_bf16 *)copy + i * ldx, from, (size_t)g->k * 2);
			else if (g->x_dtype == MC_BF16)
				to_f32((float *)copy + i * ldx, from, g->k);
#if defined(KBLOCK)
			else if (g->w_dtype == MC_BF16)
				round_bf16((float *)copy + i * ldx, from, g->k);
#endif
			else
				memcpy((float *)copy + i * ldx, from, (size_t)g->k * 4);
		}
		x = copy;
	}
	gemm_core(g, x, dtype, ldx, r0, m, p0, p1, scratch);
}

static void gemm(struct mc_worker *w, const struct mc_gemm *g) {
	struct mc_gemm_plan plan = mc_gemm_split(g, w->nt, GEMM_BLOCKED);
	for (int64_t t = mc_take(w); t < plan.groups * plan.chunks; t = mc_take(w)) {
		int64_t rg = t / plan.chunks, ch = t % plan.chunks;
		int64_t lo = g->m * rg / plan.groups, hi = g->m * (rg + 1) / plan.groups;
		int64_t np = plan.p1 - plan.p0;
		gemm_part(g, lo, hi - lo, plan.p0 + np * ch / plan.chunks, plan.p0 + np * (ch + 1) / plan.chunks, w->scratch);
	}
}
