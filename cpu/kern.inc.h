// kern.inc.h: micro-kernels, and products of some rows with one packed panel.
//
// A micro-kernel multiplies up to KMR rows of A with KNV vectors of columns
// of one packed panel, all accumulators in registers, k in order, one
// multiply-add per element and step. So an element's value depends on its row
// and column only, never on tile shape, thread count or batch.

#if defined(MC_ISA_AVX512)
#define KMR 14 // 28 accumulators + 2 of B + 1 of A = 31 registers
#define KNV 2
#elif defined(MC_ISA_AVX2)
#define KMR 3 // 12 + 1 + 3
#define KNV 4
#define KUN 8
#define KBLOCK MC_GEMM_KBLOCK // see "Blocks of k"
#elif defined(__aarch64__)
#define KMR 8 // 16 + 2 + 1 of 32
#define KNV 2
#else
#define KMR 4 // 8 + 2 + 1 of 16
#define KNV 2
#endif

#define KN (KNV * VL) // columns of one micro-kernel call; MC_NR / KN calls make a panel

// Steps of k in one round of the f32 loop.
#ifndef KUN
#define KUN 1
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define AT(p, i) ((p) ? (p) + (i) : (p))

// Rows of A are reached from every third one, so that few registers hold
// addresses (base + stride, base + 2·stride). The asm keeps the compiler from
// seeing through that.
#define KBASES ((KMR + 2) / 3)
#define A_ROW(i) (ar[(i) / 3] + (i) % 3 * lda)

#define KERN_BEGIN(atype)                                                                         \
	vf acc[KMR][KNV];                                                                          \
	const atype *ar[KBASES];                                                                  \
	if (add) {                                                                                \
		UNROLL for (int i = 0; i < mr; i++)                                               \
			UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_load(c + i * ldc + j * VL); \
	} else {                                                                                  \
		UNROLL for (int i = 0; i < mr; i++) UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_zero(); \
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
		UNROLL for (int j = 0; j < KNV; j++) v_store(y + i * ldy + j * VL, acc[i][j]);    \
	}

// What micro-kernels take: n blocks of mr rows, one after the other, of Y = A · B, plus C if
// add (which may be Y), plus a bias for each column if any; see mul_f32. Rows of A are lda
// apart in a block, and as from one block to the next. Meanwhile lines from
// pf on are fetched, about pfs bytes of them a step, in blocks that begin with pf before end.
// The caller places pf: on the same panel when B streams from memory, else on a part of what
// follows. NULL: none.
#define KERN_ARGS(atype, btype)                                                                   \
	int64_t n, int64_t k, const atype *a, int64_t lda, int64_t as, const btype *b, int64_t ldb, const float *c, int64_t ldc, \
	    int add, float *y, int64_t ldy, const float *bias, const char *pf, const char *end, int64_t pfs

#define KERN_PREFETCH                                                                             \
	if (fetch) {                                                                              \
		__builtin_prefetch(pf);                                                           \
		__builtin_prefetch(pf + MC_LINE);                                                 \
		pf += pfs;                                                                        \
	}

#if defined(MC_ISA_AVX2)
// kern_step is one step of mr rows. Another thread on the same core may take every
// second issue slot, and then 20 instructions for 12 multiply-adds are as many as
// there are slots for. The compiler would add to them by moving accumulators between
// registers, or spill the 16th; so loads and multiply-adds are bound together.
V_INLINE void kern_step(const int mr, vf (*acc)[KNV], const float *const *x, const int u, const float *b) {
	vf x0 = v_set1(x[0][u]), x1 = mr > 1 ? v_set1(x[1][u]) : x0, x2 = mr > 2 ? v_set1(x[2][u]) : x0;
	UNROLL for (int j = 0; j < KNV; j++) {
		vf t;
		if (mr == 3)
			__asm__("vmovups %4, %3\n\tvfmadd231ps %3, %5, %0\n\tvfmadd231ps %3, %6, %1\n\tvfmadd231ps %3, %7, %2"
			        : "+x"(acc[0][j]), "+x"(acc[1][j]), "+x"(acc[2][j]), "=&x"(t)
			        : "m"(*(const vf_u *)(b + j * VL)), "x"(x0), "x"(x1), "x"(x2));
		else if (mr == 2)
			__asm__("vmovups %3, %2\n\tvfmadd231ps %2, %4, %0\n\tvfmadd231ps %2, %5, %1"
			        : "+x"(acc[0][j]), "+x"(acc[1][j]), "=&x"(t)
			        : "m"(*(const vf_u *)(b + j * VL)), "x"(x0), "x"(x1));
		else
			acc[0][j] = v_fma(x0, v_load(b + j * VL), acc[0][j]);
	}
}
#endif

#if KUN > 1
// kern_rounds is KUN steps a round of mr rows at x, with lines lines fetched in each.
V_INLINE void kern_rounds(const int mr, int64_t k, vf (*acc)[KNV], const float **x, const float *b, int64_t ldb,
                          const char *pf, const int64_t lines) {
	for (; k >= KUN; k -= KUN, b += KUN * ldb) {
		for (const char *end = pf + lines * MC_LINE; pf < end; pf += MC_LINE) __builtin_prefetch(pf);
		UNROLL for (int u = 0; u < KUN; u++) kern_step(mr, acc, x, u, b + u * ldb);
		UNROLL for (int i = 0; i < mr; i++) x[i] += KUN;
	}
	_Pragma("GCC unroll 1") for (; k > 0; k--, b += ldb) {
		kern_step(mr, acc, x, 0, b);
		UNROLL for (int i = 0; i < mr; i++) x[i]++;
	}
}
#endif

V_INLINE void kern_f32(const int mr, KERN_ARGS(float, float)) {
	for (; n > 0; n--, a += as, c += mr * ldc, y += mr * ldy) {
		const int fetch = pf < end;
		KERN_BEGIN(float)
#if KUN > 1
		const float *x[3] = {a, a + lda, a + 2 * lda};
		UNROLL for (int i = 0; i < 3; i++) __asm__("" : "+r"(x[i])); // or it would keep many more addresses
		int64_t lines = fetch ? pfs * KUN / MC_LINE : 0;
		if (lines > 0) {
			kern_rounds(mr, k, acc, x, b, ldb, pf, lines);
			pf += k / KUN * lines * MC_LINE;
		} else {
			kern_rounds(mr, k, acc, x, b, ldb, NULL, 0);
		}
#else
		const float *bk = b;
		for (int64_t kk = 0; kk < k; kk++, bk += ldb) {
			vf bv[KNV];
			UNROLL for (int j = 0; j < KNV; j++) bv[j] = v_load(bk + j * VL);
			KERN_PREFETCH
			UNROLL for (int i = 0; i < mr; i++) {
				vf x = v_set1(A_ROW(i)[kk]);
				UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_fma(x, bv[j], acc[i][j]);
			}
		}
#endif
		KERN_END
	}
}

V_INLINE void kern_bf16(const int mr, KERN_ARGS(mc_bf16, uint32_t)) {
	for (; n > 0; n--, a += as, c += mr * ldc, y += mr * ldy) {
		const int fetch = pf < end;
		KERN_BEGIN(mc_bf16)
		int64_t kk = 0;
		const uint32_t *bk = b;
		for (; kk + 1 < k; kk += 2, bk += ldb) {
			vi bv[KNV];
			UNROLL for (int j = 0; j < KNV; j++) bv[j] = v_loadi(bk + j * VL);
			KERN_PREFETCH
			UNROLL for (int i = 0; i < mr; i++) {
				vi x = v_set1_pair(A_ROW(i) + kk);
				UNROLL for (int j = 0; j < KNV; j++) acc[i][j] = v_dot(acc[i][j], x, bv[j]);
			}
		}
		if (kk < k) {
			UNROLL for (int i = 0; i < mr; i++) {
				vi x = v_set1i(A_ROW(i)[kk]);
				UNROLL for (int j = 0; j < KNV; j++)
					acc[i][j] = v_dot(acc[i][j], x, v_and(v_loadi(bk + j * VL), v_set1i(0xffff)));
			}
		}
		KERN_END
	}
}

#define KERN_OF(mr)                                                                               \
	static void kern_f32_##mr(KERN_ARGS(float, float)) {                                      \
		if (KUN > 1 && ldb == MC_NR)                                                      \
			kern_f32(mr, n, k, a, lda, as, b, MC_NR, c, ldc, add, y, ldy, bias, pf, end, pfs); \
		else                                                                              \
			kern_f32(mr, n, k, a, lda, as, b, ldb, c, ldc, add, y, ldy, bias, pf, end, pfs); \
	}                                                                                         \
	static void kern_bf16_##mr(KERN_ARGS(mc_bf16, uint32_t)) {                                \
		kern_bf16(mr, n, k, a, lda, as, b, ldb, c, ldc, add, y, ldy, bias, pf, end, pfs);     \
	}

KERN_OF(1) KERN_OF(2) KERN_OF(3)
#if KMR > 3
KERN_OF(4)
#endif
#if KMR > 4
KERN_OF(5) KERN_OF(6) KERN_OF(7) KERN_OF(8)
#endif
#if KMR > 8
KERN_OF(9) KERN_OF(10) KERN_OF(11) KERN_OF(12) KERN_OF(13) KERN_OF(14)
#endif

#if KMR == 14
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4, kern_##d##_5, kern_##d##_6, kern_##d##_7, \
	kern_##d##_8, kern_##d##_9, kern_##d##_10, kern_##d##_11, kern_##d##_12, kern_##d##_13, kern_##d##_14}
#elif KMR == 8
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4, kern_##d##_5, kern_##d##_6, kern_##d##_7, kern_##d##_8}
#elif KMR == 4
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3, kern_##d##_4}
#else
#define KERN_TABLE(d) {0, kern_##d##_1, kern_##d##_2, kern_##d##_3}
#endif
typedef void (*kern_f32_fn)(KERN_ARGS(float, float));
typedef void (*kern_bf16_fn)(KERN_ARGS(mc_bf16, uint32_t));
static const kern_f32_fn kern_f32_table[KMR + 1] = KERN_TABLE(f32);
static const kern_bf16_fn kern_bf16_table[KMR + 1] = KERN_TABLE(bf16);

// rows_f32 and rows_bf16 multiply n rows with a whole panel, in even blocks of rows: high
// ones of low + 1 rows, then the others. streams: A has the rows in stream_at's order.
#define ROWS_OF(d, atype, btype)                                                                                  \
	static void rows_##d(int64_t n, int64_t k, const atype *a, int64_t lda, int streams, const btype *b, int64_t ldb, \
	                     const float *c, int64_t ldc, int add, float *y, int64_t ldy, const float *bias, const char *pf, \
	                     const char *end, int64_t pfs) {                                                      \
		int64_t blocks = mc_ceil(n, KMR), low = n / mc_max(blocks, 1), high = n - blocks * low;           \
		const char *pf2 = AT(pf, high * k * pfs);                                                         \
		for (int64_t j = 0; j < MC_NR; j += KN) {                                                         \
			const float *bj = AT(bias, j);                                                            \
			int64_t cut = high * (low + 1), others = blocks - high;                                   \
			if (high)                                                                                 \
				kern_##d##_table[low + 1](high, k, a, streams ? high * lda : lda,                 \
				                          streams ? lda : (low + 1) * lda, b + j, ldb, c + j, ldc, add, \
				                          y + j, ldy, bj, pf, end, pfs);                          \
			if (others)                                                                               \
				kern_##d##_table[low](others, k, a + cut * lda, streams ? others * lda : lda,     \
				                      streams ? lda : low * lda, b + j, ldb, c + cut * ldc + j, ldc, add, \
				                      y + cut * ldy + j, ldy, bj, pf2, end, pfs);                 \
		}                                                                                                 \
	}
ROWS_OF(f32, float, float)
ROWS_OF(bf16, mc_bf16, uint32_t)

// ---- Blocks of k ---------------------------------------------------------------
//
// Without AVX-512 a panel passes the micro-kernel once for each of many small
// blocks of rows, and is too much for L1. There k is cut into blocks of KBLOCK, and
// all rows pass before the next: a block of B stays in L1, and C is the accumulators'
// memory between blocks, which changes no bit.

// KROWS is the most rows for which k is not cut. With a few more in bf16, widening a
// block of B would cost as much as the product.
#define KROWS(dtype) ((dtype) == MC_BF16 ? 2 * KMR : KMR)

#if defined(KBLOCK)
// stream_at is where row i of n goes so that the first rows of all blocks of rows follow each
// other, then the second ones, …: each row of a block is in a stream of its own. Prefetchers
// follow those from L3 and across rows; they lose rows in pieces, or several in one page.
static int64_t stream_at(int64_t i, int64_t n) {
	int64_t blocks = mc_ceil(n, KMR), low = n / blocks, high = n - blocks * low, cut = high * (low + 1);
	return i < cut ? i % (low + 1) * high + i / (low + 1) : cut + (i - cut) % low * (blocks - high) + (i - cut) / low;
}

// block_f32 multiplies m rows with k <= KBLOCK rows of a panel, from C to Y as the
// micro-kernels do, and fetches bytes at next meanwhile.
static void block_f32(int64_t m, int64_t k, const float *a, int64_t lda, int streams, const float *b, const float *c, int64_t ldc, int add,
                      float *y, int64_t ldy, const float *bias, const char *next, int64_t bytes) {
	int64_t step = MC_LINE / KUN; // so that a round fetches whole lines
	int64_t pfs = mc_ceil(bytes, mc_ceil(m, KMR) * k * step) * step;
	rows_f32(m, k, a, lda, streams, b, MC_NR, c, ldc, add, y, ldy, bias, next, AT(next, bytes), pfs);
}

// widen_pairs brings k rows of a bf16 panel into bx [k][MC_NR] in f32. There is no
// instruction for bf16 products; v_dot gives the same bits, for pairs are summed in order.
static void widen_pairs(const uint32_t *b, int64_t k, float *bx) {
	vi hi = v_set1i((int32_t)0xffff0000u);
	for (int64_t i = 0; i < k; i += 2, b += MC_NR)
		UNROLL for (int j = 0; j < MC_NR; j += VL) {
			vi u = v_loadi(b + j);
			v_store(bx + i * MC_NR + j, v_float(v_shl(u, 16)));
			v_store(bx + (i + 1) * MC_NR + j, v_float(v_and(u, hi)));
		}
}
#endif

// mul_f32 is C[m, 32] (+)= A[m, k] · B, with B [k][32] at row stride ldb (MC_NR if
// packed). m >= 0 and k >= 0 are free; all 32 columns of B are read and of C written.
// add: C is added to, else overwritten (k = 0 then gives zeros). Each element is summed
// over k in order, whatever m is. Fastest when A's rows are not a multiple of 4096
// bytes apart.
static void mul_f32(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                    int64_t ldc, int add) {
	int64_t block = k;
#if defined(KBLOCK)
	if (m > KROWS(MC_F32) && ldb == MC_NR) block = KBLOCK;
#endif
	int64_t k0 = 0;
	do {
		rows_f32(m, mc_min(block, k - k0), a + k0, lda, 0, b + k0 * ldb, ldb, c, ldc, add || k0 > 0, c, ldc, NULL, NULL, NULL, 0);
		k0 += block;
	} while (k0 < k);
}

// mul_bf16 is the same for bf16: B holds pairs, (k+1)/2 rows of 32 uint32 at row
// stride ldb (in pairs); with odd k the second half of the last pair is ignored
// (NaN or not), and A is not read beyond k. Sums are f32, pair after pair. Rows of
// A need no alignment.
static void mul_bf16(int64_t m, int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                     int64_t ldc, int add) {
#if defined(KBLOCK)
	if (m > KROWS(MC_BF16) && ldb == MC_NR && k > 0) {
		enum { ROWS = 4 * KMR };
		float bx[KBLOCK * MC_NR], ax[ROWS * KBLOCK];
		for (int64_t k0 = 0; k0 < k; k0 += KBLOCK) {
			int64_t kn = mc_min(KBLOCK, k - k0);
			widen_pairs(b + k0 / 2 * MC_NR, kn, bx);
			for (int64_t lo = 0; lo < m; lo += ROWS) {
				int64_t mn = mc_min(ROWS, m - lo);
				for (int64_t r = 0; r < mn; r++) to_f32(ax + r * KBLOCK, a + (lo + r) * lda + k0, kn);
				rows_f32(mn, kn, ax, KBLOCK, 0, bx, MC_NR, c + lo * ldc, ldc, add || k0 > 0, c + lo * ldc, ldc, NULL, NULL, NULL, 0);
			}
		}
		return;
	}
#endif
	rows_bf16(m, k, a, lda, 0, b, ldb, c, ldc, add, c, ldc, NULL, NULL, NULL, 0);
}
