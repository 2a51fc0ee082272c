// ops.inc.h: included by isa.inc.h once per instruction set, after simd.h,
// vmath.inc.h, pack.inc.h, kern.inc.h and gemm.inc.h. Everything in it is static.
#include "attention.h"
#include "conv.h"

// ld and st move n elements (VL of them if n is more) of a row p of dtype dt,
// from element i on; the rest of the vector is 0.
V_INLINE vf ld(const int dt, const void *p, int64_t i, int64_t n) {
	if (dt == MC_BF16) return n >= VL ? v_loadb((const mc_bf16 *)p + i) : v_loadb_n((const mc_bf16 *)p + i, n);
	return n >= VL ? v_load((const float *)p + i) : v_load_n((const float *)p + i, n);
}
V_INLINE void st(const int dt, void *p, int64_t i, vf x, int64_t n) {
	if (dt == MC_BF16) {
		if (n >= VL) v_storeb((mc_bf16 *)p + i, x);
		else v_storeb_n((mc_bf16 *)p + i, x, n);
	} else {
		if (n >= VL) v_store((float *)p + i, x);
		else v_store_n((float *)p + i, x, n);
	}
}

// ldf is ld for float parameters that may be absent.
V_INLINE vf ldf(const float *p, float absent, int64_t i, int64_t n) {
	return p ? ld(MC_F32, p, i, n) : v_set1(absent);
}

// row is the address of row r of a tensor, NULL if the tensor is absent.
V_INLINE void *row(const struct mc_mat *t, int64_t r) {
	return t->p ? (char *)t->p + r * t->ld * (t->dtype == MC_BF16 ? 2 : 4) : NULL;
}

#include "transpose.inc.h"
#include "attention.inc.h"
#include "norm.inc.h"
#include "pointwise.inc.h"
#include "conv.inc.h"
#include "groupnorm.inc.h"

static const struct mc_ops ops = {
	.attention = attention,
	.norm = norm,
	.gated = gated,
	.rows = rows,
	.cast = cast,
	.conv = conv,
	.groupnorm = groupnorm,
};
