// device.cpp: devices, their properties and errors, and the environment.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace emu {

namespace {

constexpr int kRuntime = 13000; // the version that the emulator stands for

thread_local cudaError_t last_error;
thread_local int device_of_thread;

std::mutex report_mu;
const char *report_text = "";

int64_t number(const char *name, int64_t otherwise) {
	const char *v = getenv(name);
	if (!v || !*v) return otherwise;
	return strtoll(v, nullptr, 0);
}

// read_takes reads NAME:BYTES,…; what it does not know it leaves out.
Takes read_takes(const char *text) {
	Takes t;
	const std::pair<const char *, size_t *> names[] = {{"stream", &t.stream}, {"event", &t.event}, {"graph", &t.node}, {"kernel", &t.kernel},
	                                                   {"nccl", &t.nccl}, {"connect", &t.connect}, {"cublaslt", &t.cublaslt}};
	while (text && *text) {
		for (auto &[name, to] : names)
			if (const size_t n = strlen(name); !strncmp(text, name, n) && text[n] == ':') *to = size_t(strtoull(text + n + 1, nullptr, 0));
		text = strchr(text, ',');
		if (text) text++;
	}
	return t;
}

} // namespace

State &state() {
	static State *s = new State; // never destroyed: threads may outlive main
	return *s;
}

cudaError_t note(cudaError_t e) {
	if (e != cudaSuccess) last_error = e;
	return e;
}

int current_device() { return device_of_thread; }

void set_report(const std::string &s) {
	std::lock_guard<std::mutex> lock(report_mu);
	report_text = s.empty() ? "" : strdup(s.c_str()); // kept for ever: readers hold no lock
}

void read_settings() {
	State &s = state();
	bool idle = true;
	for (auto &st : s.streams) idle = idle && st->number < 0 && st->queue.empty();
	if (s.ready && (!s.memory.empty() || !s.events.empty() || !idle)) return;
	Settings &v = s.settings;
	v = Settings{};
	v.devices = int(number("MARGO_EMU_DEVICES", 1));
	v.cc = int(number("MARGO_EMU_CC", 80));
	v.built_for = int(number("MARGO_EMU_BUILT_FOR", 80));
	v.sms = int(number("MARGO_EMU_SMS", 4));
	v.driver = int(number("MARGO_EMU_DRIVER", kRuntime));
	v.memory = size_t(number("MARGO_EMU_MEMORY", int64_t(8) << 30));
	v.seed = uint64_t(number("MARGO_EMU_SEED", 0));
	v.threads = int(number("MARGO_EMU_THREADS", v.seed ? 1 : 2));
	v.run = number("MARGO_EMU_RUN", 1) != 0;
	v.fail_alloc = number("MARGO_EMU_FAIL_ALLOC", -1);
	v.lose_device = number("MARGO_EMU_LOSE_DEVICE", -1);
	v.slow_record = number("MARGO_EMU_SLOW_RECORD", 0);
	v.takes = read_takes(getenv("MARGO_EMU_TAKES"));
	if (const char *p = getenv("MARGO_EMU_SHARED")) v.shared = p;
	if (const char *t = getenv("MARGO_EMU_TRACE")) v.trace = t;
	if (const char *t = getenv("MARGO_EMU_REPORT")) v.report = t;
	if (check::on) v.threads = 1; // its clocks are those of one worker
	if (v.devices < 0 || v.devices > 64) v.devices = 1;
	if (v.sms < 1) v.sms = 1;
	if (v.threads < 1 || v.threads > 64) v.threads = 1;
	s.allocations = s.launches = 0;
	s.random = v.seed;
	s.devices.assign(size_t(v.devices), Device{}); // nothing is held: as a new process finds it
	share_open(v.shared);
	s.streams.clear();
	for (int i = 0; i < v.devices; i++) s.streams.push_back(std::make_shared<emu_stream>(i, -1, cudaStreamDefault));
	set_report("");
	s.ready = true;
}

cudaError_t usable() {
	State &s = state();
	if (!s.ready) read_settings();
	if (s.settings.driver / 1000 < kRuntime / 1000) return cudaErrorInsufficientDriver;
	if (s.settings.devices == 0) return cudaErrorNoDevice;
	if (device_of_thread >= s.settings.devices) return cudaErrorInvalidDevice;
	return s.devices[size_t(device_of_thread)].error;
}

const char *base_name(const char *path) {
	if (!path || !*path) return "?";
	const char *slash = strrchr(path, '/');
	return slash ? slash + 1 : path;
}

std::string text(const char *format, ...) {
	char buffer[1024];
	va_list args;
	va_start(args, format);
	vsnprintf(buffer, sizeof buffer, format, args);
	va_end(args);
	return buffer;
}

void trace(const char *format, ...) {
	const std::string &path = state().settings.trace;
	if (path.empty()) return;
	FILE *f = fopen(path.c_str(), "a");
	if (!f) return;
	va_list args;
	va_start(args, format);
	vfprintf(f, format, args);
	va_end(args);
	fclose(f);
}

} // namespace emu

using namespace emu;

const char *emu_last_report() {
	std::lock_guard<std::mutex> lock(report_mu);
	return report_text;
}

const char *cudaGetErrorName(cudaError_t e) {
	switch (e) {
#define NAME(x) case x: return #x
	NAME(cudaSuccess);
	NAME(cudaErrorInvalidValue);
	NAME(cudaErrorMemoryAllocation);
	NAME(cudaErrorInitializationError);
	NAME(cudaErrorInvalidConfiguration);
	NAME(cudaErrorInsufficientDriver);
	NAME(cudaErrorInvalidDeviceFunction);
	NAME(cudaErrorNoDevice);
	NAME(cudaErrorInvalidDevice);
	NAME(cudaErrorNoKernelImageForDevice);
	NAME(cudaErrorUnsupportedPtxVersion);
	NAME(cudaErrorInvalidResourceHandle);
	NAME(cudaErrorNotReady);
	NAME(cudaErrorIllegalAddress);
	NAME(cudaErrorLaunchOutOfResources);
	NAME(cudaErrorLaunchTimeout);
	NAME(cudaErrorMisalignedAddress);
	NAME(cudaErrorLaunchFailure);
	NAME(cudaErrorCooperativeLaunchTooLarge);
	NAME(cudaErrorNotSupported);
	NAME(cudaErrorStreamCaptureUnsupported);
	NAME(cudaErrorStreamCaptureInvalidated);
	NAME(cudaErrorStreamCaptureUnmatched);
	NAME(cudaErrorStreamCaptureUnjoined);
	NAME(cudaErrorStreamCaptureIsolation);
	NAME(cudaErrorStreamCaptureWrongThread);
	NAME(cudaErrorUnknown);
#undef NAME
	}
	return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t e) {
	switch (e) {
	case cudaSuccess: return "no error";
	case cudaErrorInvalidValue: return "invalid argument";
	case cudaErrorMemoryAllocation: return "out of memory";
	case cudaErrorInitializationError: return "initialization error";
	case cudaErrorInvalidConfiguration: return "invalid configuration argument";
	case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
	case cudaErrorInvalidDeviceFunction: return "invalid device function";
	case cudaErrorNoDevice: return "no CUDA-capable device is detected";
	case cudaErrorInvalidDevice: return "invalid device ordinal";
	case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
	case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain";
	case cudaErrorInvalidResourceHandle: return "invalid resource handle";
	case cudaErrorNotReady: return "device not ready";
	case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
	case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
	case cudaErrorLaunchTimeout: return "the launch timed out and was terminated";
	case cudaErrorMisalignedAddress: return "misaligned address";
	case cudaErrorLaunchFailure: return "unspecified launch failure";
	case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
	case cudaErrorNotSupported: return "operation not supported";
	case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
	case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
	case cudaErrorStreamCaptureUnmatched: return "capture was not initiated in this stream";
	case cudaErrorStreamCaptureUnjoined: return "capture sequence contains unjoined work";
	case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
	case cudaErrorStreamCaptureWrongThread: return "attempt to terminate a thread-local capture sequence from another thread";
	case cudaErrorUnknown: return "unknown error";
	}
	return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() {
	std::lock_guard<std::mutex> lock(state().mu);
	cudaError_t sticky = state().ready ? usable() : cudaSuccess;
	return sticky != cudaSuccess ? sticky : last_error;
}

cudaError_t cudaGetLastError() {
	cudaError_t e = cudaPeekAtLastError();
	last_error = cudaSuccess;
	return e;
}

cudaError_t cudaGetDeviceCount(int *n) {
	std::lock_guard<std::mutex> lock(state().mu);
	read_settings();
	*n = 0;
	if (device_of_thread >= state().settings.devices) device_of_thread = 0;
	cudaError_t e = usable();
	if (e == cudaErrorInsufficientDriver || e == cudaErrorNoDevice) return note(e);
	*n = state().settings.devices;
	return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
	std::lock_guard<std::mutex> lock(state().mu);
	if (!state().ready) read_settings();
	if (device < 0 || device >= state().settings.devices) return note(state().settings.devices ? cudaErrorInvalidDevice : cudaErrorNoDevice);
	device_of_thread = device;
	return note(usable());
}

cudaError_t cudaGetDevice(int *device) {
	*device = device_of_thread;
	return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
	std::lock_guard<std::mutex> lock(state().mu);
	if (!state().ready) read_settings();
	const Settings &v = state().settings;
	if (device < 0 || device >= v.devices) return note(cudaErrorInvalidDevice);
	*p = cudaDeviceProp{};
	snprintf(p->name, sizeof p->name, "margo emulator%s", state().settings.run ? "" : " that runs no kernel");
	const bool hopper = v.cc >= 90 && v.cc < 120, ampere = v.cc == 80;
	p->totalGlobalMem = v.memory;
	p->sharedMemPerBlock = 48 << 10;
	p->sharedMemPerBlockOptin = size_t(hopper ? 227 : ampere ? 163 : 99) << 10;
	p->sharedMemPerMultiprocessor = size_t(hopper ? 228 : ampere ? 164 : 100) << 10;
	p->reservedSharedMemPerBlock = 1 << 10;
	p->regsPerBlock = p->regsPerMultiprocessor = 65536;
	p->warpSize = 32;
	p->maxThreadsPerBlock = 1024;
	p->maxThreadsPerMultiProcessor = hopper || ampere ? 2048 : 1536;
	p->maxBlocksPerMultiProcessor = hopper || ampere ? 32 : 24;
	p->major = v.cc / 10, p->minor = v.cc % 10;
	p->multiProcessorCount = v.sms;
	p->l2CacheSize = hopper ? 50 << 20 : 40 << 20;
	p->pciBusID = device + 1;
	p->cooperativeLaunch = p->concurrentKernels = 1;
	return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr a, int device) {
	cudaDeviceProp p;
	cudaError_t e = cudaGetDeviceProperties(&p, device);
	if (e != cudaSuccess) return e;
	switch (a) {
	case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; return cudaSuccess;
	case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(p.sharedMemPerBlock); return cudaSuccess;
	case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
	case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; return cudaSuccess;
	case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
	case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
	case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(p.sharedMemPerMultiprocessor); return cudaSuccess;
	case cudaDevAttrCooperativeLaunch: *value = p.cooperativeLaunch; return cudaSuccess;
	case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); return cudaSuccess;
	case cudaDevAttrClockRate:
	case cudaDevAttrMemoryClockRate:
	case cudaDevAttrGlobalMemoryBusWidth: *value = 0; return cudaSuccess; // an emulator has no clock
	}
	return note(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int bytes, int device) {
	cudaDeviceProp p;
	cudaError_t e = cudaGetDeviceProperties(&p, device);
	if (e != cudaSuccess) return e;
	if (bytes < 13) return note(cudaErrorInvalidValue);
	snprintf(out, size_t(bytes), "%04x:%02x:%02x.0", p.pciDomainID, p.pciBusID, p.pciDeviceID);
	return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *v) {
	std::lock_guard<std::mutex> lock(state().mu);
	if (!state().ready) read_settings();
	*v = state().settings.driver;
	return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *v) {
	*v = kRuntime;
	return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
	{
		std::lock_guard<std::mutex> lock(state().mu);
		cudaError_t e = usable();
		if (e == cudaSuccess) e = unsafe_in_capture();
		if (e != cudaSuccess) return note(e);
	}
	return note(synchronize(nullptr));
}

cudaError_t cudaDeviceReset() {
	std::lock_guard<std::mutex> run(state().run_mu);
	std::lock_guard<std::mutex> lock(state().mu);
	if (!state().ready) read_settings();
	int d = current_device();
	if (d >= state().settings.devices) return note(cudaErrorInvalidDevice);
	drop_work(d);
	state().devices[size_t(d)].error = cudaSuccess;
	set_report("");
	last_error = cudaSuccess;
	return cudaSuccess;
}
