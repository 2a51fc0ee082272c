package cuda

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestMain brings the emulated plugin up to date, unless the environment names one:
// without it there is nothing to test here, and to skip would look like passing.
func TestMain(m *testing.M) {
	if os.Getenv("MARGO_EMU_PLUGIN") == "" && os.Getenv("MARGO_CUDA_TEST_DEVICE") == "" {
		out, err := filepath.Abs(filepath.Join("..", "bin"))
		if err == nil {
			var text []byte
			if text, err = exec.Command("make", "-s", "-C", filepath.Join("..", "kernels", "emu"), "OUT="+out).CombinedOutput(); err != nil {
				err = fmt.Errorf("building the emulated plugin: %w\n%s", err, text)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Setenv("MARGO_EMU_PLUGIN", filepath.Join(out, "libmargo_emu.so"))
	}
	os.Exit(m.Run())
}
