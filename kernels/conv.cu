// conv.cu: convolutions as implicit GEMM in NHWC: rows are output pixels, columns output
// channels, and k runs over (ky, kx, cin), which is W's layout. The main loops and the epilogue
// are gemm.cuh's; only where a row's elements come from differs: each chunk of 8 (bf16) or 4
// (f32) columns lies in one tap when Cin is a multiple of that, and is then copied at once, zeros
// for the padding; other Cin are gathered element by element. Nearest ×2 upsampling halves
// coordinates on the way. Sums run over k in ascending order whatever the tile.
#include "gemm.cuh"

namespace {

struct ConvParams {
	const void *x;
	Weight w;
	int64_t m, n, k; // output pixels, output channels, taps·cin
	int32_t x_bf16, whole; // whole: chunks lie in one tap and are aligned
	int64_t ldx; // elements between pixels
	int32_t h, wd, ho, wo, cin, kernel, stride, pad_top, pad_left, up;
	Epilogue e;
};

struct Pixel { // of the output
	int64_t image; // first element of its image
	int32_t y, x;  // input coordinates of tap (0, 0); y is far outside if there is no such pixel
};

MARGO_DEVICE Pixel pixel_of(const ConvParams &p, int64_t r) {
	if (r >= p.m) return {0, -(1 << 28), 0};
	int64_t image = r / (int64_t(p.ho) * p.wo);
	int32_t in = int32_t(r - image * p.ho * p.wo), oy = in / p.wo, ox = in - oy * p.wo;
	return {image * p.h * p.wd * p.ldx, oy * p.stride - p.pad_top, ox * p.stride - p.pad_left};
}

// source finds the element of X that tap t sees at channel c; -1 in the padding.
MARGO_DEVICE int64_t source(const ConvParams &p, const Pixel &px, int32_t t, int32_t c) {
	int32_t ky = t / p.kernel, y = px.y + ky, x = px.x + t - ky * p.kernel;
	if (y < 0 || x < 0 || y >= p.h << p.up || x >= p.wd << p.up) return -1;
	return px.image + (int64_t(y >> p.up) * p.wd + (x >> p.up)) * p.ldx + c;
}

MARGO_DEVICE float element(const ConvParams &p, const Pixel &px, int64_t k) {
	if (k >= p.k) return 0;
	int32_t t = int32_t(k / p.cin);
	int64_t at = source(p, px, t, int32_t(k - int64_t(t) * p.cin));
	if (at < 0) return 0;
	return p.x_bf16 ? to_f32(static_cast<const bf16 *>(p.x)[at]) : static_cast<const float *>(p.x)[at];
}

template <int BM, int BN, int WM, int WN, int S, bool ASYNC> __global__ void __launch_bounds__(WM *WN * 32, 1) conv_bf16(const ConvParams p) {
	constexpr int threads = WM * WN * 32, mine = BM * 8 / threads; // chunks that a thread brings of each stage
	auto &mem = gpu::smem<TileMemory<BM, BN, S>>();
	int64_t tm, tn;
	tile_of(blockIdx.x, (p.m + BM - 1) / BM, (p.n + BN - 1) / BN, tm, tn);
	const int64_t m0 = tm * BM, n0 = tn * BN;
	const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
	Pixel px[mine];
#pragma unroll
	for (int i = 0; i < mine; i++) px[i] = pixel_of(p, m0 + row + i * (threads / 8));
	auto load_a = [&](bf16 *slot, int left, auto) {
		const int64_t k = p.k - left + chunk * 8;
		const int32_t t = int32_t(k / p.cin), c = int32_t(k - int64_t(t) * p.cin);
#pragma unroll
		for (int i = 0; i < mine; i++) {
			bf16 *dst = swizzled(slot, row + i * (threads / 8), chunk);
			int64_t at = p.whole && k < p.k ? source(p, px[i], t, c) : -1;
			if constexpr (ASYNC) {
				gpu::cp_async16(dst, static_cast<const bf16 *>(p.x) + (at < 0 ? 0 : at), at < 0 ? 0 : 16);
			} else {
				uint4 v = make_uint4(0, 0, 0, 0);
				if (p.whole) {
					if (at >= 0) {
						const float4 *q = reinterpret_cast<const float4 *>(static_cast<const float *>(p.x) + at);
						float4 u = q[0], z = q[1];
						v = make_uint4(gpu::pack_bf16(u.x, u.y), gpu::pack_bf16(u.z, u.w), gpu::pack_bf16(z.x, z.y), gpu::pack_bf16(z.z, z.w));
					}
				} else {
					float f[8];
#pragma unroll
					for (int e = 0; e < 8; e++) f[e] = element(p, px[i], k + e);
					v = make_uint4(gpu::pack_bf16(f[0], f[1]), gpu::pack_bf16(f[2], f[3]), gpu::pack_bf16(f[4], f[5]), gpu::pack_bf16(f[6], f[7]));
				}
				*reinterpret_cast<uint4 *>(dst) = v;
			}
		}
	};
	float acc[BM / WM / 16][BN / WN / 8][4];
	mma_tile<BM, BN, WM, WN, S, ASYNC>(acc, mem, p.w, n0, p.n, int(p.k), load_a);
	store_tile<BM, BN, WM, WN, S>(acc, mem, p.e, m0, n0, p.m, p.n);
}

template <int BM, int BN> __global__ void __launch_bounds__(256) conv_f32(const ConvParams p) {
	auto &mem = gpu::smem<TileMemoryF32<BM, BN>>();
	int64_t tm, tn;
	tile_of(blockIdx.x, (p.m + BM - 1) / BM, (p.n + BN - 1) / BN, tm, tn);
	const int64_t m0 = tm * BM, n0 = tn * BN;
	constexpr int mine = BM * 16 / 256 / 4;
	Pixel px[mine]; // rows tid/4 + 64·i
#pragma unroll
	for (int i = 0; i < mine; i++) px[i] = pixel_of(p, m0 + threadIdx.x / 4 + i * 64);
	float acc[BM / 16][BN / 16];
	fma_tile<BM, BN>(
		acc, mem, p.k,
		[&](float(&v)[4], int i, int, int64_t k) {
			const Pixel &q = px[i];
			if (p.whole) {
				int32_t t = int32_t(k / p.cin);
				int64_t at = k < p.k ? source(p, q, t, int32_t(k - int64_t(t) * p.cin)) : -1;
				if (at >= 0) load4<true>(v, static_cast<const float *>(p.x) + at, 4);
				else v[0] = v[1] = v[2] = v[3] = 0;
				return;
			}
#pragma unroll
			for (int e = 0; e < 4; e++) v[e] = element(p, q, k + e);
		},
		[&](float(&v)[4], int, int r, int64_t k) {
			int64_t left = n0 + r < p.n ? p.k - k : 0;
			if (p.w.bf16_in) {
				load4<false>(v, static_cast<const bf16 *>(p.w.p) + (left > 0 ? (n0 + r) * p.w.ld + k : 0), left);
				return;
			}
			const float *q = static_cast<const float *>(p.w.p) + (left > 0 ? (n0 + r) * p.w.ld + k : 0);
			if (p.w.aligned && left >= 4) load4<true>(v, q, left);
			else load4<false>(v, q, left);
		});
	store_tile_f32<BM, BN>(acc, p.e, m0, n0, p.m, p.n);
}

template <int BM, int BN, int WM, int WN, int S> margo_status launch(margo_stream *st, const char *name, const char *convert, const ConvParams &p, bool async) {
	dim3 grid{unsigned(ceil_div(p.m, BM) * ceil_div(p.n, BN))}, block{WM * WN * 32};
	size_t smem = sizeof(TileMemory<BM, BN, S>);
	return async ? run(st, name, conv_bf16<BM, BN, WM, WN, S, true>, grid, block, smem, p) : run(st, convert, conv_bf16<BM, BN, WM, WN, S, false>, grid, block, smem, p);
}

} // namespace

margo_status op_conv2d(margo_stream *st, const margo_conv2d_args *a) {
	ConvParams p{};
	p.m = a->n * a->ho * a->wo, p.n = a->w.rows, p.k = a->w.cols;
	if (p.m == 0 || p.n == 0) return MARGO_OK;
	if (a->h > 1 << 24 || a->wd > 1 << 24) return fail(st->ctx, MARGO_UNSUPPORTED, "conv2d: images of %ld x %ld are too large", long(a->h), long(a->wd));
	p.x = ptr<void>(a->x), p.ldx = a->x.ld, p.x_bf16 = a->x.dtype == MARGO_BF16;
	const bool tensor = a->w.dtype == MARGO_BF16;
	int size = tensor ? 2 : 4;
	p.w = {ptr<void>(a->w), a->w.ld, tensor, aligned(a->w, 16) && a->w.ld * size % 16 == 0 && a->w.ld < 1 << 30};
	p.h = int32_t(a->h), p.wd = int32_t(a->wd), p.ho = int32_t(a->ho), p.wo = int32_t(a->wo), p.cin = int32_t(a->x.cols);
	p.kernel = a->kernel, p.stride = a->stride, p.pad_top = a->pad_top, p.pad_left = a->pad_left, p.up = a->upsample ? 1 : 0;
	p.e = make_epilogue(a->bias, 0, {}, 0, a->residual, a->y, MARGO_IDENTITY);
	// A chunk is 8 elements where the tensor cores take it, 4 else, and is loaded in words of 16 bytes.
	p.whole = p.cin % (tensor ? 8 : 4) == 0 && aligned(a->x, 16) && (tensor || !p.x_bf16);
	const int64_t sms = st->ctx->prop.multiProcessorCount;
	auto blocks = [&](int bm, int bn) { return ceil_div(p.m, bm) * ceil_div(p.n, bn); };
	if (blocks(64, 64) > int64_t(0x7fffffff)) return fail(st->ctx, MARGO_UNSUPPORTED, "conv2d: %ld pixels are too many for one launch", long(p.m));
	if (!tensor) {
		if (blocks(128, 128) >= sms && p.n >= 96) return run(st, "conv_f32_128x128", conv_f32<128, 128>, dim3(unsigned(blocks(128, 128))), dim3(256), sizeof(TileMemoryF32<128, 128>), p);
		return run(st, "conv_f32_64x64", conv_f32<64, 64>, dim3(unsigned(blocks(64, 64))), dim3(256), sizeof(TileMemoryF32<64, 64>), p);
	}
	if (p.k > INT32_MAX - 512) return fail(st->ctx, MARGO_UNSUPPORTED, "conv2d: sums of %ld products are too long", long(p.k));
	bool async = p.x_bf16 && p.whole && p.w.aligned;
	if (p.x_bf16 && !async) p.whole = 0;
	if (blocks(128, 128) >= sms && p.n >= 96) return launch<128, 128, 2, 4, 3>(st, "conv_bf16_128x128", "conv_bf16_128x128_convert", p, async);
	return launch<64, 64, 2, 2, 4>(st, "conv_bf16_64x64", "conv_bf16_64x64_convert", p, async);
}
