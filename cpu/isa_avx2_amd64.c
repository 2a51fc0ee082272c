// isa_avx2_amd64.c: AVX2 with FMA (Haswell, Zen and later).
#pragma GCC target("avx2,fma,bmi,bmi2")
#define MC_ISA_AVX2 1
#define MC_ISA_NAME "avx2"
#define MC_KERNELS mc_kernels_avx2
#include "isa.inc.h"
