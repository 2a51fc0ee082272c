package cuda

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"margo/engine"
)

// standIn is NVML as far as margo calls it. NV_OLD: a driver before 535, on a device
// that tells neither its energy nor its clocks.
const standIn = `
#include <stdint.h>
#include <string.h>
static int users;
int nvmlInit_v2(void) {
#ifdef NV_DOWN
	return 9;
#endif
	users++;
	return 0;
}
int nvmlShutdown(void) { return users-- > 0 ? 0 : 1; }
const char *nvmlErrorString(int e) { return e == 9 ? "Driver Not Loaded" : e == 6 ? "Not Found" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *s, uint32_t n) { if (n < 10) return 7; strcpy(s, "580.65.06"); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **d) { if (strcmp(bus, "0000:1b:00.0")) return 6; *d = &users; return 0; }
struct busy { uint32_t gpu, memory; };
int nvmlDeviceGetUtilizationRates(void *d, struct busy *b) { b->gpu = 87, b->memory = 41; return d != &users; }
struct memory { uint64_t total, free, used; };
int nvmlDeviceGetMemoryInfo(void *d, struct memory *m) { m->total = 85520809984, m->free = 80000000000, m->used = 5520809984; return d != &users; }
int nvmlDeviceGetPowerUsage(void *d, uint32_t *v) { *v = 412345; return d != &users; }
int nvmlDeviceGetEnforcedPowerLimit(void *d, uint32_t *v) { *v = 700000; return d != &users; }
int nvmlDeviceGetTemperature(void *d, uint32_t sensor, uint32_t *v) { *v = 54; return d != &users || sensor; }
#ifdef NV_OLD
int nvmlDeviceGetTotalEnergyConsumption(void *d, uint64_t *v) { return 3; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, uint64_t *v) { *v = 1; return d != &users; }
#else
int nvmlDeviceGetTotalEnergyConsumption(void *d, uint64_t *v) { *v = 5000000001; return d != &users; }
int nvmlDeviceGetClockInfo(void *d, uint32_t type, uint32_t *v) { *v = type == 1 ? 1755 : type == 2 ? 2619 : 0; return d != &users; }
int nvmlDeviceGetMaxClockInfo(void *d, uint32_t type, uint32_t *v) { *v = type == 1 ? 1980 : type == 2 ? 2620 : 0; return d != &users; }
int nvmlDeviceGetCurrentClocksEventReasons(void *d, uint64_t *v) { *v = 0x4 | 0x40 | 0x1000; return d != &users; }
#endif
`

// nvml builds the stand-in.
func nvml(t *testing.T, defines ...string) string {
	t.Helper()
	dir := t.TempDir()
	source, lib := filepath.Join(dir, "nvml.c"), filepath.Join(dir, "libnvidia-ml.so.1")
	if err := os.WriteFile(source, []byte(standIn), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command("gcc", append(defines, "-shared", "-fPIC", "-o", lib, source)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return lib
}

func TestHealth(t *testing.T) {
	const bus = "0000:1b:00.0"
	h, err := readHealth(nvml(t), bus)
	if err != nil {
		t.Fatal(err)
	}
	is := func(name string, got *float64, want float64) {
		t.Helper()
		if got == nil || *got < want*(1-1e-12) || *got > want*(1+1e-12) {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	is("GPU busy", h.GPUBusy, 0.87)
	is("memory busy", h.MemoryBusy, 0.41)
	is("memory used", h.MemoryUsed, 5520809984)
	is("power", h.Power, 412.345)
	is("limit", h.PowerLimit, 700)
	is("energy", h.Energy, 5000000.001)
	is("SM clock", h.SMClock, 1755)
	is("its maximum", h.SMClockMax, 1980)
	is("memory clock", h.MemoryClock, 2619)
	is("its maximum", h.MemoryClockMax, 2620)
	is("temperature", h.Temperature, 54)
	if want := []string{"software power cap", "hardware thermal slowdown", "reasons 0x1000"}; !slices.Equal(h.Throttle, want) {
		t.Errorf("throttled by %q, want %q", h.Throttle, want)
	}
	const line = "driver 580.65.06, 54 °C, 412 of 700 W, SM at 1755 of 1980 MHz, memory at 2619 of 2620 MHz, busy 87 %, " +
		"clocks held by software power cap, hardware thermal slowdown, reasons 0x1000"
	if h.String() != line {
		t.Errorf("says %q, want %q", h, line)
	}

	if h, err = readHealth(nvml(t, "-DNV_OLD"), bus); err != nil {
		t.Fatal(err)
	}
	if h.Energy != nil || h.SMClock != nil || h.MemoryClockMax != nil || !slices.Equal(h.Throttle, []string{"idle"}) {
		t.Errorf("an old driver tells %+v", h)
	}
	if want := "driver 580.65.06, 54 °C, 412 of 700 W, busy 87 %, clocks held by idle"; h.String() != want {
		t.Errorf("says %q, want %q", h, want)
	}
	b, err := json.Marshal(h)
	if err != nil || strings.Contains(string(b), "clock_mhz") || !strings.Contains(string(b), `"power_watts":412.345`) {
		t.Errorf("as JSON: %s, %v", b, err)
	}
}

func TestHealthUnknown(t *testing.T) {
	refused := func(what string, err error, kind engine.Kind, text string) {
		t.Helper()
		if !errors.Is(err, kind) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %v with %q", what, err, kind, text)
		}
	}
	_, err := readHealth("libmargo-no-such.so.1", "0000:1b:00.0")
	refused("no library", err, engine.Unsupported, "libmargo-no-such.so.1")
	_, err = readHealth("libc.so.6", "0000:1b:00.0")
	refused("another library", err, engine.Unsupported, "libc.so.6 lacks functions of NVML")
	_, err = readHealth(nvml(t, "-DNV_DOWN"), "0000:1b:00.0")
	refused("no driver", err, engine.DeviceFault, "nvmlInit: Driver Not Loaded (9)")
	_, err = readHealth(nvml(t), "0000:ff:00.0")
	refused("no such device", err, engine.DeviceFault, "handle of 0000:ff:00.0: Not Found (6)")
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") == "" {
		_, err = testDevice(t).Health()
		refused("emulated", err, engine.Unsupported, "emulated")
	}
}
