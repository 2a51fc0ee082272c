package checkpoint

import (
	"bytes"
	"encoding/binary"
	"math"
)

// derived is the content of a tensor that the file does not hold as it is: parts
// of it one after the other, or computed bytes.
type derived struct {
	parts []*tensor // joined along their first dimension
	data  []byte
}

// computed adds a tensor of F32 that is not in the file.
func (f *File) computed(name string, shape []int, v []float32) {
	b := make([]byte, 4*len(v))
	for i, x := range v {
		binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(x))
	}
	f.tensors[name] = &tensor{Info: Info{name, F32, shape}, derived: &derived{data: b}}
}

// readDerived fills dst with the bytes of t from pos on.
func (f *File) readDerived(t *tensor, dst []byte, pos int64) error {
	if t.derived.parts == nil {
		copy(dst, t.derived.data[pos:])
		return nil
	}
	for _, p := range t.derived.parts {
		n := p.Bytes()
		if pos >= n {
			pos -= n
			continue
		}
		k := min(n-pos, int64(len(dst)))
		if err := f.readBytes(p, dst[:k], pos); err != nil {
			return err
		}
		if dst, pos = dst[k:], 0; len(dst) == 0 {
			return nil
		}
	}
	return nil
}

// same reports whether two tensors of the file have the same content.
func (f *File) same(a, b *tensor) (bool, error) {
	if a.DType != b.DType || a.Elems() != b.Elems() {
		return false, nil
	}
	n := a.Bytes()
	x, y := make([]byte, min(n, 1<<20)), make([]byte, min(n, 1<<20))
	for pos := int64(0); pos < n; pos += int64(len(x)) {
		k := min(n-pos, int64(len(x)))
		if err := f.readBytes(a, x[:k], pos); err != nil {
			return false, err
		}
		if err := f.readBytes(b, y[:k], pos); err != nil {
			return false, err
		}
		if !bytes.Equal(x[:k], y[:k]) {
			return false, nil
		}
	}
	f.region.drop(b.off, b.span)
	return true, nil
}
