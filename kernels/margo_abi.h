// margo_abi.h: the C interface between margo's Go package cuda and the plugin
// that holds the CUDA kernels. It is the only header that Go sees.
//
// A plugin is a shared library (libmargo_cuda.so: nvcc; libmargo_emu.so: the same
// sources run on the host) that exports one symbol, margo_plugin. Rules:
//   - margo_plugin returns a table of functions. Entries are appended, never moved;
//     a NULL entry is not supported; another major version is refused.
//   - Every function returns a margo_status. Its text is copied out with
//     last_error of the context (open: into the caller's buffer).
//   - Handles are opaque; device addresses are uint64_t, 0 for none. Argument
//     structs begin with their size, so that an older caller can be recognised.
//   - Formulas, shapes and dtypes are those of engine.Kernels (engine/kernels.go),
//     which has checked them: here only what launching needs is checked.
//   - Ops enqueue on the stream and return; nothing waits but what says so.
//     Nothing exits, aborts, throws, prints, calls back or keeps thread-local state;
//     the context's device is made current on entry, so threads may change.
//   - Ops allocate nothing: workspace is passed in, its size can be asked for.
#ifndef MARGO_ABI_H
#define MARGO_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MARGO_ABI_MAJOR 1
#define MARGO_ABI_MINOR 6

typedef enum margo_status {
	MARGO_OK = 0,
	MARGO_INVALID = 1,       // arguments that cannot work
	MARGO_UNSUPPORTED = 2,   // no such op, dtype or combination on this device
	MARGO_OUT_OF_MEMORY = 3, // text: asked, held and free bytes
	MARGO_DEVICE_FAULT = 4,  // sticky: the device failed, its state is unknown
	MARGO_CANCELLED = 5,     // the cancel flag was set
	MARGO_INTERNAL = 6,      // a broken invariant of the plugin
	MARGO_COMM_FAULT = 7     // a collective or another rank failed
} margo_status;

// Values of engine.DType and engine.Activation.
enum { MARGO_F32 = 0, MARGO_BF16 = 1, MARGO_I32 = 2 };
enum { MARGO_IDENTITY = 0, MARGO_GELU_ERF = 1, MARGO_GELU_TANH = 2, MARGO_SILU = 3 };

typedef struct margo_context margo_context; // a device
typedef struct margo_stream margo_stream;
typedef struct margo_event margo_event;
typedef struct margo_graph margo_graph;
typedef struct margo_comm margo_comm; // a rank's end of a group of ranks

// margo_mat is the matrix view of a tensor: rows × cols elements, rows ld
// elements apart. p is 0 for an absent option.
typedef struct margo_mat {
	uint64_t p;
	int64_t rows, cols, ld;
	int32_t dtype, reserved;
} margo_mat;

typedef struct margo_rng {
	uint64_t seed;
	uint32_t purpose, step;
} margo_rng;

// margo_info describes an opened device.
typedef struct margo_info {
	uint32_t size;
	int32_t sm_count, cc_major, cc_minor;
	int32_t driver_version, runtime_version; // as 13050 for 13.5
	uint64_t mem_total, mem_free, l2_bytes, smem_per_block;
	int32_t cooperative, emulated;
	int32_t clock_khz, memory_clock_khz, memory_bus_bits; // 0 where unknown
	char name[128], pci_bus_id[32], arch[16]; // arch: "sm_90", "emu"
} margo_info;

// margo_counters are totals since the context was opened.
typedef struct margo_counters {
	uint32_t size, reserved;
	uint64_t kernel_launches, graph_launches, graph_kernels; // graph_kernels: kernels run by graph launches
	uint64_t syncs, copies_in, copies_out, bytes_in, bytes_out, allocs, bytes_allocated, bytes_peak;
	// Of the pool: allocations of the driver's, allocations served from the cache, cached buffers given back to the driver; bytes
	// cached, and taken from the driver (held with what rounding adds, and cached) now and at most; pinned for staging; the policy.
	uint64_t device_allocs, reuses, trims, bytes_cached, bytes_taken, bytes_taken_peak, bytes_pinned, limit, capacity;
	uint64_t bytes_libraries; // part of bytes_taken: comm_memory's of all margo_comm
} margo_counters;

// margo_kernel describes a kernel that has been launched, for budgets and traces.
typedef struct margo_kernel {
	uint32_t size;
	int32_t registers, local_bytes, static_smem, max_dynamic_smem, max_threads, blocks_per_sm;
	uint64_t launches;
	char name[96];
} margo_kernel;

typedef struct margo_gemm_args { // y = residual + gate ⊙ act(x·wᵀ + bias); columns n0 … of w
	uint32_t size;
	int32_t act;
	margo_mat x, w, bias, gate, residual, y;
	int64_t n0, gate_rows;
} margo_gemm_args;

typedef struct margo_attention_args {
	uint32_t size;
	int32_t causal;
	margo_mat q, k, v, o;
	margo_mat qoff, koff; // i32 [seqs+1]
	int64_t seqs, heads, max_q, max_k; // longest sequence of queries and of keys
	float scale;
	int32_t reserved;
	margo_mat blocks; // i32 [seqs, B] or absent: key j of sequence s is row j mod block_size of block blocks[s, j / block_size]
	int64_t block_size;
} margo_attention_args;

typedef struct margo_norm_args {
	uint32_t size;
	float eps;
	margo_mat x, y, weight, bias, scale, shift;
	int64_t mod_rows;
} margo_norm_args;

typedef struct margo_gated_add_args {
	uint32_t size, reserved;
	margo_mat x, h, gate, y;
	int64_t gate_rows;
} margo_gated_add_args;

typedef struct margo_rows_args { // an index outside its tensor is reported by the next wait, and that row is not written
	uint32_t size;
	int32_t act;
	margo_mat y, a, b, iy, ia, ib;
	int64_t count;
} margo_rows_args;

typedef struct margo_cast_args {
	uint32_t size;
	float scale;
	margo_mat x, y;
	float shift;
	int32_t reserved;
} margo_cast_args;

typedef struct margo_timestep_args {
	uint32_t size;
	float max_period;
	margo_mat t, y;
} margo_timestep_args;

typedef struct margo_normal_args {
	uint32_t size, reserved;
	margo_mat y, ids;
	margo_rng rng;
} margo_normal_args;

typedef struct margo_coef { // engine.StepCoef
	double a, b, min_log, max_log;
	int32_t last, exact;
} margo_coef;

typedef struct margo_diffusion_step_args {
	uint32_t size;
	float temperature;
	margo_mat x, y, out, guidance, noise, ids;
	margo_rng rng;
	margo_coef coef;
} margo_diffusion_step_args;

typedef struct margo_linear { // w [N,K], bias [N]
	margo_mat w, bias;
} margo_linear;

typedef struct margo_head_block {
	margo_mat norm_weight, norm_bias;
	margo_linear fc1, fc2;
} margo_head_block;

// margo_fp8 is a weight [N,K] as e4m3 numbers, N a multiple of 8 and K of 16, and a scale (F32, a power of two, NaN for a row that has one)
// for each row. Codes lie as fragments of mma.m16n8k16: 128 bytes for each 8 rows × 16 columns, those of the same rows one
// after another; in them 4 bytes for lane l: row l/4, columns 2(l%4) + {0, 1, 8, 9}. Both addresses are multiples of 4.
typedef struct margo_fp8 {
	uint64_t codes, scales;
} margo_fp8;

typedef struct margo_head_fp8 {
	margo_fp8 fc1, fc2;
} margo_head_fp8;

typedef struct margo_head_weights {
	margo_linear input, ada, final;
	const margo_head_block *blocks; // host memory, read during the call
	int32_t depth;
	float eps;
} margo_head_weights;

typedef struct margo_head_steps_args {
	uint32_t size;
	float temperature;
	margo_mat x, cond, time, guidance, noise, ids, trace;
	margo_rng rng;
	margo_head_weights weights, exact; // exact: used for steps with coef.exact
	const margo_coef *steps;           // host memory, read during the call
	int64_t step_count;
	const uint32_t *cancel;            // host memory, polled before every step; may be NULL
	uint64_t workspace, workspace_bytes;
	int32_t path; // 0: the plugin chooses; 1: throughput (GEMMs); 2: latency (persistent kernel)
	int32_t reserved;
	const margo_head_fp8 *fp8; // host memory, read during the call: the numbers of weights.blocks once more; NULL: none. For path 2
} margo_head_steps_args;

typedef struct margo_conv2d_args { // NHWC; see engine.Conv2DArgs
	uint32_t size;
	int32_t upsample;
	margo_mat x, w, bias, residual, y; // x, residual and y as matrices of pixels × channels
	int64_t n, h, wd, ho, wo;          // images, input height and width, output height and width
	int32_t kernel, stride, pad_top, pad_left;
} margo_conv2d_args;

typedef struct margo_group_norm_args {
	uint32_t size;
	int32_t act;
	margo_mat x, y, weight, bias;
	int64_t n, pixels; // images, pixels of an image
	int32_t groups;
	float eps;
	uint64_t workspace, workspace_bytes; // group_norm_workspace
} margo_group_norm_args;

typedef struct margo_patchify_args {
	uint32_t size;
	int32_t inverse;
	margo_mat x, y;
	int64_t n, h, w, c, p;
} margo_patchify_args;

typedef struct margo_categorical_args { // see engine.CategoricalArgs
	uint32_t size;
	int32_t method; // 0: Gumbel, 1: inverse transform
	margo_mat logits, guidance, y, log_prob, ids;
	margo_rng rng;
	int64_t stride, top_k;
	float temperature, top_p;
} margo_categorical_args;

// margo_cublaslt_info says which cuBLASLt was found.
typedef struct margo_cublaslt_info {
	uint32_t size, reserved;
	uint64_t version;         // as 131000 for 13.10.0
	uint64_t workspace_bytes; // what a stream should be given
	char library[256];
} margo_cublaslt_info;

// margo_cublaslt_algo is what was chosen for a shape of y = residual + x·wᵀ + bias: the shape, then the choice.
enum { MARGO_CUBLASLT_OURS = 0, MARGO_CUBLASLT_HEURISTIC = 1, MARGO_CUBLASLT_TUNED = 2, MARGO_CUBLASLT_STORED = 3 };
typedef struct margo_cublaslt_algo {
	uint32_t size;
	int32_t dtype, y_dtype;     // of x and w, of y
	int32_t bias, residual;     // residual 1: another matrix, 2: y itself
	int32_t choice;             // OURS: the library refused, our kernels serve; TUNED: timed; STORED: from margo_api.cublaslt_store
	int64_t m, n, k, ldx, ldw, ldr, ldy;
	uint64_t workspace_limit;   // bytes that the stream had
	uint64_t workspace, uses;   // bytes that the algorithm takes; products
	uint64_t algo[8];           // the library's
} margo_cublaslt_algo;

enum { MARGO_COMM_ID_BYTES = 128 };

typedef struct margo_comm_args {
	uint32_t size;
	int32_t rank, ranks;
	int32_t limit_ms; // to wait for the other ranks: now, when a collective connects them, and for each to end after that before it
	uint8_t id[MARGO_COMM_ID_BYTES]; // of comm_unique_id, the same on all ranks
} margo_comm_args;

// margo_api is the table. Unless said otherwise pointers to results must not be
// NULL, and strings are zero-terminated.
typedef struct margo_api {
	uint32_t size, major, minor, reserved;
	const char *build; // compiler and architectures, for humans

	// Devices. open fails with the reason in err; flags: bit 0 fills new memory with NaN.
	margo_status (*device_count)(int32_t *n, char *err, size_t err_bytes);
	margo_status (*open)(int32_t ordinal, uint32_t flags, margo_context **out, char *err, size_t err_bytes);
	margo_status (*close)(margo_context *); // waits for the device; its streams are gone with it
	margo_status (*info)(margo_context *, margo_info *out); // out->size is set by the caller
	margo_status (*last_error)(margo_context *, char *out, size_t bytes);
	margo_status (*counters)(margo_context *, margo_counters *out);
	margo_status (*kernel)(margo_context *, int64_t i, margo_kernel *out); // i-th kernel launched; INVALID past the end

	// Memory. free takes effect after all work enqueued so far on any stream of the
	// context. host_alloc gives pinned memory.
	margo_status (*alloc)(margo_context *, uint64_t bytes, uint64_t *out);
	margo_status (*free)(margo_context *, uint64_t p);
	margo_status (*host_alloc)(margo_context *, uint64_t bytes, void **out);
	margo_status (*host_free)(margo_context *, void *p);

	// Streams, events, graphs. Waiting calls: stream_sync, copy_out; copy_in has taken
	// the data when it returns. While a stream captures, waiting calls are INVALID.
	margo_status (*stream_create)(margo_context *, margo_stream **out);
	margo_status (*stream_destroy)(margo_stream *);
	margo_status (*stream_sync)(margo_stream *);
	margo_status (*event_record)(margo_stream *, margo_event **out);
	margo_status (*event_wait)(margo_stream *, margo_event *);
	margo_status (*event_elapsed)(margo_event *from, margo_event *to, float *ms); // waits for both
	margo_status (*event_destroy)(margo_event *);
	margo_status (*capture_begin)(margo_stream *);
	margo_status (*capture_end)(margo_stream *, margo_graph **out); // out NULL: discard
	margo_status (*graph_launch)(margo_stream *, margo_graph *);
	margo_status (*graph_destroy)(margo_graph *);

	margo_status (*copy_in)(margo_stream *, uint64_t dst, const void *src, uint64_t bytes);
	margo_status (*copy_out)(margo_stream *, void *dst, uint64_t src, uint64_t bytes);
	margo_status (*copy)(margo_stream *, const margo_mat *dst, const margo_mat *src); // same dtype and shape
	margo_status (*fill)(margo_stream *, const margo_mat *dst, float v); // i32: its integer part

	// Ops.
	margo_status (*gemm)(margo_stream *, const margo_gemm_args *);
	margo_status (*attention)(margo_stream *, const margo_attention_args *);
	margo_status (*norm)(margo_stream *, const margo_norm_args *);
	margo_status (*gated_add)(margo_stream *, const margo_gated_add_args *);
	margo_status (*rows)(margo_stream *, const margo_rows_args *);
	margo_status (*cast)(margo_stream *, const margo_cast_args *);
	margo_status (*timestep_embedding)(margo_stream *, const margo_timestep_args *);
	margo_status (*normal)(margo_stream *, const margo_normal_args *);
	margo_status (*diffusion_step)(margo_stream *, const margo_diffusion_step_args *);
	margo_status (*head_steps_workspace)(margo_context *, const margo_head_steps_args *, uint64_t budget, uint64_t *bytes);
	margo_status (*head_steps)(margo_stream *, const margo_head_steps_args *);
	margo_status (*conv2d)(margo_stream *, const margo_conv2d_args *);
	margo_status (*group_norm_workspace)(margo_context *, const margo_group_norm_args *, uint64_t *bytes);
	margo_status (*group_norm)(margo_stream *, const margo_group_norm_args *);
	margo_status (*patchify)(margo_stream *, const margo_patchify_args *);

	margo_status (*synchronize)(margo_context *); // waits for all streams
	margo_status (*categorical)(margo_stream *, const margo_categorical_args *);

	// cuBLASLt for products without an epilogue of ours. library NULL: looked for by its names. probe opens
	// nothing for good; open makes gemm use it, autotune 1: the first product of a shape on a stream that has a workspace
	// times the candidates, which waits and takes memory for a moment. A stream's workspace is the caller's, which keeps it
	// until the stream is closed. algo reads the i-th choice, INVALID past the end; store gives one that an earlier
	// process made with the same device and version, and is refused once that shape was met.
	margo_status (*cublaslt_probe)(const char *library, margo_cublaslt_info *out, char *err, size_t err_bytes);
	margo_status (*cublaslt_open)(margo_context *, const char *library, int32_t autotune, margo_cublaslt_info *out);
	margo_status (*cublaslt_workspace)(margo_stream *, uint64_t p, uint64_t bytes);
	margo_status (*cublaslt_algo)(margo_context *, int64_t i, margo_cublaslt_algo *out);
	margo_status (*cublaslt_store)(margo_context *, const margo_cublaslt_algo *);

	// Collectives of ranks with a device each, by NCCL (MARGO_NCCL_LIB, else libnccl.so.2), which is opened
	// at the first call; the emulated plugin has a stand-in. Without it they are UNSUPPORTED, with the reason.
	// A COMM_FAULT leaves a margo_comm unusable but for comm_close. all_reduce sums and broadcast copies n
	// contiguous tensors of any dtype in place: they enqueue and return. Contents are defined once the stream was waited for and comm_error
	// is OK after that. Where a rank has failed, or a wait has waited longer than the limit for the next collective to end, waits end
	// those that are under way, and comm_error says why. comm_wait waits for all collectives of a margo_comm. Not while the
	// stream captures.
	margo_status (*nccl_version)(int32_t *version, char *err, size_t err_bytes); // as 23203 for 2.32.3
	margo_status (*comm_unique_id)(uint8_t *id, char *err, size_t err_bytes);    // MARGO_COMM_ID_BYTES, by one rank for all
	margo_status (*comm_init)(margo_context *, const margo_comm_args *, margo_comm **out); // waits for all ranks
	margo_status (*all_reduce)(margo_stream *, margo_comm *, int64_t n, const margo_mat *);
	margo_status (*broadcast)(margo_stream *, margo_comm *, int32_t root, int64_t n, const margo_mat *);
	margo_status (*comm_error)(margo_comm *); // what has failed in the background; waits for nothing
	margo_status (*comm_wait)(margo_comm *, int32_t limit_ms);
	margo_status (*comm_close)(margo_comm *); // waits for no other rank; frees the margo_comm. COMM_FAULT: it ended what was under way

	// memory_policy: alloc takes no more than limit bytes from the driver (0: no limit), what is cached included; up to capacity
	// bytes of freed memory are cached (0, as at first: none). trim gives what is cached back.
	margo_status (*memory_policy)(margo_context *, uint64_t limit, uint64_t capacity);
	margo_status (*trim)(margo_context *);

	// comm_limit sets the limit of later waits. comm_fail ends what is under way, and its text is what comm_error says; any thread
	// can call it. comm_memory measures what NCCL has taken of the device's memory since comm_init began, by what is free, and counts it
	// in bytes_taken until comm_close; OUT_OF_MEMORY where the limit leaves no room for that. Call it once, when ranks are connected.
	// comm_pending counts collectives that have not ended.
	margo_status (*comm_pending)(margo_comm *, int64_t *n);
	margo_status (*comm_limit)(margo_comm *, int32_t limit_ms);
	margo_status (*comm_fail)(margo_comm *, const char *why);
	margo_status (*comm_memory)(margo_comm *, uint64_t *bytes);
} margo_api;

// margo_plugin returns the table if it has this major version, else NULL; *have is
// then the plugin's. The table lives as long as the library is loaded.
const margo_api *margo_plugin(uint32_t major, uint32_t *have);

#ifdef __cplusplus
}
#endif
#endif
