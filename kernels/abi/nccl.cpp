// nccl.cpp: compares kernels/nccl_api.h with the real header when it is compiled; run with the library's path it
// looks the functions up. Both headers use NCCL's own names: nccl_ours.h is ours without its #include lines, which
// check.sh writes.
#include <dlfcn.h>
#include <nccl.h>

#include <cstddef>
#include <cstdio>

#include "same.h"

namespace ours {
#include "nccl_ours.h"
}

template <> constexpr bool abi::prefix<ours::ncclConfig_t, ncclConfig_t> = true;

#define MARGO_F(name, result, arguments) ABI_FUNCTION(result(*) arguments, name);
namespace ours {
MARGO_NCCL_FUNCTIONS(MARGO_F)
}
#undef MARGO_F

static_assert(sizeof(ours::ncclUniqueId) == sizeof(ncclUniqueId) && NCCL_UNIQUE_ID_BYTES == sizeof(ours::ncclUniqueId));
static_assert(sizeof(ours::ncclConfig_t) <= sizeof(ncclConfig_t));
#define OFFSET(field) static_assert(offsetof(ours::ncclConfig_t, field) == offsetof(ncclConfig_t, field) && sizeof(ours::ncclConfig_t::field) == sizeof(ncclConfig_t::field))
OFFSET(size);
OFFSET(magic);
OFFSET(version);
OFFSET(blocking);
static_assert(ours::ncclConfig_t{}.magic == NCCL_API_MAGIC);

ABI_VALUE(ours::ncclSuccess, ncclSuccess);
ABI_VALUE(ours::ncclUnhandledCudaError, ncclUnhandledCudaError);
ABI_VALUE(ours::ncclSystemError, ncclSystemError);
ABI_VALUE(ours::ncclInternalError, ncclInternalError);
ABI_VALUE(ours::ncclInvalidArgument, ncclInvalidArgument);
ABI_VALUE(ours::ncclInvalidUsage, ncclInvalidUsage);
ABI_VALUE(ours::ncclRemoteError, ncclRemoteError);
ABI_VALUE(ours::ncclInProgress, ncclInProgress);
ABI_VALUE(ours::ncclTimeout, ncclTimeout);
ABI_VALUE(ours::ncclInt32, ncclInt32);
ABI_VALUE(ours::ncclFloat32, ncclFloat32);
ABI_VALUE(ours::ncclBfloat16, ncclBfloat16);
ABI_VALUE(ours::ncclSum, ncclSum);

int main(int, char **argv) {
	void *h = dlopen(argv[1], RTLD_LAZY | RTLD_LOCAL);
	if (!h) {
		fprintf(stderr, "%s\n", dlerror());
		return 2;
	}
	int n = 0, bad = 0;
#define MARGO_F(name, result, arguments)                                                    \
	n++;                                                                                    \
	if (!dlsym(h, #name)) fprintf(stderr, "%s lacks " #name "\n", argv[1]), bad++;
	MARGO_NCCL_FUNCTIONS(MARGO_F)
#undef MARGO_F
	if (bad) return 1;
	int version = 0;
	ncclResult_t r = reinterpret_cast<decltype(&ncclGetVersion)>(dlsym(h, "ncclGetVersion"))(&version);
	printf("NCCL %d: %d functions found and with our prototypes\n", version, n);
	return r != ncclSuccess || version != NCCL_VERSION_CODE;
}
