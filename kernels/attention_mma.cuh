// attention_mma.cuh: fused attention forward in bf16 on tensor cores (mma.sync), one pass over the keys
// with an online softmax (FlashAttention-2). attention.cu compiles it for sequences whose keys
// are rows in a row, attention_paged.cu for caches of blocks (where attention_decode.cu takes
// sequences of one query).
//
// Mapping. A block computes 16·STRIPS queries of one head of one sequence: warp w owns the 16
// queries of strip w/SPLIT and D/SPLIT columns of the output (SPLIT > 1 only for heads too wide
// for one warp's registers: then S is computed by each of them). Grid: query tiles × heads ×
// sequences; blocks past the end of a short sequence leave at once. Lane l of a warp holds,
// as mma.m16n8k16 wants, rows g = l/4 and g+8 of every 8-column tile, columns 2(l%4) and next.
// Heads: D is the least of 16, 32, 48, 64, 72, 80, 96, 128, 192, 256, 512 that holds dh; columns beyond dh
// are zero. 72 = 4·16 + 8 ends with m16n8k8.
//
// Pipeline. Keys come in tiles of BN, counted from the sequence's own first key. K and V of
// tile j+1 are copied by cp.async into the other of two buffers while tile j is multiplied; one
// barrier per tile. Tiles that all queries see whole and that a whole tile follows take a loop without masks and
// without looking where the sequence ends; the others run the same operations on scores that are masked where
// need be. Instructions bound that loop, so addresses advance by additions, lanes compare their own maxima (a row's is only
// needed when its base moves), and sums are rescaled outside of it: it is left for that and entered again.
//
// Shared memory. Q: 16·STRIPS rows; K, V: 2 buffers of BN rows each; rows of D (+8 where D/8 is
// even) elements: an odd number of 16-byte units, so that the 8 rows of an ldmatrix lie in different banks. Q
// fragments stay in registers for D ≤ 128. The rows of Q hold O at the end, for whole-row stores.
//
// Numerics. S in f32; p = 2^(s·c − base), c = |scale|·log₂e, as one FFMA and ex2 (relative error
// about 2^-22); base is the greatest s·c of some tile so far and moves only when a later one exceeds it by
// 8, so that sums are seldom rescaled (FlashAttention-4) and p ≤ 2^8. Σp of the unrounded p;
// p rounded to bf16 before P·V; f32 sums over keys. For a negative scale Q's signs are flipped. A
// hidden key has p = 0 exactly, a row decides on its base by itself, and a factor of a row
// that has not moved is exactly 1: a query's bits depend on its own sequence only.
// Unaligned rows are loaded element by element into the same tiles.
//
// ptxas (sm_80, sm_90, sm_100), most registers: D = 64 to 80 165 (the limit for three blocks per SM: 168), 128 242, 256 246,
// 512 159; no spills. The loop at D = 64 has 276 instructions on sm_80, 64 of them HMMA.
#pragma once

#include "attention.cuh"

namespace {

template <bool B> struct Const {
	static constexpr bool value = B;
};

template <int D_, int BN_, int STRIPS_, int SPLIT_> struct Plan {
	static constexpr int D = D_, BN = BN_, STRIPS = STRIPS_, SPLIT = SPLIT_;
	static constexpr int ROWS = 16 * STRIPS, THREADS = 32 * STRIPS * SPLIT;
	static constexpr int PITCH = D / 8 % 2 ? D : D + 8;
	static constexpr int COLS = D / SPLIT;    // output columns of a warp
	static constexpr bool KEEP_Q = D <= 128;  // in registers
	struct Tile {
		bf16 k[BN][PITCH], v[BN][PITCH];
	};
	struct Smem {
		bf16 q[ROWS][PITCH];
		Tile tile[2];
	};
};

// Copier moves tiles of rows into shared memory: thread t takes 16-byte unit t mod (D/8) of every
// (THREADS/(D/8))-th row. Rows past the last are copies of the last: keys there are masked (and their
// values multiplied by 0), queries there are not stored. That costs one minimum per row,
// no branch.
template <class P, bool VEC> struct Copier {
	static constexpr int UNITS = P::D / 8, PASS = P::THREADS / UNITS; // rows in one pass
	int row, col, at, bytes, dh;
	MARGO_DEVICE explicit Copier(int dh)
	    : row(int(threadIdx.x / UNITS)), col(int(threadIdx.x % UNITS * 8)), at(row * P::PITCH + col), bytes(col < dh ? 16 : 0), dh(dh) {
		keep(row), keep(at), keep(bytes);
	}
	// rows calls f(r) for this thread's rows r + row of a tile of N.
	template <int N, class F> MARGO_DEVICE void rows(F f) const {
		if (PASS * UNITS < P::THREADS && row >= PASS) return;
#pragma unroll VEC ? (N + PASS - 1) / PASS : 1
		for (int r = 0; r < N; r += PASS)
			if (N % PASS == 0 || r + row < N) f(r);
	}
	// unit copies 8 columns of a row to row r of a tile, dst being this thread's part of row 0; src: column col of row 0,
	// rows are ld2 bytes apart.
	MARGO_DEVICE void unit(bf16 *dst, int r, const bf16 *src, int row, int ld2) const {
		dst += r * P::PITCH;
		if (VEC) {
			gpu::cp_async16(dst, reinterpret_cast<const char *>(src) + int64_t(row) * ld2, bytes);
		} else {
			src += int64_t(row) * (ld2 / 2);
#pragma unroll
			for (int i = 0; i < 8; i++) dst[i] = col + i < dh ? src[i] : bf16{0};
		}
	}
};

// Strip is the state of a warp: 16 queries.
template <class P> struct Strip {
	static constexpr int K16 = P::D / 16, NT = P::BN / 8, OT = P::COLS / 8;
	uint32_t q[P::KEEP_Q ? K16 : 1][4], qt[2]; // qt: the last 8 columns, if D is no multiple of 16
	float o[OT][4], base[2], sum[2];           // of rows g and g+8: Σ pV, minus the exponent that p is relative to, this lane's Σp
	float s[NT][4], m[2];                      // S, then P, of a tile; the greatest s of this lane's keys
	float c;                                   // 2^(c·s)
	int visible[2];                            // keys that the rows see
	int at_q, at_k, at_kt, at_v, t2;           // what this lane reads first of q, of a tile's k (and its last columns) and v; its first column

	MARGO_DEVICE Strip(int strip, int col0) {
		const int lane = int(threadIdx.x % 32);
		at_q = (strip * 16 + (lane & 15)) * P::PITCH + (lane >> 4) * 8;
		at_k = ((lane >> 4) * 8 + (lane & 7)) * P::PITCH + (lane >> 3 & 1) * 8;
		at_kt = lane * P::PITCH + K16 * 16;
		at_v = (lane & 15) * P::PITCH + col0 + (lane >> 4) * 8;
		t2 = 2 * (lane & 3);
		keep(at_k), keep(at_v);
	}

	// scores computes S of the tile at this lane's krow (ktail: its last columns).
	MARGO_DEVICE void scores(const bf16 (&qs)[P::ROWS][P::PITCH], const bf16 *krow, const bf16 *ktail) {
#pragma unroll
		for (int n = 0; n < NT; n++)
#pragma unroll
			for (int i = 0; i < 4; i++) s[n][i] = 0;
#pragma unroll
		for (int kk = 0; kk < K16; kk++) {
			if (!P::KEEP_Q) gpu::ldmatrix_x4(q[0], &qs[0][0] + at_q + kk * 16);
#pragma unroll
			for (int n = 0; n < NT; n += 2) {
				uint32_t b[4];
				gpu::ldmatrix_x4(b, krow + n * 8 * P::PITCH + kk * 16);
				const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
				gpu::mma_bf16(s[n], q[P::KEEP_Q ? kk : 0], b0);
				gpu::mma_bf16(s[n + 1], q[P::KEEP_Q ? kk : 0], b1);
			}
		}
		if constexpr (P::D % 16 != 0) {
#pragma unroll
			for (int n = 0; n < NT; n += 4) {
				uint32_t b[4];
				gpu::ldmatrix_x4(b, ktail + n * 8 * P::PITCH);
#pragma unroll
				for (int i = 0; i < 4; i++) gpu::mma_bf16_k8(s[n + i], qt, b[i]);
			}
		}
	}
	// hide masks the keys that the rows do not see; at is the first one of the tile.
	MARGO_DEVICE void hide(int at) {
#pragma unroll
		for (int n = 0; n < NT; n++)
#pragma unroll
			for (int i = 0; i < 4; i++)
				if (at + n * 8 + t2 + i % 2 >= visible[i / 2]) s[n][i] = -INFINITY;
	}
	// beyond tells if a row's base must move: p may reach 2^8 before sums are rescaled.
	MARGO_DEVICE bool beyond(int h) const { return fmaf(m[h], c, base[h]) > 8.0f; }
	MARGO_DEVICE bool beyond() {
#pragma unroll
		for (int h = 0; h < 2; h++) {
			m[h] = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
			for (int n = 1; n < NT; n++) m[h] = fmaxf(m[h], fmaxf(s[n][2 * h], s[n][2 * h + 1]));
		}
		return __any_sync(0xffffffffu, beyond(0) || beyond(1));
	}
	// rescale moves the bases of the rows that need it.
	MARGO_DEVICE void rescale() {
#pragma unroll
		for (int h = 0; h < 2; h++) {
			m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
			m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
			float old = base[h];
			if (beyond(h)) base[h] = -m[h] * c;
			float shrink = gpu::exp2_fast(base[h] - old);
			sum[h] *= shrink;
#pragma unroll
			for (int n = 0; n < OT; n++) o[n][2 * h] *= shrink, o[n][2 * h + 1] *= shrink;
		}
	}
	// values turns S into P and adds P·V of the tile at this lane's vrow.
	MARGO_DEVICE void values(const bf16 *vrow) {
#pragma unroll
		for (int n = 0; n < NT; n++)
#pragma unroll
			for (int i = 0; i < 4; i++) {
				s[n][i] = gpu::exp2_fast(fmaf(s[n][i], c, base[i / 2]));
				sum[i / 2] += s[n][i];
			}
#pragma unroll
		for (int kk = 0; kk < P::BN / 16; kk++) {
			const uint32_t p[4] = {gpu::pack_bf16(s[2 * kk][0], s[2 * kk][1]), gpu::pack_bf16(s[2 * kk][2], s[2 * kk][3]),
			                       gpu::pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), gpu::pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
			if constexpr (OT % 2 != 0) { // the odd tile first: what lanes 16 … 31 point at exists, too
				uint32_t b[2];
				gpu::ldmatrix_x2_t(b, vrow + kk * 16 * P::PITCH);
				gpu::mma_bf16(o[0], p, b);
			}
#pragma unroll
			for (int n = OT % 2; n < OT; n += 2) {
				uint32_t b[4];
				gpu::ldmatrix_x4_t(b, vrow + kk * 16 * P::PITCH + n * 8);
				const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
				gpu::mma_bf16(o[n], p, b0);
				gpu::mma_bf16(o[n + 1], p, b1);
			}
		}
	}
};

template <class P, bool VEC, bool PAGED> __global__ void __launch_bounds__(P::THREADS, P::D <= 80 ? 3 : 1) attention_kernel(Attention p) {
	typename P::Smem &sm = gpu::smem<typename P::Smem>();
	const Span span(p, int(blockIdx.z));
	const int first = int(blockIdx.x) * P::ROWS, head = int(blockIdx.y);
	if (first >= span.queries || (PAGED && span.queries == 1)) return; // one query: attention_decode.cu
	const int rows = span.queries - first < P::ROWS ? span.queries - first : P::ROWS;
	const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, strip = warp / P::SPLIT, col0 = warp % P::SPLIT * P::COLS;
	const int keys = span.visible(p, first + rows - 1), whole = span.visible(p, first); // keys that some and that all rows see
	const Copier<P, VEC> copier(p.dh);
	const Rows<PAGED> map(p, span, int(blockIdx.z));
	const bf16 *k = static_cast<const bf16 *>(p.k) + head * p.dh + copier.col, *v = static_cast<const bf16 *>(p.v) + head * p.dh + copier.col;
	if (!PAGED) k += int64_t(span.k0 + copier.row) * p.ldk, v += int64_t(span.k0 + copier.row) * p.ldv;
	keep(k), keep(v);
	// fetch starts the copy of the tile that begins with key at, where k and v are this thread's first row; last: the tile may be the
	// sequence's last. It moves k and v on to the next tile.
	int ldk2 = 2 * p.ldk, ldv2 = 2 * p.ldv; // bytes
	keep(ldk2), keep(ldv2);
	auto fetch = [&](auto last, bf16 *to, int at) {
		copier.template rows<P::BN>([&](int r) {
			int row = at + copier.row + r, i = r;
			if (decltype(last)::value) row = row < span.keys ? row : span.keys - 1, i = row - (at + copier.row);
			if (PAGED) i = map(row);
			copier.unit(to, r, k, i, ldk2);
			copier.unit(to + P::BN * P::PITCH, r, v, i, ldv2);
		});
		if (!PAGED) k = reinterpret_cast<const bf16 *>(reinterpret_cast<const char *>(k) + int64_t(P::BN) * ldk2);
		if (!PAGED) v = reinterpret_cast<const bf16 *>(reinterpret_cast<const char *>(v) + int64_t(P::BN) * ldv2);
	};
	const bf16 *q = static_cast<const bf16 *>(p.q) + int64_t(span.q0 + first) * p.ldq + head * p.dh + copier.col;
	copier.template rows<P::ROWS>([&](int r) { copier.unit(&sm.q[0][0] + copier.at, r, q, r + copier.row < rows ? r + copier.row : rows - 1, 2 * p.ldq); });
	if (keys > 0) fetch(Const<true>{}, &sm.tile[0].k[0][0] + copier.at, 0);
	gpu::cp_async_commit();
	gpu::cp_async_wait<0>();
	__syncthreads();

	if (p.scale < 0) { // then the largest score is that of the smallest product
		for (int i = int(threadIdx.x); i < P::ROWS * P::D; i += P::THREADS) sm.q[i / P::D][i % P::D].bits ^= 0x8000;
		__syncthreads();
	}
	Strip<P> w(strip, col0);
	if constexpr (P::KEEP_Q) {
#pragma unroll
		for (int kk = 0; kk < P::D / 16; kk++) gpu::ldmatrix_x4(w.q[kk], &sm.q[0][0] + w.at_q + kk * 16);
		if constexpr (P::D % 16 != 0) gpu::ldmatrix_x2(w.qt, &sm.q[strip * 16 + lane % 16][P::D - 8]);
	}
#pragma unroll
	for (int n = 0; n < Strip<P>::OT; n++)
#pragma unroll
		for (int i = 0; i < 4; i++) w.o[n][i] = 0;
	w.c = fmaxf(fabsf(p.scale) * 1.4426950408889634f, 1.17549435e-38f); // not 0: -inf·0 is NaN
#pragma unroll
	for (int h = 0; h < 2; h++) {
		int row = strip * 16 + h * 8 + lane / 4;
		w.base[h] = 3e38f, w.sum[h] = 0, w.visible[h] = row < rows ? span.visible(p, first + row) : 0;
	}

	constexpr int TILE = sizeof(typename P::Tile);
	char *shared = reinterpret_cast<char *>(&sm.tile[0].k[0][0]);
	// Bytes from there: what the lane reads of the present tile, and where the thread copies the next one to. They
	// change buffers by one addition each.
	int at_k = w.at_k * 2, at_kt = w.at_kt * 2, at_v = P::BN * P::PITCH * 2 + w.at_v * 2, to = TILE + copier.at * 2, other = TILE;
	keep(at_k), keep(at_kt), keep(at_v), keep(to), keep(other);
	int plain = (whole < keys - P::BN ? whole : keys - P::BN) - P::BN; // up to here tiles have no masks, nor have their successors an end
	keep(plain);
	int at = 0;
	auto in = [&](int i) { return reinterpret_cast<const bf16 *>(shared + i); };
	auto scores = [&](auto tail) { // when the tile has come and its predecessor is done with, fetches the successor
		gpu::cp_async_wait<0>();
		__syncthreads();
		if (!decltype(tail)::value || at + P::BN < keys) fetch(tail, reinterpret_cast<bf16 *>(shared + to), at + P::BN);
		gpu::cp_async_commit();
		w.scores(sm.q, in(at_k), in(at_kt));
	};
	auto values = [&] {
		w.values(in(at_v));
		at += P::BN;
		at_k += other, at_v += other, to -= other, other = -other;
		if (P::D % 16 != 0) at_kt -= other;
	};
	auto without_masks = [&] { // the inner loop runs while no row's base moves; on the first tile all do
		scores(Const<false>{});
		w.beyond();
#pragma unroll 1
		for (;;) {
			w.rescale();
#pragma unroll 1
			do {
				values();
				if (at > plain) return;
				scores(Const<false>{});
			} while (!w.beyond());
		}
	};
	if (at <= plain) without_masks();
#pragma unroll 1
	while (at < keys) {
		scores(Const<true>{});
		if (at + P::BN > whole) w.hide(at);
		if (w.beyond()) w.rescale();
		values();
	}

	__syncthreads(); // Q is not needed any more: its rows take O
	uint32_t bad[2];
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float sum = w.sum[h];
		sum += __shfl_xor_sync(0xffffffffu, sum, 1);
		sum += __shfl_xor_sync(0xffffffffu, sum, 2);
		float inverse = 1.0f / sum;
		bool ok = true;
#pragma unroll
		for (int n = 0; n < Strip<P>::OT; n++) {
			float a = w.o[n][2 * h] * inverse, b = w.o[n][2 * h + 1] * inverse;
			ok = ok && finite(a) && finite(b);
			if (w.visible[h] == 0) a = b = 0;
			*reinterpret_cast<uint32_t *>(&sm.q[strip * 16 + h * 8 + lane / 4][col0 + n * 8 + lane % 4 * 2]) = gpu::pack_bf16(a, b);
		}
		bad[h] = __ballot_sync(0xffffffffu, w.visible[h] > 0 && !ok);
	}
	__syncwarp();
	for (int i = lane; i < 16 * P::COLS / 8; i += 32) {
		int row = strip * 16 + i / (P::COLS / 8), col = col0 + i % (P::COLS / 8) * 8;
		if (row >= rows || col >= p.dh) continue;
		bf16 *o = static_cast<bf16 *>(p.o) + int64_t(span.q0 + first + row) * p.ldo + head * p.dh + col;
		if (VEC) {
			*reinterpret_cast<uint4 *>(o) = *reinterpret_cast<const uint4 *>(&sm.q[row][col]);
		} else {
			for (int j = 0; j < 8 && col + j < p.dh; j++) o[j] = sm.q[row][col + j];
		}
	}
	if (bad[0] | bad[1]) {
		__syncwarp(); // the rows are written again, by other lanes
		for (int r = 0; r < 16; r++)
			if ((r < 8 ? bad[0] : bad[1]) >> (r % 8 * 4) & 15) redo<bf16, P::D>(p, span, map, head, first + strip * 16 + r, col0, col0 + P::COLS);
	}
}

template <class P, bool PAGED> margo_status launch_bf16(margo_stream *st, const char *name, const Attention &p, const margo_attention_args *a, bool vec) {
	return run(st, name, vec ? attention_kernel<P, true, PAGED> : attention_kernel<P, false, PAGED>, attention_grid(a, P::ROWS), dim3(P::THREADS),
	           sizeof(typename P::Smem), p);
}

} // namespace

template <bool PAGED> margo_status attention_bf16(margo_stream *st, const Attention &p, const margo_attention_args *a) {
	bool vec = p.dh % 8 == 0 && aligned(a->q, 16) && aligned(a->k, 16) && aligned(a->v, 16) && aligned(a->o, 16);
// A name for reports and traces; tests ask by it whether both paths ran.
#define ATTENTION_NAME(d) vec ? (PAGED ? "attention_paged_" d : "attention_" d) : (PAGED ? "attention_paged_unaligned_" d : "attention_unaligned_" d)
	if (p.dh <= 16) return launch_bf16<Plan<16, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("16"), p, a, vec);
	if (p.dh <= 32) return launch_bf16<Plan<32, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("32"), p, a, vec);
	if (p.dh <= 48) return launch_bf16<Plan<48, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("48"), p, a, vec);
	if (p.dh <= 64) return launch_bf16<Plan<64, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("64"), p, a, vec);
	if (p.dh <= 72) return launch_bf16<Plan<72, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("72"), p, a, vec);
	if (p.dh <= 80) return launch_bf16<Plan<80, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("80"), p, a, vec);
	if (p.dh <= 96) return launch_bf16<Plan<96, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("96"), p, a, vec);
	if (p.dh <= 128) return launch_bf16<Plan<128, 64, 4, 1>, PAGED>(st, ATTENTION_NAME("128"), p, a, vec);
	if (p.dh <= 192) return launch_bf16<Plan<192, 32, 4, 1>, PAGED>(st, ATTENTION_NAME("192"), p, a, vec);
	if (p.dh <= 256) return launch_bf16<Plan<256, 32, 4, 1>, PAGED>(st, ATTENTION_NAME("256"), p, a, vec);
	if (p.dh <= 512) return launch_bf16<Plan<512, 16, 2, 4>, PAGED>(st, ATTENTION_NAME("512"), p, a, vec);
#undef ATTENTION_NAME
	return fail(st->ctx, MARGO_UNSUPPORTED, "attention: heads of %d columns, at most 512", p.dh);
}
