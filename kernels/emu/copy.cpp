// copy.cpp: asynchronous copies, and checks of the addresses that wrappers get.
#include <time.h>

#include <algorithm>

#include "internal.h"

namespace emu {

void check_shared(const void *p, size_t bytes, unsigned align, const char *what, const char *file, int line) {
	Fiber *f = self();
	auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(f->smem);
	if (at < begin || at + bytes > begin + f->smem_bytes)
		fail(cudaErrorIllegalAddress, file, line, "%s: %p is %lld bytes into shared memory of %zu", what, p, (long long)(at - begin), f->smem_bytes);
	if (at % align) fail(cudaErrorMisalignedAddress, file, line, "%s: %lld bytes into shared memory, no multiple of %u", what, (long long)(at - begin), align);
}

void check_global(const void *p, size_t bytes, const char *what, const char *file, int line) {
	auto at = reinterpret_cast<uintptr_t>(p);
	const auto &m = group->run->memory;
	auto it = std::upper_bound(m.begin(), m.end(), at, [](uintptr_t v, const Range &r) { return v < r.begin; });
	if (it != m.begin() && at < (it - 1)->end && at + bytes <= (it - 1)->end) return;
	if (it != m.begin() && at < (it - 1)->end + 4096)
		fail(cudaErrorIllegalAddress, file, line, "%s: %zu bytes at %p, %lld bytes before the end of a buffer of %zu", what, bytes, p, (long long)((it - 1)->end - at),
		     size_t((it - 1)->end - (it - 1)->begin));
	fail(cudaErrorIllegalAddress, file, line, "%s: %zu bytes at %p are in no buffer of the device", what, bytes, p);
}

void cp_async(void *dst, const void *src, int size, int bytes, const char *file, int line) {
	Fiber *f = self();
	check_shared(dst, size_t(size), unsigned(size), "cp.async: destination", file, line);
	if (bytes < 0 || bytes > size) fail(cudaErrorLaunchFailure, file, line, "cp.async: %d bytes of %d", bytes, size);
	if (reinterpret_cast<uintptr_t>(src) % unsigned(size)) fail(cudaErrorMisalignedAddress, file, line, "cp.async: source %p is no multiple of %d", src, size);
	if (bytes) check_global(src, size_t(bytes), "cp.async: source", file, line);
	if constexpr (check::on) {
		check::write(dst, size_t(size), __builtin_return_address(0));
		check::count(dst, size_t(size), true, __builtin_return_address(0));
		check::count(src, size_t(bytes), false, __builtin_return_address(0));
		f->vector_left = 0; // the copy itself is not counted again
	}
	memset(dst, 0xff, size_t(size)); // whoever reads it before the wait sees NaN
	f->copies.push_back({static_cast<char *>(dst), static_cast<const char *>(src), size, bytes});
}

void cp_async_commit() {
	Fiber *f = self();
	f->commits.push_back(uint32_t(f->copies.size()) - f->committed);
	f->committed = uint32_t(f->copies.size());
}

void cp_async_wait(int n) {
	Fiber *f = self();
	if (f->commits.size() <= size_t(n)) return;
	size_t groups = f->commits.size() - size_t(n), count = 0;
	for (size_t i = 0; i < groups; i++) count += f->commits[i];
	for (size_t i = 0; i < count; i++) {
		const Copy &c = f->copies[i];
		if constexpr (check::on) check::write(c.dst, size_t(c.size), __builtin_return_address(0)), check::read(c.src, size_t(c.bytes), __builtin_return_address(0));
		memcpy(c.dst, c.src, size_t(c.bytes));
		memset(c.dst + c.bytes, 0, size_t(c.size - c.bytes));
	}
	f->copies.erase(f->copies.begin(), f->copies.begin() + std::ptrdiff_t(count));
	f->commits.erase(f->commits.begin(), f->commits.begin() + std::ptrdiff_t(groups));
	f->committed -= uint32_t(count);
}

// shared_address: offsets begin at 1024, as on hardware that reserves the first KiB.
uint32_t shared_address(const void *p, const char *file, int line) {
	Fiber *f = self();
	auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(f->smem);
	if (at < begin || at > begin + f->smem_bytes)
		fail(cudaErrorIllegalAddress, file, line, "%p is %lld bytes into shared memory of %zu", p, (long long)(at - begin), f->smem_bytes);
	return uint32_t(at - begin) + 1024;
}

uint64_t nanoseconds() {
	timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return uint64_t(t.tv_sec) * 1000000000u + uint64_t(t.tv_nsec);
}

} // namespace emu
