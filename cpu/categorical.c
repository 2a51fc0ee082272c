// categorical.c: one category for each row of logits, as engine.CategoricalArgs.
// The arithmetic is float64 in the order of the oracle's (engine/ref), so that
// the categories are the same.
#include <math.h>
#include <stdlib.h>

#include "ops.h"

static double draw(const struct mc_categorical *a, const int32_t *id, int64_t element) {
	uint32_t w[4] = {(uint32_t)(element / 4), a->rng.purpose << 24 | (a->rng.step & 0xffffff), (uint32_t)id[0], (uint32_t)id[1]};
	mc_philox(w, a->rng.seed);
	return mc_uniform(w[element % 4]);
}

// gumbel is the argmax of l_k + g_k over l_k >= least; four categories share a
// block of the generator.
static int64_t gumbel(const struct mc_categorical *a, const int32_t *id, const double *l, double least) {
	int64_t best = 0;
	double most = -INFINITY;
	for (int64_t k = 0; k < a->k; k += 4) {
		uint32_t w[4] = {(uint32_t)(k / 4), a->rng.purpose << 24 | (a->rng.step & 0xffffff), (uint32_t)id[0], (uint32_t)id[1]};
		int drawn = 0;
		for (int64_t j = k; j < mc_min(k + 4, a->k); j++) {
			if (l[j] < least || l[j] == -INFINITY) continue;
			if (!drawn) mc_philox(w, a->rng.seed), drawn = 1;
			double g = l[j] - log(-log(mc_uniform(w[j - k])));
			if (g > most) most = g, best = j;
		}
	}
	return best;
}

static int64_t inverse(const struct mc_categorical *a, const int32_t *id, const double *l, double least, double top) {
	double sum = 0, part = 0;
	for (int64_t k = 0; k < a->k; k++)
		if (l[k] >= least) sum += exp(l[k] - top);
	double u = draw(a, id, 0) * sum;
	for (int64_t k = 0; k < a->k; k++) {
		if (l[k] >= least) part += exp(l[k] - top);
		if (part > u) return k;
	}
	return a->k - 1; // not reached: u < sum
}

static int descending(const void *x, const void *y) {
	double a = *(const double *)x, b = *(const double *)y;
	return (a < b) - (a > b);
}

// least_kept is the smallest logit that top-k and top-p let stay; v is n logits
// that get sorted.
static double least_kept(const struct mc_categorical *a, double *v) {
	int64_t n = a->k;
	qsort(v, (size_t)n, sizeof *v, descending);
	double least = a->top_k > 0 && a->top_k < n ? v[a->top_k - 1] : v[n - 1];
	if (a->top_p == 1) return least;
	double sum = 0, likelier = 0, group = 0;
	for (int64_t i = 0; i < n && v[i] >= least; i++) sum += exp(v[i] - v[0]);
	for (int64_t i = 0; i < n; i++) {
		if (i > 0 && v[i] < v[i - 1]) {
			likelier += group;
			group = 0;
			if (v[i] < least || likelier >= (double)a->top_p * sum) return v[i - 1];
		}
		group += exp(v[i] - v[0]);
	}
	return least;
}

// row draws for row r; l and v have room for k numbers each.
static void row(const struct mc_categorical *a, int64_t r, double *l, double *v) {
	const float *c = (const float *)a->logits.p + r * a->logits.ld;
	const float *u = a->guidance ? (const float *)a->logits.p + (a->n + r) * a->logits.ld : NULL;
	double top = -INFINITY;
	int64_t best = 0;
	int ok = 1;
	for (int64_t k = 0; k < a->k; k++) {
		l[k] = c[k];
		if (u) l[k] = u[k] + (double)a->guidance[r] * (l[k] - u[k]);
		ok &= l[k] < INFINITY; // neither NaN nor infinite
		if (l[k] > top) top = l[k], best = k;
	}
	ok &= top > -INFINITY;
	if (ok && a->temperature > 0) {
		double t = a->temperature, least = -INFINITY;
		for (int64_t k = 0; k < a->k; k++) v[k] = l[k] / t;
		if ((a->top_k > 0 && a->top_k < a->k) || a->top_p < 1) {
			double *sorted = v + a->k;
			for (int64_t k = 0; k < a->k; k++) sorted[k] = v[k];
			least = least_kept(a, sorted);
		}
		const int32_t *id = a->ids + 2 * r;
		best = a->inverse ? inverse(a, id, v, least, top / t) : gumbel(a, id, v, least);
	}
	a->y[r] = (int32_t)(r * a->stride + (ok ? best : 0));
	if (!a->log_prob) return;
	double sum = 0;
	for (int64_t k = 0; ok && k < a->k; k++) sum += exp(l[k] - top);
	a->log_prob[r] = ok ? (float)(l[best] - (top + log(sum))) : NAN;
}

static void categorical(struct mc_worker *w, void *ctx) {
	const struct mc_categorical *a = ctx;
	double *l = w->scratch;
	for (int64_t r = mc_take(w); r < a->n; r = mc_take(w)) row(a, r, l, l + a->k);
}

int mc_categorical_run(struct mc_categorical *a, int nt) {
	if (a->n == 0) return MC_OK;
	nt = (int)mc_max(1, mc_min(mc_min(nt, a->n), a->n * a->k / 1024));
	return mc_parallel_take(nt, (size_t)a->k * 3 * sizeof(double), categorical, a);
}
