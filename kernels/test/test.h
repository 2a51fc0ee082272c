// test.h: what the test programs of this folder share: the device, errors, times.
#pragma once

#include <cstdio>
#include <cstring>

#include "../plugin.h"

namespace {

int failures;
bool broken; // the device does not work any more: nothing else is tried

void must(cudaError_t e, const char *what) {
	if (e == cudaSuccess || broken) return;
	printf("FAIL %s: %s %s\n", what, cudaGetErrorString(e), gpu::report());
	failures++, broken = true;
}

// open_stream makes what a plugin has of a device: a context with its error word, and a stream.
margo_stream *open_stream() {
	auto *c = new margo_context;
	must(cudaSetDevice(0), "cudaSetDevice");
	must(cudaGetDeviceProperties(&c->prop, 0), "cudaGetDeviceProperties");
	must(cudaMalloc(reinterpret_cast<void **>(&c->device_error), 256), "cudaMalloc");
	must(cudaMemset(c->device_error, 0, 256), "cudaMemset");
	auto *st = new margo_stream{c};
	must(cudaStreamCreateWithFlags(&st->s, cudaStreamNonBlocking), "cudaStreamCreate");
	if (!broken) printf("%s, %d SMs\n", c->prop.name, c->prop.multiProcessorCount);
	return st;
}

// not_hopper says that kernels of sm_90a do not run on the device; a program then ends with kLeftOut.
constexpr int kLeftOut = 77;
inline bool not_hopper(margo_stream *st) {
	const cudaDeviceProp &p = st->ctx->prop;
	if (p.major == 9 || broken) return false;
	printf("left out: the kernels are for compute capability 9.0, the device has %d.%d\n", p.major, p.minor);
	return true;
}

// microseconds gives the time of one of reps calls that enqueue work, after one that is not counted.
template <class F> double microseconds(margo_stream *st, int reps, F &&once) {
	cudaEvent_t from, to;
	must(cudaEventCreate(&from), "cudaEventCreate"), must(cudaEventCreate(&to), "cudaEventCreate");
	once();
	must(cudaEventRecord(from, st->s), "cudaEventRecord");
	for (int i = 0; i < reps; i++) once();
	must(cudaEventRecord(to, st->s), "cudaEventRecord");
	must(cudaEventSynchronize(to), "timing");
	float ms = 0;
	must(cudaEventElapsedTime(&ms, from, to), "cudaEventElapsedTime");
	must(cudaEventDestroy(from), "cudaEventDestroy"), must(cudaEventDestroy(to), "cudaEventDestroy");
	return double(ms) * 1e3 / reps;
}

bool small(int argc, char **argv) { return argc == 2 && !strcmp(argv[1], "small"); }

int verdict() {
	if (failures) printf("FAIL: %d\n", failures);
	else printf("ok\n");
	return failures != 0;
}

} // namespace
