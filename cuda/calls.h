// calls.h: what Go needs to call a plugin: opening it, and a trampoline for each
// entry of its table, since Go can't call function pointers.
#ifndef MARGO_CUDA_CALLS_H
#define MARGO_CUDA_CALLS_H

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "margo_abi.h"

// Function pointers can't be called from Go; each entry has a trampoline.
static inline margo_status m_device_count(const margo_api *a, int32_t *n, char *err, size_t b) { return a->device_count(n, err, b); }
static inline margo_status m_open(const margo_api *a, int32_t i, uint32_t flags, margo_context **out, char *err, size_t b) { return a->open(i, flags, out, err, b); }
static inline margo_status m_close(const margo_api *a, margo_context *c) { return a->close(c); }
static inline margo_status m_synchronize(const margo_api *a, margo_context *c) { return a->synchronize(c); }
static inline margo_status m_info(const margo_api *a, margo_context *c, margo_info *out) { return a->info(c, out); }
static inline margo_status m_last_error(const margo_api *a, margo_context *c, char *out, size_t b) { return a->last_error(c, out, b); }
static inline margo_status m_counters(const margo_api *a, margo_context *c, margo_counters *out) { return a->counters(c, out); }
static inline margo_status m_kernel(const margo_api *a, margo_context *c, int64_t i, margo_kernel *out) { return a->kernel(c, i, out); }
static inline margo_status m_alloc(const margo_api *a, margo_context *c, uint64_t n, uint64_t *out) { return a->alloc(c, n, out); }
static inline margo_status m_free(const margo_api *a, margo_context *c, uint64_t p) { return a->free(c, p); }
static inline margo_status m_memory_policy(const margo_api *a, margo_context *c, uint64_t limit, uint64_t capacity) { return a->memory_policy(c, limit, capacity); }
static inline margo_status m_trim(const margo_api *a, margo_context *c) { return a->trim(c); }
static inline margo_status m_stream_create(const margo_api *a, margo_context *c, margo_stream **out) { return a->stream_create(c, out); }
static inline margo_status m_stream_destroy(const margo_api *a, margo_stream *s) { return a->stream_destroy(s); }
static inline margo_status m_stream_sync(const margo_api *a, margo_stream *s) { return a->stream_sync(s); }
static inline margo_status m_event_record(const margo_api *a, margo_stream *s, margo_event **out) { return a->event_record(s, out); }
static inline margo_status m_event_wait(const margo_api *a, margo_stream *s, margo_event *e) { return a->event_wait(s, e); }
static inline margo_status m_event_elapsed(const margo_api *a, margo_event *f, margo_event *t, float *ms) { return a->event_elapsed(f, t, ms); }
static inline margo_status m_event_destroy(const margo_api *a, margo_event *e) { return a->event_destroy(e); }
static inline margo_status m_capture_begin(const margo_api *a, margo_stream *s) { return a->capture_begin(s); }
static inline margo_status m_capture_end(const margo_api *a, margo_stream *s, margo_graph **out) { return a->capture_end(s, out); }
static inline margo_status m_graph_launch(const margo_api *a, margo_stream *s, margo_graph *g) { return a->graph_launch(s, g); }
static inline margo_status m_graph_destroy(const margo_api *a, margo_graph *g) { return a->graph_destroy(g); }
static inline margo_status m_copy_in(const margo_api *a, margo_stream *s, uint64_t d, const void *p, uint64_t n) { return a->copy_in(s, d, p, n); }
static inline margo_status m_copy_out(const margo_api *a, margo_stream *s, void *d, uint64_t p, uint64_t n) { return a->copy_out(s, d, p, n); }
static inline margo_status m_copy(const margo_api *a, margo_stream *s, const margo_mat *d, const margo_mat *x) { return a->copy(s, d, x); }
static inline margo_status m_fill(const margo_api *a, margo_stream *s, const margo_mat *d, float v) { return a->fill(s, d, v); }
static inline margo_status m_cublaslt_probe(const margo_api *a, const char *library, margo_cublaslt_info *out, char *err, size_t b) { return a->cublaslt_probe(library, out, err, b); }
static inline margo_status m_cublaslt_open(const margo_api *a, margo_context *c, const char *library, int32_t autotune, margo_cublaslt_info *out) { return a->cublaslt_open(c, library, autotune, out); }
static inline margo_status m_cublaslt_workspace(const margo_api *a, margo_stream *s, uint64_t p, uint64_t n) { return a->cublaslt_workspace(s, p, n); }
static inline margo_status m_cublaslt_algo(const margo_api *a, margo_context *c, int64_t i, margo_cublaslt_algo *out) { return a->cublaslt_algo(c, i, out); }
static inline margo_status m_cublaslt_store(const margo_api *a, margo_context *c, const margo_cublaslt_algo *x) { return a->cublaslt_store(c, x); }

// Ops all have one form; which is an index into the table.
enum { M_GEMM, M_ATTENTION, M_NORM, M_GATED_ADD, M_ROWS, M_CAST, M_TIMESTEP, M_NORMAL, M_DIFFUSION, M_HEAD, M_CONV, M_GROUP_NORM, M_PATCHIFY, M_CATEGORICAL };
typedef margo_status (*m_op)(margo_stream *, const void *);
static inline m_op m_entry(const margo_api *a, int which) {
	switch (which) {
	case M_GEMM: return (m_op)a->gemm;
	case M_ATTENTION: return (m_op)a->attention;
	case M_NORM: return (m_op)a->norm;
	case M_GATED_ADD: return (m_op)a->gated_add;
	case M_ROWS: return (m_op)a->rows;
	case M_CAST: return (m_op)a->cast;
	case M_TIMESTEP: return (m_op)a->timestep_embedding;
	case M_NORMAL: return (m_op)a->normal;
	case M_DIFFUSION: return (m_op)a->diffusion_step;
	case M_HEAD: return (m_op)a->head_steps;
	case M_CONV: return (m_op)a->conv2d;
	case M_GROUP_NORM: return (m_op)a->group_norm;
	case M_PATCHIFY: return (m_op)a->patchify;
	case M_CATEGORICAL: return (m_op)a->categorical;
	}
	return 0;
}
static inline int m_has(const margo_api *a, int which) { return m_entry(a, which) != 0; }
static inline margo_status m_run(const margo_api *a, int which, margo_stream *s, const void *args) {
	m_op f = m_entry(a, which);
	return f ? f(s, args) : MARGO_UNSUPPORTED;
}
static inline margo_status m_head_workspace(const margo_api *a, margo_context *c, const margo_head_steps_args *x, uint64_t budget, uint64_t *out) { return a->head_steps_workspace(c, x, budget, out); }
static inline margo_status m_group_norm_workspace(const margo_api *a, margo_context *c, const margo_group_norm_args *x, uint64_t *out) { return a->group_norm_workspace(c, x, out); }

static inline margo_status m_nccl_version(const margo_api *a, int32_t *v, char *err, size_t b) { return a->nccl_version(v, err, b); }
static inline margo_status m_comm_unique_id(const margo_api *a, uint8_t *id, char *err, size_t b) { return a->comm_unique_id(id, err, b); }
static inline margo_status m_comm_init(const margo_api *a, margo_context *c, const margo_comm_args *x, margo_comm **out) { return a->comm_init(c, x, out); }
static inline margo_status m_all_reduce(const margo_api *a, margo_stream *s, margo_comm *m, int64_t n, const margo_mat *t) { return a->all_reduce(s, m, n, t); }
static inline margo_status m_broadcast(const margo_api *a, margo_stream *s, margo_comm *m, int32_t root, int64_t n, const margo_mat *t) { return a->broadcast(s, m, root, n, t); }
static inline margo_status m_comm_wait(const margo_api *a, margo_comm *m, int32_t limit_ms) { return a->comm_wait(m, limit_ms); }
static inline margo_status m_comm_close(const margo_api *a, margo_comm *m) { return a->comm_close(m); }
static inline margo_status m_comm_error(const margo_api *a, margo_comm *m) { return a->comm_error(m); }
static inline margo_status m_comm_pending(const margo_api *a, margo_comm *m, int64_t *n) { return a->comm_pending(m, n); }
static inline margo_status m_comm_limit(const margo_api *a, margo_comm *m, int32_t limit_ms) { return a->comm_limit(m, limit_ms); }
static inline margo_status m_comm_fail(const margo_api *a, margo_comm *m, const char *why) { return a->comm_fail(m, why); }
static inline margo_status m_comm_memory(const margo_api *a, margo_comm *m, uint64_t *bytes) { return a->comm_memory(m, bytes); }
// m_has_comm: the table's entries for ranks are there.
static inline int m_has_comm(const margo_api *a) { return a->nccl_version && a->comm_unique_id && a->comm_init && a->all_reduce && a->broadcast && a->comm_error && a->comm_wait && a->comm_close && a->comm_pending && a->comm_limit && a->comm_fail && a->comm_memory; }

typedef const margo_api *(*m_plugin_fn)(uint32_t, uint32_t *);
// m_load opens a plugin; NULL with the reason in err, *have the version found (0: no plugin at all).
static inline const margo_api *m_load(const char *path, uint32_t *have, char *err, size_t bytes) {
	*have = 0;
	void *h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!h) {
		strncpy(err, dlerror(), bytes - 1);
		err[bytes - 1] = 0;
		return 0;
	}
	m_plugin_fn f = (m_plugin_fn)dlsym(h, "margo_plugin");
	if (!f) {
		strncpy(err, "it has no function margo_plugin", bytes - 1);
		err[bytes - 1] = 0;
		return 0;
	}
	return f(MARGO_ABI_MAJOR, have);
}
#endif
