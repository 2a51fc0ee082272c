// head.c: choice of the schedule of the head loop, and its memory.
#include "gemm.h"
#include "head.h"

// Weights that stay in a shared L3 may be read again for every block of tokens.
#define CACHED ((int64_t)12 << 20)
#define BLOCK_ROWS 56 // of a block of tokens: four of the largest tile

static void head_worker(struct mc_worker *w, void *ctx) { mc_kern()->head(w, ctx); }

static int64_t weight_bytes(const struct mc_head_weights *w) {
	int64_t b = w->ada.n * w->ada.k;
	for (int64_t j = 0; j < w->depth; j++) b += 2 * w->blocks[j].fc1.n * w->blocks[j].fc1.k;
	return b * (w->ada.dtype == MC_F32 ? 4 : 2);
}

size_t mc_head_plan(struct mc_head *h, int nt) {
	int64_t per = h->rows / h->n;
	struct mc_head_buf b;
	h->total = h->range = h->n;
	h->ldw = mc_gemm_ldcopy(h->width);
	h->by_rows = (weight_bytes(h->w) <= CACHED && h->n >= nt) || h->w->depth == 0;
	if (h->by_rows) {
		h->blocks = mc_min(h->n, nt * mc_ceil(h->rows, nt * BLOCK_ROWS));
		return 0;
	}
	// Bytes of a row, and of a row and step: the budget holds as many tokens as
	// it can, in ranges of equal size, and then steps. Fewer than BLOCK_ROWS
	// rows would not pay for reading the weights.
	int64_t once = (int64_t)mc_head_layout(h, NULL, 1, 0, 0, &b);
	int64_t each = (int64_t)mc_head_layout(h, NULL, 0, 1, h->w->ada.n, &b);
	int64_t most = mc_max(BLOCK_ROWS, h->budget / (once + each)) / per;
	h->range = mc_ceil(h->n, mc_ceil(h->n, most));
	int64_t rows = h->range * per;
	h->chunk = mc_max(1, mc_min(h->steps, (h->budget / rows - once) / each));
	h->chunk = mc_ceil(h->steps, mc_ceil(h->steps, h->chunk));
	return mc_head_layout(h, NULL, rows, rows * h->chunk, h->w->ada.n, &b);
}

// tokens makes h the range of n tokens from t0 on of the call all.
static void tokens(struct mc_head *h, const struct mc_head *all, int64_t t0, int64_t n) {
	struct mc_mat *m[] = {&h->x, &h->cond, &h->noise, &h->trace};
	*h = *all;
	h->n = n;
	h->rows = n * (all->rows / all->n);
	for (int i = 0; i < 4; i++)
		if (m[i]->p) m[i]->p = (float *)m[i]->p + t0 * m[i]->ld;
	if (h->guidance) h->guidance += t0;
	if (h->ids) h->ids += 2 * t0;
}

static int run(struct mc_head *h, int nt) {
	struct mc_gemm mods = {.m = h->rows * h->chunk, .k = h->w->ada.k, .ldx = h->ldw, .x_dtype = h->w->ada.dtype, .w_dtype = h->w->ada.dtype};
	size_t scratch = h->by_rows ? MC_GEMM_TILE : mc_gemm_scratch(&mods, mc_kern()->blocked);
	struct mc_head_buf b;
	h->stop = 0;
	if (h->by_rows) {
		int64_t m = mc_ceil(h->n, h->blocks) * (h->rows / h->n);
		scratch += mc_head_layout(h, NULL, m, m, 3 * h->width, &b);
	}
	int status = (h->by_rows ? mc_parallel_take : mc_parallel)(nt, scratch, head_worker, h);
	return status ? status : h->stop ? MC_CANCELLED : MC_OK;
}

int mc_head_run(struct mc_head *all, int nt) {
	if (all->n <= 0 || all->steps <= 0) return MC_OK;
	if (nt < 1) nt = 1;
	size_t bytes = mc_head_plan(all, nt);
	all->shared = bytes ? mc_alloc(bytes) : NULL;
	if (bytes && !all->shared) return MC_NOMEM;
	int status = MC_OK;
	for (int64_t t = 0; t < all->n && !status; t += all->range) {
		struct mc_head h;
		tokens(&h, all, t, mc_min(all->range, all->n - t));
		status = run(&h, nt);
	}
	mc_free(all->shared);
	return status;
}
