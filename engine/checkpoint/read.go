package checkpoint

import (
	"io"
	"math"
	"slices"
	"unsafe"

	"margo/engine"
)

// ReadRaw copies the stored bytes, row-major and little-endian, to dst, whose
// length must be the tensor's Bytes.
func (f *File) ReadRaw(name string, dst []byte) error {
	t, ok := f.tensors[name]
	if !ok {
		return f.noTensor("read", name)
	}
	return f.readInto(t, t.DType, dst)
}

// ReadAs copies the tensor to dst as d: F32 or BF16 from a floating-point
// dtype, rounded to nearest even; I32 from an integer one, if every value fits.
func (f *File) ReadAs(name string, d engine.DType, dst []byte) error {
	t, ok := f.tensors[name]
	if !ok {
		return f.noTensor("read", name)
	}
	if d != engine.I32 {
		return f.readInto(t, fileDType(d), dst)
	}
	if int64(len(dst)) != t.Elems()*4 {
		return f.wrongSize(t, int64(len(dst)), t.Elems()*4)
	}
	return f.ints(t, func(i int, v int64) bool {
		le.PutUint32(dst[4*i:], uint32(int32(v)))
		return int64(int32(v)) == v
	})
}

// ReadF32 reads a floating-point tensor of any stored dtype.
func (f *File) ReadF32(name string, dst []float32) error {
	if len(dst) == 0 {
		return f.ReadAs(name, engine.F32, nil)
	}
	// margo runs on little-endian machines only, as its native code does.
	return f.ReadAs(name, engine.F32, unsafe.Slice((*byte)(unsafe.Pointer(&dst[0])), 4*len(dst)))
}

// ReadF64 reads a floating-point tensor without rounding.
func (f *File) ReadF64(name string, dst []float64) error {
	t, ok := f.tensors[name]
	if !ok {
		return f.noTensor("read", name)
	}
	if int64(len(dst)) != t.Elems() {
		return f.wrongSize(t, int64(len(dst))*8, t.Elems()*8)
	}
	if t.DType != F64 {
		tmp := make([]float32, len(dst))
		if err := f.ReadF32(name, tmp); err != nil {
			return err
		}
		for i, v := range tmp {
			dst[i] = float64(v)
		}
		return nil
	}
	return f.stream(t, func(first int, b []byte) error {
		for i := 0; i < len(b)/8; i++ {
			dst[first+i] = math.Float64frombits(le.Uint64(b[8*i:]))
		}
		return nil
	})
}

// ReadI64 reads an integer or boolean tensor.
func (f *File) ReadI64(name string, dst []int64) error {
	t, ok := f.tensors[name]
	if !ok {
		return f.noTensor("read", name)
	}
	if int64(len(dst)) != t.Elems() {
		return f.wrongSize(t, int64(len(dst))*8, t.Elems()*8)
	}
	return f.ints(t, func(i int, v int64) bool { dst[i] = v; return true })
}

func (f *File) ints(t *tensor, put func(int, int64) bool) error {
	if t.DType.Float() || t.DType == F8E4M3 || t.DType == F8E5M2 {
		return f.badTensor(t, "is %s, not integers", t.DType)
	}
	return f.stream(t, func(first int, b []byte) error {
		for i := 0; i < len(b)/int(t.DType.Size()); i++ {
			if v, ok := intAt(b, t.DType, i); !ok || !put(first+i, v) {
				return f.badTensor(t, "element %d does not fit the integer type asked for", first+i)
			}
		}
		return nil
	})
}

// WriteTo streams the tensor, converted to d, to w.
func (f *File) WriteTo(w io.Writer, name string, d DType) error {
	t, ok := f.tensors[name]
	if !ok {
		return f.noTensor("read", name)
	}
	var out []byte
	return f.stream(t, func(_ int, b []byte) error {
		n := len(b) / int(t.DType.Size()) * int(d.Size())
		out = slices.Grow(out[:0], n)[:n]
		if !convert(out, d, b, t.DType) {
			return f.badTensor(t, "is %s and cannot be converted to %s", t.DType, d)
		}
		_, err := w.Write(out)
		return err
	})
}

func (f *File) readInto(t *tensor, d DType, dst []byte) error {
	if want := t.Elems() * d.Size(); int64(len(dst)) != want {
		return f.wrongSize(t, int64(len(dst)), want)
	}
	if d != t.DType && !(d.Float() && t.DType.Float()) || t.DType.Size() == 0 {
		return f.badTensor(t, "is %s and cannot be read as %s", t.DType, d)
	}
	if d == t.DType && t.stride == nil { // no conversion: straight into place
		return f.readBytes(t, dst, t.off)
	}
	size := int(d.Size())
	return f.stream(t, func(first int, b []byte) error {
		n := len(b) / int(t.DType.Size())
		if !convert(dst[first*size:(first+n)*size], d, b, t.DType) {
			return f.badTensor(t, "is %s and cannot be read as %s", t.DType, d)
		}
		return nil
	})
}

// chunkBytes bounds what stream reads at a time: a piece stays in the L2 cache
// between being copied out and being converted. A multiple of every size.
const chunkBytes = 256 << 10

// stream hands the elements of t to fn in row-major order, in pieces.
func (f *File) stream(t *tensor, fn func(first int, b []byte) error) error {
	size := t.DType.Size()
	if size == 0 {
		return f.badTensor(t, "has the dtype %s, which is not known", t.DType)
	}
	total := t.Elems() * size
	buf := make([]byte, min(total, chunkBytes))
	var view []byte
	if t.stride != nil { // gathered from a copy of what it spans
		view = make([]byte, t.span)
		if err := f.readBytes(t, view, t.off); err != nil {
			return err
		}
	}
	index := make([]int, len(t.Shape))
	for pos := int64(0); pos < total; {
		b := buf[:min(total-pos, chunkBytes)]
		if view != nil {
			gather(b, view, t, index)
		} else if err := f.readBytes(t, b, t.off+pos); err != nil {
			return err
		}
		if err := fn(int(pos/size), b); err != nil {
			return err
		}
		pos += int64(len(b))
	}
	return nil
}

// gather fills b with the next elements of a strided view, from index on.
func gather(b, view []byte, t *tensor, index []int) {
	size := int(t.DType.Size())
	at := int64(0)
	for d, i := range index {
		at += int64(i) * t.stride[d]
	}
	for ; len(b) > 0; b = b[size:] {
		copy(b[:size], view[int(at)*size:])
		for d := len(index) - 1; d >= 0; d-- {
			index[d]++
			at += t.stride[d]
			if index[d] < t.Shape[d] {
				break
			}
			at -= int64(index[d]) * t.stride[d]
			index[d] = 0
		}
	}
}

func (f *File) readBytes(t *tensor, dst []byte, off int64) error {
	if t.derived != nil {
		return f.readDerived(t, dst, off-t.off)
	}
	if t.record != nil {
		if err := t.record.check(f.region); err != nil {
			return f.badTensor(t, "%w", err)
		}
	}
	if n, err := f.region.ReadAt(dst, off); n < len(dst) {
		return f.badTensor(t, "%w", err)
	}
	return nil
}
