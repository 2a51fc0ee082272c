// head_latency_test.cu: the persistent kernel of the diffusion head against the throughput path, with random weights in
// the shapes of MAR-B, -L and -H, and the time of a step by both; with FP8 weights too, whose numbers the throughput path gets
// in bf16. `make gpu-tests` builds it. With the argument `small` a small shape and no times, for the emulator.
#include <cmath>
#include <vector>

#include "../head.cuh"
#include "test.h"

namespace {

struct Arena { // device memory of a test
	std::vector<void *> all;
	uint64_t seed = 1;
	uint64_t raw(size_t bytes) {
		void *p = nullptr;
		must(cudaMalloc(&p, bytes + 256), "cudaMalloc");
		all.push_back(p);
		return reinterpret_cast<uintptr_t>(p);
	}
	uint64_t copy(const void *from, size_t bytes) {
		uint64_t p = raw(bytes);
		must(cudaMemcpy(reinterpret_cast<void *>(p), from, bytes, cudaMemcpyHostToDevice), "copying in");
		return p;
	}
	std::vector<float> random(int64_t count, float sigma, float mean = 0) {
		std::vector<float> v(static_cast<size_t>(count));
		for (float &x : v) {
			seed = seed * 6364136223846793005ull + 1442695040888963407ull;
			x = mean + sigma * 1.7f * (float(seed >> 40) * 0x1p-23f - 1.0f);
		}
		return v;
	}
	margo_mat put(const std::vector<float> &v, int64_t rows, int64_t cols, int dtype) {
		std::vector<uint16_t> h;
		if (dtype == MARGO_BF16) {
			for (float x : v) {
				uint32_t u;
				memcpy(&u, &x, 4);
				h.push_back(uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16));
			}
		}
		return {h.empty() ? copy(v.data(), v.size() * 4) : copy(h.data(), h.size() * 2), rows, cols, cols, dtype, 0};
	}
	margo_mat matrix(int64_t rows, int64_t cols, int dtype, float sigma, float mean = 0) {
		return put(random(rows * cols, sigma, mean), rows, cols, dtype);
	}
	// weight is a square bf16 matrix; with q, of e4m3 numbers times a power of two for each row, which q gets as margo_fp8 says.
	margo_mat weight(int64_t w, float sigma, margo_fp8 *q) {
		std::vector<float> v = random(w * w, sigma), scales;
		std::vector<uint8_t> rows, codes;
		if (!q) return put(v, w, w, MARGO_BF16);
		for (int64_t r = 0; r < w; r++) {
			const int up = ilogbf(2 * sigma / 448) + 1 + int(r % 3); // some rows coarser than they need be
			scales.push_back(ldexpf(1, up));
			for (float *x = &v[size_t(r * w)]; x < &v[size_t(r * w)] + w; x++) {
				const float a = ldexpf(fabsf(*x), -up);
				int e = a < 0x1p-6f ? -6 : ilogbf(a), m = int(lrintf(ldexpf(a, 3 - e)));
				if (m == 16) m = 8, e++;
				rows.push_back(uint8_t((*x < 0 ? 0x80 : 0) | (m < 8 ? m : (e + 7) << 3 | (m - 8))));
				*x = copysignf(ldexpf(float(m), e - 3 + up), *x);
			}
		}
		for (int64_t tile = 0; tile < w; tile += 8)
			for (int64_t step = 0; step < w; step += 16)
				for (int lane = 0; lane < 32; lane++)
					for (int i : {0, 1, 8, 9}) codes.push_back(rows[size_t((tile + lane / 4) * w + step + lane % 4 * 2 + i)]);
		*q = {copy(codes.data(), codes.size()), copy(scales.data(), scales.size() * 4)};
		return put(v, w, w, MARGO_BF16);
	}
	void drop() {
		for (void *p : all) cudaFree(p);
		all.clear();
	}
};

void test(margo_stream *st, int w, int depth, int tokens, int steps, bool fp8, bool time_it) {
	if (broken) return;
	const int c = 16, r = tokens * 2;
	Arena m;
	float k = 1 / sqrtf(float(w));
	std::vector<margo_head_block> blocks;
	std::vector<margo_head_fp8> codes(static_cast<size_t>(depth));
	for (int i = 0; i < depth; i++) {
		margo_head_block b{};
		b.norm_weight = m.matrix(1, w, MARGO_F32, 0.2f, 1), b.norm_bias = m.matrix(1, w, MARGO_F32, 0.2f);
		margo_head_fp8 &q = codes[size_t(i)];
		b.fc1 = {m.weight(w, k, fp8 ? &q.fc1 : nullptr), m.matrix(1, w, MARGO_F32, 0.1f)};
		b.fc2 = {m.weight(w, k, fp8 ? &q.fc2 : nullptr), m.matrix(1, w, MARGO_F32, 0.1f)};
		blocks.push_back(b);
	}
	margo_head_steps_args a{};
	a.size = sizeof a, a.temperature = 1;
	a.weights.input = {m.matrix(w, c, MARGO_F32, 1 / sqrtf(float(c))), m.matrix(1, w, MARGO_F32, 0.1f)};
	a.weights.ada = {m.matrix((3 * depth + 2) * w, w, MARGO_BF16, 0.5f * k), m.matrix(1, (3 * depth + 2) * w, MARGO_F32, 0.1f)};
	a.weights.final = {m.matrix(2 * c, w, MARGO_F32, k), m.matrix(1, 2 * c, MARGO_F32, 0.1f)};
	a.weights.blocks = blocks.data(), a.weights.depth = depth, a.weights.eps = 1e-6f;
	a.exact = a.weights;
	a.cond = m.matrix(r, w, MARGO_F32, 1), a.time = m.matrix(steps, w, MARGO_F32, 1), a.guidance = m.matrix(1, tokens, MARGO_F32, 0.3f, 2);
	std::vector<int32_t> ids;
	for (int i = 0; i < tokens; i++) ids.push_back(i * 3), ids.push_back(i % 2);
	a.ids = {m.copy(ids.data(), ids.size() * 4), tokens, 2, 2, MARGO_I32, 0};
	a.rng.seed = 7, a.rng.purpose = 2;
	std::vector<margo_coef> coefs;
	for (int i = 0; i < steps; i++) coefs.push_back({1.0 + 0.5 / steps, 1.0 / steps, -5, -4, i + 1 == steps, 0});
	a.steps = coefs.data(), a.step_count = steps;
	a.x = m.matrix(tokens, c, MARGO_F32, 1);
	std::vector<float> start(size_t(tokens * c)), result[2];
	must(cudaMemcpy(start.data(), reinterpret_cast<void *>(a.x.p), start.size() * 4, cudaMemcpyDeviceToHost), "copying out");
	double us[2] = {0, 0};
	uint64_t workspace = 0, held = 0;
	for (int path = 2; path >= 1; path--) {
		a.path = path, a.fp8 = fp8 && path == 2 ? codes.data() : nullptr;
		op_head_steps_workspace(st->ctx, &a, uint64_t(512) << 20, &a.workspace_bytes);
		if (a.workspace_bytes > held) workspace = m.raw(held = a.workspace_bytes);
		a.workspace = workspace;
		auto once = [&] {
			must(cudaMemcpyAsync(reinterpret_cast<void *>(a.x.p), start.data(), start.size() * 4, cudaMemcpyHostToDevice, st->s), "copying in");
			margo_status s = op_head_steps(st, &a);
			if (s != MARGO_OK) printf("FAIL path %d: status %d %s\n", path, s, st->ctx->error.c_str()), failures++, broken = true;
			must(cudaStreamSynchronize(st->s), "head steps");
		};
		once();
		std::vector<float> &x = result[path - 1];
		x.resize(start.size());
		must(cudaMemcpy(x.data(), reinterpret_cast<void *>(a.x.p), x.size() * 4, cudaMemcpyDeviceToHost), "copying out");
		if (path == 2) { // the same bits again
			std::vector<float> y(x.size());
			once();
			must(cudaMemcpy(y.data(), reinterpret_cast<void *>(a.x.p), y.size() * 4, cudaMemcpyDeviceToHost), "copying out");
			if (memcmp(x.data(), y.data(), x.size() * 4)) printf("FAIL: two runs differ\n"), failures++;
		}
		if (!time_it || broken) continue;
		us[path - 1] = microseconds(st, 3, [&] { op_head_steps(st, &a); }) / steps;
	}
	double worst = 0, size = 0;
	for (size_t i = 0; i < start.size(); i++) {
		double d = fabs(double(result[0][i]) - double(result[1][i]));
		worst = d > worst || d != d ? d : worst, size = fmax(size, fabs(double(result[0][i])));
	}
	uint32_t word = 0;
	must(cudaMemcpy(&word, st->ctx->device_error, 4, cudaMemcpyDeviceToHost), "copying out");
	bool ran = false;
	for (auto &q : st->ctx->kernels) ran = ran || !strcmp(q.name, fp8 ? "head_latency_fp8" : "head_latency");
	a.fp8 = fp8 ? codes.data() : nullptr;
	bool good = worst <= 0.03 * size && word == 0 && ran && head_latency_serves(st->ctx, &a);
	if (!good) failures++;
	printf("%s %s W %d depth %d rows %d steps %d: greatest difference %.3g of %.3g, error word %u, latency %.1f us/step, throughput %.1f us/step (modulations included)\n",
	       good ? "ok  " : "FAIL", fp8 ? "fp8 " : "bf16", w, depth, r, steps, worst, size, word, us[1], us[0]);
	fflush(stdout);
	m.drop();
}

} // namespace

int main(int argc, char **argv) {
	margo_stream *st = open_stream();
	for (bool fp8 : {false, true}) {
		if (small(argc, argv)) { // as wide as 4 emulated multiprocessors serve
			for (int tokens : {1, 5, 8}) test(st, 64, 3, tokens, 4, fp8, false);
			continue;
		}
		for (int tokens : {1, 2, 4, 7, 8}) test(st, 1024, 6, tokens, 100, fp8, true);
		for (int tokens : {1, 7}) test(st, 1280, 8, tokens, 100, fp8, true), test(st, 1536, 12, tokens, 100, fp8, true);
	}
	return verdict();
}
