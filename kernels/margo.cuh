// margo.cuh: the CUDA subset that margo's kernels are written in. Everything that
// is not plain C++ goes through here (launches, shared memory, tensor-core
// instructions, asynchronous copies), once for nvcc and once for the host, where
// emu/ runs the same sources thread by thread and checks what hardware would not.
//
// Rules for kernels: no <<<>>>, no inline assembly, no static __shared__ (a struct
// with gpu::smem<T>() instead), no printf, no assert, no recursion.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emu/emu.h"
#endif

// bf16 is the upper half of a binary32, rounded to nearest even.
struct bf16 {
	uint16_t bits;
};

#ifdef __CUDACC__
#define MARGO_DEVICE __device__ __forceinline__
#else
#define MARGO_DEVICE inline
#endif

MARGO_DEVICE float bits_to_f32(uint32_t u) {
#ifdef __CUDACC__
	return __uint_as_float(u);
#else
	return __builtin_bit_cast(float, u);
#endif
}
MARGO_DEVICE uint32_t f32_to_bits(float f) {
#ifdef __CUDACC__
	return __float_as_uint(f);
#else
	return __builtin_bit_cast(uint32_t, f);
#endif
}
MARGO_DEVICE float to_f32(float v) { return v; }
MARGO_DEVICE float to_f32(bf16 v) { return bits_to_f32(uint32_t(v.bits) << 16); }
MARGO_DEVICE bf16 to_bf16(float f) { // a NaN stays a quiet NaN
	uint32_t u = f32_to_bits(f);
	if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t(u >> 16 | 0x40)};
	return bf16{uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
// keep hides where v comes from: the compiler holds it in a register instead of computing it again
// in every turn of a loop.
template <class T> MARGO_DEVICE void keep(T &v) {
#ifdef __CUDACC__
	if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(v));
	else asm volatile("" : "+r"(v));
#else
	(void)v;
#endif
}
template <class T> MARGO_DEVICE T from_f32(float v);
template <> MARGO_DEVICE float from_f32<float>(float v) { return v; }
template <> MARGO_DEVICE bf16 from_f32<bf16>(float v) { return to_bf16(v); }
template <> MARGO_DEVICE int32_t from_f32<int32_t>(float v) { return int32_t(v); } // towards zero

#ifdef __CUDACC__
namespace gpu {

constexpr int emulated = 0;
inline constexpr char build[] = "CUDA plugin";
inline const char *report() { return ""; } // what an emulator found wrong
inline void name_next_launch(const char *) {} // for an emulator's reports

// smem is the block's dynamic shared memory as a T, aligned to 128 bytes (1024 on sm_90a
// kernels that ask TMA for swizzled tiles align by themselves).
template <class T> __device__ __forceinline__ T &smem() {
	extern __shared__ __align__(1024) unsigned char margo_smem[];
	return *reinterpret_cast<T *>(margo_smem);
}
__device__ __forceinline__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// mma_bf16: d += a·b, m16n8k16 row.col, bf16 operands, f32 accumulators. Lane l, g = l/4, t = l%4:
//   a[0] (g, 2t..) a[1] (g+8, 2t..) a[2] (g, 2t+8..) a[3] (g+8, 2t+8..);  b[0] (k 2t.., n g) b[1] (k 2t+8.., n g)
//   d[0..1] (g, 2t..) d[2..3] (g+8, 2t..)
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// mma_bf16_k8: the same with k = 8: a[0] (g, 2t..) a[1] (g+8, 2t..); b (k 2t.., n g).
__device__ __forceinline__ void mma_bf16_k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
	asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	             : "r"(a[0]), "r"(a[1]), "r"(b));
}
// ldmatrix: 8×8 matrices of 16-bit elements; lane l gives the 16-byte row l%8 of matrix l/8.
// Lane l receives of each matrix the elements (l/4, 2(l%4)..); _t: of the transposed one.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
	             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_t(uint32_t (&r)[4], const void *row) {
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
	             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void *row) {
	asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_t(uint32_t (&r)[2], const void *row) {
	asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
// cp_async16 copies 16 bytes from global to shared memory behind the thread's back; bytes 0..16 of the
// source are read, the rest is zero. Both addresses are multiples of 16. 4: the same for 4 bytes.
__device__ __forceinline__ void cp_async16(void *dst, const void *src, int bytes = 16) {
	asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async4(void *dst, const void *src, int bytes = 4) {
	asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// cp_async_wait<n> waits until at most the n latest groups of this thread are under way.
template <int n> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

// pack_bf16: two numbers rounded to bf16, lo in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
	uint32_t r;
	asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(hi), "f"(lo));
	return r;
}
// exp2_fast: 2^x, relative error about 2^-22; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
	float y;
	asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
	return y;
}
// bar_sync: a barrier among the first arrivals of count threads (a multiple of 32) at barrier id 1..15.
__device__ __forceinline__ void bar_sync(int id, int count) { asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(count) : "memory"); }

// Between blocks of one kernel.
__device__ __forceinline__ void red_release_add(uint32_t *p, uint32_t v) { asm volatile("red.release.gpu.global.add.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ uint32_t ld_acquire(const uint32_t *p) {
	uint32_t v;
	asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
	return v;
}
// Single 8-byte words seen whole by every block (value and epoch together need no fence).
__device__ __forceinline__ void st_relaxed_u64(uint64_t *p, uint64_t v) { asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory"); }
__device__ __forceinline__ uint64_t ld_relaxed_u64(const uint64_t *p) {
	uint64_t v;
	asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
	return v;
}
__device__ __forceinline__ uint64_t global_nanoseconds() {
	uint64_t t;
	asm volatile("mov.u64 %0,%globaltimer;" : "=l"(t));
	return t;
}
__device__ __forceinline__ void spin() { __nanosleep(20); } // inside every polling loop: lets others run

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t st, A &&...args) {
	if (smem > 48 * 1024) {
		cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
		if (e != cudaSuccess) return e;
	}
	kernel<<<grid, block, smem, st>>>(static_cast<P>(args)...);
	return cudaGetLastError();
}
// launch_cooperative: all blocks run at the same time, or the launch fails.
template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t st, A &&...args) {
	if (smem > 48 * 1024) {
		cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
		if (e != cudaSuccess) return e;
	}
	cudaLaunchConfig_t c{};
	c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = st;
	cudaLaunchAttribute a[1];
	a[0].id = cudaLaunchAttributeCooperative;
	a[0].val.cooperative = 1;
	c.attrs = a, c.numAttrs = 1;
	return cudaLaunchKernelEx(&c, kernel, static_cast<P>(args)...);
}
} // namespace gpu
#endif

// Philox4x32-10 and normals as engine/rng.go defines them: key = seed, counter = (element/4,
// purpose<<24 | step, token, image).
struct Words {
	uint32_t w[4];
};
MARGO_DEVICE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
	uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
	for (int i = 0; i < 10; i++) {
		uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
		uint32_t a = uint32_t(p1 >> 32) ^ c1 ^ k0, b = uint32_t(p1), c = uint32_t(p0 >> 32) ^ c3 ^ k1, d = uint32_t(p0);
		c0 = a, c1 = b, c2 = c, c3 = d;
		k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
	}
	return Words{{c0, c1, c2, c3}};
}
