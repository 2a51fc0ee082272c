package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A report names the commit of margo's sources only, whatever repository it is made in.
func TestCommitIsMargos(t *testing.T) {
	dir := t.TempDir()
	if got := describe(dir); got != "unknown" {
		t.Errorf("outside a repository: %q", got)
	}
	if _, err := exec.LookPath("git"); err != nil {
		t.Skipf("no commit to find: %v", err)
	}
	for _, args := range [][]string{{"init", "-q"}, {"-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"}} {
		if out, err := exec.Command("git", append([]string{"-C", dir}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	for mod, known := range map[string]bool{"": false, "module other\n": false, "module margo\n\ngo 1.24\n": true} {
		if mod != "" {
			if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte(mod), 0o666); err != nil {
				t.Fatal(err)
			}
		}
		if got := describe(dir); (got != "unknown") != known {
			t.Errorf("go.mod %q: %q", mod, got)
		}
		os.Remove(filepath.Join(dir, "go.mod"))
	}
}

func TestCommandNamesVariables(t *testing.T) {
	got := command([]string{"PATH=/bin", "MARGO_SM90=0", "HOME=/", "MARGO_HEAD_PATH=latency"}, []string{"margo", "bench", "--batch", "1"})
	if want := "MARGO_HEAD_PATH=latency MARGO_SM90=0 margo bench --batch 1"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
