// attention_paged.cu: the bf16 attention kernels for keys and values in a paged cache: each row's block is
// looked up in the sequence's table as its copy is started (one division and one load per row and tile); all
// else is as for rows in a row.
#include "attention_mma.cuh"

template margo_status attention_bf16<true>(margo_stream *, const Attention &, const margo_attention_args *);
