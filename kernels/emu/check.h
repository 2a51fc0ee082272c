// check.h: the memory checker of the emulator's check build (-DEMU_CHECK, kernels
// compiled with -fsanitize=thread and linked without its library: check.cpp
// receives the calls that the compiler inserts before every access).
//
// It finds, whether or not the result came out right:
//   - races in shared and in global memory, within a block and between blocks:
//     two accesses, one of them a write and not both atomic, that no barrier,
//     __syncwarp, mbarrier or release/acquire of this run orders. Shuffles and mma order nothing;
//   - accesses just outside buffers and shared memory, and writes to anything that
//     is neither device memory nor the thread's own;
//   - bank conflicts and uncoalesced accesses, counted for every kernel: the k-th time that each lane of a warp
//     comes to an instruction is one request.
//
// Orders are vector clocks over the threads of a group. Blocks of an ordinary launch are
// never ordered, not even by atomics (kernels that rely on that launch cooperatively).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emu {

struct Fiber;
struct Group;
struct Run;
struct Block;

namespace check {

#if defined(EMU_CHECK)
constexpr bool on = true;
#else
constexpr bool on = false;
#endif

using Clocks = std::vector<uint32_t>;

void begin(Group *); // of a group of blocks
void end_block(Block *);
void end(Group *);
// read and write are accesses that the emulator makes for the current thread; count makes one part of a request.
void read(const void *p, size_t bytes, const void *pc);
void write(const void *p, size_t bytes, const void *pc);
void count(const void *p, size_t bytes, bool is_write, const void *pc);
// release adds what the current thread has seen and done to c; acquire takes it over.
void release(Clocks &c);
void acquire(const Clocks &c);
void acquire(Fiber *, const Clocks &c); // of another thread, which waits
// meet orders the lanes of a mask of the current warp.
void meet(uint32_t mask);
std::string place(const void *pc); // file and line, if addr2line knows

} // namespace check

} // namespace emu
