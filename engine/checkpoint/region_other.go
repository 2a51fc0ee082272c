//go:build !unix

package checkpoint

import (
	"errors"
	"os"
)

func mmap(*os.File, int64) ([]byte, error) { return nil, errors.ErrUnsupported }
func munmap([]byte) error                  { return nil }
func dropPages([]byte, int64, int64)       {}
