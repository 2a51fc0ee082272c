// nvml.cpp: compares cuda/nvml.h with the real header when it is compiled. The library itself comes with the driver.
#include "../../cuda/nvml.h"

#include <nvml.h>

#include <cstddef>

#include "same.h"

#define M_F(result, name, arguments) ABI_FUNCTION(m_##name, name);
M_NVML(M_F)
#undef M_F

static_assert(sizeof(m_nvml_memory) == sizeof(nvmlMemory_t) && offsetof(m_nvml_memory, total) == offsetof(nvmlMemory_t, total));
static_assert(offsetof(m_nvml_memory, free) == offsetof(nvmlMemory_t, free) && offsetof(m_nvml_memory, used) == offsetof(nvmlMemory_t, used));
static_assert(sizeof(m_nvml_busy) == sizeof(nvmlUtilization_t));
static_assert(offsetof(m_nvml_busy, gpu) == offsetof(nvmlUtilization_t, gpu) && offsetof(m_nvml_busy, memory) == offsetof(nvmlUtilization_t, memory));

ABI_VALUE(NV_NOT_SUPPORTED, NVML_ERROR_NOT_SUPPORTED);
ABI_VALUE(NV_CLOCK_SM, NVML_CLOCK_SM);
ABI_VALUE(NV_CLOCK_MEM, NVML_CLOCK_MEM);
ABI_VALUE(NV_SENSOR_CHIP, NVML_TEMPERATURE_GPU);
ABI_VALUE(NV_WHY_IDLE, nvmlClocksEventReasonGpuIdle);
ABI_VALUE(NV_WHY_APPLICATION, nvmlClocksEventReasonApplicationsClocksSetting);
ABI_VALUE(NV_WHY_SW_POWER, nvmlClocksEventReasonSwPowerCap);
ABI_VALUE(NV_WHY_HW_SLOWDOWN, nvmlClocksThrottleReasonHwSlowdown);
ABI_VALUE(NV_WHY_SYNC_BOOST, nvmlClocksEventReasonSyncBoost);
ABI_VALUE(NV_WHY_SW_THERMAL, nvmlClocksEventReasonSwThermalSlowdown);
ABI_VALUE(NV_WHY_HW_THERMAL, nvmlClocksThrottleReasonHwThermalSlowdown);
ABI_VALUE(NV_WHY_POWER_BRAKE, nvmlClocksThrottleReasonHwPowerBrakeSlowdown);
ABI_VALUE(NV_WHY_DISPLAY, nvmlClocksEventReasonDisplayClockSetting);
ABI_VALUE(NV_WHY_BOARD, nvmlClocksEventReasonBoardLimit);
ABI_VALUE(NV_WHY_RELIABILITY, nvmlClocksEventReasonReliability);

int main() {
	int n = 0;
#define M_F(result, name, arguments) n++;
	M_NVML(M_F)
#undef M_F
	printf("NVML: %d functions with our prototypes, by the header of API version %d\n", n, NVML_API_VERSION);
	return 0;
}
