// plugin.h: what the plugin's own files share: contexts, streams, errors and the
// launch of kernels. Not seen by Go.
#pragma once

#include <atomic>
#include <cstdarg>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "margo.cuh"
#include "margo_abi.h"

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

struct margo_context {
	int ordinal = 0;
	uint32_t flags = 0;
	cudaDeviceProp prop{};
	std::mutex mu; // guards what follows
	std::string error;
	margo_counters counters{};
	std::vector<margo_kernel_stat> kernels;
	std::map<uint64_t, uint64_t> sizes;            // of memory that is held
	std::vector<std::function<void()>> releases; // run by close: what ops cached in the context
	std::mutex capture_mu;               // guards streams and when they capture
	std::vector<margo_stream *> streams;
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

// wait_all waits for everything enqueued so far on any stream of the context. The device as a
// whole may not be waited for while a stream captures, so each stream is, and one that captures up to
// where that began. begin_capture and end_capture (graph: null discards) keep account.
margo_status wait_all(margo_context *, const char *what);
margo_status begin_capture(margo_stream *);
cudaError_t end_capture(margo_stream *, cudaGraph_t *graph);

// note_launch counts a launch of a kernel.
void note_launch(margo_stream *, const char *name, const void *function, int threads, size_t smem);

// run launches kernel as name on the stream. Arguments are converted to the
// kernel's parameter types.
template <class... P, class... A>
margo_status run(margo_stream *st, const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A &&...args) {
	if (grid.x == 0 || grid.y == 0 || grid.z == 0) return MARGO_OK; // zero rows: nothing to do
	note_launch(st, name, reinterpret_cast<const void *>(kernel), int(block.x * block.y * block.z), smem);
	gpu::name_next_launch(name);
	return check(st->ctx, gpu::launch(kernel, grid, block, smem, st->s, static_cast<A &&>(args)...), name);
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
