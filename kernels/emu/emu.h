// emu.h: the CUDA subset of margo.cuh on the host. A kernel is a function that is
// called once for every CUDA thread, on a fiber of its own; warps, barriers and
// asynchronous copies behave as the PTX manual allows at worst, and whatever it
// forbids is an error that names file, line, block and thread (emu.h declares,
// fiber.cpp schedules, collective.cpp and copy.cpp execute, runtime.h is the runtime API).
//
// What differs from hardware on purpose: shared memory and new device memory are
// NaN; a cp.async destroys its destination at once and delivers at the wait;
// lanes of a warp run apart between collectives; streams run as late as they may.
//
// What it can't show: inline assembly itself, code generation, the memory model's
// weaker orders, the rounding of tensor cores (here: products and sums in
// binary32, ascending k, then added to the accumulator), time.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

// EMU_AT: where the kernel calls from.
#define EMU_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct uint3 {
	unsigned x, y, z;
};
struct dim3 {
	unsigned x, y, z;
	constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emu {

// Thread is what a kernel sees of itself.
struct Thread {
	uint3 tid, bid;
	char *smem;
	size_t smem_bytes;
	int lane;
};
// current is never seen to change by a fiber: fibers stay on the system's thread that began them.
extern __thread Thread *current __attribute__((tls_model("initial-exec")));

// misaligned reports a vector access at an address that its size does not divide.
[[noreturn]] void misaligned(const void *p, int bytes, const char *file, int line);
inline void check_aligned(const void *p, int bytes, const char *file, int line) {
	if (reinterpret_cast<uintptr_t>(p) % unsigned(bytes) && current) [[unlikely]] misaligned(p, bytes, file, line);
}

#if defined(EMU_CHECK)
// vector_access tells the checker that the accesses to the elements of a vector, which follow, are one.
void vector_access(const void *p, size_t bytes, bool is_write);
#else
inline void vector_access(const void *, size_t, bool) {}
#endif

enum class Op : uint8_t { sync, shuffle, ballot, any, all, mma, mma_k8, ldmatrix, ldmatrix_t, call };

// collective meets the other lanes of mask; the last one to come executes op for all
// (call: its own arg, a std::function).
void collective(Op op, uint32_t mask, void *arg, const char *file, int line);
void barrier(int id, int count, const char *file, int line);
void barrier_arrive(int id, int count, const char *file, int line);
void spin(const char *file, int line);

struct Shuffle {
	uint64_t in, out;
	int from;
};
struct Mma {
	float *d;
	const uint32_t *a, *b;
};
struct LdMatrix {
	uint32_t *r;
	const void *row;
	int count;
};
void ldmatrix(uint32_t *r, int count, const void *row, bool transposed, const char *file, int line);
void cp_async(void *dst, const void *src, int size, int bytes, const char *file, int line);
void cp_async_commit();
void cp_async_wait(int n);
uint32_t shared_address(const void *p, const char *file, int line);
uint64_t nanoseconds();
void name_next_launch(const char *name); // of this thread; name lives at least until then

template <class T> T shuffle(uint32_t mask, T v, int from, const char *file, int line) {
	static_assert(sizeof(T) == 4 || sizeof(T) == 8);
	Shuffle s{0, 0, from};
	memcpy(&s.in, &v, sizeof v);
	collective(Op::shuffle, mask, &s, file, line);
	memcpy(&v, &s.out, sizeof v);
	return v;
}

// Atomics on memory that blocks share. They also tell the scheduler that something changed.
void changed();
template <class T, class F> T update(T *p, F f) { // relaxed, as CUDA's are
	static_assert(sizeof(T) == 4 || sizeof(T) == 8);
	check_aligned(p, sizeof(T), "", 0);
	using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
	Word *w = reinterpret_cast<Word *>(p), old = __atomic_load_n(w, __ATOMIC_RELAXED), now;
	T v;
	do {
		memcpy(&v, &old, sizeof v);
		T next = f(v);
		memcpy(&now, &next, sizeof v);
	} while (!__atomic_compare_exchange_n(w, &old, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
	changed();
	return v;
}

} // namespace emu

// Vector types. Reading or writing one through a pointer checks its alignment: the
// copy constructor knows where it is used, an assignment only the kernel.
#define EMU_VECTOR2(name, T)                                                                                              \
	struct alignas(2 * sizeof(T)) name {                                                                                  \
		T x, y;                                                                                                           \
		name() = default;                                                                                                 \
		name(T a, T b) : x(a), y(b) {}                                                                                    \
		__forceinline__ name(const name &o, EMU_AT) {                                                                     \
			emu::check_aligned(&o, sizeof o, file, line), emu::vector_access(&o, sizeof o, false);                        \
			x = o.x, y = o.y;                                                                                             \
		}                                                                                                                 \
		__forceinline__ name &operator=(const name &o) {                                                                  \
			emu::check_aligned(this, sizeof o, "", 0), emu::check_aligned(&o, sizeof o, "", 0);                           \
			emu::vector_access(&o, sizeof o, false);                                                                      \
			T a = o.x, b = o.y;                                                                                           \
			emu::vector_access(this, sizeof o, true);                                                                     \
			x = a, y = b;                                                                                                 \
			return *this;                                                                                                 \
		}                                                                                                                 \
	};                                                                                                                    \
	inline name make_##name(T a, T b) { return name(a, b); }
#define EMU_VECTOR4(name, T)                                                                                              \
	struct alignas(4 * sizeof(T)) name {                                                                                  \
		T x, y, z, w;                                                                                                     \
		name() = default;                                                                                                 \
		name(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}                                                              \
		__forceinline__ name(const name &o, EMU_AT) {                                                                     \
			emu::check_aligned(&o, sizeof o, file, line), emu::vector_access(&o, sizeof o, false);                        \
			x = o.x, y = o.y, z = o.z, w = o.w;                                                                           \
		}                                                                                                                 \
		__forceinline__ name &operator=(const name &o) {                                                                  \
			emu::check_aligned(this, sizeof o, "", 0), emu::check_aligned(&o, sizeof o, "", 0);                           \
			emu::vector_access(&o, sizeof o, false);                                                                      \
			T a = o.x, b = o.y, c = o.z, d = o.w;                                                                         \
			emu::vector_access(this, sizeof o, true);                                                                     \
			x = a, y = b, z = c, w = d;                                                                                   \
			return *this;                                                                                                 \
		}                                                                                                                 \
	};                                                                                                                    \
	inline name make_##name(T a, T b, T c, T d) { return name(a, b, c, d); }
EMU_VECTOR2(float2, float)
EMU_VECTOR2(int2, int)
EMU_VECTOR2(uint2, unsigned)
EMU_VECTOR2(double2, double)
EMU_VECTOR2(ulonglong2, unsigned long long)
EMU_VECTOR4(float4, float)
EMU_VECTOR4(int4, int)
EMU_VECTOR4(uint4, unsigned)
#undef EMU_VECTOR2
#undef EMU_VECTOR4

#include "runtime.h"

#define threadIdx (emu::current->tid)
#define blockIdx (emu::current->bid)
// The same for every thread that runs at the time on this thread of the system; no macros, since
// cudaLaunchConfig_t has fields of these names.
extern __thread dim3 blockDim __attribute__((tls_model("initial-exec")));
extern __thread dim3 gridDim __attribute__((tls_model("initial-exec")));
constexpr int warpSize = 32;

inline void __syncthreads(EMU_AT) { emu::barrier(0, 0, file, line); }
inline void __syncwarp(uint32_t mask = ~0u, EMU_AT) { emu::collective(emu::Op::sync, mask, nullptr, file, line); }
template <class T> T __shfl_sync(uint32_t mask, T v, int from, int width = 32, EMU_AT) {
	return emu::shuffle(mask, v, (emu::current->lane & ~(width - 1)) | (from & (width - 1)), file, line);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, EMU_AT) {
	int lane = emu::current->lane, from = lane ^ bits; // the later groups of a narrower width read the earlier ones, not the other way
	return emu::shuffle(mask, v, (from & ~(width - 1)) > (lane & ~(width - 1)) ? lane : from, file, line);
}
template <class T> T __shfl_down_sync(uint32_t mask, T v, unsigned d, int width = 32, EMU_AT) {
	int lane = emu::current->lane;
	return emu::shuffle(mask, v, (lane & (width - 1)) + int(d) >= width ? lane : lane + int(d), file, line);
}
template <class T> T __shfl_up_sync(uint32_t mask, T v, unsigned d, int width = 32, EMU_AT) {
	int lane = emu::current->lane;
	return emu::shuffle(mask, v, (lane & (width - 1)) < int(d) ? lane : lane - int(d), file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, EMU_AT) {
	uint32_t v = p != 0;
	emu::collective(emu::Op::ballot, mask, &v, file, line);
	return v;
}
inline int __any_sync(uint32_t mask, int p, EMU_AT) {
	uint32_t v = p != 0;
	emu::collective(emu::Op::any, mask, &v, file, line);
	return int(v);
}
inline int __all_sync(uint32_t mask, int p, EMU_AT) {
	uint32_t v = p != 0;
	emu::collective(emu::Op::all, mask, &v, file, line);
	return int(v);
}

template <class T> T atomicAdd(T *p, T v) {
	return emu::update(p, [v](T old) { return T(old + v); });
}
template <class T> T atomicMax(T *p, T v) {
	return emu::update(p, [v](T old) { return old < v ? v : old; });
}
template <class T> T atomicMin(T *p, T v) {
	return emu::update(p, [v](T old) { return v < old ? v : old; });
}
template <class T> T atomicOr(T *p, T v) {
	return emu::update(p, [v](T old) { return T(old | v); });
}
template <class T> T atomicAnd(T *p, T v) {
	return emu::update(p, [v](T old) { return T(old & v); });
}
template <class T> T atomicExch(T *p, T v) {
	return emu::update(p, [v](T) { return v; });
}
template <class T> T atomicCAS(T *p, T expected, T v) {
	return emu::update(p, [=](T old) { return old == expected ? v : old; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned, EMU_AT) { emu::spin(file, line); }

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldlu(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }
template <class T> void __stwt(T *p, T v) { *p = v; }

template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
	using T = std::common_type_t<A, B>;
	if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b)); // the number if the other is NaN
	return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
	using T = std::common_type_t<A, B>;
	if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
	return T(b) < T(a) ? T(b) : T(a);
}
inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __brev(unsigned x) {
	unsigned r = 0;
	for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
	return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline uint32_t __float_as_uint(float f) { return __builtin_bit_cast(uint32_t, f); }
inline float __uint_as_float(uint32_t u) { return __builtin_bit_cast(float, u); }
inline int __float_as_int(float f) { return __builtin_bit_cast(int, f); }
inline float __int_as_float(int u) { return __builtin_bit_cast(float, u); }
inline int __float2int_rz(float f) { return int(f); }
inline int __float2int_rn(float f) { return int(rintf(f)); }

// emu_last_report is the text of the emulator's latest error, "" if there is none:
// what was wrong, where, in which block and thread. It stays valid for ever.
const char *emu_last_report();

namespace gpu {

constexpr int emulated = 1;
inline constexpr char build[] = "emulator";
inline const char *report() { return emu_last_report(); }
inline void name_next_launch(const char *name) { emu::name_next_launch(name); }

template <class T> T &smem(EMU_AT) {
	if (emu::current->smem_bytes < sizeof(T)) emu::shared_address(emu::current->smem + sizeof(T), file, line); // reports
	return *reinterpret_cast<T *>(emu::current->smem);
}
inline uint32_t shared_address(const void *p, EMU_AT) { return emu::shared_address(p, file, line); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_AT) {
	emu::Mma m{d, a, b};
	emu::collective(emu::Op::mma, ~0u, &m, file, line);
}
inline void mma_bf16_k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, EMU_AT) {
	emu::Mma m{d, a, &b};
	emu::collective(emu::Op::mma_k8, ~0u, &m, file, line);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *row, EMU_AT) { emu::ldmatrix(r, 4, row, false, file, line); }
inline void ldmatrix_x4_t(uint32_t (&r)[4], const void *row, EMU_AT) { emu::ldmatrix(r, 4, row, true, file, line); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void *row, EMU_AT) { emu::ldmatrix(r, 2, row, false, file, line); }
inline void ldmatrix_x2_t(uint32_t (&r)[2], const void *row, EMU_AT) { emu::ldmatrix(r, 2, row, true, file, line); }
inline void cp_async16(void *dst, const void *src, int bytes = 16, EMU_AT) { emu::cp_async(dst, src, 16, bytes, file, line); }
inline void cp_async4(void *dst, const void *src, int bytes = 4, EMU_AT) { emu::cp_async(dst, src, 4, bytes, file, line); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int n> void cp_async_wait() { emu::cp_async_wait(n); }

inline uint32_t pack_bf16(float lo, float hi) {
	auto half = [](float f) -> uint32_t {
		uint32_t u = __builtin_bit_cast(uint32_t, f);
		return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
	};
	return half(lo) | half(hi) << 16;
}
inline float exp2_fast(float x) {
	float y = exp2f(x);
	return y < 0x1p-126f ? 0.0f : y; // as ex2.approx.ftz; a NaN stays
}
inline void bar_sync(int id, int count, EMU_AT) { emu::barrier(id, count, file, line); }

inline void red_release_add(uint32_t *p, uint32_t v) {
	__atomic_fetch_add(p, v, __ATOMIC_RELEASE);
	emu::changed();
}
inline uint32_t ld_acquire(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void st_relaxed_u64(uint64_t *p, uint64_t v) {
	__atomic_store_n(p, v, __ATOMIC_RELAXED);
	emu::changed();
}
inline uint64_t ld_relaxed_u64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline uint64_t global_nanoseconds() { return emu::nanoseconds(); }
inline void spin(EMU_AT) { emu::spin(file, line); }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t st, A &&...args) {
	cudaLaunchConfig_t c{};
	c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = st;
	if (smem > 48 * 1024) {
		cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
		if (e != cudaSuccess) return e;
	}
	return cudaLaunchKernelEx(&c, kernel, static_cast<P>(args)...);
}
template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t st, A &&...args) {
	if (smem > 48 * 1024) {
		cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
		if (e != cudaSuccess) return e;
	}
	cudaLaunchConfig_t c{};
	c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = st;
	cudaLaunchAttribute a[1]{};
	a[0].id = cudaLaunchAttributeCooperative;
	a[0].val.cooperative = 1;
	c.attrs = a, c.numAttrs = 1;
	return cudaLaunchKernelEx(&c, kernel, static_cast<P>(args)...);
}

} // namespace gpu
