// attention.cu: op_attention, and its bf16 kernels for sequences whose keys are rows in a row. Hopper has kernels of its own for
// common heads (attention_sm90a.cuh).
#include "attention_mma.cuh"
#include "attention_sm90a.cuh"

template margo_status attention_bf16<false>(margo_stream *, const Attention &, const margo_attention_args *);
extern template margo_status attention_bf16<true>(margo_stream *, const Attention &, const margo_attention_args *); // attention_paged.cu

margo_status op_attention(margo_stream *st, const margo_attention_args *a) {
	if (a->heads <= 0 || a->q.cols % a->heads) return fail(st->ctx, MARGO_INVALID, "attention: %lld columns for %lld heads", (long long)a->q.cols, (long long)a->heads);
	if (a->seqs > 65535 || a->heads > 65535)
		return fail(st->ctx, MARGO_UNSUPPORTED, "attention: %lld sequences of %lld heads, at most 65535 each", (long long)a->seqs, (long long)a->heads);
	for (const margo_mat *m : {&a->q, &a->k, &a->v, &a->o})
		if (m->ld >= 1 << 30) return fail(st->ctx, MARGO_UNSUPPORTED, "attention: rows %lld elements apart", (long long)m->ld);
	Attention p{ptr<void>(a->q), ptr<void>(a->k), ptr<void>(a->v), ptr<void>(a->o), ptr<int32_t>(a->qoff), ptr<int32_t>(a->koff),
	            int(a->q.ld), int(a->k.ld), int(a->v.ld), int(a->o.ld), int(a->q.cols / a->heads), a->causal, a->scale,
	            ptr<int32_t>(a->blocks), int(a->blocks.ld), int(a->block_size), 0, st->ctx->device_error};
	if (p.blocks) {
		if (a->block_size < 1 || a->k.rows > INT32_MAX || a->blocks.rows < a->seqs)
			return fail(st->ctx, MARGO_INVALID, "attention: %lld rows in blocks of %lld for %lld sequences, table for %lld", (long long)a->k.rows,
			            (long long)a->block_size, (long long)a->seqs, (long long)a->blocks.rows);
		p.block_count = int(a->k.rows / a->block_size);
		MARGO_TRY(attention_decode(st, p, a)); // sequences of one query
		if (a->max_q <= 1) return MARGO_OK;
	}
	if (a->q.dtype == MARGO_F32) return attention_f32(st, p, a);
	if (attention_sm90a_serves(st->ctx, p, a)) {
		margo_status s = attention_sm90a(st, p, a);
		if (s != MARGO_UNSUPPORTED) return s;
	}
	return p.blocks ? attention_bf16<true>(st, p, a) : attention_bf16<false>(st, p, a);
}
