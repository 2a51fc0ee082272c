// fiber.cpp: threads of a group of blocks as fibers of one thread of the system.
//
// A thread gets a stack when it first runs and gives it to the next one when it
// ends without having waited, so a kernel without barriers is a plain loop.
// Lanes run on until they must wait; then the lowest ready lane of the same warp
// goes on, else the next warp with one (with a seed: any).
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

__thread dim3 blockDim, gridDim;

namespace emu {

__thread Thread *current;
__thread Group *group;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10; // red zones make frames larger
#else
constexpr size_t kStack = 128 << 10;
#endif
constexpr uint64_t kCanary = 0x6d6172676f737461; // at the lower end of a stack

extern "C" void emu_switch(void **save, void *to);
#if defined(__x86_64__)
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
	pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
	movq %rsp,(%rdi); movq %rsi,%rsp
	popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
	ret
.size emu_switch,.-emu_switch
)");
constexpr int kSaved = 6;
#elif defined(__aarch64__)
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
	sub sp, sp, #160
	stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
	stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
	stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
	mov x9, sp
	str x9, [x0]
	mov sp, x1
	ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
	ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
	ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
	add sp, sp, #160
	ret
.size emu_switch,.-emu_switch
)");
#else
#error "emu_switch is missing for this architecture"
#endif

// leave switches from a fiber to another, or to the group's own stack if to is null.
void leave(Fiber *from, Fiber *to, bool for_good) {
	Group *g = group;
	current = to;
#if defined(__SANITIZE_ADDRESS__)
	void **fake = for_good ? nullptr : &from->fake_stack;
	if (to)
		__sanitizer_start_switch_fiber(fake, to->stack->base, kStack);
	else
		__sanitizer_start_switch_fiber(fake, g->main_bottom, g->main_size);
#else
	(void)for_good;
#endif
	// TSan takes the fibers of a worker for one thread (races between them are check.cpp's): code is compiled without
	// its calls at functions' entries, so it has no stack of its own that a switch would have to change.
	emu_switch(&from->sp, to ? to->sp : g->main_sp);
#if defined(__SANITIZE_ADDRESS__)
	__sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

Stack *take_stack(Group *g) {
	if (!g->free_stacks.empty()) {
		Stack *s = g->free_stacks.back();
		g->free_stacks.pop_back();
		return s;
	}
	void *p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED) fail(cudaErrorLaunchOutOfResources, nullptr, 0, "no memory for the stack of a thread");
	auto *s = new Stack{static_cast<char *>(p), int(g->all_stacks.size())};
	memcpy(s->base, &kCanary, sizeof kCanary);
	g->all_stacks.push_back(s);
	return s;
}

bool intact(const Stack *s) {
	uint64_t v;
	memcpy(&v, s->base, sizeof v);
	return v == kCanary;
}

Fiber *lane_of(Group *g, Warp *w, uint32_t mask) {
	int lane = __builtin_ctz(mask);
	if (g->run->seed) {
		int k = int(next_random(g) & 31);
		uint32_t rotated = k ? mask >> k | mask << (32 - k) : mask;
		lane = (__builtin_ctz(rotated) + k) & 31;
	}
	return w->lanes + lane;
}

// next_warp finds the first ready warp from start on, in a circle; -1: none.
int next_warp(Group *g, int start) {
	size_t words = g->ready.size(), at = size_t(start) / 64;
	uint64_t bits = g->ready[at] >> (start % 64) << (start % 64);
	for (size_t i = 0; i <= words; i++) {
		if (bits) return int(at * 64 + size_t(__builtin_ctzll(bits)));
		at = at + 1 == words ? 0 : at + 1;
		bits = g->ready[at];
	}
	return -1;
}

Fiber *pick(Group *g, int start) {
	if (g->run->seed && next_random(g) % 4 == 0) start = int(next_random(g) % g->warps.size());
	int w = next_warp(g, start);
	while (w < 0 && deliver_late(g)) w = next_warp(g, start);
	return w < 0 ? nullptr : lane_of(g, &g->warps[size_t(w)], g->warps[size_t(w)].ready);
}

void sleep_lane(Warp *w, int lane) {
	w->ready &= ~(1u << lane);
	if (!w->ready) group->ready[size_t(w->number) / 64] &= ~(1ull << (w->number % 64));
}

void thread_main();

void give_stack(Fiber *f, Stack *s) {
	f->stack = s;
	// Stacks begin at different offsets in a page: equal ones would compete for the same lines of L1.
	char *top = s->base + kStack - 64 - s->number % 32 * 448;
	void **sp = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
#if defined(__x86_64__)
	*--sp = nullptr; // keeps the stack at 16n + 8 on entry, as after a call
	*--sp = reinterpret_cast<void *>(thread_main);
	for (int i = 0; i < kSaved; i++) *--sp = nullptr;
#else
	sp -= 20;
	memset(sp, 0, 160);
	sp[11] = reinterpret_cast<void *>(thread_main); // x30
#endif
	f->sp = sp;
}

void go(Fiber *from, Fiber *to, bool for_good) {
	if (!to->stack) give_stack(to, take_stack(group));
	leave(from, to, for_good);
}

[[noreturn]] void leave_group(Fiber *f) {
	leave(f, nullptr, true);
	__builtin_unreachable();
}

// who_waits lists where the live threads of the group stand.
std::string who_waits(Group *g) {
	struct Place {
		const char *what, *file;
		int line, count;
		const Fiber *first;
	};
	std::vector<Place> places;
	for (auto &w : g->warps)
		for (int l = 0; l < 32; l++) {
			const Fiber &f = w.lanes[l];
			if (!(w.live >> l & 1)) continue;
			const char *what = f.what ? f.what : "run";
			bool found = false;
			for (auto &p : places)
				if (p.what == what && p.file == f.file && p.line == f.line) p.count++, found = true;
			if (!found) places.push_back({what, f.file, f.line, 1, &f});
		}
	std::string s;
	for (size_t i = 0; i < places.size() && i < 8; i++) {
		auto &p = places[i];
		s += text("%s %d threads in %s at %s:%d (first: block (%u,%u,%u) thread (%u,%u,%u))", i ? "," : "", p.count, p.what, base_name(p.file), p.line,
		          p.first->bid.x, p.first->bid.y, p.first->bid.z, p.first->tid.x, p.first->tid.y, p.first->tid.z);
	}
	return s;
}

[[noreturn]] void deadlock(const char *file, int line) {
	fail(cudaErrorLaunchTimeout, file, line, "deadlock: every live thread waits:%s", who_waits(group).c_str());
}

void thread_main() {
	Group *g = group;
#if defined(__SANITIZE_ADDRESS__)
	const void *bottom;
	size_t size;
	__sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
	if (!g->main_size) g->main_bottom = bottom, g->main_size = size; // the first fiber comes from the group's own stack
#endif
	for (;;) {
		g->run->launch->body();
		Fiber *f = self();
		thread_exits(f);
		if (!intact(f->stack)) fail(cudaErrorIllegalAddress, nullptr, 0, "stack overflow: local variables of a thread exceed %zu bytes", kStack);
		f->done = true;
		f->warp->live &= ~(1u << f->lane);
		sleep_lane(f->warp, f->lane);
		if (--f->block_of->live == 0) check_block_exit(f->block_of);
		g->live--;
		g->idle = 0;
		Fiber *next = g->live ? pick(g, f->warp->number) : nullptr;
		if (g->live && !next) deadlock(nullptr, 0);
		Stack *s = f->stack;
		f->stack = nullptr;
		if (next && !next->stack) { // it goes on here
			next->stack = s;
			current = next;
			continue;
		}
		g->free_stacks.push_back(s); // nobody takes it before this fiber has left
		if (!next) leave_group(f);
		go(f, next, true);
	}
}

} // namespace

uint32_t next_random(Group *g) {
	g->random = g->random * 6364136223846793005ull + 1442695040888963407ull;
	return uint32_t(g->random >> 33);
}

bool in_stack(const Fiber *f, const void *p) {
	auto *q = static_cast<const char *>(p);
	return q >= f->stack->base && q < f->stack->base + kStack;
}

void wake(Warp *w, uint32_t lanes) {
	group->idle = 0;
	w->ready |= lanes & w->live;
	if (w->ready) group->ready[size_t(w->number) / 64] |= 1ull << (w->number % 64);
}

void block_here(const char *what, const char *file, int line) {
	Fiber *f = self();
	f->what = what, f->file = file, f->line = line;
	sleep_lane(f->warp, f->lane);
	Fiber *next = pick(group, f->warp->number);
	if (!next) deadlock(file, line);
	if (next != f) go(f, next, false);
	f->what = nullptr;
}

void changed() {
	if (group) group->idle = 0;
}

// spin is a turn of a polling loop: every other ready lane has its turn before this one.
void spin(const char *file, int line) {
	Fiber *f = self();
	Group *g = group;
	if (g->run->failed.load(std::memory_order_relaxed)) leave_group(f); // a block of another worker failed
	f->what = "a polling loop", f->file = file, f->line = line;
	if (g->idle % 256 == 255) deliver_late(g);
	if (++g->idle > 20000 + 256 * uint64_t(g->live)) {
		bool alone = g->blocks.size() == 1 && g->run->launch->grid.x * uint64_t(g->run->launch->grid.y) * g->run->launch->grid.z > 1;
		fail(cudaErrorLaunchTimeout, file, line, "deadlock: polling for what never comes%s; live threads:%s",
		     alone ? " (blocks of an ordinary launch need not run at the same time)" : "", who_waits(g).c_str());
	}
	Warp *w = f->warp;
	// Every other turn leaves the warp: its lanes may meet in each turn of the loop, and then one is always ready.
	uint32_t later = ++g->spins % 2 || f->lane == 31 ? 0 : w->ready & ~((2u << f->lane) - 1);
	Fiber *next;
	if (later) {
		next = w->lanes + __builtin_ctz(later);
	} else {
		int n = next_warp(g, w->number + 1 == int(g->warps.size()) ? 0 : w->number + 1);
		next = g->warps[size_t(n)].lanes + __builtin_ctz(g->warps[size_t(n)].ready); // this lane is ready: there is one
	}
	if (next != f) go(f, next, false);
	f->what = nullptr;
}

void fail(cudaError_t code, const char *file, int line, const char *format, ...) {
	char message[4096];
	va_list args;
	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	Fiber *f = self();
	Run *r = group->run;
	std::string s = text("kernel %s: %s", r->launch->name.c_str(), message);
	if (file && *file) s += text(", at %s:%d", base_name(file), line);
	s += text(", block (%u,%u,%u), thread (%u,%u,%u)", f->bid.x, f->bid.y, f->bid.z, f->tid.x, f->tid.y, f->tid.z);
	{
		std::lock_guard<std::mutex> lock(r->mu);
		if (r->code == cudaSuccess) r->code = code, r->report = s;
	}
	r->failed = true;
	group->failed = true;
	leave_group(f);
}

void misaligned(const void *p, int bytes, const char *file, int line) {
	fail(cudaErrorMisalignedAddress, file, line, "vector of %d bytes at %p: misaligned", bytes, p);
}

void run_blocks(Group *g, Run *run, uint64_t first, int count) {
	const Launch &l = *run->launch;
	const int threads = int(l.block.x * l.block.y * l.block.z), warps = (threads + 31) / 32;
	g->run = run;
	g->failed = false;
	g->idle = 0;
	g->random = (run->seed + 1) * 0x9E3779B97F4A7C15ull ^ (first + 1) * 0xD1B54A32D192ED03ull;
	g->blocks.resize(size_t(count));
	g->warps.resize(size_t(count * warps));
	g->fibers.resize(g->warps.size() * 32);
	g->ready.assign((g->warps.size() + 63) / 64, 0);
	g->live = int64_t(count) * threads;
#if defined(__SANITIZE_ADDRESS__)
	const size_t zone = 0; // ASan has its own, behind a buffer of exactly this size
	const bool fits = g->memory_bytes == l.smem;
#else
	const size_t zone = 256; // behind shared memory, to see writes past its end
	const bool fits = g->memory_bytes >= l.smem;
#endif
	if (!fits) {
		for (char *p : g->memory) free(p);
		g->memory.clear();
		g->memory_bytes = l.smem;
	}
	while (g->memory.size() < size_t(count)) {
		void *p = nullptr;
		if (posix_memalign(&p, 1024, g->memory_bytes + zone + (g->memory_bytes + zone == 0))) p = nullptr;
		if (p) {
			g->memory.push_back(static_cast<char *>(p));
		} else {
			std::lock_guard<std::mutex> lock(run->mu);
			run->code = cudaErrorLaunchOutOfResources, run->report = "no memory for shared memory", run->failed = true;
			return;
		}
	}
	for (int b = 0; b < count; b++) {
		Block &k = g->blocks[size_t(b)];
		uint64_t i = run->order.empty() ? first + uint64_t(b) : run->order[first + uint64_t(b)];
		k.index = {unsigned(i % l.grid.x), unsigned(i / l.grid.x % l.grid.y), unsigned(i / l.grid.x / l.grid.y)};
		k.threads = k.live = threads, k.warps = warps;
		k.first = &g->warps[size_t(b * warps)];
		k.smem = g->memory[size_t(b)];
		memset(k.smem, 0xff, l.smem + zone);
		memset(k.barriers, 0, sizeof k.barriers);
		k.tma.clear(), k.sleepers.clear(), k.clocks.clear(), k.ended.clear();
		for (auto &log : k.wgmma_log) log.clear();
		for (int w = 0; w < warps; w++) {
			Warp &x = k.first[w];
			int lanes = threads - w * 32;
			x.exists = x.live = x.ready = lanes >= 32 ? ~0u : (1u << lanes) - 1;
			x.number = b * warps + w;
			x.block = &k;
			x.lanes = &g->fibers[size_t(x.number) * 32];
			for (auto &m : x.meetings) m.arrived = 0;
			x.products.clear(), x.commits.clear(), x.issued = 0, x.fenced = false;
			g->ready[size_t(x.number) / 64] |= 1ull << (x.number % 64);
			for (int n = 0; n < 32 && n < lanes; n++) {
				Fiber &f = x.lanes[n];
				unsigned t = unsigned(w * 32 + n);
				f.tid = {t % l.block.x, t / l.block.x % l.block.y, t / l.block.x / l.block.y};
				f.bid = k.index;
				f.smem = k.smem, f.smem_bytes = l.smem;
				f.lane = n, f.warp = &x, f.block_of = &k;
				f.stack = nullptr, f.done = false, f.what = nullptr, f.file = nullptr, f.line = 0;
				f.copies.clear(), f.commits.clear(), f.committed = 0, f.products = 0, f.vector_left = 0;
			}
		}
	}
	group = g;
	blockDim = l.block, gridDim = l.grid;
	if constexpr (check::on) check::begin(g);
	Fiber *begin = pick(g, 0);
	give_stack(begin, take_stack(g));
	current = begin;
#if defined(__SANITIZE_ADDRESS__)
	g->main_size = 0;
	__sanitizer_start_switch_fiber(&g->main_fake, begin->stack->base, kStack);
#endif
	emu_switch(&g->main_sp, begin->sp);
#if defined(__SANITIZE_ADDRESS__)
	__sanitizer_finish_switch_fiber(g->main_fake, nullptr, nullptr);
#endif
	current = nullptr;
	if constexpr (check::on) check::end(g);
	group = nullptr;
	if (run->failed.load()) { // fibers were dropped: their stacks are whole again
		g->free_stacks = g->all_stacks;
#if defined(__SANITIZE_ADDRESS__)
		for (Stack *s : g->all_stacks) __asan_unpoison_memory_region(s->base, kStack);
#endif
		for (Stack *s : g->all_stacks) memcpy(s->base, &kCanary, sizeof kCanary);
		return;
	}
	for (int b = 0; b < count && zone; b++) {
		const Block &k = g->blocks[size_t(b)];
		for (size_t i = 0; i < zone; i++)
			if (static_cast<unsigned char>(k.smem[l.smem + i]) != 0xff) {
				std::lock_guard<std::mutex> lock(run->mu);
				if (run->code == cudaSuccess) {
					run->code = cudaErrorIllegalAddress;
					run->report = text("kernel %s: block (%u,%u,%u) wrote %zu bytes past the %zu bytes of its shared memory", l.name.c_str(), k.index.x, k.index.y,
					                   k.index.z, i, l.smem);
				}
				run->failed = true;
				return;
			}
	}
}

} // namespace emu
