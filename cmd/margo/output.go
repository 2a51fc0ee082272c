package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"margo/engine/atomicfile"
)

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

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
