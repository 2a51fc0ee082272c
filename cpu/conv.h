// conv.h: how a convolution is cut into work items, and a worker's scratch;
// shared by ops.c and conv.inc.h. None of it changes a result.
#ifndef MARGO_CPU_CONV_H
#define MARGO_CPU_CONV_H

#include "ops.h"

#define MC_CONV_TILE 84           // most pixels of a product: six blocks of the largest micro-kernel
#define MC_CONV_BAND (384 << 10)  // bytes of padded input that an item may take of L2

static inline int64_t mc_conv_size(const struct mc_conv *c) { return c->w_dtype == MC_BF16 ? 2 : 4; }

// mc_conv_in is the number of input rows that rows output rows need.
static inline int64_t mc_conv_in(const struct mc_conv *c, int64_t rows) { return (rows - 1) * c->stride + c->kernel; }

// mc_conv_band and mc_conv_col are the bytes of the padded input rows and of
// the im2col rows of an item.
static inline int64_t mc_conv_band(const struct mc_conv *c, int64_t rows) {
	return mc_ceil(mc_conv_in(c, rows) * c->wp * c->pitch * mc_conv_size(c), MC_LINE) * MC_LINE + MC_LINE;
}
static inline int64_t mc_conv_col(const struct mc_conv *c, int64_t rows) {
	return mc_ceil(rows * c->wo * c->col * mc_conv_size(c), MC_LINE) * MC_LINE;
}

// mc_conv_plan sets the fields after epi. A row of A, one output pixel, is what
// its taps see: for one ky the kernel·cin elements that follow each other in a
// padded row. They make one product, unless pixels have to be set apart to
// keep them out of the same sets of L1. Few channels, and an odd number in
// bf16 (whose pairs would be torn apart between two taps), are first brought
// together to whole rows of kernel²·cin.
static inline void mc_conv_plan(struct mc_conv *c, int nt) {
	int64_t es = mc_conv_size(c), k = c->kernel;
	c->wp = (c->wo - 1) * c->stride + k;
	c->pitch = c->cin;
	c->taps = k;
	c->col = 0;
	if (k > 1 && (c->cin < 8 || (c->w_dtype == MC_BF16 && c->cin % 2)))
		c->col = mc_ceil(k * k * c->cin, 2) * 2;
	else if (c->stride * c->cin * es % 2048 == 0) {
		c->pitch += MC_LINE / es;
		c->taps = 1;
	}
	c->rows = 1;
	while (c->rows < c->ho && mc_conv_band(c, c->rows + 1) + mc_conv_col(c, c->rows + 1) <= MC_CONV_BAND) c->rows++;
	c->bands = mc_ceil(c->ho, c->rows);
	c->rows = mc_ceil(c->ho, c->bands); // of equal height
	// Items for every worker: lower bands, as long as they have enough pixels
	// to pay for streaming the weights, then shares of the output channels.
	while (c->n * c->bands < 2 * nt && c->rows > 1 && c->rows * c->wo >= 128) {
		c->bands++;
		c->rows = mc_ceil(c->ho, c->bands);
	}
	c->bands = mc_ceil(c->ho, c->rows);
	int64_t panels = mc_ceil(c->cout, MC_NR);
	c->shares = nt > 1 ? mc_min(mc_ceil(panels, 2), mc_ceil(2 * nt, c->n * c->bands)) : 1;
}

static inline size_t mc_conv_scratch(const struct mc_conv *c) {
	return (size_t)(mc_conv_band(c, c->rows) + mc_conv_col(c, c->rows)) + MC_CONV_TILE * MC_NR * 4;
}

#endif
