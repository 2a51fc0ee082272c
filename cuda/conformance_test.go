package cuda

import (
	"os"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/conformance"
)

// testDevice opens the device that the tests run on: the emulator, or what
// MARGO_CUDA_TEST_DEVICE names ("cuda:0" on a machine with a GPU).
func testDevice(t *testing.T) *Device { return openDevice(t, Options{Poison: true}) }

// upload makes a tensor of b, for as long as the test runs.
func upload(t *testing.T, d *Device, s engine.Stream, dt engine.DType, b []byte, shape ...int) *engine.Tensor {
	t.Helper()
	buf, err := d.Alloc(len(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { buf.Free() })
	x := engine.NewTensor(buf, 0, dt, shape...)
	if err := s.CopyIn(x, b); err != nil {
		t.Fatal(err)
	}
	return x
}

func openDevice(t *testing.T, o Options) *Device {
	t.Helper()
	name := os.Getenv("MARGO_CUDA_TEST_DEVICE")
	if name == "" {
		name = "emu:0"
	}
	d, err := Open(name, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// TestConformance runs the table of op cases against the float64 oracle; on the
// emulator without the shapes of real models, which would take it half an hour.
func TestConformance(t *testing.T) {
	d := testDevice(t)
	conformance.Run(t, d, conformance.Options{Quick: testing.Short() || strings.HasPrefix(d.Name(), "emu")})
}
