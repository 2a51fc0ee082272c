// head.h: arguments of the fused loop over diffusion steps (head.c,
// head.inc.h); formulas and shapes are those of engine.HeadStepsArgs.
#ifndef MARGO_CPU_HEAD_H
#define MARGO_CPU_HEAD_H

#include "core.h"
#include "ops.h"

// struct mc_matrix is a packed weight [n, k] with its bias [n] (or NULL).
struct mc_matrix {
	const void *w;
	const float *bias;
	int64_t n, k;
	int dtype;
};

struct mc_head_block {
	const float *norm_w, *norm_b;
	struct mc_matrix fc1, fc2;
};

// input and final are f32; ada and the blocks' matrices are of one dtype.
struct mc_head_weights {
	struct mc_matrix input, ada, final;
	const struct mc_head_block *blocks;
	int64_t depth;
	float eps;
};

// struct mc_head_step is engine.StepCoef, and whether the step runs in f32.
struct mc_head_step {
	double a, b, min_log, max_log;
	int last, exact;
};

struct mc_head {
	int64_t n, rows, width, ch, steps; // rows is n, or 2n with guidance
	struct mc_mat x, cond, time, noise, trace;
	const struct mc_head_weights *w, *exact; // exact is used by exact steps only
	const struct mc_head_step *step;
	const float *guidance;
	const int32_t *ids;
	struct mc_rng rng;
	float temperature;
	const uint32_t *cancel; // or NULL
	int64_t budget;         // bytes that the columns schedule may take

	// Set by mc_head_plan and mc_head_run. A call with more tokens than the budget
	// allows runs range by range; then n, rows and the tensors are a range's.
	int64_t total;  // tokens of the call: rows between the halves of cond, and between steps of noise and trace
	int64_t range;  // tokens that run together
	int by_rows;    // schedule: blocks of tokens, else columns of weights
	int64_t blocks; // of tokens
	int64_t chunk;  // steps whose modulations are computed at once
	int64_t ldw;    // row stride of GEMM operands
	char *shared;   // buffers of the column schedule
	uint32_t stop;  // cancelled
};

// struct mc_head_buf is the working set of some rows: row r of each buffer
// belongs to row r of the block. GEMM operands have a row stride of ldw elements
// and take as much room in bf16 as in f32.
struct mc_head_buf {
	float *h;   // [m, W] residual stream
	void *a, *u; // [m, ldw] operands of fc1 and fc2
	float *fin; // [m, ldw] operand of the final layer
	float *out; // [m, 2C]
	void *y;    // [my, ldw] SiLU(time + cond)
	float *mod; // [my, ldm] modulations
	int64_t ldm;
};

// mc_head_layout cuts memory at p into b for m rows, and my rows of y and mod.
// It returns the bytes used; p may be NULL to ask for them.
static inline size_t mc_head_layout(const struct mc_head *h, char *p, int64_t m, int64_t my, int64_t ldm,
                                    struct mc_head_buf *b) {
	uintptr_t at = (uintptr_t)p;
#define MC_CUT(field, elems) (b->field = (void *)at, at += (size_t)mc_ceil((elems) * 4, MC_LINE) * MC_LINE)
	MC_CUT(h, m * h->width);
	MC_CUT(a, m * h->ldw);
	MC_CUT(u, m * h->ldw);
	MC_CUT(fin, m * h->ldw);
	MC_CUT(out, m * 2 * h->ch);
	MC_CUT(y, my * h->ldw);
	MC_CUT(mod, my * ldm);
#undef MC_CUT
	b->ldm = ldm;
	return at - (uintptr_t)p;
}

// mc_head_plan chooses schedule, range and chunk for a head with tokens and
// steps, and returns the bytes of its shared buffers.
size_t mc_head_plan(struct mc_head *h, int nt);

// mc_head_run: MC_OK, MC_NOMEM or MC_CANCELLED.
int mc_head_run(struct mc_head *h, int nt);

#endif
