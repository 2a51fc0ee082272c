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
		return f.readBytes(t, dst, 0)
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
	for pos := int64(0); pos < total; {
		b := buf[:min(total-pos, chunkBytes)]
		if err := f.readBytes(t, b, pos); err != nil {
			return err
		}
		if err := fn(int(pos/size), b); err != nil {
			return err
		}
		pos += int64(len(b))
	}
	return nil
}

// readBytes fills dst with the tensor's bytes, row-major, from byte pos on: whole
// elements.
func (f *File) readBytes(t *tensor, dst []byte, pos int64) error {
	if t.derived != nil {
		return f.readDerived(t, dst, pos)
	}
	if t.record != nil {
		if err := t.record.check(f.region); err != nil {
			return f.badTensor(t, "%w", err)
		}
	}
	if t.stride != nil {
		if err := f.region.gather(dst, newCursor(t, pos/t.DType.Size())); err != nil {
			return f.badTensor(t, "%w", err)
		}
		if t.span/sparseSpan > t.Bytes() {
			f.region.drop(t.off, t.span)
		}
		return nil
	}
	if n, err := f.region.ReadAt(dst, t.off+pos); n < len(dst) {
		return f.badTensor(t, "%w", err)
	}
	return nil
}
