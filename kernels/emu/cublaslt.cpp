// cublaslt.cpp: a stand-in for cuBLASLt with the prototypes of ../cublaslt.h. It checks what it is told as the library
// does, supports what the library's table of types supports, and computes on the emulated stream, by a kernel with one
// thread a block. There are three algorithms, which sum in different orders; the second needs workspace, and is the
// heuristics' first for 64 rows and more, so that the bits of a row depend on the number of rows, as they may with
// the library.
//
// MARGO_EMU_CUBLASLT=FUNCTION:VALUE makes a function return a status (GetVersion: a version) at once, as in Matmul:15;
// FUNCTION:VALUE:COUNT its first calls only.
#include <cstdlib>

#include "../cublaslt.h"
#include "../margo.cuh"
#include "state.h"

namespace lt {

struct HandleOpaque {
	int device;
};
struct DescOpaque {
	int32_t compute, scale, transa = OP_N, transb = OP_N, bias_type = -1;
	uint32_t epilogue = EPILOGUE_DEFAULT;
	const void *bias = nullptr;
};
struct LayoutOpaque {
	int32_t type;
	uint64_t rows, cols;
	int64_t ld;
	uint64_t bytes() const { return type == R_16BF ? 2 : 4; }
};
struct PreferenceOpaque {
	uint64_t workspace = 0;
	uint32_t reductions = 7, align[4] = {256, 256, 256, 256};
};

namespace {

constexpr uint64_t kMark = 0x6d6172676f; // of our algorithms
constexpr int kAlgos = 3, kBlocks = 64, kPartials = 8;
constexpr uint32_t kAlign = 16;
constexpr uint64_t kVersion = 130000, kWorkspace = kBlocks * kPartials * sizeof(float);

// injected is what MARGO_EMU_CUBLASLT has the function return, or otherwise.
int64_t injected(const char *function, int64_t otherwise) {
	const char *v = getenv("MARGO_EMU_CUBLASLT");
	const size_t n = strlen(function);
	if (!v || strncmp(v, function, n) || v[n] != ':') return otherwise;
	char *end = nullptr;
	const int64_t value = strtoll(v + n + 1, &end, 0);
	if (*end != ':') return value;
	static std::mutex mu;
	static auto *calls = new std::map<std::string, int64_t>; // by the whole text
	std::lock_guard<std::mutex> lock(mu);
	return (*calls)[v]++ < strtoll(end + 1, nullptr, 0) ? value : otherwise;
}
#define INJECTED(function) \
	if (Status s_ = Status(injected(#function, SUCCESS))) return s_

template <class T> Status set(T *to, const void *value, size_t bytes) {
	if (bytes != sizeof *to) return INVALID_VALUE;
	memcpy(to, value, sizeof *to);
	return SUCCESS;
}

size_t GetVersion() { return size_t(injected("GetVersion", kVersion)); }

const char *GetStatusString(Status s) {
	switch (s) {
	case SUCCESS: return "success";
	case NOT_INITIALIZED: return "the library was not initialized";
	case ALLOC_FAILED: return "an allocation failed";
	case INVALID_VALUE: return "an invalid value was given";
	case ARCH_MISMATCH: return "not for this architecture";
	case EXECUTION_FAILED: return "the product could not be launched";
	case NOT_SUPPORTED: return "not supported";
	}
	return "internal error";
}

Status Create(Handle *h) {
	INJECTED(Create);
	std::lock_guard<std::mutex> lock(emu::state().mu);
	const int device = emu::current_device();
	if (!emu::reserve(device, emu::state().settings.takes.cublaslt)) return ALLOC_FAILED;
	*h = new HandleOpaque{device};
	return SUCCESS;
}
Status Destroy(Handle h) {
	std::lock_guard<std::mutex> lock(emu::state().mu);
	emu::unreserve(h->device, emu::state().settings.takes.cublaslt);
	delete h;
	return SUCCESS;
}

Status MatmulDescCreate(Desc *d, int32_t compute, int32_t scale) {
	INJECTED(MatmulDescCreate);
	*d = new DescOpaque{compute, scale};
	return SUCCESS;
}
Status MatmulDescDestroy(Desc d) {
	delete d;
	return SUCCESS;
}
Status MatmulDescSetAttribute(Desc d, int32_t attribute, const void *value, size_t bytes) {
	switch (attribute) {
	case DESC_TRANSA: return set(&d->transa, value, bytes);
	case DESC_TRANSB: return set(&d->transb, value, bytes);
	case DESC_EPILOGUE: return set(&d->epilogue, value, bytes);
	case DESC_BIAS_POINTER: return set(&d->bias, value, bytes);
	case DESC_BIAS_DATA_TYPE: return set(&d->bias_type, value, bytes);
	}
	return INVALID_VALUE;
}

Status MatrixLayoutCreate(Layout *l, int32_t type, uint64_t rows, uint64_t cols, int64_t ld) {
	INJECTED(MatrixLayoutCreate);
	*l = new LayoutOpaque{type, rows, cols, ld};
	return SUCCESS;
}
Status MatrixLayoutDestroy(Layout l) {
	delete l;
	return SUCCESS;
}

Status MatmulPreferenceCreate(Preference *p) {
	INJECTED(MatmulPreferenceCreate);
	*p = new PreferenceOpaque;
	return SUCCESS;
}
Status MatmulPreferenceDestroy(Preference p) {
	delete p;
	return SUCCESS;
}
Status MatmulPreferenceSetAttribute(Preference p, int32_t attribute, const void *value, size_t bytes) {
	switch (attribute) {
	case PREF_MAX_WORKSPACE_BYTES: return set(&p->workspace, value, bytes);
	case PREF_REDUCTION_SCHEME_MASK: return set(&p->reductions, value, bytes);
	case PREF_MIN_ALIGNMENT_A_BYTES:
	case PREF_MIN_ALIGNMENT_B_BYTES:
	case PREF_MIN_ALIGNMENT_C_BYTES:
	case PREF_MIN_ALIGNMENT_D_BYTES: return set(&p->align[attribute - PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
	}
	return INVALID_VALUE;
}

// fits says whether descriptors belong together, and whether their combination is one of those that exist:
// bf16 operands with C, D and bias all F32 or all bf16, or F32 throughout.
Status fits(const DescOpaque *d, const LayoutOpaque *a, const LayoutOpaque *b, const LayoutOpaque *c, const LayoutOpaque *y) {
	const bool ta = d->transa == OP_T, tb = d->transb == OP_T;
	const uint64_t m = ta ? a->cols : a->rows, k = ta ? a->rows : a->cols, kb = tb ? b->cols : b->rows, n = tb ? b->rows : b->cols;
	if (k != kb || y->rows != m || y->cols != n || c->rows != m || c->cols != n || !m || !n || !k) return INVALID_VALUE;
	for (const LayoutOpaque *l : {a, b, c, y})
		if (l->ld < int64_t(l->rows)) return INVALID_VALUE;
	if (d->compute != COMPUTE_32F || d->scale != R_32F || !ta || tb) return NOT_SUPPORTED;
	if (a->type != b->type || c->type != y->type || (a->type != y->type && a->type != R_16BF)) return NOT_SUPPORTED;
	if (d->epilogue == EPILOGUE_BIAS) {
		if (!d->bias) return INVALID_VALUE;
		if ((d->bias_type < 0 ? y->type : d->bias_type) != y->type) return NOT_SUPPORTED;
	} else if (d->epilogue != EPILOGUE_DEFAULT) {
		return NOT_SUPPORTED;
	}
	for (const LayoutOpaque *l : {a, b, c, y})
		if (uint64_t(l->ld) * l->bytes() % kAlign) return NOT_SUPPORTED;
	return SUCCESS;
}

// aligned is how the heuristics see the bias: its algorithms hold for no worse address.
uint64_t aligned(const DescOpaque *d) {
	const uint64_t at = reinterpret_cast<uintptr_t>(d->bias) | 256;
	return d->epilogue == EPILOGUE_BIAS ? at & ~(at - 1) : 1;
}

uint64_t needs(uint64_t id) { return id == 1 ? kWorkspace : 0; }

Status MatmulAlgoGetHeuristic(Handle, Desc d, Layout a, Layout b, Layout c, Layout y, Preference p, int32_t asked, Result *out, int32_t *got) {
	INJECTED(MatmulAlgoGetHeuristic);
	*got = 0;
	if (asked <= 0) return INVALID_VALUE;
	if (Status s = fits(d, a, b, c, y)) return s;
	for (uint32_t align : p->align)
		if (align < kAlign) return NOT_SUPPORTED;
	for (int i = 0; i < kAlgos && *got < asked; i++) {
		uint64_t id = i;
		if (y->cols >= 64 && i < 2) id = 1 - i;
		if (needs(id) > p->workspace) continue;
		Result r{};
		r.algo.data[0] = kMark, r.algo.data[1] = id, r.algo.data[2] = aligned(d), r.workspace = needs(id);
		out[(*got)++] = r;
	}
	return *got ? SUCCESS : NOT_SUPPORTED;
}

Status MatmulAlgoCheck(Handle, Desc d, Layout a, Layout b, Layout c, Layout y, const Algo *algo, Result *out) {
	INJECTED(MatmulAlgoCheck);
	if (algo->data[0] != kMark || algo->data[1] >= kAlgos) return INVALID_VALUE;
	if (Status s = fits(d, a, b, c, y)) return s;
	*out = Result{};
	out->algo = *algo, out->workspace = needs(algo->data[1]);
	return SUCCESS;
}

struct Params {
	const void *a, *b, *c;
	void *d;
	const float *bias;
	float *workspace;
	float alpha, beta;
	int64_t lda, ldb, ldc, ldd, m, n, k;
	int32_t in_bf16, out_bf16;
	uint64_t id;
};

void look(const void *p, int64_t elements, int size, const char *what) {
	emu::check_global(p, size_t(elements) * size_t(size), what, "cuBLASLt", 0);
	if constexpr (emu::check::on) emu::check::read(p, size_t(elements) * size_t(size), __builtin_return_address(0));
}

// product: a block takes every gridDim.x-th column of D. Algorithm 0 adds every kPartials-th product into
// a sum of its own, 1 the same in the workspace, from the last product to the first, 2 all into one.
void product(const Params p) {
	const int in = p.in_bf16 ? 2 : 4, out = p.out_bf16 ? 2 : 4;
	auto get = [](const void *base, int64_t i, bool is_bf16) { return is_bf16 ? to_f32(static_cast<const bf16 *>(base)[i]) : static_cast<const float *>(base)[i]; };
	auto at = [](const void *base, int64_t i, int size) { return static_cast<const char *>(base) + i * size; };
	float own[kPartials], *sums = own;
	if (p.id == 1) sums = p.workspace + blockIdx.x * kPartials, look(sums, kPartials, 4, "workspace");
	if (p.bias) look(p.bias, p.m, 4, "bias");
	if (blockIdx.x == 0)
		for (int64_t r = 0; r < p.m; r++) look(at(p.a, r * p.lda, in), p.k, in, "A");
	for (int64_t col = blockIdx.x; col < p.n; col += gridDim.x) {
		look(at(p.b, col * p.ldb, in), p.k, in, "B");
		look(at(p.d, col * p.ldd, out), p.m, out, "D");
		if (p.beta != 0) look(at(p.c, col * p.ldc, out), p.m, out, "C");
		for (int64_t row = 0; row < p.m; row++) {
			const int n = p.id == 2 ? 1 : kPartials;
			for (int i = 0; i < n; i++) sums[i] = 0;
			for (int64_t i = 0; i < p.k; i++) {
				const int64_t k = p.id == 1 ? p.k - 1 - i : i;
				sums[i % n] += get(p.a, row * p.lda + k, p.in_bf16) * get(p.b, col * p.ldb + k, p.in_bf16);
			}
			float v = 0;
			for (int i = 0; i < n; i++) v += sums[i];
			v *= p.alpha;
			if (p.beta != 0) v += p.beta * get(p.c, col * p.ldc + row, p.out_bf16);
			if (p.bias) v += p.bias[row];
			if (p.out_bf16)
				static_cast<bf16 *>(p.d)[col * p.ldd + row] = to_bf16(v);
			else
				static_cast<float *>(p.d)[col * p.ldd + row] = v;
		}
		if constexpr (emu::check::on) emu::check::write(at(p.d, col * p.ldd, out), size_t(p.m) * size_t(out), __builtin_return_address(0));
	}
}

Status Matmul(Handle h, Desc d, const void *alpha, const void *a, Layout la, const void *b, Layout lb, const void *beta, const void *c, Layout lc, void *y,
              Layout ly, const Algo *algo, void *workspace, size_t workspace_bytes, Stream st) {
	INJECTED(Matmul);
	if (!h || h->device != emu::current_device() || !a || !b || !c || !y || !alpha || !beta) return INVALID_VALUE;
	if (!algo || algo->data[0] != kMark || algo->data[1] >= kAlgos) return INVALID_VALUE;
	if (Status s = fits(d, la, lb, lc, ly)) return s;
	if (needs(algo->data[1]) > workspace_bytes || reinterpret_cast<uintptr_t>(workspace) % 256) return INVALID_VALUE;
	for (const void *p : {a, b, c, static_cast<const void *>(y), d->epilogue == EPILOGUE_BIAS ? d->bias : nullptr})
		if (reinterpret_cast<uintptr_t>(p) % kAlign) return NOT_SUPPORTED;
	if (c == y && lc->ld != ly->ld) return INVALID_VALUE;
	if (aligned(d) < algo->data[2]) return INVALID_VALUE;
	Params p{a, b, c, y, d->epilogue == EPILOGUE_BIAS ? static_cast<const float *>(d->bias) : nullptr, static_cast<float *>(workspace),
	         *static_cast<const float *>(alpha), *static_cast<const float *>(beta), la->ld, lb->ld, lc->ld, ly->ld, int64_t(ly->rows), int64_t(ly->cols),
	         int64_t(la->rows), la->type == R_16BF, ly->type == R_16BF, algo->data[1]};
	static const char *const names[kAlgos] = {"cublaslt_0", "cublaslt_1", "cublaslt_2"};
	gpu::name_next_launch(names[p.id]);
	cudaLaunchConfig_t l{};
	l.gridDim = dim3(unsigned(p.n < kBlocks ? p.n : kBlocks)), l.blockDim = dim3(1), l.stream = reinterpret_cast<cudaStream_t>(st);
	return cudaLaunchKernelEx(&l, product, p) == cudaSuccess ? SUCCESS : EXECUTION_FAILED;
}

} // namespace

} // namespace lt

bool gpu::own_cublaslt(lt::Functions *f) {
#define MARGO_F(result, name, arguments) f->name = lt::name;
	MARGO_CUBLASLT(MARGO_F)
#undef MARGO_F
	return true;
}
