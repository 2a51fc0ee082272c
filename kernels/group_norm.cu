// group_norm.cu: GroupNorm over NHWC images, y = act((x − mean)·rstd·weight + bias), with
// mean and variance per image and group of consecutive channels.
//
// Three kernels, each over blocks of a fixed chunk of one image's pixels, all channels:
//   1. group_sum: Σx per group of the chunk            → workspace [image][group][chunk]
//   2. group_square: means from 1, Σ(x − mean)² likewise
//   3. group_apply: means and variances from 1 and 2, normalise, activate.
// Kernels 2 and 3 add the chunks of an image by themselves (at most 256 numbers per group, a warp
// per group), always in the same order: no atomics, and what an image gives does not
// depend on the others. x is read three times; what fits the L2 cache comes from there.
//
// Mapping: 256 threads; thread t owns the four channels 4q …, q = t mod ⌈C/4⌉, of every
// L-th pixel of the chunk (L = ⌊256/⌈C/4⌉⌋), and with more than 1024 channels several q. It adds
// per channel; then a warp adds the group's channels and pixel lanes: lane by lane, then a butterfly.
// Loads are 16 bytes where aligned, else single elements in the same threads.
//
// Shared memory: L·4⌈C/4⌉ + 2·groups floats. Workspace: 2·images·groups·chunks floats.
// ptxas (sm_80, sm_90): at most 62 registers, no spills.
#include "act.cuh"
#include "plugin.h"
#include "reduce.cuh"

namespace {

constexpr int THREADS = 256;

struct GroupNorm {
	const void *x;
	void *y;
	const float *weight, *bias; // or null
	float *sums, *squares;      // [images][groups][chunks]
	int64_t ldx, ldy, pixels;
	int ch, groups, chunks, chunk, act; // chunk: pixels of one
	float eps;
};

// Place is a thread's share of a chunk.
struct Place {
	int quads, lanes, lane, quad, step; // step: between the quads of a thread
	MARGO_DEVICE explicit Place(int ch) {
		quads = (ch + 3) / 4;
		lanes = quads < THREADS ? THREADS / quads : 1;
		lane = quads < THREADS ? int(threadIdx.x) / quads : 0;
		quad = quads < THREADS ? int(threadIdx.x) % quads : int(threadIdx.x);
		step = quads < THREADS ? quads : THREADS;
	}
};

// total adds the chunks of one group of this block's image: a whole warp calls it.
MARGO_DEVICE float total(const float *part, const GroupNorm &p, int g) {
	const float *from = part + (int64_t(blockIdx.y) * p.groups + g) * p.chunks;
	float sum = 0;
	for (int i = int(threadIdx.x) % 32; i < p.chunks; i += 32) sum += from[i];
	return warp_sum(sum);
}

// group_part_kernel computes Σx, or Σ(x − mean)² with SQUARE, of a chunk.
template <class X, bool VEC, bool SQUARE> __global__ void __launch_bounds__(THREADS, 4) group_part_kernel(GroupNorm p) {
	float *mean = &gpu::smem<float>(), *acc = mean + p.groups;
	int warp = int(threadIdx.x) / 32, per = p.ch / p.groups;
	float count = float(p.pixels * per);
	if (SQUARE) {
		for (int g = warp; g < p.groups; g += THREADS / 32) {
			float m = total(p.sums, p, g) / count;
			if (threadIdx.x % 32 == 0) mean[g] = m;
		}
		__syncthreads();
	}
	Place at(p.ch);
	int width = at.quads * 4;
	int64_t first = int64_t(blockIdx.x) * p.chunk, end = first + p.chunk < p.pixels ? first + p.chunk : p.pixels;
	const X *x = static_cast<const X *>(p.x) + int64_t(blockIdx.y) * p.pixels * p.ldx;
	for (int q = at.quad; q < at.quads && at.lane < at.lanes; q += at.step) {
		int c = 4 * q;
		float v[4], m[4] = {}, sum[4] = {};
		if (SQUARE)
			for (int i = 0; i < 4; i++)
				if (c + i < p.ch) m[i] = mean[(c + i) / per];
		for (int64_t row = first + at.lane; row < end; row += at.lanes) {
			load4<VEC>(v, x + row * p.ldx + c, p.ch - c);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				float e = v[i] - m[i];
				sum[i] = SQUARE ? fmaf(e, e, sum[i]) : sum[i] + v[i];
			}
		}
#pragma unroll
		for (int i = 0; i < 4; i++) acc[at.lane * width + c + i] = sum[i];
	}
	__syncthreads();
	for (int g = warp; g < p.groups; g += THREADS / 32) {
		float sum = 0;
		for (int i = int(threadIdx.x) % 32; i < per * at.lanes; i += 32) sum += acc[i / per * width + g * per + i % per];
		sum = warp_sum(sum);
		if (threadIdx.x % 32 == 0) (SQUARE ? p.squares : p.sums)[(int64_t(blockIdx.y) * p.groups + g) * p.chunks + blockIdx.x] = sum;
	}
}

template <class X, class Y, bool VEC> __global__ void __launch_bounds__(THREADS, 4) group_apply_kernel(GroupNorm p) {
	float *mean = &gpu::smem<float>(), *rstd = mean + p.groups;
	int per = p.ch / p.groups;
	float count = float(p.pixels * per);
	for (int g = int(threadIdx.x) / 32; g < p.groups; g += THREADS / 32) {
		float m = total(p.sums, p, g) / count, r = 1.0f / sqrtf(total(p.squares, p, g) / count + p.eps);
		if (threadIdx.x % 32 == 0) mean[g] = m, rstd[g] = r;
	}
	__syncthreads();
	Place at(p.ch);
	int64_t first = int64_t(blockIdx.x) * p.chunk, end = first + p.chunk < p.pixels ? first + p.chunk : p.pixels;
	const X *x = static_cast<const X *>(p.x) + int64_t(blockIdx.y) * p.pixels * p.ldx;
	Y *y = static_cast<Y *>(p.y) + int64_t(blockIdx.y) * p.pixels * p.ldy;
	for (int q = at.quad; q < at.quads && at.lane < at.lanes; q += at.step) {
		int c = 4 * q;
		float v[4], m[4] = {}, r[4] = {}, w[4], b[4];
		for (int i = 0; i < 4; i++) {
			w[i] = 1, b[i] = 0;
			if (c + i < p.ch) m[i] = mean[(c + i) / per], r[i] = rstd[(c + i) / per];
		}
		if (p.weight) load4<VEC>(w, p.weight + c, p.ch - c);
		if (p.bias) load4<VEC>(b, p.bias + c, p.ch - c);
		for (int64_t row = first + at.lane; row < end; row += at.lanes) {
			load4<VEC>(v, x + row * p.ldx + c, p.ch - c);
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] = activate(p.act, fmaf((v[i] - m[i]) * r[i], w[i], b[i]));
			store4<VEC>(y + row * p.ldy + c, v, p.ch - c);
		}
	}
}

// geometry sets the chunks: at most 256 of at least 64 pixels, whatever the number of images.
void geometry(GroupNorm &p) {
	int64_t chunk = ceil_div(p.pixels, 256);
	p.chunk = int(chunk < 64 ? 64 : chunk);
	p.chunks = int(ceil_div(p.pixels, p.chunk));
}

template <class X, class Y, bool VEC> margo_status launch_group_norm(margo_stream *st, const GroupNorm &p, int64_t images) {
	dim3 grid(unsigned(images > 0 ? p.chunks : 0), unsigned(images)), block(THREADS);
	int64_t quads = ceil_div(p.ch, 4), lanes = quads < THREADS ? THREADS / quads : 1;
	size_t smem = size_t(p.groups + lanes * quads * 4) * 4;
	MARGO_TRY(run(st, "group_sum", group_part_kernel<X, VEC, false>, grid, block, smem, p));
	MARGO_TRY(run(st, "group_square", group_part_kernel<X, VEC, true>, grid, block, smem, p));
	return run(st, "group_apply", group_apply_kernel<X, Y, VEC>, grid, block, size_t(p.groups) * 8, p);
}

} // namespace

margo_status op_group_norm_workspace(margo_context *, const margo_group_norm_args *a, uint64_t *bytes) {
	GroupNorm p{};
	p.pixels = a->pixels;
	geometry(p);
	*bytes = uint64_t(2 * a->n * a->groups * p.chunks) * 4;
	return MARGO_OK;
}

margo_status op_group_norm(margo_stream *st, const margo_group_norm_args *a) {
	GroupNorm p{ptr<void>(a->x), ptr<void>(a->y), ptr<float>(a->weight), ptr<float>(a->bias), nullptr, nullptr, a->x.ld, a->y.ld, a->pixels,
	            int(a->y.cols), a->groups, 0, 0, a->act, a->eps};
	geometry(p);
	uint64_t need = 0;
	MARGO_TRY(op_group_norm_workspace(st->ctx, a, &need));
	if (a->workspace_bytes < need)
		return fail(st->ctx, MARGO_INVALID, "group_norm: workspace of %llu bytes, want %llu", (unsigned long long)a->workspace_bytes, (unsigned long long)need);
	if (a->n > 65535) return fail(st->ctx, MARGO_UNSUPPORTED, "group_norm: %lld images, at most 65535", (long long)a->n);
	p.sums = reinterpret_cast<float *>(static_cast<uintptr_t>(a->workspace));
	p.squares = p.sums + a->n * a->groups * p.chunks;
	auto fours = [](const margo_mat &m) { return m.p == 0 || aligned(m, m.dtype == MARGO_BF16 ? 8 : 16); };
	bool vec = p.ch % 4 == 0 && fours(a->x) && fours(a->y) && fours(a->weight) && fours(a->bias);
	switch ((a->x.dtype == MARGO_BF16) << 2 | (a->y.dtype == MARGO_BF16) << 1 | int(vec)) {
	case 0: return launch_group_norm<float, float, false>(st, p, a->n);
	case 1: return launch_group_norm<float, float, true>(st, p, a->n);
	case 2: return launch_group_norm<float, bf16, false>(st, p, a->n);
	case 3: return launch_group_norm<float, bf16, true>(st, p, a->n);
	case 4: return launch_group_norm<bf16, float, false>(st, p, a->n);
	case 5: return launch_group_norm<bf16, float, true>(st, p, a->n);
	case 6: return launch_group_norm<bf16, bf16, false>(st, p, a->n);
	default: return launch_group_norm<bf16, bf16, true>(st, p, a->n);
	}
}
