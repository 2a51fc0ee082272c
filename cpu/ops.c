// ops.c: the vector ops of ops.h on the pool.
#include "ops.h"

#include "attention.h"
#include "conv.h"

// Elements per worker below which waking it costs more than it saves.
#define WORTH (1 << 14)

static int useful(int nt, int64_t elems) { return (int)mc_max(1, mc_min(nt, elems / WORTH)); }

// by_rows runs fn, which shares out rows by mc_share and needs no scratch, on
// the calling thread alone if there is little to do.
static int by_rows(mc_fn fn, void *ctx, int nt, int64_t elems) {
	nt = useful(nt, elems);
	if (nt > 1) return mc_parallel(nt, 0, fn, ctx);
	struct mc_worker w = {.tid = 0, .nt = 1};
	fn(&w, ctx);
	return MC_OK;
}

int mc_norm_run(struct mc_norm *a, int nt) { return by_rows(mc_kern()->ops->norm, a, nt, a->m * a->d); }

int mc_gated_run(struct mc_gated *a, int nt) { return by_rows(mc_kern()->ops->gated, a, nt, a->m * a->d); }

int mc_cast_run(struct mc_cast *a, int nt) { return by_rows(mc_kern()->ops->cast, a, nt, a->m * a->d); }

static int inside(const int32_t *index, int64_t count, int64_t lo, int64_t n) {
	for (int64_t r = 0; index && r < count; r++)
		if (index[r] < lo || index[r] >= n) return 0;
	return 1;
}

int mc_rows_run(struct mc_rows *a, int nt) {
	// Any negative ia or ib stands for nothing.
	if (!inside(a->iy, a->count, 0, a->ny) || !inside(a->ia, a->count, INT32_MIN, a->na) ||
	    !inside(a->ib, a->count, INT32_MIN, a->nb))
		return MC_INVALID;
	return by_rows(mc_kern()->ops->rows, a, nt, a->count * a->d);
}

int mc_attention_run(struct mc_attention *a, int nt) {
	int64_t pairs = 0, longest = 0, queries = 0, work = 0;
	a->max_k = 0;
	for (int64_t s = 0; s < a->seqs; s++) {
		int64_t q = a->qoff[s + 1] - a->qoff[s], k = a->koff[s + 1] - a->koff[s];
		if (q == 0) continue;
		for (int64_t b = 0; a->blocks && b < mc_ceil(k, a->block); b++)
			if (a->blocks[s * a->ld_blocks + b] < 0 || a->blocks[s * a->ld_blocks + b] >= a->cache) return MC_INVALID;
		pairs += a->heads;
		queries += q;
		work += (q / 16 + 2) * k * a->heads * a->dh; // products, and reading K and V
		longest = mc_max(longest, q);
		a->max_k = mc_max(a->max_k, k);
	}
	if (pairs == 0) return MC_OK;
	// With enough heads a worker takes all queries of one, else a block at a
	// time; then several workers pack the same K and V, each for itself.
	int blocked = mc_kern()->blocked;
	a->chunk = nt == 1 || pairs >= 4 * nt ? longest : mc_att_rows(blocked);
	a->items = 0;
	for (int64_t s = 0; s < a->seqs; s++) a->items += mc_ceil(a->qoff[s + 1] - a->qoff[s], a->chunk) * a->heads;
	nt = (int)mc_min(useful(nt, work), a->items);
	return mc_parallel_take(nt, mc_att_layout(a, blocked).end, mc_kern()->ops->attention, a);
}

int mc_conv_run(struct mc_conv *a, int nt) {
	int64_t pixels = a->n * a->ho * a->wo;
	if (pixels == 0 || a->cout == 0) return MC_OK;
	if (a->kernel == 1 && a->stride == 1 && !a->up && a->ho == a->h && a->wo == a->w && a->x.dtype <= a->w_dtype) {
		struct mc_gemm g = {.m = pixels, .n = a->cout, .k = a->cin, .x = a->x.p, .ldx = a->x.ld,
		                    .x_dtype = a->x.dtype, .w_dtype = a->w_dtype, .w = a->weight, .epi = a->epi};
		return mc_gemm_run(&g, nt);
	}
	nt = useful(nt, pixels * a->cout * a->cin * a->kernel * a->kernel / 16);
	mc_conv_plan(a, nt);
	nt = (int)mc_min(nt, a->n * a->bands * a->shares);
	return mc_parallel_take(nt, mc_conv_scratch(a), mc_kern()->ops->conv, a);
}

#define GN_BLOCK (1 << 16) // elements of a block: 256 KiB, read twice from L2

int mc_groupnorm_run(struct mc_groupnorm *a, int nt) {
	if (a->n * a->pixels * a->ch == 0) return MC_OK;
	a->block = mc_max(1, GN_BLOCK / a->ch);
	int64_t blocks = a->n * mc_ceil(a->pixels, a->block);
	a->stats = mc_alloc((size_t)(blocks * a->groups) * sizeof *a->stats);
	if (!a->stats) return MC_NOMEM;
	nt = (int)mc_min(useful(nt, a->n * a->pixels * a->ch), blocks);
	int status = mc_parallel(nt, (size_t)a->ch * 3 * sizeof(float), mc_kern()->ops->groupnorm, a);
	mc_free(a->stats);
	return status;
}
