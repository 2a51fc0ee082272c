// attention_sm90a_test.cu: checks and times Hopper's attention against mma.sync, which the table has checked there: blocks of 64 and
// of more queries must have the same bits, and are to differ from mma.sync by no more than roundings of the output. For each shape a line:
// elements that differ, the largest difference over the largest value, TFLOP/s of the chosen blocks, those of 64, of more, and of mma.sync.
// `make gpu-tests` builds it. With the argument `small` a few small shapes and no times: the emulator's (MARGO_EMU_CC=90).
#include <cmath>
#include <vector>

#include "../attention_sm90a.cuh"
#include "test.h"

extern template margo_status attention_bf16<false>(margo_stream *, const Attention &, const margo_attention_args *);

namespace {

constexpr unsigned kBlocks = gpu::emulated ? 4 : 1024; // of fills

__global__ void fill(bf16 *p, int64_t n, uint32_t seed, float scale) {
	for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
		p[i] = to_bf16((float(philox(uint32_t(i), uint32_t(i >> 32), 0, 0, seed).w[0] >> 8) * 0x1p-23f - 1.0f) * scale);
}

double value(bf16 v) { // on the host
	uint32_t u = uint32_t(v.bits) << 16;
	float f;
	memcpy(&f, &u, sizeof f);
	return double(f);
}

struct Shape {
	int seqs, queries, keys, heads, dh, causal, ragged; // ragged: sequence i has i % 3 quarters less
};

void run_shape(margo_stream *st, const Shape &s, bool time_it) {
	if (broken) return;
	std::vector<int32_t> qoff{0}, koff{0};
	double flops = 0;
	for (int i = 0; i < s.seqs; i++) {
		int q = s.ragged ? s.queries - i % 3 * s.queries / 4 : s.queries, k = s.ragged ? s.keys - i % 3 * s.keys / 4 : s.keys;
		qoff.push_back(qoff.back() + q), koff.push_back(koff.back() + k);
		flops += 4.0 * q * k * s.heads * s.dh / (s.causal ? 2 : 1);
	}
	const int64_t width = int64_t(s.heads) * s.dh, rq = qoff.back(), rk = koff.back();
	auto device = [&](int64_t bytes) {
		void *p = nullptr;
		must(cudaMalloc(&p, size_t(bytes)), "cudaMalloc");
		return p;
	};
	auto *q = static_cast<bf16 *>(device(rq * width * 2)), *kv = static_cast<bf16 *>(device(rk * width * 4)), *o = static_cast<bf16 *>(device(rq * width * 2));
	void *qo = device(int64_t(qoff.size()) * 4), *ko = device(int64_t(koff.size()) * 4);
	must(cudaMemcpy(qo, qoff.data(), qoff.size() * 4, cudaMemcpyHostToDevice), "copy");
	must(cudaMemcpy(ko, koff.data(), koff.size() * 4, cudaMemcpyHostToDevice), "copy");
	must(gpu::launch(fill, dim3(kBlocks), dim3(256), 0, st->s, q, rq * width, 1, 3.0f), "fill");
	must(gpu::launch(fill, dim3(kBlocks), dim3(256), 0, st->s, kv, rk * width * 2, 2, 3.0f), "fill");
	auto matrix = [](const void *p, int64_t rows, int64_t cols, int64_t ld, int dtype) { return margo_mat{reinterpret_cast<uintptr_t>(p), rows, cols, ld, dtype, 0}; };
	margo_attention_args a{};
	a.size = sizeof a, a.causal = s.causal, a.seqs = s.seqs, a.heads = s.heads, a.max_q = s.queries, a.max_k = s.keys, a.scale = 1 / sqrtf(float(s.dh));
	a.q = matrix(q, rq, width, width, MARGO_BF16), a.o = matrix(o, rq, width, width, MARGO_BF16);
	a.k = matrix(kv, rk, width, 2 * width, MARGO_BF16), a.v = matrix(kv + width, rk, width, 2 * width, MARGO_BF16);
	Attention p{q, kv, kv + width, o, static_cast<int32_t *>(qo), static_cast<int32_t *>(ko), int(width), int(2 * width), int(2 * width), int(width), s.dh, s.causal, a.scale,
	            nullptr, 0, 0, 0, nullptr};
	if (!attention_sm90a_serves(st->ctx, p, &a)) {
		printf("FAIL: not served\n"), failures++;
		return;
	}
	auto once = [&](int how) { return how == 3 ? attention_bf16<false>(st, p, &a) : attention_sm90a(st, p, &a, how); }; // 3: mma.sync
	auto result = [&](int how) {
		std::vector<bf16> v(size_t(rq * width));
		must(cudaMemsetAsync(o, 0xff, v.size() * 2, st->s), "fill");
		if (once(how) != MARGO_OK) printf(" status of %d: %s", how, st->ctx->error.c_str()), failures++, broken = true;
		must(cudaStreamSynchronize(st->s), "the kernel");
		must(cudaMemcpy(v.data(), o, v.size() * 2, cudaMemcpyDeviceToHost), "copy");
		return v;
	};
	printf("%3d x %4d/%4d %2d x %3d%s%s:", s.seqs, s.queries, s.keys, s.heads, s.dh, s.causal ? " causal" : "", s.ragged ? " ragged" : "");
	const auto narrow = result(1), wide = result(2), mma = result(3);
	int64_t blocks_differ = 0, differ = 0;
	double most = 0, greatest = 0;
	for (size_t i = 0; i < mma.size(); i++) {
		blocks_differ += narrow[i].bits != wide[i].bits, differ += narrow[i].bits != mma[i].bits;
		double d = fabs(value(narrow[i]) - value(mma[i]));
		most = d > most || d != d ? d : most, greatest = fmax(greatest, fabs(value(mma[i])));
	}
	printf(" %lld of %lld differ, by %.1e at most", (long long)differ, (long long)mma.size(), most / greatest);
	if (blocks_differ) printf(" BLOCKS DIFFER in %lld", (long long)blocks_differ), failures++;
	if (!(most <= greatest * 0x1p-7)) printf(" WRONG"), failures++;
	if (time_it && !broken) {
		int how = 0;
		for (const char *name : {"chosen", "64", "more", "mma"}) {
			const double us = microseconds(st, 50, [&] { once(how); });
			printf(" | %s %.1f us %.0f TF", name, us, flops / us * 1e-6);
			how++;
		}
	}
	printf("\n");
	for (void *x : {static_cast<void *>(q), static_cast<void *>(kv), static_cast<void *>(o), qo, ko}) cudaFree(x);
}

} // namespace

int main(int argc, char **argv) {
	margo_stream *st = open_stream();
	if (not_hopper(st)) return kLeftOut;
	if (small(argc, argv)) {
		for (int dh : {64, 72, 80, 128}) run_shape(st, {2, 70, 90, 1, dh, dh == 72, 1}, false);
		return verdict();
	}
	for (int dh : {64, 72, 80, 128})
		for (int causal : {0, 1})
			for (Shape s : {Shape{3, 37, 37, 2, dh, causal, 0}, {5, 200, 200, 3, dh, causal, 1}, {2, 128, 320, 4, dh, causal, 0}, {1, 1000, 700, 2, dh, causal, 0}})
				run_shape(st, s, false);
	for (Shape s : {Shape{64, 320, 320, 12, 64, 0, 0}, {128, 320, 320, 12, 64, 0, 1}, {128, 128, 320, 12, 64, 0, 0}, {2, 320, 320, 12, 64, 0, 0}, {64, 320, 320, 16, 80, 0, 0},
	                {64, 256, 256, 16, 72, 0, 0}, {16, 1024, 1024, 16, 128, 1, 0}})
		run_shape(st, s, true);
	return verdict();
}
