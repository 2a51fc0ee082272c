// head.inc.h: the reverse steps of the diffusion head (MAR §4.1; diffloss.py
// SimpleMLPAdaLN) in one region. Included after ops.inc.h.
//
// Modulations depend on timestep and condition only, not on x, so they leave
// the serial chain. Two schedules, which give the same bits, since a GEMM's
// sums do not depend on how it is cut:
//
//	rows     weights fit into L3, tokens are many: each worker takes blocks of
//	         tokens and runs each through all steps alone. All activations of
//	         a block stay in its L2.
//	columns  weights come from memory, or tokens are few: all workers do the
//	         same layer, each a share of its columns, with barriers between.
//	         Modulations of as many steps as the budget allows are one GEMM.

// struct head_part is what one worker works on: tokens t0 … t1-1, whose rows in
// the buffers are r0 … r0+t1-t0-1 and, with guidance, as many from r0+half on.
struct head_part {
	struct mc_head *h;
	struct mc_head_buf b;
	int64_t t0, t1, r0, half;
	float *tile; // scratch of gemm_core
};

// head_gemm multiplies m rows of x by panels p0 … p1-1 of w, outputs n0 … n0+n-1.
// x has the dtype of w. It is used where it lies, however its rows do: that
// costs the caller's x, read once a step, at most a few misses.
static void head_gemm(const struct head_part *p, const struct mc_matrix *w, int64_t n0, int64_t n, int64_t p0,
                      int64_t p1, const void *x, int64_t ldx, int64_t m, struct mc_epilogue e) {
	e.bias = AT(w->bias, n0);
	struct mc_gemm g = {m, n, w->k, n0, x, ldx, w->dtype, w->dtype, w->w, e};
	if (m > 0 && p1 > p0) gemm_core(&g, x, ldx, 0, m, p0, p1, p->tile);
}

static void *head_operand(const struct head_part *p, void *base, int64_t r, int dtype) {
	return (char *)base + r * p->h->ldw * (dtype == MC_BF16 ? 2 : 4);
}

// head_silu_sum writes SiLU(time + cond), the input of all modulations.
static void head_silu_sum(const float *time, const float *cond, void *y, int dtype, int64_t n) {
	for (int64_t i = 0; i < n; i += VL)
		st(dtype, y, i, v_silu(ld(MC_F32, time, i, n - i) + ld(MC_F32, cond, i, n - i)), n - i);
}

// head_norm writes row r of operand y: LN(h)·(1 + scale) + shift.
static void head_norm(const struct head_part *p, const float *weight, const float *bias, const float *mod, int64_t r,
                      void *y, int dtype) {
	const struct mc_head *h = p->h;
	struct mc_norm a = {.d = h->width, .weight = weight, .bias = bias, .eps = h->w->eps};
	const float *x = p->b.h + r * h->width, *scale = mod + h->width;
	y = head_operand(p, y, r, dtype);
	if (dtype == MC_BF16)
		norm_row(MC_F32, MC_BF16, &a, x, y, scale, mod);
	else
		norm_row(MC_F32, MC_F32, &a, x, y, scale, mod);
}

// HEAD_ROWS runs its body for every row r of the part's tokens.
#define HEAD_ROWS(p, r)                                                                           \
	for (int64_t half_ = 0; half_ < (p)->h->rows / (p)->h->n; half_++)                        \
		for (int64_t r = (p)->r0 + half_ * (p)->half, end_ = r + (p)->t1 - (p)->t0; r < end_; r++)

// head_input starts a step: h = input_proj(x), computed once per token and
// copied to the unconditional row.
static void head_input(const struct head_part *p, const struct mc_matrix *input) {
	const struct mc_head *h = p->h;
	float *y = p->b.h + p->r0 * h->width;
	int64_t m = p->t1 - p->t0;
	struct mc_epilogue e = {.y = y, .ldy = h->width, .y_dtype = MC_F32};
	head_gemm(p, input, 0, h->width, 0, mc_ceil(h->width, MC_NR), row(&h->x, p->t0), h->x.ld, m, e);
	if (h->rows > h->n) memcpy(y + p->half * h->width, y, (size_t)(m * h->width) * 4);
}

static void head_fc1(const struct head_part *p, const struct mc_matrix *w, int64_t p0, int64_t p1, int64_t m) {
	struct mc_epilogue e = {.y = p->b.u, .ldy = p->h->ldw, .y_dtype = w->dtype, .act = MC_SILU};
	head_gemm(p, w, 0, w->n, p0, p1, p->b.a, p->h->ldw, m, e);
}

static void head_fc2(const struct head_part *p, const struct mc_matrix *w, int64_t p0, int64_t p1, int64_t m,
                     const float *gate) {
	struct mc_epilogue e = {.y = p->b.h, .ldy = p->h->width, .y_dtype = MC_F32, .gate = gate, .ldg = p->b.ldm,
	                        .gate_rows = 1, .res = p->b.h, .ldr = p->h->width};
	head_gemm(p, w, 0, w->n, p0, p1, p->b.u, p->h->ldw, m, e);
}

// head_final ends step s: the final linear and the reverse step. Unconditional
// rows need no variance.
static void head_final(const struct head_part *p, const struct mc_matrix *final, int64_t s) {
	struct mc_head *h = p->h;
	const struct mc_head_step *c = &h->step[s];
	int64_t m = p->t1 - p->t0, ldo = 2 * h->ch;
	for (int64_t half = 0; half < h->rows / h->n; half++) {
		int64_t r = p->r0 + half * p->half, n = half ? h->ch : ldo;
		struct mc_epilogue e = {.y = p->b.out + r * ldo, .ldy = ldo, .y_dtype = MC_F32};
		head_gemm(p, final, 0, n, 0, mc_ceil(n, MC_NR), p->b.fin + r * h->ldw, h->ldw, m, e);
	}
	struct mc_mat x = {row(&h->x, p->t0), h->x.ld, MC_F32};
	struct mc_mat out = {p->b.out + p->r0 * ldo, ldo, MC_F32};
	struct mc_mat noise = {row(&h->noise, s * h->total + p->t0), h->noise.ld, MC_F32};
	struct mc_step step = {
		.n = p->half, .c = h->ch, .x = x, .y = x, .out = out, .noise = noise,
		.guidance = h->rows > h->n ? h->guidance + p->t0 : NULL, .ids = h->ids ? h->ids + 2 * p->t0 : NULL,
		.rng = h->rng, .coef_a = c->a, .coef_b = c->b, .min_log = c->min_log, .max_log = c->max_log,
		.last = c->last, .temperature = h->temperature,
	};
	step.rng.step += (uint32_t)s;
	mc_step_rows(&step, 0, m);
	if (h->trace.p)
		for (int64_t t = p->t0; t < p->t1; t++)
			memcpy(row(&h->trace, s * h->total + t), row(&h->x, t), (size_t)h->ch * 4);
}

static int head_cancelled(struct mc_head *h) {
	if (h->cancel && __atomic_load_n(h->cancel, __ATOMIC_RELAXED)) __atomic_store_n(&h->stop, 1, __ATOMIC_RELAXED);
	return (int)__atomic_load_n(&h->stop, __ATOMIC_RELAXED);
}

// ---- rows ------------------------------------------------------------------------

// head_block runs the part's tokens, m rows from 0 on, through all steps.
static void head_block(const struct head_part *p, int64_t m) {
	struct mc_head *h = p->h;
	int64_t width = h->width, panels = mc_ceil(width, MC_NR);
	for (int64_t s = 0; s < h->steps && !head_cancelled(h); s++) {
		const struct mc_head_weights *w = h->step[s].exact ? h->exact : h->w;
		int dtype = w->ada.dtype;
		for (int64_t r = 0; r < m; r++) {
			int64_t c = r < p->half ? p->t0 + r : h->total + p->t0 + r - p->half;
			head_silu_sum(row(&h->time, s), row(&h->cond, c), head_operand(p, p->b.y, r, dtype), dtype, width);
		}
		head_input(p, &w->input);
		for (int64_t j = 0; j <= w->depth; j++) {
			int64_t n0 = 3 * j * width, n = (j < w->depth ? 3 : 2) * width;
			struct mc_epilogue e = {.y = p->b.mod, .ldy = p->b.ldm, .y_dtype = MC_F32};
			head_gemm(p, &w->ada, n0, n, n0 / MC_NR, mc_ceil(n0 + n, MC_NR), p->b.y, h->ldw, m, e);
			if (j == w->depth) break;
			const struct mc_head_block *b = &w->blocks[j];
			for (int64_t r = 0; r < m; r++)
				head_norm(p, b->norm_w, b->norm_b, p->b.mod + r * p->b.ldm, r, p->b.a, dtype);
			head_fc1(p, &b->fc1, 0, panels, m);
			head_fc2(p, &b->fc2, 0, panels, m, p->b.mod + 2 * width);
		}
		for (int64_t r = 0; r < m; r++) head_norm(p, 0, 0, p->b.mod + r * p->b.ldm, r, p->b.fin, MC_F32);
		head_final(p, &w->final, s);
	}
}

static void head_by_rows(struct mc_worker *w, struct mc_head *h) {
	struct head_part p = {.h = h, .tile = w->scratch};
	for (int64_t i = mc_take(w); i < h->blocks; i = mc_take(w)) {
		p.t0 = h->n * i / h->blocks;
		p.t1 = h->n * (i + 1) / h->blocks;
		p.half = p.t1 - p.t0;
		int64_t m = p.half * (h->rows / h->n);
		mc_head_layout(h, (char *)w->scratch + MC_GEMM_TILE, m, m, 3 * h->width, &p.b);
		head_block(&p, m);
	}
}

// ---- columns -----------------------------------------------------------------------

// head_fetch asks for the first lines of a worker's share of a matrix, to
// arrive while it normalizes and waits.
static void head_fetch(const struct mc_matrix *w, int64_t p0, int64_t p1) {
	int64_t panel = mc_panel_bytes(w->dtype, w->k), bytes = mc_min((p1 - p0) * panel, 32 << 10);
	const char *b = (const char *)w->w + p0 * panel;
	for (int64_t i = 0; i < bytes; i += MC_LINE) __builtin_prefetch(b + i, 0, 2);
}

// head_mods computes the modulations of steps s0 … s1-1.
static void head_mods(struct mc_worker *w, const struct head_part *p, const struct mc_head_weights *wt, int64_t s0,
                      int64_t s1) {
	const struct mc_head *h = p->h;
	int64_t m = (s1 - s0) * h->rows, lo, hi;
	int dtype = wt->ada.dtype;
	mc_share(w, m, 1, &lo, &hi);
	for (int64_t i = lo; i < hi; i++) {
		int64_t r = i % h->rows, c = r < h->n ? r : h->total + r - h->n;
		head_silu_sum(row(&h->time, s0 + i / h->rows), row(&h->cond, c), head_operand(p, p->b.y, i, dtype), dtype, h->width);
	}
	struct mc_epilogue e = {.y = p->b.mod, .ldy = p->b.ldm, .y_dtype = MC_F32, .bias = wt->ada.bias};
	struct mc_gemm g = {m, wt->ada.n, wt->ada.k, 0, p->b.y, h->ldw, dtype, dtype, wt->ada.w, e};
	mc_take_reset(w);
	gemm(w, &g);
	mc_barrier(w);
}

static void head_by_columns(struct mc_worker *w, struct mc_head *h) {
	struct head_part p = {.h = h, .half = h->n, .tile = w->scratch};
	int64_t width = h->width, p0, p1, lo, hi;
	mc_head_layout(h, h->shared, h->rows, h->rows * h->chunk, h->w->ada.n, &p.b);
	mc_share(w, h->n, 1, &p.t0, &p.t1);
	mc_share(w, h->rows, 1, &lo, &hi);
	mc_share(w, mc_ceil(width, MC_NR), 1, &p0, &p1);
	p.r0 = p.t0;
	for (int64_t s0 = 0, s1; s0 < h->steps; s0 = s1) {
		const struct mc_head_weights *wt = h->step[s0].exact ? h->exact : h->w;
		int dtype = wt->ada.dtype;
		for (s1 = s0 + 1; s1 < h->steps && s1 - s0 < h->chunk && !h->step[s1].exact == !h->step[s0].exact;) s1++;
		head_mods(w, &p, wt, s0, s1);
		for (int64_t s = s0; s < s1; s++) {
			const float *mod = p.b.mod + (s - s0) * h->rows * p.b.ldm;
			if (w->tid == 0) head_cancelled(h);
			head_input(&p, &wt->input);
			HEAD_ROWS(&p, r) head_norm(&p, wt->blocks[0].norm_w, wt->blocks[0].norm_b, mod + r * p.b.ldm, r, p.b.a, dtype);
			for (int64_t j = 0; j < wt->depth; j++) {
				const struct mc_head_block *b = &wt->blocks[j], *next = j + 1 < wt->depth ? b + 1 : NULL;
				head_fetch(&b->fc1, p0, p1);
				mc_barrier(w);
				// Set by worker 0 before this barrier, and not again before the next.
				if (j == 0 && __atomic_load_n(&h->stop, __ATOMIC_RELAXED)) return;
				head_fc1(&p, &b->fc1, p0, p1, h->rows);
				head_fetch(&b->fc2, p0, p1);
				mc_barrier(w);
				head_fc2(&p, &b->fc2, p0, p1, h->rows, mod + 2 * width);
				mc_barrier(w);
				mod += 3 * width;
				for (int64_t r = lo; next && r < hi; r++)
					head_norm(&p, next->norm_w, next->norm_b, mod + r * p.b.ldm, r, p.b.a, dtype);
			}
			HEAD_ROWS(&p, r) head_norm(&p, 0, 0, mod + r * p.b.ldm, r, p.b.fin, MC_F32);
			head_final(&p, &wt->final, s);
		}
		mc_barrier(w); // the modulations are in use until here
	}
}

static void head(struct mc_worker *w, struct mc_head *h) {
	if (h->by_rows)
		head_by_rows(w, h);
	else
		head_by_columns(w, h);
}
