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
