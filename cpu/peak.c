// peak.c: measured limits of the machine, for comparison with kernels.
#include <string.h>
#include <time.h>

#include "core.h"
#include "peak.h"

struct probe {
	int dtype;
	int64_t iters, bytes; // of each worker
	const char *data;
	double limit;      // seconds
	double done[1024]; // work of each worker, or its rate
};

static double seconds(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void flops_worker(struct mc_worker *w, void *ctx) {
	struct probe *p = ctx;
	p->done[w->tid] = mc_kern()->peak(p->dtype, p->iters);
}

static void stream_worker(struct mc_worker *w, void *ctx) {
	struct probe *p = ctx;
	volatile float keep = mc_kern()->stream((const float *)(p->data + w->tid * p->bytes), p->bytes);
	(void)keep;
	p->done[w->tid] = (double)p->bytes;
}

// mean_worker does rounds for p->limit seconds, whatever the others do.
static void mean_worker(struct mc_worker *w, void *ctx) {
	struct probe *p = ctx;
	double start = seconds(), work = 0, t;
	do {
		work += mc_kern()->peak(p->dtype, p->iters);
		t = seconds() - start;
	} while (t < p->limit);
	p->done[w->tid] = work / t;
}

static int threads(int nt) { return nt < 1 ? 1 : nt > 1024 ? 1024 : nt; }

// rate is the best of the rounds of a tenth of a second, in units of work per second;
// 0 without memory.
static double rate(mc_fn fn, struct probe *p, int nt) {
	double best = 0, spent = 0;
	do {
		memset(p->done, 0, sizeof p->done); // there may be fewer workers than nt
		double t = seconds(), work = 0;
		if (mc_parallel(nt, 0, fn, p)) return 0;
		t = seconds() - t;
		for (int i = 0; i < nt; i++) work += p->done[i];
		if (work / t > best) best = work / t;
		spent += t;
	} while (spent < 0.1);
	return best;
}

double mc_peak_flops(int dtype, int nt) {
	struct probe p = {.dtype = dtype, .iters = 200000};
	return rate(flops_worker, &p, threads(nt));
}

double mc_peak_mean(int dtype, int nt, double limit) {
	struct probe p = {.dtype = dtype, .iters = 20000, .limit = limit};
	double sum = 0;
	if (mc_parallel(threads(nt), 0, mean_worker, &p)) return 0;
	for (int i = 0; i < threads(nt); i++) sum += p.done[i];
	return sum;
}

double mc_peak_stream(int64_t bytes, int nt) {
	nt = threads(nt);
	struct probe p = {.bytes = bytes / nt / 4096 * 4096};
	char *data = mc_alloc((size_t)bytes);
	if (!data) return 0;
	for (int64_t i = 0; i < bytes; i += 4096) data[i] = 0; // map the pages
	p.data = data;
	double best = rate(stream_worker, &p, nt);
	mc_free(data);
	return best;
}
