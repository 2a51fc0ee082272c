// gemm_sm90a.cuh: the matrix product for Hopper, gemm_sm90a.cu.
#pragma once

#include "plugin.h"

constexpr int kSm90Tiles = 5;

// sm90a_enabled: the device is an sm_90, and the environment's MARGO_SM90 is not 0, which leaves Hopper's own kernels out, to compare
// with mma.sync.
bool sm90a_enabled(const margo_context *);

// gemm_sm90a_serves says whether a product can run there. It depends on the device, on dtypes, and on the alignment of
// X and W (base and distance of rows), never on the number of rows: a row's result has the same bits in every batch whose
// rows lie in the same tensor.
bool gemm_sm90a_serves(const margo_context *, const margo_gemm_args *);

// gemm_sm90a computes it. MARGO_UNSUPPORTED without a text: the driver has no tensor maps. tile: -1 chooses, 0 … kSm90Tiles-1
// names one (all give the same bits).
margo_status gemm_sm90a(margo_stream *, const margo_gemm_args *, int tile = -1);
