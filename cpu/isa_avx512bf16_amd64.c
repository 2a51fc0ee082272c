// isa_avx512bf16_amd64.c: AVX-512 with bf16 dot products (Zen 4, Cooper Lake, Sapphire Rapids and later).
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi,bmi2")
#define MC_ISA_AVX512 1
#define MC_HAS_DOT 1
#define MC_ISA_NAME "avx512-bf16"
#define MC_KERNELS mc_kernels_avx512_bf16
#include "isa.inc.h"
