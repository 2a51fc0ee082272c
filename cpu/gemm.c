// gemm.c: GEMM and packing on the pool.
#include "gemm.h"

static void gemm_worker(struct mc_worker *w, void *ctx) { mc_kern()->gemm(w, ctx); }

// Below this many multiply-adds per worker, waking it costs more than it saves.
#define WORTH (1 << 16)

static int useful(int nt, int64_t work) { return (int)mc_max(1, mc_min(nt, work / WORTH)); }

int mc_gemm_run(const struct mc_gemm *g, int nt) {
	if (g->m <= 0 || g->n <= 0) return MC_OK;
	return mc_parallel_take(useful(nt, g->m * g->n * (g->k + 16)), mc_gemm_scratch(g, mc_kern()->blocked), gemm_worker, (void *)g);
}

struct pack {
	char *dst;
	const char *w;
	int dst_dtype, w_dtype;
	int64_t ldw, n, k;
};

static void pack_worker(struct mc_worker *w, void *ctx) {
	struct pack *p = ctx;
	const struct mc_kernels *kern = mc_kern();
	int64_t panels = mc_ceil(p->n, MC_NR), lo, hi, bytes = mc_panel_bytes(p->dst_dtype, p->k);
	mc_share(w, panels, 1, &lo, &hi);
	for (int64_t i = lo; i < hi; i++) {
		const void *src = p->w + i * MC_NR * p->ldw * (p->w_dtype == MC_F32 ? 4 : 2);
		int64_t rows = mc_min(MC_NR, p->n - i * MC_NR);
		if (p->dst_dtype == MC_F32)
			kern->pack_nk_f32((float *)(p->dst + i * bytes), src, p->w_dtype, p->ldw, rows, p->k);
		else
			kern->pack_nk_bf16((uint32_t *)(p->dst + i * bytes), src, p->w_dtype, p->ldw, rows, p->k);
	}
}

int mc_pack(void *dst, int dst_dtype, const void *w, int64_t ldw, int w_dtype, int64_t n, int64_t k, int nt) {
	struct pack p = {dst, w, dst_dtype, w_dtype, ldw, n, k};
	return mc_parallel(useful(nt, n * k), 0, pack_worker, &p);
}
