// nccl.cu: collectives of ranks by NCCL, opened at run time: the plugin links nothing of it, and a
// machine without it is told so. The emulated plugin opens itself, whose stand-in (emu/nccl.cpp)
// has the same prototypes.
//
// NCCL by itself waits for ever for a rank that does not come. So communicators do not block: the
// host polls them and the end of what was enqueued, and aborts at the time limit or at the first
// error, upon which NCCL's kernels end. Closing is an abort too, since a destroy may wait for others:
// nothing is under way then, for comm_wait has been called.
#include <dlfcn.h>

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

} // namespace

struct margo_comm {
	margo_context *ctx;
	std::shared_ptr<const Library> lib;
	ncclComm_t c = nullptr; // null once it is broken
	cudaEvent_t done = nullptr;
	int rank = 0, ranks = 0;
	bool pending = false; // something was enqueued since the last wait
	std::chrono::milliseconds limit{}; // for NCCL to connect ranks, which it may do at their first collective
};

namespace {

struct Current { // makes the context's device current
	explicit Current(margo_context *c) { cudaSetDevice(c->ordinal); }
};

// broken aborts the communicator, which ends its kernels, and stores why. For want of memory NCCL has no code: its text
// says so. Then what is cached goes back to the driver, for the ranks may try once more together (cuda/comm.go), but a rank not alone.
margo_status broken(margo_comm *m, const char *what, const std::string &why) {
	if (m->c) m->lib->ncclCommAbort(m->c);
	m->c = nullptr, m->pending = false;
	if (why.find("out of memory") != std::string::npos) {
		const uint64_t given = pool_make_room(m->ctx);
		return pool_no_room(m->ctx, (std::string(what) + ": " + why).c_str(), given);
	}
	return fail(m->ctx, MARGO_COMM_FAULT, "%s: %s", what, why.c_str());
}

void pause(int turn) {
	if (turn < 64) std::this_thread::yield();
	else std::this_thread::sleep_for(std::chrono::microseconds(turn < 1024 ? 20 : 500));
}

// settle waits until NCCL has done what it was asked for on the host: made the communicator, enqueued.
margo_status settle(margo_comm *m, const char *what, Clock::time_point end) {
	for (int turn = 0;; turn++) {
		ncclResult_t r = ncclSuccess, e = m->lib->ncclCommGetAsyncError(m->c, &r);
		if (e != ncclSuccess) r = e;
		if (r == ncclSuccess) return MARGO_OK;
		if (r != ncclInProgress) return broken(m, what, reason(*m->lib, m->c, r));
		if (Clock::now() > end) return broken(m, what, "a rank did not come in time");
		pause(turn);
	}
}

// collective enqueues call(lib, address, count, type) for each tensor.
template <class Call> margo_status collective(margo_stream *st, margo_comm *m, const char *what, int64_t n, const margo_mat *t, Call &&call) {
	margo_context *c = st->ctx;
	Current g(c);
	if (m->ctx != c) return fail(c, MARGO_INVALID, "%s: the communicator is of another device", what);
	if (st->capturing) return fail(c, MARGO_INVALID, "%s: stream is capturing", what);
	struct Busy { // the memory pool asks for it when the tensors are freed
		margo_stream *st;
		~Busy() { st->busy.store(true); }
	} busy{st};
	if (!m->c) return fail(c, MARGO_COMM_FAULT, "%s: the communicator has failed before", what);
	for (int64_t i = 0; i < n; i++) {
		if (t[i].rows > 1 && t[i].ld != t[i].cols) return fail(c, MARGO_INVALID, "%s: tensor %d is not contiguous", what, int(i));
		if (t[i].dtype < MARGO_F32 || t[i].dtype > MARGO_I32) return fail(c, MARGO_INVALID, "%s: tensor %d has dtype %d", what, int(i), t[i].dtype);
	}
	const Library &l = *m->lib;
	ncclResult_t r = l.ncclGroupStart();
	for (int64_t i = 0; i < n && (r == ncclSuccess || r == ncclInProgress); i++) {
		const size_t count = size_t(t[i].rows) * size_t(t[i].cols);
		static constexpr ncclDataType_t types[] = {ncclFloat32, ncclBfloat16, ncclInt32}; // by margo's dtype
		if (count) r = call(l, ptr<void>(t[i]), count, types[t[i].dtype]);
	}
	ncclResult_t ended = l.ncclGroupEnd();
	if (r == ncclSuccess || r == ncclInProgress) r = ended;
	if (r != ncclSuccess && r != ncclInProgress) return broken(m, what, reason(l, m->c, r));
	MARGO_TRY(settle(m, what, Clock::now() + m->limit));
	m->pending = true;
	return check(c, cudaEventRecord(m->done, st->s), what);
}

} // namespace

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
	Current g(c);
	if (a->size != sizeof *a) return fail(c, MARGO_INVALID, "argument struct has %u bytes, this plugin's has %zu", a->size, sizeof *a);
	if (a->ranks < 1 || a->rank < 0 || a->rank >= a->ranks) return fail(c, MARGO_INVALID, "rank %d of %d", a->rank, a->ranks);
	auto l = library();
	if (std::string why = usable(*l); !why.empty()) return fail(c, MARGO_UNSUPPORTED, "%s", why.c_str());
	auto *m = new (std::nothrow) margo_comm{c, l};
	if (!m) return fail(c, MARGO_OUT_OF_MEMORY, "a communicator");
	m->rank = a->rank, m->ranks = a->ranks, m->limit = std::chrono::milliseconds(a->limit_ms);
	ncclUniqueId id;
	memcpy(&id, a->id, sizeof id);
	ncclConfig_t config;
	margo_status s = with_room(c, "making an event", [&] { return cudaEventCreateWithFlags(&m->done, cudaEventDisableTiming); });
	if (s == MARGO_OK) {
		ncclResult_t r = l->ncclCommInitRankConfig(&m->c, a->ranks, id, a->rank, &config);
		if (r != ncclSuccess && r != ncclInProgress)
			s = broken(m, "meeting the other ranks", reason(*l, m->c, r));
		else
			s = settle(m, "meeting the other ranks", Clock::now() + m->limit);
	}
	if (s != MARGO_OK) {
		comm_close(m);
		return s;
	}
	*out = m;
	return MARGO_OK;
}

margo_status comm_all_reduce(margo_stream *st, margo_comm *m, int64_t n, const margo_mat *t) {
	return collective(st, m, "all-reduce", n, t, [&](const Library &l, void *p, size_t count, ncclDataType_t type) {
		return l.ncclAllReduce(p, p, count, type, ncclSum, m->c, st->s);
	});
}

margo_status comm_broadcast(margo_stream *st, margo_comm *m, int32_t root, int64_t n, const margo_mat *t) {
	if (root < 0 || root >= m->ranks) return fail(st->ctx, MARGO_INVALID, "broadcast from rank %d of %d", root, m->ranks);
	return collective(st, m, "broadcast", n, t, [&](const Library &l, void *p, size_t count, ncclDataType_t type) {
		return l.ncclBroadcast(p, p, count, type, root, m->c, st->s);
	});
}

margo_status comm_error(margo_comm *m) {
	Current g(m->ctx);
	if (!m->c) return fail(m->ctx, MARGO_COMM_FAULT, "the communicator has failed before");
	ncclResult_t r = ncclSuccess, e = m->lib->ncclCommGetAsyncError(m->c, &r);
	if (e != ncclSuccess) r = e;
	return r == ncclSuccess || r == ncclInProgress ? MARGO_OK : broken(m, "in the background", reason(*m->lib, m->c, r));
}

margo_status comm_wait(margo_comm *m, int32_t limit_ms) {
	margo_context *c = m->ctx;
	Current g(c);
	if (!m->c) return fail(c, MARGO_COMM_FAULT, "the communicator has failed before");
	const auto end = Clock::now() + std::chrono::milliseconds(limit_ms);
	for (int turn = 0; m->pending; turn++) {
		cudaError_t e = cudaEventQuery(m->done);
		if (e == cudaErrorNotReady) cudaGetLastError(); // no error: it would be taken for the next call's
		else if (e != cudaSuccess) {
			margo_status s = check(c, e, "waiting for a collective");
			m->lib->ncclCommAbort(m->c);
			m->c = nullptr, m->pending = false;
			return s;
		}
		MARGO_TRY(comm_error(m)); // also after the end: what has failed has no result
		if (e == cudaSuccess) break;
		if (Clock::now() > end) return broken(m, "waiting for a collective", "it did not end in time: a rank is late or gone");
		pause(turn);
	}
	m->pending = false;
	return MARGO_OK;
}

margo_status comm_close(margo_comm *m) {
	Current g(m->ctx);
	if (m->c) m->lib->ncclCommAbort(m->c);
	if (m->done) cudaEventDestroy(m->done);
	delete m;
	return MARGO_OK;
}
