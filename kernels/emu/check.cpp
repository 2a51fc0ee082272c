// check.cpp: races, bounds and access patterns; see check.h.
#include "check.h"

#include <dlfcn.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <unordered_map>

#include "internal.h"

namespace emu::check {

namespace {

// Access is a thread's latest one to a cell. Clocks never go back, so old launches' are recognised.
struct Access {
	uint32_t block, thread, clock;
	uint32_t pc; // distance from the library's begin, upper bit: atomic
};
constexpr uint32_t kAtomic = 1u << 31;

struct Cell { // of two bytes
	Access write, reads[2];
};

struct Pattern { // accesses of a warp to one memory by one instruction
	uint64_t requests = 0, waves = 0, least = 0;
};

struct Request { // the k-th execution of an instruction by the lanes of a warp
	const void *pc;
	int warp;
	uint32_t turn;
	bool operator==(const Request &) const = default;
};
struct Hash {
	size_t operator()(const Request &r) const { return (reinterpret_cast<uintptr_t>(r.pc) * 64 + size_t(r.warp)) * 0x9E3779B97F4A7C15ull + r.turn; }
};
struct Lanes {
	uint32_t mask = 0;
	uint8_t bytes = 0;
	Counted what;
	uint64_t at[32];
};

struct PerThread {
	Clocks seen; // seen[t]: what t had done when it was last heard of
	Clocks fenced, pending; // for fences: what a relaxed store publishes, what a relaxed load will have seen
	std::unordered_map<const void *, uint32_t> turns; // executions of an instruction
};

struct Checker {
	std::vector<PerThread> threads;
	std::map<uintptr_t, std::vector<Cell>> global; // by begin of the allocation
	struct {
		uintptr_t begin = 1, end = 0;
		Cell *cells = nullptr;
	} recent[4]; // allocations, by instruction
	bool counting = false;
	std::map<uintptr_t, std::vector<Cell>> shared; // by block's memory
	std::unordered_map<uintptr_t, Clocks> sync; // of atomics, by address
	std::unordered_map<Request, Lanes, Hash> requests; // that some lanes have not come to
	uint32_t latest = 0, launch_base = 0, block_base = 0;
	const Run *run = nullptr;
	uint64_t number = 0; // of the launch
	uintptr_t image = 0;
	std::unordered_map<const void *, Pattern> patterns[kCounted]; // of the launch so far, by instruction
};

Checker &checker() { // check builds use one worker
	static auto *c = new Checker;
	return *c;
}

int index_of(const Fiber *f) { return f->warp->number * 32 + f->lane; }
uint32_t &clock_of(const Fiber *f) { return checker().threads[size_t(index_of(f))].seen[size_t(index_of(f))]; }

void join(Clocks &to, const Clocks &from) {
	if (to.size() < from.size()) to.resize(from.size());
	for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

uint32_t linear(const Fiber *f) {
	return (f->bid.z * gridDim.y + f->bid.y) * gridDim.x + f->bid.x;
}

bool ordered(const Access &a, const Fiber *f, uint32_t base, bool global) {
	if (a.clock < base) return true; // of an earlier launch or block
	if (global && !f->block_of->together && a.block != linear(f)) return false;
	return checker().threads[size_t(index_of(f))].seen[a.thread] >= a.clock;
}

[[noreturn]] void race(const Access &a, bool was_write, bool is_write, const void *p, bool global, const void *pc) {
	Checker &c = checker();
	Fiber *f = self();
	const char *where = global ? "global" : "shared";
	std::string at = global ? text("%p", p) : text("byte %lld", (long long)(static_cast<const char *>(p) - f->smem));
	group->run->pcs = {pc, reinterpret_cast<const void *>(c.image + (a.pc & ~kAtomic))};
	fail(cudaErrorLaunchFailure, nullptr, 0, "race: this thread's %s of %s memory (%s) at {pc0} is not ordered with the %s by block %u, thread %u at {pc1}",
	     is_write ? "write" : "read", where, at.c_str(), was_write ? "write" : "read", a.block, a.thread % unsigned(f->block_of->warps * 32));
}

void touch(Cell &k, bool is_write, bool atomic, const void *p, bool global, const void *pc) {
	Checker &c = checker();
	Fiber *f = self();
	const uint32_t base = global ? c.launch_base : c.block_base;
	if (!(atomic && k.write.pc & kAtomic) && k.write.clock && !ordered(k.write, f, base, global)) race(k.write, true, is_write, p, global, pc);
	Access me{linear(f), uint32_t(index_of(f)), clock_of(f), uint32_t(reinterpret_cast<uintptr_t>(pc) - c.image) & ~kAtomic};
	if (atomic) me.pc |= kAtomic;
	if (!is_write) {
		if (k.reads[0].thread != me.thread || k.reads[0].block != me.block) k.reads[1] = k.reads[0];
		k.reads[0] = me;
		return;
	}
	for (auto &r : k.reads)
		if (r.clock && !(atomic && r.pc & kAtomic) && !ordered(r, f, base, global)) race(r, false, true, p, global, pc);
	k.write = me;
}

// settle adds a request to the figures of its instruction: shared memory serves 32 banks of 4 bytes at a time (of 16-byte
// accesses 8 lanes, of 8 bytes 16), the same word once for all; global memory moves in sectors of 32 bytes.
void settle(const void *pc, const Lanes &l) {
	Pattern &p = checker().patterns[l.what][pc];
	p.requests++;
	const bool shared = l.what >= shared_load;
	const unsigned unit = shared ? 4 : 32;
	const int step = !shared ? 32 : l.bytes >= 16 ? 8 : l.bytes >= 8 ? 16 : 32;
	for (int first = 0; first < 32; first += step) {
		uint64_t units[160];
		int n = 0;
		unsigned hits[32] = {}, worst = 0;
		for (int i = first; i < first + step; i++) {
			if (!(l.mask >> i & 1)) continue;
			for (uint64_t u = l.at[i] / unit; u <= (l.at[i] + l.bytes - 1) / unit; u++) {
				int k = n;
				while (k > 0 && units[k - 1] != u) k--;
				if (k > 0) continue;
				units[n++] = u;
				worst = std::max(worst, ++hits[u % 32]);
			}
		}
		if (shared && worst) p.waves += worst, p.least++;
		if (!shared) p.waves += unsigned(n), p.least += std::min(unsigned(n), (unsigned(__builtin_popcount(l.mask)) * l.bytes + 31) / 32); // lanes may read the same
	}
}

// memory_of tells whether p is shared memory of the thread's block (1) or memory of the device (0); -1: neither.
int memory_of(const Fiber *f, const void *p, size_t bytes) {
	auto at = reinterpret_cast<uintptr_t>(p), smem = reinterpret_cast<uintptr_t>(f->smem);
	if (at >= smem && at + bytes <= smem + f->smem_bytes) return 1;
	const auto &m = checker().run->memory;
	auto it = std::upper_bound(m.begin(), m.end(), at, [](uintptr_t v, const Range &r) { return v < r.begin; });
	return it != m.begin() && at + bytes <= (it - 1)->end ? 0 : -1;
}

void count(Fiber *f, const void *p, size_t bytes, bool shared, bool is_write, const void *pc) {
	Checker &c = checker();
	const Request key{pc, f->warp->number, c.threads[size_t(index_of(f))].turns[pc]++};
	auto it = c.requests.try_emplace(key).first;
	Lanes &l = it->second;
	l.mask |= 1u << f->lane;
	l.bytes = uint8_t(bytes > 16 ? 16 : bytes);
	l.what = Counted((shared ? shared_load : global_load) + is_write);
	l.at[f->lane] = reinterpret_cast<uintptr_t>(p) - (shared ? reinterpret_cast<uintptr_t>(f->smem) : 0);
	if (l.mask != f->warp->exists) return;
	settle(pc, l);
	c.requests.erase(it);
}

void access(const void *p, size_t bytes, bool is_write, bool atomic, bool counts, const void *pc) {
	Fiber *f = self();
	Checker &c = checker();
	auto at = reinterpret_cast<uintptr_t>(p);
	if (in_stack(f, p)) return;
	if (counts && f->vector_left >= bytes && at >= f->vector && at + bytes <= f->vector + 16) f->vector_left -= bytes, counts = false; // counted as a whole
	auto smem = reinterpret_cast<uintptr_t>(f->smem);
	if (at >= smem && at < smem + f->smem_bytes + 256) {
		if (at + bytes > smem + f->smem_bytes) {
			group->run->pcs = {pc};
			fail(cudaErrorIllegalAddress, nullptr, 0, "%s of %zu bytes at byte %zu of %zu bytes of shared memory, at {pc0}", is_write ? "write" : "read", bytes,
			     size_t(at - smem), f->smem_bytes);
		}
		Cell *cells = static_cast<Cell *>(f->block_of->cells);
		for (size_t i = (at - smem) / 2; i <= (at - smem + bytes - 1) / 2; i++) touch(cells[i], is_write, atomic, p, false, pc);
		if (counts) count(f, p, bytes, true, is_write, pc);
		return;
	}
	auto global = [&](uintptr_t begin, Cell *cells) {
		for (size_t i = (at - begin) / 2; i <= (at - begin + bytes - 1) / 2; i++) touch(cells[i], is_write, atomic, p, true, pc);
		if (counts) count(f, p, bytes, false, is_write, pc);
	};
	auto &recent = c.recent[reinterpret_cast<uintptr_t>(pc) / 4 % 4];
	if (at >= recent.begin && at + bytes <= recent.end) return global(recent.begin, recent.cells);
	const auto &m = c.run->memory;
	auto it = std::upper_bound(m.begin(), m.end(), at, [](uintptr_t v, const Range &r) { return v < r.begin; });
	const Range *r = it == m.begin() ? nullptr : &*(it - 1);
	if (r && at < r->end && at + bytes <= r->end) {
		auto &cells = c.global[r->begin];
		if (cells.size() != (r->end - r->begin + 1) / 2) cells.assign((r->end - r->begin + 1) / 2, Cell{});
		recent.begin = r->begin, recent.end = r->end, recent.cells = cells.data();
		return global(r->begin, cells.data());
	}
	bool near = (r && at < r->end + 256) || (it != m.end() && at + 256 >= it->begin);
	if (near) {
		group->run->pcs = {pc};
		const Range &n = r && at < r->end + 256 ? *r : *it;
		fail(cudaErrorIllegalAddress, nullptr, 0, "%s of %zu bytes at byte %lld of a buffer of %zu, at {pc0}", is_write ? "write" : "read", bytes, (long long)(at - n.begin),
		     size_t(n.end - n.begin));
	}
	if (is_write && !atomic) {
		group->run->pcs = {pc};
		fail(cudaErrorIllegalAddress, nullptr, 0, "write of %zu bytes at %p, which is not memory of the device, at {pc0}", bytes, p);
	}
}

void on_access(const void *p, size_t bytes, bool is_write, bool counts, const void *pc) {
	if (current && group && bytes) access(p, bytes, is_write, false, counts && checker().counting, pc);
}

} // namespace

void begin(Group *g) {
	Checker &c = checker();
	c.run = g->run;
	if (c.number != g->run->number) {
		c.number = g->run->number;
		c.launch_base = ++c.latest;
		for (auto it = c.global.begin(); it != c.global.end();) { // of memory that was freed
			bool held = false;
			for (auto &r : g->run->memory) held = held || r.begin == it->first;
			it = held ? std::next(it) : c.global.erase(it);
		}
		for (auto &p : c.patterns) p.clear();
		for (auto &r : c.recent) r = {};
		c.counting = g->run->counting;
		if (!c.image) {
			Dl_info i;
			if (dladdr(reinterpret_cast<const void *>(&begin), &i)) c.image = reinterpret_cast<uintptr_t>(i.dli_fbase);
		}
	}
	c.block_base = ++c.latest;
	c.sync.clear();
	size_t n = g->warps.size() * 32;
	c.threads.resize(n);
	for (size_t i = 0; i < n; i++) {
		PerThread &t = c.threads[i];
		t.seen.assign(n, c.block_base - 1);
		t.seen[i] = c.block_base;
		t.fenced.clear(), t.pending.clear(), t.turns.clear();
	}
	for (auto &b : g->blocks) {
		auto &cells = c.shared[reinterpret_cast<uintptr_t>(b.smem)];
		if (cells.size() < (g->run->launch->smem + 1) / 2) cells.resize((g->run->launch->smem + 1) / 2);
		b.cells = cells.data();
		b.together = g->run->launch->cooperative;
	}
}

void end(Group *g) {
	for (auto &[key, l] : checker().requests) settle(key.pc, l); // that only some lanes came to
	checker().requests.clear();
	for (int i = 0; i < kCounted; i++) {
		Run &r = *g->run;
		r.requests[i] = r.waves[i] = r.least[i] = r.worst_waves[i] = r.worst_least[i] = 0;
		for (auto &[pc, p] : checker().patterns[i]) {
			r.requests[i] += p.requests, r.waves[i] += p.waves, r.least[i] += p.least;
			if (p.waves - p.least > r.worst_waves[i] - r.worst_least[i]) r.worst[i] = pc, r.worst_waves[i] = p.waves, r.worst_least[i] = p.least;
		}
	}
}

void read(const void *p, size_t bytes, const void *pc) { on_access(p, bytes, false, false, pc); }
void write(const void *p, size_t bytes, const void *pc) { on_access(p, bytes, true, false, pc); }
void count(const void *p, size_t bytes, bool is_write, const void *pc) {
	Fiber *f = self();
	if (!checker().counting || !bytes || in_stack(f, p)) return;
	int where = memory_of(f, p, bytes);
	if (where < 0) return;
	count(f, p, bytes, where == 1, is_write, pc);
	f->vector = reinterpret_cast<uintptr_t>(p), f->vector_left = uint32_t(bytes);
}

void release(Clocks &c) {
	Fiber *f = self();
	join(c, checker().threads[size_t(index_of(f))].seen);
	clock_of(f)++;
	checker().latest = std::max(checker().latest, clock_of(f));
}

void acquire(const Clocks &c) { join(checker().threads[size_t(index_of(self()))].seen, c); }
void acquire(Fiber *f, const Clocks &c) { join(checker().threads[size_t(index_of(f))].seen, c); }

void meet(uint32_t mask) {
	Warp *w = self()->warp;
	Clocks all;
	for (uint32_t m = mask; m; m &= m - 1) join(all, checker().threads[size_t(index_of(w->lanes + __builtin_ctz(m)))].seen);
	for (uint32_t m = mask; m; m &= m - 1) {
		Fiber *f = w->lanes + __builtin_ctz(m);
		checker().threads[size_t(index_of(f))].seen = all;
		checker().latest = std::max(checker().latest, ++clock_of(f));
	}
}

std::string place(const void *pc) {
	static std::map<const void *, std::string> known; // under run_mu
	if (auto it = known.find(pc); it != known.end()) return it->second;
	Dl_info i;
	if (!dladdr(pc, &i) || !i.dli_fname) return text("%p", pc);
	auto at = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(i.dli_fbase) - 1;
	std::string s = text("+0x%zx", size_t(at)), command = text("addr2line -i -e '%s' 0x%zx 2>/dev/null", i.dli_fname, size_t(at));
	if (FILE *f = popen(command.c_str(), "r")) {
		char line[1024];
		while (fgets(line, sizeof line, f)) { // from the innermost inlined function outwards: the first line of the kernel's own
			if (line[0] == '?') break;
			s = base_name(line);
			s.erase(s.find_last_not_of(" \n") + 1);
			if (size_t d = s.find(" (discriminator"); d != std::string::npos) s.erase(d);
			if (s.compare(0, 6, "emu.h:") && s.compare(0, 7, "sm90.h:")) break;
		}
		pclose(f);
	}
	return known[pc] = s;
}

} // namespace emu::check

#if defined(EMU_CHECK)

namespace emu::check {
namespace {

// ---- atomics ---------------------------------------------------------------------

void before_atomic(const void *p, size_t bytes, bool is_write, int order, const void *pc) {
	if (!current || !group) return;
	access(p, bytes, is_write, true, false, pc);
	PerThread &t = checker().threads[size_t(index_of(self()))];
	Clocks &c = checker().sync[reinterpret_cast<uintptr_t>(p)];
	if (is_write) {
		if (order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST)
			release(c);
		else if (!t.fenced.empty())
			join(c, t.fenced);
	}
}

void after_atomic(const void *p, bool is_read, int order) {
	if (!current || !group || !is_read) return;
	PerThread &t = checker().threads[size_t(index_of(self()))];
	const Clocks &c = checker().sync[reinterpret_cast<uintptr_t>(p)];
	if (order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST || order == __ATOMIC_CONSUME)
		acquire(c);
	else
		join(t.pending, c);
}

} // namespace
} // namespace emu::check

void emu::vector_access(const void *p, size_t bytes, bool is_write) {
	if (current && group) check::count(p, bytes, is_write, __builtin_return_address(0));
}

// ---- what the compiler calls ---------------------------------------------------------

using namespace emu;

#define PC __builtin_return_address(0)
#define PLAIN(n)                                                                                           \
	void __tsan_read##n(void *p) { check::on_access(p, n, false, true, PC); }                              \
	void __tsan_write##n(void *p) { check::on_access(p, n, true, true, PC); }                              \
	void __tsan_volatile_read##n(void *p) { check::on_access(p, n, false, true, PC); }                     \
	void __tsan_volatile_write##n(void *p) { check::on_access(p, n, true, true, PC); }                     \
	void __tsan_unaligned_read##n(void *p) { check::on_access(p, n, false, true, PC); }                    \
	void __tsan_unaligned_write##n(void *p) { check::on_access(p, n, true, true, PC); }
#define ATOMIC(bits, T)                                                                                    \
	T __tsan_atomic##bits##_load(const volatile T *p, int order) {                                         \
		check::before_atomic(const_cast<T *>(p), sizeof(T), false, order, PC);                             \
		T v = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                        \
		check::after_atomic(const_cast<T *>(p), true, order);                                              \
		return v;                                                                                          \
	}                                                                                                      \
	void __tsan_atomic##bits##_store(volatile T *p, T v, int order) {                                      \
		check::before_atomic(const_cast<T *>(p), sizeof(T), true, order, PC);                              \
		__atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                          \
	}                                                                                                      \
	MODIFY(bits, T, exchange, __atomic_exchange_n)                                                         \
	MODIFY(bits, T, fetch_add, __atomic_fetch_add)                                                         \
	MODIFY(bits, T, fetch_sub, __atomic_fetch_sub)                                                         \
	MODIFY(bits, T, fetch_or, __atomic_fetch_or)                                                           \
	MODIFY(bits, T, fetch_and, __atomic_fetch_and)                                                         \
	MODIFY(bits, T, fetch_xor, __atomic_fetch_xor)                                                         \
	int __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *expected, T v, int order, int) {   \
		check::before_atomic(const_cast<T *>(p), sizeof(T), true, order, PC);                              \
		bool done = __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
		check::after_atomic(const_cast<T *>(p), true, order);                                              \
		return done;                                                                                       \
	}                                                                                                      \
	int __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *expected, T v, int order, int other) { \
		return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, order, other);                \
	}
#define MODIFY(bits, T, name, builtin)                                                                     \
	T __tsan_atomic##bits##_##name(volatile T *p, T v, int order) {                                        \
		check::before_atomic(const_cast<T *>(p), sizeof(T), true, order, PC);                              \
		T old = builtin(p, v, __ATOMIC_SEQ_CST);                                                           \
		check::after_atomic(const_cast<T *>(p), true, order);                                              \
		return old;                                                                                        \
	}
#pragma GCC visibility push(hidden)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
void __tsan_read_range(void *p, size_t n) { check::on_access(p, n, false, true, PC); }
void __tsan_write_range(void *p, size_t n) { check::on_access(p, n, true, true, PC); }
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
void __tsan_atomic_thread_fence(int) {
	if (!current || !group) return;
	auto &t = check::checker().threads[size_t(check::index_of(self()))];
	check::join(t.seen, t.pending);
	t.fenced.clear();
	check::release(t.fenced);
}
void __tsan_atomic_signal_fence(int) {}
}
#pragma GCC visibility pop
#endif
