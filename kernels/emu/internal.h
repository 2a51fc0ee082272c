// internal.h: what the emulator's own files share.
//
// fiber.cpp schedules a group of blocks on one thread of the system and switches
// between their fibers; collective.cpp and copy.cpp hold what warps and blocks do
// together; launch.cpp spreads blocks over threads of the system; device.cpp,
// memory.cpp, stream.cpp and graph.cpp are the runtime API.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "sm90.h"

namespace emu {

struct Range { // of device memory
	uintptr_t begin, end;
};

// Launch is a kernel on its way through a stream.
struct Launch {
	dim3 grid, block;
	size_t smem = 0;
	bool cooperative = false;
	dim3 cluster{1, 1, 1};
	const void *kernel = nullptr;
	std::string name;
	std::function<void()> body;
};

// Counted is what the checker counts of a launch.
enum Counted { global_load, global_store, shared_load, shared_store, kCounted };

// Run is a launch that executes: what its workers share.
struct Run {
	const Launch *launch;
	uint64_t number; // of the launch
	std::vector<Range> memory; // device allocations, ascending
	uint64_t seed;
	std::vector<uint64_t> order; // of blocks, if shuffled
	std::atomic<uint64_t> next{0};
	std::atomic<bool> failed{false};
	std::mutex mu; // guards what follows
	cudaError_t code = cudaSuccess;
	std::string report;
	bool counting = false; // of accesses
	std::vector<const void *> pcs; // that {pc0}, {pc1} in the report stand for
	// Counters of accesses (check builds), and of ldmatrix (any build).
	uint64_t requests[kCounted] = {}, waves[kCounted] = {}, least[kCounted] = {};
	const void *worst[kCounted] = {}; // the instruction with most waves beyond the least, null: none has any
	uint64_t worst_waves[kCounted] = {}, worst_least[kCounted] = {};
	std::atomic<uint64_t> matrices{0}, matrix_waves{0};
};

struct Copy { // a cp.async under way
	char *dst;
	const char *src;
	int32_t size, bytes;
};

struct Stack {
	char *base;
	int number;
};

struct Block;
struct Warp;

struct Fiber : Thread {
	void *sp;
	Stack *stack; // null before the thread begins and after it ends
	Block *block_of;
	Warp *warp;
	bool done;
	const char *what, *file; // where it waits, null if it does not
	int line;
	void *fake_stack; // ASan's
	std::vector<Copy> copies;
	std::vector<uint32_t> commits; // copies of each group, counted from the oldest
	uint32_t committed; // copies that belong to a group
	uint32_t products;  // wgmma that it took part in
	uintptr_t vector;   // the checker has counted this access as a whole:
	uint32_t vector_left; // so many bytes of it will come by elements
};

struct Meeting { // of lanes at a collective
	uint32_t mask, arrived;
	Op op;
	const char *file;
	int line;
	void *arg[32];
};

struct Wgmma { // of a warp, under way
	uint64_t a, b;
	int n;
	bool accumulate, in_registers; // A; B is then transposed
	float *d[32];
	const uint32_t *registers[32];
	std::vector<float> value; // of the accumulators, by lane; empty while an earlier product into them is under way
};

struct Tma { // a copy under way
	char *dst;
	CUtensorMap map;
	int x, head, y;
	uint64_t *barrier;
};

struct Sleeper { // at an mbarrier
	const void *at;
	Fiber *fiber;
};

struct Operands {
	uint64_t a, b;
};

struct Warp {
	uint32_t ready, live, exists;
	int number; // in the group
	Block *block;
	Fiber *lanes;
	Meeting meetings[32]; // by the lowest lane of the mask
	std::vector<Wgmma> products;
	std::vector<uint32_t> commits; // products of each group
	uint32_t issued; // products
	bool fenced;
};

struct Barrier {
	int arrived, count;
	const char *file;
	int line;
	uint32_t waiting[32]; // lanes, by warp of the block
};

struct Block {
	uint3 index;
	int threads, warps, live;
	Warp *first;
	char *smem;
	Barrier barriers[16];
	std::vector<Tma> tma;
	std::vector<Sleeper> sleepers;
	std::map<const void *, check::Clocks> clocks, ended; // of barriers and mbarriers; of mbarriers' last phase
	void *cells = nullptr; // the checker's, of shared memory
	bool together = false; // with all other blocks of the launch
	std::vector<Operands> wgmma_log[8]; // products of each warpgroup
};

// Group is the blocks whose threads are alive at the same time on one worker.
struct Group {
	Run *run;
	std::vector<Block> blocks;
	std::vector<Warp> warps;
	std::vector<Fiber> fibers; // 32 a warp
	std::vector<uint64_t> ready; // bit: the warp has a lane that can run
	std::vector<Stack *> free_stacks, all_stacks;
	std::vector<char *> memory; // shared memory of the blocks
	size_t memory_bytes = 0;
	int64_t live = 0;
	void *main_sp = nullptr, *main_fake = nullptr; // the latter: ASan's
	const void *main_bottom = nullptr;
	size_t main_size = 0;
	uint64_t random = 0, idle = 0; // idle: turns of polling loops since something changed
	uint64_t spins = 0;             // turns of polling loops
	bool failed = false;
};

extern __thread Group *group __attribute__((tls_model("initial-exec")));
inline Fiber *self() { return static_cast<Fiber *>(current); }

// fail ends the kernel: the text is the report, the fibers are dropped where they stand.
[[noreturn]] void fail(cudaError_t, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));
// block_here takes the current lane out of the ready ones and runs others until it is woken.
void block_here(const char *what, const char *file, int line);
void wake(Warp *, uint32_t lanes);
inline bool woken(const Fiber *f) { return f->warp->ready >> f->lane & 1; }
uint32_t next_random(Group *);
bool in_stack(const Fiber *, const void *);

bool deliver_late(Group *); // makes a copy of TMA arrive
void check_block_exit(Block *);
void thread_exits(Fiber *); // checks what a thread leaves behind
void check_shared(const void *p, size_t bytes, unsigned align, const char *what, const char *file, int line);
void check_global(const void *p, size_t bytes, const char *what, const char *file, int line);

// run_blocks runs blocks first … first+count-1 of the order together; execute runs a whole launch.
void run_blocks(Group *, Run *, uint64_t first, int count);
void execute(Run *, int threads);

const char *base_name(const char *path);
std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));

} // namespace emu
