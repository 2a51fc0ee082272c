// sm90.h: host bodies of margo_sm90.cuh: mbarriers, TMA and wgmma, as late and as
// strict as the PTX manual allows. Names and meaning are described there.
//
// TMA destroys its destination at once and delivers when every thread waits. A
// wgmma takes its accumulator away (NaN) and reads its tiles and registers of A at the
// wait for its group, each warp its own 16 rows.
#pragma once

#include "emu.h"

struct CUtensorMap { // rows of bf16, each of heads × cols, in boxes of box_rows × box_cols of one head
	const void *base;
	int64_t rows, heads, cols, ld;
	int box_rows, box_cols;
	int bytes() const { return box_rows * box_cols * 2; }
};

namespace emu {
void mbarrier_init(uint64_t *b, int count, const char *file, int line);
void mbarrier_arrive(uint64_t *b, int bytes, const char *file, int line);
void mbarrier_wait(uint64_t *b, uint32_t parity, const char *file, int line);
void tma_load(void *dst, const CUtensorMap *map, int x, int head, int y, uint64_t *b, const char *file, int line);
void wgmma_fence(const char *file, int line);
void wgmma(float *d, int n, const uint32_t *registers, uint64_t a, uint64_t b, int accumulate, const char *file, int line);
void wgmma_settled(const void *p, size_t bytes, const char *file, int line);
void wgmma_commit(const char *file, int line);
void wgmma_wait(int n, const char *file, int line);
void set_registers(int n, const char *file, int line);
} // namespace emu

namespace gpu {

inline void mbarrier_init(uint64_t *b, int count, EMU_AT) { emu::mbarrier_init(b, count, file, line); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t *b, EMU_AT) { emu::mbarrier_arrive(b, 0, file, line); }
inline void mbarrier_arrive_expect(uint64_t *b, int bytes, EMU_AT) { emu::mbarrier_arrive(b, bytes, file, line); }
inline void mbarrier_wait(uint64_t *b, uint32_t parity, EMU_AT) { emu::mbarrier_wait(b, parity, file, line); }
inline void tma_load(void *dst, const CUtensorMap *map, int x, int y, uint64_t *b, EMU_AT) { emu::tma_load(dst, map, x, 0, y, b, file, line); }
inline void tma_load_head(void *dst, const CUtensorMap *map, int x, int head, int y, uint64_t *b, EMU_AT) { emu::tma_load(dst, map, x, head, y, b, file, line); }
inline void tma_prefetch_map(const CUtensorMap *) {}
inline void fence_proxy_async() {}
inline bool tensor_map_heads_bf16(CUtensorMap *map, const void *base, int64_t rows, int64_t heads, int64_t cols, int64_t ld, int box_rows, int box_cols) {
	if (reinterpret_cast<uintptr_t>(base) % 16 || ld * 2 % 16 || (heads > 1 && cols * 2 % 16) || rows <= 0 || heads <= 0 || cols <= 0 || box_rows < 1 || box_rows > 256 ||
	    (box_cols != 64 && box_cols != 16))
		return false; // what the driver refuses, and swizzles that there are not
	*map = {base, rows, heads, cols, ld, box_rows, box_cols};
	return true;
}
inline bool tensor_map_bf16(CUtensorMap *map, const void *base, int64_t rows, int64_t cols, int64_t ld, int box_rows) {
	return tensor_map_heads_bf16(map, base, rows, 1, cols, ld, box_rows, 64);
}
inline uint64_t wgmma_tile(const void *p, int next = 16, EMU_AT) {
	return uint64_t((emu::shared_address(p, file, line) & 0x3ffff) >> 4) | uint64_t(next >> 4) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
inline uint64_t wgmma_tile16(const void *p, EMU_AT) {
	return uint64_t((emu::shared_address(p, file, line) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(16) << 32 | uint64_t(3) << 62;
}
inline void wgmma_fence(EMU_AT) { emu::wgmma_fence(file, line); }
inline void wgmma_commit(EMU_AT) { emu::wgmma_commit(file, line); }
template <int n> void wgmma_wait(EMU_AT) { emu::wgmma_wait(n, file, line); }
template <int N> void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate, EMU_AT) {
	static_assert(N % 8 == 0 && N >= 8 && N <= 256);
	emu::wgmma(d, N, nullptr, a, b, accumulate, file, line);
}
template <int N> void wgmma_bf16_rt(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate, EMU_AT) {
	static_assert(N % 8 == 0 && N >= 8 && N <= 256);
	emu::wgmma(d, N, a, 0, b, accumulate, file, line);
}
template <class T, int N> void wgmma_settled(T (&v)[N], EMU_AT) { emu::wgmma_settled(v, sizeof v, file, line); }
template <int n> void registers_down(EMU_AT) { emu::set_registers(n, file, line); }
template <int n> void registers_up(EMU_AT) { emu::set_registers(n, file, line); }

} // namespace gpu
