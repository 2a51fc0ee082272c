// attention_decode.cu: attention of a sequence's single new query over its paged cache of keys.
//
// Bound by the cache's bytes, and with few sequences by latency: no tensor cores, no shared-memory
// tiles, as many loads in flight as registers hold.
//
// Mapping. A block of 8 warps per head and sequence. LANES lanes share a key, each with 8
// neighbouring columns (CHUNKS times), so that a warp reads 32/LANES keys at once, one 16-byte (f32: two)
// load per lane and key, and the block splits the keys into 8·32/LANES interleaved parts. A part
// keeps its own maximum, Σp and Σp·v; U keys of it are loaded before the first is used. At the end the parts of
// a warp are merged by a butterfly, those of the warps through shared memory in order.
//
// Numerics: s = (Σ q·k)·scale in f32, p = exp(s − m), rounded to bf16 for bf16 inputs before it meets v; which
// part a key falls to depends on its number only, so that the bits depend on the sequence only. Unaligned rows
// are loaded by element with the same sums.
//
// Shared memory: 8·(columns + 2) floats. Only sequences with one query are done here (the others by
// attention_mma.cuh or attention_f32.cu, which leave these alone).
// ptxas (sm_90): 100 to 123 registers, no spills.
#include "act.cuh"
#include "attention.cuh"

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;

template <int COLS> struct DecodeSmem {
	float o[WARPS][COLS], top[WARPS], sum[WARPS];
};

template <bool VEC, class T> MARGO_DEVICE void load8(float (&v)[8], const T *p, int n) {
	float a[4], b[4];
	load4<VEC>(a, p, n), load4<VEC>(b, p + 4, n - 4);
#pragma unroll
	for (int i = 0; i < 4; i++) v[i] = a[i], v[4 + i] = b[i];
}
template <> MARGO_DEVICE void load8<true, bf16>(float (&v)[8], const bf16 *p, int) {
	uint4 q = *reinterpret_cast<const uint4 *>(p);
	const uint32_t w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
	for (int i = 0; i < 4; i++) v[2 * i] = bits_to_f32(w[i] << 16), v[2 * i + 1] = bits_to_f32(w[i] & 0xffff0000u);
}

template <class T, int LANES, int CHUNKS, bool VEC> __global__ void __launch_bounds__(THREADS) attention_decode_kernel(Attention p) {
	constexpr int COLS = LANES * CHUNKS * 8, PARTS = WARPS * 32 / LANES, U = CHUNKS > 1 ? 2 : 4;
	DecodeSmem<COLS> &sm = gpu::smem<DecodeSmem<COLS>>();
	const int head = int(blockIdx.x), sequence = int(blockIdx.y);
	const Span span(p, sequence);
	if (span.queries != 1) return;
	const Rows<true> map(p, span, sequence);
	const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32), part = warp * (32 / LANES) + lane / LANES;
	int col[CHUNKS]; // this lane's first columns
#pragma unroll
	for (int c = 0; c < CHUNKS; c++) col[c] = (c * LANES + lane % LANES) * 8;
	const T *k = static_cast<const T *>(p.k) + head * p.dh, *v = static_cast<const T *>(p.v) + head * p.dh;
	float q[CHUNKS][8] = {}, o[CHUNKS][8] = {}, top = -INFINITY, sum = 0;
#pragma unroll
	for (int c = 0; c < CHUNKS; c++)
		if (col[c] < p.dh) load8<VEC>(q[c], static_cast<const T *>(p.q) + int64_t(span.q0) * p.ldq + head * p.dh + col[c], p.dh - col[c]);
#pragma unroll 1
	for (int at = 0; at < span.keys; at += U * PARTS) {
		float x[U][CHUNKS][8] = {}, y[U][CHUNKS][8] = {}, s[U];
#pragma unroll
		for (int u = 0; u < U; u++) {
			int key = at + u * PARTS + part;
			if (key >= span.keys) continue;
			int64_t row = map(key);
#pragma unroll
			for (int c = 0; c < CHUNKS; c++)
				if (col[c] < p.dh) {
					load8<VEC>(x[u][c], k + row * p.ldk + col[c], p.dh - col[c]);
					load8<VEC>(y[u][c], v + row * p.ldv + col[c], p.dh - col[c]);
				}
		}
		float m = top;
#pragma unroll
		for (int u = 0; u < U; u++) {
			float dot = 0;
#pragma unroll
			for (int c = 0; c < CHUNKS; c++)
#pragma unroll
				for (int i = 0; i < 8; i++) dot = fmaf(q[c][i], x[u][c][i], dot);
#pragma unroll
			for (int d = 1; d < LANES; d *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, d);
			s[u] = at + u * PARTS + part < span.keys ? dot * p.scale : -INFINITY;
			m = fmaxf(m, s[u]);
		}
		float base = m == -INFINITY ? 0.0f : m, shrink = expf(top - base);
		top = m;
		sum *= shrink;
#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
#pragma unroll
			for (int i = 0; i < 8; i++) o[c][i] *= shrink;
#pragma unroll
		for (int u = 0; u < U; u++) { // a missing key has p = 0 and v = 0
			float e = expf(s[u] - base);
			sum += e;
			e = to_f32(from_f32<T>(e));
#pragma unroll
			for (int c = 0; c < CHUNKS; c++)
#pragma unroll
				for (int i = 0; i < 8; i++) o[c][i] = fmaf(e, y[u][c][i], o[c][i]);
		}
	}
#pragma unroll
	for (int d = LANES; d < 32; d *= 2) {
		float other = __shfl_xor_sync(0xffffffffu, top, d), m = fmaxf(top, other), base = m == -INFINITY ? 0.0f : m;
		float mine = expf(top - base), theirs = expf(other - base);
		sum = sum * mine + __shfl_xor_sync(0xffffffffu, sum, d) * theirs;
#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
#pragma unroll
			for (int i = 0; i < 8; i++) o[c][i] = o[c][i] * mine + __shfl_xor_sync(0xffffffffu, o[c][i], d) * theirs;
		top = m;
	}
	if (lane < LANES) {
#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
#pragma unroll
			for (int i = 0; i < 8; i++) sm.o[warp][col[c] + i] = o[c][i];
		if (lane == 0) sm.top[warp] = top, sm.sum[warp] = sum;
	}
	__syncthreads();
	float m = sm.top[0], factor[WARPS];
#pragma unroll
	for (int w = 1; w < WARPS; w++) m = fmaxf(m, sm.top[w]);
	m = m == -INFINITY ? 0.0f : m, sum = 0;
#pragma unroll
	for (int w = 0; w < WARPS; w++) factor[w] = expf(sm.top[w] - m), sum = fmaf(sm.sum[w], factor[w], sum);
	T *to = static_cast<T *>(p.o) + int64_t(span.q0) * p.ldo + head * p.dh;
	for (int c = int(threadIdx.x); c < p.dh; c += THREADS) {
		float x = 0;
#pragma unroll
		for (int w = 0; w < WARPS; w++) x = fmaf(sm.o[w][c], factor[w], x);
		to[c] = from_f32<T>(span.keys > 0 ? x / sum : 0.0f);
	}
}

template <class T, int LANES, int CHUNKS> margo_status launch(margo_stream *st, const char *name, const Attention &p, const margo_attention_args *a, bool vec) {
	return run(st, name, vec ? attention_decode_kernel<T, LANES, CHUNKS, true> : attention_decode_kernel<T, LANES, CHUNKS, false>,
	           dim3(unsigned(a->max_q > 0 ? a->heads : 0), unsigned(a->seqs)), dim3(THREADS), sizeof(DecodeSmem<LANES * CHUNKS * 8>), p);
}

template <class T> margo_status dispatch(margo_stream *st, const Attention &p, const margo_attention_args *a) {
	bool vec = p.dh % 8 == 0 && aligned(a->q, 16) && aligned(a->k, 16) && aligned(a->v, 16);
	if (p.dh <= 16) return launch<T, 2, 1>(st, vec ? "attention_decode_16" : "attention_decode_unaligned_16", p, a, vec);
	if (p.dh <= 64) return launch<T, 8, 1>(st, vec ? "attention_decode_64" : "attention_decode_unaligned_64", p, a, vec);
	if (p.dh <= 128) return launch<T, 16, 1>(st, vec ? "attention_decode_128" : "attention_decode_unaligned_128", p, a, vec);
	if (p.dh <= 256) return launch<T, 32, 1>(st, vec ? "attention_decode_256" : "attention_decode_unaligned_256", p, a, vec);
	if (p.dh <= 512) return launch<T, 32, 2>(st, vec ? "attention_decode_512" : "attention_decode_unaligned_512", p, a, vec);
	return fail(st->ctx, MARGO_UNSUPPORTED, "attention: heads of %d columns, at most 512", p.dh);
}

} // namespace

margo_status attention_decode(margo_stream *st, const Attention &p, const margo_attention_args *a) {
	return a->q.dtype == MARGO_F32 ? dispatch<float>(st, p, a) : dispatch<bf16>(st, p, a);
}
