//go:build unix

package checkpoint

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A FIFO without a writer is refused at once instead of waited for.
func TestFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Skip(err)
	}
	_, err := Open(path, OpenOptions{})
	wantBad(t, "FIFO", err, "not a regular file")

	// Nor does a config.json beside a file of diffusers hold it up.
	model := filepath.Join(t.TempDir(), "model.safetensors")
	diffusersDiT(t, model, nil)
	config := filepath.Join(filepath.Dir(model), "config.json")
	if err := errors.Join(os.Remove(config), unix.Mkfifo(config, 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err = Describe(mustOpen(t, model, OpenOptions{}), MAROptions{})
	wantBad(t, "config.json", err, "config.json", "not a regular file")
}
