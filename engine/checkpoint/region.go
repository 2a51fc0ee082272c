package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"unsafe"

	"margo/engine"
)

// errTruncated is what reading past the end of a file that shrank gives.
var errTruncated = errors.New("the file was truncated while it was open")

// region is a file's bytes: mapped where the system can, else read piecewise.
// Its methods may be called from several goroutines.
type region struct {
	mu     sync.RWMutex // Close must not unmap under a reader
	mem    []byte       // the mapping; nil without one
	mapped bool         // mem came from mmap, not from the heap
	file   *os.File
	size   int64
	closed bool
}

func openRegion(path string) (*region, error) {
	op := "open " + path
	fail := func(err error) (*region, error) {
		var pe *os.PathError
		if errors.As(err, &pe) { // "open x: open x: no such file" says it twice
			err = pe.Err
		}
		return nil, &engine.Error{Op: op, Kind: engine.IO, Err: err}
	}
	st, err := os.Stat(path) // first: opening a FIFO would wait for its writer
	if err != nil {
		return fail(err)
	}
	if !st.Mode().IsRegular() {
		return fail(errors.New("not a regular file"))
	}
	f, err := os.Open(path)
	if err != nil {
		return fail(err)
	}
	if st, err = f.Stat(); err == nil && st.Size() == 0 {
		err = errors.New("the file is empty")
	}
	if err != nil {
		f.Close()
		return fail(err)
	}
	r := &region{file: f, size: st.Size()}
	if mem, err := mmap(f, r.size); err == nil {
		r.mem, r.mapped = mem, true
	}
	return r, nil
}

func memRegion(b []byte) *region { return &region{mem: b, size: int64(len(b))} }

// ReadAt copies bytes out, all or none. A page that is gone since the file was
// mapped (SIGBUS) is an error.
func (r *region) ReadAt(dst []byte, off int64) (n int, err error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	switch {
	case r.closed:
		return 0, os.ErrClosed
	case off < 0 || off > r.size:
		return 0, fmt.Errorf("offset %d outside the file of %d bytes", off, r.size)
	}
	want := len(dst)
	if int64(want) > r.size-off { // io.ReaderAt's contract, which archive/zip uses
		dst, err = dst[:r.size-off], io.EOF
	}
	if r.mem == nil {
		n, rerr := r.file.ReadAt(dst, off)
		if n < len(dst) {
			if rerr == io.EOF {
				rerr = errTruncated
			}
			return n, rerr
		}
		return n, err
	}
	if cerr := guarded(r.mem[off:], func() { copy(dst, r.mem[off:]) }); cerr != nil {
		return 0, cerr
	}
	return len(dst), err
}

// gather fills dst with the cursor's next elements, which place has found inside
// the file. Only they are read: the span of a strided tensor may be all of a
// sparse file, and is never copied.
func (r *region) gather(dst []byte, c *cursor) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed {
		return os.ErrClosed
	}
	if r.mem != nil { // guarded once for all runs: a run may be one element
		return guarded(r.mem, func() {
			for len(dst) > 0 {
				off, n := c.next(len(dst))
				copy(dst[:n], r.mem[off:])
				dst = dst[n:]
			}
		})
	}
	for len(dst) > 0 {
		off, n := c.next(len(dst))
		if got, err := r.file.ReadAt(dst[:n], off); got < n {
			if err == io.EOF {
				err = errTruncated
			}
			return err
		}
		dst = dst[n:]
	}
	return nil
}

// guarded calls fn, which reads src; a memory fault inside src becomes an error.
// Faults elsewhere stay what they are.
func guarded(src []byte, fn func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if f, ok := p.(interface{ Addr() uintptr }); ok && len(src) > 0 {
			base := uintptr(unsafe.Pointer(unsafe.SliceData(src)))
			if a := f.Addr(); a >= base && a-base < uintptr(len(src)) {
				err = errTruncated
				return
			}
		}
		panic(p)
	}()
	fn()
	return nil
}

// drop tells the system that the pages of [off, off+n) are not needed for now.
func (r *region) drop(off, n int64) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.closed && r.mapped && n > 0 && off >= 0 && off <= r.size-n {
		dropPages(r.mem, off, n)
	}
}

func (r *region) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	var err error
	if r.mapped {
		err = munmap(r.mem)
	}
	r.mem = nil
	if r.file != nil {
		err = errors.Join(err, r.file.Close())
	}
	return err
}
