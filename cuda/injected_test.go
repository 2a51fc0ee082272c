package cuda

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"margo/engine"
	weights "margo/engine/load"
	"margo/engine/sample"
	"margo/engine/testkit"
)

func emulatorOnly(t *testing.T) {
	t.Helper()
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("faults are injected into the emulator only")
	}
}

// TestWrongArchitecture: a device that is too old is refused when it is opened, one that the plugin has no code
// for at the first kernel.
func TestWrongArchitecture(t *testing.T) {
	emulatorOnly(t)
	t.Setenv("MARGO_EMU_CC", "75")
	_, err := Open("emu:0", Options{})
	wantError(t, "an old device", err, engine.Unsupported, "has compute capability 7.5: the kernels need 8.0")

	t.Setenv("MARGO_EMU_CC", "80")
	t.Setenv("MARGO_EMU_BUILT_FOR", "90")
	d := testDevice(t)
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b, err := d.Alloc(2 * 4 * 64)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	x, h := engine.NewTensor(b, 0, engine.F32, 8, 8), engine.NewTensor(b, 4*64, engine.F32, 8, 8)
	err = s.GatedAdd(engine.GatedAddArgs{X: x, H: h, Y: x})
	wantError(t, "a device without code", err, engine.Unsupported, "no kernel image is available")
	wantError(t, "a device without code", err, engine.Unsupported, "gated_add")
}

// sampleOnce opens the emulator, loads the trained tiny MAR and draws an image, giving all back whatever
// happens. closed is what the closings said.
func sampleOnce(t *testing.T) (err, again, closed error, c Counters) {
	t.Helper()
	d, err := Open("emu:0", Options{Poison: true})
	if err != nil {
		return err, nil, nil, c
	}
	defer func() { c = d.Counters(); closed = errors.Join(closed, d.Close()) }()
	f, m := testkit.OpenMAR(t, golden("mar_tiny_trained"))
	defer weights.Free(engine.Params(m))
	if err := weights.Bind(engine.Params(m), f, d, engine.F32, weights.Options{}); err != nil {
		return err, nil, nil, c
	}
	e, err := sample.Open(m, nil, d, sample.Options{Compute: engine.F32})
	if err != nil {
		return err, nil, nil, c
	}
	defer func() { closed = e.Close() }()
	r := sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.Labels = 1, 1, 3, 2, []int{1}
	run := func() error {
		return e.Run(context.Background(), r, nil, func(sample.Image) error { return nil })
	}
	if err = run(); err != nil {
		again = run()
	}
	return err, again, nil, c
}

// TestDeviceLost: a device that is lost in the middle of a run says so with the op that met it, says so again, can
// be closed, and does not spoil the next one.
func TestDeviceLost(t *testing.T) {
	emulatorOnly(t)
	deviceLost(t, 1, 7)
	t.Run("pool", func(t *testing.T) {
		t.Setenv("MARGO_CUDA_CACHE", "256MiB")
		deviceLost(t)
	})
}

// deviceLost loses the device at these launches, in the middle and at the last.
func deviceLost(t *testing.T, launches ...uint64) {
	err, _, closed, c := sampleOnce(t)
	if err != nil || closed != nil {
		t.Fatalf("undisturbed: %v, closing: %v", err, closed)
	}
	for _, at := range append(launches, c.Kernels/2, c.Kernels-1) {
		t.Setenv("MARGO_EMU_LOSE_DEVICE", strconv.FormatUint(at, 10))
		err, again, _, _ := sampleOnce(t)
		wantError(t, "lost", err, engine.DeviceFault, "the device was lost")
		var e *engine.Error
		if errors.As(err, &e) && (e.Op == "" || e.Device != "emu:0") {
			t.Errorf("lost at launch %d: the error names op %q and device %q: %v", at, e.Op, e.Device, err)
		}
		if at >= c.Kernels/2 { // the weights are loaded: it is lost in the run
			wantError(t, "a run on a lost device", again, engine.DeviceFault, "")
		}
		t.Logf("launch %d of %d: %v", at, c.Kernels, err)
	}
	t.Setenv("MARGO_EMU_LOSE_DEVICE", "")
	if err, _, closed, _ := sampleOnce(t); err != nil || closed != nil {
		t.Errorf("the next device: %v, closing: %v", err, closed)
	}
}

// TestMemoryTaken: another process takes the memory that was free when this one has made n allocations, for n from
// the first to the last of a run. The error says what was asked, held and free; nothing stays allocated.
func TestMemoryTaken(t *testing.T) {
	emulatorOnly(t)
	memoryTaken(t)
	t.Run("pool", func(t *testing.T) { // what is cached is given back first, and does not stay either
		t.Setenv("MARGO_CUDA_CACHE", "256MiB")
		memoryTaken(t)
	})
}

func memoryTaken(t *testing.T) {
	err, _, closed, c := sampleOnce(t)
	if err != nil || closed != nil {
		t.Fatalf("undisturbed: %v, closing: %v", err, closed)
	}
	last := c.DeviceAllocs // the device's own allocation at opening is not among these
	counts := []uint64{0, 1, 2, last / 3, last / 2, last - 1, last}
	if os.Getenv("MARGO_CUDA_CACHE") != "" {
		counts = []uint64{last / 2, last}
	}
	for _, n := range counts {
		t.Setenv("MARGO_EMU_FAIL_ALLOC", strconv.FormatUint(n, 10))
		err, _, closed, _ := sampleOnce(t)
		want := "asked, "
		if n == 0 {
			want = "opening the device"
		}
		wantError(t, "memory taken", err, engine.OutOfMemory, want)
		if n > 0 && (err == nil || !strings.Contains(err.Error(), ", 0.0 of 8192.0 MiB free")) {
			t.Errorf("after %d allocations: %v, want how much is held and free", n, err)
		}
		if closed != nil { // a leak is an error of the closing
			t.Errorf("after %d allocations: closing: %v", n, closed)
		}
	}
	t.Setenv("MARGO_EMU_FAIL_ALLOC", strconv.FormatUint(last+1, 10))
	if err, _, closed, _ := sampleOnce(t); err != nil || closed != nil {
		t.Errorf("with enough memory: %v, closing: %v", err, closed)
	}
}

// TestProgramFaults runs margo itself on the emulator: SIGTERM during a graph of a sample, a device that is lost and
// memory that is taken each end it with their exit code, one line and no file.
func TestProgramFaults(t *testing.T) {
	emulatorOnly(t)
	program := filepath.Join(t.TempDir(), "margo")
	if text, err := exec.Command("go", "build", "-o", program, "../cmd/margo").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	start := func(dir, steps string, env ...string) (*exec.Cmd, *bytes.Buffer) {
		t.Helper()
		cmd := exec.Command(program, "sample", "--device", "emu:0", "--model", filepath.Join("..", "models", "fashion-mar.safetensors"),
			"--classes", "1", "-n", "100", "--batch", "1", "--iters", "2", "--head-steps", steps, "--out", filepath.Join(dir, "grid.png"))
		cmd.Env = append(os.Environ(), env...)
		w := new(bytes.Buffer) // read after the program's end
		cmd.Stdout, cmd.Stderr = w, w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, w
	}
	ended := func(cmd *exec.Cmd, w *bytes.Buffer, dir string, code int, last string) {
		t.Helper()
		timer := time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() })
		defer timer.Stop()
		cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("exit code %d, want %d:\n%s", got, code, w)
		}
		lines := strings.Split(strings.TrimSpace(w.String()), "\n")
		if end := lines[len(lines)-1]; !strings.HasPrefix(end, "margo: ") || !strings.Contains(end, last) {
			t.Errorf("the last line is %q, want one with %q", end, last)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 0 {
			t.Errorf("left %v (%v)", left, err)
		}
	}
	t.Run("SIGTERM", func(t *testing.T) {
		dir := t.TempDir()
		trace := filepath.Join(t.TempDir(), "trace")
		cmd, w := start(dir, "30", "MARGO_EMU_TRACE="+trace)
		for i := 0; ; i++ { // until the head's graph of 29 steps, which runs for long here, has been launched
			if text, _ := os.ReadFile(trace); bytes.Contains(text, []byte("graph nodes=")) {
				break
			}
			if i == 1200 {
				cmd.Process.Kill()
				cmd.Wait()
				t.Fatalf("does not begin to sample in a minute:\n%s", w)
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		ended(cmd, w, dir, 130, "interrupted")
		if strings.Contains(w.String(), "not freed") {
			t.Errorf("leaks:\n%s", w)
		}
	})
	t.Run("two processes", func(t *testing.T) { twoProcesses(t, program) })
	for _, c := range []struct{ variable, value, want string }{
		{"MARGO_EMU_LOSE_DEVICE", "40", "the device was lost"},
		{"MARGO_EMU_FAIL_ALLOC", "12", "0.0 of 8192.0 MiB free"},
		{"MARGO_EMU_CC", "75", "compute capability 7.5"},
		{"MARGO_EMU_DRIVER", "12080", "driver version is insufficient"},
	} {
		t.Run(c.variable, func(t *testing.T) {
			dir := t.TempDir()
			cmd, w := start(dir, "2", c.variable+"="+c.value)
			ended(cmd, w, dir, 1, c.want)
		})
	}
}
