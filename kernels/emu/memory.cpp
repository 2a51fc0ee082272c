// memory.cpp: device memory, pinned memory and copies. Buffers have exactly the
// size that was asked for and are filled with NaN; the bytes around them are looked
// at when they are freed (under ASan, which has its own red zones, not).
#include <cstdlib>

#include "state.h"

namespace emu {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kZone = 0;
#else
constexpr size_t kZone = 256;
#endif
constexpr unsigned char kFill = 0xff;

// find is the allocation that holds p, or null.
const std::pair<const uintptr_t, Allocation> *find(const void *p) {
	auto &m = state().memory;
	auto at = reinterpret_cast<uintptr_t>(p);
	auto it = m.upper_bound(at);
	if (it == m.begin()) return nullptr;
	--it;
	return at < it->first + it->second.bytes ? &*it : nullptr;
}

bool inside(const void *p, size_t bytes, bool device) {
	if (bytes == 0) return true;
	auto *a = find(p);
	if (!device) return !a || a->second.device < 0;
	return a && a->second.device >= 0 && reinterpret_cast<uintptr_t>(p) + bytes <= a->first + a->second.bytes;
}

bool pinned(const void *p) {
	auto *a = find(p);
	return a && a->second.device < 0;
}

cudaError_t allocate(void **out, size_t bytes, int device) {
	State &s = state();
	*out = nullptr;
	if (bytes == 0) return cudaSuccess;
	if (device >= 0) {
		if (s.settings.fail_alloc >= 0 && s.allocations >= s.settings.fail_alloc) return cudaErrorMemoryAllocation;
		if (!reserve(device, bytes)) return cudaErrorMemoryAllocation;
		s.allocations++;
	}
	void *base = nullptr;
	if (posix_memalign(&base, 256, bytes + 2 * kZone)) {
		if (device >= 0) unreserve(device, bytes);
		return cudaErrorMemoryAllocation;
	}
	memset(base, kFill, bytes + 2 * kZone);
	char *p = static_cast<char *>(base) + kZone;
	s.memory[reinterpret_cast<uintptr_t>(p)] = {static_cast<char *>(base), bytes, device};
	*out = p;
	return cudaSuccess;
}

// release frees p; a write around it is an error that stays.
cudaError_t release(void *p) {
	State &s = state();
	auto it = s.memory.find(reinterpret_cast<uintptr_t>(p));
	if (it == s.memory.end()) return cudaErrorInvalidValue;
	Allocation a = it->second;
	s.memory.erase(it);
	cudaError_t e = cudaSuccess;
	if (a.device >= 0) {
		Device &d = s.devices[size_t(a.device)];
		unreserve(a.device, a.bytes);
		for (size_t i = 0; i < kZone; i++) {
			bool before = static_cast<unsigned char>(a.base[i]) != kFill, after = static_cast<unsigned char>(a.base[kZone + a.bytes + i]) != kFill;
			if ((before || after) && d.error == cudaSuccess) {
				d.error = cudaErrorIllegalAddress;
				set_report(before ? text("a kernel wrote %zu bytes before a buffer of %zu bytes", kZone - i, a.bytes)
				                  : text("a kernel wrote %zu bytes past the end of a buffer of %zu bytes", i, a.bytes));
			}
		}
		e = d.error;
	}
	free(a.base);
	return e;
}

// copy_item checks a copy and makes work of it. host: it must be done before the call returns.
cudaError_t copy_item(void *dst, size_t dpitch, const void *src, size_t spitch, size_t width, size_t height, cudaMemcpyKind kind, bool capturing, Item &out, bool &wait) {
	const size_t db = height ? dpitch * (height - 1) + width : 0, sb = height ? spitch * (height - 1) + width : 0;
	bool to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice, from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
	if (kind == cudaMemcpyDefault) to = find(dst) && !pinned(dst), from = find(src) && !pinned(src);
	if (width > dpitch || width > spitch || !inside(dst, db, to) || !inside(src, sb, from)) return cudaErrorInvalidValue;
	std::shared_ptr<std::vector<char>> taken;
	if (!from && !pinned(src) && !capturing) { // pageable memory has been read when the call returns
		auto *b = static_cast<const char *>(src);
		taken = std::make_shared<std::vector<char>>(b, b + sb);
	}
	wait = !to && !pinned(dst); // and written
	out.act = [=] {
		const char *s = taken ? taken->data() : static_cast<const char *>(src);
		if (dpitch == width && spitch == width) {
			memmove(dst, s, width * height);
			return;
		}
		for (size_t r = 0; r < height; r++) memmove(static_cast<char *>(dst) + r * dpitch, s + r * spitch, width);
	};
	return cudaSuccess;
}

} // namespace

bool device_memory(const void *p, size_t bytes) { return inside(p, bytes, true); }

bool reserve(int device, size_t bytes) {
	State &s = state();
	Device &d = s.devices[size_t(device)];
	if (d.used > s.settings.memory || bytes > s.settings.memory - d.used) return false;
	if (!share_set(device, d.used + bytes, s.settings.memory, nullptr)) return false;
	d.used += bytes;
	return true;
}

void unreserve(int device, size_t bytes) {
	Device &d = state().devices[size_t(device)];
	d.used -= bytes;
	share_set(device, d.used, SIZE_MAX, nullptr);
}

size_t free_memory(int device) {
	State &s = state();
	const size_t used = s.devices[size_t(device)].used;
	size_t others = 0;
	share_set(device, used, SIZE_MAX, &others);
	return used + others < s.settings.memory ? s.settings.memory - used - others : 0;
}

} // namespace emu

using namespace emu;

cudaError_t cudaMalloc(void **p, size_t bytes) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e == cudaSuccess) e = unsafe_in_capture();
	if (e != cudaSuccess) return note(e);
	return note(allocate(p, bytes, current_device()));
}

cudaError_t cudaFree(void *p) {
	if (!p) return cudaSuccess;
	cudaError_t e = synchronize(nullptr);
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t r = release(p); // also of a device that has failed: the emulator's memory is the host's
	return note(e != cudaSuccess ? e : r);
}

cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t st) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	auto s = find_stream(st);
	if (!s) return note(cudaErrorInvalidResourceHandle);
	if (s->capture) return note(cudaErrorNotSupported);
	return note(allocate(p, bytes, s->device));
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t st) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	auto s = find_stream(st);
	if (!s) return note(cudaErrorInvalidResourceHandle);
	if (!state().memory.count(reinterpret_cast<uintptr_t>(p))) return note(cudaErrorInvalidValue);
	if (s->capture) return note(cudaErrorNotSupported);
	Item i;
	i.act = [p] {
		std::lock_guard<std::mutex> inner(state().mu);
		release(p);
	};
	return note(push(s, std::move(i)));
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	*total = state().settings.memory;
	*free = free_memory(current_device());
	if (state().settings.fail_alloc >= 0 && state().allocations >= state().settings.fail_alloc) *free = 0; // another process has it
	return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e == cudaSuccess) e = unsafe_in_capture();
	return note(e != cudaSuccess ? e : allocate(p, bytes, -1));
}

cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }

cudaError_t cudaFreeHost(void *p) {
	if (!p) return cudaSuccess;
	cudaError_t e = synchronize(nullptr); // copies may be using it
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t r = release(p);
	return note(e != cudaSuccess ? e : r);
}

cudaError_t cudaMemcpy2DAsync(void *dst, size_t dpitch, const void *src, size_t spitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t st) {
	std::shared_ptr<emu_stream> s;
	bool wait = false;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		if (!(s = find_stream(st))) return note(cudaErrorInvalidResourceHandle);
		Item i;
		bool capturing = s->capture != nullptr;
		e = copy_item(dst, dpitch, src, spitch, width, height, kind, capturing, i, wait);
		if (e == cudaSuccess && width && height) e = push(s, std::move(i));
		if (e != cudaSuccess) return note(e);
		wait = wait && !capturing;
	}
	if (wait) return note(synchronize(s.get()));
	settle();
	return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t st) {
	return cudaMemcpy2DAsync(dst, bytes, src, bytes, bytes, 1, kind, st);
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
	cudaError_t e = cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
	return e != cudaSuccess ? e : cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void *p, int v, size_t bytes, cudaStream_t st) {
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		auto s = find_stream(st);
		if (!s) return note(cudaErrorInvalidResourceHandle);
		if (!inside(p, bytes, true)) return note(cudaErrorInvalidValue);
		Item i;
		i.act = [=] { memset(p, v, bytes); };
		if (bytes) e = push(s, std::move(i));
		if (e != cudaSuccess) return note(e);
	}
	settle();
	return cudaSuccess;
}

// A memset of device memory does not wait, though it is named like the copy that does.
cudaError_t cudaMemset(void *p, int v, size_t bytes) { return cudaMemsetAsync(p, v, bytes, nullptr); }
