// margo_sm90.cuh: Hopper's instructions for kernels in files *_sm90a.cu: mbarriers, copies of
// tiles by the tensor memory accelerator (TMA), products by warpgroups (wgmma), registers moved between
// warpgroups. Only sm_90a has them; nothing else may include this file.
//
// An emulator of a wrapper must check what its comment demands.
#pragma once

#include "margo.cuh"

#ifndef __CUDACC__
#include "emu/sm90.h"
#else
#include <cuda.h> // types only: the driver's functions are looked up at run time

namespace gpu {

// ---- mbarriers: 8 bytes of shared memory ---------------------------------------------
//
// A phase ends when `count` arrivals have come and all bytes expected in it have been
// copied. Waiting names the parity of the phase: the first phase has parity 0, and a wait for
// parity 1 of a fresh barrier passes at once. A thread must not fall two phases behind.

// mbarrier_init: by one thread, then mbarrier_init_fence by it, then __syncthreads.
__device__ __forceinline__ void mbarrier_init(uint64_t *b, int count) {
	asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t *b) {
	asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(shared_address(b)) : "memory");
}
// mbarrier_arrive_expect arrives and adds bytes to what the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *b, int bytes) {
	asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t *b, uint32_t parity) {
	asm volatile("{\n\t.reg .pred p;\n\tW%=:\n\tmbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n\t@!p bra W%=;\n\t}" ::"r"(shared_address(b)),
	             "r"(parity)
	             : "memory");
}

// ---- TMA ------------------------------------------------------------------------------

// tma_load copies the box of map at column x and row y to shared memory, rows of 128 bytes with the
// 16-byte chunks of row r (of every 8) exchanged by c ^ r; zeros outside of the matrix. Its bytes are
// counted at b. dst is a multiple of 1024 bytes; by one thread.
__device__ __forceinline__ void tma_load(void *dst, const CUtensorMap *map, int x, int y, uint64_t *b) {
	asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3}],[%4];" ::"r"(shared_address(dst)), "l"(map), "r"(x),
	             "r"(y), "r"(shared_address(b))
	             : "memory");
}
// tma_load_head: the same of a map of heads; a box of 16 columns has rows of 32 bytes with chunks exchanged by
// c ^ r/4 mod 2, and dst is a multiple of 256 bytes.
__device__ __forceinline__ void tma_load_head(void *dst, const CUtensorMap *map, int x, int head, int y, uint64_t *b) {
	asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3,%4}],[%5];" ::"r"(shared_address(dst)), "l"(map),
	             "r"(x), "r"(head), "r"(y), "r"(shared_address(b))
	             : "memory");
}
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// fence_proxy_async orders this thread's ordinary accesses of shared memory before later ones by TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

inline auto tensor_map_encoder() {
	using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
	                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
	static const Encode encode = [] {
		void *f = nullptr;
		cudaDriverEntryPointQueryResult found;
		if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess) {
			cudaGetLastError();
			return Encode(nullptr);
		}
		return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(f) : nullptr;
	}();
	return encode;
}

// tensor_map_bf16 describes a matrix of rows × cols, rows ld elements apart, in boxes of 64 columns and box_rows
// rows. The base and the bytes of a row are multiples of 16. False: the driver cannot.
inline bool tensor_map_bf16(CUtensorMap *map, const void *base, int64_t rows, int64_t cols, int64_t ld, int box_rows) {
	const auto encode = tensor_map_encoder();
	if (!encode) return false;
	cuuint64_t dims[2] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[1] = {cuuint64_t(ld) * 2};
	cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
	return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(base), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
	              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
// tensor_map_heads_bf16: rows of heads × cols, ld elements apart, in boxes of box_cols (64, or 16) columns of one head and box_rows
// rows: what a box has beyond its head's columns is zero. The bytes of a head are a multiple of 16, too.
inline bool tensor_map_heads_bf16(CUtensorMap *map, const void *base, int64_t rows, int64_t heads, int64_t cols, int64_t ld, int box_rows, int box_cols) {
	const auto encode = tensor_map_encoder();
	if (!encode) return false;
	cuuint64_t dims[3] = {cuuint64_t(cols), cuuint64_t(heads), cuuint64_t(rows)}, strides[2] = {cuuint64_t(cols) * 2, cuuint64_t(ld) * 2};
	cuuint32_t box[3] = {cuuint32_t(box_cols), 1, cuuint32_t(box_rows)}, steps[3] = {1, 1, 1};
	return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void *>(base), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
	              box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) ==
	       CUDA_SUCCESS;
}

// ---- wgmma ------------------------------------------------------------------------------
//
// The 128 threads of a warpgroup (warps 4i … 4i+3) execute these together, with the same operands.
// wgmma_fence comes before the first product and after any other access to d or, from ordinary code, to
// the tiles. d must not be touched between a product and the wait for its group; nor may the tiles be written.

// wgmma_tile describes a tile of rows of 128 bytes as tma_load leaves it, p its first row plus 32·j bytes for
// columns 16·j on; for wgmma_bf16_rt: p the row 16·j for k = 16·j on, next the bytes from a box of 64 columns to that of the next 64.
// Fields: address/16 in bits 0–13; next/16 in bits 16–29, without meaning otherwise; the distance of groups of
// 8 rows, 1024 bytes, /16 in bits 32–45; swizzle of 128 bytes: 1 in bits 62–63.
__device__ __forceinline__ uint64_t wgmma_tile(const void *p, int next = 16) {
	return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(next >> 4) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
// wgmma_tile16: the same of rows of 32 bytes, groups 256 bytes apart, swizzle 3.
__device__ __forceinline__ uint64_t wgmma_tile16(const void *p) {
	return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(16) << 32 | uint64_t(3) << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// wgmma_settled keeps the compiler from moving accesses to v across it: after the wait for products that write or read it, and before
// the fence where v was changed.
template <int N> __device__ __forceinline__ void wgmma_settled(float (&v)[N]) {
#pragma unroll
	for (int i = 0; i < N; i++) asm volatile("" : "+f"(v[i])::"memory");
}
template <int N> __device__ __forceinline__ void wgmma_settled(uint32_t (&v)[N]) {
#pragma unroll
	for (int i = 0; i < N; i++) asm volatile("" : "+r"(v[i])::"memory");
}
template <int n> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory"); }

// wgmma_bf16<N>: d = (accumulate ? d : 0) + a·bᵀ, a [64, 16] and b [N, 16] in shared memory, both K-major.
// Thread t of the warpgroup, g = t%32/4, c = t%4, holds of rows t/32·16 + g (and + 8) columns 8j + 2c, 8j + 2c+1 in d[4j] and
// d[4j+1] (d[4j+2], d[4j+3]).
template <int N> __device__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

#define MARGO_F8(i) \
	"+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
template <> __device__ __forceinline__ void wgmma_bf16<32>(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%18,0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
	             "},%16,%17,p,1,1,0,0;}"
	             : MARGO_F8(0), MARGO_F8(8)
	             : "l"(a), "l"(b), "r"(accumulate));
}
template <> __device__ __forceinline__ void wgmma_bf16<64>(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%34,0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
	             "%30,%31"
	             "},%32,%33,p,1,1,0,0;}"
	             : MARGO_F8(0), MARGO_F8(8), MARGO_F8(16), MARGO_F8(24)
	             : "l"(a), "l"(b), "r"(accumulate));
}
template <> __device__ __forceinline__ void wgmma_bf16<128>(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%66,0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
	             "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
	             "%57,%58,%59,%60,%61,%62,%63"
	             "},%64,%65,p,1,1,0,0;}"
	             : MARGO_F8(0), MARGO_F8(8), MARGO_F8(16), MARGO_F8(24), MARGO_F8(32), MARGO_F8(40), MARGO_F8(48), MARGO_F8(56)
	             : "l"(a), "l"(b), "r"(accumulate));
}
template <> __device__ __forceinline__ void wgmma_bf16<256>(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%130,0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
	             "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
	             "%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"
	             "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"
	             "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
	             "},%128,%129,p,1,1,0,0;}"
	             : MARGO_F8(0), MARGO_F8(8), MARGO_F8(16), MARGO_F8(24), MARGO_F8(32), MARGO_F8(40), MARGO_F8(48), MARGO_F8(56),
	               MARGO_F8(64), MARGO_F8(72), MARGO_F8(80), MARGO_F8(88), MARGO_F8(96), MARGO_F8(104), MARGO_F8(112), MARGO_F8(120)
	             : "l"(a), "l"(b), "r"(accumulate));
}
// wgmma_bf16_rt<N>: d = (accumulate ? d : 0) + a·b, a [64, 16] in registers as mma_bf16 wants the warp's 16 rows, b [16, N] as its rows lie
// in shared memory. a must not be touched between the product and the wait for its group.
template <int N> __device__ void wgmma_bf16_rt(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);
template <> __device__ __forceinline__ void wgmma_bf16_rt<16>(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%13,0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7"
	             "},{%8,%9,%10,%11},%12,p,1,1,1;}"
	             : MARGO_F8(0)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
template <> __device__ __forceinline__ void wgmma_bf16_rt<64>(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%37,0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
	             "%30,%31"
	             "},{%32,%33,%34,%35},%36,p,1,1,1;}"
	             : MARGO_F8(0), MARGO_F8(8), MARGO_F8(16), MARGO_F8(24)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
template <> __device__ __forceinline__ void wgmma_bf16_rt<128>(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
	asm volatile("{.reg .pred p; setp.ne.b32 p,%69,0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
	             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
	             "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
	             "%57,%58,%59,%60,%61,%62,%63"
	             "},{%64,%65,%66,%67},%68,p,1,1,1;}"
	             : MARGO_F8(0), MARGO_F8(8), MARGO_F8(16), MARGO_F8(24), MARGO_F8(32), MARGO_F8(40), MARGO_F8(48), MARGO_F8(56)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#undef MARGO_F8

// Registers of a thread, a multiple of 8; all warps of a warpgroup.
template <int n> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n)); }
template <int n> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n)); }

} // namespace gpu
#endif
