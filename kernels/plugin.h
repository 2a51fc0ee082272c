// plugin.h: what the plugin's own files share: contexts, streams, errors and the
// launch of kernels. Not seen by Go.
#pragma once

#include <atomic>
#include <cstdarg>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "margo.cuh"
#include "margo_abi.h"

struct margo_group; // a rank's end of a group of ranks, and its collectives that are under way: nccl.cu
using margo_groups = std::vector<std::shared_ptr<margo_group>>;

// Relaxed lets this thread allocate, free, query and wait for events though it captures a stream.
struct Relaxed {
	cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
	Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
	~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// Every kernel that was launched, by name. Launching is counted here, so that
// tests can assert the sequence of launches of a whole sample.
struct margo_kernel_stat {
	const char *name;
	const void *function;
	size_t smem;
	int threads;
	uint64_t launches;
};

// Values of *margo_context::device_error, which kernels raise by atomicMax: 1 + the row of rows whose index lies
// outside its tensor, or DEVICE_ERROR_BLOCKS + the sequence of attention with such a block. Above all, stalled: the blocks of a persistent
// kernel waited for each other in vain.
constexpr uint32_t DEVICE_ERROR_BLOCKS = 1u << 31, DEVICE_ERROR_STALLED = ~0u;

// A mark is the end of what a stream had been given when it was made.
struct margo_mark {
	cudaEvent_t e;
	explicit margo_mark(cudaEvent_t event) : e(event) {}
	margo_mark(const margo_mark &) = delete;
	~margo_mark();
};
using margo_marks = std::vector<std::shared_ptr<margo_mark>>;

// A block is a buffer of the pool (memory.cu).
struct margo_block {
	void *p = nullptr;
	uint64_t bytes = 0, size = 0; // asked, taken
	uint64_t age = 0;             // when it was freed
	margo_marks marks;            // of what may still use it
};

struct margo_pool {
	std::mutex mu; // guards what follows; no other is taken while it is held
	std::map<uint64_t, margo_block> held; // by address
	std::map<uint64_t, std::deque<margo_block>> cached; // by size, the first to be freed first
	uint64_t held_bytes = 0, held_peak = 0, cached_bytes = 0, taken = 0, taken_peak = 0; // taken: from the driver, held, cached or on its way
	uint64_t allocs = 0, device_allocs = 0, reuses = 0, trims = 0, age = 0;
	uint64_t limit = 0, capacity = 0; // of taken (0: none) and cached_bytes
	uint64_t libraries = 0; // part of taken: what NCCL was seen to take
	std::multimap<uint64_t, void *> pinned; // of closed streams, by size
	uint64_t pinned_bytes = 0, pinned_cached = 0;
};

struct margo_context {
	int ordinal = 0;
	uint32_t flags = 0;
	cudaDeviceProp prop{};
	std::mutex mu; // guards what follows
	std::string error;
	margo_counters counters{};
	std::vector<margo_kernel_stat> kernels;
	std::vector<std::function<void()>> releases; // run by close: what ops cached in the context
	std::mutex capture_mu;               // guards streams and when they capture
	std::vector<margo_stream *> streams;
	std::shared_ptr<margo_mark> fill_mark; // of fill_stream, guarded by capture_mu as marks of streams are
	bool reused = false;                   // streams wait for memory that was reused, which new ones must too
	margo_pool pool;
	std::mutex ranks_mu;               // guards groups
	margo_groups groups;
	std::atomic<int64_t> under_way{0};                  // collectives of all groups that have not been seen to end
	std::atomic<uint64_t> launched{0}, due{UINT64_MAX}; // kernels and graphs; how many there may be before keep_up looks
	std::mutex graph_mu;               // guards graphs that ops cache
	std::shared_ptr<void> head_graphs; // of head.cu
	std::shared_ptr<struct margo_cublaslt> cublaslt; // of cublaslt.cu; null: gemm does without
	cudaStream_t fill_stream = nullptr; // fills new memory
	uint32_t *device_error = nullptr; // device word: set by kernels that meet an index out of range; read by waits
	int cc() const { return prop.major * 10 + prop.minor; }
};

struct margo_stream {
	margo_context *ctx;
	cudaStream_t s = nullptr;
	bool capturing = false;
	cudaEvent_t before_capture = nullptr; // the end of what was enqueued before
	uint64_t captured_kernels = 0;
	std::atomic<bool> busy{false};    // had work since it was marked or waited for; set after work is enqueued
	std::shared_ptr<margo_mark> mark; // its end when it was last marked; none once it was waited for
	bool rows_enqueued = false; // an op that may set device_error since the last wait
	struct {
		void *p = nullptr;
		uint64_t bytes = 0;
		cudaEvent_t done = nullptr; // the last copy from it
	} slots[2]; // pinned staging
	int next_slot = 0;
	void *cublaslt_workspace = nullptr;
	uint64_t cublaslt_bytes = 0;
};

// fail stores a printf-formatted text in the context and returns the status.
margo_status fail(margo_context *, margo_status, const char *format, ...) __attribute__((format(printf, 3, 4)));

// check turns a runtime error into a status; what names the call or the kernel.
margo_status check(margo_context *, cudaError_t, const char *what);

// Waits for a stream and for an event. While collectives are under way the host polls, and ends those of a group that has
// failed or does not come within its limit: a rank that is lost holds up nobody for ever. That is no error of the wait's: the group says
// it (comm_error). wait_collectives waits for all of these, before a call of the driver's that would wait for the whole device.
// keep_up, of what launches, waits for collectives that hundreds of launches were enqueued
// after, before the driver's queue is full and the driver waits, which nobody could end.
margo_status wait_stream(margo_context *, cudaStream_t, const char *what);
margo_status wait_event(margo_context *, cudaEvent_t, const char *what);
void wait_collectives(margo_context *);
void keep_up(margo_context *);
inline void launching(margo_context *c) { // a kernel or a graph
	if (c->launched.fetch_add(1) >= c->due.load()) keep_up(c);
}

// wait_all waits for everything enqueued so far on any stream of the context. The device as a
// whole may not be waited for while a stream captures, so each stream is, and one that captures up to
// where that began. begin_capture and end_capture (graph: null discards) keep account.
margo_status wait_all(margo_context *, const char *what);
margo_status begin_capture(margo_stream *);
cudaError_t end_capture(margo_stream *, cudaGraph_t *graph);

// The pool of device memory and pinned memory for staging: memory.cu. alloc and free are as the table says; policy is
// memory_policy. new_stream has a stream wait for what reused memory waits for, waited notes that all work of a stream is done.
margo_status pool_alloc(margo_context *, uint64_t bytes, uint64_t *out);
margo_status pool_free(margo_context *, uint64_t address);
margo_status pool_policy(margo_context *, uint64_t limit, uint64_t capacity);
margo_status pool_trim(margo_context *);
// make_room gives all that is cached back to the driver, on behalf of a call that found no memory, and says how much that was;
// no_room is that call's error, if it finds none again.
uint64_t pool_make_room(margo_context *);
margo_status pool_no_room(margo_context *, const char *what, uint64_t given);
// library counts what a library has taken of the device's memory in what is taken, gives cached memory back where that is more than the limit, and
// is OUT_OF_MEMORY, with nothing counted, where it stays so; library_gave takes it out again.
margo_status pool_library(margo_context *, const char *what, uint64_t bytes);
void pool_library_gave(margo_context *, uint64_t bytes);
margo_status pool_new_stream(margo_context *, cudaStream_t);
void pool_waited(margo_stream *);
void pool_close(margo_context *);
void pool_counters(margo_context *, margo_counters *);
margo_status pinned_take(margo_context *, uint64_t bytes, void **out, uint64_t *got);
void pinned_give(margo_context *, void *p, uint64_t size); // nothing uses it

// with_room makes a call of the runtime's that may take device memory of its own: graphs, events, streams, and kernels whose code
// is loaded when they are first launched. Where there is none, what the pool caches goes back to the driver and the call is
// made once more. what names it in errors.
template <class F> margo_status with_room(margo_context *c, const char *what, F &&call) {
	cudaError_t e = call();
	if (e != cudaErrorMemoryAllocation) return check(c, e, what);
	const uint64_t given = pool_make_room(c);
	e = call();
	return e == cudaErrorMemoryAllocation ? pool_no_room(c, what, given) : check(c, e, what);
}

// note_launch counts a launch of a kernel.
void note_launch(margo_stream *, const char *name, const void *function, int threads, size_t smem);

// run launches kernel as name on the stream. Arguments are converted to the
// kernel's parameter types.
template <class... P, class... A>
margo_status run(margo_stream *st, const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A &&...args) {
	if (grid.x == 0 || grid.y == 0 || grid.z == 0) return MARGO_OK; // zero rows: nothing to do
	launching(st->ctx);
	note_launch(st, name, reinterpret_cast<const void *>(kernel), int(block.x * block.y * block.z), smem);
	return with_room(st->ctx, name, [&] {
		gpu::name_next_launch(name);
		return gpu::launch(kernel, grid, block, smem, st->s, static_cast<P>(args)...);
	});
}

#define MARGO_TRY(expr)                             \
	do {                                            \
		margo_status margo_s_ = (expr);             \
		if (margo_s_ != MARGO_OK) return margo_s_;  \
	} while (0)

template <class T> T *ptr(const margo_mat &m) { return reinterpret_cast<T *>(static_cast<uintptr_t>(m.p)); }
inline bool aligned(const margo_mat &m, int bytes) { // base and every row
	int size = m.dtype == MARGO_BF16 ? 2 : 4;
	return m.p % bytes == 0 && (m.ld * size % bytes == 0 || m.rows <= 1);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The ops, one or more to a file.
margo_status op_gemm(margo_stream *, const margo_gemm_args *);
// gemm_cublaslt is UNSUPPORTED, with nothing enqueued, for what op_gemm has to do itself.
margo_status gemm_cublaslt(margo_stream *, const margo_gemm_args *);
margo_status cublaslt_probe(const char *library, margo_cublaslt_info *, char *err, size_t err_bytes);
margo_status cublaslt_open(margo_context *, const char *library, int32_t autotune, margo_cublaslt_info *);
margo_status cublaslt_workspace(margo_stream *, uint64_t p, uint64_t bytes);
margo_status cublaslt_algo(margo_context *, int64_t i, margo_cublaslt_algo *);
margo_status cublaslt_store(margo_context *, const margo_cublaslt_algo *);
margo_status op_attention(margo_stream *, const margo_attention_args *);
margo_status op_norm(margo_stream *, const margo_norm_args *);
margo_status op_gated_add(margo_stream *, const margo_gated_add_args *);
margo_status op_rows(margo_stream *, const margo_rows_args *);
margo_status op_cast(margo_stream *, const margo_cast_args *);
margo_status op_copy(margo_stream *, const margo_mat *dst, const margo_mat *src);
margo_status op_fill(margo_stream *, const margo_mat *dst, float v);
margo_status op_timestep_embedding(margo_stream *, const margo_timestep_args *);
margo_status op_normal(margo_stream *, const margo_normal_args *);
margo_status op_diffusion_step(margo_stream *, const margo_diffusion_step_args *);
margo_status op_head_steps_workspace(margo_context *, const margo_head_steps_args *, uint64_t budget, uint64_t *bytes);
margo_status op_head_steps(margo_stream *, const margo_head_steps_args *);
margo_status op_conv2d(margo_stream *, const margo_conv2d_args *);
margo_status op_group_norm_workspace(margo_context *, const margo_group_norm_args *, uint64_t *bytes);
margo_status op_group_norm(margo_stream *, const margo_group_norm_args *);
margo_status op_patchify(margo_stream *, const margo_patchify_args *);
margo_status op_categorical(margo_stream *, const margo_categorical_args *);

// Collectives of ranks: nccl.cu. They make the context's device current themselves.
margo_status nccl_version(int32_t *version, char *err, size_t err_bytes);
margo_status comm_unique_id(uint8_t *id, char *err, size_t err_bytes);
margo_status comm_init(margo_context *, const margo_comm_args *, margo_comm **out);
margo_status comm_all_reduce(margo_stream *, margo_comm *, int64_t n, const margo_mat *);
margo_status comm_broadcast(margo_stream *, margo_comm *, int32_t root, int64_t n, const margo_mat *);
margo_status comm_error(margo_comm *);
margo_status comm_wait(margo_comm *, int32_t limit_ms);
margo_status comm_close(margo_comm *);
margo_status comm_pending(margo_comm *, int64_t *n);
margo_status comm_limit(margo_comm *, int32_t limit_ms);
margo_status comm_fail(margo_comm *, const char *why);
margo_status comm_memory(margo_comm *, uint64_t *bytes);
