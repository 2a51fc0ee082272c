// nccl.cpp: NCCL's stand-in for emulated devices, with NCCL's prototypes (../nccl_api.h), for ranks
// that are threads or processes of one machine.
//
// A unique id names a file that all ranks map: a slot for each rank with counters, the call that it
// is in, and a chunk of data. A collective goes chunk by chunk: a rank publishes its chunk once all
// have consumed its last one, and consumes once all have published, adding in the order of ranks
// ((t0 + t1) + t2) + …, BF16 in F32 and rounded once. So the bits are the same on all ranks.
//
// It is stricter than NCCL: another op, dtype, count or root than that of another rank, a rank that
// has left and, after MARGO_EMU_NCCL_LIMIT milliseconds, one that does not come are asynchronous
// errors with a text, never a hang; memory outside buffers of the device is refused. Errors leave
// results undefined. Streams that capture are refused.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "../nccl_api.h"
#include "state.h"

namespace emu {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRanks = 64;
constexpr size_t kChunk = 256 << 10; // bytes
constexpr char kMagic[] = "margo-emu";
enum : uint32_t { kAbsent, kClaimed, kJoined, kLeft, kAborted }; // the last: left in the middle of a call
enum : int32_t { kAllReduce, kBroadcast };

struct Request { // what ranks must agree about
	int32_t what, type, root, op;
	uint64_t count;
	bool operator==(const Request &) const = default;
	std::string text() const {
		const char *t = type == ncclFloat32 ? "f32" : type == ncclBfloat16 ? "bf16" : "i32";
		return what == kAllReduce ? emu::text("all-reduce of %llu %s", (unsigned long long)count, t)
		                          : emu::text("broadcast of %llu %s from rank %d", (unsigned long long)count, t, root);
	}
};

struct alignas(128) Slot { // of a rank, written by it alone
	std::atomic<uint32_t> state;
	int32_t ranks, device, pid;
	Request request;                           // of the chunk that is published
	std::atomic<uint64_t> published, consumed; // chunks since the communicator was made
};

struct Shared {
	Slot slots[kRanks];
	char data[kRanks][kChunk];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

} // namespace

} // namespace emu

using namespace emu;

struct ncclComm {
	int rank = 0, ranks = 0;
	Shared *shared = nullptr;
	std::string path; // removed when all have mapped it
	std::atomic<bool> met{false}, aborted{false};
	std::atomic<int> error{ncclSuccess};
	std::mutex mu; // guards what follows
	std::string text;
	uint64_t chunks = 0; // of calls so far
	size_t taken = 0;    // of the device's memory; under State::mu
	bool connected = false;

	~ncclComm() {
		if (!met) unlink(path.c_str());
		leave(kLeft);
		munmap(shared, sizeof *shared);
	}
	void leave(uint32_t how) { // the first way stays
		uint32_t joined = kJoined;
		shared->slots[rank].state.compare_exchange_strong(joined, how, std::memory_order_acq_rel);
	}
	void failed(ncclResult_t r, const std::string &why) {
		std::lock_guard<std::mutex> lock(mu);
		if (error != ncclSuccess) return;
		text = why;
		error = r;
	}
	// meet is InProgress until all ranks have come, and an error if they do not fit together.
	ncclResult_t meet() {
		if (error != ncclSuccess || met) return error;
		int left = -1, absent = -1;
		for (int r = 0; r < ranks; r++) {
			uint32_t s = shared->slots[r].state.load(std::memory_order_acquire);
			if (s >= kLeft) left = r;
			if (s < kJoined) absent = r;
		}
		if (absent >= 0) {
			if (left >= 0) failed(ncclRemoteError, ::text("rank %d has left", left));
			return left >= 0 ? error.load() : ncclInProgress;
		}
		unlink(path.c_str());
		met = true;
		for (int r = 0; r < ranks; r++) {
			const Slot &a = shared->slots[r];
			if (a.ranks != ranks) failed(ncclInvalidArgument, ::text("rank %d counts %d ranks, rank %d counts %d", r, a.ranks, rank, ranks));
			for (int q = 0; q < r; q++)
				if (a.pid == shared->slots[q].pid && a.device == shared->slots[q].device)
					failed(ncclInvalidUsage, ::text("ranks %d and %d share device %d", q, r, a.device));
		}
		if (left >= 0) failed(ncclRemoteError, ::text("rank %d has left", left)); // for a reason above, or its own
		return error;
	}
};

namespace {

constexpr char kNoMemory[] = "Cuda failure 2 'out of memory'"; // as NCCL writes it

std::mutex comms_mu;
std::map<ncclComm_t, std::shared_ptr<ncclComm>> &comms() {
	static auto *m = new std::map<ncclComm_t, std::shared_ptr<ncclComm>>;
	return *m;
}

std::shared_ptr<ncclComm> find_comm(ncclComm_t c) {
	std::lock_guard<std::mutex> lock(comms_mu);
	auto it = comms().find(c);
	return it == comms().end() ? nullptr : it->second;
}

int64_t limit_ms() {
	const char *v = getenv("MARGO_EMU_NCCL_LIMIT");
	return v && *v ? strtoll(v, nullptr, 0) : 120'000;
}

// Call is a collective on its way through a stream.
struct Call {
	std::shared_ptr<ncclComm> comm;
	Request request;
	const char *send;
	char *receive;
	size_t bytes, size; // of all, of an element
	uint64_t first, chunks; // number of its first chunk among all of the communicator
	Clock::duration limit;
	uint64_t at = 0;
	bool published = false, begun = false;
	Clock::time_point late;

	enum Now { wait, go, fail };

	// look says whether a step can be made now, or that none ever can, and why.
	Now look(ncclResult_t *code, std::string *why) {
		ncclComm &c = *comm;
		if (!begun) begun = true, late = Clock::now() + limit;
		if (c.aborted || c.error != ncclSuccess) return *code = ncclInvalidUsage, *why = "the communicator was aborted", fail;
		ncclResult_t m = c.meet();
		if (m != ncclSuccess && m != ncclInProgress) return *code = m, fail;
		for (int r = 0; r < c.ranks; r++) {
			const Slot &s = c.shared->slots[r];
			uint32_t state = s.state.load(std::memory_order_acquire); // before its counters, which are final if it has left
			uint64_t need = first + at + (published ? 1 : 0);
			uint64_t have = (published ? s.published : s.consumed).load(std::memory_order_acquire);
			if (state >= kJoined && state != kAborted && have >= need) continue;
			if (state >= kLeft) return *code = ncclRemoteError, *why = ::text("%s: rank %d has left", request.text().c_str(), r), fail;
			if (Clock::now() < late) return wait;
			*code = ncclTimeout, *why = ::text("%s: rank %d did not come in time", request.text().c_str(), r);
			return fail;
		}
		return go;
	}

	bool can() {
		ncclResult_t code;
		std::string why;
		return look(&code, &why) != wait;
	}

	// step does what can be done now; true: nothing is left to do.
	bool step() {
		ncclComm &c = *comm;
		ncclResult_t code = ncclSuccess;
		std::string why;
		switch (look(&code, &why)) {
		case wait: return false;
		case fail: return c.failed(code, why), true;
		case go: break;
		}
		Slot &mine = c.shared->slots[c.rank];
		const size_t from = size_t(at) * kChunk, n = std::min(kChunk, bytes - std::min(bytes, from));
		if (!published) {
			mine.request = request;
			if (request.what == kAllReduce || request.root == c.rank) memcpy(c.shared->data[c.rank], send + from, n);
			mine.published.store(first + at + 1, std::memory_order_release);
			published = true;
			return false;
		}
		for (int r = 0; r < c.ranks; r++) {
			const Request &theirs = c.shared->slots[r].request;
			if (theirs == request) continue;
			c.failed(ncclInvalidUsage, ::text("rank %d calls %s, rank %d %s", c.rank, request.text().c_str(), r, theirs.text().c_str()));
			return true;
		}
		if (request.what == kAllReduce)
			sum(receive + from, n);
		else
			memcpy(receive + from, c.shared->data[request.root], n);
		mine.consumed.store(first + at + 1, std::memory_order_release);
		published = false;
		return ++at == chunks;
	}

	void sum(char *to, size_t n) const {
		const ncclComm &c = *comm;
		auto from = [&]<class T>(int r, size_t i, T *v) { memcpy(v, c.shared->data[r] + i * sizeof(T), sizeof(T)); };
		for (size_t i = 0; i < n / size; i++) {
			if (request.type == ncclInt32) {
				uint32_t s = 0, v;
				for (int r = 0; r < c.ranks; r++) from(r, i, &v), s += v;
				memcpy(to + 4 * i, &s, 4);
				continue;
			}
			float s = 0;
			bf16 b;
			for (int r = 0; r < c.ranks; r++) {
				float v;
				if (request.type == ncclFloat32) from(r, i, &v);
				else from(r, i, &b), v = to_f32(b);
				s = r ? s + v : v; // -0 stays
			}
			if (request.type == ncclFloat32) memcpy(to + 4 * i, &s, 4);
			else b = to_bf16(s), memcpy(to + 2 * i, &b, 2);
		}
	}
};

ncclResult_t enqueue_call(int32_t what, const void *send, void *receive, size_t count, ncclDataType_t type, int root, int op, ncclComm_t handle, cudaStream_t st) {
	auto c = find_comm(handle);
	if (!c) return ncclInvalidArgument;
	auto refuse = [&](ncclResult_t r, const std::string &why) { return c->failed(r, why), r; };
	if (ncclResult_t m = c->meet(); m != ncclSuccess) return m == ncclInProgress ? refuse(ncclInvalidUsage, "a call before the communicator was made") : m;
	if (type != ncclFloat32 && type != ncclBfloat16 && type != ncclInt32) return refuse(ncclInvalidArgument, emu::text("data type %d", type));
	if (op != ncclSum || root < 0 || root >= c->ranks) return refuse(ncclInvalidArgument, emu::text("op %d, root %d of %d ranks", op, root, c->ranks));
	auto call = std::make_shared<Call>();
	call->comm = c, call->request = {what, type, root, op, count};
	call->send = static_cast<const char *>(send), call->receive = static_cast<char *>(receive);
	call->size = type == ncclBfloat16 ? 2 : 4, call->bytes = count * call->size;
	call->chunks = std::max<uint64_t>(1, (call->bytes + kChunk - 1) / kChunk);
	call->limit = std::chrono::milliseconds(limit_ms());
	{
		std::lock_guard<std::mutex> lock(state().mu);
		if (usable() != cudaSuccess) return refuse(ncclUnhandledCudaError, "the device has failed");
		auto s = find_stream(st);
		if (!s || s->device != c->shared->slots[c->rank].device) return refuse(ncclInvalidArgument, "a stream of another device");
		if (s->capture) return refuse(ncclInvalidUsage, "the stream is capturing");
		if (!device_memory(send, call->bytes) || !device_memory(receive, call->bytes))
			return refuse(ncclInvalidArgument, emu::text("%zu bytes are in no buffer of the device", call->bytes));
		if (!c->connected) {
			const size_t bytes = state().settings.takes.connect;
			if (!reserve(s->device, bytes)) return refuse(ncclUnhandledCudaError, kNoMemory);
			c->connected = true, c->taken += bytes;
		}
		{
			std::lock_guard<std::mutex> inner(c->mu);
			call->first = c->chunks;
			c->chunks += call->chunks;
		}
		Item i;
		i.can = [call] { return call->can(); };
		i.step = [call] { return call->step(); };
		if (push(s, std::move(i)) != cudaSuccess) return refuse(ncclUnhandledCudaError, "enqueuing");
	}
	settle();
	return ncclSuccess;
}

} // namespace

#define NCCL_EXPORT extern "C" __attribute__((visibility("default")))

NCCL_EXPORT ncclResult_t ncclGetVersion(int *version) {
	*version = 21400; // the prototypes' version
	return ncclSuccess;
}

NCCL_EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
	const char *dir = getenv("TMPDIR");
	std::string path = std::string(dir && *dir ? dir : "/tmp") + "/margo-nccl-XXXXXX";
	if (path.size() + sizeof kMagic >= sizeof id->internal) path = "/tmp/margo-nccl-XXXXXX";
	int fd = mkstemp(path.data());
	if (fd < 0) return ncclSystemError;
	bool ok = ftruncate(fd, sizeof(Shared)) == 0; // zeros: nobody is there; takes what is written only
	close(fd);
	if (!ok) {
		unlink(path.c_str());
		return ncclSystemError;
	}
	memset(id, 0, sizeof *id);
	memcpy(id->internal, kMagic, sizeof kMagic);
	memcpy(id->internal + sizeof kMagic, path.c_str(), path.size());
	return ncclSuccess;
}

NCCL_EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
	*out = nullptr;
	if (!config || config->magic != 0xcafebeef || config->blocking) return ncclInvalidArgument; // blocking is not needed
	if (ranks < 1 || ranks > kRanks || rank < 0 || rank >= ranks || memcmp(id.internal, kMagic, sizeof kMagic)) return ncclInvalidArgument;
	id.internal[sizeof id.internal - 1] = 0;
	int device = 0;
	if (cudaGetDevice(&device) != cudaSuccess) return ncclUnhandledCudaError;
	size_t takes = 0;
	bool short_of = false;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		if (usable() != cudaSuccess) return ncclUnhandledCudaError;
		takes = state().settings.takes.nccl;
		short_of = !reserve(device, takes);
		if (short_of) takes = 0;
	}
	struct Reserved { // until the communicator has it
		int device;
		size_t bytes;
		~Reserved() {
			std::lock_guard<std::mutex> lock(state().mu);
			if (bytes) unreserve(device, bytes);
		}
	} reserved{device, takes};
	const char *path = id.internal + sizeof kMagic;
	int fd = ::open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) return ncclSystemError; // another machine's, or of ranks that have met
	void *p = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (p == MAP_FAILED) return ncclSystemError;
	auto *shared = static_cast<Shared *>(p);
	Slot &mine = shared->slots[rank];
	uint32_t absent = kAbsent;
	if (!mine.state.compare_exchange_strong(absent, kClaimed)) { // another process calls itself so
		munmap(p, sizeof(Shared));
		return ncclInvalidUsage;
	}
	mine.ranks = ranks, mine.device = device, mine.pid = int32_t(getpid());
	auto c = std::make_shared<ncclComm>();
	c->rank = rank, c->ranks = ranks, c->shared = shared, c->path = path;
	c->taken = takes, reserved.bytes = 0;
	if (short_of) c->failed(ncclUnhandledCudaError, kNoMemory); // as NCCL, which has met the others before it allocates
	mine.state.store(kJoined, std::memory_order_release);
	std::lock_guard<std::mutex> lock(comms_mu);
	comms()[c.get()] = c;
	*out = c.get();
	return ncclInProgress;
}

NCCL_EXPORT ncclResult_t ncclCommAbort(ncclComm_t handle) {
	std::shared_ptr<ncclComm> c;
	{
		std::lock_guard<std::mutex> lock(comms_mu);
		auto it = comms().find(handle);
		if (it == comms().end()) return ncclInvalidArgument;
		c = it->second;
		comms().erase(it);
	}
	{
		std::lock_guard<std::mutex> lock(state().mu);
		unreserve(c->shared->slots[c->rank].device, c->taken);
	}
	c->aborted = true; // calls in streams end, and with the last of them the communicator
	std::lock_guard<std::mutex> inner(c->mu);
	if (c->shared->slots[c->rank].consumed.load(std::memory_order_acquire) < c->chunks) c->leave(kAborted);
	return ncclSuccess;
}

NCCL_EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t *error) {
	auto c = find_comm(handle);
	if (!c) return ncclInvalidArgument;
	*error = c->meet();
	return ncclSuccess;
}

NCCL_EXPORT const char *ncclGetErrorString(ncclResult_t r) {
	switch (r) {
	case ncclSuccess: return "no error";
	case ncclUnhandledCudaError: return "unhandled cuda error";
	case ncclSystemError: return "unhandled system error";
	case ncclInternalError: return "internal error";
	case ncclInvalidArgument: return "invalid argument";
	case ncclInvalidUsage: return "invalid usage";
	case ncclRemoteError: return "remote process exited or there was a network error";
	case ncclInProgress: return "operation in progress";
	case ncclTimeout: return "timeout";
	}
	return "unknown result code";
}

NCCL_EXPORT const char *ncclGetLastError(ncclComm_t handle) {
	auto c = find_comm(handle);
	if (!c) return "";
	std::lock_guard<std::mutex> lock(c->mu);
	return c->text.c_str(); // the first error's text, which does not change
}

// Calls of a group are enqueued as they come, since none of them waits.
NCCL_EXPORT ncclResult_t ncclGroupStart() { return ncclSuccess; }
NCCL_EXPORT ncclResult_t ncclGroupEnd() { return ncclSuccess; }

NCCL_EXPORT ncclResult_t ncclAllReduce(const void *send, void *receive, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
	return enqueue_call(kAllReduce, send, receive, count, type, 0, op, comm, stream);
}

NCCL_EXPORT ncclResult_t ncclBroadcast(const void *send, void *receive, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
	return enqueue_call(kBroadcast, send, receive, count, type, root, ncclSum, comm, stream);
}
