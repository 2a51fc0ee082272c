package cuda

// #include "calls.h"
import "C"

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"unsafe"

	"margo/engine"
	"margo/engine/atomicfile"
)

// cuBLASLt is the vendor's library for matrix products, for those without an epilogue of ours. It is asked for
// by $MARGO_CUBLASLT: 1 takes its heuristics' first choice for a shape, autotune the fastest of their
// candidates, which is timed once and kept in a file. $MARGO_CUBLASLT_LIB names the library. kernels/cublaslt.cu says
// what it serves.
type cublasLt struct {
	version   uint64
	workspace int // bytes of a stream
	autotune  bool
	path      string    // of the file of choices, "" without autotune
	stored    []product // from it
}

// CuBLASLt is what is known of cuBLASLt on a device.
type CuBLASLt struct {
	Version string `json:"version"`
	Library string `json:"library"`
	Use     string `json:"use"` // "off", "on", "autotune"
}

// product is a shape that cuBLASLt was asked for, and what was chosen. Its order in the file is of no
// importance.
type product struct {
	DType     int32     `json:"dtype"` // of X and W, as engine.DType
	YDType    int32     `json:"y_dtype"`
	Bias      int32     `json:"bias"`
	Residual  int32     `json:"residual"` // 1: another matrix, 2: Y itself
	M         int64     `json:"m"`
	N         int64     `json:"n"`
	K         int64     `json:"k"`
	LDX       int64     `json:"ldx"`
	LDW       int64     `json:"ldw"`
	LDR       int64     `json:"ldr"`
	LDY       int64     `json:"ldy"`
	Limit     uint64    `json:"workspace_limit"`
	Workspace uint64    `json:"workspace"`
	Algo      [8]uint64 `json:"algorithm"`

	choice int32 // C.MARGO_CUBLASLT_…
	uses   uint64
}

// shape is the product without what was chosen.
func (p product) shape() product {
	p.Workspace, p.Algo, p.choice, p.uses = 0, [8]uint64{}, 0, 0
	return p
}

// choices is the file: they hold for one device and one version of driver and library.
type choices struct {
	Device   string    `json:"device"`
	Driver   int       `json:"driver"`
	Version  uint64    `json:"cublaslt"`
	Products []product `json:"products"`
}

const (
	ours = C.MARGO_CUBLASLT_OURS // the library refused: our kernels serve
	// The others: by heuristics, timed, and read from the file.
	heuristic, tuned, stored = C.MARGO_CUBLASLT_HEURISTIC, C.MARGO_CUBLASLT_TUNED, C.MARGO_CUBLASLT_STORED
)

const opCuBLASLt engine.Op = "open cuBLASLt"

func cublasLtUse() (string, error) {
	switch v := os.Getenv("MARGO_CUBLASLT"); v {
	case "", "0":
		return "off", nil
	case "1":
		return "on", nil
	case "autotune":
		return v, nil
	default:
		return "", engine.Errorf("open device", engine.Invalid, "MARGO_CUBLASLT is %q; use 0, 1 or autotune", v)
	}
}

// versionText is a version of cuBLASLt or NCCL as NVIDIA writes it: 131000 is 13.10.0.
func versionText(v uint64) string { return fmt.Sprintf("%d.%d.%d", v/10000, v/100%100, v%100) }

// openCuBLASLt turns cuBLASLt on if the environment asks for it.
func (d *Device) openCuBLASLt(use string) error {
	if use == "off" {
		return nil
	}
	library := C.CString(os.Getenv("MARGO_CUBLASLT_LIB"))
	defer C.free(unsafe.Pointer(library))
	var info C.margo_cublaslt_info
	info.size = C.sizeof_margo_cublaslt_info
	if err := d.status(opCuBLASLt, C.m_cublaslt_open(d.p.api, d.ctx, library, flag(use == "autotune"), &info)); err != nil {
		return err
	}
	lt := &cublasLt{version: uint64(info.version), workspace: int(info.workspace_bytes), autotune: use == "autotune"}
	if lt.autotune {
		if err := d.loadChoices(lt); err != nil {
			return err
		}
	}
	d.lt = lt
	return nil
}

// CuBLASLt looks for cuBLASLt and says which one there is. The error, Unsupported, says why there is none.
func (d *Device) CuBLASLt() (*CuBLASLt, error) {
	use, err := cublasLtUse()
	if err != nil {
		return nil, err
	}
	library := C.CString(os.Getenv("MARGO_CUBLASLT_LIB"))
	defer C.free(unsafe.Pointer(library))
	var info C.margo_cublaslt_info
	info.size = C.sizeof_margo_cublaslt_info
	text := make([]byte, 512)
	if s := C.m_cublaslt_probe(d.p.api, library, &info, (*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text))); s != C.MARGO_OK {
		return nil, d.errorf("find cuBLASLt", kinds[s], "%s", cString(text))
	}
	return &CuBLASLt{versionText(uint64(info.version)), C.GoString(&info.library[0]), use}, nil
}

// products lists what was chosen so far.
func (d *Device) products() (all []product) {
	for i := 0; ; i++ {
		var a C.margo_cublaslt_algo
		a.size = C.sizeof_margo_cublaslt_algo
		if C.m_cublaslt_algo(d.p.api, d.ctx, C.int64_t(i), &a) != C.MARGO_OK {
			return all
		}
		p := product{DType: int32(a.dtype), YDType: int32(a.y_dtype), Bias: int32(a.bias), Residual: int32(a.residual), M: int64(a.m), N: int64(a.n),
			K: int64(a.k), LDX: int64(a.ldx), LDW: int64(a.ldw), LDR: int64(a.ldr), LDY: int64(a.ldy), Limit: uint64(a.workspace_limit),
			Workspace: uint64(a.workspace), choice: int32(a.choice), uses: uint64(a.uses)}
		for j, v := range a.algo {
			p.Algo[j] = uint64(v)
		}
		all = append(all, p)
	}
}

var unnamed = regexp.MustCompile(`[^A-Za-z0-9.]+`)

// loadChoices reads the choices of earlier processes, if there are any.
func (d *Device) loadChoices(lt *cublasLt) error {
	dir, err := os.UserCacheDir()
	if err != nil {
		return d.errorf(opCuBLASLt, engine.IO, "there is no place to keep what autotune finds: %w", err)
	}
	want := d.choices(lt)
	name := fmt.Sprintf("cublaslt-%s-%d-%d.json", unnamed.ReplaceAllString(want.Device, "-"), want.Driver, want.Version)
	lt.path = filepath.Join(dir, "margo", name)
	data, err := os.ReadFile(lt.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return d.errorf(opCuBLASLt, engine.IO, "%w", err)
	}
	var have choices
	if err := json.Unmarshal(data, &have); err != nil {
		return d.errorf(opCuBLASLt, engine.Invalid, "%s is not what autotune wrote (%w); remove it", lt.path, err)
	}
	if have.Device != want.Device || have.Driver != want.Driver || have.Version != want.Version {
		return d.errorf(opCuBLASLt, engine.Invalid, "%s is of device %q, driver %d, cuBLASLt %d; remove it", lt.path, have.Device, have.Driver, have.Version)
	}
	lt.stored = have.Products
	for _, p := range lt.stored {
		a := C.margo_cublaslt_algo{size: C.sizeof_margo_cublaslt_algo, dtype: C.int32_t(p.DType), y_dtype: C.int32_t(p.YDType), bias: C.int32_t(p.Bias),
			residual: C.int32_t(p.Residual), m: C.int64_t(p.M), n: C.int64_t(p.N), k: C.int64_t(p.K), ldx: C.int64_t(p.LDX), ldw: C.int64_t(p.LDW),
			ldr: C.int64_t(p.LDR), ldy: C.int64_t(p.LDY), workspace_limit: C.uint64_t(p.Limit)}
		for j, v := range p.Algo {
			a.algo[j] = C.uint64_t(v)
		}
		if err := d.status(opCuBLASLt, C.m_cublaslt_store(d.p.api, d.ctx, &a)); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) choices(lt *cublasLt) choices {
	return choices{Device: C.GoString(&d.info.name[0]), Driver: int(d.info.driver_version), Version: lt.version}
}

// saveChoices writes what was timed, beside what the file held. Of two processes that do so at the same time the later one's
// file stays.
func (d *Device) saveChoices() error {
	if d.lt == nil || !d.lt.autotune {
		return nil
	}
	out := d.choices(d.lt)
	seen := map[product]bool{}
	for _, p := range d.products() {
		if p.choice == tuned {
			out.Products, seen[p.shape()] = append(out.Products, p), true
		}
	}
	if len(out.Products) == 0 {
		return nil
	}
	for _, p := range d.lt.stored {
		if !seen[p.shape()] {
			out.Products = append(out.Products, p)
		}
	}
	data, err := json.MarshalIndent(out, "", " ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(d.lt.path), 0o777)
	}
	if err == nil {
		err = atomicfile.Write(context.Background(), d.lt.path, func(w io.Writer) error {
			_, err := w.Write(append(data, '\n'))
			return err
		})
	}
	if err != nil {
		return d.errorf("close", engine.IO, "what autotune found was not kept: %w", err)
	}
	return nil
}
