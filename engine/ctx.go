package engine

import (
	"math"
	"sync/atomic"
	"unsafe"
)

// Ctx is what model code runs in: a stream to launch on, an arena for
// activations and the dtype of GEMM operands. The first error sticks: later
// ops do nothing and return nil tensors, and the caller asks Err once.
//
// A Ctx records nothing at inference. Training attaches its tape here, and a
// model need not be written twice for it.
type Ctx struct {
	Stream  Stream
	Arena   *Arena
	Compute DType   // dtype of GEMM and attention operands: F32 or BF16
	Cancel  *uint32 // non-zero asks to stop; may be nil
	// Constants are recorded by F32 and I32, or taken from what was; nil: neither.
	Constants *Constants
	err       error
}

// NewCtx makes a context on a new stream of d.
func NewCtx(d Device, compute DType) (*Ctx, error) {
	s, err := d.NewStream()
	if err != nil {
		return nil, err
	}
	return &Ctx{Stream: s, Arena: NewArena(d), Compute: compute}, nil
}

// Close releases the arena and the stream.
func (c *Ctx) Close() error {
	err := c.Stream.Sync()
	if e := c.Arena.Close(); err == nil {
		err = e
	}
	if e := c.Stream.Close(); err == nil {
		err = e
	}
	return err
}

// Err is the first error, or nil.
func (c *Ctx) Err() error { return c.err }

// Fail sticks err if it is the first.
func (c *Ctx) Fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// ClearErr forgets the error, so that a context can be used again.
func (c *Ctx) ClearErr() error { err := c.err; c.err = nil; return err }

// Poll reports whether c should stop: an error has stuck, or Cancel is set,
// which then sticks as Cancelled. Model code asks between layers.
func (c *Ctx) Poll() bool {
	if c.err == nil && c.Cancel != nil && atomic.LoadUint32(c.Cancel) != 0 {
		c.err = &Error{Op: "run", Kind: Cancelled}
	}
	return c.err != nil
}

// New takes a tensor with undefined contents from the arena; nil after an error.
func (c *Ctx) New(d DType, shape ...int) *Tensor {
	if c.err != nil {
		return nil
	}
	n := volume(volume(shape...), d.Size())
	if n == math.MaxInt {
		c.err = Errorf("new", Invalid, "%v%s cannot be: a negative dimension, or too many elements", d, ShapeString(shape))
		return nil
	}
	buf, off, err := c.Arena.Alloc(n)
	if err != nil {
		c.err = err
		return nil
	}
	return NewTensor(buf, off, d, shape...)
}

// Scoped runs f and gives back the arena memory that f took. Tensors made
// inside must not be used afterwards.
func (c *Ctx) Scoped(f func()) {
	m := c.Arena.Mark()
	f()
	c.Arena.Release(m)
}

// F32 takes a tensor and fills it with v. It is not for what a kernel writes to
// (see Constants).
func (c *Ctx) F32(v []float32, shape ...int) *Tensor {
	if volume(shape...) == len(v) {
		if t := c.constant(F32, bytesOf(v), shape); t != nil {
			return t
		}
	}
	t := c.New(F32, shape...)
	c.Upload(t, v)
	return t
}

// I32 takes an index tensor of len(v) elements and fills it. It is not for what a
// kernel writes to (see Constants).
func (c *Ctx) I32(v []int32, shape ...int) *Tensor {
	if len(shape) == 0 {
		shape = []int{len(v)}
	}
	if volume(shape...) == len(v) {
		if t := c.constant(I32, bytesOf(v), shape); t != nil {
			return t
		}
	}
	t := c.New(I32, shape...)
	if c.err == nil && len(v) > 0 {
		c.err = c.Stream.CopyIn(t, bytesOf(v))
	}
	return t
}

// Upload copies v into the contiguous tensor t, converting to its dtype.
func (c *Ctx) Upload(t *Tensor, v []float32) {
	if c.err != nil {
		return
	}
	if t == nil || t.Elems() != len(v) {
		c.err = Errorf("upload", Invalid, "%d values for %v", len(v), t)
		return
	}
	if len(v) == 0 {
		return
	}
	if t.DType == F32 {
		c.err = c.Stream.CopyIn(t, bytesOf(v))
		return
	}
	h := make([]uint16, len(v))
	for i, f := range v {
		h[i] = ToBF16(f)
	}
	c.err = c.Stream.CopyIn(t, bytesOf(h))
}

// Download waits for t and returns its elements, widened to float32; nil after
// an error. Rows may be strided.
func (c *Ctx) Download(t *Tensor) []float32 {
	if c.err != nil {
		return nil
	}
	if t == nil {
		c.err = Errorf("download", Invalid, "no tensor")
		return nil
	}
	out := make([]float32, t.Elems())
	if len(out) == 0 {
		return out
	}
	if !t.Contiguous() {
		for r := 0; r < t.Rows(); r++ {
			copy(out[r*t.Cols():], c.Download(t.RowsAt(r, r+1)))
		}
		return out
	}
	if t.DType == BF16 {
		h := make([]uint16, len(out))
		c.err = c.Stream.CopyOut(bytesOf(h), t)
		for i, v := range h {
			out[i] = FromBF16(v)
		}
		return out
	}
	c.err = c.Stream.CopyOut(bytesOf(out), t)
	return out
}

// Sync waits for everything enqueued; the result is also c's error.
func (c *Ctx) Sync() error {
	if c.err == nil {
		c.err = c.Stream.Sync()
	}
	return c.err
}

// bytesOf views a slice of numbers as bytes in host order; all supported hosts
// are little endian.
func bytesOf[E float32 | uint16 | int32](v []E) []byte {
	if len(v) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(&v[0])), len(v)*int(unsafe.Sizeof(v[0])))
}
