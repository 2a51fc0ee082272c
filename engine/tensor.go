package engine

import (
	"fmt"
	"math"
	"math/bits"
	"strings"
)

// Buffer is memory of one device. It is freed in stream order by Free.
type Buffer interface {
	Bytes() int
	Free() error
}

// Tensor is a typed, row-major view of a Buffer. The last dimension is
// contiguous; RowStride, in elements, is the distance between rows (all
// leading dimensions collapsed) and equals Cols() unless the tensor is a
// slice of columns of a wider one.
type Tensor struct {
	Buf       Buffer
	Off       int // bytes from the start of Buf
	DType     DType
	Shape     []int
	RowStride int // elements
}

// NewTensor describes a contiguous tensor at byte offset off of buf.
func NewTensor(buf Buffer, off int, d DType, shape ...int) *Tensor {
	t := &Tensor{Buf: buf, Off: off, DType: d, Shape: append([]int(nil), shape...)}
	t.RowStride = t.Cols()
	return t
}

// Elems is the number of elements.
func (t *Tensor) Elems() int {
	return volume(t.Shape...)
}

// volume is the product of dimensions, and math.MaxInt where an int cannot hold
// it or one is negative. No buffer is that large, so nothing that is checked
// against one passes.
func volume(dims ...int) int {
	n := 1
	for _, d := range dims {
		hi, lo := bits.Mul64(uint64(n), uint64(d))
		if hi != 0 || lo > math.MaxInt {
			return math.MaxInt
		}
		n = int(lo)
	}
	return n
}

// Cols is the last dimension (1 for a scalar).
func (t *Tensor) Cols() int {
	if len(t.Shape) == 0 {
		return 1
	}
	return t.Shape[len(t.Shape)-1]
}

// Rows is the product of all dimensions but the last.
func (t *Tensor) Rows() int {
	return volume(t.Shape[:max(len(t.Shape)-1, 0)]...)
}

// Contiguous reports whether rows follow each other without a gap.
func (t *Tensor) Contiguous() bool { return t.RowStride == t.Cols() || t.Rows() <= 1 }

// Bytes is the size of the elements, without gaps.
func (t *Tensor) Bytes() int { return volume(t.Elems(), t.DType.Size()) }

// Reshape views a contiguous tensor with another shape of as many elements.
// A mismatch returns nil, which the next op on a Ctx reports.
func (t *Tensor) Reshape(shape ...int) *Tensor {
	if t == nil || volume(shape...) != t.Elems() || !t.Contiguous() {
		return nil
	}
	return NewTensor(t.Buf, t.Off, t.DType, shape...)
}

// Slice views columns [from, to) as [Rows, to-from], keeping the row stride.
func (t *Tensor) Slice(from, to int) *Tensor {
	if t == nil || from < 0 || to < from || to > t.Cols() {
		return nil
	}
	return &Tensor{Buf: t.Buf, Off: t.Off + from*t.DType.Size(), DType: t.DType,
		Shape: []int{t.Rows(), to - from}, RowStride: t.RowStride}
}

// RowsAt views rows [from, to) as [to-from, Cols].
func (t *Tensor) RowsAt(from, to int) *Tensor {
	if t == nil || from < 0 || to < from || to > t.Rows() {
		return nil
	}
	return &Tensor{Buf: t.Buf, Off: t.Off + from*t.RowStride*t.DType.Size(), DType: t.DType,
		Shape: []int{to - from, t.Cols()}, RowStride: t.RowStride}
}

// String gives dtype and shape, for messages: "f32[320,768]".
func (t *Tensor) String() string {
	if t == nil {
		return "nil"
	}
	return t.DType.String() + ShapeString(t.Shape)
}

// ShapeString formats a shape as "[2,3]".
func ShapeString(s []int) string {
	return "[" + strings.Trim(strings.ReplaceAll(fmt.Sprint(s), " ", ","), "[]") + "]"
}
