// diffusion.cu: Philox normals and the reverse step of token-wise diffusion.
//
// Mapping: a thread owns four consecutive channels of a row, which is what one
// Philox block gives; a block of 256 threads covers bx fours times 256/bx rows. Numbers
// are read and written one by one where a row is not aligned, with the same bits.
// No shared memory. Bound by memory, but for normal: some 120 instructions per four draws.
// Coefficients come as doubles and are rounded to f32 once (the exp of the log variance
// stays f32: its argument differs per element).
// ptxas (sm_80, sm_90): at most 31 registers, no spills.
#include "act.cuh"
#include "plugin.h"
#include "rng.cuh"

namespace {

struct Grid {
	dim3 grid, block;
};

// over gives every four columns of every row a thread.
Grid over(int64_t rows, int64_t cols) {
	int64_t fours = ceil_div(cols, 4);
	unsigned bx = 1;
	while (bx < 256 && bx < fours) bx *= 2;
	unsigned by = 256 / bx;
	return {dim3(unsigned(rows <= 0 || cols <= 0 ? 0 : ceil_div(rows, by)), unsigned(fours > 0 ? ceil_div(fours, bx) : 1)), dim3(bx, by)};
}

MARGO_DEVICE Draw draw_of(const margo_rng &rng, const int32_t *ids, int64_t r) {
	return Draw{rng.seed, rng.purpose, rng.step, uint32_t(ids[2 * r]), uint32_t(ids[2 * r + 1])};
}

__global__ void __launch_bounds__(256) normal_kernel(float *y, int64_t ldy, int64_t rows, int64_t cols, const int32_t *ids, margo_rng rng) {
	int64_t r = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, c = 4 * (int64_t(blockIdx.y) * blockDim.x + threadIdx.x);
	if (r >= rows || c >= cols) return;
	float v[4];
	normal4(draw_of(rng, ids, r), uint32_t(c / 4), v);
	store4<false>(y + r * ldy + c, v, cols - c);
}

struct Step {
	const float *x, *out, *guidance, *noise; // guidance, noise: or null
	float *y;
	const int32_t *ids;
	int64_t ldx, ldy, ldo, ldn, n, ch;
	margo_rng rng;
	float a, b, min_log, max_log, temperature;
	int last;
};

template <bool VEC> __global__ void __launch_bounds__(256) diffusion_step_kernel(Step p) {
	int64_t r = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, c = 4 * (int64_t(blockIdx.y) * blockDim.x + threadIdx.x);
	if (r >= p.n || c >= p.ch) return;
	int64_t left = p.ch - c;
	float x[4], eps[4], v[4] = {}, noise[4] = {};
	load4<VEC>(x, p.x + r * p.ldx + c, left);
	load4<VEC>(eps, p.out + r * p.ldo + c, left);
	if (p.guidance) {
		float s = p.guidance[r], uncond[4];
		load4<VEC>(uncond, p.out + (p.n + r) * p.ldo + c, left);
#pragma unroll
		for (int i = 0; i < 4; i++) eps[i] = fmaf(s, eps[i] - uncond[i], uncond[i]);
	}
	if (p.noise) load4<VEC>(noise, p.noise + r * p.ldn + c, left);
	else if (!p.last) normal4(draw_of(p.rng, p.ids, r), uint32_t(c / 4), noise);
	if (!p.last) load4<VEC>(v, p.out + r * p.ldo + p.ch + c, left);
#pragma unroll
	for (int i = 0; i < 4; i++) {
		float y = p.a * x[i] - p.b * eps[i];
		if (!p.last) {
			float f = (v[i] + 1.0f) * 0.5f, logvar = f * p.max_log + (1.0f - f) * p.min_log;
			y += expf(0.5f * logvar) * p.temperature * noise[i];
		}
		x[i] = y;
	}
	store4<VEC>(p.y + r * p.ldy + c, x, left);
}

} // namespace

margo_status op_normal(margo_stream *st, const margo_normal_args *a) {
	Grid g = over(a->y.rows, a->y.cols);
	return run(st, "normal", normal_kernel, g.grid, g.block, 0, ptr<float>(a->y), a->y.ld, a->y.rows, a->y.cols, ptr<const int32_t>(a->ids), a->rng);
}

margo_status op_diffusion_step(margo_stream *st, const margo_diffusion_step_args *a) {
	Grid g = over(a->y.rows, a->y.cols);
	Step p{ptr<float>(a->x), ptr<float>(a->out), ptr<float>(a->guidance), ptr<float>(a->noise), ptr<float>(a->y), ptr<int32_t>(a->ids), a->x.ld, a->y.ld, a->out.ld,
	       a->noise.ld, a->y.rows, a->y.cols, a->rng, float(a->coef.a), float(a->coef.b), float(a->coef.min_log), float(a->coef.max_log), a->temperature, a->coef.last};
	bool vec = a->y.cols % 4 == 0 && aligned(a->x, 16) && aligned(a->y, 16) && aligned(a->out, 16) && (!a->noise.p || aligned(a->noise, 16));
	return run(st, "diffusion_step", vec ? diffusion_step_kernel<true> : diffusion_step_kernel<false>, g.grid, g.block, 0, p);
}
