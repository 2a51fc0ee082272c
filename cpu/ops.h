// ops.h: table of the ops beside GEMM and the head loop, one per instruction
// set; ops.inc.h fills it in.
#ifndef MARGO_CPU_OPS_H
#define MARGO_CPU_OPS_H

#include "core.h"

struct mc_ops {
	int unused;
};

#endif
