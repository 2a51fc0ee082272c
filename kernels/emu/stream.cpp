// stream.cpp: queues of work, events, and the order in which work runs.
//
// Without a seed a wait runs only what it needs, so that a dependency which was
// not declared shows as work that has not been done yet; with one, any stream's
// next piece may run first.
#include <chrono>
#include <thread>

#include "state.h"

namespace emu {

namespace {

constexpr size_t kMost = 1024; // pieces of work that a stream holds before it runs some

double now_ms() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool runnable(const emu_stream &s) {
	if (s.queue.empty()) return false;
	for (auto &t : s.queue.front().waits)
		if (!t.reached()) return false;
	return !s.queue.front().can || s.queue.front().can();
}

// waits_for_ranks: what the stream needs next is a collective for which other ranks have to come.
bool waits_for_ranks(emu_stream *s) {
	while (s && !s->queue.empty() && !s->queue.front().can) {
		emu_stream *next = nullptr;
		for (auto &t : s->queue.front().waits)
			if (!t.reached()) next = t.stream.get();
		s = next;
	}
	return s && !s->queue.empty();
}

// needed follows the waits of a stream to one whose next piece can run.
emu_stream *needed(emu_stream *s) {
	while (s && !s->queue.empty() && !runnable(*s)) {
		emu_stream *next = nullptr;
		for (auto &t : s->queue.front().waits)
			if (!t.reached()) next = t.stream.get();
		s = next;
	}
	return s && !s->queue.empty() ? s : nullptr;
}

uint64_t draw() {
	State &s = state();
	s.random = s.random * 6364136223846793005ull + 1442695040888963407ull;
	return s.random >> 33;
}

emu_stream *choose(emu_stream *prefer) {
	State &s = state();
	if (s.settings.seed) {
		std::vector<emu_stream *> can;
		for (auto &st : s.streams)
			if (runnable(*st)) can.push_back(st.get());
		return can.empty() ? nullptr : can[draw() % can.size()];
	}
	if (prefer)
		if (emu_stream *n = needed(prefer)) return n;
	for (auto &st : s.streams)
		if (emu_stream *n = needed(st.get())) return n;
	return nullptr;
}

// perform runs one piece (of a graph: one node) of a stream. Called with both mutexes, runs with run_mu.
void perform(emu_stream *s, std::unique_lock<std::mutex> &lock) {
	State &st = state();
	Item &i = s->queue.front(); // a deque's front stays where it is while others push
	auto finish = [&] {
		s->queue.pop_front();
		s->done++;
	};
	if (!i.waits.empty()) return finish();
	if (i.mark) {
		i.mark->done = true, i.mark->ms = now_ms();
		return finish();
	}
	const Item *work = &i;
	if (i.graph) {
		if (!i.begun) {
			i.begun = true;
			for (size_t n = 0; n < i.graph->nodes.size(); n++) i.left.push_back(int(n));
		}
		if (i.left.empty()) return finish();
		size_t at = 0;
		if (st.settings.seed) { // any node whose predecessors have run
			std::vector<size_t> can;
			for (size_t k = 0; k < i.left.size(); k++) {
				bool free = true;
				for (int p : i.graph->nodes[size_t(i.left[k])].after)
					for (size_t j = 0; j < k; j++) free = free && i.left[j] != p;
				if (free) can.push_back(k);
			}
			at = can[draw() % can.size()];
		}
		work = &i.graph->nodes[size_t(i.left[at])].item;
		i.left.erase(i.left.begin() + std::ptrdiff_t(at));
	}
	const int device = s->device;
	const bool last = !i.graph || i.left.empty();
	lock.unlock();
	if (i.step) {
		bool ended = i.step();
		lock.lock();
		if (st.devices[size_t(device)].error != cudaSuccess)
			drop_work(device);
		else if (ended)
			finish();
		return;
	}
	if (work->launch) run_launch(*work->launch, device);
	if (work->act) work->act();
	lock.lock();
	if (st.devices[size_t(device)].error != cudaSuccess)
		drop_work(device);
	else if (last)
		finish();
}

} // namespace

bool Ticket::reached() const { return !stream || stream->done >= at; }

std::shared_ptr<emu_stream> find_stream(cudaStream_t p) {
	State &s = state();
	if (!p) return s.streams[size_t(current_device())];
	for (auto &st : s.streams)
		if (st.get() == p) return st;
	return nullptr;
}

cudaError_t push(const std::shared_ptr<emu_stream> &s, Item item) {
	if (s->capture) {
		Capture &c = *s->capture;
		if (c.invalid) return cudaErrorStreamCaptureInvalidated;
		int n = int(c.graph->nodes.size());
		c.graph->nodes.push_back({std::move(item), s->frontier});
		s->frontier = {n};
		return cudaSuccess;
	}
	auto add = [](emu_stream *to, Item i) {
		to->queue.push_back(std::move(i));
		to->enqueued++;
	};
	// The null stream waits for the blocking streams of its device, and they for it.
	if (!(s->flags & cudaStreamNonBlocking)) {
		Item before;
		bool null = s->number < 0;
		for (auto &o : state().streams)
			if (o != s && o->device == s->device && !(o->flags & cudaStreamNonBlocking) && (null || o->number < 0) && o->done < o->enqueued)
				before.waits.push_back({o, o->enqueued});
		if (!before.waits.empty()) add(s.get(), std::move(before));
	}
	add(s.get(), std::move(item));
	return cudaSuccess;
}

void drop_work(int device) {
	for (auto &s : state().streams)
		if (s->device == device) {
			for (auto &i : s->queue)
				if (i.mark) i.mark->done = true;
			s->queue.clear();
			s->done = s->enqueued;
		}
}

void drive(emu_stream *prefer, const std::function<bool()> &done) {
	State &s = state();
	{
		std::lock_guard<std::mutex> lock(s.mu);
		if (done()) return;
	}
	std::unique_lock<std::mutex> run(s.run_mu);
	std::unique_lock<std::mutex> lock(s.mu);
	while (!done()) {
		emu_stream *next = choose(prefer);
		if (next) {
			perform(next, lock);
			continue;
		}
		if (!waits_for_ranks(prefer)) return;
		lock.unlock();
		run.unlock(); // other ranks may be threads of this process
		std::this_thread::sleep_for(std::chrono::microseconds(50));
		run.lock();
		lock.lock();
	}
}

void settle() {
	State &s = state();
	std::vector<std::shared_ptr<emu_stream>> full;
	{
		std::lock_guard<std::mutex> lock(s.mu);
		for (auto &st : s.streams)
			if (st->queue.size() > kMost) full.push_back(st);
	}
	for (auto &st : full) drive(st.get(), [&] { return st->queue.size() <= kMost / 2; });
}

cudaError_t synchronize(emu_stream *s) {
	State &st = state();
	std::vector<Ticket> until;
	int device = s ? s->device : current_device();
	{
		std::lock_guard<std::mutex> lock(st.mu);
		if (!st.ready) read_settings();
		if (size_t(device) >= st.devices.size()) return cudaErrorInvalidDevice;
		for (auto &o : st.streams)
			if (o->device == device && (!s || o.get() == s)) until.push_back({o, o->enqueued});
	}
	for (auto &t : until) drive(t.stream.get(), [&] { return t.reached(); });
	std::lock_guard<std::mutex> lock(st.mu);
	return st.devices[size_t(device)].error;
}

namespace {
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
}

cudaError_t unsafe_in_capture() {
	if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
	cudaError_t e = cudaSuccess;
	for (auto &s : state().streams)
		if (s->capture && (s->capture->mode == cudaStreamCaptureModeGlobal || (s->capture->mode == cudaStreamCaptureModeThreadLocal && s->capture->thread == std::this_thread::get_id()))) {
			s->capture->invalid = true;
			e = cudaErrorStreamCaptureUnsupported;
		}
	return e;
}

} // namespace emu

using namespace emu;

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
	std::swap(thread_mode, *mode);
	return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	if (!reserve(current_device(), state().settings.takes.stream)) return note(cudaErrorMemoryAllocation);
	auto s = std::make_shared<emu_stream>(current_device(), state().next_stream++, flags);
	state().streams.push_back(s);
	*out = s.get();
	return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithFlags(out, cudaStreamDefault); }

cudaError_t cudaStreamDestroy(cudaStream_t p) {
	std::shared_ptr<emu_stream> s;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		if (!p || !(s = find_stream(p))) return note(cudaErrorInvalidResourceHandle);
	}
	cudaError_t e = synchronize(s.get()); // a real one ends by itself later; nothing can tell the difference
	std::lock_guard<std::mutex> lock(state().mu);
	if (std::erase(state().streams, s)) unreserve(s->device, state().settings.takes.stream);
	return note(e);
}

cudaError_t cudaStreamSynchronize(cudaStream_t p) {
	std::shared_ptr<emu_stream> s;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		if (!(s = find_stream(p))) return note(cudaErrorInvalidResourceHandle);
		if (s->capture) {
			s->capture->invalid = true;
			return note(cudaErrorStreamCaptureUnsupported);
		}
	}
	return note(synchronize(s.get()));
}

cudaError_t cudaStreamQuery(cudaStream_t p) {
	std::shared_ptr<emu_stream> s;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		if (!(s = find_stream(p))) return note(cudaErrorInvalidResourceHandle);
		if (s->capture) {
			s->capture->invalid = true;
			return note(cudaErrorStreamCaptureUnsupported);
		}
	}
	int asked = 0; // before it and before its first piece of work: one of progress, so that polling ends
	drive(s.get(), [&] { return s->queue.empty() || asked++ > 1; });
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	return e != cudaSuccess ? note(e) : s->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t p, cudaEvent_t ev, unsigned) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	auto s = find_stream(p);
	if (!s || !state().events.count(ev)) return note(cudaErrorInvalidResourceHandle);
	if (ev->capture) {
		if (s->capture && s->capture != ev->capture) return note(cudaErrorStreamCaptureIsolation);
		if (!s->capture) {
			s->capture = ev->capture, s->frontier = ev->nodes;
			ev->capture->streams.push_back(s);
			return cudaSuccess;
		}
		for (int n : ev->nodes) {
			bool has = false;
			for (int m : s->frontier) has = has || m == n;
			if (!has) s->frontier.push_back(n);
		}
		return cudaSuccess;
	}
	if (s->capture) {
		s->capture->invalid = true;
		return note(cudaErrorStreamCaptureIsolation);
	}
	if (!ev->recorded.stream || ev->recorded.reached()) return cudaSuccess;
	Item i;
	i.waits.push_back(ev->recorded);
	return note(push(s, std::move(i)));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	if (!reserve(current_device(), state().settings.takes.event)) return note(cudaErrorMemoryAllocation);
	auto ev = std::make_shared<emu_event>(emu_event{current_device(), flags, {}, {}, {}, {}});
	state().events[ev.get()] = ev;
	*out = ev.get();
	return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t ev) {
	std::lock_guard<std::mutex> lock(state().mu);
	auto it = state().events.find(ev);
	if (it == state().events.end()) return note(cudaErrorInvalidResourceHandle);
	unreserve(it->second->device, state().settings.takes.event);
	state().events.erase(it);
	return note(usable());
}

cudaError_t cudaEventRecord(cudaEvent_t ev, cudaStream_t p) {
	std::unique_lock<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	auto s = find_stream(p);
	if (!s || !state().events.count(ev)) return note(cudaErrorInvalidResourceHandle);
	if (s->device != ev->device) return note(cudaErrorInvalidResourceHandle);
	if (s->capture) {
		ev->capture = s->capture, ev->nodes = s->frontier;
		return cudaSuccess;
	}
	ev->capture = nullptr;
	ev->mark = std::make_shared<Mark>();
	Item i;
	i.mark = ev->mark;
	e = push(s, std::move(i));
	ev->recorded = {s, s->enqueued};
	if (const int64_t slow = state().settings.slow_record) { // other threads go on meanwhile
		lock.unlock();
		std::this_thread::sleep_for(std::chrono::milliseconds(slow));
		lock.lock();
	}
	return note(e);
}

cudaError_t cudaEventSynchronize(cudaEvent_t ev) {
	Ticket t;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		if (!state().events.count(ev)) return note(cudaErrorInvalidResourceHandle);
		if (ev->capture) {
			ev->capture->invalid = true;
			return note(cudaErrorStreamCaptureUnsupported);
		}
		t = ev->recorded;
	}
	if (t.stream) drive(t.stream.get(), [&] { return t.reached(); });
	std::lock_guard<std::mutex> lock(state().mu);
	return note(usable());
}

cudaError_t cudaEventQuery(cudaEvent_t ev) {
	Ticket t;
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		if (!state().events.count(ev)) return note(cudaErrorInvalidResourceHandle);
		t = ev->recorded;
	}
	int asked = 0;
	if (t.stream) drive(t.stream.get(), [&] { return t.reached() || asked++ > 1; });
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	return e != cudaSuccess ? note(e) : t.reached() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	if (!state().events.count(from) || !state().events.count(to) || !from->mark || !to->mark) return note(cudaErrorInvalidResourceHandle);
	if ((from->flags | to->flags) & cudaEventDisableTiming) return note(cudaErrorInvalidResourceHandle);
	if (!from->mark->done || !to->mark->done) return note(cudaErrorNotReady);
	*ms = float(to->mark->ms - from->mark->ms);
	return cudaSuccess;
}
