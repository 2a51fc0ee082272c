// core.h: the C core of the CPU device, as the op kernels see it.
//
// Layers: memory (mc_alloc), one process-wide worker pool (mc_parallel), and
// per instruction set a table of kernels (struct mc_kernels) chosen at run
// time. Code that needs vectors is written once in *.inc.h files over simd.h,
// and compiled once per instruction set by isa_*.c; see isa.inc.h.
//
// No function aborts, exits, prints, or keeps thread-local state. Functions
// return MC_OK or another enum mc_status.
#ifndef MARGO_CPU_CORE_H
#define MARGO_CPU_CORE_H

#include <stddef.h>
#include <stdint.h>

// Every multiply-add is written as one. GCC keeps to that with -std=c11, Clang
// has to be told.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

typedef uint16_t mc_bf16; // upper half of an IEEE binary32

enum mc_status { MC_OK = 0, MC_NOMEM = 1, MC_INVALID = 2, MC_CANCELLED = 3 };
enum mc_dtype { MC_F32 = 0, MC_BF16 = 1, MC_I32 = 2 };              // engine.DType
enum mc_act { MC_NONE = 0, MC_GELU_ERF = 1, MC_GELU_TANH = 2, MC_SILU = 3 }; // engine.Activation

#define MC_LINE 64 // bytes of a cache line; alignment of every allocation
#define MC_NR 32   // columns of a packed panel, for every instruction set

static inline int64_t mc_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t mc_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t mc_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- memory (mem.c) --------------------------------------------------------

// mc_alloc returns zero-filled memory aligned to MC_LINE, and from 1 MiB on to
// 2 MiB with huge pages asked for. NULL when there is none. mc_free takes NULL.
void *mc_alloc(size_t bytes);
void mc_free(void *p);

// ---- worker pool (pool.c) --------------------------------------------------

struct mc_team;

// mc_worker is what a region's function gets: which of nt workers it is, and
// scratch that belongs to it alone until the region ends (contents undefined).
struct mc_worker {
	int tid, nt;
	void *scratch; // MC_LINE aligned, of the size asked from mc_parallel
	struct mc_team *team;
};

typedef void (*mc_fn)(struct mc_worker *w, void *ctx);

// mc_parallel runs fn on nt workers (at least 1), the caller being worker 0, each
// with scratch bytes of its own, and returns when all have finished. They are
// fewer if the system gives no more threads: fn goes by w->nt. MC_NOMEM if
// scratch cannot be had; then fn has not run. Regions of different callers run
// side by side while there are CPUs for all their workers (mc_pool_cpus), else
// in turn. Must not be called inside a region.
int mc_parallel(int nt, size_t scratch, mc_fn fn, void *ctx);

// mc_parallel_take is mc_parallel for an fn that gets all its work from mc_take
// and has no barriers: workers that have not begun when the caller finds
// nothing left to do are not waited for. On a machine that is busy with other
// programs that saves their time slices.
int mc_parallel_take(int nt, size_t scratch, mc_fn fn, void *ctx);

// mc_pool_cpus says how many CPUs the process may use, affinity and quota
// counted: 1 until then. It returns the number before; n <= 0 only asks.
int mc_pool_cpus(int n);
// mc_pool_limit is the most worker threads that the pool makes from now on, as
// if the system refused more; below 0: as many as it can (tests).
void mc_pool_limit(int threads);

// mc_barrier waits until all workers of the region have called it.
void mc_barrier(struct mc_worker *w);

// mc_take hands out 0, 1, 2, ... to the workers of a region, each number once:
// dynamic distribution of work. What a number stands for must not depend on who
// takes it. mc_take_reset makes it start from 0 again; all workers call it, and
// it holds a barrier.
int64_t mc_take(struct mc_worker *w);
void mc_take_reset(struct mc_worker *w);

// mc_share gives worker tid's part [*lo, *hi) of n items in pieces of grain.
static inline void mc_share(const struct mc_worker *w, int64_t n, int64_t grain, int64_t *lo, int64_t *hi) {
	int64_t units = mc_ceil(n, grain);
	*lo = mc_min(n, units * w->tid / w->nt * grain);
	*hi = mc_min(n, units * (w->tid + 1) / w->nt * grain);
}

// ---- GEMM (gemm.inc.h) -----------------------------------------------------

// Packed weight of [n, k]: panels of MC_NR rows of W, zero padded to MC_NR.
// f32:  panel[kk][MC_NR] floats, kk = 0 … k-1
// bf16: panel[kk/2][MC_NR] pairs, uint32 = W[j][kk] | W[j][kk+1] << 16, odd k
//       padded with 0
// Panels follow each other; each takes mc_panel_bytes.
static inline int64_t mc_panel_bytes(int dtype, int64_t k) {
	return (dtype == MC_BF16 ? (k + 1) / 2 : k) * MC_NR * 4;
}
static inline int64_t mc_packed_bytes(int dtype, int64_t n, int64_t k) {
	return mc_ceil(n, MC_NR) * mc_panel_bytes(dtype, k);
}

// Epilogue of a matrix product: y = r + g * act(t + b), each part optional.
// Rows and columns are those of the output matrix. Pointers address element
// (0, 0); strides in elements.
struct mc_epilogue {
	void *y;        // y_dtype
	int64_t ldy;
	int y_dtype;
	int act;
	const float *bias; // [n]
	const float *gate; // row r uses gate row (row0 + r) / gate_rows
	int64_t ldg, gate_rows;
	const float *res; // may be y
	int64_t ldr;
	int64_t row0;
};

// Y[m, n] = epilogue(X · W[n0 … n0+n-1]ᵀ); bias is indexed from 0 for column n0.
// X is converted to the dtype of W if it has another.
struct mc_gemm {
	int64_t m, n, k, n0;
	const void *x;
	int64_t ldx;
	int x_dtype, w_dtype;
	const void *w; // packed
	struct mc_epilogue epi;
	float *streams; // A as gemm_streams leaves it, or NULL; set by mc_gemm_run
};

int mc_gemm_run(const struct mc_gemm *g, int nt);

// mc_pack packs W [n, k] with row stride ldw into dst (mc_packed_bytes).
int mc_pack(void *dst, int dst_dtype, const void *w, int64_t ldw, int w_dtype, int64_t n, int64_t k, int nt);

// ---- kernels per instruction set --------------------------------------------

struct mc_ops;  // the other ops: ops.h
struct mc_head; // head.h

struct mc_kernels {
	const char *name; // "avx512-bf16", "avx2", "generic"
	int blocked;      // GEMM cuts k into blocks

	// One panel from n <= 32 rows of k elements (row stride ld), zero padded.
	void (*pack_nk_f32)(float *dst, const void *src, int src_dtype, int64_t ld, int64_t n, int64_t k);
	void (*pack_nk_bf16)(uint32_t *dst, const void *src, int src_dtype, int64_t ld, int64_t n, int64_t k);

	// GEMM on one worker's share, called by mc_gemm_run; before it, if blocked, the same of
	// A for streams.
	void (*gemm)(struct mc_worker *w, const struct mc_gemm *g);
	void (*gemm_streams)(struct mc_worker *w, const struct mc_gemm *g);
	// Head loop, called by mc_head_run (head.h).
	void (*head)(struct mc_worker *w, struct mc_head *h);

	// peak runs iters rounds of register-only multiply-adds and returns the
	// floating-point operations done; stream reads bytes (a multiple of 4096)
	// and returns something that depends on all of them. For measuring.
	double (*peak)(int dtype, int64_t iters);
	float (*stream)(const float *p, int64_t bytes);

	const struct mc_ops *ops;
};

// mc_kern is the table for this machine, or the one MARGO_CPU_ISA names
// ("avx512", "avx2", "generic") if the machine can run it.
const struct mc_kernels *mc_kern(void);
// mc_kern_named is the table of that name, NULL if unknown or not runnable.
const struct mc_kernels *mc_kern_named(const char *name);
// mc_kern_force makes mc_kern return k from now on (tests; not thread safe
// against running kernels). NULL goes back to the default.
void mc_kern_force(const struct mc_kernels *k);

#endif
