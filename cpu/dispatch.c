// dispatch.c: choice of the instruction set, once per process.
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

extern const struct mc_kernels mc_kernels_generic;
#if defined(__x86_64__)
extern const struct mc_kernels mc_kernels_avx512_bf16, mc_kernels_avx512, mc_kernels_avx2;
#endif

// All tables, best first; the last runs anywhere.
static const struct mc_kernels *const tables[] = {
#if defined(__x86_64__)
	&mc_kernels_avx512_bf16, &mc_kernels_avx512, &mc_kernels_avx2,
#endif
	&mc_kernels_generic,
};
enum { TABLES = sizeof tables / sizeof *tables };

static int runnable(const struct mc_kernels *k) {
#if defined(__x86_64__)
	int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
	int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
	if (k == &mc_kernels_avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
	if (k == &mc_kernels_avx512) return avx512;
	if (k == &mc_kernels_avx2) return avx2;
#endif
	return k == &mc_kernels_generic;
}

const struct mc_kernels *mc_kern_named(const char *name) {
	for (int i = 0; i < TABLES; i++)
		if (!strcmp(tables[i]->name, name)) return runnable(tables[i]) ? tables[i] : NULL;
	return NULL;
}

static const struct mc_kernels *_Atomic chosen;

const struct mc_kernels *mc_kern(void) {
	const struct mc_kernels *k = atomic_load_explicit(&chosen, memory_order_acquire);
	if (k) return k;
	const char *name = getenv("MARGO_CPU_ISA");
	k = name ? mc_kern_named(name) : NULL;
	for (int i = 0; !k; i++)
		if (runnable(tables[i])) k = tables[i];
	atomic_store_explicit(&chosen, k, memory_order_release);
	return k;
}

void mc_kern_force(const struct mc_kernels *k) { atomic_store(&chosen, k); }
