// attention_sm90a.cuh: bf16 attention for Hopper, attention_sm90a.cu.
#pragma once

#include "attention.cuh"

// attention_sm90a_serves says whether attention can run there: on sm_90, bf16, heads of 64, 72, 80 or 128 columns, rows in a row (no
// paged cache), bases and rows of Q, K and V at multiples of 16 bytes, no negative scale. It does not depend on the sequences: a query's bits are
// the same in every batch whose rows lie in the same tensors. The environment's MARGO_SM90=0 turns it off.
bool attention_sm90a_serves(const margo_context *, const Attention &, const margo_attention_args *);

// attention_sm90a computes it. MARGO_UNSUPPORTED without a text: the driver has no tensor maps. blocks: 1 of 64 queries, 2 of
// more, 0 chooses; all give the same bits.
margo_status attention_sm90a(margo_stream *, const Attention &, const margo_attention_args *, int blocks = 0);
