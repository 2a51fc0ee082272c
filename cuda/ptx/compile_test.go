package ptx

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// nvcc finds the pinned compiler or one on the path.
func nvcc() string {
	if m, _ := filepath.Glob("../../.cuda/lib/python3*/site-packages/nvidia/cu13/bin/nvcc"); len(m) > 0 {
		return m[0]
	}
	if p, err := exec.LookPath("nvcc"); err == nil {
		return p
	}
	return ""
}

var compiling sync.Map // file → *sync.Mutex

// sources are what a file of kernels/ is compiled from: all headers, then the file.
func sources(file string) []string {
	headers, _ := filepath.Glob("../../kernels/*.*h")
	return append(headers, filepath.Join("../../kernels", file))
}

// architecture is what a file is compiled for: files *_sm90a.cu use what only that has.
func architecture(file string) string {
	if strings.HasSuffix(file, "_sm90a.cu") {
		return "90a"
	}
	return "80"
}

// built gives the PTX that lies in the object which make cuda compiled from a file of kernels/, or "" where
// there is none, as for sm_90a, or an older one than the file and the headers.
func built(file string) string {
	object := filepath.Join("../../.build/cuda", strings.TrimSuffix(file, ".cu")+".o")
	made, err := os.Stat(object)
	if err != nil {
		return ""
	}
	for _, f := range sources(file) {
		if at, err := os.Stat(f); err != nil || !at.ModTime().Before(made.ModTime()) {
			return ""
		}
	}
	text, err := exec.Command(filepath.Join(filepath.Dir(nvcc()), "cuobjdump"), "-ptx", object).Output()
	if err != nil {
		return ""
	}
	_, ptx, found := strings.Cut(string(text), "\n.version")
	if !found || strings.Contains(ptx, "\n.version") || !strings.Contains(ptx, "\n.target sm_"+architecture(file)+"\n") {
		return ""
	}
	ptx, _, _ = strings.Cut(ptx, "\nFatbin") // machine code of other architectures
	return ".version" + ptx
}

// compiled gives the PTX of a file of kernels/ as nvcc makes it for compute_80 or compute_90a: that of the plugin which make cuda has built;
// else what was compiled before from the same sources by the same compiler and lies in the user's cache; else it is compiled.
func compiled(t testing.TB, file string) string {
	t.Helper()
	cc := nvcc()
	if cc == "" {
		if os.Getenv("MARGO_NVCC_REQUIRED") != "" {
			t.Fatal("no nvcc: make cuda-toolchain installs one")
		}
		t.Skip("NOT TESTED: no nvcc here, so no PTX was interpreted; make cuda-toolchain installs one")
	}
	mu, _ := compiling.LoadOrStore(file, new(sync.Mutex))
	mu.(*sync.Mutex).Lock()
	defer mu.(*sync.Mutex).Unlock()
	if text := built(file); text != "" {
		return text
	}
	hash := sha256.New()
	version, err := exec.Command(cc, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	hash.Write(version)
	for _, f := range sources(file) {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		hash.Write([]byte(f))
		hash.Write(text)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	out := filepath.Join(cache, "margo", "ptx-"+hex.EncodeToString(hash.Sum(nil)[:12])+".ptx")
	if text, err := os.ReadFile(out); err == nil {
		return string(text)
	}
	dir := t.TempDir()
	tmp := filepath.Join(dir, "out.ptx")
	if text, err := exec.Command(cc, "-std=c++20", "-O3", "-ptx", "-arch=compute_"+architecture(file), "-I", "../../kernels",
		filepath.Join("../../kernels", file), "-o", tmp).CombinedOutput(); err != nil {
		t.Fatalf("nvcc %s: %v\n%s", file, err, text)
	}
	text, err := os.ReadFile(tmp)
	if err != nil || !bytes.Contains(text, []byte(".entry")) {
		t.Fatalf("nvcc %s: no kernel in its PTX (%v)", file, err)
	}
	if os.MkdirAll(filepath.Dir(out), 0o755) == nil { // a cache that cannot be written costs time only
		if part, err := os.CreateTemp(filepath.Dir(out), "part-*"); err == nil {
			_, werr := part.Write(text)
			if part.Close() != nil || werr != nil || os.Rename(part.Name(), out) != nil {
				os.Remove(part.Name())
			}
		}
	}
	return string(text)
}

func parsed(t testing.TB, text string) *Module {
	t.Helper()
	m, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// launch runs the kernel whose name has all the parts.
func launch(t testing.TB, m *Module, mem *Memory, l Launch, parts ...string) {
	t.Helper()
	k, err := m.Kernel(parts...)
	if err == nil {
		err = k.Run(mem, l)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func words(t testing.TB, mem *Memory, at uint64, n int) []uint32 {
	t.Helper()
	v, err := mem.ReadU32(at, n)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func floats(t testing.TB, mem *Memory, at uint64, n int) []float32 {
	t.Helper()
	v, err := mem.ReadF32(at, n)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
