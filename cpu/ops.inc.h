// ops.inc.h: included by isa.inc.h once per instruction set, after simd.h,
// vmath.inc.h and gemm.inc.h. Everything in it is static.
static const struct mc_ops ops = {0};
