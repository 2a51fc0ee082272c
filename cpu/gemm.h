// gemm.h: how a GEMM is cut into parts; shared by gemm.c and gemm.inc.h. None
// of it changes a result.
#ifndef MARGO_CPU_GEMM_H
#define MARGO_CPU_GEMM_H

#include "core.h"

#define MC_GEMM_ROWS 112        // most rows that pass a panel before the next, where k is not cut
#define MC_GEMM_BLOCK_ROWS 172  // the same where k is cut ("Blocks of k", kern.inc.h)
#define MC_GEMM_PANELS 8        // panels that a block of A meets there, at most
#define MC_GEMM_KBLOCK 192      // k of a block of A and B there, at most
#define MC_GEMM_AHEAD 8192      // bytes that a streamed panel is fetched ahead
#define MC_GEMM_L2 (384 << 10)  // bytes of L2 that a group of rows of A may take, where k is not cut
// Bytes of gemm_core's scratch: tiles of C with one vector of slack, and where k
// is cut a block of A and a block of B.
#define MC_GEMM_TILE (MC_GEMM_PANELS * MC_GEMM_BLOCK_ROWS * MC_NR * 4 + MC_LINE + (MC_GEMM_BLOCK_ROWS + MC_NR) * MC_GEMM_KBLOCK * 4)

// mc_gemm_copies tells whether m rows of A are first copied: to get the dtype
// of the product, or because their distance would put them all in a few sets of L1.
static inline int mc_gemm_copies(const struct mc_gemm *g, int64_t m) {
	int64_t stride = g->ldx * (g->x_dtype == MC_F32 ? 4 : 2);
	return g->x_dtype != g->w_dtype || (m > 4 && g->k > 64 && stride % 2048 == 0);
}

// mc_gemm_ldcopy is the row stride of the copy: an odd number of lines.
static inline int64_t mc_gemm_ldcopy(int64_t k) { return mc_ceil(k, 64) * 64 + 32; }

// mc_gemm_group is the most rows that one part takes: where k is not cut, what
// stays in L2 while the panels of W pass.
static inline int64_t mc_gemm_group(const struct mc_gemm *g, int blocked) {
	int64_t row = g->k * (g->w_dtype == MC_F32 ? 4 : 2);
	int64_t rows = MC_GEMM_L2 / mc_max(row, 1) / 14 * 14;
	return blocked ? MC_GEMM_BLOCK_ROWS : mc_max(14, mc_min(rows, MC_GEMM_ROWS));
}

static inline size_t mc_gemm_scratch(const struct mc_gemm *g, int blocked) {
	// Where k is cut, only the few rows of one micro-kernel are copied whole.
	int64_t rows = mc_min(g->m, blocked ? 14 : mc_gemm_group(g, blocked));
	size_t copy = (size_t)(rows * mc_gemm_ldcopy(g->k) * (g->w_dtype == MC_F32 ? 4 : 2));
	return MC_GEMM_TILE + (mc_gemm_copies(g, rows) ? copy : 0);
}

// Where k is cut, A is first brought into streams (gemm_streams) if each element then meets
// MC_GEMM_STREAM_PANELS panels or more, in slabs of rows of MC_GEMM_STREAM_BYTES.
#define MC_GEMM_STREAM_PANELS 16
#define MC_GEMM_STREAM_BYTES (16 << 20)
#define MC_GEMM_STREAM_ROWS 8 // of a task

static inline int mc_gemm_streams(const struct mc_gemm *g) {
	return g->m > 32 && g->k > 64 && g->n >= MC_GEMM_STREAM_PANELS * MC_NR && g->m * g->n * g->k >= (int64_t)1 << 26;
}

// mc_gemm_rows is g for rows lo … hi-1 only.
static inline struct mc_gemm mc_gemm_rows(const struct mc_gemm *g, int64_t lo, int64_t hi) {
	struct mc_gemm p = *g;
	struct mc_epilogue *e = &p.epi;
	p.m = hi - lo;
	p.x = (const char *)g->x + lo * g->ldx * (g->x_dtype == MC_F32 ? 4 : 2);
	e->y = (char *)e->y + lo * e->ldy * (e->y_dtype == MC_F32 ? 4 : 2);
	if (e->res) e->res += lo * e->ldr;
	e->row0 += lo;
	return p;
}

// mc_gemm_groups is how many groups the rows are cut into, of even sizes.
static inline int64_t mc_gemm_groups(const struct mc_gemm *g, int blocked) { return mc_ceil(g->m, mc_gemm_group(g, blocked)); }

// mc_gemm_split cuts the rows into groups and the panels p0 … p1-1 into chunks;
// each pair is a task, and tasks are enough for nt workers to end together; more of
// them where k is cut and a block of A costs nothing to bring. by_chunks: all groups
// meet a chunk of W before the next, if A is the smaller of the two.
struct mc_gemm_plan {
	int64_t groups, chunks, p0, p1;
	int by_chunks;
};
static inline struct mc_gemm_plan mc_gemm_split(const struct mc_gemm *g, int nt, int blocked) {
	struct mc_gemm_plan p = {mc_gemm_groups(g, blocked), 1, g->n0 / MC_NR, mc_ceil(g->n0 + g->n, MC_NR), blocked && g->m < g->n};
	int64_t panels = p.p1 - p.p0, tasks = (blocked && (g->streams || (g->x_dtype == MC_F32 && g->w_dtype == MC_F32)) ? 16 : 8) * nt;
	if (nt > 1) p.chunks = mc_min(panels, mc_ceil(mc_ceil(tasks, p.groups), nt) * nt);
	if (!g->streams && panels < nt && p.groups < 4 * nt && g->m >= 8 * nt) // narrow: cut rows finer
		p.groups = mc_min(4 * nt, mc_ceil(g->m, 14));
	return p;
}

#endif
