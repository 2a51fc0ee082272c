package cuda

// #include "calls.h"
import "C"

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"margo/engine"
)

// Options of a Device.
type Options struct {
	Poison bool // fill new memory with NaN, to find reads of undefined contents
	// Limit is how many bytes may be taken from the device, what is cached included; 0: what MARGO_CUDA_MEMORY says, else all.
	Limit int64
	// Cache is how many bytes of freed memory are kept for the next that is asked; 0: what MARGO_CUDA_CACHE says, else an
	// eighth of the device's memory, of an emulated device nothing; negative: nothing.
	Cache int64
}

// Device is one CUDA device, or an emulated one.
type Device struct {
	name string
	p    *plugin
	ctx  *C.margo_context
	info C.margo_info
	used atomic.Int64 // bytes of buffers, packed weights and workspaces
	most atomic.Int64 // of used, since ResetPeakUsed

	held  heldBuffers
	ranks ranks

	mu    sync.Mutex
	peaks [3]float64      // f32, bf16, memory
	util  *C.margo_stream // for Pack

	headPath atomic.Int32
	lt       *cublasLt // nil: off
}

var _ engine.Device = (*Device)(nil)

// Open opens the device "cuda:N" or "emu:N"; without ":N" it is the first.
func Open(name string, o Options) (*Device, error) {
	kind, number, found := strings.Cut(name, ":")
	n := 0
	if kind != "cuda" && kind != "emu" {
		return nil, engine.Errorf("open device", engine.Invalid, "%q is not a CUDA device; use cuda:0 or emu:0", name)
	}
	if found {
		var err error
		if n, err = strconv.Atoi(number); err != nil || n < 0 || n > 1<<16 {
			return nil, engine.Errorf("open device", engine.Invalid, "%q is not a CUDA device; use %s:0", name, kind)
		}
	}
	path, ok := map[string]int32{"": 0, "throughput": 1, "latency": 2}[os.Getenv("MARGO_HEAD_PATH")]
	if !ok {
		return nil, engine.Errorf("open device", engine.Invalid, "MARGO_HEAD_PATH is %q; use throughput or latency", os.Getenv("MARGO_HEAD_PATH"))
	}
	if err := o.fromEnvironment(); err != nil {
		return nil, err
	}
	use, err := cublasLtUse()
	if err != nil {
		return nil, err
	}
	p, err := load(kind)
	if err != nil {
		return nil, err
	}
	d := &Device{name: fmt.Sprintf("%s:%d", kind, n), p: p}
	d.headPath.Store(path)
	flags := C.uint32_t(0)
	if o.Poison {
		flags = 1
	}
	text := make([]byte, 1024)
	if s := C.m_open(p.api, C.int32_t(n), flags, &d.ctx, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text))); s != C.MARGO_OK {
		return nil, &engine.Error{Op: "open device", Kind: kinds[s], Device: d.name, Err: fmt.Errorf("%s", driverText(kind, driverLibrary, cString(text)))}
	}
	d.info.size = C.sizeof_margo_info
	err = d.status("open device", C.m_info(p.api, d.ctx, &d.info))
	if err == nil {
		err = d.SetMemory(o.Limit, o.cache(&d.info))
	}
	if err == nil {
		err = d.openCuBLASLt(use)
	}
	if err == nil {
		err = d.status("open device", C.m_stream_create(p.api, d.ctx, &d.util))
	}
	if err != nil {
		C.m_close(p.api, d.ctx)
		return nil, err
	}
	return d, nil
}

// status makes an error of what a call returned. A device that has failed is of no use to other ranks, who hear of it.
func (d *Device) status(op engine.Op, s C.margo_status) error {
	err := d.text(op, s)
	if s == C.MARGO_DEVICE_FAULT {
		d.ranks.lost(err)
	}
	return err
}

// text is the error alone.
func (d *Device) text(op engine.Op, s C.margo_status) error {
	if s == C.MARGO_OK {
		return nil
	}
	text := make([]byte, 2048)
	C.m_last_error(d.p.api, d.ctx, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text)))
	return d.errorf(op, kinds[s], "%s", cString(text))
}

// open reports that the device was closed.
func (d *Device) open(op engine.Op) error {
	if d.ctx == nil {
		return d.errorf(op, engine.Invalid, "the device was closed")
	}
	return nil
}

// errorf makes an error that names the device.
func (d *Device) errorf(op engine.Op, k engine.Kind, format string, args ...any) *engine.Error {
	e := engine.Errorf(string(op), k, format, args...)
	e.Device = d.name
	return e
}

// named puts the device's name into an error of the engine.
func (d *Device) named(err error) error {
	if e, ok := err.(*engine.Error); ok && e.Device == "" {
		e.Device = d.name
	}
	return err
}

// Name is "cuda:0" or "emu:0".
func (d *Device) Name() string { return d.name }

// workingSet lets a whole batch go through the trunk at once: a GPU wants rows by the
// ten thousand, and its caches hold no layer's activations anyway.
const workingSet = 4 << 30

// Info describes the device; MemFree is read anew: what the pool could still give, within its limit and with something left to the driver.
func (d *Device) Info() engine.Info {
	now := d.info
	if C.m_info(d.p.api, d.ctx, &now) != C.MARGO_OK {
		now = d.info
	}
	c := d.Counters()
	free := int64(now.mem_free) + int64(c.Cached)
	if now.emulated == 0 {
		free -= driverBytes
	}
	if c.Limit > 0 {
		free = min(free, int64(c.Limit)-int64(c.Taken)+int64(c.Cached))
	}
	free = max(free, 0)
	i := engine.Info{Name: d.name, Model: C.GoString(&now.name[0]), Arch: C.GoString(&now.arch[0]), Threads: int(now.sm_count),
		MemTotal: int64(now.mem_total), MemFree: free, WorkingSet: workingSet, OwnMemory: true,
		Truncates: now.emulated == 0, KeepsFP8: d.HeadPath() == 2}
	d.mu.Lock()
	i.PeakF32, i.PeakBF16, i.PeakMemory = d.peaks[0], d.peaks[1], d.peaks[2]
	d.mu.Unlock()
	return i
}

// PCIBusID is where the device sits, as NVML names it.
func (d *Device) PCIBusID() string { return C.GoString(&d.info.pci_bus_id[0]) }

// fmaPerClock is how many multiply-adds a multiprocessor finishes in a clock, in F32
// and with BF16 operands on tensor cores (dense), by compute capability. From the
// vendor's architecture papers; what is not listed is unknown.
var fmaPerClock = map[[2]int][2]float64{{8, 0}: {64, 1024}, {8, 6}: {128, 512}, {8, 9}: {128, 512}, {9, 0}: {128, 2048}, {10, 0}: {128, 4096}}

// MeasurePeaks puts the device's peaks into Info. They are not measured: they follow
// from clocks, multiprocessors and bus width that the driver reports, and are what a
// roofline is drawn with. 0 where the driver or this table does not know.
func (d *Device) MeasurePeaks() {
	d.mu.Lock()
	defer d.mu.Unlock()
	rate, ok := fmaPerClock[[2]int{int(d.info.cc_major), int(d.info.cc_minor)}]
	if ok && d.info.emulated == 0 {
		clocks := 2 * float64(d.info.sm_count) * float64(d.info.clock_khz) * 1e3
		d.peaks[0], d.peaks[1] = clocks*rate[0], clocks*rate[1]
		d.peaks[2] = 2 * float64(d.info.memory_clock_khz) * 1e3 * float64(d.info.memory_bus_bits) / 8
	}
}

// entries are the ops of the plugin's table.
var entries = map[engine.Op]C.int{
	engine.OpGemm: C.M_GEMM, engine.OpAttention: C.M_ATTENTION, engine.OpNorm: C.M_NORM, engine.OpGatedAdd: C.M_GATED_ADD,
	engine.OpRows: C.M_ROWS, engine.OpCast: C.M_CAST, engine.OpTimestepEmbedding: C.M_TIMESTEP, engine.OpNormal: C.M_NORMAL,
	engine.OpDiffusionStep: C.M_DIFFUSION, engine.OpHeadSteps: C.M_HEAD, engine.OpConv2D: C.M_CONV,
	engine.OpGroupNorm: C.M_GROUP_NORM, engine.OpPatchify: C.M_PATCHIFY,
	engine.OpCategorical: C.M_CATEGORICAL, engine.OpPagedAttention: C.M_ATTENTION,
}

// Supports is true for the ops of the plugin's table, in both dtypes.
func (d *Device) Supports(op engine.Op, t engine.DType) bool {
	e, ok := entries[op]
	return ok && (t == engine.F32 || t == engine.BF16) && C.m_has(d.p.api, e) != 0
}

// HeadPath is how HeadSteps runs: 0 lets the plugin choose, 1 is the throughput path
// of GEMMs, 2 the latency path, one persistent kernel where rows are few. The plugin chooses
// 1: path 2 rounds otherwise, so an image would depend on how many are sampled with it.
func (d *Device) HeadPath() int { return int(d.headPath.Load()) }

// SetHeadPath sets HeadPath.
func (d *Device) SetHeadPath(path int) { d.headPath.Store(int32(path)) }

// Used is the number of bytes in buffers, packed weights and workspaces.
func (d *Device) Used() int64 { return d.used.Load() }

// PeakUsed is the most that Used was since the last ResetPeakUsed.
func (d *Device) PeakUsed() int64 { return d.most.Load() }

// ResetPeakUsed makes PeakUsed what Used is now.
func (d *Device) ResetPeakUsed() { d.most.Store(d.used.Load()) }

// Counters are totals since the device was opened.
type Counters struct {
	Kernels, Graphs, GraphKernels uint64 // launches; kernels run by graphs
	Syncs, CopiesIn, CopiesOut    uint64
	BytesIn, BytesOut             uint64
	Allocs, Held, Peak            uint64 // bytes asked and held, now and at most

	// Of the pool: allocations of the driver's, those served from the cache, cached buffers given back to the
	// driver; bytes cached, and taken from the driver (held, with what rounding adds, and cached) now and at most.
	DeviceAllocs, Reuses, Trims uint64
	Cached, Taken, TakenPeak    uint64
	Pinned                      uint64 // bytes of the host's memory, for staging
	Limit, Cache                uint64 // of Taken (0: none) and of Cached
	Libraries                   uint64 // of Taken: what NCCL was seen to take
}

// String says what there is to say of memory.
func (c Counters) String() string {
	limit := ""
	if c.Limit > 0 {
		limit = fmt.Sprintf(", limit %.1f MiB", float64(c.Limit)/(1<<20))
	}
	if c.Libraries > 0 {
		limit += fmt.Sprintf(", NCCL %.1f MiB of it", float64(c.Libraries)/(1<<20))
	}
	return fmt.Sprintf("%.1f MiB held (at most %.1f), %.1f cached (at most %.1f allowed), %.1f taken from the device at most%s; %d allocations, %d by the driver, %d from the cache, %d given back; %.1f MiB pinned",
		float64(c.Held)/(1<<20), float64(c.Peak)/(1<<20), float64(c.Cached)/(1<<20), float64(c.Cache)/(1<<20), float64(c.TakenPeak)/(1<<20), limit,
		c.Allocs, c.DeviceAllocs, c.Reuses, c.Trims, float64(c.Pinned)/(1<<20))
}

// Counters reads the device's totals.
func (d *Device) Counters() Counters {
	var c C.margo_counters
	c.size = C.sizeof_margo_counters
	C.m_counters(d.p.api, d.ctx, &c)
	return Counters{Kernels: uint64(c.kernel_launches), Graphs: uint64(c.graph_launches), GraphKernels: uint64(c.graph_kernels), Syncs: uint64(c.syncs),
		CopiesIn: uint64(c.copies_in), CopiesOut: uint64(c.copies_out), BytesIn: uint64(c.bytes_in), BytesOut: uint64(c.bytes_out),
		Allocs: uint64(c.allocs), Held: uint64(c.bytes_allocated), Peak: uint64(c.bytes_peak),
		DeviceAllocs: uint64(c.device_allocs), Reuses: uint64(c.reuses), Trims: uint64(c.trims), Cached: uint64(c.bytes_cached),
		Taken: uint64(c.bytes_taken), TakenPeak: uint64(c.bytes_taken_peak), Pinned: uint64(c.bytes_pinned), Limit: uint64(c.limit), Cache: uint64(c.capacity),
		Libraries: uint64(c.bytes_libraries)}
}

// Kernel is what the compiler made of a kernel, and how often it was launched.
type Kernel struct {
	Name                             string
	Registers, Local, Shared         int // local: bytes of a thread that were spilled or indexed; shared: bytes of a block
	Threads, BlocksPerMultiprocessor int
	Launches                         uint64
}

// Kernels lists the kernels launched so far.
func (d *Device) Kernels() []Kernel {
	var all []Kernel
	for i := 0; ; i++ {
		var k C.margo_kernel
		k.size = C.sizeof_margo_kernel
		if C.m_kernel(d.p.api, d.ctx, C.int64_t(i), &k) != C.MARGO_OK {
			return all
		}
		all = append(all, Kernel{C.GoString(&k.name[0]), int(k.registers), int(k.local_bytes), int(k.static_smem + k.max_dynamic_smem),
			int(k.max_threads), int(k.blocks_per_sm), uint64(k.launches)})
	}
}

// Close waits for the device and gives it back, with all memory. What was still held is an error that names it.
func (d *Device) Close() error {
	if d.ctx == nil {
		return nil
	}
	for _, c := range d.ranks.open() { // else what they have under way would be waited for
		c.Close()
	}
	err := d.status("close", C.m_stream_destroy(d.p.api, d.util))
	if e := d.saveChoices(); err == nil {
		err = e
	}
	if s := C.m_close(d.p.api, d.ctx); s != C.MARGO_OK && err == nil {
		err = d.errorf("close", kinds[s], "the device failed before it was closed")
	}
	d.ctx = nil
	if n := d.Used(); n != 0 && err == nil {
		err = d.errorf("close", engine.Internal, "%d bytes were not freed: %s", n, d.held.report(8))
	}
	return err
}
