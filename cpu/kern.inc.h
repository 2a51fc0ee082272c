// kern.inc.h: micro-kernels, and products of some rows with one packed panel.
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
#define KUN 4
#define KBLOCK 192 // see "Blocks of k"
#elif defined(__aarch64__)
#define KMR 8 // 16 + 2 + 1 of 32
#define KNV 2
#else
#define KMR 4 // 8 + 2 + 1 of 16
#define KNV 2
#endif

// A packed f32 panel lies in strips of KN columns, [MC_NR / KN][k][KN]: what a
// micro-kernel reads is then in order and fills whole lines and all sets of L1.
#define KN (KNV * VL)
// STRIP is column j of a panel of k rows, j a multiple of VL.
#define STRIP(j, k) ((j) / KN * (k) * KN + (j) % KN)

// Up to KWIDE rows take a whole panel in one call: they are bound by reading B,
// which then streams by once.
#ifndef KWIDE
#define KWIDE 0
#endif
#define KNV_OF(mr) ((mr) <= KWIDE ? MC_NR / VL : KNV)
#define KN_OF(mr) (KNV_OF(mr) * VL)

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

// Each step fetches ahead a line at pf, and one that lies second bytes after it
// unless that is 0. The caller places them: on the same panel when B streams from
// memory, else on a part of the next panel. NULL, a constant where it matters: none.
#define KERN_PREFETCH(steps, second)                                                              \
	if (pf) {                                                                                 \
		UNROLL for (int u = 0; u < (steps); u++) {                                        \
			__builtin_prefetch(pf + u * pfs);                                         \
			if (second) __builtin_prefetch(pf + u * pfs + (second));                  \
		}                                                                                 \
		pf += (steps) * pfs;                                                              \
	}

// row_fma adds x·b to nv accumulators of one row.
V_INLINE void row_fma(const int nv, vf *acc, const float *x, const vf *b) {
#if defined(MC_ISA_AVX2)
	// The compiler would move accumulators from register to register between
	// steps, and read b a second time as an operand. Both cost issue slots, of
	// which another thread on the same core may take half: 20 instructions for 12
	// multiply-adds leave no more than that.
	if (nv == 2) {
		vf t;
		__asm__("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
		        : "+x"(acc[0]), "+x"(acc[1]), "=&x"(t) : "m"(*x), "x"(b[0]), "x"(b[1]));
		return;
	}
#endif
	vf t = v_set1(*x);
	UNROLL for (int j = 0; j < nv; j++) acc[j] = v_fma(t, b[j], acc[j]);
}

// kern_f32 multiplies mr rows of A with nv vectors of columns. B has row stride
// ldb; a second strip, of the widest kernels, begins strip floats after the first.
V_INLINE void kern_f32(const int mr, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
                       int64_t strip, float *c, int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {
	KERN_BEGIN(float)
	const int64_t second = nv > KNV ? strip * 4 : KN * 4 > MC_LINE ? MC_LINE : 0;
#define KERN_STEP(u)                                                                              \
	{                                                                                         \
		vf bv[MC_NR / VL];                                                                \
		UNROLL for (int j = 0; j < nv; j++) bv[j] = v_load(b + j / KNV * strip + (u) * ldb + j % KNV * VL); \
		UNROLL for (int i = 0; i < mr; i++) row_fma(nv, acc[i], A_ROW(i) + kk + (u), bv);     \
	}
	int64_t kk = 0;
#if KUN > 1
	for (; kk + KUN <= k; kk += KUN) {
		KERN_PREFETCH(KUN, second)
		UNROLL for (int u = 0; u < KUN; u++) KERN_STEP(u)
		b += KUN * ldb;
	}
#endif
	for (; kk < k; kk++) {
		KERN_PREFETCH(1, second)
		KERN_STEP(0)
		b += ldb;
	}
#undef KERN_STEP
	KERN_END
}

V_INLINE void kern_bf16(const int mr, int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb,
                        float *c, int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {
	KERN_BEGIN(mc_bf16)
	int64_t kk = 0;
	for (; kk + 1 < k; kk += 2) {
		vi bv[MC_NR / VL];
		UNROLL for (int j = 0; j < nv; j++) bv[j] = v_loadi(b + j * VL);
		KERN_PREFETCH(1, MC_LINE)
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
	static void kern_f32_##mr(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t strip, \
	                          float *c, int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs) {  \
		kern_f32(mr, k, a, lda, b, ldb, strip, c, ldc, add, bias, pf, pfs);                     \
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
typedef void (*kern_f32_fn)(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t strip,
                            float *c, int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs);
typedef void (*kern_bf16_fn)(int64_t k, const mc_bf16 *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                             int64_t ldc, int add, const float *bias, const char *pf, int64_t pfs);
static const kern_f32_fn kern_f32_table[KMR + 1] = KERN_TABLE(f32);
static const kern_bf16_fn kern_bf16_table[KMR + 1] = KERN_TABLE(bf16);

// ---- Blocks of k ---------------------------------------------------------------
//
// Without AVX-512 a panel passes the micro-kernel strip by strip, once for each
// block of rows: too much of it for L1, and with k of thousands for L2. There k
// is cut into blocks, and all rows pass before the next: a strip of a block of B
// stays in L1, and C is the accumulators' memory between blocks, which changes
// no bit.
#if defined(KBLOCK)

#define KERN_STRIP_OF(mr)                                                                         \
	static void kern_strip_##mr(int64_t k, const float *a, int64_t lda, const float *b, float *c, int64_t ldc, int add) { \
		kern_f32(mr, k, a, lda, b, KN, 0, c, ldc, add, NULL, NULL, 0);                        \
	}
typedef void (*kern_strip_fn)(int64_t k, const float *a, int64_t lda, const float *b, float *c, int64_t ldc, int add);
KERN_STRIP_OF(3) KERN_STRIP_OF(4) KERN_STRIP_OF(5) KERN_STRIP_OF(6)
static const kern_strip_fn kern_strip[KMR + 1] = {0, 0, 0, kern_strip_3, kern_strip_4, kern_strip_5, kern_strip_6};

#endif

// mul_f32 is C[m, 32] (+)= A[m, k] · B. Column j of B lies at j / KN · strip +
// j % KN and on, at row stride ldb: KN and k·KN for a packed panel, the row stride
// and KN for B in place. m >= 0 and k >= 0 are free; all 32 columns of B are read
// and of C written. add: C is added to, else overwritten (k = 0 then gives zeros).
// Fastest when A's rows are not a multiple of 4096 bytes apart.
static void mul_f32(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t strip,
                    float *c, int64_t ldc, int add) {
	int64_t blocks = mc_ceil(m, KMR);
#if defined(KBLOCK)
	if (m > KMR && ldb == KN && k > 0) {
		for (int64_t k0 = 0; k0 < k; k0 += KBLOCK)
			for (int64_t j = 0; j < MC_NR; j += KN)
				for (int64_t i = 0; i < blocks; i++) {
					int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
					kern_strip[hi - lo](mc_min(KBLOCK, k - k0), a + lo * lda + k0, lda, b + j / KN * strip + k0 * KN,
					                    c + lo * ldc + j, ldc, add || k0 > 0);
				}
		return;
	}
#endif
	for (int64_t i = 0; i < blocks; i++) {
		int64_t lo = m * i / blocks, hi = m * (i + 1) / blocks;
		for (int64_t j = 0; j < MC_NR; j += KN_OF(hi - lo))
			kern_f32_table[hi - lo](k, a + lo * lda, lda, b + j / KN * strip, ldb, strip, c + lo * ldc + j, ldc, add,
			                        NULL, (const char *)b, 0);
	}
}

// mul_bf16 is the same for bf16: B holds pairs, (k+1)/2 rows of 32 uint32 at row
// stride ldb (in pairs); with odd k the second half of the last pair is ignored
// (NaN or not), and A is not read beyond k. Sums are f32, pair after pair. Rows of
// A need no alignment.
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
