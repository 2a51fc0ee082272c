// attention_f32.cu: attention in f32 without tensor cores, for exact runs and small jobs.
//
// Mapping. A block of 256 threads computes 64 queries of one head of one sequence, keys in
// tiles of 64 with an online softmax. Thread (ty, tx) = (t/16, t%16) holds the 4×4 scores of queries 4ty …
// and keys 4tx …, and of the output queries 4ty …, columns 64j + 4tx … of every 64-column
// chunk j (NC = ⌈dh/64⌉ chunks, up to 8: 128 registers). A query's 16 threads are half a
// warp: its maximum is a butterfly over 4 shuffles.
//
// Shared memory: two tiles of 64 × 68 floats. S = Q·Kᵀ takes chunk after chunk of Q and K, both
// stored transposed ([column][row]); then P (transposed) replaces Q and chunk after chunk of V
// replaces K. Both products read two 16-byte vectors for 16 FFMA.
//
// Numerics: as the oracle (engine/ref): s = (Σ q·k)·scale in f32, columns in order; p = exp(s − m)
// with expf; hidden keys have p = 0 exactly, so that a query's bits depend on its sequence only.
// Σp: keys in order per thread, then a butterfly. Division at the end.
//
// ptxas (sm_80 / sm_90): registers 78 (dh ≤ 64), 127, 128, 235 / 255 (dh ≤ 512); no spills.
#include "attention.cuh"

namespace {

constexpr int TILE = 64, PITCH = TILE + 4, THREADS = 256;

struct Smem {
	float a[TILE][PITCH]; // Q [column][query], then P [key][query]
	float b[TILE][PITCH]; // K [column][key], then V [key][column]
};

// load copies rows map(0) … map(63), 64 columns; rows and cols: those that exist, the others are zeros. Lanes
// run over columns (whole cache lines); transposed stores step over 68 floats, four-way conflicts.
template <bool TRANSPOSE, class Map>
MARGO_DEVICE void load(float (&dst)[TILE][PITCH], const float *src, int ld, int rows, int cols, const Map &map) {
	int c = int(threadIdx.x) % TILE;
#pragma unroll 4
	for (int r = int(threadIdx.x) / TILE; r < TILE; r += THREADS / TILE) {
		float v = r < rows && c < cols ? src[int64_t(map(r)) * ld + c] : 0.0f;
		if (TRANSPOSE) dst[c][r] = v;
		else dst[r][c] = v;
	}
}

// outer adds a[4ty …]·b[4tx …] of every row of the two tiles.
MARGO_DEVICE void outer(float (&acc)[4][4], const Smem &sm, int ty, int tx) {
#pragma unroll 8
	for (int k = 0; k < TILE; k++) {
		float4 a = *reinterpret_cast<const float4 *>(&sm.a[k][4 * ty]), b = *reinterpret_cast<const float4 *>(&sm.b[k][4 * tx]);
		const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
		for (int i = 0; i < 4; i++)
#pragma unroll
			for (int j = 0; j < 4; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
	}
}

template <int NC, bool PAGED> __global__ void __launch_bounds__(THREADS) attention_f32_kernel(Attention p) {
	Smem &sm = gpu::smem<Smem>();
	const Span span(p, int(blockIdx.z));
	const int first = int(blockIdx.x) * TILE, head = int(blockIdx.y), ty = int(threadIdx.x) / 16, tx = int(threadIdx.x) % 16;
	if (first >= span.queries || (PAGED && span.queries == 1)) return; // one query: attention_decode.cu
	const int rows = span.queries - first < TILE ? span.queries - first : TILE, keys = span.visible(p, first + rows - 1);
	const float *q = static_cast<const float *>(p.q) + int64_t(span.q0 + first) * p.ldq + head * p.dh;
	const float *k = static_cast<const float *>(p.k) + head * p.dh, *v = static_cast<const float *>(p.v) + head * p.dh;
	const Rows<PAGED> map(p, span, int(blockIdx.z));
	float o[NC][4][4] = {}, top[4], sum[4];
	int visible[4];
#pragma unroll
	for (int i = 0; i < 4; i++) {
		top[i] = -INFINITY, sum[i] = 0;
		visible[i] = 4 * ty + i < rows ? span.visible(p, first + 4 * ty + i) : 0;
	}
#pragma unroll 1
	for (int at = 0; at < keys; at += TILE) {
		float s[4][4] = {};
#pragma unroll 1
		for (int c = 0; c < p.dh; c += TILE) {
			__syncthreads();
			load<true>(sm.a, q + c, p.ldq, rows, p.dh - c, [](int r) { return r; });
			load<true>(sm.b, k + c, p.ldk, span.keys - at, p.dh - c, [&](int r) { return map(at + r); });
			__syncthreads();
			outer(s, sm, ty, tx);
		}
		__syncthreads();
#pragma unroll
		for (int i = 0; i < 4; i++) {
			float m = top[i];
#pragma unroll
			for (int j = 0; j < 4; j++) {
				s[i][j] = at + 4 * tx + j < visible[i] ? s[i][j] * p.scale : -INFINITY;
				m = fmaxf(m, s[i][j]);
			}
#pragma unroll
			for (int d = 1; d < 16; d *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
			float base = m == -INFINITY ? 0.0f : m, shrink = expf(top[i] - base);
			top[i] = m;
			sum[i] *= shrink;
#pragma unroll
			for (int j = 0; j < 4; j++) {
				float e = expf(s[i][j] - base);
				sum[i] += e;
				sm.a[4 * tx + j][4 * ty + i] = e;
			}
#pragma unroll
			for (int c = 0; c < NC; c++)
#pragma unroll
				for (int j = 0; j < 4; j++) o[c][i][j] *= shrink;
		}
#pragma unroll
		for (int c = 0; c < NC; c++) {
			__syncthreads();
			load<false>(sm.b, v + c * TILE, p.ldv, span.keys - at, p.dh - c * TILE, [&](int r) { return map(at + r); });
			__syncthreads();
			outer(o[c], sm, ty, tx);
		}
	}
	uint32_t bad[4];
#pragma unroll
	for (int i = 0; i < 4; i++) {
#pragma unroll
		for (int d = 1; d < 16; d *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
		float *to = static_cast<float *>(p.o) + int64_t(span.q0 + first + 4 * ty + i) * p.ldo + head * p.dh;
		bool ok = true;
#pragma unroll
		for (int c = 0; c < NC; c++)
#pragma unroll
			for (int j = 0; j < 4; j++) {
				float x = visible[i] > 0 ? o[c][i][j] / sum[i] : 0.0f;
				ok = ok && finite(x);
				int col = c * TILE + 4 * tx + j;
				if (4 * ty + i < rows && col < p.dh) to[col] = x;
			}
		bad[i] = __ballot_sync(0xffffffffu, visible[i] > 0 && !ok);
	}
	if (bad[0] | bad[1] | bad[2] | bad[3]) {
		__syncwarp(); // the rows are written again, by other lanes
		for (int half = 0; half < 2; half++) {
#pragma unroll
			for (int i = 0; i < 4; i++)
				if (bad[i] >> (16 * half) & 0xffff) redo<float, NC * TILE>(p, span, map, head, first + 4 * (ty / 2 * 2 + half) + i, 0, p.dh);
		}
	}
}

template <int NC> margo_status launch(margo_stream *st, const char *name, const Attention &p, const margo_attention_args *a) {
	return run(st, name, p.blocks ? attention_f32_kernel<NC, true> : attention_f32_kernel<NC, false>, attention_grid(a, TILE), dim3(THREADS), sizeof(Smem), p);
}

} // namespace

margo_status attention_f32(margo_stream *st, const Attention &p, const margo_attention_args *a) {
	if (p.dh <= 64) return launch<1>(st, "attention_f32_64", p, a);
	if (p.dh <= 128) return launch<2>(st, "attention_f32_128", p, a);
	if (p.dh <= 256) return launch<4>(st, "attention_f32_256", p, a);
	if (p.dh <= 512) return launch<8>(st, "attention_f32_512", p, a);
	return fail(st->ctx, MARGO_UNSUPPORTED, "attention: heads of %d columns, at most 512", p.dh);
}
