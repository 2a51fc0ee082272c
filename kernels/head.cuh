// head.cuh: what the paths of the diffusion head share: the state of a run of steps on
// the device, and the layout of the workspace.
#pragma once

#include "plugin.h"

// HeadState lies in device memory and holds all that changes from call to call, so that a
// captured graph of steps serves every call of its shapes. Coefficients follow it.
struct HeadCoef {
	float a, b, min_log, max_log;
	int32_t last, reserved;
};
struct HeadState {
	margo_rng rng; // step: of the first coefficient
	float temperature;
	int32_t reserved;
	HeadCoef coef[1]; // one for each step of the run
};
constexpr int64_t kHeadChunk = 256; // most steps of a run
constexpr uint64_t head_state_bytes() { return (sizeof(HeadState) + (kHeadChunk - 1) * sizeof(HeadCoef) + 255) / 256 * 256; }

// The latency path, head_latency.cu: a run of steps in one persistent kernel.
struct HeadLatencyRun {
	const HeadState *state;
	const float *mods; // modulations of the run [count·r, ldm]
	float *x;          // [n, c], in and out
	const float *guidance, *noise; // noise, trace: of the run's first step
	float *trace;
	const int32_t *ids;
	int64_t ldm, ldn, ldt;
	int32_t n, r, c, w, count;
};

// head_latency_serves says whether a call can run there: bf16 or FP8 weights, at most 16 rows, widths that are multiples of 16 up to
// 1536, a device that holds the whole grid. head_latency_bytes is what it needs of workspace.
bool head_latency_serves(const margo_context *, const margo_head_steps_args *);
uint64_t head_latency_bytes(const margo_head_steps_args *);

// head_latency enqueues a run with a->weights. MARGO_UNSUPPORTED without a text: other programs hold a part of the device, so that
// the grid does not fit.
margo_status head_latency(margo_stream *, const margo_head_steps_args *a, const HeadLatencyRun &, uint64_t workspace);
