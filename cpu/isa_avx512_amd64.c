// isa_avx512_amd64.c: AVX-512 without bf16 (Skylake-X to Ice Lake and Rocket Lake).
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2")
#define MC_ISA_AVX512 1
#define MC_ISA_NAME "avx512"
#define MC_KERNELS mc_kernels_avx512
#include "isa.inc.h"
