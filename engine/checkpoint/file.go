package checkpoint

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"sort"
	"unsafe"

	"margo/engine"
)

// Info describes a tensor of a file.
type Info struct {
	Name  string
	DType DType
	Shape []int
}

// Elems is the number of elements.
func (i Info) Elems() int64 {
	n := int64(1)
	for _, s := range i.Shape {
		n *= int64(s)
	}
	return n
}

// Bytes is the size as stored.
func (i Info) Bytes() int64 { return i.Elems() * i.DType.Size() }

// tensor is an entry of a file's table.
type tensor struct {
	Info
	off    int64   // file offset of element 0
	stride []int64 // in elements; nil: contiguous, row-major
	span   int64   // bytes from element 0 to past the last one
	record *record // the archive member it lies in, to check its CRC; may be nil
}

// File is an open checkpoint. Reading from several goroutines is safe.
type File struct {
	path    string
	format  string
	state   string
	region  *region
	tensors map[string]*tensor
	meta    map[string]string
	root    *dict // plain data beside the tensors of a PyTorch file
}

// OpenOptions choose among the state dicts of a PyTorch file.
type OpenOptions struct {
	// State names the top-level entry to use. "" means the first that exists of
	// model_ema, ema, model, state_dict, else the tensors at the top level.
	State string
	// Prefix selects the keys that begin with it and removes it, such as
	// "first_stage_model." in a latent diffusion checkpoint.
	Prefix string
	// SkipCRC reads archive members whose CRC-32 does not match, which PyTorch
	// writes when told not to compute it.
	SkipCRC bool
}

// Open opens a safetensors file or a PyTorch zip archive, told apart by
// content. The error's Kind is IO for an unreadable or bad file, Invalid if the
// options ask for what the file does not hold.
func Open(path string, o OpenOptions) (*File, error) {
	r, err := openRegion(path)
	if err != nil {
		return nil, err
	}
	f, err := openFrom(r, path, o)
	if err != nil {
		r.Close()
		return nil, err
	}
	return f, nil
}

func openFrom(r *region, path string, o OpenOptions) (f *File, err error) {
	head := make([]byte, min(64, r.size))
	if _, err := r.ReadAt(head, 0); err != nil {
		return nil, badFile(path, "%w", err)
	}
	switch kind := sniff(head); kind {
	case "torch":
		f, err = openTorch(r, path, o)
	case "safetensors":
		if o.State != "" {
			return nil, engine.Errorf("open "+path, engine.Invalid, "a safetensors file has one state; %q cannot be chosen", o.State)
		}
		f, err = openSafetensors(r, path)
	default:
		return nil, badFile(path, "%s", kind)
	}
	if err != nil {
		return nil, err
	}
	if err := f.selectPrefix(o.Prefix); err != nil {
		return nil, err
	}
	return f, nil
}

// sniff returns the format, or why the file is none that can be read.
func sniff(head []byte) string {
	has := func(s string) bool { return bytes.HasPrefix(head, []byte(s)) }
	switch {
	case has("PK\x03\x04"), has("PK\x05\x06"):
		return "torch"
	case len(head) >= 9 && head[8] == '{':
		return "safetensors"
	case has("\x80") && len(head) > 4 && bytes.Contains(head[:min(len(head), 24)], []byte("\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")):
		return "a PyTorch file in the format before 1.6, which is not read; re-save it in Python: torch.save(torch.load(f, weights_only=True), g)"
	case has("\x80"):
		return "a bare pickle, not a checkpoint that torch.save wrote"
	case has("version https://git-lfs"):
		return "a Git LFS pointer, not the file itself; fetch it with git lfs pull"
	case has("<!DOCTYPE"), has("<!doctype"), has("<html"):
		return "a web page, not a checkpoint; the download went wrong"
	case len(head) < 9:
		return fmt.Sprintf("truncated: %d bytes", len(head))
	case bytes.Count(head, []byte{0}) == len(head):
		return "begins with zeros only; the file is damaged"
	}
	return fmt.Sprintf("neither safetensors nor a PyTorch zip archive (first bytes % x)", head[:8])
}

func (f *File) selectPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	out := map[string]*tensor{}
	for name, t := range f.tensors {
		if len(name) > len(prefix) && name[:len(prefix)] == prefix {
			t.Name = name[len(prefix):]
			out[t.Name] = t
		}
	}
	if len(out) == 0 {
		return engine.Errorf("open "+f.path, engine.Invalid, "no tensor's name begins with %q", prefix)
	}
	f.tensors = out
	return nil
}

// Path is the path the file was opened with.
func (f *File) Path() string { return f.path }

// Format is "safetensors" or "torch".
func (f *File) Format() string { return f.format }

// State is the chosen entry of a PyTorch file, "" for tensors at its top level.
func (f *File) State() string { return f.state }

// Metadata is the text metadata of a safetensors file; empty for PyTorch.
func (f *File) Metadata() map[string]string { return maps.Clone(f.meta) }

// Names lists the tensors, sorted.
func (f *File) Names() []string { return slices.Sorted(maps.Keys(f.tensors)) }

// Tensor describes the named tensor.
func (f *File) Tensor(name string) (Info, bool) {
	t, ok := f.tensors[name]
	if !ok {
		return Info{}, false
	}
	info := t.Info
	info.Shape = slices.Clone(t.Shape)
	return info, true
}

// Close unmaps the file. Reads after it fail.
func (f *File) Close() error { return f.region.Close() }

// Release gives back the memory that reading the tensor brought in. The tensor
// can be read again.
func (f *File) Release(name string) {
	if t, ok := f.tensors[name]; ok {
		f.region.drop(t.off, t.span)
	}
}

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

// badFile makes the error for a file that is not what it should be.
func badFile(path, format string, args ...any) error {
	return engine.Errorf("open "+path, engine.IO, format, args...)
}

func (f *File) badTensor(t *tensor, format string, args ...any) error {
	return engine.Errorf("read "+f.path, engine.IO, "tensor %s "+format, append([]any{quote(t.Name)}, args...)...)
}

func (f *File) noTensor(op, name string) error {
	return engine.Errorf(op+" "+f.path, engine.IO, "no tensor %s", quote(name))
}

func (f *File) wrongSize(t *tensor, got, want int64) error {
	return engine.Errorf("read "+f.path, engine.Invalid, "tensor %s of shape %v needs a destination of %d bytes, not %d", quote(t.Name), t.Shape, want, got)
}

// quote prints a name that a stranger chose: quoted, and not endless.
func quote(s string) string {
	if len(s) > 120 {
		return fmt.Sprintf("%q… (%d bytes)", s[:120], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// mul multiplies two non-negative numbers; ok is false on overflow.
func mul(a, b int64) (int64, bool) {
	if a != 0 && b > math.MaxInt64/a {
		return 0, false
	}
	return a * b, true
}

// product is the number of elements of a shape; ok is false for a negative
// dimension, one beyond int, or an overflow.
func product(shape []int64) (int64, bool) {
	n, ok := int64(1), true
	zero := false
	for _, s := range shape {
		if s < 0 || int64(int(s)) != s {
			return 0, false
		}
		zero = zero || s == 0
	}
	if zero {
		return 0, true
	}
	for _, s := range shape {
		if n, ok = mul(n, s); !ok {
			return 0, false
		}
	}
	return n, true
}

func toInts(shape []int64) []int {
	out := make([]int, len(shape))
	for i, s := range shape {
		out[i] = int(s)
	}
	return out
}

// sortedTensors orders tensors by file offset.
func sortedTensors(m map[string]*tensor) []*tensor {
	out := slices.Collect(maps.Values(m))
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if a.off != b.off {
			return a.off < b.off
		}
		if a.span != b.span {
			return a.span < b.span
		}
		return a.Name < b.Name
	})
	return out
}

