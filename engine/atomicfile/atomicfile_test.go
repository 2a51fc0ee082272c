package atomicfile

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"margo/engine"
)

// folder lists the names in dir.
func folder(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	os.WriteFile(path, []byte("old"), 0o666)
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Write([]byte("new"))
	if got := content(t, path); got != "old" {
		t.Errorf("the old file changed before Commit: %q", got)
	}
	f.Abort()
	if left := folder(t, dir); len(left) != 1 {
		t.Errorf("Abort left %v", left)
	}
	if f, err = Create(path); err != nil {
		t.Fatal(err)
	}
	f.Write([]byte("new"))
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	f.Abort() // does nothing now
	if got := content(t, path); got != "new" {
		t.Errorf("not replaced: %q", got)
	}
	_, err = Create(filepath.Join(dir, "no", "such", "folder"))
	if !errors.Is(err, engine.IO) || !errors.Is(err, ErrWrite) || strings.Contains(err.Error(), ".part") {
		t.Errorf("error should name the target and not the temporary file: %v", err)
	}
	if f, err = Create(filepath.Join(dir, "y")); err != nil {
		t.Fatal(err)
	}
	if RemoveUnfinished(); len(folder(t, dir)) != 1 {
		t.Error("the unfinished file is still there")
	}
	f.Abort()
	// A target that cannot be replaced: Commit fails and cleans up.
	os.MkdirAll(filepath.Join(dir, "d", "child"), 0o777)
	if f, err = Create(filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(); !errors.Is(err, engine.IO) || !errors.Is(err, ErrWrite) {
		t.Errorf("Commit over a folder: %v", err)
	}
	if left := folder(t, dir); len(left) != 2 {
		t.Errorf("failed Commit left %v", left)
	}
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	put := func(ctx context.Context, text string, err error) error {
		return Write(ctx, path, func(w io.Writer) error {
			io.WriteString(w, text)
			return err
		})
	}
	if err := put(t.Context(), "old", nil); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := put(t.Context(), "new", broken); err != broken {
		t.Errorf("the callback's error became %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, text := range []string{"", "new", strings.Repeat("long", 1<<20)} {
		if err := put(ctx, text, nil); !errors.Is(err, engine.Cancelled) || errors.Is(err, ErrWrite) {
			t.Errorf("cancelled with %d bytes: %v", len(text), err)
		}
	}
	func() {
		defer func() { recover() }()
		Write(t.Context(), path, func(w io.Writer) error { panic("in the middle") })
	}()
	if got := content(t, path); got != "old" || len(folder(t, dir)) != 1 {
		t.Errorf("%q, and the folder has %v", got, folder(t, dir))
	}
	if err := put(t.Context(), "new", nil); err != nil || content(t, path) != "new" {
		t.Errorf("%v, %q", err, content(t, path))
	}
	// While a file is written, it is known as unfinished.
	err := Write(t.Context(), filepath.Join(dir, "y"), func(w io.Writer) error {
		RemoveUnfinished()
		if left := folder(t, dir); len(left) != 1 {
			t.Errorf("RemoveUnfinished left %v", left)
		}
		return broken
	})
	if err != broken {
		t.Error(err)
	}
}

func TestDiskFull(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("no /dev/full here")
	}
	f, err := Create(filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Abort()
	part := f.file
	f.file = full
	_, err = f.Write([]byte("text"))
	f.file = part
	full.Close()
	if !errors.Is(err, engine.IO) || !errors.Is(err, ErrWrite) || !errors.Is(err, syscall.ENOSPC) || strings.Contains(err.Error(), "/dev/full") {
		t.Errorf("a full disk: %v", err)
	}
}
