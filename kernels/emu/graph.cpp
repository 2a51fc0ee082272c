// graph.cpp: captured work. A captured stream adds nodes instead of running them;
// events carry the capture to other streams and back.
#include "state.h"

using namespace emu;

namespace {

std::map<cudaGraph_t, std::shared_ptr<emu_graph>> &graphs() {
	static auto *m = new std::map<cudaGraph_t, std::shared_ptr<emu_graph>>;
	return *m;
}
std::map<cudaGraphExec_t, std::shared_ptr<emu_graph_exec>> &execs() {
	static auto *m = new std::map<cudaGraphExec_t, std::shared_ptr<emu_graph_exec>>;
	return *m;
}

// joined: the last nodes of every stream come before the last ones of the origin.
bool joined(const Capture &c) {
	std::vector<bool> before(c.graph->nodes.size());
	std::vector<int> todo = c.origin->frontier;
	while (!todo.empty()) {
		int n = todo.back();
		todo.pop_back();
		if (before[size_t(n)]) continue;
		before[size_t(n)] = true;
		for (int p : c.graph->nodes[size_t(n)].after) todo.push_back(p);
	}
	for (auto &s : c.streams)
		for (int n : s->frontier)
			if (!before[size_t(n)]) return false;
	return true;
}

} // namespace

cudaError_t cudaStreamBeginCapture(cudaStream_t p, cudaStreamCaptureMode mode) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	auto s = find_stream(p);
	if (!s) return note(cudaErrorInvalidResourceHandle);
	if (!p || s->capture) return note(cudaErrorStreamCaptureUnsupported); // the null stream cannot be captured
	auto c = std::make_shared<Capture>();
	c->graph = std::make_shared<emu_graph>(), c->origin = s.get(), c->mode = mode, c->thread = std::this_thread::get_id();
	c->streams.push_back(s);
	s->capture = c, s->frontier.clear();
	return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t p, cudaGraph_t *out) {
	std::lock_guard<std::mutex> lock(state().mu);
	*out = nullptr;
	cudaError_t e = usable();
	auto s = find_stream(p);
	if (!s) return note(cudaErrorInvalidResourceHandle);
	if (!s->capture) return note(cudaErrorInvalidValue);
	auto c = s->capture;
	if (c->origin != s.get()) return note(cudaErrorStreamCaptureUnmatched);
	if (e == cudaSuccess) e = c->invalid ? cudaErrorStreamCaptureInvalidated : joined(*c) ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
	if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id()) e = cudaErrorStreamCaptureWrongThread;
	for (auto &o : c->streams) o->capture = nullptr, o->frontier.clear();
	for (auto &ev : state().events)
		if (ev.second->capture == c) ev.second->capture = nullptr, ev.second->nodes.clear();
	if (e != cudaSuccess) return note(e);
	graphs()[c->graph.get()] = c->graph;
	*out = c->graph.get();
	return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t p, cudaStreamCaptureStatus *out) {
	std::lock_guard<std::mutex> lock(state().mu);
	auto s = find_stream(p);
	if (!s) return note(cudaErrorInvalidResourceHandle);
	*out = !s->capture ? cudaStreamCaptureStatusNone : s->capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
	return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long) {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t e = usable();
	if (e != cudaSuccess) return note(e);
	auto it = graphs().find(g);
	if (it == graphs().end()) return note(cudaErrorInvalidValue);
	const int device = current_device();
	const size_t bytes = state().settings.takes.node * it->second->nodes.size();
	if (!reserve(device, bytes)) return note(cudaErrorMemoryAllocation);
	auto x = std::make_shared<emu_graph_exec>(it->second, device, bytes);
	execs()[x.get()] = x;
	*out = x.get();
	return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t p) {
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e != cudaSuccess) return note(e);
		auto s = find_stream(p);
		auto it = execs().find(x);
		if (!s || it == execs().end()) return note(cudaErrorInvalidValue);
		if (s->capture) return note(cudaErrorNotSupported); // child graphs
		Item i;
		i.graph = it->second->graph;
		trace("graph nodes=%zu stream=%d\n", i.graph->nodes.size(), s->number);
		e = push(s, std::move(i));
		if (e != cudaSuccess) return note(e);
	}
	settle();
	return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) {
	std::lock_guard<std::mutex> lock(state().mu);
	auto it = graphs().find(g);
	if (it == graphs().end()) return note(cudaErrorInvalidValue);
	auto &have = it->second->nodes;
	if (nodes)
		for (size_t i = 0; i < *count && i < have.size(); i++) nodes[i] = &have[i];
	*count = have.size();
	return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
	std::lock_guard<std::mutex> lock(state().mu);
	auto it = execs().find(x);
	if (it == execs().end()) return note(cudaErrorInvalidValue);
	unreserve(it->second->device, it->second->bytes);
	execs().erase(it);
	return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t g) {
	std::lock_guard<std::mutex> lock(state().mu);
	return note(graphs().erase(g) ? cudaSuccess : cudaErrorInvalidValue);
}
