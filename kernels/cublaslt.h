// cublaslt.h: what the plugin calls of cuBLASLt: prototypes, values and struct sizes of its C interface, as facts,
// since the library is opened at run time and its headers are not needed to build. `make abi-check` compares them
// with the real headers. Enumerations are passed as int32_t, handles and descriptors are pointers to what only
// the library knows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lt {

using Status = int32_t;
using Handle = struct HandleOpaque *;
using Desc = struct DescOpaque *;         // cublasLtMatmulDesc_t
using Layout = struct LayoutOpaque *;     // cublasLtMatrixLayout_t
using Preference = struct PreferenceOpaque *; // cublasLtMatmulPreference_t
using Stream = struct StreamOpaque *;     // cudaStream_t

struct Algo { // cublasLtMatmulAlgo_t: plain data, valid for the same version of the library
	uint64_t data[8];
};
struct Result { // cublasLtMatmulHeuristicResult_t
	Algo algo;
	size_t workspace; // bytes that it needs
	Status state;
	float waves;
	int32_t reserved[4];
};

enum : Status { // cublasStatus_t
	SUCCESS = 0,
	NOT_INITIALIZED = 1,
	ALLOC_FAILED = 3,
	INVALID_VALUE = 7,
	ARCH_MISMATCH = 8,
	EXECUTION_FAILED = 13,
	INTERNAL_ERROR = 14,
	NOT_SUPPORTED = 15,
};
enum : int32_t { R_32F = 0, R_16BF = 14 };             // cudaDataType_t
enum : int32_t { COMPUTE_32F = 68 };                   // cublasComputeType_t: without TF32
enum : int32_t { OP_N = 0, OP_T = 1 };                 // cublasOperation_t
enum : uint32_t { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 }; // cublasLtEpilogue_t
enum : uint32_t { REDUCTION_NONE = 0 };                // cublasLtReductionScheme_t: no split of K
enum : int32_t { // cublasLtMatmulDescAttributes_t, with the type of the value
	DESC_TRANSA = 3,          // int32_t
	DESC_TRANSB = 4,          // int32_t
	DESC_EPILOGUE = 7,        // uint32_t
	DESC_BIAS_POINTER = 8,    // const void *: a number for each row of D
	DESC_BIAS_DATA_TYPE = 26, // int32_t
};
enum : int32_t { // cublasLtMatmulPreferenceAttributes_t
	PREF_MAX_WORKSPACE_BYTES = 1,   // uint64_t
	PREF_REDUCTION_SCHEME_MASK = 3, // uint32_t
	PREF_MIN_ALIGNMENT_A_BYTES = 5, // uint32_t
	PREF_MIN_ALIGNMENT_B_BYTES = 6,
	PREF_MIN_ALIGNMENT_C_BYTES = 7,
	PREF_MIN_ALIGNMENT_D_BYTES = 8,
};

// F(result, name, arguments) for every function; the library's names begin with cublasLt. Matrices are
// column-major: D = alpha · op(A)·op(B) + beta · C, then the epilogue.
#define MARGO_CUBLASLT(F)                                                                                                                      \
	F(size_t, GetVersion, (void))                                                                                                              \
	F(const char *, GetStatusString, (Status))                                                                                                 \
	F(Status, Create, (Handle *))                                                                                                              \
	F(Status, Destroy, (Handle))                                                                                                               \
	F(Status, MatmulDescCreate, (Desc *, int32_t compute, int32_t scale))                                                                      \
	F(Status, MatmulDescDestroy, (Desc))                                                                                                       \
	F(Status, MatmulDescSetAttribute, (Desc, int32_t attribute, const void *value, size_t bytes))                                              \
	F(Status, MatrixLayoutCreate, (Layout *, int32_t type, uint64_t rows, uint64_t cols, int64_t ld))                                          \
	F(Status, MatrixLayoutDestroy, (Layout))                                                                                                   \
	F(Status, MatmulPreferenceCreate, (Preference *))                                                                                          \
	F(Status, MatmulPreferenceDestroy, (Preference))                                                                                           \
	F(Status, MatmulPreferenceSetAttribute, (Preference, int32_t attribute, const void *value, size_t bytes))                                  \
	F(Status, MatmulAlgoGetHeuristic, (Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int32_t asked, Result *, int32_t *got)) \
	F(Status, MatmulAlgoCheck, (Handle, Desc, Layout a, Layout b, Layout c, Layout d, const Algo *, Result *))                                 \
	F(Status, Matmul,                                                                                                                          \
	  (Handle, Desc, const void *alpha, const void *a, Layout, const void *b, Layout, const void *beta, const void *c, Layout, void *d, Layout, \
	   const Algo *, void *workspace, size_t workspace_bytes, Stream))

struct Functions {
#define MARGO_F(result, name, arguments) result(*name) arguments;
	MARGO_CUBLASLT(MARGO_F)
#undef MARGO_F
};

} // namespace lt

namespace gpu {
#ifdef __CUDACC__
inline bool own_cublaslt(lt::Functions *) { return false; }
#else
bool own_cublaslt(lt::Functions *); // the emulator's stand-in (emu/cublaslt.cpp)
#endif
} // namespace gpu
