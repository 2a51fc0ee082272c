package cuda

// #include "calls.h"
import "C"

import (
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"margo/engine"
)

// ParseSize reads a number of bytes: 1000, 512MiB, 1.5GiB. Units are KiB, MiB, GiB and TiB.
func ParseSize(s string) (int64, error) {
	number, unit := strings.TrimSpace(s), 1.0
	for i, u := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n, ok := strings.CutSuffix(number, u); ok {
			number, unit = strings.TrimSpace(n), float64(int64(1)<<(10*(i+1)))
		}
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil || !(v >= 0 && v*unit < 1<<62) {
		return 0, fmt.Errorf("%q is not a number of bytes, as in 1000, 512MiB or 1.5GiB", s)
	}
	return int64(v * unit), nil
}

// fromEnvironment fills in what the program left open.
func (o *Options) fromEnvironment() error {
	for name, at := range map[string]*int64{"MARGO_CUDA_MEMORY": &o.Limit, "MARGO_CUDA_CACHE": &o.Cache} {
		s := os.Getenv(name)
		if s == "" || *at != 0 {
			continue
		}
		n, err := ParseSize(s)
		if err != nil {
			return engine.Errorf("open device", engine.Invalid, "%s: %w", name, err)
		}
		if *at = n; n == 0 && at == &o.Cache {
			*at = -1
		}
	}
	if o.Limit < 0 {
		return engine.Errorf("open device", engine.Invalid, "a limit of %d bytes", o.Limit)
	}
	return nil
}

// cache is how much a device may cache. The emulator sees what is written behind a buffer, and what is read after it
// was freed, only if buffers have the sizes asked and go back at once.
func (o *Options) cache(i *C.margo_info) int64 {
	switch {
	case o.Cache < 0 || o.Cache == 0 && i.emulated != 0:
		return 0
	case o.Cache == 0:
		return int64(i.mem_total / 8)
	}
	return o.Cache
}

// SetMemory sets how many bytes may be taken from the device (0: all there is), what is cached included, and how
// many bytes of freed memory may be cached. Memory that is held stays, whatever the limit.
func (d *Device) SetMemory(limit, cache int64) error {
	if limit < 0 || cache < 0 {
		return d.errorf("set memory", engine.Invalid, "a limit of %d bytes, a cache of %d", limit, cache)
	}
	return d.status("set memory", C.m_memory_policy(d.p.api, d.ctx, C.uint64_t(limit), C.uint64_t(cache)))
}

// Trim gives cached memory back to the driver. Nobody need call it: it is done before an allocation fails.
func (d *Device) Trim() error { return d.status("trim", C.m_trim(d.p.api, d.ctx)) }

// heldBuffers says what is held, for the report of leaks.
type heldBuffers struct {
	mu sync.Mutex
	of map[*buffer]string
}

func (h *heldBuffers) name(b *buffer, what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.of == nil {
		h.of = map[*buffer]string{}
	}
	h.of[b] = what
}

func (h *heldBuffers) drop(b *buffer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.of, b)
}

// report lists what is held, the largest first, at most so many lines: "2 × pack bf16[768,768] (2359296 bytes)".
func (h *heldBuffers) report(most int) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	type line struct {
		what         string
		count, bytes int
	}
	var lines []*line
	at := map[string]*line{}
	for b, what := range h.of {
		if at[what] == nil {
			at[what] = &line{what: what}
			lines = append(lines, at[what])
		}
		at[what].count++
		at[what].bytes += b.bytes
	}
	slices.SortFunc(lines, func(a, b *line) int {
		if a.bytes != b.bytes {
			return b.bytes - a.bytes
		}
		return strings.Compare(a.what, b.what)
	})
	var out []string
	for i, l := range lines {
		if i == most {
			out = append(out, fmt.Sprintf("and %d more", len(lines)-most))
			break
		}
		count := ""
		if l.count > 1 {
			count = fmt.Sprintf("%d × ", l.count)
		}
		out = append(out, fmt.Sprintf("%s%s (%d bytes)", count, l.what, l.bytes))
	}
	return strings.Join(out, ", ")
}

// caller is the code that asked the device for memory: the first two functions that are not of the arena's or
// the device's, as in "sample.(*Engine).Run < main.runSample".
func caller() string {
	pcs := make([]uintptr, 16)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs)])
	var names []string
	for {
		f, more := frames.Next()
		name := path.Base(f.Function)
		if !strings.HasPrefix(name, "cuda.(*Device)") && !strings.HasPrefix(name, "engine.(*Arena)") && !strings.HasPrefix(name, "engine.(*Ctx)") && name != "." {
			names = append(names, name)
		}
		if !more || len(names) == 2 {
			return strings.Join(names, " < ")
		}
	}
}

// buffer is device memory.
type buffer struct {
	dev   *Device
	addr  C.uint64_t // 0 once freed
	bytes int
}

func (b *buffer) Bytes() int { return b.bytes }

// Label names the buffer in reports of leaks.
func (b *buffer) Label(what string) {
	if b.addr != 0 {
		b.dev.held.name(b, what)
	}
}

// Free gives the memory to the pool: what is enqueued from now on may get it, once the device has finished what was
// enqueued before.
func (b *buffer) Free() error {
	if b.addr == 0 {
		return b.dev.errorf("free", engine.Invalid, "memory was freed before")
	}
	if b.dev.ctx == nil {
		return b.dev.errorf("free", engine.Invalid, "the device was closed, which has freed all memory")
	}
	err := b.dev.status("free", C.m_free(b.dev.p.api, b.dev.ctx, b.addr))
	b.dev.used.Add(-int64(b.bytes))
	b.dev.held.drop(b)
	b.addr, b.bytes = 0, 0
	return err
}

// Alloc takes device memory, aligned to 256 bytes.
func (d *Device) Alloc(bytes int) (engine.Buffer, error) {
	b, err := d.alloc("alloc", bytes, "")
	if err != nil {
		return nil, err
	}
	return b, nil
}

// alloc takes memory for what; "" names the caller.
func (d *Device) alloc(op engine.Op, bytes int, what string) (*buffer, error) {
	if bytes < 0 {
		return nil, d.errorf(op, engine.Invalid, "%d bytes", bytes)
	}
	if err := d.open(op); err != nil {
		return nil, err
	}
	b := &buffer{dev: d, bytes: bytes}
	if err := d.status(op, C.m_alloc(d.p.api, d.ctx, C.uint64_t(bytes), &b.addr)); err != nil {
		return nil, err
	}
	if what == "" {
		what = "memory of " + caller()
	}
	d.held.name(b, what)
	now := d.used.Add(int64(bytes))
	for most := d.most.Load(); now > most && !d.most.CompareAndSwap(most, now); {
		most = d.most.Load()
	}
	return b, nil
}
