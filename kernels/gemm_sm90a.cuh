// gemm_sm90a.cuh: the matrix product for Hopper, gemm_sm90a.cu.
#pragma once

#include "plugin.h"

constexpr int kSm90Tiles = 5;

// gemm_sm90a_serves says whether a product can run there. It depends on the device, on dtypes, and on the alignment of
// X and W (base and distance of rows), never on the number of rows: a row's result has the same bits in every batch whose
// rows lie in the same tensor. The environment's MARGO_SM90=0 turns it off, to compare with mma.sync.
bool gemm_sm90a_serves(const margo_context *, const margo_gemm_args *);

// gemm_sm90a computes it. MARGO_UNSUPPORTED without a text: the driver has no tensor maps. tile: -1 chooses, 0 … kSm90Tiles-1
// names one (all give the same bits).
margo_status gemm_sm90a(margo_stream *, const margo_gemm_args *, int tile = -1);
