package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"margo/engine/atomicfile"
)

// sink is standard output. Text for people is printed without looking at errors: the
// first is kept here, so that a full disk does not end with exit code 0.
type sink struct {
	mu  sync.Mutex
	w   io.Writer
	err error
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	if err != nil {
		err = fmt.Errorf("standard output: %w", cause(err))
		s.mu.Lock()
		s.err = cmp.Or(s.err, err)
		s.mu.Unlock()
	}
	return n, err
}

// failure is the first error of writing.
func (s *sink) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// cause is the reason alone, without the path that the caller's message names.
func cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// checkWritable finds out, before any work, whether a file can be written.
func checkWritable(path string) error {
	s, err := os.Stat(path)
	switch {
	case err != nil: // nothing of that name yet
	case s.IsDir():
		return usagef("output %s is a folder", path)
	case !s.Mode().IsRegular(): // the new file would take the place of a device
		return usagef("output %s is not a regular file", path)
	}
	f, err := atomicfile.Create(path)
	if err != nil {
		if dir := filepath.Dir(path); !exists(dir) {
			return failf("cannot write %s: there is no folder %s", path, dir)
		}
		return failf("cannot %w", err)
	}
	f.Abort()
	return nil
}

// readText reads a file of at most most bytes.
func readText(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, cause(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("more than %d bytes", most)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, cause(err))
	}
	return b, nil
}

func isFolder(path string) bool {
	s, err := os.Stat(path)
	return err == nil && s.IsDir()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
