package checkpoint

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
	"sort"

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

	derived *derived // nil: the bytes are the file's
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

	layout string            // LayoutDiffusers if the names were translated
	source map[string]string // names in the file of tensors that were renamed
	copies [][2]*tensor      // tensors that must be the same, the second of which was left out
}

// OpenOptions choose among the state dicts of a PyTorch file.
type OpenOptions struct {
	// State names the top-level entry to use; "ema" is model_ema, else ema. ""
	// means the first that exists of model_ema, ema, model, state_dict, else the
	// tensors at the top level.
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
	if err := f.translate(); err != nil {
		return nil, err
	}
	if err := f.translateDiT(); err != nil {
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

// Layout is LayoutDiffusers if the file's tensors have the names of diffusers'
// autoencoders or DiT, which are translated; else "".
func (f *File) Layout() string { return f.layout }

// Stored is the name that the tensor has in the file.
func (f *File) Stored(name string) string {
	if s, ok := f.source[name]; ok {
		return s
	}
	return name
}

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
	t, ok := f.tensors[name]
	if !ok {
		return
	}
	if t.derived == nil {
		f.region.drop(t.off, t.span)
		return
	}
	for _, p := range t.derived.parts {
		f.region.drop(p.off, p.span)
	}
}

// badFile makes the error for a file that is not what it should be.
func badFile(path, format string, args ...any) error {
	return engine.Errorf("open "+path, engine.IO, format, args...)
}

func (f *File) badTensor(t *tensor, format string, args ...any) error {
	return engine.Errorf("read "+f.path, engine.IO, "tensor %s "+format, append([]any{quote(f.stored(t.Name))}, args...)...)
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
