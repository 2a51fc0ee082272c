// attention.inc.h: softmax(Q·Kᵀ·scale)·V on the panel products of kern.inc.h.
//
// A worker packs K and V of one sequence and head, and then passes over the
// queries in blocks of MC_ATT_ROWS: scores S = Q·Kᵀ for all keys (so the maximum
// is exact and nothing is ever rescaled), P = exp, O = P·V. A query's result
// depends on its own scores only: every sum runs over Dh or over the keys in
// order, whatever queries share the block.

// att_softmax turns n scores s into e^(scale·s − max), rounded up to two whole
// vectors with zeros, in place or as bf16 in p; returns their sum (before they
// are rounded to bf16). A NaN score makes the sum NaN.
V_INLINE float att_softmax(const int dt, float *s, mc_bf16 *p, int64_t n, float scale) {
	vf c = v_set1(scale), inf = v_set1(-__builtin_inff()), m0 = inf, m1 = inf, s0 = v_zero(), s1 = v_zero();
	int64_t i = 0;
	for (; i + 2 * VL <= n; i += 2 * VL) {
		vf x0 = v_load(s + i) * c, x1 = v_load(s + i + VL) * c;
		v_store(s + i, x0);
		v_store(s + i + VL, x1);
		m0 = v_max(x0, m0);
		m1 = v_max(x1, m1);
	}
	for (int64_t end = mc_ceil(n, 2 * VL) * 2 * VL; i < end; i += VL) {
		vf x = v_sel(v_first(mc_max(n - i, 0)), v_load(s + i) * c, inf);
		v_store(s + i, x);
		m0 = v_max(x, m0);
	}
	vf top = v_set1(v_hmax(v_max(m0, m1)));
	for (i = 0; i < n; i += 2 * VL) {
		vf e0 = v_exp(v_load(s + i) - top), e1 = v_exp(v_load(s + i + VL) - top);
		s0 = s0 + e0;
		s1 = s1 + e1;
		if (dt == MC_BF16) {
			v_storeb(p + i, e0);
			v_storeb(p + i + VL, e1);
		} else {
			v_store(s + i, e0);
			v_store(s + i + VL, e1);
		}
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

// att_pack_k packs n rows of K into a panel. In f32, and in bf16 with an even
// number of columns, that is a transposition of 32-bit words.
V_INLINE void att_pack_k(const int dt, void *dst, const char *src, int64_t ld, int64_t n, int64_t dh) {
	const int64_t es = dt == MC_BF16 ? 2 : 4;
	if (dt == MC_BF16 && dh % 2) {
		pack_nk_bf16(dst, src, dt, ld, n, dh);
		return;
	}
	for (int64_t j = 0; j < MC_NR; j += VL)
		transpose((float *)dst + j, MC_NR, src + j * ld * es, ld * es, n - j, dh * es / 4);
}

// att_pack packs K, and V too unless its rows can be used where they are, which
// pays for few queries. The products are the same either way.
V_INLINE void att_pack(const int dt, const struct mc_attention *a, struct att_seq *h, int in_place, char *k, char *v) {
	const int64_t es = dt == MC_BF16 ? 2 : 4;
	int64_t dh = a->dh;
	for (int64_t j = 0; j < h->nk; j += MC_NR, k += mc_panel_bytes(dt, dh)) {
		int64_t n = mc_min(MC_NR, h->nk - j);
		att_pack_k(dt, k, h->k + j * h->ldk * es, h->ldk, n, dh);
	}
	h->ldv = in_place ? h->ldr : MC_NR;
	for (int64_t d = 0; d < dh; d += MC_NR, v += mc_panel_bytes(dt, h->nk)) {
		const char *src = AT(h->v, d * es);
		int64_t n = mc_min(MC_NR, dh - d);
		h->vp[d / MC_NR] = in_place ? src : v;
		if (in_place) continue;
		if (dt == MC_BF16) {
			pack_kn_bf16((uint32_t *)v, src, dt, h->ldr, n, h->nk);
			continue;
		}
		for (int64_t i = 0; i < h->nk; i++)
			for (int64_t j = 0; j < MC_NR; j += VL)
				v_store((float *)v + i * MC_NR + j, v_load_n((const float *)src + i * h->ldr + j, n - j));
	}
}

// att_block computes m rows of O from row r0 of the sequence on.
V_INLINE void att_block(const int dt, const struct mc_attention *a, const struct att_seq *h, int64_t r0, int64_t m,
                        char *scratch, const struct mc_att_layout *l) {
	const int64_t es = dt == MC_BF16 ? 2 : 4, dh = a->dh;
	char *q = scratch + l->q, *p = scratch + (dt == MC_BF16 ? l->p : l->s);
	float *s = (float *)(scratch + l->s), *t = (float *)(scratch + l->t), inv[MC_ATT_ROWS];
	int64_t see[MC_ATT_ROWS], ldp = dt == MC_BF16 ? l->ldp : l->lds;
	for (int64_t i = 0; i < m; i++) {
		memcpy(q + i * l->ldq * es, h->q + (r0 + i) * a->q.ld * es, (size_t)(dh * es));
		if (r0 + m + i < h->nq) // the next block's; strided rows, which no hardware foresees
			for (int64_t b = 0; b < dh * es; b += MC_LINE) __builtin_prefetch(h->q + (r0 + m + i) * a->q.ld * es + b);
		see[i] = a->causal ? mc_max(0, h->nk - h->nq + r0 + i + 1) : h->nk;
	}
	for (int64_t j = 0; j < see[m - 1]; j += MC_NR)
		att_mul(dt, m, dh, q, l->ldq, scratch + l->k + j / MC_NR * mc_panel_bytes(dt, dh), 0, MC_NR, s + j, l->lds, 0);
	for (int64_t i = 0; i < m; i++) {
		float sum = att_softmax(dt, s + i * l->lds, (mc_bf16 *)p + i * ldp, see[i], a->scale);
		inv[i] = 1 / sum;
	}
	// Keys that all rows see, in whole pairs, and then the others row by row:
	// what a query must not see does not even meet a zero, for it may be NaN.
	int64_t all = see[0] == see[m - 1] ? see[0] : see[0] / 2 * 2;
	for (int64_t d = 0; d < dh; d += MC_NR) {
		const void *v = h->vp[d / MC_NR];
		att_mul(dt, m, all, p, ldp, v, 0, h->ldv, t, MC_NR, 0);
		for (int64_t i = 0; i < m; i++) {
			if (see[i] > all)
				att_mul(dt, 1, see[i] - all, p + (i * ldp + all) * es, ldp, v, all, h->ldv, t + i * MC_NR, MC_NR, 1);
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
	const int64_t es = dt == MC_BF16 ? 2 : 4;
	struct mc_att_layout l = mc_att_layout(a);
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
			int in_place = dt == MC_F32 && h.nq <= MC_ATT_ROWS && a->dh % MC_NR == 0 && h.nk > 0;
			att_pack(dt, a, &h, in_place, scratch + l.k, scratch + l.v);
		}
		for (; r0 < end; r0 += MC_ATT_ROWS) att_block(dt, a, &h, r0, mc_min(MC_ATT_ROWS, end - r0), scratch, &l);
	}
}

static void attention(struct mc_worker *w, void *ctx) {
	const struct mc_attention *a = ctx;
	if (a->q.dtype == MC_BF16) att_worker(MC_BF16, w, a);
	else att_worker(MC_F32, w, a);
}
