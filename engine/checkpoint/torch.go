package checkpoint

import (
	"archive/zip"
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"

	"margo/engine"
)

// maxMembers bounds the directory of an archive; one member per tensor.
const maxMembers = 1 << 20

// keepRecord bounds what checking a member leaves mapped, in bytes: its tensors may
// need little of it, or nothing soon.
const keepRecord = 64 << 20

// record is a stored member of an archive: a range of the file.
type record struct {
	name      string
	off, size int64
	crc       uint32
	skip      bool
	once      sync.Once
	err       error
}

// check compares the record's CRC-32 once, when its first tensor is read.
func (rec *record) check(r *region) error {
	if rec.skip {
		return nil
	}
	rec.once.Do(func() {
		h := crc32.NewIEEE()
		buf := make([]byte, min(rec.size, 1<<20))
		for pos := int64(0); pos < rec.size; {
			b := buf[:min(rec.size-pos, int64(len(buf)))]
			if n, err := r.ReadAt(b, rec.off+pos); n < len(b) {
				rec.err = err
				return
			}
			h.Write(b)
			if rec.size > keepRecord {
				r.drop(rec.off+pos, int64(len(b)))
			}
			pos += int64(len(b))
		}
		if h.Sum32() != rec.crc {
			rec.err = fmt.Errorf("lies in the archive member %s, which is damaged (CRC-32 %08x, recorded %08x)", quote(rec.name), h.Sum32(), rec.crc)
		}
	})
	return rec.err
}

// archive is the directory of a zip file whose members are all stored.
type archive struct {
	region *region
	files  map[string]*zip.File
	prefix string // of the folder that data.pkl lies in
	skip   bool   // don't compare CRCs
}

// openTorch reads what torch.save writes: a zip archive of uncompressed
// members FOLDER/data.pkl, FOLDER/byteorder and FOLDER/data/KEY, one for each
// storage. Compressed members are refused, so nothing can inflate.
func openTorch(r *region, path string, o OpenOptions) (*File, error) {
	a, err := openArchive(r)
	if err != nil {
		return nil, badFile(path, "PyTorch archive: %w", err)
	}
	a.skip = o.SkipCRC
	root, err := a.load()
	if err != nil {
		return nil, badFile(path, "PyTorch archive: %w", err)
	}
	f := &File{path: path, format: "torch", region: r, tensors: map[string]*tensor{}}
	refs, err := f.selectState(root, o.State)
	if err != nil {
		return nil, err
	}
	records := map[string]*record{}
	for name, ref := range refs {
		t, err := a.place(name, ref, records)
		if err != nil {
			return nil, badFile(path, "tensor %s: %w", quote(name), err)
		}
		f.tensors[name] = t
	}
	if err := disjoint(records); err != nil {
		return nil, badFile(path, "PyTorch archive: %w", err)
	}
	return f, nil
}

// disjoint demands that no two storages share bytes, which torch.save never
// makes: a small file could have each of a million read through all of it.
func disjoint(records map[string]*record) error {
	all := slices.Collect(maps.Values(records))
	slices.SortFunc(all, func(a, b *record) int {
		return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.size, b.size), cmp.Compare(a.name, b.name))
	})
	for i := 1; i < len(all); i++ {
		if a, b := all[i-1], all[i]; b.off-a.off < a.size {
			return fmt.Errorf("members %s (%d bytes at %d) and %s (%d bytes at %d) overlap", quote(a.name), a.size, a.off, quote(b.name), b.size, b.off)
		}
	}
	return nil
}

func openArchive(r *region) (*archive, error) {
	z, err := zip.NewReader(r, r.size)
	if err != nil {
		if errors.Is(err, zip.ErrFormat) {
			err = errors.New("truncated or damaged: no zip directory at its end")
		}
		return nil, err
	}
	if len(z.File) > maxMembers {
		return nil, fmt.Errorf("%d members, the limit is %d", len(z.File), maxMembers)
	}
	a := &archive{region: r, files: make(map[string]*zip.File, len(z.File))}
	found := false
	for _, m := range z.File {
		if a.files[m.Name] != nil {
			return nil, fmt.Errorf("two members named %s", quote(m.Name))
		}
		a.files[m.Name] = m
		if dir, ok := strings.CutSuffix(m.Name, "data.pkl"); ok && (dir == "" || strings.HasSuffix(dir, "/")) {
			if found {
				return nil, errors.New("more than one data.pkl")
			}
			a.prefix, found = dir, true
		}
	}
	if !found {
		return nil, errors.New("it has no data.pkl: a zip file, but not one of torch.save")
	}
	if a.files[a.prefix+"constants.pkl"] != nil {
		return nil, errors.New("it is a TorchScript program; save its state_dict() instead")
	}
	return a, nil
}

// member locates a stored member inside the file.
func (a *archive) member(name string) (*record, error) {
	m := a.files[a.prefix+name]
	if m == nil {
		return nil, fmt.Errorf("no member %s", quote(name))
	}
	if m.Method != zip.Store || m.CompressedSize64 != m.UncompressedSize64 {
		return nil, fmt.Errorf("member %s is compressed (%d bytes to %d); torch.save stores members as they are, anything else is refused", quote(name), m.UncompressedSize64, m.CompressedSize64)
	}
	if m.Flags&1 != 0 {
		return nil, fmt.Errorf("member %s is encrypted", quote(name))
	}
	off, err := m.DataOffset()
	if err != nil {
		return nil, fmt.Errorf("member %s: %w", quote(name), err)
	}
	if off < 0 || off > a.region.size || m.UncompressedSize64 > uint64(a.region.size-off) {
		return nil, fmt.Errorf("member %s claims %d bytes at %d, the file ends at %d", quote(name), m.UncompressedSize64, off, a.region.size)
	}
	return &record{name: name, off: off, size: int64(m.UncompressedSize64), crc: m.CRC32, skip: a.skip}, nil
}

// read returns a small member.
func (a *archive) read(name string, limit int64) ([]byte, error) {
	rec, err := a.member(name)
	if err != nil {
		return nil, err
	}
	if rec.size > limit {
		return nil, fmt.Errorf("member %s has %d bytes, the limit is %d", quote(name), rec.size, limit)
	}
	if err := rec.check(a.region); err != nil {
		return nil, err
	}
	b := make([]byte, rec.size)
	if n, err := a.region.ReadAt(b, rec.off); n < len(b) {
		if err == io.EOF {
			err = errTruncated
		}
		return nil, err
	}
	return b, nil
}

// load unpickles data.pkl.
func (a *archive) load() (any, error) {
	if a.files[a.prefix+"byteorder"] != nil {
		order, err := a.read("byteorder", 64)
		if err != nil {
			return nil, err
		}
		if s := string(order); s != "little" {
			return nil, fmt.Errorf("byte order %s; only little-endian files are read, re-save it on a little-endian machine", quote(s))
		}
	}
	b, err := a.read("data.pkl", maxPickle)
	if err != nil {
		return nil, err
	}
	return unpickle(b)
}

// place turns a tensor of the pickle into a range of the file, or a strided
// view of one. Every element must lie inside its storage.
func (a *archive) place(name string, ref *tensorRef, records map[string]*record) (*tensor, error) {
	elems, ok := product(ref.shape)
	if !ok {
		return nil, fmt.Errorf("shape %v is too large", ref.shape)
	}
	t := &tensor{Info: Info{Name: name, DType: ref.dtype, Shape: toInts(ref.shape)}}
	size := ref.dtype.Size()
	if size == 0 { // can be listed; reading it names the dtype
		return t, nil
	}
	key := ref.storage.key
	rec := records[key]
	if rec == nil {
		var err error
		if rec, err = a.member("data/" + key); err != nil {
			return nil, err
		}
		records[key] = rec
	}
	room := rec.size / size
	declared, ok := mul(ref.storage.elems, max(ref.storage.dtype.Size(), 1))
	if !ok || declared > rec.size {
		return nil, fmt.Errorf("its storage claims %d elements of %s, the member has %d bytes", ref.storage.elems, ref.storage.dtype, rec.size)
	}
	last, ok := lastIndex(ref)
	switch {
	case elems > room:
		return nil, fmt.Errorf("shape %v needs %d elements, its storage has %d (an expanded tensor? call .contiguous() before saving)", ref.shape, elems, room)
	case elems > 0 && (!ok || ref.offset > room || last >= room-ref.offset):
		return nil, fmt.Errorf("shape %v, strides %v and offset %d reach outside its storage of %d elements", ref.shape, ref.stride, ref.offset, room)
	}
	if elems == 0 {
		t.off = rec.off
		return t, nil
	}
	t.record = rec
	t.off = rec.off + ref.offset*size
	t.span = (last + 1) * size
	if !contiguous(ref) {
		t.stride = slices.Clone(ref.stride)
	}
	return t, nil
}

// lastIndex is the largest element index relative to the offset.
func lastIndex(ref *tensorRef) (int64, bool) {
	sum := int64(0)
	for d, s := range ref.shape {
		if s == 0 {
			return 0, true
		}
		n, ok := mul(s-1, ref.stride[d])
		if !ok || n > math.MaxInt64-sum {
			return 0, false
		}
		sum += n
	}
	return sum, sum < math.MaxInt64
}

func contiguous(ref *tensorRef) bool {
	want := int64(1)
	for d := len(ref.shape) - 1; d >= 0; d-- {
		if ref.shape[d] != 1 && ref.stride[d] != want {
			return false
		}
		want *= ref.shape[d]
	}
	return true
}

// stateKeys are tried in this order: averaged weights are the ones to sample
// with (MAR §App. B; LTH14/mar issue 98), bare files come last.
var stateKeys = []string{"model_ema", "ema", "model", "state_dict"}

// selectState picks the state dict and returns its tensors by name. The prefix
// that DistributedDataParallel adds to every key is removed.
func (f *File) selectState(root any, want string) (map[string]*tensorRef, error) {
	d, ok := root.(*dict)
	if !ok {
		return nil, badFile(f.path, "it holds %s, not a dict of tensors; save model.state_dict()", kindOf(root))
	}
	f.root = d
	keys := stateKeys
	switch want {
	case "":
	case "ema": // by either name
		keys = stateKeys[:2]
	default:
		keys = []string{want}
	}
	var refs map[string]*tensorRef
	for _, k := range keys {
		v, ok := d.get(k)
		if !ok {
			continue
		}
		if o, ok := v.(*object); ok {
			return nil, badFile(f.path, "%s is %s, not a state dict; save its state_dict()", quote(k), kindOf(o))
		}
		if sub, ok := v.(*dict); ok {
			if refs = tensorsOf(sub); len(refs) > 0 {
				f.state = k
				break
			}
		}
	}
	if len(refs) == 0 {
		if want != "" {
			return nil, engine.Errorf("open "+f.path, engine.Invalid, "no state %s; the file has %s", quote(want), f.states())
		}
		if refs = tensorsOf(d); len(refs) == 0 {
			return nil, badFile(f.path, "no state dict found; the file has %s", f.states())
		}
	}
	return stripModule(refs), nil
}

func tensorsOf(d *dict) map[string]*tensorRef {
	out := map[string]*tensorRef{}
	for i, k := range d.keys {
		if name, ok := k.(string); ok {
			if t, ok := d.vals[i].(*tensorRef); ok {
				out[name] = t
			}
		}
	}
	return out
}

func stripModule(refs map[string]*tensorRef) map[string]*tensorRef {
	out := make(map[string]*tensorRef, len(refs))
	for name, t := range refs {
		short, ok := strings.CutPrefix(name, "module.")
		if !ok || short == "" {
			return refs
		}
		out[short] = t
	}
	return out
}

// states lists the entries at the top level, for messages.
func (f *File) states() string {
	var out []string
	for i, k := range f.root.keys {
		if s, ok := k.(string); ok {
			out = append(out, fmt.Sprintf("%s (%s)", quote(s), kindOf(f.root.vals[i])))
		}
	}
	if len(out) == 0 {
		return "no named entries"
	}
	sort.Strings(out)
	if len(out) > 12 {
		out = append(out[:12], fmt.Sprintf("and %d more", len(out)-12))
	}
	return strings.Join(out, ", ")
}

// Value returns a top-level entry of a PyTorch file as plain data: nil, bool,
// int64, float64, string, []any or map[string]any (a dict, or the attributes
// of an argparse.Namespace). Anything else inside becomes nil; an entry that is
// no plain data, or too large, is not ok.
func (f *File) Value(key string) (v any, ok bool) {
	x, ok := f.root.get(key)
	if !ok {
		return nil, false
	}
	budget := 1 << 16
	v = plain(x, 16, &budget)
	return v, v != nil && budget > 0
}

// plain copies data up to a depth and a number of values: pickled containers
// may contain themselves, or each other many times over.
func plain(x any, depth int, budget *int) any {
	*budget--
	if depth == 0 || *budget <= 0 {
		return nil
	}
	var items []any
	switch x := x.(type) {
	case bool, int64, float64, string:
		return x
	case tuple:
		items = x
	case *list:
		items = x.items
	case *object:
		if x.state == nil {
			return nil
		}
		return plain(x.state, depth, budget)
	case *dict:
		out := map[string]any{}
		for i, k := range x.keys {
			if s, ok := k.(string); ok {
				out[s] = plain(x.vals[i], depth-1, budget)
			}
			if *budget <= 0 {
				break
			}
		}
		return out
	default:
		return nil
	}
	out := []any{}
	for _, v := range items {
		if *budget <= 0 {
			break
		}
		out = append(out, plain(v, depth-1, budget))
	}
	return out
}
