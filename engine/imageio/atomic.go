package imageio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"margo/engine"
)

// File is a file being written: it appears under its name only at Commit.
type File struct {
	*os.File
	path string
	done bool
}

// Create starts writing path, in a temporary file of the same folder.
func Create(path string) (*File, error) {
	// Not os.CreateTemp: its files are private, samples have the umask's mode.
	for {
		name := fmt.Sprintf(".%s.%d-%d.part", filepath.Base(path), os.Getpid(), serial.Add(1))
		f, err := os.OpenFile(filepath.Join(filepath.Dir(path), name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, ioError(path, err)
		}
		w := &File{File: f, path: path}
		open.Store(w, f.Name())
		return w, nil
	}
}

var (
	serial atomic.Uint64
	open   sync.Map // *File → temporary name
)

// RemoveUnfinished removes the temporary files of this process, for a program
// that is about to exit in the middle of its work.
func RemoveUnfinished() {
	open.Range(func(_, name any) bool {
		os.Remove(name.(string))
		return true
	})
}

// Commit makes the file durable and gives it its name. On failure nothing is
// left behind.
func (f *File) Commit() error {
	if f.done {
		return nil
	}
	defer open.Delete(f)
	err := f.Sync()
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), f.path)
	}
	if err != nil {
		os.Remove(f.Name())
		err = ioError(f.path, err)
	}
	f.done = true
	return err
}

// Abort removes what was written; after Commit it does nothing.
func (f *File) Abort() {
	if !f.done {
		f.Close()
		os.Remove(f.Name())
		open.Delete(f)
		f.done = true
	}
}

// writeAtomic writes one complete file.
func writeAtomic(path string, data []byte) error {
	f, err := Create(path)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Abort()
		return ioError(path, err)
	}
	return f.Commit()
}

// ioError names the file once: the causes in os repeat the temporary name.
func ioError(path string, err error) error {
	var pe *fs.PathError
	var le *os.LinkError
	if errors.As(err, &pe) {
		err = pe.Err
	} else if errors.As(err, &le) {
		err = le.Err
	}
	return engine.Errorf("write "+path, engine.IO, "%w", err)
}
