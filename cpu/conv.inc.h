// conv.inc.h: NHWC convolution as panel products. A worker copies the input
// rows under a band of output rows into scratch, padded, doubled if asked, and
// in the dtype of the weights; then it multiplies runs of output pixels with
// one panel of 32 output channels after the other. The sum of an output runs
// over (ky, kx, cin) in order.

// conv_move copies n elements with conversion; of none, src may be NULL.
V_INLINE void conv_move(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n) {
	if (n == 0) return;
	if (dst_dtype == src_dtype) memcpy(dst, src, (size_t)(n * (dst_dtype == MC_BF16 ? 2 : 4)));
	else if (dst_dtype == MC_BF16) to_bf16(dst, src, n);
	else to_f32(dst, src, n);
}

// conv_fill brings the input rows of output rows oy … of an image into band.
static void conv_fill(const struct mc_conv *c, int64_t image, int64_t oy, int64_t rows, char *band) {
	int64_t es = mc_conv_size(c), line = c->wp * c->pitch * es, w2 = c->w << c->up;
	for (int64_t i = 0; i < mc_conv_in(c, rows); i++, band += line) {
		int64_t y = oy * c->stride + i - c->pad_top;
		if (y < 0 || y >= c->h << c->up) {
			memset(band, 0, (size_t)line);
			continue;
		}
		// Pixels lo … hi-1 of the padded row have a source.
		int64_t lo = mc_min(c->pad_left, c->wp), hi = mc_min(c->pad_left + w2, c->wp);
		const char *src = row(&c->x, (image * c->h + (y >> c->up)) * c->w);
		int64_t ss = c->x.ld * (c->x.dtype == MC_BF16 ? 2 : 4);
		memset(band, 0, (size_t)(lo * c->pitch * es));
		memset(band + hi * c->pitch * es, 0, (size_t)((c->wp - hi) * c->pitch * es));
		if (!c->up && c->pitch == c->cin && c->x.ld == c->cin)
			conv_move(band + lo * c->pitch * es, c->w_dtype, src, c->x.dtype, (hi - lo) * c->cin);
		else
			for (int64_t x = lo; x < hi; x++)
				conv_move(band + x * c->pitch * es, c->w_dtype, src + ((x - c->pad_left) >> c->up) * ss, c->x.dtype, c->cin);
	}
}

// conv_gather makes im2col rows of rows output rows from band.
static void conv_gather(const struct mc_conv *c, int64_t rows, const char *band, char *col) {
	int64_t es = mc_conv_size(c), pixel = c->pitch * es, seg = c->kernel * pixel;
	for (int64_t r = 0; r < rows; r++)
		for (int64_t x = 0; x < c->wo; x++, col += c->col * es) {
			const char *src = band + (r * c->wp + x) * c->stride * pixel;
			for (int64_t ky = 0; ky < c->kernel; ky++) memcpy(col + ky * seg, src + ky * c->wp * pixel, (size_t)seg);
		}
}

// conv_product multiplies k columns of m pixels with rows kk … of a panel.
V_INLINE void conv_product(const struct mc_conv *c, int64_t m, int64_t k, const char *a, int64_t lda, const char *panel,
                           int64_t kk, float *tile, int add) {
	if (c->w_dtype == MC_BF16)
		mul_bf16(m, k, (const mc_bf16 *)a, lda, (const uint32_t *)panel + kk / 2 * MC_NR, MC_NR, tile, MC_NR, add);
	else
		mul_f32(m, k, (const float *)a, lda, (const float *)panel + kk * MC_NR, MC_NR, tile, MC_NR, add);
}

// conv_run computes panel p of output pixels x … x+m-1 of row r of the band.
static void conv_run(const struct mc_conv *c, int64_t p, int64_t r, int64_t x, int64_t m, const char *band,
                     const char *col, float *tile) {
	int64_t es = mc_conv_size(c), k = c->kernel, step = c->taps * c->cin;
	const char *panel = (const char *)c->weight + p * mc_panel_bytes(c->w_dtype, k * k * c->cin);
	if (c->col) {
		conv_product(c, m, k * k * c->cin, col + (r * c->wo + x) * c->col * es, c->col, panel, 0, tile, 0);
		return;
	}
	for (int64_t ky = 0; ky < k; ky++)
		for (int64_t kx = 0; kx < k; kx += c->taps) {
			const char *a = band + (((r * c->stride + ky) * c->wp + x * c->stride + kx) * c->pitch) * es;
			conv_product(c, m, step, a, c->stride * c->pitch, panel, (ky * k + kx) * c->cin, tile, ky + kx > 0);
		}
}

static void conv(struct mc_worker *w, void *ctx) {
	const struct mc_conv *c = ctx;
	char *band = w->scratch, *col = band + mc_conv_band(c, c->rows);
	float *tile = (float *)(col + mc_conv_col(c, c->rows));
	int64_t panels = mc_ceil(c->cout, MC_NR), runs = mc_ceil(c->wo, MC_CONV_TILE), filled = -1;
	for (int64_t t = mc_take(w); t < c->n * c->bands * c->shares; t = mc_take(w)) {
		int64_t b = t / c->shares, share = t % c->shares, image = b / c->bands;
		int64_t oy = b % c->bands * c->rows, rows = mc_min(c->rows, c->ho - oy);
		if (b != filled) {
			conv_fill(c, image, oy, rows, band);
			if (c->col) conv_gather(c, rows, band, col);
			filled = b;
		}
		for (int64_t p = panels * share / c->shares; p < panels * (share + 1) / c->shares; p++)
			for (int64_t r = 0; r < rows; r++)
				for (int64_t i = 0; i < runs; i++) {
					int64_t x = c->wo * i / runs, m = c->wo * (i + 1) / runs - x;
					conv_run(c, p, r, x, m, band, col, tile);
					epilogue(&c->epi, (image * c->ho + oy + r) * c->wo + x, p * MC_NR, m,
					         mc_min(MC_NR, c->cout - p * MC_NR), tile, MC_NR);
				}
	}
}
