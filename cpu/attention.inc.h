// attention.inc.h: softmax(Q·Kᵀ·scale)·V on the panel products of kern.inc.h.
//
// A worker packs K and V of one sequence and head, and then passes over the
// queries in blocks of mc_att_rows: scores S = Q·Kᵀ for all keys (so the maximum
// is exact and nothing is ever rescaled), P = exp, O = P·V. A query's result
// depends on its own scores only: every sum runs over Dh or over the keys in
// order, whatever queries share the block.

// att_put stores exponentials e from i on, of dtype dt as products of dtype pt take them: in s if
// pt is F32, else in p.
V_INLINE void att_put(const int dt, const int pt, float *s, mc_bf16 *p, int64_t i, vf e) {
	if (pt == MC_BF16) v_storeb(p + i, e);
	else v_store(s + i, dt == MC_BF16 ? v_to_bf16(e) : e);
}

// att_softmax turns n scores s into e^(scale·s − max), rounded up to two whole vectors with
// zeros, where att_put puts them. Returns their sum (before they are rounded to bf16). A NaN score makes the sum NaN.
V_INLINE float att_softmax(const int dt, const int pt, float *s, mc_bf16 *p, int64_t n, float scale) {
	vf c = v_set1(scale), inf = v_set1(-__builtin_inff()), m0 = inf, m1 = inf, s0 = v_zero(), s1 = v_zero();
	int64_t i = 0, whole = n / (2 * VL) * 2 * VL;
	for (; i < whole; i += 2 * VL) {
		m0 = v_max(v_load(s + i) * c, m0);
		m1 = v_max(v_load(s + i + VL) * c, m1);
	}
	for (; i < n; i += VL) m0 = v_max(v_sel(v_first(n - i), v_load(s + i) * c, inf), m0);
	vf top = v_zero() - v_set1(v_hmax(v_max(m0, m1)));
	for (i = 0; i < whole; i += 2 * VL) {
		vf e0 = v_exp(v_fma(v_load(s + i), c, top)), e1 = v_exp(v_fma(v_load(s + i + VL), c, top));
		s0 = s0 + e0;
		s1 = s1 + e1;
		att_put(dt, pt, s, p, i, e0);
		att_put(dt, pt, s, p, i + VL, e1);
	}
	for (int64_t end = mc_ceil(n, 2 * VL) * 2 * VL; i < end; i += VL) {
		vf e = v_sel(v_first(mc_max(n - i, 0)), v_exp(v_fma(v_load(s + i), c, top)), v_zero());
		s0 = s0 + e;
		att_put(dt, pt, s, p, i, e);
	}
	return v_sum(s0 + s1);
}

// att_mul is the panel product of dtype dt; b is a panel from row kk on.
V_INLINE void att_mul(const int dt, int64_t m, int64_t k, const void *a, int64_t lda, const void *b, int64_t kk,
                      int64_t ldb, float *c, int64_t ldc, int add) {
	if (dt == MC_BF16)
		mul_bf16(m, k, a, lda, (const uint32_t *)b + kk / 2 * ldb, ldb, c, ldc, add);
	else
		mul_f32(m, k, a, lda, (const float *)b + kk * ldb, ldb, c, ldc, add);
}

// struct att_seq is one head of one sequence.
struct att_seq {
	const char *q, *k, *v; // first row, first column of the head
	char *o;
	int64_t nq, nk, ldk, ldr; // strides of rows of k and of v
	const void *vp[512 / MC_NR]; // panels of V
	int64_t ldv;
};

enum { ATT_AHEAD = 8 }; // rows of K and V that are asked for ahead: they lie far apart, and no hardware foresees them

V_INLINE void att_fetch(const char *p, int64_t bytes) {
	for (int64_t b = 0; b < bytes; b += MC_LINE) __builtin_prefetch(p + b);
}

// att_pack_k packs n rows of K, of left that follow, into a panel of dtype pt. In f32, and in
// bf16 with an even number of columns, that is a transposition of 32-bit words. w holds a
// panel of dtype dt, should it be another.
V_INLINE void att_pack_k(const int dt, const int pt, void *dst, const char *src, int64_t ld, int64_t n, int64_t left, int64_t dh, void *w) {
	const int64_t es = dt == MC_BF16 ? 2 : 4;
	if (dt == MC_BF16 && dh % 2) {
		if (pt == MC_BF16) pack_nk_bf16(dst, src, dt, ld, n, dh);
		else pack_nk_f32(dst, src, dt, ld, n, dh);
		return;
	}
	float *to = dt == pt ? dst : w;
	for (int64_t j = 0; j < MC_NR; j += VL) {
		for (int64_t i = j + ATT_AHEAD; i < mc_min(j + ATT_AHEAD + VL, left); i++) att_fetch(src + i * ld * es, dh * es);
		transpose(to + j, MC_NR, src + j * ld * es, ld * es, n - j, dh * es / 4);
	}
#if defined(KBLOCK)
	if (dt != pt) widen_pairs(w, dh, dst);
#endif
}

// att_pack_v packs V into panels of dtype pt.
V_INLINE void att_pack_v(const int dt, const int pt, const struct att_seq *h, int64_t dh, char *v) {
	const int64_t es = dt == MC_BF16 ? 2 : 4, panel = mc_panel_bytes(pt, h->nk);
	if (pt == MC_BF16) {
		for (int64_t d = 0; d < dh; d += MC_NR, v += panel)
			pack_kn_bf16((uint32_t *)v, h->v + d * es, dt, h->ldr, mc_min(MC_NR, dh - d), h->nk);
		return;
	}
	for (int64_t i = 0; i < h->nk; i++) {
		const char *src = h->v + i * h->ldr * es;
		if (i + ATT_AHEAD < h->nk) att_fetch(src + ATT_AHEAD * h->ldr * es, dh * es);
		float *to = (float *)v + i * MC_NR;
		for (int64_t d = 0; d < dh; d += MC_NR, to += panel / 4)
			for (int64_t j = 0; j < MC_NR; j += VL) v_store(to + j, d + j < dh ? ld(dt, src, d + j, dh - d - j) : v_zero());
	}
}

// att_pack packs K, and V too unless its rows can be used where they are, which
// pays for few queries. The products are the same either way.
V_INLINE void att_pack(const int dt, const int pt, const struct mc_attention *a, struct att_seq *h, int in_place, char *scratch,
                       const struct mc_att_layout *l) {
	const int64_t es = dt == MC_BF16 ? 2 : 4, dh = a->dh;
	char *k = scratch + l->k;
	for (int64_t j = 0; j < h->nk; j += MC_NR, k += mc_panel_bytes(pt, dh))
		att_pack_k(dt, pt, k, h->k + j * h->ldk * es, h->ldk, mc_min(MC_NR, h->nk - j), h->nk - j, dh, scratch + l->w);
	h->ldv = in_place ? h->ldr : MC_NR;
	for (int64_t d = 0; d < dh; d += MC_NR)
		h->vp[d / MC_NR] = in_place ? AT(h->v, d * es) : scratch + l->v + d / MC_NR * mc_panel_bytes(pt, h->nk);
	if (!in_place) att_pack_v(dt, pt, h, dh, scratch + l->v);
}

// att_block computes m rows of O from row r0 of the sequence on.
V_INLINE void att_block(const int dt, const int pt, const struct mc_attention *a, const struct att_seq *h, int64_t r0, int64_t m,
                        char *scratch, const struct mc_att_layout *l) {
	const int64_t es = dt == MC_BF16 ? 2 : 4, ps = pt == MC_BF16 ? 2 : 4, dh = a->dh;
	char *q = scratch + l->q, *p = scratch + (pt == MC_BF16 ? l->p : l->s);
	float *s = (float *)(scratch + l->s), *t = (float *)(scratch + l->t), inv[MC_ATT_ROWS];
	int64_t see[MC_ATT_ROWS], ldp = pt == MC_BF16 ? l->ldp : l->lds;
	for (int64_t i = 0; i < m; i++) {
		const char *row = h->q + (r0 + i) * a->q.ld * es;
		if (pt == dt) memcpy(q + i * l->ldq * ps, row, (size_t)(dh * es));
		else to_f32((float *)q + i * l->ldq, (const mc_bf16 *)row, dh);
		if (r0 + m + i < h->nq) att_fetch(row + m * a->q.ld * es, dh * es); // the next block's
		see[i] = a->causal ? mc_max(0, h->nk - h->nq + r0 + i + 1) : h->nk;
	}
	for (int64_t j = 0; j < see[m - 1]; j += MC_NR)
		att_mul(pt, m, dh, q, l->ldq, scratch + l->k + j / MC_NR * mc_panel_bytes(pt, dh), 0, MC_NR, s + j, l->lds, 0);
	for (int64_t i = 0; i < m; i++) {
		float sum = att_softmax(dt, pt, s + i * l->lds, (mc_bf16 *)p + i * ldp, see[i], a->scale);
		inv[i] = 1 / sum;
	}
	// Keys that all rows see, in whole pairs, and then the others row by row:
	// what a query must not see does not even meet a zero, for it may be NaN.
	int64_t all = see[0] == see[m - 1] ? see[0] : see[0] / 2 * 2;
	for (int64_t d = 0; d < dh; d += MC_NR) {
		const void *v = h->vp[d / MC_NR];
		att_mul(pt, m, all, p, ldp, v, 0, h->ldv, t, MC_NR, 0);
		for (int64_t i = 0; i < m; i++) {
			if (see[i] > all)
				att_mul(pt, 1, see[i] - all, p + (i * ldp + all) * ps, ldp, v, all, h->ldv, t + i * MC_NR, MC_NR, 1);
			char *o = h->o + ((r0 + i) * a->o.ld + d) * es;
			vf c = v_set1(inv[i]);
			for (int64_t j = 0, n = mc_min(MC_NR, dh - d); j < n; j += VL)
				st(dt, o, j, see[i] > 0 ? v_load(t + i * MC_NR + j) * c : v_zero(), n - j);
		}
	}
}

// att_gather copies one head of the keys, or values, of sequence s out of a paged
// cache. What the products then see is what they see without blocks.
static void att_gather(const struct mc_attention *a, const struct mc_mat *x, int64_t s, int64_t head, int64_t nk,
                       int64_t es, char *to) {
	const char *from = (const char *)x->p + head * a->dh * es;
	for (int64_t j = 0; j < nk; j++, to += a->dh * es) {
		int64_t r = a->blocks[s * a->ld_blocks + j / a->block] * a->block + j % a->block;
		memcpy(to, from + r * x->ld * es, (size_t)(a->dh * es));
	}
}

V_INLINE void att_worker(const int dt, struct mc_worker *w, const struct mc_attention *a) {
	const int pt = mc_att_products(dt, GEMM_BLOCKED);
	const int64_t es = dt == MC_BF16 ? 2 : 4, rows = mc_att_rows(GEMM_BLOCKED);
	struct mc_att_layout l = mc_att_layout(a, GEMM_BLOCKED);
	struct att_seq h = {0};
	char *scratch = w->scratch;
	int64_t s = 0, first = 0, packed = -1; // first: item number where sequence s begins
	for (int64_t t = mc_take(w); t < a->items; t = mc_take(w)) {
		int64_t chunks;
		for (;; s++) {
			h.nq = a->qoff[s + 1] - a->qoff[s];
			chunks = mc_ceil(h.nq, a->chunk);
			if (t < first + chunks * a->heads) break;
			first += chunks * a->heads;
		}
		int64_t head = (t - first) / chunks, r0 = (t - first) % chunks * a->chunk, end = mc_min(r0 + a->chunk, h.nq);
		if (packed != s * a->heads + head) {
			packed = s * a->heads + head;
			h.nk = a->koff[s + 1] - a->koff[s];
			h.q = (char *)a->q.p + (a->qoff[s] * a->q.ld + head * a->dh) * es;
			if (a->blocks) {
				h.ldk = h.ldr = a->dh;
				h.k = scratch + l.gk;
				h.v = scratch + l.gv;
				att_gather(a, &a->k, s, head, h.nk, es, scratch + l.gk);
				att_gather(a, &a->v, s, head, h.nk, es, scratch + l.gv);
			} else {
				h.ldk = a->k.ld;
				h.ldr = a->v.ld;
				h.k = AT((const char *)a->k.p, (a->koff[s] * a->k.ld + head * a->dh) * es); // NULL if there are no keys at all
				h.v = AT((const char *)a->v.p, (a->koff[s] * a->v.ld + head * a->dh) * es);
			}
			h.o = (char *)a->o.p + (a->qoff[s] * a->o.ld + head * a->dh) * es;
			int in_place = dt == MC_F32 && h.nq <= rows && a->dh % MC_NR == 0 && h.nk > 0;
			att_pack(dt, pt, a, &h, in_place, scratch, &l);
		}
		for (; r0 < end; r0 += rows) att_block(dt, pt, a, &h, r0, mc_min(rows, end - r0), scratch, &l);
	}
}

static void attention(struct mc_worker *w, void *ctx) {
	const struct mc_attention *a = ctx;
	if (a->q.dtype == MC_BF16) att_worker(MC_BF16, w, a);
	else att_worker(MC_F32, w, a);
}
