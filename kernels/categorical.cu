// categorical.cu: one category for each row of logits (engine.CategoricalArgs): guidance,
// temperature, top-k, top-p, then Gumbel's argmax or the inverse of the cumulative sum.
//
// Mapping. A block per row, of 256 threads or as many as leave four categories to each (by K alone).
// Thread t takes categories t, t+256, …, except that for the draws four neighbours share a
// Philox block and a thread, and that the cumulative sum is taken in order.
//
// Selection without sorting. With e_k = exp(a_k − max a) as bits of a double (numbers ≥ 0 are ordered like
// their bits), the k-th largest e is found bit by bit from the top, counting in each of 62 rounds how many
// e are at least a candidate; top-p likewise with the sum of the e above it. Equal logits have equal e and
// stay or go together. e lies in shared memory if it fits, else it is computed anew in each round.
// (Where e is 0 it separates no more, but such a category is never drawn: its share is below 2^-1000.)
//
// Numerics: double, as the oracle; sums over categories in the order lane by lane, butterfly, warp
// by warp, so that a row's result does not depend on the others. Products that the oracle
// rounds are not fused.
//
// Shared memory: 112 bytes for reductions, and 8·K where a block may have as much (K up to 20000 on
// sm_80, 29000 on sm_90). ptxas (sm_80, sm_90): at most 76 registers, no spills.
#include <math.h>

#include "plugin.h"
#include "rng.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32; // at most
constexpr unsigned FULL = 0xffffffffu;

struct Categorical {
	const float *logits, *guidance; // guidance, log_prob: or null
	int32_t *y;
	float *log_prob;
	const int32_t *ids;
	int64_t ld, n, stride;
	int k, top_k, inverse;
	float temperature, top_p;
	margo_rng rng;
};

struct Scratch {
	double value[WARPS];
	int index[WARPS];
	int found;
	double e[1]; // [k] if cached
};

MARGO_DEVICE int threads() { return int(blockDim.x); }
MARGO_DEVICE double product(double a, double b) { // not fused with a sum
#ifdef __CUDACC__
	return __dmul_rn(a, b);
#else
	return a * b;
#endif
}
MARGO_DEVICE double bits_to_f64(uint64_t u) {
#ifdef __CUDACC__
	return __longlong_as_double((long long)u);
#else
	return __builtin_bit_cast(double, u);
#endif
}

// Row reads the logits of one row.
struct Row {
	const float *c, *u; // u: unconditional, or null
	double s;
	MARGO_DEVICE double operator()(int k) const {
		if (!u) return double(c[k]);
		return double(u[k]) + product(s, double(c[k]) - double(u[k]));
	}
};

// sum_all adds the threads' numbers; every thread gets the same bits.
template <class T> MARGO_DEVICE T sum_all(T v, T (&part)[WARPS]) {
#pragma unroll
	for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(FULL, v, d);
	__syncthreads();
	if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
	__syncthreads();
	v = part[0];
	for (int i = 1; i < threads() / 32; i++) v += part[i];
	return v;
}

// Best is the largest value and the first index that has it.
struct Best {
	double value;
	int index;
	MARGO_DEVICE void take(double v, int i) {
		if (v > value || (v == value && i < index)) value = v, index = i;
	}
};
MARGO_DEVICE Best best_of_all(Best b, Scratch &s) {
#pragma unroll
	for (int d = 16; d > 0; d /= 2) {
		double v = __shfl_xor_sync(FULL, b.value, d);
		b.take(v, __shfl_xor_sync(FULL, b.index, d));
	}
	__syncthreads();
	if (threadIdx.x % 32 == 0) s.value[threadIdx.x / 32] = b.value, s.index[threadIdx.x / 32] = b.index;
	__syncthreads();
	b = Best{s.value[0], s.index[0]};
	for (int i = 1; i < threads() / 32; i++) b.take(s.value[i], s.index[i]);
	return b;
}

// uniform is engine.Uniform.
MARGO_DEVICE double uniform(uint32_t w) { return (double(w >> 8) + 0.5) / double(1 << 24); }

// Weights gives e_k of a row, from shared memory or computed.
template <bool IN_SMEM> struct Weights {
	const Row &row;
	const double *e;
	double temperature, top;
	MARGO_DEVICE double compute(int k) const { return exp(row(k) / temperature - top); }
	MARGO_DEVICE double operator()(int k) const { return IN_SMEM ? e[k] : compute(k); }
};

// least is the smallest e that top-k and top-p let stay.
template <class W> MARGO_DEVICE double least(const Categorical &p, const W &e, Scratch &s) {
	const int t = int(threadIdx.x);
	uint64_t keep = 0; // bits of a double
	if (p.top_k > 0 && p.top_k < p.k) {
		for (int bit = 61; bit >= 0; bit--) { // e ≤ 1 has bits 62 and 63 clear
			double candidate = bits_to_f64(keep | uint64_t(1) << bit);
			int count = 0;
			for (int k = t; k < p.k; k += threads()) count += e(k) >= candidate;
			if (sum_all(count, s.index) >= p.top_k) keep |= uint64_t(1) << bit;
		}
	}
	if (p.top_p == 1) return bits_to_f64(keep);
	// above adds the e larger than x, of those that stay.
	double low = bits_to_f64(keep);
	auto above = [&](double x) {
		double sum = 0;
		for (int k = t; k < p.k; k += threads()) {
			double v = e(k);
			if (v > x && v >= low) sum += v;
		}
		return sum_all(sum, s.value);
	};
	double limit = product(double(p.top_p), above(-1));
	if (above(0) < limit) return low;
	uint64_t z = 0; // the largest number with limit or more above it
	for (int bit = 61; bit >= 0; bit--)
		if (above(bits_to_f64(z | uint64_t(1) << bit)) >= limit) z |= uint64_t(1) << bit;
	double next = bits_to_f64(z + 1);
	return next > low ? next : low;
}

// gumbel is the k with the largest a_k − ln(−ln u_k).
template <class W> MARGO_DEVICE int gumbel(const Categorical &p, const Row &row, const W &e, double low, const Draw &d, Scratch &s) {
	Best b{-INFINITY, 0x7fffffff};
	for (int k = 4 * int(threadIdx.x); k < p.k; k += 4 * threads()) {
		Words w{};
		bool drawn = false;
#pragma unroll
		for (int i = 0; i < 4; i++) {
			if (k + i >= p.k || e(k + i) < low) continue;
			double a = row(k + i) / double(p.temperature);
			if (a == -INFINITY) continue;
			if (!drawn) w = philox(uint32_t(k / 4), d.purpose << 24 | (d.step & 0xffffffu), d.token, d.image, d.seed), drawn = true;
			b.take(a - log(-log(uniform(w.w[i]))), k + i);
		}
	}
	return best_of_all(b, s).index;
}

// inverse is the first k whose cumulative e exceeds u times the sum. Each warp sums a
// contiguous part; the warp whose part holds the limit goes through it again, 32 at a time.
template <class W> MARGO_DEVICE int inverse(const Categorical &p, const W &e, double low, const Draw &d, Scratch &s) {
	const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = threads() / 32, part = ((p.k + warps - 1) / warps + 31) / 32 * 32;
	const int first = warp * part, end = first + part < p.k ? first + part : p.k;
	double sum = 0;
	for (int k = first + lane; k < end; k += 32) {
		double v = e(k);
		if (v >= low) sum += v;
	}
#pragma unroll
	for (int x = 16; x > 0; x /= 2) sum += __shfl_xor_sync(FULL, sum, x);
	__syncthreads();
	if (lane == 0) s.value[warp] = sum;
	if (threadIdx.x == 0) s.found = -1;
	__syncthreads();
	double before = 0, total = 0; // before: of earlier parts
	for (int i = 0; i < warps; i++) {
		if (i == warp) before = total;
		total += s.value[i];
	}
	Words w = philox(0, d.purpose << 24 | (d.step & 0xffffffu), d.token, d.image, d.seed);
	double limit = product(uniform(w.w[0]), total);
	if (before <= limit && before + s.value[warp] > limit) { // exactly one warp
		int last = -1, found = -1; // last: of those that stay, should rounding leave the limit unmet
		for (int base = first; base < end && found < 0; base += 32) {
			double v = base + lane < end ? e(base + lane) : 0.0;
			if (v < low) v = 0;
			double c = v;
#pragma unroll
			for (int x = 1; x < 32; x *= 2) {
				double left = __shfl_up_sync(FULL, c, x);
				if (lane >= x) c += left;
			}
			unsigned met = __ballot_sync(FULL, v > 0 && before + c > limit), some = __ballot_sync(FULL, v > 0);
			if (met) found = base + (__ffs(int(met)) - 1);
			if (some) last = base + (31 - __clz(int(some)));
			before += __shfl_sync(FULL, c, 31);
		}
		if (lane == 0) s.found = found >= 0 ? found : last;
	}
	__syncthreads();
	return s.found;
}

template <bool IN_SMEM> __global__ void __launch_bounds__(THREADS, 1) categorical_kernel(Categorical p) {
	Scratch &s = gpu::smem<Scratch>();
	const int64_t r = blockIdx.x;
	const int t = int(threadIdx.x);
	const Row row{p.logits + r * p.ld, p.guidance ? p.logits + (p.n + r) * p.ld : nullptr, p.guidance ? double(p.guidance[r]) : 0.0};
	Best top{-INFINITY, 0x7fffffff};
	int wrong = 0; // NaN, +Inf
	for (int k = t; k < p.k; k += threads()) {
		double l = row(k);
		wrong += !(l < INFINITY);
		top.take(l, k);
	}
	top = best_of_all(top, s);
	if (sum_all(wrong, s.index) > 0 || top.value == -INFINITY) { // no distribution
		if (t == 0) {
			p.y[r] = int32_t(r * p.stride);
			if (p.log_prob) p.log_prob[r] = NAN;
		}
		return;
	}
	int best = top.index;
	if (p.temperature > 0) {
		const double temperature = p.temperature;
		const Weights<IN_SMEM> e{row, s.e, temperature, top.value / temperature};
		if (IN_SMEM) {
			for (int k = t; k < p.k; k += threads()) s.e[k] = e.compute(k);
			__syncthreads();
		}
		const double low = least(p, e, s);
		const Draw d{p.rng.seed, p.rng.purpose, p.rng.step, uint32_t(p.ids[2 * r]), uint32_t(p.ids[2 * r + 1])};
		best = p.inverse ? inverse(p, e, low, d, s) : gumbel(p, row, e, low, d, s);
	}
	if (t == 0) p.y[r] = int32_t(r * p.stride + best);
	if (!p.log_prob) return;
	double sum = 0;
	for (int k = t; k < p.k; k += threads()) sum += exp(row(k) - top.value);
	sum = sum_all(sum, s.value);
	if (t == 0) p.log_prob[r] = float(row(best) - (top.value + log(sum)));
}

} // namespace

margo_status op_categorical(margo_stream *st, const margo_categorical_args *a) {
	int64_t n = a->y.rows * a->y.cols;
	if (a->logits.cols > 1 << 30) return fail(st->ctx, MARGO_UNSUPPORTED, "categorical: %lld categories", (long long)a->logits.cols);
	Categorical p{ptr<float>(a->logits), ptr<float>(a->guidance), ptr<int32_t>(a->y), ptr<float>(a->log_prob), ptr<int32_t>(a->ids), a->logits.ld, n, a->stride,
	              int(a->logits.cols), int(a->top_k < a->logits.cols ? a->top_k : 0), a->method, a->temperature, a->top_p, a->rng};
	dim3 block(unsigned(p.k >= 4 * THREADS ? THREADS : 32 * ceil_div(p.k, 128)));
	size_t smem = sizeof(Scratch) + size_t(p.k) * 8;
	if (smem <= st->ctx->prop.sharedMemPerBlockOptin) return run(st, "categorical", categorical_kernel<true>, dim3(unsigned(n)), block, smem, p);
	return run(st, "categorical_large", categorical_kernel<false>, dim3(unsigned(n)), block, sizeof(Scratch), p);
}
