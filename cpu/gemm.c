// gemm.c: GEMM and packing on the pool.
#include <stdatomic.h>

#include "gemm.h"

static void gemm_worker(struct mc_worker *w, void *ctx) { mc_kern()->gemm(w, ctx); }

// Below this many multiply-adds per worker, waking it costs more than it saves.
#define WORTH (1 << 16)

static int useful(int nt, int64_t work) { return (int)mc_max(1, mc_min(nt, work / WORTH)); }

static void streams_worker(struct mc_worker *w, void *ctx) { mc_kern()->gemm_streams(w, ctx); }

// spare is memory for streams that no product uses, or NULL. It is kept, for mapping it anew
// costs more than filling it.
static struct streams {
	size_t bytes;
} *_Atomic spare;

static struct streams *borrow(size_t bytes) {
	struct streams *s = atomic_exchange(&spare, NULL);
	if (s && s->bytes >= bytes) return s;
	mc_free(s);
	s = mc_alloc(MC_LINE + bytes);
	if (s) s->bytes = bytes;
	return s;
}

// in_streams runs g in slabs of rows whose A is brought into streams first; 0: there is no
// memory, and nothing was done.
static int in_streams(const struct mc_gemm *g, int nt, int *status) {
	int64_t slabs = mc_ceil(g->m * g->k * 4, MC_GEMM_STREAM_BYTES);
	struct streams *s = borrow((size_t)(mc_ceil(g->m, slabs) * g->k * 4));
	if (!s) return 0;
	*status = MC_OK;
	for (int64_t i = 0; i < slabs && *status == MC_OK; i++) {
		struct mc_gemm part = mc_gemm_rows(g, g->m * i / slabs, g->m * (i + 1) / slabs);
		part.streams = (float *)((char *)s + MC_LINE);
		*status = mc_parallel_take(nt, 0, streams_worker, &part);
		if (*status == MC_OK) *status = mc_parallel_take(nt, mc_gemm_scratch(&part, 1), gemm_worker, &part);
	}
	mc_free(atomic_exchange(&spare, s));
	return 1;
}

int mc_gemm_run(const struct mc_gemm *g, int nt) {
	if (g->m <= 0 || g->n <= 0) return MC_OK;
	int blocked = mc_kern()->blocked, status;
	nt = useful(nt, g->m * g->n * (g->k + 16));
	if (blocked && mc_gemm_streams(g) && in_streams(g, nt, &status)) return status;
	return mc_parallel_take(nt, mc_gemm_scratch(g, blocked), gemm_worker, (void *)g);
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
