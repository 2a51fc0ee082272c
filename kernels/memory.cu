// memory.cu: the pool of device memory, and pinned memory for staging.
//
// A buffer that is freed goes to a list of its size and can be handed out again at once. What was enqueued before it
// was freed may still use it, so it carries marks: events recorded at the end of each stream that had work. Whoever
// gets it next has every stream wait for these events, on the device; the host never waits. Streams that were
// waited for since their last work have no mark, so that freeing what a model held costs nothing. While a stream captures,
// it can neither be marked nor made to wait: then the host waits.
//
// Sizes that can be cached are rounded up to eight steps an octave, at least 256 bytes, so a buffer is at most an eighth larger than asked. The oldest
// are given back to the driver when more than the capacity is cached, and all before an allocation fails.
// With capacity 0 nothing is cached or rounded: buffers end where they should, and a tool sees what is written behind.
#include <algorithm>
#include <cstring>

#include "plugin.h"

margo_mark::~margo_mark() { cudaEventDestroy(e); }

namespace {

constexpr uint64_t kPinnedCache = 64 << 20; // most that is kept of closed streams
double mib(uint64_t bytes) { return double(bytes) / (1 << 20); }

uint64_t rounded(uint64_t capacity, uint64_t bytes) {
	if (bytes > capacity || capacity == 0) return std::max<uint64_t>(bytes, 1);
	uint64_t step = 256;
	while (step * 16 <= bytes) step *= 2;
	return std::max<uint64_t>((bytes + step - 1) / step * step, 256);
}

// mark_end makes a mark of what the stream has been given; none where that fails.
margo_status mark_end(margo_context *c, cudaStream_t s, std::shared_ptr<margo_mark> &out) {
	cudaEvent_t e = nullptr;
	MARGO_TRY(with_room(c, "making an event", [&] { return cudaEventCreateWithFlags(&e, cudaEventDisableTiming); }));
	auto m = std::make_shared<margo_mark>(e);
	MARGO_TRY(check(c, cudaEventRecord(e, s), "recording an event"));
	out = m;
	return MARGO_OK;
}

// mark_streams marks the end of every stream that had work since it was marked or waited for.
margo_status mark_streams(margo_context *c, margo_marks &out) {
	{
		std::lock_guard<std::mutex> lock(c->capture_mu);
		bool capturing = false;
		for (margo_stream *st : c->streams) capturing = capturing || st->capturing;
		if (!capturing) {
			if (c->fill_mark) out.push_back(c->fill_mark);
			for (margo_stream *st : c->streams) {
				// No more busy before the mark is made: what another thread enqueues just after it is work without a mark.
				if (st->busy.exchange(false)) {
					if (margo_status s = mark_end(c, st->s, st->mark); s != MARGO_OK) {
						st->busy.store(true);
						return s;
					}
				}
				if (st->mark) out.push_back(st->mark);
			}
			return MARGO_OK;
		}
	}
	return wait_all(c, "waiting before memory is freed");
}

margo_status wait_marks(margo_context *c, const margo_marks &marks) {
	for (auto &m : marks) MARGO_TRY(wait_event(c, m->e, "waiting for memory"));
	return MARGO_OK;
}

// order makes what every stream gets from now on wait for the marks.
margo_status order(margo_context *c, const margo_marks &marks) {
	if (marks.empty()) return MARGO_OK;
	std::lock_guard<std::mutex> lock(c->capture_mu);
	for (margo_stream *st : c->streams)
		if (st->capturing) return wait_marks(c, marks);
	for (margo_stream *st : c->streams)
		for (auto &m : marks)
			if (m != st->mark) MARGO_TRY(check(c, cudaStreamWaitEvent(st->s, m->e, 0), "waiting for memory"));
	c->reused = true;
	return MARGO_OK;
}

// poison fills a buffer with NaN once nobody uses it; marks is then the end of that.
margo_status poison(margo_context *c, void *p, uint64_t bytes, margo_marks &marks) {
	std::lock_guard<std::mutex> lock(c->capture_mu);
	for (auto &m : marks) MARGO_TRY(check(c, cudaStreamWaitEvent(c->fill_stream, m->e, 0), "filling memory"));
	MARGO_TRY(check(c, cudaMemsetAsync(p, 0xff, bytes, c->fill_stream), "filling memory"));
	MARGO_TRY(mark_end(c, c->fill_stream, c->fill_mark));
	marks = {c->fill_mark};
	return MARGO_OK;
}

// take_front takes the first block of a size out of the cache. Called with the pool's mutex.
margo_block take_front(margo_pool &pool, decltype(margo_pool::cached)::iterator at) {
	margo_block b = std::move(at->second.front());
	at->second.pop_front();
	if (at->second.empty()) pool.cached.erase(at);
	pool.cached_bytes -= b.size;
	return b;
}

// oldest takes the cached block that was freed first out of the pool. Called with its mutex.
bool oldest(margo_pool &pool, margo_block &out) {
	auto at = pool.cached.end();
	for (auto it = pool.cached.begin(); it != pool.cached.end(); ++it)
		if (at == pool.cached.end() || it->second.front().age < at->second.front().age) at = it;
	if (at == pool.cached.end()) return false;
	out = take_front(pool, at);
	return true;
}

// give_back returns a block that is neither held nor cached to the driver.
margo_status give_back(margo_context *c, const margo_block &b) {
	margo_status s = wait_marks(c, b.marks);
	wait_collectives(c); // the driver waits for the whole device, whoever is late
	margo_status freed = check(c, cudaFree(b.p), "freeing memory"); // also of a device that has failed
	std::lock_guard<std::mutex> lock(c->pool.mu);
	c->pool.taken -= b.size;
	return s != MARGO_OK ? s : freed;
}

// shrink gives cached blocks back until done says so, or none is left; given is how much that was. An error, the
// first, does not end it: of a device that has failed all memory is given back too.
template <class F> margo_status shrink(margo_context *c, uint64_t *given, F done) {
	for (margo_status first = MARGO_OK;;) {
		margo_block b;
		{
			std::lock_guard<std::mutex> lock(c->pool.mu);
			if (done(c->pool) || !oldest(c->pool, b)) return first;
			c->pool.trims++;
		}
		if (given) *given += b.size;
		margo_status s = give_back(c, b);
		if (first == MARGO_OK) first = s;
	}
}

// out_of_memory says what was asked, and what there is beside the cache, of which given went back to the driver in vain.
margo_status out_of_memory(margo_context *c, const char *asked, uint64_t given) {
	size_t free = 0, total = 0;
	cudaMemGetInfo(&free, &total);
	cudaGetLastError();
	std::unique_lock<std::mutex> lock(c->pool.mu);
	uint64_t held = c->pool.held_bytes, limit = c->pool.limit;
	lock.unlock();
	char text[80] = "";
	if (limit) snprintf(text, sizeof text, ", limit %.1f MiB", mib(limit));
	char cache[80] = "0.0 MiB cached";
	if (given) snprintf(cache, sizeof cache, "%.1f MiB cached and given back", mib(given));
	return fail(c, MARGO_OUT_OF_MEMORY, "%s asked, %.1f MiB held, %s, %.1f of %.1f MiB free%s", asked, mib(held), cache, mib(free), mib(total), text);
}

margo_status out_of_memory(margo_context *c, uint64_t bytes, uint64_t given) {
	char asked[40];
	snprintf(asked, sizeof asked, "%.1f MiB", mib(bytes));
	return out_of_memory(c, asked, given);
}

// fresh takes a block from the driver.
margo_status fresh(margo_context *c, uint64_t bytes, margo_block &b) {
	uint64_t given = 0;
	bool reserved = false; // by the look that finds room, since others allocate too
	margo_status shrunk = shrink(c, &given, [&](margo_pool &p) {
		if (p.limit && (b.size > p.limit || p.taken > p.limit - b.size)) return false;
		p.taken += b.size;
		return reserved = true;
	});
	if (shrunk != MARGO_OK) {
		std::lock_guard<std::mutex> lock(c->pool.mu);
		if (reserved) c->pool.taken -= b.size;
		return shrunk;
	}
	if (!reserved) return out_of_memory(c, bytes, given);
	cudaError_t e = cudaMalloc(&b.p, b.size);
	if (e == cudaErrorMemoryAllocation) {
		cudaGetLastError();
		margo_status s = shrink(c, &given, [](margo_pool &) { return false; });
		e = s == MARGO_OK ? cudaMalloc(&b.p, b.size) : e;
	}
	std::unique_lock<std::mutex> lock(c->pool.mu);
	if (e == cudaSuccess) {
		c->pool.device_allocs++;
		c->pool.taken_peak = std::max(c->pool.taken_peak, c->pool.taken);
		return MARGO_OK;
	}
	c->pool.taken -= b.size;
	lock.unlock();
	if (e != cudaErrorMemoryAllocation) return check(c, e, "allocating memory");
	cudaGetLastError();
	return out_of_memory(c, bytes, given);
}

} // namespace

margo_status pool_alloc(margo_context *c, uint64_t bytes, uint64_t *out) {
	Relaxed relaxed;
	margo_block b;
	if (bytes > uint64_t(1) << 62) return out_of_memory(c, bytes, 0);
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		b.size = rounded(c->pool.capacity, bytes);
		auto it = c->pool.cached.find(b.size);
		if (it != c->pool.cached.end()) { // the first to be freed is the likeliest to be free of work
			b = take_front(c->pool, it);
			c->pool.reuses++;
		}
	}
	const bool reused = b.p;
	if (!reused) MARGO_TRY(fresh(c, bytes, b));
	margo_status s = MARGO_OK;
	if ((c->flags & 1) || (reused && gpu::emulated)) s = poison(c, b.p, b.size, b.marks); // what a buffer held before must not look like a result
	if (s == MARGO_OK) s = order(c, b.marks);
	if (s != MARGO_OK) {
		give_back(c, b);
		return s;
	}
	b.bytes = bytes, b.marks.clear();
	*out = reinterpret_cast<uintptr_t>(b.p);
	std::lock_guard<std::mutex> lock(c->pool.mu);
	margo_pool &p = c->pool;
	p.allocs++;
	p.held_bytes += bytes;
	p.held_peak = std::max(p.held_peak, p.held_bytes);
	p.held[*out] = std::move(b);
	return MARGO_OK;
}

margo_status pool_free(margo_context *c, uint64_t address) {
	Relaxed relaxed;
	margo_block b;
	uint64_t capacity;
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		capacity = c->pool.capacity;
		auto it = c->pool.held.find(address);
		if (it != c->pool.held.end()) {
			b = std::move(it->second);
			c->pool.held.erase(it);
			c->pool.held_bytes -= b.bytes;
		}
	}
	if (!b.p) return fail(c, MARGO_INVALID, "freeing memory that is not held");
	if (b.size > capacity) { // also where nothing is cached
		margo_status s = wait_all(c, "waiting before memory is freed"), freed = give_back(c, b);
		return s != MARGO_OK ? s : freed;
	}
	if (margo_status s = mark_streams(c, b.marks); s != MARGO_OK) { // the device has failed
		b.marks.clear();
		give_back(c, b);
		return s;
	}
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		b.age = c->pool.age++;
		c->pool.cached_bytes += b.size;
		c->pool.cached[b.size].push_back(std::move(b));
	}
	return shrink(c, nullptr, [](margo_pool &p) { return p.cached_bytes <= p.capacity; });
}

margo_status pool_policy(margo_context *c, uint64_t limit, uint64_t capacity) {
	Relaxed relaxed;
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		c->pool.limit = limit, c->pool.capacity = capacity;
	}
	return shrink(c, nullptr, [](margo_pool &p) { return p.cached_bytes <= p.capacity; });
}

margo_status pool_trim(margo_context *c) {
	Relaxed relaxed;
	return shrink(c, nullptr, [](margo_pool &) { return false; });
}

uint64_t pool_make_room(margo_context *c) {
	Relaxed relaxed;
	cudaGetLastError(); // that of the call
	uint64_t given = 0;
	shrink(c, &given, [](margo_pool &) { return false; }); // an error comes again with the call
	return given;
}

margo_status pool_no_room(margo_context *c, const char *what, uint64_t given) {
	return out_of_memory(c, (std::string(what) + ": memory for the driver's own use").c_str(), given);
}

margo_status pool_library(margo_context *c, const char *what, uint64_t bytes) {
	Relaxed relaxed;
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		c->pool.taken += bytes, c->pool.libraries += bytes;
	}
	uint64_t given = 0;
	margo_status s = shrink(c, &given, [](margo_pool &p) { return !p.limit || p.taken <= p.limit; });
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		margo_pool &p = c->pool;
		if (s == MARGO_OK && (!p.limit || p.taken <= p.limit)) {
			p.taken_peak = std::max(p.taken_peak, p.taken);
			return MARGO_OK;
		}
		p.taken -= bytes, p.libraries -= bytes;
	}
	if (s != MARGO_OK) return s;
	char asked[160];
	snprintf(asked, sizeof asked, "%s: %.1f MiB", what, mib(bytes));
	return out_of_memory(c, asked, given);
}

void pool_library_gave(margo_context *c, uint64_t bytes) {
	std::lock_guard<std::mutex> lock(c->pool.mu);
	c->pool.taken -= bytes, c->pool.libraries -= bytes;
}

margo_status pool_new_stream(margo_context *c, cudaStream_t s) {
	margo_marks marks;
	{
		std::lock_guard<std::mutex> lock(c->capture_mu);
		if (!c->reused) return MARGO_OK;
	}
	Relaxed relaxed;
	MARGO_TRY(mark_streams(c, marks));
	for (auto &m : marks) MARGO_TRY(check(c, cudaStreamWaitEvent(s, m->e, 0), "making a stream"));
	return MARGO_OK;
}

void pool_waited(margo_stream *st) {
	std::lock_guard<std::mutex> lock(st->ctx->capture_mu);
	if (st->capturing) return;
	st->busy.store(false);
	st->mark.reset();
}

void pool_close(margo_context *c) {
	Relaxed relaxed;
	pool_trim(c);
	c->fill_mark.reset();
	for (auto &h : c->pool.held) cudaFree(h.second.p); // leaks, which the caller reports
	for (auto &p : c->pool.pinned) cudaFreeHost(p.second);
}

void pool_counters(margo_context *c, margo_counters *out) {
	std::lock_guard<std::mutex> lock(c->pool.mu);
	const margo_pool &p = c->pool;
	out->allocs = p.allocs, out->bytes_allocated = p.held_bytes, out->bytes_peak = p.held_peak;
	out->device_allocs = p.device_allocs, out->reuses = p.reuses, out->trims = p.trims;
	out->bytes_cached = p.cached_bytes, out->bytes_taken = p.taken, out->bytes_taken_peak = p.taken_peak;
	out->bytes_pinned = p.pinned_bytes, out->limit = p.limit, out->capacity = p.capacity;
	out->bytes_libraries = p.libraries;
}

// ---- pinned memory -------------------------------------------------------------

margo_status pinned_take(margo_context *c, uint64_t bytes, void **out, uint64_t *got) {
	uint64_t size = 4096;
	while (size < bytes) size *= 2;
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		auto it = c->pool.pinned.find(size);
		if (it != c->pool.pinned.end()) {
			*out = it->second, *got = size;
			c->pool.pinned.erase(it);
			c->pool.pinned_cached -= size;
			return MARGO_OK;
		}
	}
	Relaxed relaxed;
	cudaError_t e = cudaHostAlloc(out, size, cudaHostAllocDefault);
	if (e == cudaErrorMemoryAllocation) { // the host's memory: what closed streams have left goes back
		cudaGetLastError();
		std::multimap<uint64_t, void *> left;
		{
			std::lock_guard<std::mutex> lock(c->pool.mu);
			left.swap(c->pool.pinned);
			c->pool.pinned_bytes -= c->pool.pinned_cached;
			c->pool.pinned_cached = 0;
		}
		wait_collectives(c);
		for (auto &p : left) cudaFreeHost(p.second);
		e = cudaHostAlloc(out, size, cudaHostAllocDefault);
	}
	if (e == cudaErrorMemoryAllocation) {
		cudaGetLastError();
		std::unique_lock<std::mutex> lock(c->pool.mu);
		const uint64_t pinned = c->pool.pinned_bytes;
		lock.unlock();
		return fail(c, MARGO_OUT_OF_MEMORY, "%.1f MiB of pinned host memory asked, %.1f MiB held", mib(size), mib(pinned));
	}
	MARGO_TRY(check(c, e, "allocating pinned memory"));
	*got = size;
	std::lock_guard<std::mutex> lock(c->pool.mu);
	c->pool.pinned_bytes += size;
	return MARGO_OK;
}

void pinned_give(margo_context *c, void *p, uint64_t size) {
	{
		std::lock_guard<std::mutex> lock(c->pool.mu);
		if (c->pool.pinned_cached + size <= kPinnedCache) {
			c->pool.pinned.emplace(size, p);
			c->pool.pinned_cached += size;
			return;
		}
		c->pool.pinned_bytes -= size;
	}
	Relaxed relaxed;
	wait_collectives(c);
	cudaFreeHost(p);
}
