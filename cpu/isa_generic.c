// isa_generic.c: vectors of 4 floats in the compiler's own terms: any machine.
#define MC_ISA_NAME "generic"
#define MC_KERNELS mc_kernels_generic
#include "isa.inc.h"
