// head_latency.cu: T steps of the diffusion head for at most 16 rows in one launch.
//
// With few rows a step is a chain of small products, each bound by latency: of launches, and of fetching weights
// that do not change. Here a persistent grid (one block a multiprocessor, all alive at once) keeps them: block i owns OWN = 8
// or 16 columns of the residual stream and the same rows of every weight. What fits lies in shared memory as
// fragments of mma.m16n8k16 (MAR-B: 12 layers, 192 KiB of 227); the rest is fetched from L2 into registers
// while the block waits for the others.
//
// With FP8 weights (fp8.cuh) half the bytes: twice as many layers stay, and half as much is fetched. They become the bf16 numbers
// that they stand for in registers, before the block waits for its operand; a row's power of two is applied to the sum. So the
// result has the bits that bf16 weights of the same numbers give.
//
// Blocks exchange rows through L2 in words of 8 bytes: two bf16 (or one f32, or two f32 of 28 bits) and the number of
// the exchange, written and read whole. So the data say by themselves that they have come: no barrier, and no fence but for x,
// which all read at the start and block 0 writes at the end. A buffer is written again only after the next exchanges, which need
// all blocks to have read it. Per step there are 3·depth + 3 exchanges:
//
//	per block  mean and squared deviations of OWN columns → LN, modulation → u (bf16) → fc1, SiLU → f (bf16) → fc2,
//	           gate; the residual stays in a register of the thread that owns it
//	final      statistics again; partial sums of the final linear over OWN columns → one warp adds those of an output →
//	           guidance, reverse step with Philox and the next input projection, by every block for itself
//
// Numerics: as in head.cu (bf16 operands, f32 sums, statistics, residual, first and last layer); statistics travel with a
// relative error of 2^-20, before the rounding of u to 2^-9. Sums over K are split over 8 warps in a fixed order.
//
// A block that waits longer than kLimit sets the context's error word; then nobody waits any more, and the kernel ends. The
// next wait for the stream reports a device fault.
#include <type_traits>

#include "act.cuh"
#include "fp8.cuh"
#include "head.cuh"
#include "rng.cuh"

namespace {

constexpr int kRows = 16, kMaxBlocks = 160, kMaxDepth = 16, kMaxC = 32;
constexpr uint64_t kLimit = gpu::emulated ? 600'000'000'000 : 4'000'000'000; // ns

struct LatencyBlock {
	const void *w1, *w2; // bf16 rows, or fragments of e4m3 (margo_fp8)
	int64_t ld1, ld2;    // of rows
	const float *s1, *s2; // of e4m3: scales
	const float *b1, *b2, *norm_weight, *norm_bias;
};

struct LatencyParams {
	LatencyBlock blocks[kMaxDepth];
	HeadLatencyRun run;
	const float *wi, *bi, *wf, *bf;
	int64_t ldi, ldf;
	uint64_t *stats, *u, *f, *parts, *outs; // exchange buffers
	uint32_t *error;
	int32_t depth, resident; // resident: layers that lie in shared memory
	float eps;
};

template <int NT> struct Fixed { // shared memory before the fragments
	static constexpr int OWN = NT * 8;
	float sums[2][8][kRows * OWN]; // of each warp; two, so that a fast warp does not overtake a slow one
	float v[kRows][OWN + 1];
	float stat[kRows][2]; // mean, 1/σ
	float outs[kRows * 2 * kMaxC];
	float x[kRows * kMaxC];
	float wf[2 * kMaxC][OWN + 1], wi[OWN][kMaxC + 1];
};

// Watch ends all waiting when the kernel has run for too long.
struct Watch {
	uint64_t until;
	uint32_t *error;
	uint32_t turns = 0;
	bool dead = false;
	MARGO_DEVICE bool goes_on() {
		if (dead) return false;
		gpu::spin();
		if (++turns % 256 == 0) {
			if (gpu::ld_acquire(error) == DEVICE_ERROR_STALLED) {
				dead = true;
			} else if (gpu::global_nanoseconds() > until) {
				atomicMax(error, DEVICE_ERROR_STALLED);
				dead = true;
			}
		}
		return !dead;
	}
};

// gather reads N words of each lane until all carry their tag: those with want(i) from at(i), the others give 0. All
// lanes of a warp call it together.
template <int N, int SHIFT, class Want, class At> MARGO_DEVICE void gather(uint64_t (&v)[N], uint32_t tag, Watch &watch, Want want, At at) {
#pragma unroll
	for (int i = 0; i < N; i++) v[i] = uint64_t(want(i) ? ~tag : tag) << SHIFT;
	bool missing;
	do {
		missing = false;
#pragma unroll
		for (int i = 0; i < N; i++)
			if (uint32_t(v[i] >> SHIFT) != tag) v[i] = gpu::ld_relaxed_u64(at(i));
#pragma unroll
		for (int i = 0; i < N; i++) missing |= uint32_t(v[i] >> SHIFT) != tag;
	} while (__any_sync(0xffffffffu, missing && watch.goes_on()));
}

// short_bits: the 28 upper bits of a float, rounded; a NaN stays one.
MARGO_DEVICE uint64_t short_bits(float x) {
	uint32_t u = f32_to_bits(x);
	return x == x ? (u + 8) >> 4 : 0x7fc0000u;
}
MARGO_DEVICE float from_short(uint64_t v) { return bits_to_f32(uint32_t(v & 0xfffffffu) << 4); }

MARGO_DEVICE float sum_of_warp(float v) {
#pragma unroll
	for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(0xffffffffu, v, k);
	return v;
}
template <int LANES> MARGO_DEVICE float sum_of_group(float v) {
#pragma unroll
	for (int k = LANES / 2; k; k >>= 1) v += __shfl_xor_sync(0xffffffffu, v, k);
	return v;
}

// NT: 8-column tiles of a block; KS: most k16 steps of a warp; FP8: weights are e4m3.
template <int NT, int KS, bool FP8> __global__ void __launch_bounds__(256, 1) head_latency_kernel(const __grid_constant__ LatencyParams p) {
	constexpr int OWN = NT * 8;
	auto &mem = gpu::smem<Fixed<NT>>();
	using Fragment = std::conditional_t<FP8, uint32_t, uint2>;
	auto *fragments = reinterpret_cast<Fragment *>(&mem + 1);
	const HeadLatencyRun &run = p.run;
	const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, me = blockIdx.x, blocks = gridDim.x;
	const int n = run.n, rows = run.r, c = run.c, w = run.w, k_steps = w / 16, col0 = me * OWN;
	const int row = tid / OWN, mine = tid % OWN, col = col0 + mine; // the thread's element of the residual stream
	const bool owner = row < rows;
	Watch watch{gpu::global_nanoseconds() + kLimit, p.error};

	auto weight = [&](int layer, int64_t &ld) {
		const LatencyBlock &b = p.blocks[layer / 2];
		ld = layer % 2 ? b.ld2 : b.ld1;
		return layer % 2 ? b.w2 : b.w1;
	};
	// fragment of rows col0 + 8·tile … and k16 step ks, of the lane.
	auto fetch = [&](const void *base, int64_t ld, int tile, int ks) {
		if constexpr (FP8) {
			return static_cast<const uint32_t *>(base)[(int64_t(col0 / 8 + tile) * k_steps + ks) * 32 + lane];
		} else {
			const bf16 *q = static_cast<const bf16 *>(base) + int64_t(col0 + tile * 8 + lane / 4) * ld + ks * 16 + lane % 4 * 2;
			return make_uint2(*reinterpret_cast<const uint32_t *>(q), *reinterpret_cast<const uint32_t *>(q + 8));
		}
	};
	auto widen = [](Fragment v) {
		if constexpr (FP8) {
			uint2 b;
			e4m3_to_bf16(v, b.x, b.y);
			return b;
		} else {
			return v;
		}
	};
	for (int i = tid; i < n * c; i += 256) mem.x[i] = run.x[i];
	for (int i = tid; i < 2 * c * OWN; i += 256) mem.wf[i / OWN][i % OWN] = p.wf[int64_t(i / OWN) * p.ldf + col0 + i % OWN];
	for (int i = tid; i < OWN * c; i += 256) mem.wi[i / c][i % c] = p.wi[int64_t(col0 + i / c) * p.ldi + i % c];
	for (int layer = 0; layer < p.resident; layer++) {
		int64_t ld;
		const void *base = weight(layer, ld);
#pragma unroll 4
		for (int i = warp; i < k_steps * NT; i += 8) fragments[(layer * k_steps * NT + i) * 32 + lane] = fetch(base, ld, i % NT, i / NT);
	}
	__syncthreads();
	__threadfence(); // orders this block's reads of x before all that it publishes

	int turn = 0; // of sums
	// multiply gives the thread its element of buffer·Wᵀ, Σ over K in 8 parts, without the scale of FP8.
	auto multiply = [&](int layer, const uint64_t *buffer, uint32_t tag) {
		uint2 b[KS][NT];
		if (layer < p.resident) {
#pragma unroll
			for (int j = 0; j < KS; j++)
#pragma unroll
				for (int t = 0; t < NT; t++)
					if (warp + 8 * j < k_steps) b[j][t] = widen(fragments[((layer * k_steps + warp + 8 * j) * NT + t) * 32 + lane]);
		} else {
			int64_t ld;
			const void *base = weight(layer, ld);
#pragma unroll
			for (int j = 0; j < KS; j++)
#pragma unroll
				for (int t = 0; t < NT; t++)
					if (warp + 8 * j < k_steps) b[j][t] = widen(fetch(base, ld, t, warp + 8 * j));
		}
		uint64_t v[KS * 4];
		const uint64_t *low = buffer + int64_t(lane / 4) * (w / 2) + warp * 8 + lane % 4, *high = low + 8 * (w / 2); // of rows g and g+8
		gather<KS * 4, 32>(
			v, tag, watch, [&](int i) { return lane / 4 + i % 2 * 8 < rows && warp + i / 4 * 8 < k_steps; }, // a[i%4] of step warp + 8·(i/4)
			[&](int i) { return (i % 2 ? high : low) + (i / 4 * 64 + i % 4 / 2 * 4); });
		float acc[NT][4];
#pragma unroll
		for (int t = 0; t < NT; t++)
#pragma unroll
			for (int e = 0; e < 4; e++) acc[t][e] = 0;
#pragma unroll
		for (int j = 0; j < KS; j++) {
			if (warp + 8 * j >= k_steps) continue;
			uint32_t a[4] = {uint32_t(v[j * 4]), uint32_t(v[j * 4 + 1]), uint32_t(v[j * 4 + 2]), uint32_t(v[j * 4 + 3])};
#pragma unroll
			for (int t = 0; t < NT; t++) {
				uint32_t q[2] = {b[j][t].x, b[j][t].y};
				gpu::mma_bf16(acc[t], a, q);
			}
		}
		float *sums = mem.sums[turn][warp] + lane / 4 * OWN + lane % 4 * 2;
#pragma unroll
		for (int t = 0; t < NT; t++) {
			*reinterpret_cast<float2 *>(sums + t * 8) = make_float2(acc[t][0], acc[t][1]);
			*reinterpret_cast<float2 *>(sums + 8 * OWN + t * 8) = make_float2(acc[t][2], acc[t][3]);
		}
		__syncthreads();
		float sum = 0;
		if (row < kRows) {
#pragma unroll
			for (int i = 0; i < 8; i++) sum += mem.sums[turn][i][tid];
		}
		turn ^= 1;
		return sum;
	};
	// publish makes the thread's element part of a matrix of bf16 pairs.
	auto publish = [&](uint64_t *buffer, float v, uint32_t tag) {
		float next = __shfl_xor_sync(0xffffffffu, v, 1);
		if (owner && mine % 2 == 0) gpu::st_relaxed_u64(buffer + int64_t(row) * (w / 2) + col / 2, uint64_t(tag) << 32 | gpu::pack_bf16(v, next));
	};
	// normalise gives (s - mean)/σ of the thread's element; all blocks meet.
	auto normalise = [&](float s, uint32_t exchange) {
		const uint32_t tag = exchange % 255 + 1;
		float mean = sum_of_group<OWN>(s) / float(OWN), square = sum_of_group<OWN>((s - mean) * (s - mean));
		if (owner && mine == 0) gpu::st_relaxed_u64(p.stats + row * blocks + me, uint64_t(tag) << 56 | short_bits(square) << 28 | short_bits(mean));
		constexpr int P = kMaxBlocks / 32;
		uint64_t v[2 * P];
		const uint64_t *low = p.stats + warp * blocks + lane, *high = low + 8 * blocks;
		gather<2 * P, 56>(
			v, tag, watch, [&](int i) { return warp + i / P * 8 < rows && lane + i % P * 32 < blocks; }, [&](int i) { return (i / P ? high : low) + i % P * 32; });
#pragma unroll
		for (int q = 0; q < 2; q++) {
			float m = 0, d2 = 0;
#pragma unroll
			for (int i = 0; i < P; i++)
				if (lane + i * 32 < blocks) m += from_short(v[q * P + i]);
			m = sum_of_warp(m) / float(blocks);
#pragma unroll
			for (int i = 0; i < P; i++)
				if (lane + i * 32 < blocks) {
					float d = from_short(v[q * P + i]) - m;
					d2 += from_short(v[q * P + i] >> 28) + float(OWN) * (d * d);
				}
			d2 = sum_of_warp(d2);
			if (lane == 0) mem.stat[warp + q * 8][0] = m, mem.stat[warp + q * 8][1] = 1.0f / sqrtf(d2 / float(w) + p.eps);
		}
		__syncthreads();
		return owner ? (s - mem.stat[row][0]) * mem.stat[row][1] : 0.0f;
	};
	auto project = [&] {
		if (!owner) return 0.0f;
		const float *x = mem.x + row % n * c;
		float v = 0;
		for (int k = 0; k < c; k++) v = fmaf(x[k], mem.wi[mine][k], v);
		return v + (p.bi ? p.bi[col] : 0.0f);
	};

	float s = project();
	for (int step = 0; step < run.count; step++) {
		const float *mods = run.mods + (int64_t(step) * rows + row) * run.ldm + col; // of the owner
		float shift = 0, scale = 0, gate = 0;
		auto fetch_mods = [&](int b) {
			if (!owner) return;
			shift = mods[int64_t(3 * b) * w], scale = mods[int64_t(3 * b + 1) * w];
			if (b < p.depth) gate = mods[int64_t(3 * b + 2) * w];
		};
		fetch_mods(0);
		for (int b = 0; b < p.depth; b++) {
			const LatencyBlock &k = p.blocks[b];
			const uint32_t tag = uint32_t(step * p.depth + b + 1);
			float norm_weight = k.norm_weight ? k.norm_weight[col] : 1.0f, norm_bias = k.norm_bias ? k.norm_bias[col] : 0.0f;
			float b1 = k.b1 ? k.b1[col] : 0.0f, b2 = k.b2 ? k.b2[col] : 0.0f;
			float u = normalise(s, uint32_t(step * (p.depth + 1) + b)) * norm_weight + norm_bias;
			publish(p.u, u * (1.0f + scale) + shift, tag);
			float g = gate;
			fetch_mods(b + 1);
			if constexpr (FP8) {
				const float s1 = k.s1[col], s2 = k.s2[col];
				publish(p.f, activate(MARGO_SILU, multiply(2 * b, p.u, tag) * s1 + b1), tag);
				s += g * (multiply(2 * b + 1, p.f, tag) * s2 + b2);
			} else {
				publish(p.f, activate(MARGO_SILU, multiply(2 * b, p.u, tag) + b1), tag);
				s += g * (multiply(2 * b + 1, p.f, tag) + b2);
			}
		}

		float u = normalise(s, uint32_t(step * (p.depth + 1) + p.depth)) * (1.0f + scale) + shift;
		const uint32_t tag = uint32_t(step + 1);
		const int outputs = rows * 2 * c;
		if (owner) mem.v[row][mine] = u;
		__syncthreads();
		for (int q = tid; q < outputs; q += 256) {
			const float *v = mem.v[q / (2 * c)], *f = mem.wf[q % (2 * c)];
			float sum = 0;
#pragma unroll
			for (int i = 0; i < OWN; i++) sum = fmaf(v[i], f[i], sum);
			gpu::st_relaxed_u64(p.parts + int64_t(q) * blocks + me, uint64_t(tag) << 32 | f32_to_bits(sum));
		}
		for (int q = me + warp * blocks; q < outputs; q += blocks * 8) {
			constexpr int P = kMaxBlocks / 32;
			uint64_t v[P];
			const uint64_t *first = p.parts + int64_t(q) * blocks + lane;
			gather<P, 32>(v, tag, watch, [&](int i) { return lane + i * 32 < blocks; }, [&](int i) { return first + i * 32; });
			float sum = 0;
#pragma unroll
			for (int i = 0; i < P; i++)
				if (lane + i * 32 < blocks) sum += bits_to_f32(uint32_t(v[i]));
			sum = sum_of_warp(sum) + (p.bf ? p.bf[q % (2 * c)] : 0.0f);
			if (lane == 0) gpu::st_relaxed_u64(p.outs + q, uint64_t(tag) << 32 | f32_to_bits(sum));
		}

		// The noise is drawn while the outputs travel. A thread owns 4 elements of a token.
		const HeadCoef coef = run.state->coef[step];
		const int fours = (c + 3) / 4, token = tid / fours, c0 = tid % fours * 4;
		float noise[4] = {};
		if (token < n && run.noise)
			load4<false>(noise, run.noise + (int64_t(step) * n + token) * run.ldn + c0, c - c0);
		else if (token < n && !coef.last) {
			Draw d{run.state->rng.seed, run.state->rng.purpose, run.state->rng.step + uint32_t(step), uint32_t(run.ids[2 * token]), uint32_t(run.ids[2 * token + 1])};
			normal4(d, uint32_t(c0 / 4), noise);
		}
		{
			constexpr int P = kRows * 2 * kMaxC / 256;
			uint64_t v[P];
			gather<P, 32>(v, tag, watch, [&](int i) { return tid + i * 256 < outputs; }, [&](int i) { return p.outs + tid + i * 256; });
#pragma unroll
			for (int i = 0; i < P; i++)
				if (tid + i * 256 < outputs) mem.outs[tid + i * 256] = bits_to_f32(uint32_t(v[i]));
		}
		__syncthreads();
		if (token < n) {
			const float *cond = mem.outs + token * 2 * c, *uncond = cond + n * 2 * c;
#pragma unroll
			for (int e = 0; e < 4; e++) {
				const int i = c0 + e;
				if (i >= c) continue;
				float eps = cond[i];
				if (run.guidance) eps = fmaf(run.guidance[token], eps - uncond[i], uncond[i]);
				float y = coef.a * mem.x[token * c + i] - coef.b * eps;
				if (!coef.last) {
					float f = (cond[c + i] + 1.0f) * 0.5f, logvar = f * coef.max_log + (1.0f - f) * coef.min_log;
					y += expf(0.5f * logvar) * run.state->temperature * noise[e];
				}
				mem.x[token * c + i] = y;
				if (run.trace && me == 0) run.trace[(int64_t(step) * n + token) * run.ldt + i] = y;
			}
		}
		__syncthreads();
		s = project();
	}
	if (me == 0) {
		__threadfence(); // what it has got from all blocks came after their reads of x, which end with a fence
		__syncthreads();
		for (int i = tid; i < n * c; i += 256) run.x[i] = mem.x[i];
	}
}

// Plan of a launch; blocks is 0 if there is none.
struct Plan {
	int blocks = 0, tiles = 0, resident = 0;
	size_t smem = 0;
};

Plan plan(const margo_context *ctx, const margo_head_steps_args *a) {
	const int64_t w = a->cond.cols, c = a->x.cols, r = a->cond.rows;
	const margo_head_weights &h = a->weights;
	Plan p;
	auto serves = [&](const margo_linear &m) { return m.w.dtype == MARGO_BF16 && m.w.p % 4 == 0 && m.w.ld % 2 == 0; };
	if (r > kRows || c > kMaxC || w % 16 || w > 1536 || w == 0 || h.depth > kMaxDepth) return p;
	for (int i = 0; i < h.depth; i++)
		if (!a->fp8 && (!serves(h.blocks[i].fc1) || !serves(h.blocks[i].fc2))) return p;
	const int64_t most = ctx->prop.multiProcessorCount < kMaxBlocks ? ctx->prop.multiProcessorCount : kMaxBlocks;
	const int tiles = w <= 1024 && w / 8 <= most ? 1 : 2;
	if (w / (8 * tiles) > most) return p;
	size_t fixed = tiles == 1 ? sizeof(Fixed<1>) : sizeof(Fixed<2>), layer = size_t(tiles * 8 * w * (a->fp8 ? 1 : 2)), all = ctx->prop.sharedMemPerBlockOptin;
	if (all < fixed) return p;
	p.resident = int((all - fixed) / layer);
	if (p.resident > 2 * h.depth) p.resident = 2 * h.depth;
	p.blocks = int(w / (8 * tiles)), p.tiles = tiles, p.smem = fixed + size_t(p.resident) * layer;
	return p;
}

struct Buffers {
	uint64_t stats, u, f, parts, outs, bytes;
};
Buffers buffers(int64_t r, int64_t w, int64_t c) {
	Buffers b{};
	auto take = [&](int64_t words) {
		uint64_t at = b.bytes;
		b.bytes += (uint64_t(words) * 8 + 255) / 256 * 256;
		return at;
	};
	b.stats = take(r * kMaxBlocks), b.u = take(r * w / 2), b.f = take(r * w / 2), b.parts = take(r * 2 * c * kMaxBlocks), b.outs = take(r * 2 * c);
	return b;
}

template <int NT, int KS, bool FP8> margo_status start(margo_stream *st, const LatencyParams &p, const Plan &plan) {
	auto kernel = head_latency_kernel<NT, KS, FP8>;
	margo_context *c = st->ctx;
	const void *f = reinterpret_cast<const void *>(kernel);
	int blocks = 0;
	MARGO_TRY(with_room(c, "head_latency", [&] { return cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.smem)); }));
	MARGO_TRY(check(c, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, f, 256, plan.smem), "head_latency"));
	if (int64_t(blocks) * c->prop.multiProcessorCount < plan.blocks) return MARGO_UNSUPPORTED;
	note_launch(st, FP8 ? "head_latency_fp8" : "head_latency", f, 256, plan.smem);
	gpu::name_next_launch(FP8 ? "head_latency_fp8" : "head_latency");
	return with_room(c, "head_latency", [&] { return gpu::launch_cooperative(kernel, dim3(unsigned(plan.blocks)), dim3(256), plan.smem, st->s, p); });
}
template <bool FP8> margo_status start(margo_stream *st, const LatencyParams &p, const Plan &plan) {
	if (plan.tiles == 1) return start<1, 8, FP8>(st, p, plan);
	return p.run.w <= 1024 ? start<2, 8, FP8>(st, p, plan) : start<2, 12, FP8>(st, p, plan);
}

} // namespace

uint64_t head_latency_bytes(const margo_head_steps_args *a) {
	return a->cond.rows > kRows ? 0 : buffers(a->cond.rows, a->cond.cols, a->x.cols).bytes;
}

bool head_latency_serves(const margo_context *c, const margo_head_steps_args *a) { return c->prop.cooperativeLaunch && plan(c, a).blocks > 0; }

margo_status head_latency(margo_stream *st, const margo_head_steps_args *a, const HeadLatencyRun &run, uint64_t workspace) {
	const Plan pl = plan(st->ctx, a);
	const margo_head_weights &h = a->weights;
	LatencyParams p{};
	for (int i = 0; i < h.depth; i++) {
		const margo_head_block &b = h.blocks[i];
		p.blocks[i] = {ptr<void>(b.fc1.w),     ptr<void>(b.fc2.w),     b.fc1.w.ld,                b.fc2.w.ld,              nullptr, nullptr,
		               ptr<float>(b.fc1.bias), ptr<float>(b.fc2.bias), ptr<float>(b.norm_weight), ptr<float>(b.norm_bias)};
		if (!a->fp8) continue;
		const margo_head_fp8 &q = a->fp8[i];
		p.blocks[i].w1 = reinterpret_cast<const void *>(q.fc1.codes), p.blocks[i].w2 = reinterpret_cast<const void *>(q.fc2.codes);
		p.blocks[i].s1 = reinterpret_cast<const float *>(q.fc1.scales), p.blocks[i].s2 = reinterpret_cast<const float *>(q.fc2.scales);
	}
	p.run = run;
	p.wi = ptr<float>(h.input.w), p.ldi = h.input.w.ld, p.bi = ptr<float>(h.input.bias);
	p.wf = ptr<float>(h.final.w), p.ldf = h.final.w.ld, p.bf = ptr<float>(h.final.bias);
	const Buffers b = buffers(run.r, run.w, run.c);
	auto at = [&](uint64_t offset) { return reinterpret_cast<uint64_t *>(workspace + offset); };
	p.stats = at(b.stats), p.u = at(b.u), p.f = at(b.f), p.parts = at(b.parts), p.outs = at(b.outs);
	p.error = st->ctx->device_error, p.depth = h.depth, p.resident = pl.resident, p.eps = h.eps;
	MARGO_TRY(check(st->ctx, cudaMemsetAsync(at(0), 0, b.bytes, st->s), "head_latency: clearing its buffers"));
	st->rows_enqueued = true; // it may set the error word
	return a->fp8 ? start<true>(st, p, pl) : start<false>(st, p, pl);
}
