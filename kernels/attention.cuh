// attention.cuh: what the two attention kernels share.
#pragma once

#include <math.h>

#include "margo.cuh"
#include "plugin.h"
#include "reduce.cuh"

// Attention is margo_attention_args as the kernels take it.
struct Attention {
	const void *q, *k, *v;
	void *o;
	const int32_t *qoff, *koff;
	int ldq, ldk, ldv, ldo; // elements
	int dh, causal;
	float scale;
	const int32_t *blocks; // [sequences][row_blocks], or null: the rows of a sequence follow one another
	int row_blocks, block_size, block_count;
	uint32_t *error;
};

// The kernels' launches; grid: tiles of rows queries × heads × sequences.
margo_status attention_f32(margo_stream *, const Attention &, const margo_attention_args *);
margo_status attention_decode(margo_stream *, const Attention &, const margo_attention_args *); // paged sequences of one query
template <bool PAGED> margo_status attention_bf16(margo_stream *, const Attention &, const margo_attention_args *);
inline dim3 attention_grid(const margo_attention_args *a, int rows) {
	return dim3(unsigned(ceil_div(a->max_q, rows)), unsigned(a->heads), unsigned(a->seqs));
}


// Span is one sequence: its rows of Q, O and of K, V.
struct Span {
	int q0, k0, queries, keys;
	MARGO_DEVICE Span(const Attention &p, int s)
	    : q0(p.qoff[s]), k0(p.koff[s]), queries(p.qoff[s + 1] - p.qoff[s]), keys(p.koff[s + 1] - p.koff[s]) {}
	// visible is the number of keys that query i sees.
	MARGO_DEVICE int visible(const Attention &p, int i) const {
		if (!p.causal) return keys;
		int n = keys - queries + i + 1;
		return n < 0 ? 0 : n > keys ? keys : n;
	}
};

// Rows finds the row of K and V that holds key j of a sequence.
template <bool PAGED> struct Rows {
	int first;
	MARGO_DEVICE Rows(const Attention &, const Span &span, int) : first(span.k0) {}
	MARGO_DEVICE int operator()(int j) const { return first + j; }
};
template <> struct Rows<true> {
	const int32_t *table;
	int size, count, sequence;
	uint32_t *error;
	MARGO_DEVICE Rows(const Attention &p, const Span &, int s)
	    : table(p.blocks + int64_t(s) * p.row_blocks), size(p.block_size), count(p.block_count), sequence(s), error(p.error) {}
	MARGO_DEVICE int operator()(int j) const {
		int i = int(unsigned(j) / unsigned(size)), b = table[i];
		if (unsigned(b) >= unsigned(count)) { // reported by the next wait
			atomicMax(error, DEVICE_ERROR_BLOCKS + uint32_t(sequence));
			b = 0;
		}
		return b * size + (j - i * size);
	}
};

// redo computes columns c0 … c1-1 of query i of a head anew, key by key, by a whole warp. A value that is not
// finite spoils the queries of its tile that may not see it (0·NaN is NaN): rows with a result that is
// not finite come here, where no hidden key is touched.
template <class T, int D, class Map> MARGO_DEVICE void redo(const Attention &p, const Span &span, const Map &map, int head, int i, int c0, int c1) {
	constexpr int N = (D + 31) / 32;
	int lane = int(threadIdx.x) % 32, n = span.visible(p, i);
	const T *q = static_cast<const T *>(p.q) + int64_t(span.q0 + i) * p.ldq + head * p.dh;
	float x[N], o[N] = {}, top = -INFINITY, sum = 0;
#pragma unroll
	for (int j = 0; j < N; j++) x[j] = 32 * j + lane < p.dh ? to_f32(q[32 * j + lane]) : 0.0f;
	for (int key = 0; key < n; key++) {
		int64_t row = map(key);
		const T *k = static_cast<const T *>(p.k) + row * p.ldk + head * p.dh;
		const T *v = static_cast<const T *>(p.v) + row * p.ldv + head * p.dh;
		float dot = 0;
#pragma unroll
		for (int j = 0; j < N; j++)
			if (32 * j + lane < p.dh) dot = fmaf(x[j], to_f32(k[32 * j + lane]), dot);
		float s = warp_sum(dot) * p.scale, higher = fmaxf(top, s);
		float shrink = higher == top ? 1.0f : expf(top - higher), e = expf(s - higher);
		top = higher;
		sum = fmaf(sum, shrink, e);
		e = to_f32(from_f32<T>(e));
#pragma unroll
		for (int j = 0; j < N; j++)
			if (32 * j + lane < p.dh) o[j] = fmaf(e, to_f32(v[32 * j + lane]), o[j] * shrink);
	}
	T *to = static_cast<T *>(p.o) + int64_t(span.q0 + i) * p.ldo + head * p.dh;
#pragma unroll
	for (int j = 0; j < N; j++) {
		int c = 32 * j + lane;
		if (c >= c0 && c < c1 && c < p.dh) to[c] = from_f32<T>(n > 0 ? o[j] / sum : 0.0f);
	}
}

MARGO_DEVICE bool finite(float v) { return fabsf(v) <= 3.402823466e38f; }
