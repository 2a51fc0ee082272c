// launch.cpp: launches: what the runtime refuses, and how blocks are spread over
// threads of the system.
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "state.h"

namespace emu {

namespace {

thread_local const char *launch_name;

// Helper is a thread of the system that takes part in launches.
class Helper {
public:
	Helper() {
		std::thread([this] { loop(); }).detach(); // for the life of the process
	}
	void begin(Run *r) {
		std::lock_guard<std::mutex> lock(mu_);
		run_ = r;
		cv_.notify_all();
	}
	void wait() {
		std::unique_lock<std::mutex> lock(mu_);
		cv_.wait(lock, [this] { return !run_; });
	}

private:
	void loop();
	std::mutex mu_;
	std::condition_variable cv_;
	Run *run_ = nullptr;
	Group group_;
};

uint64_t blocks_of(const Launch &l) { return uint64_t(l.grid.x) * l.grid.y * l.grid.z; }

void work(Group *g, Run *r) {
	const uint64_t total = blocks_of(*r->launch), together = uint64_t(r->launch->cluster.x) * r->launch->cluster.y * r->launch->cluster.z;
	for (uint64_t i; (i = r->next.fetch_add(together)) < total && !r->failed.load();) run_blocks(g, r, i, int(together));
}

void Helper::loop() {
	std::unique_lock<std::mutex> lock(mu_);
	for (;;) {
		cv_.wait(lock, [this] { return run_ != nullptr; });
		Run *r = run_;
		lock.unlock();
		work(&group_, r);
		lock.lock();
		run_ = nullptr;
		cv_.notify_all();
	}
}

// report appends what was counted to the file that MARGO_EMU_REPORT names; runtime.h says what it holds.
void report(const Run &r) {
	std::string path;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		path = state().settings.report;
	}
	if (path.empty()) return;
	FILE *f = fopen(path.c_str(), "a");
	if (!f) return;
	fprintf(f, "%s", r.launch->name.c_str());
	if (uint64_t n = r.matrices.load()) fprintf(f, " ldmatrix=%llu conflicts=%.2f", (unsigned long long)n, double(r.matrix_waves.load()) / double(n));
	const char *names[kCounted] = {"global.load", "global.store", "shared.load", "shared.store"};
	using big = unsigned long long;
	for (int i = 0; i < kCounted; i++) {
		if (!r.requests[i]) continue;
		fprintf(f, " %s=%llu waves=%llu least=%llu", names[i], big(r.requests[i]), big(r.waves[i]), big(r.least[i]));
		if (r.worst[i]) fprintf(f, " worst=%s:%llu/%llu", check::place(r.worst[i]).c_str(), big(r.worst_waves[i]), big(r.worst_least[i]));
	}
	fprintf(f, "\n");
	fclose(f);
}

} // namespace

void execute(Run *r, int threads) {
	static auto *group = new Group; // of the thread that holds run_mu
	static auto *helpers = new std::vector<Helper *>;
	const Launch &l = *r->launch;
	const uint64_t total = blocks_of(l);
	if (l.cooperative) {
		run_blocks(group, r, 0, int(total));
		return;
	}
	size_t extra = size_t(threads) - 1;
	if (extra >= total) extra = size_t(total - 1);
	if (total * l.block.x * l.block.y * l.block.z < 1024) extra = 0; // not worth waking anybody
	while (helpers->size() < extra) helpers->push_back(new Helper);
	for (size_t i = 0; i < extra; i++) (*helpers)[i]->begin(r);
	work(group, r);
	for (size_t i = 0; i < extra; i++) (*helpers)[i]->wait();
}

void run_launch(const Launch &l, int device) {
	State &s = state();
	Run r;
	r.launch = &l;
	int threads;
	{
		std::lock_guard<std::mutex> lock(s.mu);
		if (!s.settings.run) return;
		for (auto &a : s.memory)
			if (a.second.device >= 0) r.memory.push_back({a.first, a.first + a.second.bytes});
		r.seed = s.settings.seed ? s.settings.seed * 0x9E3779B97F4A7C15ull + s.runs : 0;
		r.number = ++s.runs;
		threads = s.settings.threads;
		r.counting = !s.settings.report.empty();
	}
	if (r.seed && l.cluster.x * l.cluster.y * l.cluster.z == 1) {
		r.order.resize(blocks_of(l));
		for (size_t i = 0; i < r.order.size(); i++) r.order[i] = i;
		uint64_t x = r.seed;
		for (size_t i = r.order.size(); i > 1; i--) {
			x = x * 6364136223846793005ull + 1442695040888963407ull;
			std::swap(r.order[i - 1], r.order[(x >> 33) % i]);
		}
	}
	execute(&r, threads);
	report(r);
	for (size_t i = 0; i < r.pcs.size(); i++) {
		std::string name = text("{pc%zu}", i);
		if (size_t at = r.report.find(name); at != std::string::npos) r.report.replace(at, name.size(), check::place(r.pcs[i]));
	}
	if (r.code == cudaSuccess) return;
	std::lock_guard<std::mutex> lock(s.mu);
	if (s.devices[size_t(device)].error == cudaSuccess) {
		s.devices[size_t(device)].error = r.code;
		set_report(r.report);
	}
}

void name_next_launch(const char *name) { launch_name = name; }

// pause waits where MARGO_EMU_PAUSE=N:FILE says: before launch N the process makes FILE.reached, and goes on when FILE exists.
void pause() {
	const char *v = getenv("MARGO_EMU_PAUSE");
	char *file = nullptr;
	if (!v || strtoll(v, &file, 0) != state().launches || *file++ != ':') return;
	const std::string go = file, reached = go + ".reached";
	if (FILE *f = fopen(reached.c_str(), "w")) fclose(f);
	while (access(go.c_str(), F_OK) != 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

cudaError_t enqueue(const cudaLaunchConfig_t &c, const void *kernel, std::function<void()> body) {
	auto l = std::make_shared<Launch>();
	l->grid = c.gridDim, l->block = c.blockDim, l->smem = c.dynamicSmemBytes, l->kernel = kernel, l->body = std::move(body);
	l->name = launch_name ? launch_name : text("at %p", kernel);
	launch_name = nullptr;
	for (unsigned i = 0; i < c.numAttrs; i++) {
		const cudaLaunchAttribute &a = c.attrs[i];
		if (a.id == cudaLaunchAttributeCooperative) l->cooperative = a.val.cooperative;
		if (a.id == cudaLaunchAttributeClusterDimension) l->cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
	}
	cudaDeviceProp p;
	cudaError_t e = cudaGetDeviceProperties(&p, current_device());
	if (e != cudaSuccess) return e;
	State &s = state();
	{
		std::lock_guard<std::mutex> lock(s.mu);
		if ((e = usable()) != cudaSuccess) return note(e);
		if (s.settings.cc < s.settings.built_for) return note(cudaErrorNoKernelImageForDevice);
		auto st = find_stream(c.stream);
		if (!st) return note(cudaErrorInvalidResourceHandle);
		const dim3 &g = l->grid, &b = l->block;
		uint64_t threads = uint64_t(b.x) * b.y * b.z;
		if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535 || threads == 0 || threads > 1024 || b.z > 64)
			return note(cudaErrorInvalidConfiguration);
		auto it = s.smem_limit.find(kernel);
		size_t limit = it != s.smem_limit.end() ? size_t(it->second) : p.sharedMemPerBlock;
		if (l->smem > limit) return note(cudaErrorInvalidValue);
		const dim3 &k = l->cluster;
		if (k.x * k.y * k.z != 1 && (p.major < 9 || k.y != 1 || k.z != 1 || k.x > 8 || g.x % k.x || g.y != 1 || g.z != 1)) return note(cudaErrorInvalidConfiguration);
		if (l->cooperative) {
			size_t each = p.sharedMemPerMultiprocessor / (l->smem + p.reservedSharedMemPerBlock), by_threads = size_t(p.maxThreadsPerMultiProcessor) / threads;
			if (blocks_of(*l) > uint64_t(p.multiProcessorCount) * (each < by_threads ? each : by_threads)) return note(cudaErrorCooperativeLaunchTooLarge);
		}
		if (s.settings.lose_device >= 0 && s.launches >= s.settings.lose_device) {
			s.devices[size_t(st->device)].error = cudaErrorUnknown;
			set_report("the device was lost (injected by MARGO_EMU_LOSE_DEVICE)");
			drop_work(st->device);
			return note(cudaErrorUnknown);
		}
		pause();
		if (auto &loaded = s.devices[size_t(st->device)].loaded; s.settings.takes.kernel && !loaded.count(kernel)) {
			if (!reserve(st->device, s.settings.takes.kernel)) return note(cudaErrorMemoryAllocation);
			loaded.insert(kernel);
		}
		s.launches++;
		trace("kernel %s grid=%u,%u,%u block=%u,%u,%u smem=%zu stream=%d%s%s\n", l->name.c_str(), g.x, g.y, g.z, b.x, b.y, b.z, l->smem, st->number,
		      l->cooperative ? " cooperative" : "", st->capture ? " captured" : "");
		Item i;
		i.launch = l;
		if ((e = push(st, std::move(i))) != cudaSuccess) return note(e);
	}
	settle();
	return cudaSuccess;
}

} // namespace emu

using namespace emu;

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute a, int value) {
	cudaDeviceProp p;
	cudaError_t e = cudaGetDeviceProperties(&p, current_device());
	if (e != cudaSuccess) return e;
	if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
	if (value < 0 || size_t(value) > p.sharedMemPerBlockOptin) return note(cudaErrorInvalidValue);
	std::lock_guard<std::mutex> lock(state().mu);
	state().smem_limit[kernel] = value;
	return cudaSuccess;
}

// What only a compiler knows, such as registers, is 0.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *kernel) {
	cudaDeviceProp p;
	cudaError_t e = cudaGetDeviceProperties(&p, current_device());
	if (e != cudaSuccess) return e;
	*a = cudaFuncAttributes{};
	a->maxThreadsPerBlock = p.maxThreadsPerBlock;
	a->ptxVersion = a->binaryVersion = p.major * 10 + p.minor;
	std::lock_guard<std::mutex> lock(state().mu);
	auto it = state().smem_limit.find(kernel);
	a->maxDynamicSharedSizeBytes = it != state().smem_limit.end() ? it->second : int(p.sharedMemPerBlock);
	return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int threads, size_t smem) {
	cudaDeviceProp p;
	cudaError_t e = cudaGetDeviceProperties(&p, current_device());
	if (e != cudaSuccess) return e;
	if (threads <= 0 || threads > p.maxThreadsPerBlock) return note(cudaErrorInvalidValue);
	int by_threads = p.maxThreadsPerMultiProcessor / threads, by_smem = int(p.sharedMemPerMultiprocessor / (smem + p.reservedSharedMemPerBlock));
	*n = by_threads < by_smem ? by_threads : by_smem;
	if (*n > p.maxBlocksPerMultiProcessor) *n = p.maxBlocksPerMultiProcessor;
	return cudaSuccess;
}
