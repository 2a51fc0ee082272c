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

// What is used of nvml.h, as facts; `make abi-check` compares them with the real header. An enumeration is
// passed like an int, a device is a pointer to what only NVML knows.
// F(result, name, arguments)
#define M_NVML(F)                                                                                                    \
	F(int, nvmlInit_v2, (void))                                                                                      \
	F(int, nvmlShutdown, (void))                                                                                     \
	F(const char *, nvmlErrorString, (int))                                                                          \
	F(int, nvmlSystemGetDriverVersion, (char *, uint32_t bytes))                                                     \
	F(int, nvmlDeviceGetHandleByPciBusId_v2, (const char *, void **))                                                \
	F(int, nvmlDeviceGetUtilizationRates, (void *, m_nvml_busy *))                                                   \
	F(int, nvmlDeviceGetMemoryInfo, (void *, m_nvml_memory *))                                                       \
	F(int, nvmlDeviceGetTotalEnergyConsumption, (void *, unsigned long long *))                                      \
	F(int, nvmlDeviceGetCurrentClocksEventReasons, (void *, unsigned long long *))                                   \
	F(int, nvmlDeviceGetCurrentClocksThrottleReasons, (void *, unsigned long long *)) /* its name before driver 535 */ \
	F(int, nvmlDeviceGetPowerUsage, (void *, uint32_t *))                                                            \
	F(int, nvmlDeviceGetEnforcedPowerLimit, (void *, uint32_t *))                                                    \
	F(int, nvmlDeviceGetClockInfo, (void *, int domain, uint32_t *))                                                 \
	F(int, nvmlDeviceGetMaxClockInfo, (void *, int domain, uint32_t *))                                              \
	F(int, nvmlDeviceGetTemperature, (void *, int sensor, uint32_t *))
typedef struct m_nvml_memory { unsigned long long total, free, used; } m_nvml_memory;
typedef struct m_nvml_busy { uint32_t gpu, memory; } m_nvml_busy;
#define M_F(result, name, arguments) typedef result(*m_##name) arguments;
M_NVML(M_F)
#undef M_F
enum { NV_NOT_SUPPORTED = 3, NV_CLOCK_SM = 1, NV_CLOCK_MEM = 2, NV_SENSOR_CHIP = 0 };
enum { // why clocks are held
	NV_WHY_IDLE = 1, NV_WHY_APPLICATION = 2, NV_WHY_SW_POWER = 4, NV_WHY_HW_SLOWDOWN = 8, NV_WHY_SYNC_BOOST = 16,
	NV_WHY_SW_THERMAL = 32, NV_WHY_HW_THERMAL = 64, NV_WHY_POWER_BRAKE = 128, NV_WHY_DISPLAY = 256,
	NV_WHY_BOARD = 512, NV_WHY_RELIABILITY = 1024
};

// m_nvml_read fills *out for the device at a PCI address; 0, or NVML's error code (-1: no
// library, or none that is NVML) with a text in err. Each call opens NVML and closes it: the
// library counts its users, and margo keeps no state of it.
static inline int m_nvml_read(const char *library, const char *pci, m_health *out, char *err, size_t bytes) {
	void *h = dlopen(library, RTLD_NOW | RTLD_LOCAL);
	if (!h) {
		snprintf(err, bytes, "%s", dlerror());
		return -1;
	}
#define M_F(result, name, arguments) m_##name name = (m_##name)dlsym(h, #name);
	M_NVML(M_F)
#undef M_F
	if (!nvmlInit_v2 || !nvmlShutdown || !nvmlErrorString || !nvmlSystemGetDriverVersion || !nvmlDeviceGetHandleByPciBusId_v2) {
		snprintf(err, bytes, "%s lacks functions of NVML", library);
		dlclose(h);
		return -1;
	}
	int r = nvmlInit_v2();
	if (r) {
		snprintf(err, bytes, "nvmlInit: %s (%d)", nvmlErrorString(r), r);
		dlclose(h);
		return r;
	}
	void *d = 0;
	if ((r = nvmlSystemGetDriverVersion(out->driver, sizeof out->driver)) || (r = nvmlDeviceGetHandleByPciBusId_v2(pci, &d))) {
		snprintf(err, bytes, "%s of %s: %s (%d)", !out->driver[0] ? "driver version" : "handle", pci, nvmlErrorString(r), r);
		nvmlShutdown();
		dlclose(h);
		return r;
	}
#define NV_SET(place, value) (out->v[place] = (value), out->have |= 1u << (place))
	m_nvml_busy b = {0, 0};
	if (nvmlDeviceGetUtilizationRates && !nvmlDeviceGetUtilizationRates(d, &b)) NV_SET(NV_GPU_BUSY, b.gpu), NV_SET(NV_MEMORY_BUSY, b.memory);
	m_nvml_memory m = {0, 0, 0};
	if (nvmlDeviceGetMemoryInfo && !nvmlDeviceGetMemoryInfo(d, &m)) NV_SET(NV_MEMORY_USED, m.used);
	unsigned long long wide = 0;
	if (nvmlDeviceGetTotalEnergyConsumption && !nvmlDeviceGetTotalEnergyConsumption(d, &wide)) NV_SET(NV_ENERGY, wide);
	if (!nvmlDeviceGetCurrentClocksEventReasons) nvmlDeviceGetCurrentClocksEventReasons = nvmlDeviceGetCurrentClocksThrottleReasons;
	if (nvmlDeviceGetCurrentClocksEventReasons && !nvmlDeviceGetCurrentClocksEventReasons(d, &wide)) NV_SET(NV_THROTTLE, wide);
	uint32_t v = 0;
	if (nvmlDeviceGetPowerUsage && !nvmlDeviceGetPowerUsage(d, &v)) NV_SET(NV_POWER, v);
	if (nvmlDeviceGetEnforcedPowerLimit && !nvmlDeviceGetEnforcedPowerLimit(d, &v)) NV_SET(NV_POWER_LIMIT, v);
	const struct { int (*get)(void *, int, uint32_t *); int of, place; } by_domain[] = {
		{nvmlDeviceGetClockInfo, NV_CLOCK_SM, NV_SM_CLOCK}, {nvmlDeviceGetMaxClockInfo, NV_CLOCK_SM, NV_SM_CLOCK_MAX},
		{nvmlDeviceGetClockInfo, NV_CLOCK_MEM, NV_MEMORY_CLOCK}, {nvmlDeviceGetMaxClockInfo, NV_CLOCK_MEM, NV_MEMORY_CLOCK_MAX},
		{nvmlDeviceGetTemperature, NV_SENSOR_CHIP, NV_TEMPERATURE},
	};
	for (size_t i = 0; i < sizeof by_domain / sizeof by_domain[0]; i++)
		if (by_domain[i].get && !by_domain[i].get(d, by_domain[i].of, &v)) NV_SET(by_domain[i].place, v);
#undef NV_SET
	nvmlShutdown();
	dlclose(h);
	return 0;
}
#endif
