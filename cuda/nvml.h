// nvml.h: reads a device's health from NVML, which comes with the driver and is
// opened at run time. Only functions that are in every version since 2013 are needed
// for a device to be found; a figure whose function or device lacks it is left out.
#ifndef MARGO_CUDA_NVML_H
#define MARGO_CUDA_NVML_H

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

// Bits of m_health.have, and the places of its values.
enum {
	NV_GPU_BUSY, NV_MEMORY_BUSY, // percent of the driver's last sample period
	NV_MEMORY_USED,              // bytes
	NV_POWER, NV_POWER_LIMIT,    // mW
	NV_ENERGY,                   // mJ since the driver was loaded
	NV_SM_CLOCK, NV_SM_CLOCK_MAX, NV_MEMORY_CLOCK, NV_MEMORY_CLOCK_MAX, // MHz
	NV_TEMPERATURE,              // degrees Celsius
	NV_THROTTLE,                 // bits: why clocks are lower than they could be
	NV_VALUES
};

typedef struct m_health {
	char driver[96];
	uint32_t have;
	uint64_t v[NV_VALUES];
} m_health;

// m_nvml_read fills *out for the device at a PCI address; 0, or NVML's error code (-1: no
// library, or none that is NVML) with a text in err. Each call opens NVML and closes it: the
// library counts its users, and margo keeps no state of it.
static inline int m_nvml_read(const char *library, const char *pci, m_health *out, char *err, size_t bytes) {
	typedef struct { uint64_t total, free, used; } memory;
	typedef struct { uint32_t gpu, memory; } busy;
	void *h = dlopen(library, RTLD_NOW | RTLD_LOCAL);
	if (!h) {
		snprintf(err, bytes, "%s", dlerror());
		return -1;
	}
	int (*init)(void) = (int (*)(void))dlsym(h, "nvmlInit_v2");
	int (*shutdown)(void) = (int (*)(void))dlsym(h, "nvmlShutdown");
	const char *(*text)(int) = (const char *(*)(int))dlsym(h, "nvmlErrorString");
	int (*driver)(char *, uint32_t) = (int (*)(char *, uint32_t))dlsym(h, "nvmlSystemGetDriverVersion");
	int (*find)(const char *, void **) = (int (*)(const char *, void **))dlsym(h, "nvmlDeviceGetHandleByPciBusId_v2");
	if (!init || !shutdown || !text || !driver || !find) {
		snprintf(err, bytes, "%s lacks functions of NVML", library);
		dlclose(h);
		return -1;
	}
	int r = init();
	if (r) {
		snprintf(err, bytes, "nvmlInit: %s (%d)", text(r), r);
		dlclose(h);
		return r;
	}
	void *d = 0;
	if ((r = driver(out->driver, sizeof out->driver)) || (r = find(pci, &d))) {
		snprintf(err, bytes, "%s of %s: %s (%d)", !out->driver[0] ? "driver version" : "handle", pci, text(r), r);
		shutdown();
		dlclose(h);
		return r;
	}
#define NV_SET(place, value) (out->v[place] = (value), out->have |= 1u << (place))
	int (*usage)(void *, busy *) = (int (*)(void *, busy *))dlsym(h, "nvmlDeviceGetUtilizationRates");
	busy b = {0, 0};
	if (usage && !usage(d, &b)) NV_SET(NV_GPU_BUSY, b.gpu), NV_SET(NV_MEMORY_BUSY, b.memory);
	int (*mem)(void *, memory *) = (int (*)(void *, memory *))dlsym(h, "nvmlDeviceGetMemoryInfo");
	memory m = {0, 0, 0};
	if (mem && !mem(d, &m)) NV_SET(NV_MEMORY_USED, m.used);
	uint64_t wide = 0;
	int (*energy)(void *, uint64_t *) = (int (*)(void *, uint64_t *))dlsym(h, "nvmlDeviceGetTotalEnergyConsumption");
	if (energy && !energy(d, &wide)) NV_SET(NV_ENERGY, wide);
	int (*why)(void *, uint64_t *) = (int (*)(void *, uint64_t *))dlsym(h, "nvmlDeviceGetCurrentClocksEventReasons");
	if (!why) why = (int (*)(void *, uint64_t *))dlsym(h, "nvmlDeviceGetCurrentClocksThrottleReasons"); // its name before driver 535
	if (why && !why(d, &wide)) NV_SET(NV_THROTTLE, wide);
	uint32_t v = 0;
	int (*one)(void *, uint32_t *) = (int (*)(void *, uint32_t *))dlsym(h, "nvmlDeviceGetPowerUsage");
	if (one && !one(d, &v)) NV_SET(NV_POWER, v);
	one = (int (*)(void *, uint32_t *))dlsym(h, "nvmlDeviceGetEnforcedPowerLimit");
	if (one && !one(d, &v)) NV_SET(NV_POWER_LIMIT, v);
	// Of a domain: clocks 1 (SM) and 2 (memory); temperature sensor 0 (the chip).
	static const struct { const char *name; uint32_t domain; int place; } by_domain[] = {
		{"nvmlDeviceGetClockInfo", 1, NV_SM_CLOCK}, {"nvmlDeviceGetMaxClockInfo", 1, NV_SM_CLOCK_MAX},
		{"nvmlDeviceGetClockInfo", 2, NV_MEMORY_CLOCK}, {"nvmlDeviceGetMaxClockInfo", 2, NV_MEMORY_CLOCK_MAX},
		{"nvmlDeviceGetTemperature", 0, NV_TEMPERATURE},
	};
	for (size_t i = 0; i < sizeof by_domain / sizeof by_domain[0]; i++) {
		int (*get)(void *, uint32_t, uint32_t *) = (int (*)(void *, uint32_t, uint32_t *))dlsym(h, by_domain[i].name);
		if (get && !get(d, by_domain[i].domain, &v)) NV_SET(by_domain[i].place, v);
	}
#undef NV_SET
	shutdown();
	dlclose(h);
	return 0;
}
#endif
