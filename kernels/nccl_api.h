// nccl_api.h: what margo uses of NCCL, whose library is opened at run time: the names, values and
// prototypes of nccl.h 2.14 and later as plain facts, in one place, so that they can be checked
// against a real header. Enums travel as int, as C passes them.
#pragma once

#include <cstddef>

#include "margo.cuh" // cudaStream_t

typedef struct ncclComm *ncclComm_t;
struct ncclUniqueId { // passed by value
	char internal[128];
};
static_assert(sizeof(ncclUniqueId) == 128);

typedef int ncclResult_t;
enum {
	ncclSuccess = 0,
	ncclUnhandledCudaError = 1,
	ncclSystemError = 2,
	ncclInternalError = 3,
	ncclInvalidArgument = 4,
	ncclInvalidUsage = 5,
	ncclRemoteError = 6,
	ncclInProgress = 7,
	ncclTimeout = 8,
};
typedef int ncclDataType_t;
enum { ncclInt32 = 2, ncclFloat32 = 7, ncclBfloat16 = 9 };
typedef int ncclRedOp_t;
enum { ncclSum = 0 };

// ncclConfig_t as it was in 2.14: the struct has only been appended to, NCCL copies as many bytes as
// size says and takes its defaults for the rest.
struct ncclConfig_t {
	size_t size = sizeof(ncclConfig_t);
	unsigned magic = 0xcafebeef, version = 21400;
	int blocking = 0, padding = 0;
};
static_assert(sizeof(ncclConfig_t) == 24);

// F(name, result, arguments)
#define MARGO_NCCL_FUNCTIONS(F)                                                                                           \
	F(ncclGetVersion, ncclResult_t, (int *version))                                                                       \
	F(ncclGetUniqueId, ncclResult_t, (ncclUniqueId * id))                                                                 \
	F(ncclCommInitRankConfig, ncclResult_t, (ncclComm_t * comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config)) \
	F(ncclCommAbort, ncclResult_t, (ncclComm_t comm))                                                                     \
	F(ncclCommGetAsyncError, ncclResult_t, (ncclComm_t comm, ncclResult_t * error))                                       \
	F(ncclGetErrorString, const char *, (ncclResult_t result))                                                            \
	F(ncclGetLastError, const char *, (ncclComm_t comm))                                                                  \
	F(ncclGroupStart, ncclResult_t, ())                                                                                   \
	F(ncclGroupEnd, ncclResult_t, ())                                                                                     \
	F(ncclAllReduce, ncclResult_t,                                                                                        \
	  (const void *send, void *receive, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)) \
	F(ncclBroadcast, ncclResult_t,                                                                                        \
	  (const void *send, void *receive, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream))
