// gemm.cuh: the main loops of matrix products, and the epilogue that op_gemm, op_conv2d
// and the head share. A loader says where the rows of X come from.
//
// Every output element is one chain of multiply-adds over k in ascending order (bf16:
// mma.m16n8k16 steps; f32: one fma each), whatever the tile, so a result depends on its
// own row and column only: not on the number of rows, nor on the tile that was chosen.
#pragma once

#include <type_traits>

#include "act.cuh"
#include "plugin.h"

// Epilogue: y = residual + gate ⊙ act(acc + bias), pointers of element (0, 0); null: absent.
struct Epilogue {
	const float *bias, *gate, *residual;
	void *y;
	int64_t ldg, gate_rows, ldr, ldy;
	int32_t act, y_bf16, vector; // vector: y, residual, bias and gate can be read four elements at a time
};

// epilogue_four stores elements (r, c) … (r, c+3), as far as they exist; c is a multiple of 4.
template <bool VEC> MARGO_DEVICE void epilogue_four(const Epilogue &e, float (&v)[4], int64_t r, int64_t c, int64_t n) {
	float t[4];
	if (e.bias) {
		load4<VEC>(t, e.bias + c, n - c);
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] += t[i];
	}
	if (e.act != MARGO_IDENTITY) {
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] = activate(e.act, v[i]);
	}
	if (e.gate) {
		load4<VEC>(t, e.gate + r / e.gate_rows * e.ldg + c, n - c);
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] *= t[i];
	}
	if (e.residual) {
		load4<VEC>(t, e.residual + r * e.ldr + c, n - c);
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] += t[i];
	}
	if (e.y_bf16)
		store4<VEC>(static_cast<bf16 *>(e.y) + r * e.ldy + c, v, n - c);
	else
		store4<VEC>(static_cast<float *>(e.y) + r * e.ldy + c, v, n - c);
}

// epilogue_tile runs the epilogue over a BM × BN tile of sums in shared memory (row stride ld): whole
// rows of 16 bytes go out, and the activation's code exists once, not for every register.
template <int BM, int BN>
MARGO_DEVICE void epilogue_tile(const Epilogue &e, const float *tile, int ld, int threads, int64_t m0, int64_t n0, int64_t m, int64_t n) {
#pragma unroll 1
	for (int i = threadIdx.x; i < BM * BN / 4; i += threads) {
		int r = i / (BN / 4), c = i % (BN / 4) * 4;
		if (m0 + r >= m || n0 + c >= n) continue;
		float v[4];
		load4<true>(v, tile + r * ld + c, 4);
		if (e.vector && n0 + c + 4 <= n)
			epilogue_four<true>(e, v, m0 + r, n0 + c, n);
		else
			epilogue_four<false>(e, v, m0 + r, n0 + c, n);
	}
}

// Weight: W [N, K] from row n0 on, as packed by the device or as it is.
struct Weight {
	const void *p;
	int64_t ld;
	int32_t bf16_in, aligned; // aligned: rows begin at multiples of 16 bytes
};

// tile_of spreads the blocks of a one-dimensional grid over tiles so that blocks that run
// together share rows of X and of W in L2: bands of 8 tile rows.
MARGO_DEVICE void tile_of(int64_t block, int64_t tiles_m, int64_t tiles_n, int64_t &tm, int64_t &tn) {
	int64_t band = block / (8 * tiles_n), first = band * 8, rows = tiles_m - first < 8 ? tiles_m - first : 8, in = block - band * 8 * tiles_n;
	tm = first + in % rows;
	tn = in / rows;
}

// load8 brings elements k … k+7 of a row as bf16 into 16 bytes of shared memory, zeros from end on.
template <class T> MARGO_DEVICE uint4 load8(const T *row, int64_t k, int64_t end) {
	float v[8];
#pragma unroll
	for (int i = 0; i < 8; i++) v[i] = k + i < end ? to_f32(row[k + i]) : 0.0f;
	return make_uint4(gpu::pack_bf16(v[0], v[1]), gpu::pack_bf16(v[2], v[3]), gpu::pack_bf16(v[4], v[5]), gpu::pack_bf16(v[6], v[7]));
}

// ---- bf16: tensor cores --------------------------------------------------------

// Tile of BM × BN × 64 per block, WM × WN warps, S stages of shared memory. Rows of a tile are
// 128 bytes = 8 chunks of 16; chunk c of row r lies at c ^ (r & 7), so that both the copies in
// and ldmatrix touch every bank once.
template <int BM, int BN, int S> struct TileMemory {
	struct {
		bf16 a[BM * 64], b[BN * 64];
	} stage[S];
};

MARGO_DEVICE bf16 *swizzled(bf16 *tile, int row, int chunk) { return tile + row * 64 + ((chunk ^ (row & 7)) << 3); }

// RowCopy brings rows of a bf16 matrix, aligned to 16 bytes and less than 2^31 bytes apart, into a tile of ROWS by cp.async. Thread t
// copies chunk t%8 of rows t/8 + j·STEP: one place in the tile and one in memory, from which the others are constant distances away.
// Rows from the end on become zeros.
template <int ROWS, int THREADS> struct RowCopy {
	static constexpr int STEP = THREADS / 8, N = ROWS / STEP;
	static_assert(STEP % 8 == 0 && ROWS % STEP == 0);
	const char *src;
	int pitch, rows, chunk, at; // bytes between rows; rows that there are from this thread's first on; this thread's chunk, and the first one's place
	MARGO_DEVICE RowCopy(const void *p, int64_t ld, int64_t first, int64_t end) {
		const int row = int(threadIdx.x) / 8;
		chunk = int(threadIdx.x) % 8, at = row * 64 + ((chunk ^ (row & 7)) << 3);
		src = static_cast<const char *>(p) + ((first + row) * ld + chunk * 8) * 2;
		pitch = int(ld * 2), rows = end - first < ROWS ? int(end - first) - row : ROWS;
	}
	// whole copies the next 64 columns, which all exist; part those of them that do, left.
	MARGO_DEVICE void whole(bf16 *tile) {
		keep(pitch), keep(rows); // else what follows from them fills registers
#pragma unroll
		for (int j = 0; j < N; j++) gpu::cp_async16(tile + at + j * STEP * 64, src + int64_t(j * STEP) * pitch, j * STEP < rows ? 16 : 0);
		src += 128;
	}
	MARGO_DEVICE void part(bf16 *tile, int left) {
		const int bytes = (left - chunk * 8) * 2;
#pragma unroll 1
		for (int j = 0; j < N; j++)
			gpu::cp_async16(tile + at + j * STEP * 64, src + int64_t(j * STEP) * pitch, j * STEP < rows && bytes > 0 ? bytes < 16 ? bytes : 16 : 0);
		src += 128;
	}
};

// mma_tile computes the block's tile: acc[i][j] is the m16n8 tile (i, j) of the warp. load_a(slot, left, whole)
// starts bringing the next 64 columns of the block's rows of X into slot: left are not there yet; whole (a std::bool_constant): at
// least 64. ASYNC: W is aligned, and its rows are less than 2^31 bytes apart.
//
// The loop over k takes steps whose copies are whole; a second one the last steps, which copy what is left or nothing.
// Instructions bound the first: a copy costs it one for the address and one for the edge of the matrix, and what ldmatrix reads in
// chunk 2·kk is an exclusive or away from what it reads in chunk 0.
template <int BM, int BN, int WM, int WN, int S, bool ASYNC, class LoadA>
MARGO_DEVICE void mma_tile(float (&acc)[BM / WM / 16][BN / WN / 8][4], TileMemory<BM, BN, S> &mem, const Weight &w, int64_t n_first, int64_t n_end, int k,
                           LoadA load_a) {
	constexpr int MI = BM / WM / 16, NI = BN / WN / 8, threads = WM * WN * 32, STAGE = sizeof mem.stage[0];
	static_assert(NI % 2 == 0 && STAGE % 128 == 0);
	const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
	const int steps = k / 64 + (k % 64 != 0);
	RowCopy<BN, threads> copy_b(w.p, w.ld, n_first, n_end);

	int left = k; // columns that no stage has
	auto load = [&](int to, auto whole) {
		auto &stage = *reinterpret_cast<decltype(&mem.stage[0])>(reinterpret_cast<char *>(&mem) + to);
		load_a(stage.a, left, whole);
		if constexpr (ASYNC) {
			if (decltype(whole)::value) copy_b.whole(stage.b);
			else copy_b.part(stage.b, left);
		} else if (w.aligned) {
			copy_b.part(stage.b, left);
		} else {
#pragma unroll 1
			for (int i = int(threadIdx.x); i < BN * 8; i += threads) {
				const int64_t n = n_first + i / 8;
				uint4 v = make_uint4(0, 0, 0, 0);
				if (n < n_end) v = load8(static_cast<const bf16 *>(w.p) + n * w.ld, k - left + i % 8 * 8, k);
				*reinterpret_cast<uint4 *>(swizzled(stage.b, i / 8, i % 8)) = v;
			}
		}
	};
	// What a lane reads first of A and of B, in bytes from a stage's start: rows of 16 lanes, then chunks (A); the other way round (B).
	const int at_a = (warp / WN * (BM / WM) + lane % 16) * 128 + ((lane / 16 ^ (lane & 7)) << 4);
	const int at_b = BM * 128 + (warp % WN * (BN / WN) + (lane & 7) + (lane >> 4) * 8) * 128 + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
	auto multiply = [&](int from) {
		auto at = [&](int i) { return reinterpret_cast<const char *>(&mem) + i; };
#pragma unroll
		for (int kk = 0; kk < 4; kk++) {
			uint32_t fa[MI][4], fb[NI][2];
			const char *a = at((from + at_a) ^ kk * 32), *b = at((from + at_b) ^ kk * 32);
#pragma unroll
			for (int i = 0; i < MI; i++) gpu::ldmatrix_x4(fa[i], a + i * 16 * 128);
#pragma unroll
			for (int j = 0; j < NI; j += 2) {
				uint32_t r[4];
				gpu::ldmatrix_x4(r, b + j * 8 * 128);
				fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
			}
#pragma unroll
			for (int i = 0; i < MI; i++)
#pragma unroll
				for (int j = 0; j < NI; j++) gpu::mma_bf16(acc[i][j], fa[i], fb[j]);
		}
	};
#pragma unroll
	for (int i = 0; i < MI; i++)
#pragma unroll
		for (int j = 0; j < NI; j++)
#pragma unroll
			for (int e = 0; e < 4; e++) acc[i][j][e] = 0;

#pragma unroll 1
	for (int s = 0; s < S - 1; s++, left -= 64) {
		if (ASYNC && left >= 64) load(s * STAGE, std::true_type{});
		else if (left > 0) load(s * STAGE, std::false_type{});
		gpu::cp_async_commit();
	}
	int from = 0, to = (S - 1) * STAGE; // bytes: the stage that is read, and that which was read last
	auto step = [&](auto whole) {
		gpu::cp_async_wait<S - 2>();
		__syncthreads(); // stage t has come for all; stage t-1 has been read by all
		if (decltype(whole)::value || left > 0) load(to, whole);
		gpu::cp_async_commit();
		multiply(from);
		to = from, from = from == (S - 1) * STAGE ? 0 : from + STAGE, left -= 64;
	};
	if constexpr (ASYNC) {
#pragma unroll 1
		while (left >= 64) step(std::true_type{});
	}
#pragma unroll 1
	for (int t = (k - left) / 64 - (S - 1); t < steps; t++) step(std::false_type{});
	gpu::cp_async_wait<0>();
}

// store_tile hands the block's sums to the epilogue, through shared memory that the main loop has
// left. A row stride of BN + 8 floats spreads a warp's pairs over all banks.
template <int BM, int BN, int WM, int WN, int S>
MARGO_DEVICE void store_tile(const float (&acc)[BM / WM / 16][BN / WN / 8][4], TileMemory<BM, BN, S> &mem, const Epilogue &e, int64_t m0, int64_t n0, int64_t m,
                             int64_t n) {
	constexpr int ld = BN + 8;
	static_assert(sizeof mem >= BM * ld * 4);
	float *tile = reinterpret_cast<float *>(&mem);
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const int row = warp / WN * (BM / WM) + lane / 4, col = warp % WN * (BN / WN) + lane % 4 * 2;
	__syncthreads(); // all have read the last stage
#pragma unroll
	for (int i = 0; i < BM / WM / 16; i++)
#pragma unroll
		for (int j = 0; j < BN / WN / 8; j++) {
			float *p = tile + (row + i * 16) * ld + col + j * 8;
			*reinterpret_cast<float2 *>(p) = make_float2(acc[i][j][0], acc[i][j][1]);
			*reinterpret_cast<float2 *>(p + 8 * ld) = make_float2(acc[i][j][2], acc[i][j][3]);
		}
	__syncthreads();
	epilogue_tile<BM, BN>(e, tile, ld, WM * WN * 32, m0, n0, m, n);
}

// ---- f32: fma --------------------------------------------------------------------

// Tile of BM × BN × 16 with 256 threads, each TM × TN elements; both operands lie k-major in two
// buffers, so that a step of k reads consecutive elements. The next tile waits in registers.
// load_a(v, i, r, k) reads columns k … k+3 of row r; i counts the thread's loads (constant once
// unrolled), r is threadIdx.x / 4 + 64·i.
template <int BM, int BN> struct TileMemoryF32 {
	float a[2][16][BM + 4];
	float b[2][16][BN + 4];
};

template <int BM, int BN, class LoadA, class LoadB>
MARGO_DEVICE void fma_tile(float (&acc)[BM / 16][BN / 16], TileMemoryF32<BM, BN> &mem, int64_t k, LoadA load_a, LoadB load_b) {
	constexpr int TM = BM / 16, TN = BN / 16, NA = BM * 16 / 256 / 4, NB = BN * 16 / 256 / 4;
	const int tid = threadIdx.x, ty = tid / 16, tx = tid % 16;
	float ra[NA][4], rb[NB][4];
	auto fetch = [&](int64_t k0) {
#pragma unroll
		for (int i = 0; i < NA; i++) load_a(ra[i], i, (tid + i * 256) / 4, k0 + (tid + i * 256) % 4 * 4);
#pragma unroll
		for (int i = 0; i < NB; i++) load_b(rb[i], i, (tid + i * 256) / 4, k0 + (tid + i * 256) % 4 * 4);
	};
	auto put = [&](int s) {
#pragma unroll
		for (int i = 0; i < NA; i++)
#pragma unroll
			for (int e = 0; e < 4; e++) mem.a[s][(tid + i * 256) % 4 * 4 + e][(tid + i * 256) / 4] = ra[i][e];
#pragma unroll
		for (int i = 0; i < NB; i++)
#pragma unroll
			for (int e = 0; e < 4; e++) mem.b[s][(tid + i * 256) % 4 * 4 + e][(tid + i * 256) / 4] = rb[i][e];
	};
#pragma unroll
	for (int i = 0; i < TM; i++)
#pragma unroll
		for (int j = 0; j < TN; j++) acc[i][j] = 0;
	const int64_t steps = (k + 15) / 16;
	if (steps > 0) fetch(0), put(0);
	__syncthreads();
	for (int64_t t = 0; t < steps; t++) {
		if (t + 1 < steps) fetch((t + 1) * 16);
		const int s = int(t & 1);
		const int64_t left = k - t * 16; // a partial tile stops where k ends: no zeros are added
		auto step = [&](int kk) {
			float va[TM], vb[TN];
#pragma unroll
			for (int i = 0; i < TM; i += 4) {
				float4 q = *reinterpret_cast<const float4 *>(&mem.a[s][kk][ty * 4 + i * 16]);
				va[i] = q.x, va[i + 1] = q.y, va[i + 2] = q.z, va[i + 3] = q.w;
			}
#pragma unroll
			for (int j = 0; j < TN; j += 4) {
				float4 q = *reinterpret_cast<const float4 *>(&mem.b[s][kk][tx * 4 + j * 16]);
				vb[j] = q.x, vb[j + 1] = q.y, vb[j + 2] = q.z, vb[j + 3] = q.w;
			}
#pragma unroll
			for (int i = 0; i < TM; i++)
#pragma unroll
				for (int j = 0; j < TN; j++) acc[i][j] = fmaf(va[i], vb[j], acc[i][j]);
		};
		if (left >= 16) {
#pragma unroll
			for (int kk = 0; kk < 16; kk++) step(kk);
		} else {
			for (int kk = 0; kk < int(left); kk++) step(kk);
		}
		if (t + 1 < steps) put(1 - s);
		__syncthreads();
	}
}

// Thread (ty, tx) holds rows ty·4 + 64·(i/4) + i%4 and columns tx·4 + 64·(j/4) + j%4 of the tile.
template <int BM, int BN>
MARGO_DEVICE void store_tile_f32(float (&acc)[BM / 16][BN / 16], const Epilogue &e, int64_t m0, int64_t n0, int64_t m, int64_t n) {
	const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
	for (int i = 0; i < BM / 16; i++)
#pragma unroll
		for (int j = 0; j < BN / 16; j += 4) {
			int64_t r = m0 + ty * 4 + i / 4 * 64 + i % 4, c = n0 + tx * 4 + j / 4 * 64;
			if (r >= m || c >= n) continue;
			float v[4] = {acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]};
			if (e.vector && c + 4 <= n)
				epilogue_four<true>(e, v, r, c, n);
			else
				epilogue_four<false>(e, v, r, c, n);
		}
}

// make_epilogue describes an epilogue whose columns begin at row n0 of W (the bias's index).
Epilogue make_epilogue(const margo_mat &bias, int64_t n0, const margo_mat &gate, int64_t gate_rows, const margo_mat &residual, const margo_mat &y, int act);

// gemm_mma is op_gemm without the paths of single architectures.
margo_status gemm_mma(margo_stream *, const margo_gemm_args *);
