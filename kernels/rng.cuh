// rng.cuh: uniform and normal draws as engine/rng.go defines them, in f32.
//
// A word w of Philox stands for u = (⌊w/2^8⌋ + ½)·2^-24 in (0,1), a number of 25
// bits. f32 holds 24: 1 − 2^-25 would become 1 and its logarithm 0. Half of the
// words need no rounding at all: below ½, u = (2n+1)·2^-25 is exact, above it
// 1 − u is. So ln u = log1p(−(1−u)) there, and since 2u − 2 is the same angle as 2u,
// sin and cos of 2πu = π(2u) are those of −2(1−u). What remains is the error of log,
// sqrt and sincospi, about 1e-7 of the result each.
#pragma once

#include <math.h>

#include "margo.cuh"

// Draw names the draws of an op: margo_rng and the ids of one row.
struct Draw {
	uint64_t seed;
	uint32_t purpose, step, token, image;
};

// half_turn gives 2u, or 2u − 2 where that is exact.
MARGO_DEVICE float half_turn(uint32_t w) {
	uint32_t n = w >> 8;
	if (n < 1u << 23) return float(2 * n + 1) * 0x1p-24f;
	return -float(2 * (0xffffffu - n) + 1) * 0x1p-24f;
}

// log_uniform is ln u.
MARGO_DEVICE float log_uniform(uint32_t w) {
	float h = half_turn(w);
	return h > 0 ? logf(0.5f * h) : log1pf(0.5f * h);
}

// sin_cos_pi: sin πx and cos πx for |x| ≤ 2.
MARGO_DEVICE void sin_cos_pi(float x, float &s, float &c) {
#ifdef __CUDACC__
	sincospif(x, &s, &c);
#else
	double a = 3.14159265358979323846 * double(x);
	s = float(sin(a)), c = float(cos(a));
#endif
}

// box_muller makes two normals of two words: √(−2 ln u₁)·cos 2πu₂ and ·sin 2πu₂.
MARGO_DEVICE void box_muller(uint32_t w1, uint32_t w2, float &n0, float &n1) {
	float radius = sqrtf(-2.0f * log_uniform(w1)), s, c;
	sin_cos_pi(half_turn(w2), s, c);
	n0 = radius * c, n1 = radius * s;
}

// normal4 draws elements 4·group … 4·group+3 of a row.
MARGO_DEVICE void normal4(const Draw &d, uint32_t group, float (&out)[4]) {
	Words v = philox(group, d.purpose << 24 | (d.step & 0xffffffu), d.token, d.image, d.seed);
	box_muller(v.w[0], v.w[1], out[0], out[1]);
	box_muller(v.w[2], v.w[3], out[2], out[3]);
}

// normal_at draws one element: engine.NormalAt.
MARGO_DEVICE float normal_at(const Draw &d, uint32_t element) {
	Words v = philox(element / 4, d.purpose << 24 | (d.step & 0xffffffu), d.token, d.image, d.seed);
	bool upper = element & 2; // selects, no indexing: the words stay in registers
	float a, b;
	box_muller(upper ? v.w[2] : v.w[0], upper ? v.w[3] : v.w[1], a, b);
	return element & 1 ? b : a;
}
