package cuda

// #include <stdlib.h>
// #include "nvml.h"
import "C"

import (
	"fmt"
	"strings"
	"unsafe"

	"margo/engine"
)

// nvmlLibrary is the driver's own name of NVML; tests put another in its place.
var nvmlLibrary = "libnvidia-ml.so.1"

// Health is how a device is doing, from NVML. What the device or the driver does not
// tell is nil.
type Health struct {
	Driver         string   `json:"driver"`
	GPUBusy        *float64 `json:"gpu_busy,omitempty"`    // share of the driver's last sample period (up to 1 s) in which any kernel ran
	MemoryBusy     *float64 `json:"memory_busy,omitempty"` // and in which memory was read or written
	MemoryUsed     *float64 `json:"memory_used_bytes,omitempty"`
	Power          *float64 `json:"power_watts,omitempty"`
	PowerLimit     *float64 `json:"power_limit_watts,omitempty"`
	Energy         *float64 `json:"energy_joules,omitempty"` // since the driver was loaded
	SMClock        *float64 `json:"sm_clock_mhz,omitempty"`
	SMClockMax     *float64 `json:"sm_clock_max_mhz,omitempty"`
	MemoryClock    *float64 `json:"memory_clock_mhz,omitempty"`
	MemoryClockMax *float64 `json:"memory_clock_max_mhz,omitempty"`
	Temperature    *float64 `json:"temperature_celsius,omitempty"`
	Throttle       []string `json:"throttle"` // why clocks are below the maximum, in words; "idle" is harmless
}

// throttle names the bits of nvmlDeviceGetCurrentClocksEventReasons.
var throttle = []struct {
	bit  uint64
	name string
}{
	{C.NV_WHY_IDLE, "idle"}, {C.NV_WHY_APPLICATION, "application clocks"}, {C.NV_WHY_SW_POWER, "software power cap"},
	{C.NV_WHY_HW_SLOWDOWN, "hardware slowdown"}, {C.NV_WHY_SYNC_BOOST, "sync boost"}, {C.NV_WHY_SW_THERMAL, "software thermal slowdown"},
	{C.NV_WHY_HW_THERMAL, "hardware thermal slowdown"}, {C.NV_WHY_POWER_BRAKE, "power brake"}, {C.NV_WHY_DISPLAY, "display clocks"},
	{C.NV_WHY_BOARD, "board limit"}, {C.NV_WHY_RELIABILITY, "reliability limit"},
}

// Health asks NVML, which comes with the driver. The error, Unsupported or
// DeviceFault, says why it cannot tell; an emulated device has no NVML.
func (d *Device) Health() (*Health, error) {
	const op = "read NVML"
	if d.info.emulated != 0 {
		return nil, d.errorf(op, engine.Unsupported, "an emulated device has no NVML")
	}
	h, err := readHealth(nvmlLibrary, d.PCIBusID())
	return h, d.named(err)
}

func readHealth(library, pci string) (*Health, error) {
	const op = "read NVML"
	lib, bus := C.CString(library), C.CString(pci)
	defer C.free(unsafe.Pointer(lib))
	defer C.free(unsafe.Pointer(bus))
	var r C.m_health
	text := make([]byte, 512)
	if code := C.m_nvml_read(lib, bus, &r, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text))); code != 0 {
		kind := engine.Unsupported
		if code > 0 && code != C.NV_NOT_SUPPORTED {
			kind = engine.DeviceFault
		}
		return nil, engine.Errorf(op, kind, "%s", cString(text))
	}
	value := func(place int, scale float64) *float64 {
		if r.have>>place&1 == 0 {
			return nil
		}
		v := float64(r.v[place]) * scale
		return &v
	}
	h := &Health{Driver: C.GoString(&r.driver[0]), GPUBusy: value(C.NV_GPU_BUSY, 0.01), MemoryBusy: value(C.NV_MEMORY_BUSY, 0.01),
		MemoryUsed: value(C.NV_MEMORY_USED, 1), Power: value(C.NV_POWER, 1e-3), PowerLimit: value(C.NV_POWER_LIMIT, 1e-3),
		Energy: value(C.NV_ENERGY, 1e-3), SMClock: value(C.NV_SM_CLOCK, 1), SMClockMax: value(C.NV_SM_CLOCK_MAX, 1),
		MemoryClock: value(C.NV_MEMORY_CLOCK, 1), MemoryClockMax: value(C.NV_MEMORY_CLOCK_MAX, 1), Temperature: value(C.NV_TEMPERATURE, 1),
		Throttle: []string{}}
	if r.have>>C.NV_THROTTLE&1 != 0 {
		bits := uint64(r.v[C.NV_THROTTLE])
		for _, why := range throttle {
			if bits&why.bit != 0 {
				h.Throttle = append(h.Throttle, why.name)
				bits &^= why.bit
			}
		}
		if bits != 0 {
			h.Throttle = append(h.Throttle, fmt.Sprintf("reasons %#x", bits))
		}
	}
	return h, nil
}

// EnergyJoules is what the device has used since the driver was loaded; false where
// NVML does not tell.
func (d *Device) EnergyJoules() (float64, bool) {
	h, err := d.Health()
	if err != nil || h.Energy == nil {
		return 0, false
	}
	return *h.Energy, true
}

// String is one line: what is known.
func (h *Health) String() string {
	parts := []string{"driver " + h.Driver}
	add := func(format string, v ...*float64) {
		args := make([]any, len(v))
		for i, x := range v {
			if x == nil {
				return
			}
			args[i] = *x
		}
		parts = append(parts, fmt.Sprintf(format, args...))
	}
	percent := func(v *float64) *float64 {
		if v == nil {
			return nil
		}
		p := 100 * *v
		return &p
	}
	add("%.0f °C", h.Temperature)
	if h.PowerLimit != nil {
		add("%.0f of %.0f W", h.Power, h.PowerLimit)
	} else {
		add("%.0f W", h.Power)
	}
	add("SM at %.0f of %.0f MHz", h.SMClock, h.SMClockMax)
	add("memory at %.0f of %.0f MHz", h.MemoryClock, h.MemoryClockMax)
	add("busy %.0f %%", percent(h.GPUBusy))
	if len(h.Throttle) > 0 {
		parts = append(parts, "clocks held by "+strings.Join(h.Throttle, ", "))
	}
	return strings.Join(parts, ", ")
}
