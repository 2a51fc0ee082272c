// sanitized.cu: seeded bugs for AddressSanitizer, UndefinedBehaviorSanitizer and
// ThreadSanitizer, to prove that what they are told about fibers does not blind them.
//
//	sanitized BUG
//
// "none" does what the others do without the bug and prints "ok". The others end the
// program with the sanitizer's report; which is the table of cuda/sanitize_test.go.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "margo.cuh"

namespace {

// rotate: y[i] = x[i + 1 mod n] of every block, through shared memory and a barrier, so that
// every thread leaves its stack in the middle. past: the last thread writes behind y.
__global__ void rotate(const float *x, float *y, int past) {
	float *s = &gpu::smem<float>();
	int i = threadIdx.x, n = blockDim.x;
	s[i] = x[blockIdx.x * n + i];
	__syncthreads();
	y[blockIdx.x * n + i + (i == n - 1 && blockIdx.x == gridDim.x - 1 ? past : 0)] = s[(i + 1) % n];
}

// past_shared writes one element behind the shared memory of the block, after a barrier.
__global__ void past_shared(float *y, int past) {
	float *s = &gpu::smem<float>();
	s[threadIdx.x] = 1;
	__syncthreads();
	if (threadIdx.x == 0) s[blockDim.x - 1 + past] = 2;
	__syncthreads();
	y[threadIdx.x] = s[threadIdx.x];
}

// past_local writes behind an array in a thread's own stack, after the thread was away from it.
__global__ void past_local(float *y, int past) {
	volatile float own[4] = {1, 2, 3, 4}, *p = own;
	asm volatile("" : "+r"(p)); // hides the array's size: this one is for ASan, not for UBSan
	__syncthreads();
	p[int(threadIdx.x) % 4 + past] = 5;
	y[threadIdx.x] = own[threadIdx.x % 4];
}

__global__ void shift(int *y, int by) {
	__syncthreads();
	y[threadIdx.x] = 1 << by;
}

// counts adds from every block; blocks run on two threads of the system. plain: without atomics. Each of the two waits for the
// other at its first block (and nothing orders them), else one may be done before the other wakes.
std::atomic<int> workers{0};
thread_local bool counted = false;
__global__ void counts(float *y, int plain) {
	__syncthreads();
	if (threadIdx.x) return;
	if (!counted) {
		counted = true;
		workers.fetch_add(1, std::memory_order_relaxed);
		while (workers.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
	}
	if (plain)
		y[0] = y[0] + 1;
	else
		atomicAdd(y, 1.0f);
}

float *device(int n) {
	void *p = nullptr;
	if (cudaMalloc(&p, size_t(n) * 4) != cudaSuccess) return nullptr;
	std::vector<float> v(size_t(n), 1.0f);
	cudaMemcpy(p, v.data(), v.size() * 4, cudaMemcpyHostToDevice);
	return static_cast<float *>(p);
}

cudaError_t worst = cudaSuccess;
void keep(cudaError_t e) {
	if (worst == cudaSuccess) worst = e;
}

// copies lets two threads of the program each send a buffer to the device. shared: both fill the same one.
void copies(float *y, bool shared) {
	std::vector<float> a(64), b(64);
	std::atomic<int> begun{0};
	auto send = [&](std::vector<float> &h, int at) {
		cudaStream_t s;
		if (cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) != cudaSuccess) return;
		begun.fetch_add(1, std::memory_order_relaxed); // both begin at once, and nothing orders them
		while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
		for (size_t i = 0; i < h.size(); i++) h[i] = float(at);
		cudaMemcpyAsync(y + at, h.data(), h.size() * 4, cudaMemcpyHostToDevice, s);
		cudaStreamSynchronize(s);
		cudaStreamDestroy(s);
	};
	std::thread other([&] { send(a, 0); });
	send(shared ? a : b, 64);
	other.join();
}

} // namespace

int main(int argc, char **argv) {
	const char *bug = argc > 1 ? argv[1] : "";
	auto is = [bug](const char *name) { return strcmp(bug, name) == 0; };
	float *x = device(128 * 10), *y = device(128 * 10);
	if (!x || !y) return 1;
	keep(gpu::launch(rotate, dim3(10), dim3(128), 512, nullptr, x, y, is("heap") ? 1 : 0));
	keep(gpu::launch(past_shared, dim3(1), dim3(128), 512, nullptr, y, is("shared") ? 1 : 0));
	keep(gpu::launch(past_local, dim3(1), dim3(128), 0, nullptr, y, is("stack") ? 4 : 0));
	keep(gpu::launch(shift, dim3(1), dim3(128), 0, nullptr, reinterpret_cast<int *>(y), is("undefined") ? 32 : 3));
	keep(gpu::launch(counts, dim3(40), dim3(32), 0, nullptr, y, is("blocks") ? 1 : 0));
	keep(cudaDeviceSynchronize());
	copies(y, is("threads"));
	if (is("freed")) cudaFree(x);
	keep(gpu::launch(rotate, dim3(10), dim3(128), 512, nullptr, x, y, 0));
	keep(cudaDeviceSynchronize());
	if (!is("freed")) cudaFree(x);
	cudaFree(y);
	if (worst != cudaSuccess) {
		printf("%s: %s\n", cudaGetErrorName(worst), emu_last_report());
		return 1;
	}
	printf("ok\n");
	return 0;
}
