// pointwise.cu: cast, copy, fill, gated_add, rows, patchify, timestep_embedding.
//
// Mapping: a block of 256 threads covers bx column groups of four times by rows (bx the
// least power of two that covers a row, at most 256); threads step over the columns of
// their row, so no index is divided. gridDim.x are blocks of rows, gridDim.y shares
// long rows. Where every base and row is aligned to four elements, a thread moves 16 bytes (f32)
// or 8 (bf16) at once; elsewhere element by element, with the same arithmetic and so
// the same bits. No shared memory.
//
// All are bound by memory: bytes read + bytes written over the bandwidth.
// ptxas (sm_80, sm_90): at most 40 registers, no spills.
#include "act.cuh"
#include "plugin.h"
#include "rng.cuh"

namespace {

struct Shape { // of a launch over rows × cols
	dim3 grid, block;
};

Shape over(int64_t rows, int64_t cols) {
	int64_t groups = ceil_div(cols, 4);
	unsigned bx = 1;
	while (bx < 256 && bx < groups) bx *= 2;
	unsigned by = 256 / bx;
	int64_t gy = ceil_div(groups, int64_t(bx) * 4); // four steps each, when rows are long
	return {dim3(unsigned(rows <= 0 || cols <= 0 ? 0 : ceil_div(rows, by)), unsigned(gy < 1 ? 1 : gy > 65535 ? 65535 : gy)), dim3(bx, by)};
}

MARGO_DEVICE int64_t this_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
MARGO_DEVICE int64_t first_col() { return 4 * (int64_t(blockIdx.y) * blockDim.x + threadIdx.x); }
MARGO_DEVICE int64_t col_step() { return 4 * int64_t(gridDim.y) * blockDim.x; }

// vec4 says whether every row of m starts at a multiple of four elements and holds whole fours.
bool vec4(const margo_mat &m) { return m.p == 0 || (m.cols % 4 == 0 && aligned(m, m.dtype == MARGO_BF16 ? 8 : 16)); }

// with_vec calls f with std::true_type-like constants for the vector and the scalar path.
template <bool B> struct Const {
	static constexpr bool value = B;
};
template <class F> margo_status with_vec(bool vec, F f) { return vec ? f(Const<true>{}) : f(Const<false>{}); }

template <class T> struct Type {
	using type = T;
};
template <class F> margo_status with_type(int dtype, F f) { return dtype == MARGO_BF16 ? f(Type<bf16>{}) : f(Type<float>{}); }

// ---- cast ----

template <class X, class Y, bool VEC>
__global__ void __launch_bounds__(256) cast_kernel(const X *x, int64_t ldx, Y *y, int64_t ldy, int64_t rows, int64_t cols, float scale, float shift) {
	int64_t r = this_row();
	if (r >= rows) return;
	for (int64_t c = first_col(); c < cols; c += col_step()) {
		float v[4];
		load4<VEC>(v, x + r * ldx + c, cols - c);
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] = fmaf(v[i], scale, shift);
		store4<VEC>(y + r * ldy + c, v, cols - c);
	}
}

// ---- copy, fill ----

// T is uint32_t or uint16_t: bits are moved, not numbers.
template <class T, bool VEC> __global__ void __launch_bounds__(256) copy_kernel(const T *x, int64_t ldx, T *y, int64_t ldy, int64_t rows, int64_t cols) {
	int64_t r = this_row();
	if (r >= rows) return;
	for (int64_t c = first_col(); c < cols; c += col_step()) {
		const T *from = x + r * ldx + c;
		T *to = y + r * ldy + c;
		if constexpr (VEC && sizeof(T) == 4) {
			*reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
		} else if constexpr (VEC) {
			*reinterpret_cast<uint2 *>(to) = *reinterpret_cast<const uint2 *>(from);
		} else {
			for (int i = 0; i < 4 && c + i < cols; i++) to[i] = from[i];
		}
	}
}

template <class T> __global__ void __launch_bounds__(256) fill_kernel(T *y, int64_t ldy, int64_t rows, int64_t cols, float number) {
	T v = from_f32<T>(number);
	int64_t r = this_row();
	if (r >= rows) return;
	for (int64_t c = first_col(); c < cols; c += col_step())
		for (int i = 0; i < 4 && c + i < cols; i++) y[r * ldy + c + i] = v;
}

// ---- gated_add ----

struct GatedAdd {
	const float *x;
	const void *h;
	const float *gate; // or null: 1
	float *y;
	int64_t ldx, ldh, ldg, ldy, rows, cols, gate_rows;
};

template <class H, bool VEC> __global__ void __launch_bounds__(256) gated_add_kernel(GatedAdd a) {
	int64_t r = this_row();
	if (r >= a.rows) return;
	const float *x = a.x + r * a.ldx;
	const H *h = static_cast<const H *>(a.h) + r * a.ldh;
	const float *gate = a.gate ? a.gate + r / a.gate_rows * a.ldg : nullptr;
	float *y = a.y + r * a.ldy;
	for (int64_t c = first_col(); c < a.cols; c += col_step()) {
		float v[4], w[4], g[4];
		load4<VEC>(v, x + c, a.cols - c);
		load4<VEC>(w, h + c, a.cols - c);
		if (gate) {
			load4<VEC>(g, gate + c, a.cols - c);
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] = fmaf(g[i], w[i], v[i]);
		} else {
#pragma unroll
			for (int i = 0; i < 4; i++) v[i] += w[i];
		}
		store4<VEC>(y + c, v, a.cols - c);
	}
}

// ---- rows ----

struct Rows {
	void *y;
	const void *a, *b;            // b may be null
	const int32_t *iy, *ia, *ib;  // or null: r itself
	int64_t ldy, lda, ldb, ny, na, nb, count, cols;
	uint32_t *error;
	int act;
};

// Bounds are checked here, where the indices are first seen; a bad row is not written.
template <class Y, class A, class B, bool VEC> __global__ void __launch_bounds__(256) rows_kernel(Rows p) {
	int64_t r = this_row();
	if (r >= p.count) return;
	int64_t iy = p.iy ? p.iy[r] : r, ia = p.ia ? p.ia[r] : r, ib = p.b ? p.ib ? p.ib[r] : r : -1;
	if (iy < 0 || iy >= p.ny || ia >= p.na || (p.b && ib >= p.nb)) {
		if (blockIdx.y == 0 && threadIdx.x == 0) atomicMax(p.error, 1 + uint32_t(r < (1 << 30) ? r : 1 << 30));
		return;
	}
	const A *a = static_cast<const A *>(p.a) + (ia < 0 ? 0 : ia * p.lda);
	const B *b = static_cast<const B *>(p.b) + (ib < 0 ? 0 : ib * p.ldb);
	Y *y = static_cast<Y *>(p.y) + iy * p.ldy;
	for (int64_t c = first_col(); c < p.cols; c += col_step()) {
		float v[4] = {}, w[4] = {};
		if (ia >= 0) load4<VEC>(v, a + c, p.cols - c);
		if (ib >= 0) load4<VEC>(w, b + c, p.cols - c);
#pragma unroll
		for (int i = 0; i < 4; i++) v[i] = activate(p.act, v[i] + w[i]);
		store4<VEC>(y + c, v, p.cols - c);
	}
}

// ---- timestep_embedding ----

// The angle t·f_j goes up to about 1000 radians, where f32 has 6e-5 left: so f_j and the number of
// turns are computed in double, and sin and cos, in f32, of what exceeds whole turns.
__global__ void __launch_bounds__(256) timestep_embedding_kernel(const float *t, float *y, int64_t ldy, int64_t rows, int64_t half, double log_period) {
	int64_t r = this_row();
	if (r >= rows) return;
	for (int64_t j = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; j < half; j += int64_t(gridDim.y) * blockDim.x) {
		double turns = double(t[r]) * exp(-log_period * double(j) / double(half)) * 0.15915494309189533577;
		float s, c;
		sin_cos_pi(float(2 * (turns - rint(turns))), s, c);
		y[r * ldy + j] = c, y[r * ldy + half + j] = s;
	}
}

// ---- patchify ----

struct Patchify {
	float *x, *y;
	int64_t ldx, ldy, pixels; // ld: elements between pixels of x, between tokens of y
	int h, w, c, p;
};

// A row is a pixel; threads step over its channels. Row and column of the patch grid come from
// divisions once per pixel.
template <bool INVERSE> __global__ void __launch_bounds__(256) patchify_kernel(Patchify a) {
	int64_t r = this_row();
	if (r >= a.pixels) return;
	int64_t line = r / a.w, image = line / a.h;
	int px = int(r % a.w), py = int(line % a.h);
	int64_t token = (image * (a.h / a.p) + py / a.p) * (a.w / a.p) + px / a.p;
	float *x = a.x + r * a.ldx, *y = a.y + token * a.ldy + (py % a.p) * a.p + px % a.p;
	for (int64_t c = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; c < a.c; c += int64_t(gridDim.y) * blockDim.x) {
		if (INVERSE) x[c] = y[c * a.p * a.p];
		else y[c * a.p * a.p] = x[c];
	}
}

} // namespace

margo_status op_cast(margo_stream *st, const margo_cast_args *a) {
	Shape s = over(a->y.rows, a->y.cols);
	return with_vec(vec4(a->x) && vec4(a->y), [&](auto vec) {
		return with_type(a->x.dtype, [&](auto tx) {
			return with_type(a->y.dtype, [&](auto ty) {
				using X = typename decltype(tx)::type;
				using Y = typename decltype(ty)::type;
				return run(st, "cast", cast_kernel<X, Y, decltype(vec)::value>, s.grid, s.block, 0, ptr<const X>(a->x), a->x.ld, ptr<Y>(a->y),
				           a->y.ld, a->y.rows, a->y.cols, a->scale, a->shift);
			});
		});
	});
}

margo_status op_copy(margo_stream *st, const margo_mat *dst, const margo_mat *src) {
	if (dst->dtype != src->dtype || dst->rows != src->rows || dst->cols != src->cols)
		return fail(st->ctx, MARGO_INVALID, "copy: %lld x %lld of dtype %d into %lld x %lld of dtype %d", (long long)src->rows, (long long)src->cols,
		            src->dtype, (long long)dst->rows, (long long)dst->cols, dst->dtype);
	margo_mat x = *src, y = *dst;
	if (x.ld == x.cols && y.ld == y.cols) { // one long row: any alignment but that of the ends
		x.cols = y.cols = x.rows * x.cols, x.rows = y.rows = x.cols > 0;
		x.ld = y.ld = x.cols;
	}
	Shape s = over(y.rows, y.cols);
	return with_vec(vec4(x) && vec4(y), [&](auto vec) {
		constexpr bool VEC = decltype(vec)::value;
		if (y.dtype == MARGO_BF16)
			return run(st, "copy", copy_kernel<uint16_t, VEC>, s.grid, s.block, 0, ptr<const uint16_t>(x), x.ld, ptr<uint16_t>(y), y.ld, y.rows, y.cols);
		return run(st, "copy", copy_kernel<uint32_t, VEC>, s.grid, s.block, 0, ptr<const uint32_t>(x), x.ld, ptr<uint32_t>(y), y.ld, y.rows, y.cols);
	});
}

margo_status op_fill(margo_stream *st, const margo_mat *dst, float v) {
	Shape s = over(dst->rows, dst->cols);
	if (dst->dtype == MARGO_BF16)
		return run(st, "fill", fill_kernel<bf16>, s.grid, s.block, 0, ptr<bf16>(*dst), dst->ld, dst->rows, dst->cols, v);
	if (dst->dtype == MARGO_I32)
		return run(st, "fill", fill_kernel<int32_t>, s.grid, s.block, 0, ptr<int32_t>(*dst), dst->ld, dst->rows, dst->cols, v);
	return run(st, "fill", fill_kernel<float>, s.grid, s.block, 0, ptr<float>(*dst), dst->ld, dst->rows, dst->cols, v);
}

margo_status op_gated_add(margo_stream *st, const margo_gated_add_args *a) {
	Shape s = over(a->y.rows, a->y.cols);
	GatedAdd g{ptr<float>(a->x), ptr<void>(a->h), ptr<float>(a->gate), ptr<float>(a->y), a->x.ld, a->h.ld, a->gate.ld, a->y.ld,
	           a->y.rows, a->y.cols, a->gate.p ? a->gate_rows : 1};
	return with_vec(vec4(a->x) && vec4(a->h) && vec4(a->gate) && vec4(a->y), [&](auto vec) {
		return with_type(a->h.dtype, [&](auto th) {
			return run(st, "gated_add", gated_add_kernel<typename decltype(th)::type, decltype(vec)::value>, s.grid, s.block, 0, g);
		});
	});
}

margo_status op_rows(margo_stream *st, const margo_rows_args *a) {
	Shape s = over(a->count, a->y.cols);
	Rows p{ptr<void>(a->y), ptr<void>(a->a), ptr<void>(a->b), ptr<int32_t>(a->iy), ptr<int32_t>(a->ia), ptr<int32_t>(a->ib), a->y.ld, a->a.ld, a->b.ld,
	       a->y.rows, a->a.rows, a->b.rows, a->count, a->y.cols, st->ctx->device_error, a->act};
	return with_vec(vec4(a->y) && vec4(a->a) && vec4(a->b), [&](auto vec) {
		return with_type(a->y.dtype, [&](auto ty) {
			return with_type(a->a.dtype, [&](auto ta) {
				return with_type(a->b.p ? a->b.dtype : MARGO_F32, [&](auto tb) {
					return run(st, "rows", rows_kernel<typename decltype(ty)::type, typename decltype(ta)::type, typename decltype(tb)::type, decltype(vec)::value>,
					           s.grid, s.block, 0, p);
				});
			});
		});
	});
}

margo_status op_timestep_embedding(margo_stream *st, const margo_timestep_args *a) {
	int64_t half = a->y.cols / 2;
	Shape s = over(a->y.rows, half * 4);
	return run(st, "timestep_embedding", timestep_embedding_kernel, s.grid, s.block, 0, ptr<const float>(a->t), ptr<float>(a->y), a->y.ld, a->y.rows, half,
	           log(double(a->max_period)));
}

margo_status op_patchify(margo_stream *st, const margo_patchify_args *a) {
	int64_t pixels = a->n * a->h * a->w;
	Shape s = over(pixels, a->c * 4);
	Patchify p{ptr<float>(a->x), ptr<float>(a->y), a->x.ld, a->y.ld, pixels, int(a->h), int(a->w), int(a->c), int(a->p)};
	return run(st, a->inverse ? "unpatchify" : "patchify", a->inverse ? patchify_kernel<true> : patchify_kernel<false>, s.grid, s.block, 0, p);
}
