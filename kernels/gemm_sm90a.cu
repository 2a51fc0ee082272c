// gemm_sm90a.cu: y = residual + gate ⊙ act(x·wᵀ + bias) on Hopper, x and w bf16 with rows at multiples of
// 16 bytes.
//
// A block has one warpgroup that copies (TMA, one thread of it works) and one or two that compute
// (wgmma, 64 rows each), joined by a ring of S stages of 64 columns: `full` counts the bytes that have
// come, `empty` the warps that have finished reading. The grid is persistent; while the computing
// warpgroups run the epilogue of a tile, the other one already fetches the next.
//
//	tile      stages  shared memory  accumulators a thread
//	128×256   4       213 KiB        128
//	128×128   5       196 KiB        64
//	64×128    6       162 KiB        64
//	64×64     6       106 KiB        32, two blocks a multiprocessor
//	64×32     8       106 KiB        16, two blocks a multiprocessor
//
// With two computing warpgroups registers move to them from the copying one.
//
// Registers: 168, 168, 185, 122, 87, no spills (nvcc 13.5). Main loop: 4 HGMMA for 64 columns.
//
// Every output is one chain of k16 products in ascending k, whatever the tile: the choice of the tile does not change
// a bit. Tails need no code: TMA fills with zeros, stores are predicated.
//
// Epilogue: a warp passes its 16 rows through shared memory of its own, 32 or 64 columns at a time, so that whole
// rows go out; biases and residuals are requested before the last products have come. Nothing hides it but the tail of the other
// warpgroup, so its latency counts: at K = 768 it is the larger part of a tile that does not.
#include "gemm_sm90a.cuh"

#include <cstdlib>
#include <cstring>

#include "gemm.cuh"
#include "margo_sm90.cuh"

namespace {

// A warp passes its sums through shared memory CW columns at a time, rows CW + 8 floats apart: pairs of 4
// rows touch every bank once.
template <int BN> constexpr int kChunk = BN == 128 ? 64 : 32; // CW

template <int WGS, int BN, int S> struct alignas(1024) Memory {
	bf16 a[S][WGS * 64 * 64];
	bf16 b[S][BN * 64];
	float staged[WGS * 4][16 * (kChunk<BN> + 8)];
	uint64_t full[S], empty[S];
};

struct Params {
	Epilogue e;
	int32_t m, n, tiles_m, tiles_n, steps, one_per_sm; // steps: of 64 columns
};

// Chunk is the lane's part of 16 × CW outputs whose first is element (row, col): 4 columns of every RP-th row. What the
// epilogue adds is requested before the sums are there.
template <int CW> struct Chunk {
	static constexpr int LANES = CW / 4, RP = 32 / LANES, N = 16 / RP; // lanes of a row, rows of a pass, passes
	float bias[4], residual[N][4];
	int row, col;
	bool vector;

	MARGO_DEVICE void begin(const Epilogue &e, int first_row, int first_col, int m, int n) {
		const int lane = threadIdx.x % 32;
		row = first_row + lane / LANES, col = first_col + lane % LANES * 4;
		vector = e.vector && col + 4 <= n;
#pragma unroll
		for (int j = 0; j < 4; j++) bias[j] = 0;
		if (e.bias) {
			if (vector)
				load4<true>(bias, e.bias + col, 4);
			else
				load4<false>(bias, e.bias + col, n - col);
		}
		if (!e.residual) return;
		const float *p = e.residual + int64_t(row) * e.ldr + col;
		const int64_t step = RP * e.ldr;
#pragma unroll
		for (int i = 0; i < N; i++, p += step) {
			const bool in = row + i * RP < m;
			if (vector && in)
				load4<true>(residual[i], p, 4);
			else
				load4<false>(residual[i], p, in ? n - col : 0);
		}
	}

	template <int ACT> static MARGO_DEVICE void activate_all(float (&v)[N][4]) {
#pragma unroll
		for (int i = 0; i < N; i++)
#pragma unroll
			for (int j = 0; j < 4; j++) v[i][j] = activate(ACT, v[i][j]);
	}

	// finish takes the sums from shared memory.
	MARGO_DEVICE void finish(const Epilogue &e, const float *staged, int m, int n) const {
		const int lane = threadIdx.x % 32;
		float v[N][4];
#pragma unroll
		for (int i = 0; i < N; i++) {
			load4<true>(v[i], staged + (lane / LANES + i * RP) * (CW + 8) + lane % LANES * 4, 4);
#pragma unroll
			for (int j = 0; j < 4; j++) v[i][j] = __fadd_rn(v[i][j], bias[j]);
		}
		switch (e.act) {
		case MARGO_GELU_ERF: activate_all<MARGO_GELU_ERF>(v); break;
		case MARGO_GELU_TANH: activate_all<MARGO_GELU_TANH>(v); break;
		case MARGO_SILU: activate_all<MARGO_SILU>(v); break;
		}
		if (e.gate) { // never contracted: the same bits on every path
#pragma unroll
			for (int i = 0; i < N; i++) {
				const int r = row + i * RP;
				const float *p = e.gate + int64_t(uint32_t(r) / uint32_t(e.gate_rows)) * e.ldg + col;
				float gate[4];
				if (vector && r < m)
					load4<true>(gate, p, 4);
				else
					load4<false>(gate, p, r < m ? n - col : 0);
#pragma unroll
				for (int j = 0; j < 4; j++) v[i][j] = __fmul_rn(gate[j], v[i][j]);
			}
		}
		if (e.residual) {
#pragma unroll
			for (int i = 0; i < N; i++)
#pragma unroll
				for (int j = 0; j < 4; j++) v[i][j] = __fadd_rn(residual[i][j], v[i][j]);
		}
		if (col >= n) return;
		if (e.y_bf16)
			store(static_cast<bf16 *>(e.y) + int64_t(row) * e.ldy + col, RP * e.ldy, v, m, n);
		else
			store(static_cast<float *>(e.y) + int64_t(row) * e.ldy + col, RP * e.ldy, v, m, n);
	}
	template <class T> MARGO_DEVICE void store(T *y, int64_t step, const float (&v)[N][4], int m, int n) const {
#pragma unroll
		for (int i = 0; i < N; i++, y += step) {
			if (row + i * RP >= m) continue;
			if (vector)
				store4<true>(y, v[i], 4);
			else
				store4<false>(y, v[i], n - col);
		}
	}
};

template <int WGS, int BN, int S>
__global__ void __launch_bounds__(WGS * 128 + 128, BN <= 64 ? 2 : 1) gemm_wgmma(const __grid_constant__ CUtensorMap xmap, const __grid_constant__ CUtensorMap wmap,
                                                                               const __grid_constant__ Params p) {
	char *base = &gpu::smem<char>();
	base += -gpu::shared_address(base) & 1023;
	auto &mem = *reinterpret_cast<Memory<WGS, BN, S> *>(base);
	if (threadIdx.x == 0) {
		for (int s = 0; s < S; s++) gpu::mbarrier_init(&mem.full[s], 1), gpu::mbarrier_init(&mem.empty[s], WGS * 4);
		gpu::mbarrier_init_fence();
	}
	__syncthreads();
	const int tiles = p.tiles_m * p.tiles_n;
	int slot = 0;
	uint32_t parity = 0; // of the ring's round

	if (threadIdx.x >= WGS * 128) { // copies
		if constexpr (WGS == 2) gpu::registers_down<40>();
		if (threadIdx.x != WGS * 128) return;
		gpu::tma_prefetch_map(&xmap), gpu::tma_prefetch_map(&wmap);
		for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
			int64_t tm, tn;
			tile_of(t, p.tiles_m, p.tiles_n, tm, tn);
			for (int k = 0; k < p.steps; k++) {
				gpu::mbarrier_wait(&mem.empty[slot], parity ^ 1);
				gpu::mbarrier_arrive_expect(&mem.full[slot], (WGS * 64 + BN) * 128);
				gpu::tma_load(mem.a[slot], &xmap, k * 64, int(tm) * WGS * 64, &mem.full[slot]);
				gpu::tma_load(mem.b[slot], &wmap, k * 64, int(tn) * BN, &mem.full[slot]);
				if (++slot == S) slot = 0, parity ^= 1;
			}
		}
		return;
	}

	if constexpr (WGS == 2) gpu::registers_up<232>();
	const int wg = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
		int64_t tm, tn;
		tile_of(t, p.tiles_m, p.tiles_n, tm, tn);
		float acc[BN / 2];
		int last = 0; // slot of the products under way
		for (int k = 0; k < p.steps; k++) {
			gpu::mbarrier_wait(&mem.full[slot], parity);
			const uint64_t a = gpu::wgmma_tile(mem.a[slot] + wg * 64 * 64), b = gpu::wgmma_tile(mem.b[slot]);
			gpu::wgmma_fence();
#pragma unroll
			for (int j = 0; j < 4; j++) gpu::wgmma_bf16<BN>(acc, a + j * 2, b + j * 2, k > 0 || j > 0); // 32 bytes on
			gpu::wgmma_commit();
			gpu::wgmma_wait<1>();
			if (k > 0 && lane == 0) gpu::mbarrier_arrive(&mem.empty[last]);
			last = slot;
			if (++slot == S) slot = 0, parity ^= 1;
		}

		constexpr int CW = kChunk<BN>, pitch = CW + 8;
		float *staged = mem.staged[warp];
		const int row = int(tm) * WGS * 64 + warp * 16, col = int(tn) * BN;
		Chunk<CW> chunk;
		chunk.begin(p.e, row, col, p.m, p.n);
		gpu::wgmma_wait<0>();
		if (lane == 0) gpu::mbarrier_arrive(&mem.empty[last]);
#pragma unroll
		for (int c = 0; c < BN / CW; c++) {
			if (c > 0) chunk.begin(p.e, row, col + c * CW, p.m, p.n);
			__syncwarp(); // the previous columns have been read
#pragma unroll
			for (int j = 0; j < CW / 8; j++) {
				float *q = staged + lane / 4 * pitch + j * 8 + lane % 4 * 2;
				const float *d = acc + (c * (CW / 8) + j) * 4;
				*reinterpret_cast<float2 *>(q) = make_float2(d[0], d[1]);
				*reinterpret_cast<float2 *>(q + 8 * pitch) = make_float2(d[2], d[3]);
			}
			__syncwarp();
			chunk.finish(p.e, staged, p.m, p.n);
		}
	}
}

template <int WGS, int BN, int S> margo_status launch_tiles(margo_stream *st, const char *name, const margo_gemm_args *a, Params p, int blocks_per_sm) {
	CUtensorMap xmap, wmap;
	const bf16 *w = ptr<bf16>(a->w) + a->n0 * a->w.ld;
	if (!gpu::tensor_map_bf16(&xmap, ptr<void>(a->x), a->y.rows, a->w.cols, a->x.ld, WGS * 64)) return MARGO_UNSUPPORTED;
	if (!gpu::tensor_map_bf16(&wmap, w, a->y.cols, a->w.cols, a->w.ld, BN)) return MARGO_UNSUPPORTED;
	p.tiles_m = int(ceil_div(p.m, WGS * 64)), p.tiles_n = int(ceil_div(p.n, BN));
	int64_t most = int64_t(st->ctx->prop.multiProcessorCount) * blocks_per_sm, tiles = int64_t(p.tiles_m) * p.tiles_n;
	return run(st, name, gemm_wgmma<WGS, BN, S>, dim3(unsigned(tiles < most ? tiles : most)), dim3(WGS * 128 + 128), sizeof(Memory<WGS, BN, S>) + 1024, xmap, wmap, p);
}

// choose_tile takes the tile with the least estimated time: the outputs that the busiest multiprocessor computes,
// times what an output costs in that tile. Costs are relative to 128×128 and fitted to times measured on an H200 (docs/gpu.md):
// small tiles move more operand bytes for an output, which tells once k is long; a tile of two blocks a multiprocessor
// is slower alone, because only the other block hides its waits.
int choose_tile(int64_t m, int64_t n, int64_t k, int64_t sms) {
	static const struct {
		int bm, bn, blocks;
		double cost, long_k;
	} tiles[kSm90Tiles] = {{128, 256, 1, 1.25, 1.1}, {128, 128, 1, 1.0, 1.0}, {64, 128, 1, 1.4, 1.4}, {64, 64, 2, 1.2, 1.9}, {64, 32, 2, 1.5, 2.8}};
	int best = 0;
	double least = 0;
	for (int i = 0; i < kSm90Tiles; i++) {
		int64_t load = ceil_div(ceil_div(m, tiles[i].bm) * ceil_div(n, tiles[i].bn), sms);
		double t = double(load) * tiles[i].bm * tiles[i].bn * (k > 1024 ? tiles[i].long_k : tiles[i].cost);
		if (load == 1 && tiles[i].blocks == 2) t /= 0.6;
		if (i == 0 || t < least) best = i, least = t;
	}
	return best;
}

} // namespace

bool sm90a_enabled(const margo_context *c) {
	static const bool off = [] {
		const char *v = getenv("MARGO_SM90");
		return v && !strcmp(v, "0");
	}();
	return !off && c->cc() == 90;
}

bool gemm_sm90a_serves(const margo_context *c, const margo_gemm_args *a) {
	auto fits = [](const margo_mat &m) { return m.dtype == MARGO_BF16 && m.p % 16 == 0 && m.ld % 8 == 0 && m.ld >= m.cols && m.ld < int64_t(1) << 36; };
	const int64_t most = int64_t(1) << 30; // rows and columns are counted in 32 bits
	return sm90a_enabled(c) && fits(a->x) && fits(a->w) && a->w.cols > 0 && a->w.cols < most && a->y.rows < most && a->y.cols < most &&
	       ceil_div(a->y.rows, 64) * ceil_div(a->y.cols, 32) < most;
}

margo_status gemm_sm90a(margo_stream *st, const margo_gemm_args *a, int tile) {
	Params p{};
	p.e = make_epilogue(a->bias, a->n0, a->gate, a->gate_rows, a->residual, a->y, a->act);
	p.m = int32_t(a->y.rows), p.n = int32_t(a->y.cols), p.steps = int32_t(ceil_div(a->w.cols, 64));
	if (p.e.gate_rows > p.m) p.e.gate_rows = p.m > 0 ? p.m : 1; // one gate row for all: divided in 32 bits
	if (tile < 0) tile = choose_tile(p.m, p.n, a->w.cols, st->ctx->prop.multiProcessorCount);
	switch (tile) {
	case 0: return launch_tiles<2, 256, 4>(st, "gemm_sm90a_128x256", a, p, 1);
	case 1: return launch_tiles<2, 128, 5>(st, "gemm_sm90a_128x128", a, p, 1);
	case 2: return launch_tiles<1, 128, 6>(st, "gemm_sm90a_64x128", a, p, 1);
	case 3: return launch_tiles<1, 64, 6>(st, "gemm_sm90a_64x64", a, p, 2);
	}
	return launch_tiles<1, 32, 8>(st, "gemm_sm90a_64x32", a, p, 2);
}
