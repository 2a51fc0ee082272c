// nccl.cu: collectives of ranks by NCCL, opened at run time: the plugin links nothing of it, and a
// machine without it is told so. The emulated plugin opens itself, whose stand-in (emu/nccl.cpp)
// has the same prototypes.
//
// Collectives enqueue, and nobody waits for them but who waits for their stream. NCCL by itself waits for ever for a rank
// that does not come. So communicators do not block, and while collectives are under way every wait of the
// plugin polls (wait_stream, wait_event): it looks at their communicators too and aborts one at the time limit or at its first
// error, upon which NCCL's kernels end, and the streams go on with undefined contents: who waited asks the group (comm_error). Closing is an
// abort too, since a destroy may wait for others.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "nccl_api.h"
#include "plugin.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Library {
#define F(name, result, arguments) result(*name) arguments = nullptr;
	MARGO_NCCL_FUNCTIONS(F)
#undef F
	std::string why;     // it cannot be used; empty if it can
	bool fits = true;    // it is for this plugin's devices
	int version = 0;
};

// plugin_file is the file that this code was loaded from.
std::string plugin_file() {
	Dl_info i{};
	return dladdr(reinterpret_cast<const void *>(&comm_close), &i) && i.dli_fname ? i.dli_fname : "";
}

Library open_library(const std::string &path) {
	Library l;
	void *h = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
	if (!h) {
		l.why = dlerror();
		return l;
	}
#define F(name, result, arguments)                                                  \
	l.name = reinterpret_cast<result(*) arguments>(dlsym(h, #name));                \
	if (!l.name && l.why.empty()) l.why = path + " has no function " #name ": 2.14 or newer is needed";
	MARGO_NCCL_FUNCTIONS(F)
#undef F
	if (l.why.empty() && l.ncclGetVersion(&l.version) != ncclSuccess) l.why = path + " does not tell its version";
	if (!l.why.empty()) dlclose(h);
	return l;
}

// library is NCCL as the environment names it. What was opened stays open, for its threads may run
// to the end of the process; what was not is tried again.
std::shared_ptr<const Library> library() {
	static std::mutex mu;
	static auto *opened = new std::map<std::string, std::shared_ptr<const Library>>;
	const char *named = getenv("MARGO_NCCL_LIB");
	const bool other = named && *named;
	const std::string path = other ? named : gpu::emulated ? plugin_file() : "libnccl.so.2";
	std::lock_guard<std::mutex> lock(mu);
	if (auto it = opened->find(path); it != opened->end()) return it->second;
	auto l = std::make_shared<Library>(open_library(path));
	l->fits = !gpu::emulated || !other;
	if (l->why.empty()) (*opened)[path] = l;
	return l;
}

margo_status complain(char *err, size_t err_bytes, margo_status s, const std::string &text) {
	if (err_bytes) snprintf(err, err_bytes, "%s", text.c_str());
	return s;
}

// usable is why the library cannot serve this plugin's devices, "" if it can.
std::string usable(const Library &l) {
	if (!l.why.empty()) return "no NCCL: " + l.why;
	if (!l.fits) return "MARGO_NCCL_LIB names an NCCL for GPUs; emulated devices have their own";
	return "";
}

std::string reason(const Library &l, ncclComm_t c, ncclResult_t r) {
	std::string text = l.ncclGetErrorString(r);
	const char *last = l.ncclGetLastError(c);
	if (last && *last) text += std::string(" (") + last + ")";
	return text;
}

using Milliseconds = std::chrono::milliseconds;

struct Pending { // a collective that has not been seen to end
	cudaEvent_t done;
	const char *what;
	uint64_t number, launched; // of the collectives of its group; kernels before it
};

constexpr uint64_t kAhead = 512;   // launches behind a collective at which keep_up looks: the driver's queue is said to hold 1024
constexpr size_t kPendingMost = 64; // at which collectives that have ended are looked for when others are enqueued

} // namespace

struct margo_group {
	margo_context *ctx;
	std::shared_ptr<const Library> lib;
	int rank = 0, ranks = 0;
	std::mutex mu;          // guards what follows; only that of error texts is taken while it is held
	ncclComm_t c = nullptr; // null once it is broken or closed
	std::string why;        // it is broken
	std::deque<Pending> pending; // in the order in which they were enqueued
	std::vector<cudaEvent_t> spare;
	uint64_t calls = 0, oldest = 0; // oldest: the number of the first of pending when waited began
	Milliseconds limit{};
	Clock::time_point waited; // since when somebody waits for the oldest
	size_t free_before = 0;   // before it was made: memory of the device, and what the pool had taken
	uint64_t taken_before = 0, memory = 0; // memory: what it is counted with
};

struct margo_comm {
	std::shared_ptr<margo_group> g;
};

namespace {

struct Current { // makes the context's device current
	explicit Current(margo_context *c) { cudaSetDevice(c->ordinal); }
};

using Lock = std::unique_lock<std::mutex>;

void pause(int turn) {
	if (turn < 64) std::this_thread::yield();
	else std::this_thread::sleep_for(std::chrono::microseconds(turn < 1024 ? 20 : 500));
}

void ended(margo_group &g, size_t n) { // the first n of pending
	for (size_t i = 0; i < n; i++) g.spare.push_back(g.pending[i].done);
	g.pending.erase(g.pending.begin(), g.pending.begin() + std::ptrdiff_t(n));
	g.ctx->under_way.fetch_sub(int64_t(n));
}

// break_up aborts the communicator, which ends its kernels, and keeps the first reason.
void break_up(margo_group &g, const std::string &why) {
	if (g.why.empty()) g.why = why;
	if (g.c) g.lib->ncclCommAbort(g.c);
	g.c = nullptr;
	ended(g, g.pending.size());
}

// healthy is whether NCCL has met no error; else the group is broken up.
bool healthy(margo_group &g, const char *what, ncclResult_t *now = nullptr) {
	if (!g.c) return false;
	ncclResult_t r = ncclSuccess, e = g.lib->ncclCommGetAsyncError(g.c, &r);
	if (e != ncclSuccess) r = e;
	if (now) *now = r;
	if (r == ncclSuccess || r == ncclInProgress) return true;
	break_up(g, std::string(what) + ": " + reason(*g.lib, g.c, r));
	return false;
}

// look takes note of the collectives that have ended, and breaks up a group that has failed, or whose next does not
// end within the limit from the first look that found it the next.
void look(margo_group &g, Milliseconds limit) {
	Relaxed relaxed;
	while (!g.pending.empty()) {
		const Pending p = g.pending.front();
		cudaError_t e = cudaEventQuery(p.done);
		if (e != cudaSuccess) cudaGetLastError(); // no error: it would be taken for the next call's
		if (!healthy(g, p.what)) return; // also after the end: what has failed has no result
		if (e == cudaSuccess) {
			ended(g, 1);
			continue;
		}
		if (e != cudaErrorNotReady) return break_up(g, std::string(p.what) + ": the device has failed: " + cudaGetErrorString(e));
		const auto now = Clock::now();
		if (g.oldest != p.number) g.oldest = p.number, g.waited = now;
		if (now - g.waited > limit) break_up(g, std::string(p.what) + ": it did not end in time: a rank is late or gone");
		return;
	}
}

margo_groups all_groups(margo_context *c) {
	std::lock_guard<std::mutex> lock(c->ranks_mu);
	return c->groups;
}

// look_at_all looks at the context's groups; the launches before the oldest collective that is under way, UINT64_MAX: none is.
uint64_t look_at_all(margo_context *c) {
	uint64_t first = UINT64_MAX;
	for (auto &g : all_groups(c)) {
		Lock lock(g->mu);
		look(*g, g->limit);
		if (!g->pending.empty()) first = std::min(first, g->pending.front().launched);
	}
	return first;
}

// told is the error of a group that is broken, of the call that made it. For want of memory NCCL has no code: its text
// says so. Then what is cached goes back to the driver, for the ranks may try once more together (cuda/comm.go), but a rank not alone.
margo_status told(margo_group &g, Lock &lock) {
	margo_context *c = g.ctx;
	const std::string why = g.why.empty() ? "the communicator was closed" : g.why;
	lock.unlock();
	if (why.find("out of memory") == std::string::npos) return fail(c, MARGO_COMM_FAULT, "%s", why.c_str());
	const uint64_t given = pool_make_room(c);
	return pool_no_room(c, why.c_str(), given);
}

// settle waits until NCCL has done what it was asked for on the host: made the communicator, enqueued. False: the group is broken.
bool settle(margo_group &g, Lock &lock, const char *what) {
	const auto end = Clock::now() + g.limit;
	for (int turn = 0;; turn++) {
		ncclResult_t r;
		if (!healthy(g, what, &r)) return false;
		if (r == ncclSuccess) return true;
		if (Clock::now() > end) return break_up(g, std::string(what) + ": a rank did not come in time"), false;
		lock.unlock();
		pause(turn);
		lock.lock();
	}
}

// collective enqueues call(group, address, count, type) for each tensor.
template <class Call> margo_status collective(margo_stream *st, margo_comm *m, const char *what, int64_t n, const margo_mat *t, Call &&call) {
	margo_context *c = st->ctx;
	Current device(c);
	margo_group &g = *m->g;
	if (g.ctx != c) return fail(c, MARGO_INVALID, "%s: the communicator is of another device", what);
	if (st->capturing) return fail(c, MARGO_INVALID, "%s: stream is capturing", what);
	struct Busy { // the memory pool asks for it when the tensors are freed
		margo_stream *st;
		~Busy() { st->busy.store(true); }
	} busy{st};
	for (int64_t i = 0; i < n; i++) {
		if (t[i].rows > 1 && t[i].ld != t[i].cols) return fail(c, MARGO_INVALID, "%s: tensor %d is not contiguous", what, int(i));
		if (t[i].dtype < MARGO_F32 || t[i].dtype > MARGO_I32) return fail(c, MARGO_INVALID, "%s: tensor %d has dtype %d", what, int(i), t[i].dtype);
	}
	Lock lock(g.mu);
	if (g.pending.size() >= kPendingMost) look(g, g.limit);
	if (g.spare.empty()) {
		lock.unlock(); // for want of memory what is cached is given back, which may wait for collectives
		cudaEvent_t e = nullptr;
		MARGO_TRY(with_room(c, "making an event", [&] { return cudaEventCreateWithFlags(&e, cudaEventDisableTiming); }));
		lock.lock();
		g.spare.push_back(e);
	}
	if (!g.c) return told(g, lock);
	const Library &l = *g.lib;
	ncclResult_t r = l.ncclGroupStart();
	for (int64_t i = 0; i < n && (r == ncclSuccess || r == ncclInProgress); i++) {
		const size_t count = size_t(t[i].rows) * size_t(t[i].cols);
		static constexpr ncclDataType_t types[] = {ncclFloat32, ncclBfloat16, ncclInt32}; // by margo's dtype
		if (count) r = call(g, ptr<void>(t[i]), count, types[t[i].dtype]);
	}
	ncclResult_t group = l.ncclGroupEnd();
	if (r == ncclSuccess || r == ncclInProgress) r = group;
	if (r != ncclSuccess && r != ncclInProgress) {
		break_up(g, std::string(what) + ": " + reason(l, g.c, r));
		if (cudaError_t e = cudaStreamQuery(st->s); e != cudaSuccess && e != cudaErrorNotReady) return check(c, e, what);
		cudaGetLastError();
		return told(g, lock);
	}
	if (!settle(g, lock, what)) return told(g, lock);
	cudaEvent_t done = g.spare.back();
	if (cudaError_t e = cudaEventRecord(done, st->s); e != cudaSuccess) {
		break_up(g, std::string(what) + ": the device has failed");
		return check(c, e, what);
	}
	g.spare.pop_back();
	const uint64_t launched = c->launched.load();
	g.pending.push_back({done, what, ++g.calls, launched});
	if (c->under_way.fetch_add(1) == 0) c->due.store(launched + kAhead);
	return MARGO_OK;
}

template <class Query, class Wait> margo_status wait(margo_context *c, const char *what, Query &&query, Wait &&wait_for_it) {
	for (int turn = 0; c->under_way.load() > 0; turn++) {
		Relaxed relaxed;
		cudaError_t e = query();
		if (e == cudaErrorNotReady) cudaGetLastError();
		look_at_all(c); // after the query: a collective that has ended by then has its error
		if (e != cudaErrorNotReady) return check(c, e, what);
		pause(turn);
	}
	return check(c, wait_for_it(), what);
}

} // namespace

margo_status wait_stream(margo_context *c, cudaStream_t s, const char *what) {
	return wait(c, what, [&] { return cudaStreamQuery(s); }, [&] { return cudaStreamSynchronize(s); });
}

margo_status wait_event(margo_context *c, cudaEvent_t e, const char *what) {
	return wait(c, what, [&] { return cudaEventQuery(e); }, [&] { return cudaEventSynchronize(e); });
}

void wait_collectives(margo_context *c) {
	for (int turn = 0; c->under_way.load() > 0 && look_at_all(c) != UINT64_MAX; turn++) pause(turn);
}

void keep_up(margo_context *c) {
	for (int turn = 0;; turn++) {
		const uint64_t first = look_at_all(c), now = c->launched.load();
		if (first == UINT64_MAX) {
			c->due.store(UINT64_MAX);
			if (c->under_way.load() > 0) c->due.store(0); // another thread has enqueued one since the look
			return;
		}
		if (now < first + kAhead) return c->due.store(first + kAhead);
		pause(turn);
	}
}

margo_status nccl_version(int32_t *version, char *err, size_t err_bytes) {
	auto l = library();
	*version = l->version;
	return l->why.empty() ? MARGO_OK : complain(err, err_bytes, MARGO_UNSUPPORTED, "no NCCL: " + l->why);
}

margo_status comm_unique_id(uint8_t *id, char *err, size_t err_bytes) {
	auto l = library();
	if (std::string why = usable(*l); !why.empty()) return complain(err, err_bytes, MARGO_UNSUPPORTED, why);
	ncclUniqueId u{};
	ncclResult_t r = l->ncclGetUniqueId(&u);
	if (r != ncclSuccess) return complain(err, err_bytes, MARGO_COMM_FAULT, "making an id: " + reason(*l, nullptr, r));
	static_assert(sizeof u == MARGO_COMM_ID_BYTES);
	memcpy(id, &u, sizeof u);
	return MARGO_OK;
}

margo_status comm_init(margo_context *c, const margo_comm_args *a, margo_comm **out) {
	Current device(c);
	if (a->size != sizeof *a) return fail(c, MARGO_INVALID, "argument struct has %u bytes, this plugin's has %zu", a->size, sizeof *a);
	if (a->ranks < 1 || a->rank < 0 || a->rank >= a->ranks) return fail(c, MARGO_INVALID, "rank %d of %d", a->rank, a->ranks);
	auto l = library();
	if (std::string why = usable(*l); !why.empty()) return fail(c, MARGO_UNSUPPORTED, "%s", why.c_str());
	auto *m = new (std::nothrow) margo_comm;
	if (!m) return fail(c, MARGO_OUT_OF_MEMORY, "a communicator");
	m->g = std::make_shared<margo_group>();
	margo_group &g = *m->g;
	g.ctx = c, g.lib = l, g.rank = a->rank, g.ranks = a->ranks, g.limit = Milliseconds(a->limit_ms);
	size_t total = 0;
	margo_counters now{};
	pool_counters(c, &now);
	g.taken_before = now.bytes_taken;
	margo_status s = check(c, cudaMemGetInfo(&g.free_before, &total), "reading the memory's size");
	if (s == MARGO_OK) {
		constexpr char what[] = "meeting the other ranks";
		ncclUniqueId id;
		memcpy(&id, a->id, sizeof id);
		ncclConfig_t config;
		Lock lock(g.mu);
		ncclResult_t r = l->ncclCommInitRankConfig(&g.c, a->ranks, id, a->rank, &config);
		if (r != ncclSuccess && r != ncclInProgress) break_up(g, std::string(what) + ": " + reason(*l, g.c, r));
		if (!settle(g, lock, what)) s = told(g, lock);
	}
	if (s != MARGO_OK) {
		comm_close(m);
		return s;
	}
	std::lock_guard<std::mutex> lock(c->ranks_mu);
	c->groups.push_back(m->g);
	*out = m;
	return MARGO_OK;
}

margo_status comm_all_reduce(margo_stream *st, margo_comm *m, int64_t n, const margo_mat *t) {
	return collective(st, m, "all-reduce", n, t, [&](margo_group &g, void *p, size_t count, ncclDataType_t type) {
		return g.lib->ncclAllReduce(p, p, count, type, ncclSum, g.c, st->s);
	});
}

margo_status comm_broadcast(margo_stream *st, margo_comm *m, int32_t root, int64_t n, const margo_mat *t) {
	if (root < 0 || root >= m->g->ranks) return fail(st->ctx, MARGO_INVALID, "broadcast from rank %d of %d", root, m->g->ranks);
	return collective(st, m, "broadcast", n, t, [&](margo_group &g, void *p, size_t count, ncclDataType_t type) {
		return g.lib->ncclBroadcast(p, p, count, type, root, g.c, st->s);
	});
}

margo_status comm_error(margo_comm *m) {
	margo_group &g = *m->g;
	Current device(g.ctx);
	Lock lock(g.mu);
	return healthy(g, "in the background") ? MARGO_OK : told(g, lock);
}

margo_status comm_wait(margo_comm *m, int32_t limit_ms) {
	margo_group &g = *m->g;
	Current device(g.ctx);
	for (int turn = 0;; turn++) {
		Lock lock(g.mu);
		look(g, Milliseconds(limit_ms));
		if (g.pending.empty()) return healthy(g, "after the last collective") ? MARGO_OK : told(g, lock);
		lock.unlock();
		pause(turn);
	}
}

margo_status comm_pending(margo_comm *m, int64_t *n) {
	margo_group &g = *m->g;
	Current device(g.ctx);
	Lock lock(g.mu);
	look(g, g.limit);
	*n = int64_t(g.pending.size());
	return MARGO_OK;
}

margo_status comm_limit(margo_comm *m, int32_t limit_ms) {
	Lock lock(m->g->mu);
	m->g->limit = Milliseconds(limit_ms);
	return MARGO_OK;
}

margo_status comm_fail(margo_comm *m, const char *why) {
	margo_group &g = *m->g;
	Current device(g.ctx);
	Lock lock(g.mu);
	look(g, g.limit); // what has ended has a result
	break_up(g, why);
	return MARGO_OK;
}

margo_status comm_memory(margo_comm *m, uint64_t *bytes) {
	margo_group &g = *m->g;
	margo_context *c = g.ctx;
	Current device(c);
	size_t free = 0, total = 0;
	MARGO_TRY(check(c, cudaMemGetInfo(&free, &total), "reading the memory's size"));
	margo_counters now{};
	pool_counters(c, &now);
	const int64_t less = int64_t(g.free_before) - int64_t(free), ours = int64_t(now.bytes_taken) - int64_t(g.taken_before);
	const uint64_t took = uint64_t(std::max<int64_t>(0, less - ours));
	MARGO_TRY(pool_library(c, "memory that NCCL has taken", took));
	g.memory = *bytes = took;
	return MARGO_OK;
}

margo_status comm_close(margo_comm *m) {
	margo_group &g = *m->g;
	margo_context *c = g.ctx;
	Current device(c);
	margo_status s = MARGO_OK;
	{
		std::lock_guard<std::mutex> lock(c->ranks_mu);
		std::erase(c->groups, m->g);
	}
	{
		Lock lock(g.mu);
		look(g, g.limit);
		if (!g.pending.empty()) {
			const char *what = g.pending.front().what;
			break_up(g, what);
			s = fail(c, MARGO_COMM_FAULT, "%s: rank %d left the group before it had ended", what, g.rank);
		}
		if (g.c) g.lib->ncclCommAbort(g.c);
		g.c = nullptr;
		for (cudaEvent_t e : g.spare) cudaEventDestroy(e);
		g.spare.clear();
	}
	pool_library_gave(c, g.memory);
	delete m;
	return s;
}
