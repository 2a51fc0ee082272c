// state.h: the runtime's state: devices, allocations, streams, events, graphs.
//
// State::mu guards all of it and is held briefly; State::run_mu is held while work
// executes, and is taken first. Kernels run with run_mu alone.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <set>
#include <thread>

#include "internal.h"

namespace emu {

struct Mark { // of an event's latest record
	bool done = false;
	double ms = 0;
};

// Ticket is a point in a stream: reached when all that was enqueued before has run.
struct Ticket {
	std::shared_ptr<emu_stream> stream;
	uint64_t at = 0;
	bool reached() const;
};

// Item is a piece of work in a stream or a node of a graph.
struct Item {
	std::shared_ptr<Launch> launch;         // a kernel
	std::function<void()> act;              // or a copy, a fill, the release of memory
	std::vector<Ticket> waits;              // or a wait
	std::shared_ptr<Mark> mark;             // or the record of an event
	std::shared_ptr<const emu_graph> graph; // or a graph
	std::vector<int> left;                  // nodes of the graph that have not run
	bool begun = false;
	// Or a collective: step does a part and is true after the last; can says whether it would get anywhere
	// now, for ranks of other threads or processes may have to come first.
	std::function<bool()> step, can;
};

struct Capture {
	std::shared_ptr<emu_graph> graph;
	emu_stream *origin;
	std::vector<std::shared_ptr<emu_stream>> streams;
	cudaStreamCaptureMode mode;
	std::thread::id thread; // that began it
	bool invalid = false;
};

struct Allocation {
	char *base; // as malloc gave it
	size_t bytes;
	int device; // -1: pinned host memory
};

struct Device {
	size_t used = 0; // by this process
	cudaError_t error = cudaSuccess; // sticky
	std::set<const void *> loaded; // kernels whose code is on the device
};

// Takes is what the driver and libraries take of the device's memory for their own objects: bytes of one.
struct Takes {
	size_t stream = 0, event = 0, node = 0, kernel = 0, nccl = 0, connect = 0, cublaslt = 0;
};

struct Settings { // from the environment
	int devices = 1, cc = 80, built_for = 80, sms = 4, driver = 13000, threads = 2;
	size_t memory = size_t(8) << 30;
	uint64_t seed = 0;
	bool run = true; // kernels; else they are checked and counted when launched, and memory stays poisoned
	int64_t fail_alloc = -1, lose_device = -1, slow_record = 0;
	Takes takes;
	std::string trace, report, shared;
};

struct State {
	std::mutex run_mu, mu;
	Settings settings;
	bool ready = false; // settings were read
	std::vector<Device> devices;
	std::map<uintptr_t, Allocation> memory; // by address
	std::vector<std::shared_ptr<emu_stream>> streams; // in order of creation; the first ones are the devices' null streams
	std::map<emu_event *, std::shared_ptr<emu_event>> events;
	std::map<const void *, int> smem_limit; // cudaFuncAttributeMaxDynamicSharedMemorySize
	int64_t allocations = 0, launches = 0;
	uint64_t runs = 0, random = 0;
	int next_stream = 0;
};

State &state();

// note keeps an error for cudaGetLastError and returns it.
cudaError_t note(cudaError_t);
int current_device();
// ready reads the environment at the first call; usable is the device's sticky error. Both under mu.
cudaError_t usable();
void read_settings();
void set_report(const std::string &);

std::shared_ptr<emu_stream> find_stream(cudaStream_t); // null: no such stream; under mu
// push appends work to a stream, or to the graph that it captures into. Under mu.
cudaError_t push(const std::shared_ptr<emu_stream> &, Item);
// drive runs work until done() holds, preferring what the stream needs. Neither mutex is held.
void drive(emu_stream *prefer, const std::function<bool()> &done);
void settle(); // lets streams that hold too much run; neither mutex is held
cudaError_t synchronize(emu_stream *); // null: all of the current device
void drop_work(int device); // under mu
bool device_memory(const void *, size_t bytes); // lies in one buffer of a device; under mu
// reserve takes bytes of a device's memory, false where they are not free; unreserve gives them back; free_memory is
// what other processes and this one have left. Under mu. Where processes share a device, share.cpp.
bool reserve(int device, size_t bytes);
void unreserve(int device, size_t bytes);
size_t free_memory(int device);
// share_open makes this process one of those that share the file's devices ("" ends that); share_set says what it has
// taken of a device, unless that and what others have is more than most (false), and sets others, if given.
void share_open(const std::string &path);
bool share_set(int device, size_t used, size_t most, size_t *others);
void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
void run_launch(const Launch &, int device);
// waiting is the error that a call which waits, or allocates, gets while the thread captures. Under mu.
cudaError_t unsafe_in_capture();

} // namespace emu

struct emu_graph_node {
	emu::Item item;
	std::vector<int> after;
};

struct emu_graph {
	std::vector<emu_graph_node> nodes;
};

struct emu_graph_exec {
	std::shared_ptr<const emu_graph> graph;
	int device;
	size_t bytes; // of the device's memory
};

struct emu_stream {
	int device, number;
	unsigned flags;
	uint64_t enqueued = 0, done = 0;
	std::deque<emu::Item> queue;
	std::shared_ptr<emu::Capture> capture;
	std::vector<int> frontier; // of the capture: nodes that the next one comes after
	emu_stream(int device, int number, unsigned flags) : device(device), number(number), flags(flags) {}
};

struct emu_event {
	int device;
	unsigned flags;
	emu::Ticket recorded;
	std::shared_ptr<emu::Mark> mark;
	std::shared_ptr<emu::Capture> capture;
	std::vector<int> nodes;
};
