// plugin.cu: the table of functions that Go sees, and behind it contexts, streams,
// events, graphs and errors. Memory: memory.cu.
//
// Copies go through pinned staging, two slots a stream: copy_in has taken the
// data when it returns, and the copy itself is asynchronous.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>

#include "plugin.h"

namespace {

constexpr uint64_t kStagingBytes = 8 << 20; // of a slot

struct Guard { // makes the context's device current on the calling thread
	explicit Guard(margo_context *c) { cudaSetDevice(c->ordinal); }
};

const char *kind(cudaError_t e) { return cudaGetErrorString(e); }

} // namespace

struct margo_event {
	margo_context *ctx;
	cudaEvent_t e;
};

struct margo_graph {
	margo_context *ctx;
	cudaGraph_t g;
	cudaGraphExec_t exec;
	uint64_t kernels;
};

margo_status fail(margo_context *c, margo_status s, const char *format, ...) {
	char text[1024];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	std::lock_guard<std::mutex> lock(c->mu);
	c->error = text;
	return s;
}

margo_status check(margo_context *c, cudaError_t e, const char *what) {
	if (e == cudaSuccess) return MARGO_OK;
	cudaGetLastError(); // clears what is not sticky
	margo_status s = MARGO_DEVICE_FAULT;
	if (e == cudaErrorMemoryAllocation) s = MARGO_OUT_OF_MEMORY;
	if (e == cudaErrorInvalidValue || e == cudaErrorInvalidConfiguration || e == cudaErrorLaunchOutOfResources) s = MARGO_INTERNAL;
	if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorUnsupportedPtxVersion) s = MARGO_UNSUPPORTED;
	return fail(c, s, "%s: %s (%s)%s%s", what, kind(e), cudaGetErrorName(e), *gpu::report() ? ": " : "", gpu::report());
}

margo_status wait_all(margo_context *c, const char *what) {
	std::lock_guard<std::mutex> lock(c->capture_mu);
	for (margo_stream *st : c->streams) MARGO_TRY(st->capturing ? wait_event(c, st->before_capture, what) : wait_stream(c, st->s, what));
	if (c->fill_mark) MARGO_TRY(wait_event(c, c->fill_mark->e, what));
	c->fill_mark.reset();
	c->reused = false;
	return MARGO_OK;
}

margo_status begin_capture(margo_stream *st) {
	margo_context *c = st->ctx;
	std::lock_guard<std::mutex> lock(c->capture_mu);
	if (!st->before_capture) MARGO_TRY(with_room(c, "making an event", [&] { return cudaEventCreateWithFlags(&st->before_capture, cudaEventDisableTiming); }));
	MARGO_TRY(check(c, cudaEventRecord(st->before_capture, st->s), "recording an event"));
	// ThreadLocal: another thread's allocation does not spoil the capture.
	MARGO_TRY(check(c, cudaStreamBeginCapture(st->s, cudaStreamCaptureModeThreadLocal), "beginning a capture"));
	st->capturing = true;
	st->captured_kernels = 0;
	return MARGO_OK;
}

cudaError_t end_capture(margo_stream *st, cudaGraph_t *graph) {
	std::lock_guard<std::mutex> lock(st->ctx->capture_mu);
	st->capturing = false;
	return cudaStreamEndCapture(st->s, graph);
}

void note_launch(margo_stream *st, const char *name, const void *function, int threads, size_t smem) {
	margo_context *c = st->ctx;
	std::lock_guard<std::mutex> lock(c->mu);
	if (st->capturing)
		st->captured_kernels++;
	else
		c->counters.kernel_launches++;
	for (auto &k : c->kernels)
		if (k.function == function && k.smem == smem && k.threads == threads) {
			k.launches++;
			return;
		}
	c->kernels.push_back({name, function, smem, threads, 1});
}

namespace {

margo_status device_count(int32_t *n, char *err, size_t err_bytes) {
	int count = 0;
	cudaError_t e = cudaGetDeviceCount(&count);
	*n = e == cudaSuccess ? count : 0;
	if (e == cudaSuccess || e == cudaErrorNoDevice) return MARGO_OK;
	cudaGetLastError();
	if (err_bytes) snprintf(err, err_bytes, "%s (%s)", kind(e), cudaGetErrorName(e));
	return MARGO_DEVICE_FAULT;
}

margo_status open(int32_t ordinal, uint32_t flags, margo_context **out, char *err, size_t err_bytes) {
	auto complain = [&](margo_status s, const char *what, cudaError_t e) {
		cudaGetLastError();
		if (err_bytes) snprintf(err, err_bytes, "%s: %s (%s)", what, kind(e), cudaGetErrorName(e));
		return s;
	};
	int count = 0;
	cudaError_t e = cudaGetDeviceCount(&count);
	if (e != cudaSuccess) return complain(MARGO_DEVICE_FAULT, "looking for devices", e);
	if (ordinal < 0 || ordinal >= count) {
		if (err_bytes) snprintf(err, err_bytes, "there are %d devices, numbered from 0", count);
		return MARGO_INVALID;
	}
	auto *c = new (std::nothrow) margo_context;
	if (!c) return MARGO_OUT_OF_MEMORY;
	c->ordinal = ordinal, c->flags = flags;
	if ((e = cudaSetDevice(ordinal)) == cudaSuccess) e = cudaGetDeviceProperties(&c->prop, ordinal);
	if (e == cudaSuccess && c->prop.major < 8) {
		if (err_bytes) snprintf(err, err_bytes, "%s has compute capability %d.%d: the kernels need 8.0 or newer", c->prop.name, c->prop.major, c->prop.minor);
		delete c;
		return MARGO_UNSUPPORTED;
	}
	if (e == cudaSuccess) e = cudaMalloc(reinterpret_cast<void **>(&c->device_error), 256);
	if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&c->fill_stream, cudaStreamNonBlocking);
	if (e == cudaSuccess) e = cudaMemsetAsync(c->device_error, 0, 256, c->fill_stream);
	if (e == cudaSuccess) e = cudaStreamSynchronize(c->fill_stream);
	if (e == cudaSuccess) e = cudaStreamSynchronize(nullptr); // our streams do not wait for the null stream
	if (e != cudaSuccess) {
		if (c->fill_stream) cudaStreamDestroy(c->fill_stream);
		cudaFree(c->device_error);
		delete c;
		return complain(e == cudaErrorMemoryAllocation ? MARGO_OUT_OF_MEMORY : MARGO_DEVICE_FAULT, "opening the device", e);
	}
	*out = c;
	return MARGO_OK;
}

void drop_stream(margo_stream *);

margo_status close(margo_context *c) {
	Guard g(c);
	cudaError_t e = cudaDeviceSynchronize();
	for (auto &r : c->releases) r();
	while (!c->streams.empty()) drop_stream(c->streams.back());
	pool_close(c);
	cudaStreamDestroy(c->fill_stream);
	cudaFree(c->device_error);
	delete c;
	cudaGetLastError();
	return e == cudaSuccess ? MARGO_OK : MARGO_DEVICE_FAULT;
}

margo_status synchronize(margo_context *c) {
	Guard g(c);
	return wait_all(c, "waiting for the device");
}

margo_status info(margo_context *c, margo_info *out) {
	Guard g(c);
	margo_info i{};
	i.size = sizeof i;
	i.sm_count = c->prop.multiProcessorCount, i.cc_major = c->prop.major, i.cc_minor = c->prop.minor;
	cudaDriverGetVersion(&i.driver_version);
	cudaRuntimeGetVersion(&i.runtime_version);
	size_t free = 0, total = 0;
	MARGO_TRY(check(c, cudaMemGetInfo(&free, &total), "reading the memory's size"));
	i.mem_total = total, i.mem_free = free;
	i.l2_bytes = uint64_t(c->prop.l2CacheSize), i.smem_per_block = c->prop.sharedMemPerBlockOptin;
	int coop = 0;
	cudaDeviceGetAttribute(&coop, cudaDevAttrCooperativeLaunch, c->ordinal);
	i.cooperative = coop;
	cudaDeviceGetAttribute(&i.clock_khz, cudaDevAttrClockRate, c->ordinal);
	cudaDeviceGetAttribute(&i.memory_clock_khz, cudaDevAttrMemoryClockRate, c->ordinal);
	cudaDeviceGetAttribute(&i.memory_bus_bits, cudaDevAttrGlobalMemoryBusWidth, c->ordinal);
	cudaGetLastError(); // a device that does not tell its clocks is fine
	i.emulated = gpu::emulated;
	snprintf(i.name, sizeof i.name, "%.127s", c->prop.name);
	snprintf(i.pci_bus_id, sizeof i.pci_bus_id, "%04x:%02x:%02x.0", c->prop.pciDomainID, c->prop.pciBusID, c->prop.pciDeviceID);
	if (gpu::emulated)
		snprintf(i.arch, sizeof i.arch, "emu");
	else
		snprintf(i.arch, sizeof i.arch, "sm_%d%d", i.cc_major, i.cc_minor);
	memcpy(out, &i, out->size < sizeof i ? out->size : sizeof i);
	return MARGO_OK;
}

margo_status last_error(margo_context *c, char *out, size_t bytes) {
	std::lock_guard<std::mutex> lock(c->mu);
	if (bytes) snprintf(out, bytes, "%s", c->error.c_str());
	return MARGO_OK;
}

margo_status counters(margo_context *c, margo_counters *out) {
	margo_counters v;
	{
		std::lock_guard<std::mutex> lock(c->mu);
		v = c->counters;
	}
	pool_counters(c, &v);
	v.size = sizeof v;
	memcpy(out, &v, out->size < sizeof v ? out->size : sizeof v);
	return MARGO_OK;
}

margo_status kernel(margo_context *c, int64_t i, margo_kernel *out) {
	Guard g(c);
	margo_kernel_stat k;
	{
		std::lock_guard<std::mutex> lock(c->mu);
		if (i < 0 || i >= int64_t(c->kernels.size())) return MARGO_INVALID;
		k = c->kernels[size_t(i)];
	}
	cudaFuncAttributes a{};
	MARGO_TRY(check(c, cudaFuncGetAttributes(&a, k.function), k.name));
	margo_kernel v{};
	v.size = sizeof v;
	v.registers = a.numRegs, v.local_bytes = int32_t(a.localSizeBytes), v.static_smem = int32_t(a.sharedSizeBytes);
	v.max_dynamic_smem = int32_t(k.smem), v.max_threads = k.threads, v.launches = k.launches;
	int blocks = 0;
	MARGO_TRY(check(c, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, k.function, k.threads, k.smem), k.name));
	v.blocks_per_sm = blocks;
	snprintf(v.name, sizeof v.name, "%s", k.name);
	memcpy(out, &v, out->size < sizeof v ? out->size : sizeof v);
	return MARGO_OK;
}

// ---- memory ------------------------------------------------------------------

margo_status alloc(margo_context *c, uint64_t bytes, uint64_t *out) {
	Guard g(c);
	return pool_alloc(c, bytes, out);
}

margo_status free_(margo_context *c, uint64_t p) {
	Guard g(c);
	return pool_free(c, p);
}

margo_status memory_policy(margo_context *c, uint64_t limit, uint64_t capacity) {
	Guard g(c);
	return pool_policy(c, limit, capacity);
}

margo_status trim(margo_context *c) {
	Guard g(c);
	return pool_trim(c);
}

margo_status host_alloc(margo_context *c, uint64_t bytes, void **out) {
	Guard g(c);
	return check(c, cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocDefault), "allocating pinned memory");
}

margo_status host_free(margo_context *c, void *p) {
	Guard g(c);
	return check(c, cudaFreeHost(p), "freeing pinned memory");
}

// ---- streams -------------------------------------------------------------------

void drop_staging(margo_stream *st) {
	for (auto &slot : st->slots) {
		if (slot.done) cudaEventDestroy(slot.done);
		if (slot.p) pinned_give(st->ctx, slot.p, slot.bytes);
		slot = {};
	}
}

// drop_stream gives all of a stream back, which has no work.
void drop_stream(margo_stream *st) {
	{
		std::lock_guard<std::mutex> lock(st->ctx->capture_mu);
		std::erase(st->ctx->streams, st);
	}
	if (st->before_capture) cudaEventDestroy(st->before_capture);
	drop_staging(st);
	if (st->s) cudaStreamDestroy(st->s);
	delete st;
}

margo_status stream_create(margo_context *c, margo_stream **out) {
	Guard g(c);
	auto *st = new (std::nothrow) margo_stream{c};
	if (!st) return fail(c, MARGO_OUT_OF_MEMORY, "a stream");
	margo_status s = with_room(c, "making a stream", [&] { return cudaStreamCreateWithFlags(&st->s, cudaStreamNonBlocking); });
	if (s == MARGO_OK) {
		{ // before it is told what to wait for: memory that another thread reuses meanwhile it waits for as all streams do
			std::lock_guard<std::mutex> lock(c->capture_mu);
			c->streams.push_back(st);
		}
		s = pool_new_stream(c, st->s);
	}
	if (s != MARGO_OK) {
		drop_stream(st);
		return s;
	}
	*out = st;
	return MARGO_OK;
}

margo_status stream_destroy(margo_stream *st) {
	margo_context *c = st->ctx;
	Guard g(c);
	margo_status s = wait_stream(c, st->s, "closing a stream");
	drop_stream(st);
	return s;
}

// device_word reads and clears the word that kernels set when they meet an index
// out of range. The stream has been waited for.
margo_status device_word(margo_stream *st) {
	margo_context *c = st->ctx;
	uint32_t word = 0;
	MARGO_TRY(check(c, cudaMemcpyAsync(&word, c->device_error, 4, cudaMemcpyDeviceToHost, st->s), "reading the error word"));
	MARGO_TRY(check(c, cudaStreamSynchronize(st->s), "reading the error word"));
	if (!word) return MARGO_OK;
	cudaMemsetAsync(c->device_error, 0, 4, st->s);
	if (word == DEVICE_ERROR_STALLED) return fail(c, MARGO_DEVICE_FAULT, "head steps: the blocks of the persistent kernel waited too long for each other; results are invalid");
	if (word >= DEVICE_ERROR_BLOCKS)
		return fail(c, MARGO_INVALID, "attention: a block lies outside the cache (sequence %u)", word - DEVICE_ERROR_BLOCKS);
	return fail(c, MARGO_INVALID, "an index lies outside its tensor (row %u of rows)", word - 1);
}

margo_status waited(margo_stream *st, const char *what) {
	margo_context *c = st->ctx;
	if (st->capturing) return fail(c, MARGO_INVALID, "%s: stream is capturing", what);
	MARGO_TRY(wait_stream(c, st->s, what));
	pool_waited(st);
	{
		std::lock_guard<std::mutex> lock(c->mu);
		c->counters.syncs++;
		if (!st->rows_enqueued) return MARGO_OK;
		st->rows_enqueued = false;
	}
	return device_word(st);
}

margo_status stream_sync(margo_stream *st) {
	Guard g(st->ctx);
	return waited(st, "sync");
}

margo_status event_record(margo_stream *st, margo_event **out) {
	margo_context *c = st->ctx;
	Guard g(c);
	auto *ev = new (std::nothrow) margo_event{c, nullptr};
	if (!ev) return fail(c, MARGO_OUT_OF_MEMORY, "an event");
	margo_status s = with_room(c, "making an event", [&] { return cudaEventCreate(&ev->e); });
	if (s == MARGO_OK) s = check(c, cudaEventRecord(ev->e, st->s), "recording an event");
	if (s != MARGO_OK) {
		if (ev->e) cudaEventDestroy(ev->e);
		delete ev;
		return s;
	}
	*out = ev;
	return MARGO_OK;
}

margo_status event_wait(margo_stream *st, margo_event *ev) {
	Guard g(st->ctx);
	return check(st->ctx, cudaStreamWaitEvent(st->s, ev->e, 0), "waiting for an event");
}

margo_status event_elapsed(margo_event *from, margo_event *to, float *ms) {
	Guard g(to->ctx);
	MARGO_TRY(wait_event(to->ctx, to->e, "waiting for an event"));
	return check(to->ctx, cudaEventElapsedTime(ms, from->e, to->e), "reading the time between events");
}

margo_status event_destroy(margo_event *ev) {
	margo_context *c = ev->ctx;
	Guard g(c);
	cudaError_t e = cudaEventDestroy(ev->e);
	delete ev;
	return check(c, e, "closing an event");
}

// ---- graphs --------------------------------------------------------------------

margo_status capture_begin(margo_stream *st) {
	margo_context *c = st->ctx;
	Guard g(c);
	if (st->capturing) return fail(c, MARGO_INVALID, "stream is capturing already");
	return begin_capture(st);
}

margo_status capture_end(margo_stream *st, margo_graph **out) {
	margo_context *c = st->ctx;
	Guard g(c);
	if (!st->capturing) return fail(c, MARGO_INVALID, "stream is not capturing");
	cudaGraph_t graph = nullptr;
	margo_status s = check(c, end_capture(st, &graph), "ending a capture");
	if (s != MARGO_OK || !out) {
		if (graph) cudaGraphDestroy(graph);
		return out ? s : MARGO_OK;
	}
	cudaGraphExec_t exec = nullptr;
	s = with_room(c, "making a graph", [&] { return cudaGraphInstantiate(&exec, graph, 0); });
	auto *gr = s == MARGO_OK ? new (std::nothrow) margo_graph{c, graph, exec, st->captured_kernels} : nullptr;
	if (!gr) {
		if (exec) cudaGraphExecDestroy(exec);
		cudaGraphDestroy(graph);
		return s == MARGO_OK ? fail(c, MARGO_OUT_OF_MEMORY, "a graph") : s;
	}
	*out = gr;
	return MARGO_OK;
}

margo_status graph_launch(margo_stream *st, margo_graph *gr) {
	margo_context *c = st->ctx;
	Guard g(c);
	launching(c);
	MARGO_TRY(with_room(c, "launching a graph", [&] { return cudaGraphLaunch(gr->exec, st->s); }));
	st->busy.store(true);
	std::lock_guard<std::mutex> lock(c->mu);
	c->counters.graph_launches++;
	c->counters.graph_kernels += gr->kernels;
	st->rows_enqueued = true; // what it captured is not looked at
	return MARGO_OK;
}

margo_status graph_destroy(margo_graph *gr) {
	margo_context *c = gr->ctx;
	Guard g(c);
	cudaError_t e = cudaGraphExecDestroy(gr->exec);
	cudaGraphDestroy(gr->g);
	delete gr;
	return check(c, e, "closing a graph");
}

// ---- copies --------------------------------------------------------------------

// A captured copy reads the host memory at every launch: the graph would need it
// for ever. So small constants are refused rather than wrong.
margo_status copy_in(margo_stream *st, uint64_t dst, const void *src, uint64_t bytes) {
	margo_context *c = st->ctx;
	Guard g(c);
	if (st->capturing) return fail(c, MARGO_INVALID, "copy in: stream is capturing");
	auto *to = reinterpret_cast<char *>(uintptr_t(dst));
	auto *from = static_cast<const char *>(src);
	struct Busy { // also when a later part fails
		margo_stream *st;
		~Busy() { st->busy.store(true); }
	} busy{st};
	for (uint64_t done = 0; done < bytes;) {
		auto &slot = st->slots[st->next_slot];
		st->next_slot ^= 1;
		uint64_t n = bytes - done < kStagingBytes ? bytes - done : kStagingBytes;
		if (slot.bytes < n) { // grows with what is copied: many streams copy little
			if (slot.done) MARGO_TRY(wait_event(c, slot.done, "copy in"));
			if (slot.p) pinned_give(c, slot.p, slot.bytes);
			slot.p = nullptr, slot.bytes = 0;
			MARGO_TRY(pinned_take(c, n, &slot.p, &slot.bytes));
			if (!slot.done) MARGO_TRY(with_room(c, "making an event", [&] { return cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming); }));
		} else {
			MARGO_TRY(wait_event(c, slot.done, "copy in"));
		}
		memcpy(slot.p, from + done, n);
		MARGO_TRY(check(c, cudaMemcpyAsync(to + done, slot.p, n, cudaMemcpyHostToDevice, st->s), "copy in"));
		MARGO_TRY(check(c, cudaEventRecord(slot.done, st->s), "copy in"));
		done += n;
	}
	std::lock_guard<std::mutex> lock(c->mu);
	c->counters.copies_in++;
	c->counters.bytes_in += bytes;
	return MARGO_OK;
}

margo_status copy_out(margo_stream *st, void *dst, uint64_t src, uint64_t bytes) {
	margo_context *c = st->ctx;
	Guard g(c);
	if (st->capturing) return fail(c, MARGO_INVALID, "copy out: stream is capturing");
	if (c->under_way.load() > 0) MARGO_TRY(wait_stream(c, st->s, "copy out")); // the driver waits in a copy to memory that is not pinned
	MARGO_TRY(check(c, cudaMemcpyAsync(dst, reinterpret_cast<void *>(uintptr_t(src)), bytes, cudaMemcpyDeviceToHost, st->s), "copy out"));
	st->busy.store(true);
	MARGO_TRY(waited(st, "copy out"));
	std::lock_guard<std::mutex> lock(c->mu);
	c->counters.syncs--; // counted as a copy
	c->counters.copies_out++;
	c->counters.bytes_out += bytes;
	return MARGO_OK;
}

// op makes an entry of the table out of an op: the device is made current, and
// arguments of another size are refused.
template <class A, margo_status (*f)(margo_stream *, const A *)> margo_status op(margo_stream *st, const A *a) {
	Guard g(st->ctx);
	if (a->size != sizeof(A)) return fail(st->ctx, MARGO_INVALID, "argument struct has %u bytes, this plugin's has %zu", a->size, sizeof(A));
	margo_status s = f(st, a);
	st->busy.store(true); // whatever came of it
	return s;
}

margo_status copy(margo_stream *st, const margo_mat *dst, const margo_mat *src) {
	Guard g(st->ctx);
	margo_status s = op_copy(st, dst, src);
	st->busy.store(true);
	return s;
}

margo_status fill(margo_stream *st, const margo_mat *dst, float v) {
	Guard g(st->ctx);
	margo_status s = op_fill(st, dst, v);
	st->busy.store(true);
	return s;
}

// may_complain notes that an op which checks indices on the device is under way.
void may_complain(margo_stream *st) {
	std::lock_guard<std::mutex> lock(st->ctx->mu);
	st->rows_enqueued = true;
}

margo_status rows(margo_stream *st, const margo_rows_args *a) {
	may_complain(st);
	return op_rows(st, a);
}

margo_status attention(margo_stream *st, const margo_attention_args *a) {
	if (a->blocks.p) may_complain(st);
	return op_attention(st, a);
}

const margo_api table = {
	sizeof(margo_api), MARGO_ABI_MAJOR, MARGO_ABI_MINOR, 0,
	gpu::build,
	device_count, open, close, info, last_error, counters, kernel,
	alloc, free_, host_alloc, host_free,
	stream_create, stream_destroy, stream_sync, event_record, event_wait, event_elapsed, event_destroy,
	capture_begin, capture_end, graph_launch, graph_destroy,
	copy_in, copy_out, copy, fill,
	op<margo_gemm_args, op_gemm>,
	op<margo_attention_args, attention>,
	op<margo_norm_args, op_norm>,
	op<margo_gated_add_args, op_gated_add>,
	op<margo_rows_args, rows>,
	op<margo_cast_args, op_cast>,
	op<margo_timestep_args, op_timestep_embedding>,
	op<margo_normal_args, op_normal>,
	op<margo_diffusion_step_args, op_diffusion_step>,
	op_head_steps_workspace,
	op<margo_head_steps_args, op_head_steps>,
	op<margo_conv2d_args, op_conv2d>,
	op_group_norm_workspace,
	op<margo_group_norm_args, op_group_norm>,
	op<margo_patchify_args, op_patchify>,
	synchronize,
	op<margo_categorical_args, op_categorical>,
	cublaslt_probe, cublaslt_open, cublaslt_workspace, cublaslt_algo, cublaslt_store,
	nccl_version, comm_unique_id, comm_init, comm_all_reduce, comm_broadcast, comm_error, comm_wait, comm_close,
	memory_policy, trim,
	comm_pending, comm_limit, comm_fail, comm_memory,
};

} // namespace

extern "C" __attribute__((visibility("default"))) const margo_api *margo_plugin(uint32_t major, uint32_t *have) {
	*have = MARGO_ABI_MAJOR;
	return major == MARGO_ABI_MAJOR ? &table : nullptr;
}
