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

int mc_head_run(struct mc_head *h, int nt) {
	if (h->n <= 0 || h->steps <= 0) return MC_OK;
	if (nt < 1) nt = 1;
	int64_t per = h->rows / h->n, width = h->width;
	struct mc_head_buf b;
	size_t scratch = MC_GEMM_TILE;
	h->ldw = mc_gemm_ldcopy(width);
	h->stop = 0;
	h->shared = NULL;
	h->by_rows = (weight_bytes(h->w) <= CACHED && h->n >= nt) || h->w->depth == 0;
	if (h->by_rows) {
		h->blocks = mc_min(h->n, nt * mc_ceil(h->rows, nt * BLOCK_ROWS));
		int64_t m = mc_ceil(h->n, h->blocks) * per;
		scratch += mc_head_layout(h, NULL, m, m, 3 * width, &b);
	} else {
		h->chunk = mc_max(1, mc_min(h->steps, h->budget / (h->rows * h->w->ada.n * 4)));
		h->shared = mc_alloc(mc_head_layout(h, NULL, h->rows, h->rows * h->chunk, h->w->ada.n, &b));
		if (!h->shared) return MC_NOMEM;
	}
	int status = (h->by_rows ? mc_parallel_take : mc_parallel)(nt, scratch, head_worker, h);
	mc_free(h->shared);
	return status ? status : h->stop ? MC_CANCELLED : MC_OK;
}
