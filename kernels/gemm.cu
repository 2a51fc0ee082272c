// gemm.cu: y = residual + gate ⊙ act(x·wᵀ + bias).
//
// BF16 weights: mma.m16n8k16 with cp.async through 3 to 6 stages of shared memory, tiles of
// 128×256, 128×128, 64×64 and 32×32. F32 weights: fma, tiles of 128×128 and 64×64. The tile is
// chosen by how many blocks it gives, and does not change a bit of the result (gemm.cuh).
//
// Hopper multiplies what is aligned by kernels of its own (gemm_sm90a.cuh). Here
// operands that are not aligned to 16 bytes, and F32 rows that meet BF16 weights, are loaded
// element by element and converted on the way to shared memory.
#include <cstdlib>

#include "gemm.cuh"
#include "gemm_sm90a.cuh"

namespace {

struct Operand { // rows of X
	const void *p;
	int64_t ld;
	int32_t bf16_in, aligned;
};

struct GemmParams {
	Operand x;
	Weight w; // from row n0 on
	int64_t m, n, k;
	Epilogue e;
};

template <int BM, int BN, int WM, int WN, int S, bool ASYNC>
__global__ void __launch_bounds__(WM *WN * 32, BM * BN > 128 * 128 ? 1 : 2) gemm_bf16(const GemmParams p) {
	auto &mem = gpu::smem<TileMemory<BM, BN, S>>();
	int64_t tm, tn;
	tile_of(blockIdx.x, (p.m + BM - 1) / BM, (p.n + BN - 1) / BN, tm, tn);
	int bm = int(tm), bn = int(tn);
	const int64_t m0 = tm * BM, n0 = tn * BN;
	RowCopy<BM, WM * WN * 32> copy(p.x.p, p.x.ld, m0, p.m);
	auto load_a = [&](bf16 *slot, int left, auto whole) {
		if constexpr (ASYNC) {
			if (decltype(whole)::value) copy.whole(slot);
			else copy.part(slot, left);
		} else {
#pragma unroll
			for (int i = threadIdx.x; i < BM * 8; i += WM * WN * 32) {
				int r = i / 8, c = i % 8;
				int64_t row = m0 + r, kk = p.k - left + c * 8;
				bool in = row < p.m && kk < p.k;
				uint4 v = make_uint4(0, 0, 0, 0);
				if (in && !p.x.bf16_in && p.x.aligned && kk + 8 <= p.k) {
					const float4 *q = reinterpret_cast<const float4 *>(static_cast<const float *>(p.x.p) + row * p.x.ld + kk);
					float4 u = q[0], t = q[1];
					v = make_uint4(gpu::pack_bf16(u.x, u.y), gpu::pack_bf16(u.z, u.w), gpu::pack_bf16(t.x, t.y), gpu::pack_bf16(t.z, t.w));
				} else if (in) {
					v = p.x.bf16_in ? load8(static_cast<const bf16 *>(p.x.p) + row * p.x.ld, kk, p.k) : load8(static_cast<const float *>(p.x.p) + row * p.x.ld, kk, p.k);
				}
				*reinterpret_cast<uint4 *>(swizzled(slot, r, c)) = v;
			}
		}
	};
	float acc[BM / WM / 16][BN / WN / 8][4];
	mma_tile<BM, BN, WM, WN, S, ASYNC>(acc, mem, p.w, n0, p.n, int(p.k), load_a);
	keep(bm), keep(bn); // the loop has no registers for m0 and n0
	store_tile<BM, BN, WM, WN, S>(acc, mem, p.e, int64_t(bm) * BM, int64_t(bn) * BN, p.m, p.n);
}

template <int BM, int BN> __global__ void __launch_bounds__(256) gemm_f32(const GemmParams p) {
	auto &mem = gpu::smem<TileMemoryF32<BM, BN>>();
	int64_t tm, tn;
	tile_of(blockIdx.x, (p.m + BM - 1) / BM, (p.n + BN - 1) / BN, tm, tn);
	const int64_t m0 = tm * BM, n0 = tn * BN;
	auto load = [&](float(&v)[4], const void *base, int64_t ld, int is_bf16, bool aligned, int64_t row, int64_t rows, int64_t k) {
		int64_t n = row < rows ? p.k - k : 0;
		if (is_bf16) {
			load4<false>(v, static_cast<const bf16 *>(base) + (n > 0 ? row * ld + k : 0), n);
			return;
		}
		const float *q = static_cast<const float *>(base) + (n > 0 ? row * ld + k : 0);
		if (aligned && n >= 4)
			load4<true>(v, q, n);
		else
			load4<false>(v, q, n);
	};
	float acc[BM / 16][BN / 16];
	fma_tile<BM, BN>(
		acc, mem, p.k, [&](float(&v)[4], int, int r, int64_t k) { load(v, p.x.p, p.x.ld, p.x.bf16_in, p.x.aligned, m0 + r, p.m, k); },
		[&](float(&v)[4], int, int r, int64_t k) { load(v, p.w.p, p.w.ld, p.w.bf16_in, p.w.aligned, n0 + r, p.n, k); });
	store_tile_f32<BM, BN>(acc, p.e, m0, n0, p.m, p.n);
}

template <int BM, int BN, int WM, int WN, int S> margo_status launch_bf16(margo_stream *st, const char *name, const char *plain, const GemmParams &p, bool async) {
	int64_t blocks = ceil_div(p.m, BM) * ceil_div(p.n, BN);
	dim3 grid{unsigned(blocks)}, block{WM * WN * 32};
	size_t smem = sizeof(TileMemory<BM, BN, S>);
	return async ? run(st, name, gemm_bf16<BM, BN, WM, WN, S, true>, grid, block, smem, p) : run(st, plain, gemm_bf16<BM, BN, WM, WN, S, false>, grid, block, smem, p);
}

} // namespace

Epilogue make_epilogue(const margo_mat &bias, int64_t n0, const margo_mat &gate, int64_t gate_rows, const margo_mat &residual, const margo_mat &y, int act) {
	Epilogue e{};
	e.bias = bias.p ? ptr<float>(bias) + n0 : nullptr;
	e.gate = ptr<float>(gate), e.ldg = gate.ld, e.gate_rows = gate_rows > 0 ? gate_rows : 1;
	e.residual = ptr<float>(residual), e.ldr = residual.ld;
	e.y = ptr<void>(y), e.ldy = y.ld, e.y_bf16 = y.dtype == MARGO_BF16;
	e.act = act;
	auto fours = [](const margo_mat &m) { return !m.p || aligned(m, m.dtype == MARGO_BF16 ? 8 : 16); };
	e.vector = fours(gate) && fours(residual) && fours(y) && reinterpret_cast<uintptr_t>(e.bias) % 16 == 0;
	return e;
}

margo_status op_gemm(margo_stream *st, const margo_gemm_args *a) {
	if (st->ctx->cublaslt) {
		margo_status s = gemm_cublaslt(st, a);
		if (s != MARGO_UNSUPPORTED) return s;
	}
	if (gemm_sm90a_serves(st->ctx, a)) {
		margo_status s = gemm_sm90a(st, a);
		if (s != MARGO_UNSUPPORTED) return s;
	}
	return gemm_mma(st, a);
}

margo_status gemm_mma(margo_stream *st, const margo_gemm_args *a) {
	GemmParams p{};
	p.m = a->y.rows, p.n = a->y.cols, p.k = a->w.cols;
	if (p.m == 0 || p.n == 0) return MARGO_OK;
	int size = a->w.dtype == MARGO_BF16 ? 2 : 4;
	p.x = {ptr<void>(a->x), a->x.rows > 1 ? a->x.ld : 0, a->x.dtype == MARGO_BF16, aligned(a->x, 16)};
	p.w = {ptr<char>(a->w) + a->n0 * a->w.ld * size, a->w.ld, a->w.dtype == MARGO_BF16, aligned(a->w, 16) && a->w.ld * size % 16 == 0 && a->w.ld < 1 << 30};
	p.e = make_epilogue(a->bias, a->n0, a->gate, a->gate_rows, a->residual, a->y, a->act);
	const int64_t sms = st->ctx->prop.multiProcessorCount;
	auto blocks = [&](int bm, int bn) { return ceil_div(p.m, bm) * ceil_div(p.n, bn); };
	if (blocks(32, 32) > int64_t(0x7fffffff)) return fail(st->ctx, MARGO_UNSUPPORTED, "gemm: %ld x %ld outputs are too many for one launch", long(p.m), long(p.n));
	if (a->w.dtype != MARGO_BF16) {
		if (blocks(128, 128) >= sms)
			return run(st, "gemm_f32_128x128", gemm_f32<128, 128>, dim3(unsigned(blocks(128, 128))), dim3(256), sizeof(TileMemoryF32<128, 128>), p);
		return run(st, "gemm_f32_64x64", gemm_f32<64, 64>, dim3(unsigned(blocks(64, 64))), dim3(256), sizeof(TileMemoryF32<64, 64>), p);
	}
	if (p.k > INT32_MAX - 512) return fail(st->ctx, MARGO_UNSUPPORTED, "gemm: sums of %ld products are too long", long(p.k));
	bool async = p.x.bf16_in && p.x.aligned && p.w.aligned && p.x.ld < 1 << 30;
	const bool wide = sizeof(TileMemory<128, 256, 3>) <= st->ctx->prop.sharedMemPerBlockOptin; // 144 KiB: not on 8.6, 8.9 and 12.0, which have 99
	if (wide && blocks(128, 256) >= sms) return launch_bf16<128, 256, 2, 4, 3>(st, "gemm_bf16_128x256", "gemm_bf16_128x256_convert", p, async);
	if (blocks(128, 128) >= sms) return launch_bf16<128, 128, 2, 4, 3>(st, "gemm_bf16_128x128", "gemm_bf16_128x128_convert", p, async);
	if (p.m > 32 && blocks(64, 64) >= sms / 2) return launch_bf16<64, 64, 2, 2, 4>(st, "gemm_bf16_64x64", "gemm_bf16_64x64_convert", p, async);
	return launch_bf16<32, 32, 1, 2, 6>(st, "gemm_bf16_32x32", "gemm_bf16_32x32_convert", p, async);
}
