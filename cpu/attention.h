// attention.h: a worker's scratch in attention; shared by ops.c and
// attention.inc.h.
#ifndef MARGO_CPU_ATTENTION_H
#define MARGO_CPU_ATTENTION_H

#include "ops.h"

#define MC_ATT_ROWS 48 // queries at a time, at most

// mc_att_rows is how many queries pass at a time: whole blocks of the micro-kernel, two
// of AVX-512's largest; 320 scores each take 36 KiB. blocked: see mc_kernels.
static inline int64_t mc_att_rows(int blocked) { return blocked ? MC_ATT_ROWS : 28; }

// mc_att_products is the dtype of packed K and V, of Q and of the exponentials. Where no
// instruction multiplies bf16, K and V are widened once, and not for every block of rows.
static inline int mc_att_products(int dtype, int blocked) { return blocked ? MC_F32 : dtype; }

// struct mc_att_layout: packed K and V, rows of Q, scores, their bf16
// exponentials, a tile of O, a panel in bf16 that is being widened, and K and V of a
// paged cache in one piece, at these offsets in bytes; row strides in elements.
struct mc_att_layout {
	int64_t ldq, lds, ldp;
	size_t k, v, q, s, p, t, w, gk, gv, end;
};

static inline struct mc_att_layout mc_att_layout(const struct mc_attention *a, int blocked) {
	int dt = mc_att_products(a->q.dtype, blocked);
	int64_t keys = mc_ceil(a->max_k, MC_NR) * MC_NR, rows = mc_att_rows(blocked);
	// An odd number of half lines or lines between rows: they must not all
	// fall into the same few sets of L1.
	struct mc_att_layout l = {.ldq = mc_ceil(a->dh, 64) * 64 + 32, .lds = mc_ceil(keys, 64) * 64 + 16,
	                          .ldp = mc_ceil(keys, 64) * 64 + 32};
	l.k = 0;
	l.v = l.k + (size_t)mc_packed_bytes(dt, keys, a->dh);
	l.q = l.v + (size_t)mc_packed_bytes(dt, a->dh, keys);
	l.s = l.q + (size_t)(rows * l.ldq * 4);
	l.p = l.s + (size_t)(rows * l.lds * 4);
	l.t = l.p + (dt == MC_BF16 ? (size_t)(rows * l.ldp * 2) : 0);
	l.w = l.t + (size_t)(rows * MC_NR * 4);
	l.gk = l.w + (dt != a->q.dtype ? (size_t)mc_panel_bytes(MC_BF16, a->dh) : 0);
	size_t gathered = a->blocks ? (size_t)mc_ceil(a->max_k * a->dh * (a->q.dtype == MC_BF16 ? 2 : 4), MC_LINE) * MC_LINE : 0;
	l.gv = l.gk + gathered;
	l.end = l.gv + gathered;
	return l;
}

#endif
