// Package atomicfile writes files that appear complete or not at all: each is
// written beside its target under a temporary name and renamed when it is
// complete. A reader never sees half a file; a failed or cancelled run leaves
// the old file as it was.
package atomicfile

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"margo/engine"
)

// ErrWrite is what every failure of this package to write is, beside being an
// *engine.Error of Kind IO: errors.Is(err, ErrWrite) tells a full disk from a
// bad input file.
var ErrWrite = errors.New("not written")

// File is a file being written: it appears under its name only at Commit.
type File struct {
	file *os.File
	path string
	done bool
}

// Create starts writing path, in a temporary file of the same folder.
func Create(path string) (*File, error) {
	// Not os.CreateTemp: its files are private, these have the umask's mode.
	for {
		name := fmt.Sprintf(".%s.%d-%d.part", filepath.Base(path), os.Getpid(), serial.Add(1))
		f, err := os.OpenFile(filepath.Join(filepath.Dir(path), name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, failed(path, err)
		}
		w := &File{file: f, path: path}
		unfinished.Store(w, f.Name())
		return w, nil
	}
}

var (
	serial     atomic.Uint64
	unfinished sync.Map // *File → temporary name
)

// RemoveUnfinished removes the temporary files of this process, for a program
// that is about to exit in the middle of its work.
func RemoveUnfinished() {
	unfinished.Range(func(_, name any) bool {
		os.Remove(name.(string))
		return true
	})
}

// Write appends p.
func (f *File) Write(p []byte) (int, error) {
	n, err := f.file.Write(p)
	if err != nil {
		err = failed(f.path, err)
	}
	return n, err
}

// Commit makes the file durable and gives it its name. On failure nothing is
// left behind.
func (f *File) Commit() error {
	if f.done {
		return nil
	}
	f.done = true
	defer unfinished.Delete(f)
	err := f.file.Sync()
	if e := f.file.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.file.Name(), f.path)
	}
	if err != nil {
		os.Remove(f.file.Name())
		return failed(f.path, err)
	}
	return nil
}

// Abort removes what was written; after Commit it does nothing.
func (f *File) Abort() {
	if !f.done {
		f.done = true
		f.file.Close()
		os.Remove(f.file.Name())
		unfinished.Delete(f)
	}
}

// Write gives path the bytes that write produces, buffered. An error of write,
// which is returned as it is, a panic of it or a cancelled ctx leaves path as
// it was; ctx is looked at before each megabyte.
func Write(ctx context.Context, path string, write func(io.Writer) error) error {
	f, err := Create(path)
	if err != nil {
		return err
	}
	defer f.Abort()
	b := bufio.NewWriterSize(ctxWriter{ctx, f}, 1<<20)
	if err := write(b); err != nil {
		return err
	}
	if err := b.Flush(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return cancelled(path, err)
	}
	if err := f.Commit(); err != nil {
		return err
	}
	// The rename itself survives a power cut only once the folder is synced.
	// Not every file system can do that; the data is safe either way.
	if d, err := os.Open(filepath.Dir(path)); err == nil {
		_ = d.Sync()
		d.Close()
	}
	return nil
}

// ctxWriter fails once ctx is done, so that long writes can be cancelled.
type ctxWriter struct {
	ctx context.Context
	f   *File
}

func (c ctxWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, cancelled(c.f.path, err)
	}
	return c.f.Write(p)
}

func cancelled(path string, err error) error {
	return &engine.Error{Op: "write " + path, Kind: engine.Cancelled, Err: err}
}

// failed names the file once: the causes in os repeat the temporary name.
func failed(path string, err error) error {
	var pe *fs.PathError
	var le *os.LinkError
	if errors.As(err, &pe) {
		err = pe.Err
	} else if errors.As(err, &le) {
		err = le.Err
	}
	return &engine.Error{Op: "write " + path, Kind: engine.IO, Err: cause{err}}
}

// cause is the reason of a failure, and ErrWrite.
type cause struct{ error }

func (c cause) Unwrap() error { return c.error }

// Is makes errors.Is(err, ErrWrite) true.
func (cause) Is(target error) bool { return target == ErrWrite }
