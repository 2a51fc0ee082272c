package cuda

/*
#cgo CFLAGS: -I${SRCDIR}/../kernels
#cgo linux LDFLAGS: -ldl
#include <stdlib.h>
#include "calls.h"
#cgo noescape m_run
#cgo nocallback m_run
#cgo noescape m_copy_in
#cgo nocallback m_copy_in
#cgo noescape m_copy_out
#cgo nocallback m_copy_out
#cgo noescape m_copy
#cgo nocallback m_copy
#cgo noescape m_fill
#cgo nocallback m_fill
*/
import "C"

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"

	"margo/engine"
)

// plugin is a loaded plugin.
type plugin struct {
	kind string // "cuda" or "emu"
	path string
	api  *C.margo_api
}

var (
	loadMu sync.Mutex
	loaded = map[string]*plugin{}
)

// places lists the files that may be the plugin of a kind, in the order in which
// they are tried.
func places(kind string) []string {
	if p := os.Getenv("MARGO_" + strings.ToUpper(kind) + "_PLUGIN"); p != "" {
		return []string{p}
	}
	file := "libmargo_" + kind + ".so"
	var all []string
	if exe, err := os.Executable(); err == nil {
		if real, err := filepath.EvalSymlinks(exe); err == nil {
			exe = real
		}
		dir := filepath.Dir(exe)
		all = append(all, filepath.Join(dir, file), filepath.Join(dir, "..", "lib", file))
	}
	return append(all, filepath.Join("bin", file))
}

// load opens the plugin of a kind once. A plugin stays loaded: its threads and the
// driver's may run to the end of the process.
func load(kind string) (*plugin, error) {
	loadMu.Lock()
	defer loadMu.Unlock()
	tried := places(kind)
	for _, path := range tried {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if abs, err := filepath.Abs(path); err == nil {
			path = abs // dlopen searches the system for a bare name
		}
		if p := loaded[path]; p != nil {
			return p, nil
		}
		api, err := open(path)
		if err != nil {
			return nil, engine.Errorf("open "+kind, engine.Unsupported, "plugin %s: %w", path, err)
		}
		p := &plugin{kind, path, api}
		loaded[path] = p
		return p, nil
	}
	return nil, engine.Errorf("open "+kind, engine.Unsupported, "no plugin: there is no %s (make %s builds it)", strings.Join(tried, ", "), kind)
}

func open(path string) (*C.margo_api, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	var have C.uint32_t
	text := make([]byte, 1024)
	api := C.m_load(name, &have, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text)))
	switch {
	case api == nil && have != 0:
		return nil, fmt.Errorf("its interface has version %d, this margo speaks version %d; build both from the same sources", have, C.MARGO_ABI_MAJOR)
	case api == nil:
		return nil, fmt.Errorf("%s", cString(text))
	case api.size < C.sizeof_margo_api || api.minor != C.MARGO_ABI_MINOR: // ops refuse arguments of another size, in the midst of work
		return nil, fmt.Errorf("its interface has version %d.%d, this margo speaks %d.%d; build both from the same sources",
			api.major, api.minor, C.MARGO_ABI_MAJOR, C.MARGO_ABI_MINOR)
	}
	return api, nil
}

// cString is the text of a zero-terminated buffer.
func cString(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

// kinds translates a status.
var kinds = map[C.margo_status]engine.Kind{
	C.MARGO_INVALID: engine.Invalid, C.MARGO_UNSUPPORTED: engine.Unsupported, C.MARGO_OUT_OF_MEMORY: engine.OutOfMemory,
	C.MARGO_DEVICE_FAULT: engine.DeviceFault, C.MARGO_CANCELLED: engine.Cancelled, C.MARGO_INTERNAL: engine.Internal,
	C.MARGO_COMM_FAULT: engine.CommFault,
}

// Count is the number of devices of a kind, "cuda" or "emu". It is an error, which
// says why, if there is no plugin or no driver.
func Count(kind string) (int, error) {
	p, err := load(kind)
	if err != nil {
		return 0, err
	}
	var n C.int32_t
	text := make([]byte, 512)
	if s := C.m_device_count(p.api, &n, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text))); s != C.MARGO_OK {
		return 0, engine.Errorf("open "+kind, kinds[s], "%s", driverText(kind, driverLibrary, cString(text)))
	}
	return int(n), nil
}

// driverLibrary is the NVIDIA driver's, which the runtime looks for.
const driverLibrary = "libcuda.so.1"

// driverText says that there is no driver where that is why the runtime calls it too old.
func driverText(kind, library, text string) string {
	if kind != "cuda" || !strings.Contains(text, "cudaErrorInsufficientDriver") {
		return text
	}
	name := C.CString(library)
	defer C.free(unsafe.Pointer(name))
	if h := C.dlopen(name, C.RTLD_NOW|C.RTLD_LOCAL); h != nil {
		C.dlclose(h)
		return text
	}
	return "no NVIDIA driver: " + library + " not found (" + text + ")"
}
