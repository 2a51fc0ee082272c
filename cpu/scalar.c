// scalar.c: ops on few elements, where vectors would not pay: random draws, the
// reverse step of diffusion, timestep embeddings, patches. Their arithmetic is
// float64, rounded to float32 at the end.
#include <math.h>

#include "ops.h"

// shared runs fn on nt workers, on the calling thread alone if it is one.
static int shared(mc_fn fn, void *ctx, int nt, int64_t elems, int64_t worth) {
	nt = (int)mc_max(1, mc_min(nt, elems / worth));
	if (nt > 1) return mc_parallel(nt, 0, fn, ctx);
	struct mc_worker w = {.tid = 0, .nt = 1};
	fn(&w, ctx);
	return MC_OK;
}

// ---- random draws ------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011), as engine.Philox.
void mc_philox(uint32_t c[4], uint64_t key) {
	uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
	for (int i = 0; i < 10; i++) {
		uint64_t p0 = (uint64_t)0xD2511F53 * c[0], p1 = (uint64_t)0xCD9E8D57 * c[2];
		uint32_t c0 = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c2 = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
		c[0] = c0, c[1] = (uint32_t)p1, c[2] = c2, c[3] = (uint32_t)p0;
		k0 += 0x9E3779B9, k1 += 0xBB67AE85;
	}
}

double mc_uniform(uint32_t w) { return ((double)(w >> 8) + 0.5) / (1 << 24); }

void mc_normals(float *y, int64_t c0, int64_t c, const struct mc_rng *rng, int32_t token, int32_t image) {
	for (int64_t e = 0; e < c; e += 4) {
		uint32_t w[4] = {(uint32_t)((c0 + e) / 4), rng->purpose << 24 | (rng->step & 0xffffff), (uint32_t)token, (uint32_t)image};
		mc_philox(w, rng->seed);
		double v[4];
		for (int i = 0; i < 4; i += 2) {
			double radius = sqrt(-2 * log(mc_uniform(w[i]))), angle = 2 * M_PI * mc_uniform(w[i + 1]);
			v[i] = radius * cos(angle);
			v[i + 1] = radius * sin(angle);
		}
		for (int64_t i = e; i < mc_min(e + 4, c); i++) y[i] = (float)v[i - e];
	}
}

static float *row(const struct mc_mat *t, int64_t r) { return t->p ? (float *)t->p + r * t->ld : NULL; }

static void normal(struct mc_worker *w, void *ctx) {
	const struct mc_normal *a = ctx;
	int64_t lo, hi;
	mc_share(w, a->m, 1, &lo, &hi);
	for (int64_t r = lo; r < hi; r++) mc_normals(row(&a->y, r), 0, a->c, &a->rng, a->ids[2 * r], a->ids[2 * r + 1]);
}

int mc_normal_run(struct mc_normal *a, int nt) { return shared(normal, a, nt, a->m * a->c, 512); }

// ---- reverse step --------------------------------------------------------------

void mc_step_rows(const struct mc_step *a, int64_t lo, int64_t hi) {
	for (int64_t r = lo; r < hi; r++) {
		const float *x = row(&a->x, r), *eps = row(&a->out, r), *v = eps + a->c;
		const float *eps_u = a->guidance ? row(&a->out, a->n + r) : NULL, *noise = row(&a->noise, r);
		float *y = row(&a->y, r), drawn[64];
		for (int64_t c = 0; c < a->c; c++) {
			double e = eps[c];
			if (eps_u) e = eps_u[c] + (double)a->guidance[r] * (e - eps_u[c]);
			double mean = a->coef_a * x[c] - a->coef_b * e;
			if (a->last) {
				y[c] = (float)mean;
				continue;
			}
			double f = (v[c] + 1.0) / 2, logvar = f * a->max_log + (1 - f) * a->min_log;
			double delta = noise ? noise[c] : 0;
			if (!noise) {
				if (c % 64 == 0) // drawn afresh for every 64 channels
					mc_normals(drawn, c, mc_min(64, a->c - c), &a->rng, a->ids[2 * r], a->ids[2 * r + 1]);
				delta = drawn[c % 64];
			}
			y[c] = (float)(mean + exp(logvar / 2) * a->temperature * delta);
		}
	}
}

static void step(struct mc_worker *w, void *ctx) {
	const struct mc_step *a = ctx;
	int64_t lo, hi;
	mc_share(w, a->n, 1, &lo, &hi);
	mc_step_rows(a, lo, hi);
}

int mc_step_run(struct mc_step *a, int nt) { return shared(step, a, nt, a->n * a->c, 512); }

// ---- timestep embedding ----------------------------------------------------------

static void embed(struct mc_worker *w, void *ctx) {
	const struct mc_embed *a = ctx;
	int64_t lo, hi, half = a->dim / 2;
	mc_share(w, a->m, 1, &lo, &hi);
	for (int64_t j = 0; j < half; j++) {
		double f = exp(-log(a->max_period) * (double)j / (double)half);
		for (int64_t r = lo; r < hi; r++) {
			row(&a->y, r)[j] = (float)cos(a->t[r] * f);
			row(&a->y, r)[half + j] = (float)sin(a->t[r] * f);
		}
	}
}

int mc_embed_run(struct mc_embed *a, int nt) { return shared(embed, a, nt, a->m * a->dim, 512); }

// ---- patches -----------------------------------------------------------------------

static void patchify(struct mc_worker *w, void *ctx) {
	const struct mc_patchify *a = ctx;
	int64_t lo, hi, p = a->p, gh = a->h / p, gw = a->w / p;
	mc_share(w, a->n * gh * gw, 1, &lo, &hi);
	for (int64_t t = lo; t < hi; t++) {
		int64_t image = t / (gh * gw), y0 = t / gw % gh * p, x0 = t % gw * p;
		float *token = row(&a->y, t);
		for (int64_t py = 0; py < p; py++)
			for (int64_t px = 0; px < p; px++) {
				float *pixel = row(&a->x, (image * a->h + y0 + py) * a->w + x0 + px);
				for (int64_t c = 0; c < a->c; c++) {
					float *e = token + (c * p + py) * p + px;
					if (a->inverse) pixel[c] = *e;
					else *e = pixel[c];
				}
			}
	}
}

int mc_patchify_run(struct mc_patchify *a, int nt) { return shared(patchify, a, nt, a->n * a->h * a->w * a->c, 1 << 14); }
