//go:build unix

package checkpoint

import (
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
}
