// norm.cu: norm, LayerNorm with optional affine and modulation:
// y = ((x − mean)·rstd·weight + bias)·(1 + scale) + shift.
//
// Mapping. D ≤ 2048: one warp per row, which keeps the row in registers (N fours per
// lane, lane l owning columns 4(32i + l) …): x is read once, y written once. Blocks hold
// 1, 4 or 8 such warps, fewer for few rows so that all SMs work. D > 2048: one block of
// 256 threads per row, which reads x three times (the second and third from cache).
//
// Numerics: mean = Σx/D, then variance = Σ(x − mean)²/D, in f32: each lane sums its own
// elements in order, then a butterfly over the lanes (every lane gets the same bits), then the warps in
// order. The order depends on D alone, so a row's bits do not depend on the number of rows, on its
// place or on alignment (scalar loads feed the same lanes). 1/√ is exact sqrt and
// division.
//
// Shared memory: 32 bytes in the block kernel, none in the other. Bound by memory.
// ptxas (sm_80, sm_90): 128 registers for D = 2048, 76 for 1024, 64 for 768; no spills.
#include "act.cuh"
#include "plugin.h"
#include "reduce.cuh"

namespace {

struct Norm {
	const void *x;
	void *y;
	const float *weight, *bias, *scale, *shift; // or null
	int64_t ldx, ldy, lds, ldt, rows, mod_rows; // lds, ldt: of scale and shift
	int d;
	float eps;
};

// Affine holds the pointers of one row.
struct Affine {
	const float *weight, *bias, *scale, *shift;
	MARGO_DEVICE Affine(const Norm &p, int64_t r) : weight(p.weight), bias(p.bias), scale(p.scale), shift(p.shift) {
		int64_t g = scale || shift ? r / p.mod_rows : 0;
		if (scale) scale += g * p.lds;
		if (shift) shift += g * p.ldt;
	}
	template <bool VEC> MARGO_DEVICE void apply(float (&v)[4], int c, int d, float mean, float rstd) const {
		float t[4];
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] = (v[i] - mean) * rstd;
		if (weight) {
			load4<VEC>(t, weight + c, d - c);
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] *= t[i];
		}
		if (bias) {
			load4<VEC>(t, bias + c, d - c);
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] += t[i];
		}
		if (scale) {
			load4<VEC>(t, scale + c, d - c);
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] *= 1.0f + t[i];
		}
		if (shift) {
			load4<VEC>(t, shift + c, d - c);
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] += t[i];
		}
	}
};

// norm_warp_kernel: N·128 ≥ D.
template <class X, class Y, int N, bool VEC> __global__ void __launch_bounds__(256) norm_warp_kernel(Norm p) {
	int64_t r = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
	if (r >= p.rows) return; // the whole warp
	const X *x = static_cast<const X *>(p.x) + r * p.ldx;
	float v[N][4], sum = 0, square = 0;
#pragma unroll
	for (int j = 0; j < N; j++) {
		int c = 4 * (32 * j + int(threadIdx.x));
#pragma unroll
		for (int i = 0; i < 4; i++) v[j][i] = 0;
		if (c < p.d) load4<VEC>(v[j], x + c, p.d - c);
#pragma unroll
		for (int i = 0; i < 4; i++) sum += v[j][i];
	}
	float mean = warp_sum(sum) / float(p.d);
#pragma unroll
	for (int j = 0; j < N; j++) {
		int c = 4 * (32 * j + int(threadIdx.x));
#pragma unroll
		for (int i = 0; i < 4; i++) {
			float e = v[j][i] - mean;
			if (c + i < p.d) square = fmaf(e, e, square);
		}
	}
	float rstd = 1.0f / sqrtf(warp_sum(square) / float(p.d) + p.eps);
	Affine affine(p, r);
	Y *y = static_cast<Y *>(p.y) + r * p.ldy;
#pragma unroll
	for (int j = 0; j < N; j++) {
		int c = 4 * (32 * j + int(threadIdx.x));
		if (c >= p.d) break;
		affine.apply<VEC>(v[j], c, p.d, mean, rstd);
		store4<VEC>(y + c, v[j], p.d - c);
	}
}

constexpr int BLOCK = 256;
struct BlockSmem {
	float part[BLOCK / 32];
};

template <class X, class Y, bool VEC> __global__ void __launch_bounds__(BLOCK) norm_block_kernel(Norm p) {
	BlockSmem &s = gpu::smem<BlockSmem>();
	int64_t r = blockIdx.x;
	int t = int(threadIdx.x);
	const X *x = static_cast<const X *>(p.x) + r * p.ldx;
	float v[4], sum = 0, square = 0;
	for (int c = 4 * t; c < p.d; c += 4 * BLOCK) {
		load4<VEC>(v, x + c, p.d - c);
#pragma unroll
		for (int i = 0; i < 4; i++) sum += v[i];
	}
	float mean = block_sum<BLOCK / 32>(sum, s.part) / float(p.d);
	for (int c = 4 * t; c < p.d; c += 4 * BLOCK) {
		load4<VEC>(v, x + c, p.d - c);
#pragma unroll
		for (int i = 0; i < 4; i++) {
			float e = v[i] - mean;
			if (c + i < p.d) square = fmaf(e, e, square);
		}
	}
	float rstd = 1.0f / sqrtf(block_sum<BLOCK / 32>(square, s.part) / float(p.d) + p.eps);
	Affine affine(p, r);
	Y *y = static_cast<Y *>(p.y) + r * p.ldy;
	for (int c = 4 * t; c < p.d; c += 4 * BLOCK) {
		load4<VEC>(v, x + c, p.d - c);
		affine.apply<VEC>(v, c, p.d, mean, rstd);
		store4<VEC>(y + c, v, p.d - c);
	}
}

template <class X, class Y, bool VEC> margo_status launch_norm(margo_stream *st, const Norm &p) {
	if (p.d > 2048) return run(st, "norm_block", norm_block_kernel<X, Y, VEC>, dim3(unsigned(p.rows)), dim3(BLOCK), sizeof(BlockSmem), p);
	int sms = st->ctx->prop.multiProcessorCount;
	unsigned by = p.rows >= 8 * int64_t(sms) ? 8 : p.rows >= 2 * int64_t(sms) ? 4 : 1;
	dim3 grid(unsigned(ceil_div(p.rows, by))), block(32, by);
	switch (ceil_div(p.d, 128)) {
	case 0:
	case 1: return run(st, "norm_1", norm_warp_kernel<X, Y, 1, VEC>, grid, block, 0, p);
	case 2: return run(st, "norm_2", norm_warp_kernel<X, Y, 2, VEC>, grid, block, 0, p);
	case 3:
	case 4: return run(st, "norm_4", norm_warp_kernel<X, Y, 4, VEC>, grid, block, 0, p);
	case 5:
	case 6: return run(st, "norm_6", norm_warp_kernel<X, Y, 6, VEC>, grid, block, 0, p);
	case 7:
	case 8: return run(st, "norm_8", norm_warp_kernel<X, Y, 8, VEC>, grid, block, 0, p);
	case 9:
	case 10: return run(st, "norm_10", norm_warp_kernel<X, Y, 10, VEC>, grid, block, 0, p);
	case 11:
	case 12: return run(st, "norm_12", norm_warp_kernel<X, Y, 12, VEC>, grid, block, 0, p);
	default: return run(st, "norm_16", norm_warp_kernel<X, Y, 16, VEC>, grid, block, 0, p);
	}
}

} // namespace

margo_status op_norm(margo_stream *st, const margo_norm_args *a) {
	Norm p{ptr<void>(a->x), ptr<void>(a->y), ptr<float>(a->weight), ptr<float>(a->bias), ptr<float>(a->scale), ptr<float>(a->shift),
	       a->x.ld, a->y.ld, a->scale.ld, a->shift.ld, a->y.rows, a->mod_rows > 0 ? a->mod_rows : 1, int(a->y.cols), a->eps};
	auto fours = [](const margo_mat &m) { return m.p == 0 || aligned(m, m.dtype == MARGO_BF16 ? 8 : 16); };
	bool vec = p.d % 4 == 0 && fours(a->x) && fours(a->y) && fours(a->weight) && fours(a->bias) && fours(a->scale) && fours(a->shift);
	int kind = (a->x.dtype == MARGO_BF16) << 2 | (a->y.dtype == MARGO_BF16) << 1 | vec;
	switch (kind) {
	case 0: return launch_norm<float, float, false>(st, p);
	case 1: return launch_norm<float, float, true>(st, p);
	case 2: return launch_norm<float, bf16, false>(st, p);
	case 3: return launch_norm<float, bf16, true>(st, p);
	case 4: return launch_norm<bf16, float, false>(st, p);
	case 5: return launch_norm<bf16, float, true>(st, p);
	case 6: return launch_norm<bf16, bf16, false>(st, p);
	default: return launch_norm<bf16, bf16, true>(st, p);
	}
}
