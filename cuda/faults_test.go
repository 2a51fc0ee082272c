package cuda

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"margo/engine"
	"margo/engine/sample"
)

func wantError(t *testing.T, what string, err error, kind engine.Kind, text string) {
	t.Helper()
	if !errors.Is(err, kind) || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v, want %v with %q", what, err, kind, text)
	}
}

// TestPluginRefused: what is no plugin, or one of other sources, is refused with a text that
// says what was found.
func TestPluginRefused(t *testing.T) {
	dir := t.TempDir()
	build := func(name, source string) string {
		t.Helper()
		c, lib := filepath.Join(dir, name+".c"), filepath.Join(dir, name+".so")
		if err := os.WriteFile(c, []byte(source), 0o600); err != nil {
			t.Fatal(err)
		}
		kernels, err := filepath.Abs(filepath.Join("..", "kernels"))
		if err != nil {
			t.Fatal(err)
		}
		if text, err := exec.Command("gcc", "-shared", "-fPIC", "-I", kernels, "-o", lib, c).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		return lib
	}
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, path, text string }{
		{"no file", filepath.Join(dir, "none.so"), "there is no " + filepath.Join(dir, "none.so")},
		{"no library", text, "text.so"},
		{"no plugin", build("other", "int other;"), "no function margo_plugin"},
		{"another version", build("major", `#include "margo_abi.h"
			const margo_api *margo_plugin(uint32_t major, uint32_t *have) { *have = MARGO_ABI_MAJOR + 6; return 0; }`), "build both from the same sources"},
		{"an older table", build("minor", `#include "margo_abi.h"
			static const margo_api api = {64, MARGO_ABI_MAJOR, 0};
			const margo_api *margo_plugin(uint32_t major, uint32_t *have) { *have = MARGO_ABI_MAJOR; return &api; }`), "version 1.0, this margo speaks 1."},
		{"an older minor version", build("structs", `#include "margo_abi.h"
			static const margo_api api = {sizeof(margo_api), MARGO_ABI_MAJOR, MARGO_ABI_MINOR - 1};
			const margo_api *margo_plugin(uint32_t major, uint32_t *have) { *have = MARGO_ABI_MAJOR; return &api; }`), "build both from the same sources"},
	} {
		t.Setenv("MARGO_EMU_PLUGIN", c.path)
		_, err := Open("emu:0", Options{})
		wantError(t, c.what, err, engine.Unsupported, c.text)
		_, err = Count("emu")
		wantError(t, c.what, err, engine.Unsupported, c.text)
	}
	for _, name := range []string{"cuda:", "emu:-1", "emu:x", "gpu:0", ""} {
		_, err := Open(name, Options{})
		wantError(t, name, err, engine.Invalid, "is not a CUDA device")
	}
}

// A driver that is missing is not called too old.
func TestDriverText(t *testing.T) {
	const old = "driver version is insufficient (cudaErrorInsufficientDriver)"
	for _, c := range [][4]string{
		{"cuda", "libmargo-none.so.1", old, "no NVIDIA driver: libmargo-none.so.1 not found (" + old + ")"},
		{"cuda", "libc.so.6", old, old},
		{"emu", "libmargo-none.so.1", old, old},
		{"cuda", "libmargo-none.so.1", "another error", "another error"},
	} {
		if got := driverText(c[0], c[1], c[2]); got != c[3] {
			t.Errorf("%q: %q, want %q", c[:3], got, c[3])
		}
	}
}

// TestMisuse: what a caller does wrong is an error, and the device goes on working.
func TestMisuse(t *testing.T) {
	d, other := testDevice(t), testDevice(t)
	open := func(d *Device) engine.Stream {
		t.Helper()
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	tensor := func(d *Device) (*engine.Tensor, engine.Buffer) {
		t.Helper()
		b, err := d.Alloc(4 * 64)
		if err != nil {
			t.Fatal(err)
		}
		return engine.NewTensor(b, 0, engine.F32, 8, 8), b
	}
	s := open(d)
	x, xb := tensor(d)
	y, yb := tensor(other)
	wantError(t, "a tensor of another context", s.Fill(y, 1), engine.Invalid, "another device")
	event, err := open(other).Record()
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, "an event of another context", s.Wait(event), engine.Invalid, "another device")
	if err := event.Close(); err != nil {
		t.Error(err)
	}
	// Calls that wait are refused while a stream captures, and do not spoil the capture.
	host := make([]byte, 4*64)
	graph, err := s.Capture(func() error {
		wantError(t, "sync in a capture", s.Sync(), engine.Invalid, "capturing")
		wantError(t, "copy out in a capture", s.CopyOut(host, x), engine.Invalid, "capturing")
		wantError(t, "copy in in a capture", s.CopyIn(x, host), engine.Invalid, "capturing")
		return s.Fill(x, 2)
	})
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	if err := errors.Join(s.Launch(graph), s.CopyOut(host, x), graph.Close()); err != nil {
		t.Fatal(err)
	}
	if host[3] != 0x40 || host[255] != 0x40 { // 2 is 0x40000000
		t.Errorf("the graph filled with %x", host[:4])
	}
	wantError(t, "a closed graph", s.Launch(graph), engine.Invalid, "closed")
	if err := errors.Join(xb.Free(), yb.Free()); err != nil {
		t.Fatal(err)
	}
	wantError(t, "freeing twice", xb.Free(), engine.Invalid, "freed before")
	wantError(t, "freed memory", s.Fill(x, 1), engine.Invalid, "of a buffer of 0")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wantError(t, "a closed stream", s.Sync(), engine.Invalid, "closed")
}

// TestLeak: closing a device names what was not given back. In a process of its own: the emulator
// reads its environment only where nothing is held, and later tests inject faults by it.
func TestLeak(t *testing.T) {
	if os.Getenv("MARGO_TEST_LEAK") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestLeak$", "-test.v")
		cmd.Env = append(os.Environ(), "MARGO_TEST_LEAK=1")
		if text, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(text), "--- PASS: TestLeak") {
			t.Fatalf("%v\n%s", err, text)
		}
		return
	}
	name := os.Getenv("MARGO_CUDA_TEST_DEVICE")
	if name == "" {
		name = "emu:0"
	}
	d, err := Open(name, Options{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := d.Alloc(1234)
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	before := d.Used()
	if err := b.Free(); err != nil || before != 1234 || d.Used() != 0 {
		t.Errorf("%d bytes were used, then %d (%v)", before, d.Used(), err)
	}
	if b, err = d.Alloc(77); err != nil {
		t.Fatal(err)
	}
	named, err := d.Alloc(4 * 6)
	if err != nil {
		t.Fatal(err)
	}
	engine.Label(named, "pos_emb f32[2,3]")
	w := engine.NewTensor(named, 0, engine.F32, 2, 3)
	for range 2 {
		if _, err := d.Pack(engine.PackArgs{W: w, DType: engine.BF16}); err != nil {
			t.Fatal(err)
		}
	}
	wantError(t, "closing", d.Close(), engine.Internal, "165 bytes were not freed: memory of cuda.TestLeak < testing.tRunner (77 bytes), "+
		"2 × pack bf16[2,3] (64 bytes), pos_emb f32[2,3] (24 bytes)")
	wantError(t, "freeing after the device was closed", b.Free(), engine.Invalid, "the device was closed")
}

// TestStreamsAtOnce: two contexts and several streams of each work at the same time.
func TestStreamsAtOnce(t *testing.T) {
	var all sync.WaitGroup
	for _, d := range []*Device{testDevice(t), testDevice(t)} {
		for k := range 3 {
			all.Add(1)
			go func() {
				defer all.Done()
				c, err := engine.NewCtx(d, engine.F32)
				if err != nil {
					t.Error(err)
					return
				}
				for i := range 10 {
					c.Scoped(func() {
						x, y := c.F32([]float32{1, 2, 3, float32(k)}, 2, 2), c.New(engine.F32, 2, 2)
						c.Cast(engine.CastArgs{X: x, Y: y, Scale: float32(i), Shift: float32(k)})
						got := c.Download(y)
						for j, v := range []float32{1, 2, 3, float32(k)} {
							if c.Err() == nil && got[j] != v*float32(i)+float32(k) {
								t.Errorf("stream %d, round %d: %v", k, i, got)
							}
						}
					})
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}()
		}
	}
	all.Wait()
}

// TestCancelled: a run that is cancelled in the middle leaves nothing behind, and the
// sampler works again.
func TestCancelled(t *testing.T) {
	d := testDevice(t)
	e := openSampler(t, d, engine.F32)
	runSampler(t, d, e, 1, 4)
	used := d.Used()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r := sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.Labels = 1, 1, 8, 5, []int{1}
	err := e.Run(ctx, r, func(sample.Progress) { cancel() }, func(sample.Image) error { return nil })
	wantError(t, "a cancelled run", err, engine.Cancelled, "")
	if d.Used() > used { // less: working memory is given back after an error
		t.Errorf("%d bytes are held after it, %d before", d.Used(), used)
	}
	runSampler(t, d, e, 1, 4)
}
