// ops.h: the ops beside GEMM and the head loop. Each has an argument struct, a
// function mc_*_run that the Go side calls (ops.c, scalar.c), and, where vectors
// help, a worker function per instruction set in struct mc_ops.
//
// Formulas and shapes are those of engine.Kernels (engine/kernels.go). All
// arguments have been checked by the caller, but for the numbers in index
// tensors. Every output element is computed by one sequence of operations that
// depends on its own row, sequence or image only: never on how many others
// there are, on the number of threads or on who computes it.
//
// nt is the number of threads to use at most, as for mc_parallel.
#ifndef MARGO_CPU_OPS_H
#define MARGO_CPU_OPS_H

#include "core.h"

// struct mc_mat is the matrix view of a tensor: rows of some elements, ld
// elements apart. p is NULL for an absent option.
struct mc_mat {
	void *p;
	int64_t ld;
	int dtype;
};

// struct mc_attention: softmax(Q·Kᵀ·scale)·V. qoff and koff hold seqs+1 row
// numbers. With blocks, a table of ld_blocks numbers for each sequence, key j of
// sequence s is row j%block of block blocks[s·ld_blocks + j/block], of which there
// are cache. The fields after causal are set by mc_attention_run.
struct mc_attention {
	struct mc_mat q, k, v, o; // all of one dtype
	const int32_t *qoff, *koff;
	int64_t seqs, heads, dh;
	const int32_t *blocks; // NULL: rows of k and v follow each other
	int64_t ld_blocks, block, cache;
	float scale;
	int causal;

	int64_t chunk; // query rows of a work item
	int64_t items;
	int64_t max_k; // keys of the longest sequence
};

// struct mc_norm: y = (LN(x)·weight + bias)·(1 + scale) + shift, d columns.
struct mc_norm {
	int64_t m, d;
	struct mc_mat x, y;
	const float *weight, *bias;
	struct mc_mat scale, shift; // row r uses row r / mod_rows
	int64_t mod_rows;
	float eps;
};

// struct mc_gated: y = x + gate ⊙ h.
struct mc_gated {
	int64_t m, d;
	struct mc_mat x, h, y;
	struct mc_mat gate; // row r uses row r / gate_rows
	int64_t gate_rows;
};

// struct mc_rows: y[iy[r]] = act(a[ia[r]] + b[ib[r]]) for r below count. The
// tensors have ny, na and nb rows; an index outside is MC_INVALID, and then
// nothing is written.
struct mc_rows {
	int64_t count, d;
	struct mc_mat y, a, b;
	const int32_t *iy, *ia, *ib; // NULL: r itself; ib is NULL without b
	int64_t ny, na, nb;
	int act;
};

// struct mc_cast: y = x·scale + shift.
struct mc_cast {
	int64_t m, d;
	struct mc_mat x, y;
	float scale, shift;
};

// struct mc_conv: NHWC convolution of [n, h, w, cin] to [n, ho, wo, cout]. With
// up, x is first doubled by nearest neighbour. w is packed, with columns
// (ky, kx, cin). epi describes y and what is added: no gate, no act. The fields
// after epi are set by mc_conv_run.
struct mc_conv {
	int64_t n, h, w, cin, ho, wo, cout;
	int64_t kernel, stride, pad_top, pad_left;
	int up;
	struct mc_mat x; // row = pixel
	const void *weight;
	int w_dtype;
	struct mc_epilogue epi;

	int64_t bands, rows; // of output rows: how many, and how high
	int64_t shares;      // of the output channels; a work item is a share of a band
	int64_t wp;          // pixels of a padded input row
	int64_t pitch;       // elements from pixel to pixel of a padded input row
	int64_t taps;        // horizontal taps that one product takes together
	int64_t col;         // elements of an im2col row, 0 without im2col
};

// struct mc_groupnorm: y = act(GN(x)·weight + bias) over n images of pixels
// pixels. stats is set by mc_groupnorm_run.
struct mc_groupnorm {
	int64_t n, pixels, ch, groups;
	struct mc_mat x, y; // row = pixel
	const float *weight, *bias;
	float eps;
	int act;

	int64_t block; // pixels whose statistics are taken together
	struct mc_moments *stats;
};

// struct mc_moments are the mean of some numbers and the sum of the squared
// distances from it.
struct mc_moments {
	double mean, m2;
};

// struct mc_embed: y[i] = [cos(t_i f_j) …, sin(t_i f_j) …], dim columns.
struct mc_embed {
	int64_t m, dim;
	const float *t;
	struct mc_mat y;
	float max_period;
};

// struct mc_rng names the normal draws of an op, as engine.RNG.
struct mc_rng {
	uint64_t seed;
	uint32_t purpose, step;
};

// struct mc_normal: y[r][c] = normal draw c of (token, image) = ids[2r], ids[2r+1].
struct mc_normal {
	int64_t m, c;
	struct mc_mat y;
	const int32_t *ids;
	struct mc_rng rng;
};

// struct mc_step: one reverse step, as engine.DiffusionStepArgs. coef_a, coef_b,
// min_log, max_log and last are engine.StepCoef's.
struct mc_step {
	int64_t n, c;
	struct mc_mat x, y, out, noise;
	const float *guidance;
	const int32_t *ids;
	struct mc_rng rng;
	double coef_a, coef_b, min_log, max_log;
	int last;
	float temperature;
};

// struct mc_patchify: image x [n, h, w, c] to tokens y and back.
struct mc_patchify {
	int64_t n, h, w, c, p;
	struct mc_mat x, y;
	int inverse;
};

// struct mc_categorical: a category for each of n rows of k logits, as
// engine.CategoricalArgs.
struct mc_categorical {
	int64_t n, k;
	struct mc_mat logits;
	const float *guidance;
	int32_t *y;
	float *log_prob;
	int64_t stride, top_k;
	float temperature, top_p;
	int inverse;
	const int32_t *ids;
	struct mc_rng rng;
};

struct mc_ops {
	mc_fn attention, norm, gated, rows, cast, conv, groupnorm;
};

int mc_attention_run(struct mc_attention *a, int nt);
int mc_norm_run(struct mc_norm *a, int nt);
int mc_gated_run(struct mc_gated *a, int nt);
int mc_rows_run(struct mc_rows *a, int nt);
int mc_cast_run(struct mc_cast *a, int nt);
int mc_conv_run(struct mc_conv *a, int nt);
int mc_groupnorm_run(struct mc_groupnorm *a, int nt);
int mc_embed_run(struct mc_embed *a, int nt);
int mc_normal_run(struct mc_normal *a, int nt);
int mc_step_run(struct mc_step *a, int nt);
int mc_patchify_run(struct mc_patchify *a, int nt);
int mc_categorical_run(struct mc_categorical *a, int nt);

// mc_philox runs Philox4x32-10 over the counter c; mc_uniform maps a word to (0,1).
void mc_philox(uint32_t c[4], uint64_t key);
double mc_uniform(uint32_t w);

// mc_step_rows is mc_step_run on tokens lo … hi-1, on the calling thread.
void mc_step_rows(const struct mc_step *a, int64_t lo, int64_t hi);

// mc_normals writes normal draws c0 … c0+c-1 of (rng, token, image) to y; c0 is
// a multiple of 4. The arithmetic is float64 rounded once, so the draws are the
// same on every instruction set.
void mc_normals(float *y, int64_t c0, int64_t c, const struct mc_rng *rng, int32_t token, int32_t image);

#endif
