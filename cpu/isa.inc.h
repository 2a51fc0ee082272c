// isa.inc.h: everything that is compiled once per instruction set. The file
// that includes it has set the target, MC_ISA_*, MC_KERNELS (name of the table)
// and MC_ISA_NAME.
#include "core.h"
#include "gemm.h"
#include "head.h"
#include "ops.h"
#include "simd.h"
#include "vmath.inc.h"
#include "pack.inc.h"
#include "kern.inc.h"
#include "gemm.inc.h"
#include "ops.inc.h"
#include "head.inc.h"
#include "peak.inc.h"

const struct mc_kernels MC_KERNELS = {
	.name = MC_ISA_NAME,
	.blocked = GEMM_BLOCKED,
	.pack_nk_f32 = pack_nk_f32,
	.pack_nk_bf16 = pack_nk_bf16,
	.gemm = gemm,
#if defined(KBLOCK)
	.gemm_streams = gemm_streams,
#endif
	.head = head,
	.peak = peak,
	.stream = stream,
	.ops = &ops,
};
