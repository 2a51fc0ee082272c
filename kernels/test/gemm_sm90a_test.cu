// gemm_sm90a_test.cu: checks and times the Hopper GEMM, every tile, against a plain kernel that adds
// exact products in f64, and reports whether mma.sync gives the same bits. For each shape a line: errors over their limit
// (check_result), and TFLOP/s of the chosen tile and of the mma.sync path. `make gpu-tests` builds it. With the argument
// `small` a few small shapes and no times: the emulator's (MARGO_EMU_CC=90).
#include <cmath>
#include <vector>

#include "../gemm.cuh"
#include "../gemm_sm90a.cuh"
#include "test.h"

namespace {

constexpr unsigned kBlocks = gpu::emulated ? 4 : 1024; // of fills

__global__ void fill_bf16(bf16 *p, int64_t n, uint32_t seed, float scale) {
	for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
		uint32_t w = philox(uint32_t(i), uint32_t(i >> 32), 0, 0, seed).w[0];
		p[i] = to_bf16((float(w >> 8) * 0x1p-23f - 1.0f) * scale);
	}
}
__global__ void fill_f32(float *p, int64_t n, uint32_t seed) {
	for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
		p[i] = float(philox(uint32_t(i), uint32_t(i >> 32), 0, 0, seed).w[0] >> 8) * 0x1p-23f - 1.0f;
}

struct Reference { // of pseudo-random elements: the whole of a large product would take long
	const bf16 *x, *w;
	const float *bias, *gate, *residual;
	int64_t m, n, k, ldx, ldw, ldg, gate_rows, ldr, ldy;
	int act, y_bf16;
};
// check compares 2^17 elements (or all): worst[0] error over its limit, worst[1] elements that were not written (NaN).
__global__ void check_result(Reference r, const void *y, int64_t count, float *worst) {
	for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
		int64_t e = count == r.m * r.n ? i : int64_t((uint64_t(philox(uint32_t(i), 0, 0, 0, 99).w[0]) << 32 | philox(uint32_t(i), 0, 0, 0, 99).w[1]) % uint64_t(r.m * r.n));
		int64_t row = e / r.n, col = e % r.n;
		double sum = 0, size = 0;
		for (int64_t k = 0; k < r.k; k++) {
			double v = double(to_f32(r.x[row * r.ldx + k])) * double(to_f32(r.w[col * r.ldw + k]));
			sum += v, size += fabs(v);
		}
		float pre = float(sum) + (r.bias ? r.bias[col] : 0.0f), v = activate(r.act, pre);
		if (r.gate) v *= r.gate[row / r.gate_rows * r.ldg + col];
		if (r.residual) v += r.residual[row * r.ldr + col];
		float got = r.y_bf16 ? to_f32(static_cast<const bf16 *>(y)[row * r.ldy + col]) : static_cast<const float *>(y)[row * r.ldy + col];
		// Chains of truncating adds, f32 functions, rounding of the output.
		float limit = float(size) * float(r.k / 8 + 4) * 0x1p-23f + 4e-7f * (1 + fabsf(pre)) + (r.y_bf16 ? fabsf(v) * 0x1p-8f : fabsf(v) * 0x1p-22f);
		float ratio = fabsf(got - v) / limit;
		if (!(ratio <= 1e30f)) ratio = 1e30f;
		atomicMax(reinterpret_cast<int *>(worst), __float_as_int(ratio));
	}
}
__global__ void count_different(const uint16_t *a, const uint16_t *b, int64_t n, unsigned long long *count) {
	for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
		if (a[i] != b[i]) atomicAdd(count, 1ull);
}

template <class T> T *device(int64_t n) {
	void *p = nullptr;
	must(cudaMalloc(&p, size_t(n) * sizeof(T) + 256), "cudaMalloc");
	return static_cast<T *>(p);
}
margo_mat matrix(const void *p, int64_t rows, int64_t cols, int64_t ld, int dtype) { return {reinterpret_cast<uintptr_t>(p), rows, cols, ld, dtype, 0}; }

struct Shape {
	int64_t m, n, k;
	int act, gate, residual, y_bf16;
	int64_t pad; // extra elements at the end of rows
};

void run_shape(margo_stream *st, const Shape &s, bool time_it) {
	if (broken) return;
	int64_t ldx = (s.k + 7) / 8 * 8 + s.pad / 8 * 8, ldy = s.n + s.pad, ldg = s.n + s.pad, gate_rows = 7, gates = (s.m + gate_rows - 1) / gate_rows;
	bf16 *x = device<bf16>(s.m * ldx), *w = device<bf16>(s.n * ldx);
	float *bias = device<float>(s.n), *gate = device<float>(gates * ldg), *residual = device<float>(s.m * ldy);
	size_t bytes = size_t(s.m * ldy) * (s.y_bf16 ? 2 : 4);
	char *y = device<char>(int64_t(bytes)), *z = device<char>(int64_t(bytes));
	float *worst = device<float>(2);
	auto *different = device<unsigned long long>(1);
	must(gpu::launch(fill_bf16, dim3(kBlocks), dim3(256), 0, st->s, x, s.m * ldx, 1, 1.0f), "fill_bf16");
	must(gpu::launch(fill_bf16, dim3(kBlocks), dim3(256), 0, st->s, w, s.n * ldx, 2, 0.05f), "fill_bf16");
	must(gpu::launch(fill_f32, dim3(kBlocks / 2), dim3(256), 0, st->s, bias, s.n, 3), "fill_f32");
	must(gpu::launch(fill_f32, dim3(kBlocks / 2), dim3(256), 0, st->s, gate, gates * ldg, 4), "fill_f32");
	must(gpu::launch(fill_f32, dim3(kBlocks), dim3(256), 0, st->s, residual, s.m * ldy, 5), "fill_f32");
	margo_gemm_args a{};
	a.size = sizeof a, a.act = s.act, a.gate_rows = gate_rows;
	a.x = matrix(x, s.m, s.k, ldx, MARGO_BF16), a.w = matrix(w, s.n, s.k, ldx, MARGO_BF16), a.bias = matrix(bias, 1, s.n, s.n, MARGO_F32);
	if (s.gate) a.gate = matrix(gate, gates, s.n, ldg, MARGO_F32);
	if (s.residual) a.residual = matrix(residual, s.m, s.n, ldy, MARGO_F32);
	a.y = matrix(y, s.m, s.n, ldy, s.y_bf16 ? MARGO_BF16 : MARGO_F32);
	Reference r{x, w, bias, s.gate ? gate : nullptr, s.residual ? residual : nullptr, s.m, s.n, s.k, ldx, ldx, ldg, gate_rows, ldy, ldy, s.act, s.y_bf16};
	int64_t count = s.m * s.n < 1 << 17 ? s.m * s.n : 1 << 17;

	printf("%6ld %5ld %5ld act %d gate %d res %d %s pad %ld:", long(s.m), long(s.n), long(s.k), s.act, s.gate, s.residual, s.y_bf16 ? "bf16" : "f32 ", long(s.pad));
	auto once = [&](int tile) { return tile < kSm90Tiles ? gemm_sm90a(st, &a, tile) : gemm_mma(st, &a); };
	auto differs = [&](const char *other) {
		unsigned long long n = 0;
		cudaMemsetAsync(different, 0, 8, st->s);
		must(gpu::launch(count_different, dim3(kBlocks), dim3(256), 0, st->s, reinterpret_cast<uint16_t *>(y), reinterpret_cast<const uint16_t *>(other), int64_t(bytes / 2), different), "count_different");
		must(cudaMemcpyAsync(&n, different, 8, cudaMemcpyDeviceToHost, st->s), "copy");
		must(cudaStreamSynchronize(st->s), "comparison");
		return n;
	};
	for (int tile = 0; tile <= kSm90Tiles && !broken; tile++) { // the last: mma.sync
		cudaMemsetAsync(y, 0xff, bytes, st->s);
		cudaMemsetAsync(worst, 0, 8, st->s);
		margo_status status = once(tile);
		if (status != MARGO_OK) {
			printf(" tile %d: status %d %s\n", tile, status, st->ctx->error.c_str()), failures++;
			return;
		}
		must(gpu::launch(check_result, dim3(kBlocks / 2), dim3(256), 0, st->s, r, y, count, worst), "check_result");
		float ratio = 0;
		must(cudaMemcpyAsync(&ratio, worst, 4, cudaMemcpyDeviceToHost, st->s), "copy");
		must(cudaStreamSynchronize(st->s), "the kernel");
		const char *name = tile == kSm90Tiles ? "mma" : "";
		printf(" %s%.2g", name, double(ratio));
		if (!(ratio <= 1)) printf(" WRONG"), failures++;
		if (tile == 0)
			cudaMemcpyAsync(z, y, bytes, cudaMemcpyDeviceToDevice, st->s);
		else if (unsigned long long n = differs(z)) {
			if (tile < kSm90Tiles) printf(" TILE %d DIFFERS in %llu", tile, n), failures++;
			else printf(" (%llu words differ from wgmma)", n);
		}
	}
	if (time_it && !broken) {
		for (int tile = -1; tile <= kSm90Tiles; tile++) {
			double us = microseconds(st, 20, [&] { once(tile); });
			printf(" | %s%.1f us %.0f TF", tile < 0 ? "chosen " : tile == kSm90Tiles ? "mma " : "", us, 2.0 * double(s.m) * double(s.n) * double(s.k) / us * 1e-6);
		}
	}
	printf("\n");
	fflush(stdout);
	for (void *p : {static_cast<void *>(x), static_cast<void *>(w), static_cast<void *>(bias), static_cast<void *>(gate), static_cast<void *>(residual), static_cast<void *>(y),
	                static_cast<void *>(z), static_cast<void *>(worst), static_cast<void *>(different)})
		cudaFree(p);
}

} // namespace

int main(int argc, char **argv) {
	margo_stream *st = open_stream();
	if (not_hopper(st)) return kLeftOut;
	printf("Columns: error over limit of tiles 128x256, 128x128, 64x128, 64x64, 64x32, mma.sync; times in the same order\n");
	if (small(argc, argv)) {
		for (const Shape &s : {Shape{64, 32, 16, 0, 0, 0, 0, 0}, {1, 1, 8, 0, 0, 0, 0, 0}, {37, 100, 72, 3, 1, 0, 1, 4}, {130, 140, 203, 1, 0, 1, 0, 16}}) run_shape(st, s, false);
		return verdict();
	}
	const Shape shapes[] = {
	    {128, 256, 64, 0, 0, 0, 0, 0},   {64, 32, 16, 0, 0, 0, 0, 0},      {1, 1, 8, 0, 0, 0, 0, 0},        {300, 333, 72, 1, 1, 1, 0, 3},
	    {129, 257, 1032, 2, 0, 1, 0, 8}, {37, 100, 768, 3, 1, 0, 1, 4},    {513, 1021, 203, 1, 0, 0, 1, 1}, {1000, 2000, 520, 3, 1, 1, 0, 0},
	    {200, 40, 7, 0, 0, 1, 0, 16},    {640, 768, 3072, 0, 1, 1, 0, 0},  {14, 1024, 1024, 3, 0, 0, 1, 0}, {5000, 260, 4096, 1, 0, 1, 1, 4},
	};
	for (const Shape &s : shapes) run_shape(st, s, false);
	const Shape timed[] = {
	    {8192, 8192, 8192, 0, 0, 0, 1, 0}, {40960, 3072, 768, 1, 0, 0, 1, 0}, {40960, 768, 3072, 0, 0, 1, 0, 0}, {40960, 2304, 768, 0, 0, 0, 1, 0},
	    {40960, 768, 768, 0, 0, 1, 0, 0},  {640, 3072, 768, 1, 0, 0, 1, 0},   {640, 768, 3072, 0, 0, 1, 0, 0},   {640, 768, 768, 0, 0, 1, 0, 0},
	    {14, 1024, 1024, 3, 0, 0, 1, 0},   {512, 1024, 1024, 3, 0, 0, 1, 0},  {2048, 1024, 1024, 0, 1, 1, 0, 0}, {12800, 20480, 1024, 0, 0, 0, 0, 0},
	};
	for (const Shape &s : timed) run_shape(st, s, true);
	return verdict();
}
