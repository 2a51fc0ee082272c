package cuda

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// buildEmu builds a program of kernels/emu/test with kernels/emu/Makefile; san is "", "check", "address" or "thread".
func buildEmu(t *testing.T, san, program string) string {
	t.Helper()
	out, err := filepath.Abs(filepath.Join("..", "bin"))
	if err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command("make", "-s", "-C", filepath.Join("..", "kernels", "emu"), "OUT="+out, "SAN="+san, program).CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", program, err, text)
	}
	dir := "emu"
	if san != "" {
		dir += "-" + san
	}
	return filepath.Join(out, dir, program)
}

// TestSanitizers: in spite of the fibers, the sanitizers see what they are for (kernels/emu/test/sanitized.cu)
// and report nothing where there is nothing.
func TestSanitizers(t *testing.T) {
	for san, bugs := range map[string]map[string]string{
		"address": {
			"none":      `^ok\n$`,
			"heap":      `heap-buffer-overflow .*sanitized\.cu:\d+ in rotate`,
			"shared":    `heap-buffer-overflow .*sanitized\.cu:\d+ in past_shared`,
			"stack":     `stack-buffer-overflow .*sanitized\.cu:\d+ in past_local`,
			"freed":     `heap-use-after-free .*sanitized\.cu:\d+ in rotate`,
			"undefined": `sanitized\.cu:\d+:\d+: runtime error: shift exponent 32`,
		},
		"thread": {
			"none":    `^ok\n$`,
			"threads": `data race .*sanitized\.cu:\d+ in `, // of two threads of the host
			"blocks":  `data race .*sanitized\.cu:\d+ in counts`,
		},
	} {
		program := buildEmu(t, san, "sanitized")
		for bug, want := range bugs {
			for _, seed := range []string{"0", "1"} {
				t.Run(san+"/"+bug+"/seed "+seed, func(t *testing.T) {
					cmd := exec.Command(program, bug)
					// With a seed blocks are spread over one thread only, unless told otherwise.
					cmd.Env = append(os.Environ(), "MARGO_EMU_SEED="+seed, "MARGO_EMU_THREADS=2", "TSAN_OPTIONS=halt_on_error=1", "ASAN_OPTIONS=", "LD_PRELOAD=")
					text, err := cmd.CombinedOutput()
					var exit *exec.ExitError
					if failed := errors.As(err, &exit); failed != (bug != "none") || err != nil && !failed {
						t.Errorf("ended with %v", err)
					}
					// Reports' last line, "SUMMARY: ...", names kind and place.
					if !regexp.MustCompile(want).MatchString(string(text)) {
						lines := strings.Split(strings.TrimSpace(string(text)), "\n")
						t.Errorf("want %s, got %d lines that end with %q", want, len(lines), lines[len(lines)-1])
					}
				})
			}
		}
	}
}
