// dispatch.c: choice of the instruction set, once per process.
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

extern const struct mc_kernels mc_kernels_generic;
#if defined(__x86_64__)
extern const struct mc_kernels mc_kernels_avx512_bf16, mc_kernels_avx512, mc_kernels_avx2;
#endif

// runnable lists the tables this machine can run, best first, and ends with NULL.
static const struct mc_kernels **runnable(void) {
	static const struct mc_kernels *list[5];
	const struct mc_kernels **p = list;
#if defined(__x86_64__)
	__builtin_cpu_init();
	int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
	int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
	if (avx512 && __builtin_cpu_supports("avx512bf16")) *p++ = &mc_kernels_avx512_bf16;
	if (avx512) *p++ = &mc_kernels_avx512;
	if (avx2) *p++ = &mc_kernels_avx2;
#endif
	*p = &mc_kernels_generic;
	return list;
}

const struct mc_kernels *mc_kern_named(const char *name) {
	for (const struct mc_kernels **p = runnable(); *p; p++)
		if (!strcmp((*p)->name, name)) return *p;
	return NULL;
}

static const struct mc_kernels *_Atomic chosen;

const struct mc_kernels *mc_kern(void) {
	const struct mc_kernels *k = atomic_load_explicit(&chosen, memory_order_acquire);
	if (k) return k;
	const char *name = getenv("MARGO_CPU_ISA");
	k = name ? mc_kern_named(name) : NULL;
	if (!k) k = runnable()[0];
	atomic_store_explicit(&chosen, k, memory_order_release);
	return k;
}

void mc_kern_force(const struct mc_kernels *k) { atomic_store(&chosen, k); }
