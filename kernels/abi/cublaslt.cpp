// cublaslt.cpp: compares kernels/cublaslt.h with the real header when it is compiled; run with the library's path it
// looks the functions up, and tries the descriptors, which need no GPU.
#include "../cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdio>

#include "same.h"

#define MARGO_F(result, name, arguments) ABI_FUNCTION(decltype(lt::Functions::name), cublasLt##name);
MARGO_CUBLASLT(MARGO_F)
#undef MARGO_F

static_assert(sizeof(lt::Algo) == sizeof(cublasLtMatmulAlgo_t) && alignof(lt::Algo) == alignof(cublasLtMatmulAlgo_t));
static_assert(sizeof(lt::Result) == sizeof(cublasLtMatmulHeuristicResult_t));
#define OFFSET(ours, theirs) \
	static_assert(offsetof(lt::Result, ours) == offsetof(cublasLtMatmulHeuristicResult_t, theirs) && sizeof(lt::Result::ours) == sizeof(cublasLtMatmulHeuristicResult_t::theirs))
OFFSET(algo, algo);
OFFSET(workspace, workspaceSize);
OFFSET(state, state);
OFFSET(waves, wavesCount);
OFFSET(reserved, reserved);

ABI_VALUE(lt::SUCCESS, CUBLAS_STATUS_SUCCESS);
ABI_VALUE(lt::NOT_INITIALIZED, CUBLAS_STATUS_NOT_INITIALIZED);
ABI_VALUE(lt::ALLOC_FAILED, CUBLAS_STATUS_ALLOC_FAILED);
ABI_VALUE(lt::INVALID_VALUE, CUBLAS_STATUS_INVALID_VALUE);
ABI_VALUE(lt::ARCH_MISMATCH, CUBLAS_STATUS_ARCH_MISMATCH);
ABI_VALUE(lt::EXECUTION_FAILED, CUBLAS_STATUS_EXECUTION_FAILED);
ABI_VALUE(lt::INTERNAL_ERROR, CUBLAS_STATUS_INTERNAL_ERROR);
ABI_VALUE(lt::NOT_SUPPORTED, CUBLAS_STATUS_NOT_SUPPORTED);
ABI_VALUE(lt::R_32F, CUDA_R_32F);
ABI_VALUE(lt::R_16BF, CUDA_R_16BF);
ABI_VALUE(lt::COMPUTE_32F, CUBLAS_COMPUTE_32F);
ABI_VALUE(lt::OP_N, CUBLAS_OP_N);
ABI_VALUE(lt::OP_T, CUBLAS_OP_T);
ABI_VALUE(lt::EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_DEFAULT);
ABI_VALUE(lt::EPILOGUE_BIAS, CUBLASLT_EPILOGUE_BIAS);
ABI_VALUE(lt::REDUCTION_NONE, CUBLASLT_REDUCTION_SCHEME_NONE);
ABI_VALUE(lt::DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSA);
ABI_VALUE(lt::DESC_TRANSB, CUBLASLT_MATMUL_DESC_TRANSB);
ABI_VALUE(lt::DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_EPILOGUE);
ABI_VALUE(lt::DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
ABI_VALUE(lt::DESC_BIAS_DATA_TYPE, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
ABI_VALUE(lt::PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
ABI_VALUE(lt::PREF_REDUCTION_SCHEME_MASK, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
ABI_VALUE(lt::PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
ABI_VALUE(lt::PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
ABI_VALUE(lt::PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
ABI_VALUE(lt::PREF_MIN_ALIGNMENT_D_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);

namespace {

int bad = 0;

void expect(lt::Status got, lt::Status want, const char *what) {
	if (got == want) return;
	fprintf(stderr, "cuBLASLt: %s gives %d, want %d\n", what, got, want);
	bad++;
}

} // namespace

int main(int, char **argv) {
	void *h = dlopen(argv[1], RTLD_LAZY | RTLD_LOCAL);
	if (!h) {
		fprintf(stderr, "%s\n", dlerror());
		return 2;
	}
	lt::Functions f{};
	int n = 0;
#define MARGO_F(result, name, arguments)                                                     \
	f.name = reinterpret_cast<decltype(f.name)>(dlsym(h, "cublasLt" #name));                 \
	n++;                                                                                     \
	if (!f.name) fprintf(stderr, "%s lacks cublasLt" #name "\n", argv[1]), bad++;
	MARGO_CUBLASLT(MARGO_F)
#undef MARGO_F
	if (bad) return 1;

	// Attributes: the sizes that the library wants, and that it takes no other.
	lt::Desc d = nullptr;
	lt::Layout l = nullptr;
	lt::Preference p = nullptr;
	const int32_t t = lt::OP_T, f32 = lt::R_32F;
	const uint32_t bias = lt::EPILOGUE_BIAS, none = lt::REDUCTION_NONE, align = 16;
	const uint64_t bytes = 32 << 20;
	const void *pointer = &bytes;
	expect(f.MatmulDescCreate(&d, lt::COMPUTE_32F, lt::R_32F), lt::SUCCESS, "MatmulDescCreate");
	expect(f.MatmulDescSetAttribute(d, lt::DESC_TRANSA, &t, sizeof t), lt::SUCCESS, "TRANSA");
	expect(f.MatmulDescSetAttribute(d, lt::DESC_TRANSB, &t, sizeof t), lt::SUCCESS, "TRANSB");
	expect(f.MatmulDescSetAttribute(d, lt::DESC_EPILOGUE, &bias, sizeof bias), lt::SUCCESS, "EPILOGUE");
	expect(f.MatmulDescSetAttribute(d, lt::DESC_BIAS_DATA_TYPE, &f32, sizeof f32), lt::SUCCESS, "BIAS_DATA_TYPE");
	expect(f.MatmulDescSetAttribute(d, lt::DESC_BIAS_POINTER, &pointer, sizeof pointer), lt::SUCCESS, "BIAS_POINTER");
	expect(f.MatmulDescSetAttribute(d, lt::DESC_BIAS_POINTER, &t, sizeof t), lt::INVALID_VALUE, "BIAS_POINTER of 4 bytes");
	expect(f.MatrixLayoutCreate(&l, lt::R_16BF, 64, 32, 64), lt::SUCCESS, "MatrixLayoutCreate");
	expect(f.MatmulPreferenceCreate(&p), lt::SUCCESS, "MatmulPreferenceCreate");
	expect(f.MatmulPreferenceSetAttribute(p, lt::PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes), lt::SUCCESS, "MAX_WORKSPACE_BYTES");
	expect(f.MatmulPreferenceSetAttribute(p, lt::PREF_MAX_WORKSPACE_BYTES, &none, sizeof none), lt::INVALID_VALUE, "MAX_WORKSPACE_BYTES of 4 bytes");
	expect(f.MatmulPreferenceSetAttribute(p, lt::PREF_REDUCTION_SCHEME_MASK, &none, sizeof none), lt::SUCCESS, "REDUCTION_SCHEME_MASK");
	for (int32_t at = lt::PREF_MIN_ALIGNMENT_A_BYTES; at <= lt::PREF_MIN_ALIGNMENT_D_BYTES; at++)
		expect(f.MatmulPreferenceSetAttribute(p, at, &align, sizeof align), lt::SUCCESS, "MIN_ALIGNMENT");
	expect(f.MatmulPreferenceDestroy(p), lt::SUCCESS, "MatmulPreferenceDestroy");
	expect(f.MatrixLayoutDestroy(l), lt::SUCCESS, "MatrixLayoutDestroy");
	expect(f.MatmulDescDestroy(d), lt::SUCCESS, "MatmulDescDestroy");
	printf("cuBLASLt %zu: %d functions found and with our prototypes, descriptors take our attributes; status 15 is \"%s\"\n", f.GetVersion(), n,
	       f.GetStatusString(lt::NOT_SUPPORTED));
	// Without a GPU there is no handle; that this is an error, and not a crash, is all that can be seen here.
	lt::Handle handle = nullptr;
	lt::Status s = f.Create(&handle);
	printf("cuBLASLt: Create gives %d (%s)\n", s, f.GetStatusString(s));
	if (s == lt::SUCCESS) f.Destroy(handle);
	return bad != 0;
}
