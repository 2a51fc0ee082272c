// head.cu: T reverse steps of the diffusion head (MAR §4.1): the throughput path, and the
// choice between it and the latency path (head_latency.cu), which is taken on request (path 2) because it rounds
// differently.
//
// AdaLN modulations do not depend on x: for a run of steps they are one GEMM of
// steps·R rows. What is left of a step is a chain of 3·depth + 1 kernels:
//
//	per block   LN·(1+scale)+shift → fc1, SiLU → fc2, gate, residual
//	head_final  LN·(1+scale)+shift → final linear → guidance → reverse step → the next
//	            step's input projection
//
// Both halves of a guided pair share x: its projection is computed once and written to both,
// and of the unconditional half only ε is used. x, residual stream, modulations, first and last
// layer are F32 in every mode (design of engine.HeadStepsArgs).
//
// The chain is captured once as a CUDA graph for each shape and replayed: everything that changes
// between calls lies in a HeadState on the device, or is copied into the workspace first.
//
// head_final: a block of 8 warps owns 1 or 4 tokens. Rows are normalised into shared memory
// (2·tokens·W floats), each warp computes outputs by lanes striding over W and one shuffle
// tree, so that the order of summation is that of the row alone.
#include <cstring>
#include <memory>
#include <string>

#include "act.cuh"
#include "head.cuh"
#include "reduce.cuh"
#include "rng.cuh"

namespace {

struct FinalParams {
	const float *s, *mods; // residual [R, lds]; modulations of this step [R, ldm], shift at 0, scale at w
	int64_t lds, ldm;
	const float *wf, *bf, *wi, *bi; // final [2C, W], input [W, C]
	int64_t ldf, ldi;
	float *x, *next; // x [n, C]; next: the residual stream of the next step, or null
	const float *guidance, *noise;
	float *trace;
	const int32_t *ids;
	int64_t ldn, ldt;
	const HeadState *state;
	int step; // index into state->coef
	int n, c, w, halves;
	int vec_final, vec_input; // rows of the matrices can be read 16 bytes at a time
	float eps;
};

// project writes the input projection of tokens t0 … t0+count-1, whose x lies at xs [count, c]: one chain of multiply-adds
// for each output, in the order of channels.
template <bool VEC> MARGO_DEVICE void project_rows(const FinalParams &p, const float *xs, int t0, int count) {
	for (int i = threadIdx.x; i < p.w; i += 256) {
		const float *row = p.wi + int64_t(i) * p.ldi;
		float bias = p.bi ? p.bi[i] : 0.0f;
		for (int t = 0; t < count; t++) {
			float v = 0;
			for (int k = 0; k < p.c; k += 4) {
				float w[4];
				load4<VEC>(w, row + k, p.c - k);
#pragma unroll
				for (int e = 0; e < 4; e++)
					if (VEC || k + e < p.c) v = fmaf(xs[t * p.c + k + e], w[e], v);
			}
			v += bias;
			for (int h = 0; h < p.halves; h++) p.next[(int64_t(h) * p.n + t0 + t) * p.lds + i] = v;
		}
	}
}

MARGO_DEVICE void project(const FinalParams &p, const float *xs, int t0, int count) {
	if (p.vec_input)
		project_rows<true>(p, xs, t0, count);
	else
		project_rows<false>(p, xs, t0, count);
}

// dots computes the final linear layer for the block's rows: a warp takes outputs warp, warp + 8, …, four at a time, so that
// enough loads are under way; lanes stride over W four by four (VEC) or one by one, and a shuffle tree adds them up.
template <int TOK, bool VEC> MARGO_DEVICE void dots(const FinalParams &p, const float *rows, float *out, int live) {
	constexpr int step = VEC ? 4 : 1;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = 2 * p.c;
	for (int o0 = warp; o0 < outputs; o0 += 32) {
		float acc[4][2 * TOK];
#pragma unroll
		for (int j = 0; j < 4; j++)
#pragma unroll
			for (int q = 0; q < 2 * TOK; q++) acc[j][q] = 0;
#pragma unroll 2
		for (int i = lane * step; i < p.w; i += 32 * step) {
			float w[4][step];
#pragma unroll
			for (int j = 0; j < 4; j++) {
				const float *row = p.wf + int64_t(o0 + 8 * j < outputs ? o0 + 8 * j : o0) * p.ldf + i;
				if constexpr (VEC)
					load4<true>(w[j], row, 4);
				else
					w[j][0] = row[0];
			}
#pragma unroll
			for (int q = 0; q < 2 * TOK; q++) {
				if (q >= live) continue;
				float x[step];
				if constexpr (VEC)
					load4<true>(x, rows + q * p.w + i, 4);
				else
					x[0] = rows[q * p.w + i];
#pragma unroll
				for (int j = 0; j < 4; j++)
#pragma unroll
					for (int e = 0; e < step; e++) acc[j][q] = fmaf(x[e], w[j][e], acc[j][q]);
			}
		}
#pragma unroll
		for (int j = 0; j < 4; j++) {
			int o = o0 + 8 * j;
			if (o >= outputs) continue; // the same for all lanes
			float bias = p.bf ? p.bf[o] : 0.0f;
#pragma unroll
			for (int q = 0; q < 2 * TOK; q++) {
				float v = warp_sum(acc[j][q]) + bias;
				if (lane == 0 && q < live) out[q * outputs + o] = v;
			}
		}
	}
}

template <int TOK> __global__ void __launch_bounds__(256) head_input(const FinalParams p) {
	float *xs = &gpu::smem<float>();
	int t0 = int(blockIdx.x) * TOK, count = p.n - t0 < TOK ? p.n - t0 : TOK;
	for (int i = threadIdx.x; i < count * p.c; i += blockDim.x) xs[i] = p.x[int64_t(t0) * p.c + i];
	__syncthreads();
	project(p, xs, t0, count);
}

template <int TOK> __global__ void __launch_bounds__(256, 2) head_final(const FinalParams p) {
	float *rows = &gpu::smem<float>();               // [2·TOK][W]
	float *out = rows + 2 * TOK * p.w;               // [2·TOK][2C]
	float *xs = out + 2 * TOK * 2 * p.c;             // [TOK][C]
	const int t0 = int(blockIdx.x) * TOK, count = p.n - t0 < TOK ? p.n - t0 : TOK;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, live = count * p.halves;

	// Row q of the block is token q % count, half q / count.
	for (int q = warp; q < live; q += 8) {
		int64_t r = int64_t(q / count) * p.n + t0 + q % count;
		const float *src = p.s + r * p.lds, *shift = p.mods + r * p.ldm, *scale = shift + p.w;
		float *dst = rows + q * p.w;
		float sum = 0;
		for (int i = lane; i < p.w; i += 32) {
			float v = src[i];
			dst[i] = v;
			sum += v;
		}
		float mean = warp_sum(sum) / float(p.w), square = 0;
		for (int i = lane; i < p.w; i += 32) { // each lane reads what it wrote
			float d = dst[i] - mean;
			square = fmaf(d, d, square);
		}
		float rstd = 1.0f / sqrtf(warp_sum(square) / float(p.w) + p.eps);
		for (int i = lane; i < p.w; i += 32) dst[i] = (dst[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
	}
	__syncthreads();

	if (p.vec_final)
		dots<TOK, true>(p, rows, out, live);
	else
		dots<TOK, false>(p, rows, out, live);
	__syncthreads();

	const HeadCoef k = p.state->coef[p.step];
	const int fours = (p.c + 3) / 4;
	for (int i = threadIdx.x; i < count * fours; i += blockDim.x) {
		int t = i / fours, c0 = i % fours * 4;
		int64_t token = t0 + t;
		const float *cond = out + t * 2 * p.c, *uncond = out + (count + t) * 2 * p.c;
		float noise[4] = {};
		if (p.noise) load4<false>(noise, p.noise + token * p.ldn + c0, p.c - c0);
		else if (!k.last) {
			Draw d{p.state->rng.seed, p.state->rng.purpose, p.state->rng.step + uint32_t(p.step), uint32_t(p.ids[2 * token]), uint32_t(p.ids[2 * token + 1])};
			normal4(d, uint32_t(c0 / 4), noise);
		}
#pragma unroll
		for (int e = 0; e < 4; e++) {
			int c = c0 + e;
			if (c >= p.c) continue;
			float eps = cond[c];
			if (p.guidance) eps = fmaf(p.guidance[token], eps - uncond[c], uncond[c]);
			float y = k.a * p.x[token * p.c + c] - k.b * eps;
			if (!k.last) {
				float f = (cond[p.c + c] + 1.0f) * 0.5f, logvar = f * k.max_log + (1.0f - f) * k.min_log;
				y += expf(0.5f * logvar) * p.state->temperature * noise[e];
			}
			p.x[token * p.c + c] = y;
			xs[t * p.c + c] = y;
			if (p.trace) p.trace[token * p.ldt + c] = y;
		}
	}
	if (!p.next) return;
	__syncthreads();
	project(p, xs, t0, count);
}

// head_silu: y[t·R + r] = SiLU(time[t] + cond[r]) in f32 or bf16.
template <class T> __global__ void __launch_bounds__(256) head_silu(T *y, int64_t ldy, const float *time, int64_t ldt, const float *cond, int64_t ldc, int r, int w) {
	int64_t row = blockIdx.x;
	const float *a = time + row / r * ldt, *b = cond + row % r * ldc;
	for (int i = threadIdx.x; i < w; i += 256) y[row * ldy + i] = from_f32<T>(activate(MARGO_SILU, a[i] + b[i]));
}

// ---- workspace ---------------------------------------------------------------------

struct Layout {
	int64_t n, r, w, ldw, c, depth, steps, chunk; // ldw: w padded to rows of 16 bytes; chunk: steps of a run
	uint64_t state, x, ids, guidance, s, u, f, latency, y, mods, bytes; // latency: buffers of head_latency.cu
};

Layout layout(const margo_head_steps_args *a, uint64_t budget) {
	Layout l{};
	l.n = a->x.rows, l.r = a->cond.rows, l.w = a->cond.cols, l.c = a->x.cols, l.depth = a->weights.depth, l.steps = a->step_count;
	l.ldw = (l.w + 7) / 8 * 8;
	uint64_t at = 0;
	auto take = [&](uint64_t bytes) {
		uint64_t p = at;
		at += (bytes + 255) / 256 * 256;
		return p;
	};
	l.state = take(head_state_bytes());
	l.x = take(uint64_t(l.n * l.c) * 4), l.ids = take(uint64_t(l.n) * 8), l.guidance = take(uint64_t(l.n) * 4);
	uint64_t row = uint64_t(l.r * l.ldw) * 4;
	l.s = take(row), l.u = take(row), l.f = take(row);
	l.latency = take(a->path == 2 ? head_latency_bytes(a) : 0);
	uint64_t per = uint64_t(l.r) * uint64_t(l.ldw + (3 * l.depth + 2) * l.w) * 4;
	l.chunk = per ? int64_t((budget > at ? budget - at : 0) / per) : l.steps;
	if (l.chunk > l.steps) l.chunk = l.steps;
	if (l.chunk > kHeadChunk) l.chunk = kHeadChunk;
	if (l.chunk < 1) l.chunk = 1;
	l.y = take(uint64_t(l.chunk * l.r * l.ldw) * 4);
	l.mods = take(uint64_t(l.chunk * l.r) * uint64_t((3 * l.depth + 2) * l.w) * 4);
	l.bytes = at;
	return l;
}

margo_mat mat(uint64_t p, int64_t rows, int64_t cols, int64_t ld, int32_t dtype = MARGO_F32) { return {p, rows, cols, ld, dtype, 0}; }

// ---- the chain -----------------------------------------------------------------------

struct Chain {
	margo_stream *st;
	const margo_head_steps_args *a;
	const margo_head_weights *w;
	Layout l;
	uint64_t base;
	uint64_t x, ids, guidance; // where the kernels find them
	int64_t ldm() const { return (3 * l.depth + 2) * l.w; }

	const margo_head_weights *weights_of(int64_t at) const { return a->steps[at].exact ? &a->exact : &a->weights; }

	// params of step at-1, whose projection is for step at with the weights of that.
	FinalParams params(int64_t at) const {
		const margo_head_weights *next = weights_of(at < l.steps ? at : l.steps - 1);
		FinalParams p{};
		p.s = reinterpret_cast<float *>(base + l.s), p.lds = l.ldw, p.ldm = ldm();
		p.wf = ptr<float>(w->final.w), p.ldf = w->final.w.ld, p.bf = ptr<float>(w->final.bias);
		p.wi = ptr<float>(next->input.w), p.ldi = next->input.w.ld, p.bi = ptr<float>(next->input.bias);
		p.x = reinterpret_cast<float *>(x), p.next = reinterpret_cast<float *>(base + l.s);
		p.guidance = reinterpret_cast<float *>(guidance), p.ids = reinterpret_cast<int32_t *>(ids);
		p.state = reinterpret_cast<HeadState *>(base + l.state);
		p.n = int(l.n), p.c = int(l.c), p.w = int(l.w), p.halves = int(l.r / l.n), p.eps = w->eps;
		p.vec_final = l.w % 4 == 0 && aligned(w->final.w, 16), p.vec_input = l.c % 4 == 0 && aligned(next->input.w, 16);
		return p;
	}
	// A block takes 4 tokens once that still leaves a block for every multiprocessor.
	bool four() const { return l.n >= 4 * int64_t(st->ctx->prop.multiProcessorCount) && smem(4) <= st->ctx->prop.sharedMemPerBlockOptin; }
	size_t smem(int tok) const { return size_t(2 * tok * l.w + 2 * tok * 2 * l.c + tok * l.c) * 4; }

	// input projects x for step at.
	margo_status input(int64_t at) const {
		FinalParams p = params(at);
		return run(st, "head_input", head_input<1>, dim3(unsigned(l.n)), dim3(256), size_t(l.c) * 4, p);
	}

	// modulations: of steps first … first+count-1.
	margo_status modulations(int64_t first, int64_t count) const {
		int32_t d = w->ada.w.dtype;
		dim3 grid{unsigned(count * l.r)};
		const float *time = ptr<float>(a->time) + first * a->time.ld;
		margo_status s = d == MARGO_BF16 ? run(st, "head_silu_bf16", head_silu<bf16>, grid, dim3(256), 0, reinterpret_cast<bf16 *>(base + l.y), l.ldw, time, a->time.ld,
		                                       ptr<float>(a->cond), a->cond.ld, int(l.r), int(l.w))
		                                 : run(st, "head_silu_f32", head_silu<float>, grid, dim3(256), 0, reinterpret_cast<float *>(base + l.y), l.ldw, time, a->time.ld,
		                                       ptr<float>(a->cond), a->cond.ld, int(l.r), int(l.w));
		MARGO_TRY(s);
		margo_gemm_args g{};
		g.size = sizeof g;
		g.x = mat(base + l.y, count * l.r, l.w, l.ldw, d), g.w = w->ada.w, g.bias = w->ada.bias;
		g.y = mat(base + l.mods, count * l.r, ldm(), ldm());
		return op_gemm(st, &g);
	}

	// step: the i-th of a run; at is its index in the call.
	margo_status step(int64_t i, int64_t at, bool last) const {
		int32_t d = w->ada.w.dtype;
		uint64_t mods = base + l.mods + uint64_t(i * l.r * ldm()) * 4;
		auto mod = [&](int64_t k) { return mat(mods + uint64_t(k * l.w) * 4, l.r, l.w, ldm()); };
		margo_mat s = mat(base + l.s, l.r, l.w, l.ldw), u = mat(base + l.u, l.r, l.w, l.ldw, d), f = mat(base + l.f, l.r, l.w, l.ldw, d);
		for (int64_t b = 0; b < l.depth; b++) {
			const margo_head_block &k = w->blocks[b];
			margo_norm_args nm{};
			nm.size = sizeof nm, nm.eps = w->eps;
			nm.x = s, nm.y = u, nm.weight = k.norm_weight, nm.bias = k.norm_bias;
			nm.shift = mod(3 * b), nm.scale = mod(3 * b + 1), nm.mod_rows = 1;
			MARGO_TRY(op_norm(st, &nm));
			margo_gemm_args g{};
			g.size = sizeof g, g.act = MARGO_SILU;
			g.x = u, g.w = k.fc1.w, g.bias = k.fc1.bias, g.y = f;
			MARGO_TRY(op_gemm(st, &g));
			g = {};
			g.size = sizeof g;
			g.x = f, g.w = k.fc2.w, g.bias = k.fc2.bias, g.gate = mod(3 * b + 2), g.gate_rows = 1, g.residual = s, g.y = s;
			MARGO_TRY(op_gemm(st, &g));
		}
		FinalParams p = params(at + 1);
		p.mods = reinterpret_cast<float *>(mods) + 3 * l.depth * l.w;
		p.step = int(i);
		if (a->noise.p) p.noise = ptr<float>(a->noise) + at * l.n * a->noise.ld, p.ldn = a->noise.ld;
		if (a->trace.p) p.trace = ptr<float>(a->trace) + at * l.n * a->trace.ld, p.ldt = a->trace.ld;
		if (last) p.next = nullptr;
		if (four()) return run(st, "head_final_4", head_final<4>, dim3(unsigned(ceil_div(l.n, 4))), dim3(256), smem(4), p);
		return run(st, "head_final", head_final<1>, dim3(unsigned(l.n)), dim3(256), smem(1), p);
	}

	// latency runs count steps from first on in one kernel, and then projects x for the step after them.
	margo_status latency(int64_t first, int64_t count) const {
		HeadLatencyRun r{};
		r.state = reinterpret_cast<const HeadState *>(base + l.state), r.mods = reinterpret_cast<const float *>(base + l.mods), r.ldm = ldm();
		r.x = reinterpret_cast<float *>(x), r.guidance = reinterpret_cast<const float *>(guidance), r.ids = reinterpret_cast<const int32_t *>(ids);
		if (a->noise.p) r.noise = ptr<float>(a->noise) + first * l.n * a->noise.ld, r.ldn = a->noise.ld;
		if (a->trace.p) r.trace = ptr<float>(a->trace) + first * l.n * a->trace.ld, r.ldt = a->trace.ld;
		r.n = int32_t(l.n), r.r = int32_t(l.r), r.c = int32_t(l.c), r.w = int32_t(l.w), r.count = int32_t(count);
		MARGO_TRY(head_latency(st, a, r, base + l.latency));
		return first + count < l.steps ? input(first + count) : MARGO_OK;
	}

	// upload sends the state of a run.
	margo_status upload(int64_t first, int64_t count) const {
		alignas(HeadState) char host[head_state_bytes()];
		auto *h = reinterpret_cast<HeadState *>(host);
		memset(host, 0, sizeof host);
		h->rng = a->rng, h->rng.step += uint32_t(first), h->temperature = a->temperature;
		for (int64_t i = 0; i < count; i++) {
			const margo_coef &c = a->steps[first + i];
			h->coef[i] = {float(c.a), float(c.b), float(c.min_log), float(c.max_log), c.last, 0};
		}
		// Pageable memory of this size has been taken when the call returns.
		size_t bytes = sizeof(HeadState) + size_t(count - 1) * sizeof(HeadCoef);
		return check(st->ctx, cudaMemcpyAsync(reinterpret_cast<void *>(base + l.state), host, bytes, cudaMemcpyHostToDevice, st->s), "head steps: uploading their coefficients");
	}
};

// ---- graphs ----------------------------------------------------------------------------

// key_of is all that a captured run depends on, as bytes: shapes and every address.
std::string key_of(const Chain &c, int64_t first, int64_t count) {
	std::string key;
	auto add = [&](int64_t v) { key.append(reinterpret_cast<const char *>(&v), sizeof v); };
	auto matrix = [&](const margo_mat &m) { add(int64_t(m.p)), add(m.ld), add(m.dtype); };
	auto linear = [&](const margo_linear &m) { matrix(m.w), matrix(m.bias); };
	const Layout &l = c.l;
	for (int64_t v : {int64_t(c.base), l.n, l.r, l.w, l.c, l.depth, l.chunk, count, int64_t(c.guidance != 0), int64_t(c.ids != 0)}) add(v);
	bool tail = first + count == l.steps; // then no projection follows
	add(tail);
	linear(c.w->ada), linear(c.w->final), linear(c.w->input);
	for (int64_t b = 0; b < l.depth; b++) {
		const margo_head_block &k = c.w->blocks[b];
		matrix(k.norm_weight), matrix(k.norm_bias), linear(k.fc1), linear(k.fc2);
	}
	if (!tail) linear(c.weights_of(first + count)->input);
	return key;
}

struct GraphCache {
	static constexpr size_t kMost = 256; // graphs of a context; all go when they are more
	struct Entry {
		cudaGraph_t graph;
		cudaGraphExec_t exec;
		uint64_t kernels;
	};
	std::map<std::string, Entry> entries;
	void clear() {
		for (auto &e : entries) cudaGraphExecDestroy(e.second.exec), cudaGraphDestroy(e.second.graph);
		entries.clear();
	}
};

GraphCache *cache_of(margo_context *c) {
	std::lock_guard<std::mutex> lock(c->mu);
	if (!c->head_graphs) {
		auto cache = std::make_shared<GraphCache>();
		c->head_graphs = cache;
		c->releases.push_back([cache] { cache->clear(); });
	}
	return static_cast<GraphCache *>(c->head_graphs.get());
}

// replay runs count steps as a graph, which it captures the first time.
margo_status replay(const Chain &c, int64_t first, int64_t count) {
	margo_stream *st = c.st;
	margo_context *ctx = st->ctx;
	GraphCache *cache = cache_of(ctx);
	bool tail = first + count == c.l.steps;
	std::string name = key_of(c, first, count);
	std::lock_guard<std::mutex> lock(ctx->graph_mu);
	auto it = cache->entries.find(name);
	if (it == cache->entries.end()) {
		if (cache->entries.size() >= GraphCache::kMost) {
			MARGO_TRY(wait_all(ctx, "waiting before graphs are dropped"));
			cache->clear();
		}
		MARGO_TRY(begin_capture(st));
		margo_status s = MARGO_OK;
		for (int64_t i = 0; i < count && s == MARGO_OK; i++) s = c.step(i, first + i, tail && i + 1 == count);
		GraphCache::Entry e{nullptr, nullptr, st->captured_kernels};
		cudaError_t end = end_capture(st, &e.graph);
		if (s == MARGO_OK) s = check(ctx, end, "capturing head steps");
		if (s == MARGO_OK) s = with_room(ctx, "making the graph of head steps", [&] { return cudaGraphInstantiate(&e.exec, e.graph, 0); });
		if (s != MARGO_OK) {
			if (e.graph) cudaGraphDestroy(e.graph);
			return s;
		}
		it = cache->entries.emplace(name, e).first;
	}
	launching(ctx);
	MARGO_TRY(with_room(ctx, "launching head steps", [&] { return cudaGraphLaunch(it->second.exec, st->s); }));
	std::lock_guard<std::mutex> count_lock(ctx->mu);
	ctx->counters.graph_launches++;
	ctx->counters.graph_kernels += it->second.kernels;
	return MARGO_OK;
}

} // namespace

margo_status op_head_steps_workspace(margo_context *c, const margo_head_steps_args *a, uint64_t budget, uint64_t *bytes) {
	if (a->size != sizeof *a) return fail(c, MARGO_INVALID, "argument struct has %u bytes, this plugin's has %zu", a->size, sizeof *a);
	*bytes = layout(a, budget).bytes;
	return MARGO_OK;
}

margo_status op_head_steps(margo_stream *st, const margo_head_steps_args *a) {
	if (a->x.rows == 0 || a->step_count == 0) return MARGO_OK;
	if (st->capturing) return fail(st->ctx, MARGO_UNSUPPORTED, "head steps make graphs of their own and cannot be captured");
	Chain c{st, a, &a->weights, layout(a, a->workspace_bytes), a->workspace, 0, 0, 0};
	if (c.l.bytes > a->workspace_bytes) return fail(st->ctx, MARGO_INVALID, "head steps: %zu bytes of workspace, %zu needed", size_t(a->workspace_bytes), size_t(c.l.bytes));
	if (c.smem(1) > st->ctx->prop.sharedMemPerBlockOptin)
		return fail(st->ctx, MARGO_UNSUPPORTED, "head steps: a width of %ld does not fit into shared memory", long(c.l.w));
	// Graphs need their operands at fixed places.
	c.x = c.base + c.l.x, c.ids = a->ids.p ? c.base + c.l.ids : 0, c.guidance = a->guidance.p ? c.base + c.l.guidance : 0;
	margo_mat x = mat(c.x, c.l.n, c.l.c, c.l.c);
	MARGO_TRY(op_copy(st, &x, &a->x));
	if (a->ids.p) {
		margo_mat to = mat(c.ids, c.l.n, 2, 2, MARGO_I32);
		MARGO_TRY(op_copy(st, &to, &a->ids));
	}
	if (a->guidance.p) {
		margo_mat to = mat(c.guidance, 1, c.l.n, c.l.n), from = mat(a->guidance.p, 1, c.l.n, c.l.n);
		MARGO_TRY(op_copy(st, &to, &from));
	}
	MARGO_TRY(c.input(0));
	const bool latency = a->path == 2 && head_latency_serves(st->ctx, a);
	const bool graphs = !a->noise.p && !a->trace.p;
	for (int64_t i = 0; i < c.l.steps;) {
		int64_t count = 1;
		while (i + count < c.l.steps && count < c.l.chunk && !a->steps[i].exact == !a->steps[i + count].exact) count++;
		if (a->cancel && __atomic_load_n(a->cancel, __ATOMIC_RELAXED)) return fail(st->ctx, MARGO_CANCELLED, "after %ld of %ld steps", long(i), long(c.l.steps));
		c.w = c.weights_of(i);
		MARGO_TRY(c.upload(i, count));
		MARGO_TRY(c.modulations(i, count));
		margo_status ran = latency && !a->steps[i].exact ? c.latency(i, count) : MARGO_UNSUPPORTED;
		if (ran != MARGO_UNSUPPORTED) {
			MARGO_TRY(ran);
		} else if (graphs && count >= 4) {
			MARGO_TRY(replay(c, i, count));
		} else {
			for (int64_t k = 0; k < count; k++) MARGO_TRY(c.step(k, i + k, i + k + 1 == c.l.steps));
		}
		i += count;
	}
	return op_copy(st, &a->x, &x);
}
