//go:build unix

package checkpoint

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

func mmap(f *os.File, size int64) ([]byte, error) {
	if int64(int(size)) != size {
		return nil, errors.New("larger than the address space")
	}
	return unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_PRIVATE)
}

func munmap(b []byte) error { return unix.Munmap(b) }

// dropPages rounds outwards: a page shared with a neighbour is read again from
// the page cache if the neighbour still needs it.
func dropPages(mem []byte, off, n int64) {
	page := int64(os.Getpagesize())
	lo := off / page * page
	hi := min((off+n+page-1)/page*page, int64(len(mem)))
	_ = unix.Madvise(mem[lo:hi], unix.MADV_DONTNEED) // advice: failing costs memory only
}
