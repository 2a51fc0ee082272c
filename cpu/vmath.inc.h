// vmath.inc.h: elementary functions on vectors. NaN and Inf go through as the
// formulas say. Polynomials and rationals were fitted in 40-digit arithmetic
// (minimax by Lawson's iteration); the errors named are those of the fit.

// v_exp is eˣ: x = n·ln2 + r with |r| ≤ ln2/2, e^r = 1 + r + r²·p(r), fit 3.1e-9. Without
// AVX-512 results below 2^-126 are 0 and those above 2^127.5 Inf.
V_INLINE vf v_exp(vf x) {
#if defined(MC_ISA_AVX512)
	x = v_min(v_set1(89.0f), v_max(v_set1(-104.0f), x)); // beyond: Inf and 0; keeps NaN
#endif
	vf magic = v_set1(12582912.0f); // 1.5·2^23: adding it rounds to an integer
	vf t = v_fma(x, v_set1(0x1.715476p+0f), magic), n = t - magic;
	vf r = v_fnma(n, v_set1(0x1.62e4p-1f), x); // ln2 in two parts, n·head is exact
	r = v_fnma(n, v_set1(0x1.7f7d1cp-20f), r);
	vf p = v_set1(0x1.6a2444p-10f);
	p = v_fma(p, r, v_set1(0x1.1239d6p-7f));
	p = v_fma(p, r, v_set1(0x1.5558f2p-5f));
	p = v_fma(p, r, v_set1(0x1.555492p-3f));
	p = v_fma(p, r, v_set1(0x1.fffffcp-2f));
	p = v_fma(p, r * r, r) + v_set1(1.0f);
#if defined(MC_ISA_AVX512)
	return v_ldexp(p, n);
#else
	// n lies in the low bits of t; 2ⁿ is finite for the x that are not replaced, and a
	// product lets a NaN of any payload through.
	p = p * v_float(v_addi(v_shl(v_bits(t), 23), v_set1i(127 << 23)));
	p = v_sel(v_lt(x, v_set1(-0x1.5d589ep+6f)), v_zero(), p);
	return v_sel(v_lt(v_set1(0x1.61814ap+6f), x), v_set1(__builtin_inff()), p);
#endif
}

// v_silu is x·σ(x) = x / (1 + e^-x).
V_INLINE vf v_silu(vf x) { return x / (v_set1(1.0f) + v_exp(v_zero() - x)); }

// v_erf_sqrt2 is erf(x/√2) = x·P(x²)/Q(x²) for |x| ≤ 5.6, fit 2.2e-8 relative,
// and ±1 beyond.
V_INLINE vf v_erf_sqrt2(vf x) {
	vf u = x * x;
	vf p = v_set1(4.45942583006e-8f), q = v_set1(1.17962156353e-6f);
	p = v_fma(p, u, v_set1(1.25788395799e-5f));
	q = v_fma(q, u, v_set1(7.33373421051e-5f));
	p = v_fma(p, u, v_set1(3.37823993572e-4f));
	q = v_fma(q, u, v_set1(1.88539737149e-3f));
	p = v_fma(p, u, v_set1(9.35449300137e-3f));
	q = v_fma(q, u, v_set1(2.86766983538e-2f));
	p = v_fma(p, u, v_set1(6.78552115499e-2f));
	q = v_fma(q, u, v_set1(2.5171022415e-1f));
	p = v_fma(p, u, v_set1(7.9788454369e-1f));
	q = v_fma(q, u, v_set1(1.0f));
	vf sign = v_float(v_or(v_and(v_bits(x), v_set1i((int32_t)0x80000000u)), v_bits(v_set1(1.0f))));
	return v_sel(v_lt(v_set1(5.6f), v_abs(x)), sign, x * p / q);
}

// v_gelu is x·Φ(x) = x/2·(1 + erf(x/√2)).
V_INLINE vf v_gelu(vf x) {
	vf h = x * v_set1(0.5f);
	return v_fma(h, v_erf_sqrt2(x), h);
}

// v_gelu_tanh is x/2·(1 + tanh(u)) = x·σ(2u), u = √(2/π)·(x + 0.044715·x³).
V_INLINE vf v_gelu_tanh(vf x) {
	vf u = x * v_fma(x * x, v_set1(-2 * 0.0356774081f), v_set1(-2 * 0.7978845608f)); // −2u
	return x / (v_set1(1.0f) + v_exp(u));
}

V_INLINE vf v_act(const int act, vf x) {
	switch (act) {
	case MC_GELU_ERF: return v_gelu(x);
	case MC_GELU_TANH: return v_gelu_tanh(x);
	case MC_SILU: return v_silu(x);
	}
	return x;
}
