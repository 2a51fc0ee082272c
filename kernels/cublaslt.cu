// cublaslt.cu: y = residual + x·wᵀ + bias by cuBLASLt, which is opened at run time. Host code only; op_gemm asks it
// first once cublaslt_open has turned it on, and does itself what it leaves.
//
// Served are bf16 × bf16 with y in F32 or BF16 and F32 × F32 with y in F32, without activation and gate, with
// K > 0 and all rows at multiples of 16 bytes; of these what the library's heuristics accept (a BF16 y with an F32 bias
// they should not: a bias has the type of y). Sums are F32 without TF32 and without splitting K, so that runs repeat bit for bit; but the algorithm, and with it
// the order of the sums, follows from the shape, the number of rows included: a row's bits depend on the batch.
//
// In the library's column-major terms D[N, M] = op(A)·B, A = w (K × N, transposed), B = x (K × M), C = residual.
//
// The choice for a shape is made once and kept in the context: the heuristics' first, or, if tuning was asked for,
// the fastest of their candidates, or what cublaslt_store has brought from an earlier process. A graph is never given any of it:
// it may outlive the stream whose workspace it would hold, or run beside it; and a library that loads its code
// lazily may spoil a capture. Our kernels serve while a stream captures.
#include <dlfcn.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <tuple>

#include "cublaslt.h"
#include "plugin.h"

namespace {

constexpr int kCandidates = 8, kRepeats = 5;
constexpr uint32_t kAlign = 16;

auto shape_of(const margo_cublaslt_algo &a) {
	return std::make_tuple(a.dtype, a.y_dtype, a.bias, a.residual, a.m, a.n, a.k, a.ldx, a.ldw, a.ldr, a.ldy, a.workspace_limit);
}
using Shape = decltype(shape_of(margo_cublaslt_algo{}));

// Product is a shape's descriptors and choice.
struct Product {
	const lt::Functions *f;
	margo_cublaslt_algo chosen{};
	lt::Algo algo{};
	lt::Desc desc = nullptr;
	lt::Layout a = nullptr, b = nullptr, c = nullptr, d = nullptr;
	explicit Product(const lt::Functions *f) : f(f) {}
	Product(const Product &) = delete;
	~Product() {
		if (desc) f->MatmulDescDestroy(desc);
		for (lt::Layout l : {a, b, c, d})
			if (l) f->MatrixLayoutDestroy(l);
	}
};

struct Operands {
	const void *x, *w, *bias, *residual;
	void *y;
};

} // namespace

struct margo_cublaslt {
	lt::Functions f{};
	lt::Handle handle = nullptr;
	bool autotune = false;
	std::mutex mu; // guards what follows, and the descriptors while a product is enqueued
	std::map<Shape, std::unique_ptr<Product>> products;
	std::vector<Product *> order; // of products, as they were met
	std::map<Shape, lt::Algo> stored;
	~margo_cublaslt() {
		products.clear();
		if (handle) f.Destroy(handle);
	}
};

namespace {

// find opens the library and looks its functions up. It stays loaded: its threads may run on.
// An emulated device has a stand-in; a library that is named is looked at all the same.
margo_status find(const char *library, lt::Functions *f, margo_cublaslt_info *out, char *err, size_t bytes) {
	const char *names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
	if (library && !*library) library = nullptr;
	const char *name = library;
	if (!library && gpu::own_cublaslt(f)) {
		name = "the emulator's stand-in";
	} else {
		void *h = nullptr;
		if (library) {
			h = dlopen(library, RTLD_NOW | RTLD_LOCAL);
		} else {
			for (const char *n : names)
				if (!h && (h = dlopen(n, RTLD_NOW | RTLD_LOCAL))) name = n;
		}
		if (!h) {
			const char *why = dlerror();
			if (library)
				snprintf(err, bytes, "cuBLASLt: %s", why ? why : library);
			else
				snprintf(err, bytes, "no cuBLASLt: neither %s nor %s was found (%s); MARGO_CUBLASLT_LIB names the file", names[0], names[1], why ? why : "");
			return MARGO_UNSUPPORTED;
		}
		const char *missing = nullptr;
#define MARGO_F(result, function, arguments)                                                       \
	f->function = reinterpret_cast<decltype(f->function)>(dlsym(h, "cublasLt" #function));          \
	if (!f->function && !missing) missing = "cublasLt" #function;
		MARGO_CUBLASLT(MARGO_F)
#undef MARGO_F
		if (missing) {
			snprintf(err, bytes, "cuBLASLt: %s has no function %s", name, missing);
			dlclose(h);
			return MARGO_UNSUPPORTED;
		}
	}
	margo_cublaslt_info i{};
	i.size = sizeof i, i.version = f->GetVersion();
	snprintf(i.library, sizeof i.library, "%s", name);
	memcpy(out, &i, out->size < sizeof i ? out->size : sizeof i);
	if (i.version < 120000 || i.version >= 140000) { // 12 and 13 have the interface of cublaslt.h
		snprintf(err, bytes, "cuBLASLt: %s has version %" PRIu64 ", 12.0 to 13.x are known", name, i.version);
		return MARGO_UNSUPPORTED;
	}
	if (gpu::emulated && library) {
		snprintf(err, bytes, "cuBLASLt: %s cannot compute on an emulated device; its stand-in is taken when no library is named", name);
		return MARGO_UNSUPPORTED;
	}
	return MARGO_OK;
}

// lt_room makes a call of the library's once more where it found no memory, as the runtime's with_room does.
template <class F> lt::Status lt_room(margo_context *c, F &&call, uint64_t *given) {
	lt::Status s = call();
	if (s != lt::ALLOC_FAILED) return s;
	*given = pool_make_room(c);
	return call();
}

// refusal makes an error of a status that is no refusal of the shape.
margo_status refusal(margo_context *c, const margo_cublaslt *l, lt::Status s, const char *what, uint64_t given = 0) {
	if (s == lt::ALLOC_FAILED) {
		char text[128];
		snprintf(text, sizeof text, "%s: %s (%d)", what, l->f.GetStatusString(s), s);
		return pool_no_room(c, text, given);
	}
	margo_status m = s == lt::EXECUTION_FAILED || s == lt::NOT_INITIALIZED ? MARGO_DEVICE_FAULT : MARGO_INTERNAL;
	return fail(c, m, "%s: %s (%d)%s%s", what, l->f.GetStatusString(s), s, *gpu::report() ? ": " : "", gpu::report());
}

#define LT_TRY(expr, what)                                                                      \
	do {                                                                                        \
		uint64_t lt_given_ = 0;                                                                 \
		lt::Status lt_s_ = lt_room(c, [&] { return (expr); }, &lt_given_);                      \
		if (lt_s_ != lt::SUCCESS) return refusal(c, l, lt_s_, what, lt_given_);                 \
	} while (0)

// describe makes the descriptors of a shape.
margo_status describe(margo_context *c, margo_cublaslt *l, Product *p) {
	const margo_cublaslt_algo &s = p->chosen;
	const lt::Functions &f = l->f;
	const int32_t in = s.dtype == MARGO_BF16 ? lt::R_16BF : lt::R_32F, out = s.y_dtype == MARGO_BF16 ? lt::R_16BF : lt::R_32F;
	const int32_t t = lt::OP_T, n = lt::OP_N, f32 = lt::R_32F;
	LT_TRY(f.MatmulDescCreate(&p->desc, lt::COMPUTE_32F, lt::R_32F), "cublasLtMatmulDescCreate");
	LT_TRY(f.MatmulDescSetAttribute(p->desc, lt::DESC_TRANSA, &t, sizeof t), "cublasLtMatmulDescSetAttribute(TRANSA)");
	LT_TRY(f.MatmulDescSetAttribute(p->desc, lt::DESC_TRANSB, &n, sizeof n), "cublasLtMatmulDescSetAttribute(TRANSB)");
	if (s.bias) {
		// The heuristics look at the bias's address, for its alignment: it must not be better than that of later products.
		const void *bias = reinterpret_cast<const void *>(uintptr_t(kAlign));
		const uint32_t e = lt::EPILOGUE_BIAS;
		LT_TRY(f.MatmulDescSetAttribute(p->desc, lt::DESC_EPILOGUE, &e, sizeof e), "cublasLtMatmulDescSetAttribute(EPILOGUE)");
		LT_TRY(f.MatmulDescSetAttribute(p->desc, lt::DESC_BIAS_DATA_TYPE, &f32, sizeof f32), "cublasLtMatmulDescSetAttribute(BIAS_DATA_TYPE)");
		LT_TRY(f.MatmulDescSetAttribute(p->desc, lt::DESC_BIAS_POINTER, &bias, sizeof bias), "cublasLtMatmulDescSetAttribute(BIAS_POINTER)");
	}
	LT_TRY(f.MatrixLayoutCreate(&p->a, in, uint64_t(s.k), uint64_t(s.n), s.ldw), "cublasLtMatrixLayoutCreate(A)");
	LT_TRY(f.MatrixLayoutCreate(&p->b, in, uint64_t(s.k), uint64_t(s.m), s.ldx), "cublasLtMatrixLayoutCreate(B)");
	LT_TRY(f.MatrixLayoutCreate(&p->c, out, uint64_t(s.n), uint64_t(s.m), s.residual ? s.ldr : s.ldy), "cublasLtMatrixLayoutCreate(C)");
	LT_TRY(f.MatrixLayoutCreate(&p->d, out, uint64_t(s.n), uint64_t(s.m), s.ldy), "cublasLtMatrixLayoutCreate(D)");
	return MARGO_OK;
}

// candidates asks the heuristics. None, with OK: they do not support the shape.
margo_status candidates(margo_context *c, margo_cublaslt *l, Product *p, int32_t asked, std::vector<lt::Result> *out) {
	const lt::Functions &f = l->f;
	struct Owned {
		const lt::Functions &f;
		lt::Preference p = nullptr;
		~Owned() {
			if (p) f.MatmulPreferenceDestroy(p);
		}
	} pref{f};
	const uint64_t limit = p->chosen.workspace_limit;
	const uint32_t none = lt::REDUCTION_NONE;
	LT_TRY(f.MatmulPreferenceCreate(&pref.p), "cublasLtMatmulPreferenceCreate");
	LT_TRY(f.MatmulPreferenceSetAttribute(pref.p, lt::PREF_MAX_WORKSPACE_BYTES, &limit, sizeof limit), "cublasLtMatmulPreferenceSetAttribute(MAX_WORKSPACE_BYTES)");
	LT_TRY(f.MatmulPreferenceSetAttribute(pref.p, lt::PREF_REDUCTION_SCHEME_MASK, &none, sizeof none), "cublasLtMatmulPreferenceSetAttribute(REDUCTION_SCHEME_MASK)");
	for (int32_t at : {lt::PREF_MIN_ALIGNMENT_A_BYTES, lt::PREF_MIN_ALIGNMENT_B_BYTES, lt::PREF_MIN_ALIGNMENT_C_BYTES, lt::PREF_MIN_ALIGNMENT_D_BYTES})
		LT_TRY(f.MatmulPreferenceSetAttribute(pref.p, at, &kAlign, sizeof kAlign), "cublasLtMatmulPreferenceSetAttribute(MIN_ALIGNMENT)");
	lt::Result found[kCandidates];
	int32_t got = 0;
	uint64_t given = 0;
	lt::Status s = lt_room(c, [&] { return f.MatmulAlgoGetHeuristic(l->handle, p->desc, p->a, p->b, p->c, p->d, pref.p, asked, found, &got); }, &given);
	// A combination of types that the library may not know is no mistake of ours, however it is refused.
	const bool odd = p->chosen.bias && p->chosen.y_dtype == MARGO_BF16;
	if (s == lt::NOT_SUPPORTED || (odd && s == lt::INVALID_VALUE)) return MARGO_OK;
	if (s != lt::SUCCESS) return refusal(c, l, s, "cublasLtMatmulAlgoGetHeuristic", given);
	for (int32_t i = 0; i < got; i++)
		if (found[i].state == lt::SUCCESS && found[i].workspace <= limit) out->push_back(found[i]);
	return MARGO_OK;
}

void choose(Product *p, const lt::Result &r, int32_t how) {
	p->algo = r.algo;
	p->chosen.choice = how, p->chosen.workspace = r.workspace;
	memcpy(p->chosen.algo, r.algo.data, sizeof r.algo.data);
}

lt::Status multiply(margo_cublaslt *l, const Product *p, const Operands &o, const lt::Algo &algo, margo_stream *st) {
	const float one = 1, beta = o.residual ? 1 : 0;
	if (o.bias)
		if (lt::Status s = l->f.MatmulDescSetAttribute(p->desc, lt::DESC_BIAS_POINTER, &o.bias, sizeof o.bias); s != lt::SUCCESS) return s;
	return l->f.Matmul(l->handle, p->desc, &one, o.w, p->a, o.x, p->b, &beta, o.residual ? o.residual : o.y, p->c, o.y, p->d, &algo, st->cublaslt_workspace,
	                   st->cublaslt_bytes, reinterpret_cast<lt::Stream>(st->s));
}

// tune times the candidates, writing to memory of the pool's that it takes for the time: y may be the residual as well.
margo_status tune(margo_stream *st, margo_cublaslt *l, Product *p, Operands o, const std::vector<lt::Result> &found) {
	margo_context *c = st->ctx;
	struct Owned {
		margo_stream *st;
		uint64_t y = 0;
		cudaEvent_t from = nullptr, to = nullptr;
		~Owned() {
			if (from) cudaEventDestroy(from);
			if (to) cudaEventDestroy(to);
			if (!y) return;
			st->busy.store(true); // its next owner waits for the products
			pool_free(st->ctx, y);
		}
	} own{st};
	const size_t bytes = size_t(p->chosen.m) * size_t(p->chosen.ldy) * (p->chosen.y_dtype == MARGO_BF16 ? 2 : 4);
	if (margo_status s = pool_alloc(c, bytes, &own.y); s == MARGO_OUT_OF_MEMORY) { // then untimed
		choose(p, found[0], MARGO_CUBLASLT_HEURISTIC);
		return MARGO_OK;
	} else {
		MARGO_TRY(s);
	}
	MARGO_TRY(with_room(c, "making an event", [&] { return cudaEventCreate(&own.from); }));
	MARGO_TRY(with_room(c, "making an event", [&] { return cudaEventCreate(&own.to); }));
	o.y = reinterpret_cast<void *>(uintptr_t(own.y));
	float best = 0;
	for (const lt::Result &r : found) {
		if (multiply(l, p, o, r.algo, st) != lt::SUCCESS) continue; // also brings its code onto the device
		MARGO_TRY(check(c, cudaEventRecord(own.from, st->s), "recording an event"));
		for (int i = 0; i < kRepeats; i++) LT_TRY(multiply(l, p, o, r.algo, st), "cublasLtMatmul, tuning");
		MARGO_TRY(check(c, cudaEventRecord(own.to, st->s), "recording an event"));
		MARGO_TRY(wait_event(c, own.to, "cublasLtMatmul, tuning"));
		float ms = 0;
		MARGO_TRY(check(c, cudaEventElapsedTime(&ms, own.from, own.to), "reading the time between events"));
		if (p->chosen.choice == MARGO_CUBLASLT_OURS || ms < best) best = ms, choose(p, r, MARGO_CUBLASLT_TUNED);
	}
	return MARGO_OK;
}

// decide chooses for a shape that is new; the choice OURS is one as well.
margo_status decide(margo_stream *st, margo_cublaslt *l, Product *p, const Operands &o) {
	margo_context *c = st->ctx;
	MARGO_TRY(describe(c, l, p));
	if (auto it = l->stored.find(shape_of(p->chosen)); it != l->stored.end()) {
		lt::Result r{};
		if (l->f.MatmulAlgoCheck(l->handle, p->desc, p->a, p->b, p->c, p->d, &it->second, &r) == lt::SUCCESS && r.workspace <= p->chosen.workspace_limit) {
			r.algo = it->second;
			choose(p, r, MARGO_CUBLASLT_STORED);
			return MARGO_OK;
		}
	}
	std::vector<lt::Result> found;
	MARGO_TRY(candidates(c, l, p, l->autotune ? kCandidates : 1, &found));
	if (found.empty()) return MARGO_OK;
	bool quiet = st->cublaslt_bytes > 0; // nobody captures, and the stream is one of its caller's own
	{
		std::lock_guard<std::mutex> lock(c->capture_mu);
		for (const margo_stream *s : c->streams) quiet = quiet && !s->capturing;
	}
	if (l->autotune && quiet) return tune(st, l, p, o, found);
	choose(p, found[0], MARGO_CUBLASLT_HEURISTIC);
	return MARGO_OK;
}

bool overlap(const margo_mat &a, const margo_mat &b) {
	auto end = [](const margo_mat &m) { return m.p + uint64_t(((m.rows - 1) * m.ld + m.cols) * (m.dtype == MARGO_BF16 ? 2 : 4)); };
	return a.p < end(b) && b.p < end(a);
}

bool serves(const margo_stream *st, const margo_gemm_args *a) {
	const int32_t in = a->w.dtype, out = a->y.dtype;
	if (st->capturing || a->act != MARGO_IDENTITY || a->gate.p || a->y.rows == 0 || a->y.cols == 0 || a->w.cols == 0) return false;
	if (a->x.dtype != in || (in != MARGO_BF16 && in != MARGO_F32) || (out != MARGO_F32 && !(in == MARGO_BF16 && out == MARGO_BF16))) return false;
	if (a->residual.p && (out != MARGO_F32 || a->residual.dtype != MARGO_F32)) return false;
	auto rows = [](const margo_mat &m) { // also of a single row, since the library sees only the stride
		return m.p % kAlign == 0 && m.ld >= m.cols && m.ld * (m.dtype == MARGO_BF16 ? 2 : 4) % kAlign == 0;
	};
	if (!rows(a->x) || !rows(a->w) || !rows(a->y) || (a->residual.p && !rows(a->residual))) return false;
	if (a->bias.p && (a->bias.dtype != MARGO_F32 || (a->bias.p + uint64_t(a->n0) * 4) % kAlign)) return false;
	// y is the residual, or apart from it: anything between is for nobody's tiles.
	return !a->residual.p || (a->residual.p == a->y.p && a->residual.ld == a->y.ld) || !overlap(a->residual, a->y);
}

} // namespace

margo_status gemm_cublaslt(margo_stream *st, const margo_gemm_args *a) {
	margo_context *c = st->ctx;
	margo_cublaslt *l = c->cublaslt.get();
	if (!l || !serves(st, a)) return MARGO_UNSUPPORTED;
	margo_cublaslt_algo s{};
	s.size = sizeof s;
	s.dtype = a->w.dtype, s.y_dtype = a->y.dtype, s.bias = a->bias.p != 0, s.residual = !a->residual.p ? 0 : a->residual.p == a->y.p ? 2 : 1;
	s.m = a->y.rows, s.n = a->y.cols, s.k = a->w.cols, s.ldx = a->x.ld, s.ldw = a->w.ld, s.ldr = a->residual.ld, s.ldy = a->y.ld;
	s.workspace_limit = st->cublaslt_bytes;
	const Operands o{ptr<void>(a->x), ptr<char>(a->w) + a->n0 * a->w.ld * (a->w.dtype == MARGO_BF16 ? 2 : 4), a->bias.p ? ptr<float>(a->bias) + a->n0 : nullptr,
	                 ptr<void>(a->residual), ptr<void>(a->y)};
	if (reinterpret_cast<uintptr_t>(o.w) % kAlign) return MARGO_UNSUPPORTED;

	std::lock_guard<std::mutex> lock(l->mu);
	auto &slot = l->products[shape_of(s)];
	if (!slot) {
		auto p = std::make_unique<Product>(&l->f);
		p->chosen = s;
		MARGO_TRY(decide(st, l, p.get(), o));
		slot = std::move(p);
		l->order.push_back(slot.get());
	}
	Product *p = slot.get();
	if (p->chosen.choice == MARGO_CUBLASLT_OURS) return MARGO_UNSUPPORTED;
	uint64_t given = 0;
	lt::Status r = lt_room(c, [&] { return multiply(l, p, o, p->algo, st); }, &given);
	if (r == lt::NOT_SUPPORTED || r == lt::ARCH_MISMATCH) { // nothing was enqueued; not asked again
		p->chosen.choice = MARGO_CUBLASLT_OURS;
		return MARGO_UNSUPPORTED;
	}
	if (r != lt::SUCCESS) return refusal(c, l, r, "cublasLtMatmul", given);
	p->chosen.uses++;
	std::lock_guard<std::mutex> count(c->mu);
	c->counters.kernel_launches++;
	return MARGO_OK;
}

margo_status cublaslt_probe(const char *library, margo_cublaslt_info *out, char *err, size_t err_bytes) {
	lt::Functions f{};
	return find(library, &f, out, err, err_bytes);
}

margo_status cublaslt_open(margo_context *c, const char *library, int32_t autotune, margo_cublaslt_info *out) {
	cudaSetDevice(c->ordinal);
	char text[512] = "";
	auto l = std::make_shared<margo_cublaslt>();
	margo_cublaslt_info i{};
	i.size = sizeof i;
	if (margo_status s = find(library, &l->f, &i, text, sizeof text); s != MARGO_OK) return fail(c, s, "%s", text);
	uint64_t given = 0;
	if (lt::Status s = lt_room(c, [&] { return l->f.Create(&l->handle); }, &given); s != lt::SUCCESS) return refusal(c, l.get(), s, "cublasLtCreate", given);
	l->autotune = autotune != 0;
	i.workspace_bytes = uint64_t(c->prop.major >= 9 ? 32 : 4) << 20; // the vendor's advice
	memcpy(out, &i, out->size < sizeof i ? out->size : sizeof i);
	c->cublaslt = l;
	return MARGO_OK;
}

margo_status cublaslt_workspace(margo_stream *st, uint64_t p, uint64_t bytes) {
	st->cublaslt_workspace = reinterpret_cast<void *>(uintptr_t(p)), st->cublaslt_bytes = bytes;
	return MARGO_OK;
}

margo_status cublaslt_algo(margo_context *c, int64_t i, margo_cublaslt_algo *out) {
	margo_cublaslt *l = c->cublaslt.get();
	if (!l) return MARGO_INVALID;
	std::lock_guard<std::mutex> lock(l->mu);
	if (i < 0 || i >= int64_t(l->order.size())) return MARGO_INVALID;
	const margo_cublaslt_algo &v = l->order[size_t(i)]->chosen;
	memcpy(out, &v, out->size < sizeof v ? out->size : sizeof v);
	return MARGO_OK;
}

margo_status cublaslt_store(margo_context *c, const margo_cublaslt_algo *a) {
	margo_cublaslt *l = c->cublaslt.get();
	if (!l || a->size != sizeof *a) return fail(c, MARGO_INVALID, "cuBLASLt is not open, or the struct has %u bytes, not %zu", a->size, sizeof *a);
	std::lock_guard<std::mutex> lock(l->mu);
	if (l->products.count(shape_of(*a))) return fail(c, MARGO_INVALID, "a product of this shape was chosen for already");
	lt::Algo algo;
	memcpy(algo.data, a->algo, sizeof algo.data);
	l->stored[shape_of(*a)] = algo;
	return MARGO_OK;
}
