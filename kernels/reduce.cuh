// reduce.cuh: sums over a warp and over a block in one fixed order.
#pragma once

#include "margo.cuh"

// warp_sum adds the 32 lanes by a butterfly; every lane gets the same bits.
MARGO_DEVICE float warp_sum(float v) {
#pragma unroll
	for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
	return v;
}

// block_sum adds the WARPS·32 threads of a block (x only), warps in order; part is shared memory and
// may be used again at once.
template <int WARPS> MARGO_DEVICE float block_sum(float v, float (&part)[WARPS]) {
	v = warp_sum(v);
	__syncthreads();
	if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
	__syncthreads();
	v = part[0];
#pragma unroll
	for (int i = 1; i < WARPS; i++) v += part[i];
	return v;
}
