package checkpoint

import (
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strings"
	"testing"
	"time"

	"margo/engine"
)

// pickler writes the opcodes of torch.save, for files that no PyTorch would.
type pickler struct{ bytes.Buffer }

func newPickler() *pickler { p := &pickler{}; p.WriteString("\x80\x02"); return p }

func (p *pickler) str(s string) *pickler {
	p.WriteByte('X')
	var n [4]byte
	le.PutUint32(n[:], uint32(len(s)))
	p.Write(n[:])
	p.WriteString(s)
	return p
}

func (p *pickler) int(v int64) *pickler {
	p.WriteString("\x8a\x08")
	var n [8]byte
	le.PutUint64(n[:], uint64(v))
	p.Write(n[:])
	return p
}

func (p *pickler) ints(v ...int64) *pickler {
	p.WriteByte('(')
	for _, x := range v {
		p.int(x)
	}
	p.WriteByte('t')
	return p
}

func (p *pickler) op(s string) *pickler { p.WriteString(s); return p }

func (p *pickler) global(module, name string) *pickler {
	return p.op("c" + module + "\n" + name + "\n")
}

// storage pushes a reference to a storage.
func (p *pickler) storage(typ, key string, elems int64) *pickler {
	module := "torch"
	if typ == "UntypedStorage" {
		module = "torch.storage"
	}
	return p.op("(").str("storage").global(module, typ).str(key).str("cpu").int(elems).op("tQ")
}

// tensor pushes a tensor over storage key.
func (p *pickler) tensor(typ, key string, elems, offset int64, shape, stride []int64) *pickler {
	return p.global("torch._utils", "_rebuild_tensor_v2").op("(").storage(typ, key, elems).int(offset).ints(shape...).ints(stride...).
		op("\x89").global("collections", "OrderedDict").op(")RtR")
}

// archiveOf zips members as torch.save does: stored, in a folder.
func archiveOf(t testing.TB, pickle []byte, storages map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	add := func(name string, data []byte) {
		w, err := z.CreateHeader(&zip.FileHeader{Name: "archive/" + name, Method: zip.Store})
		if err == nil {
			_, err = w.Write(data)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	add("data.pkl", pickle)
	add("byteorder", []byte("little"))
	for k, v := range storages {
		add("data/"+k, v)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func openBytes(b []byte, o OpenOptions) (*File, error) { return openFrom(memRegion(b), "test", o) }

// wantBad asserts an I/O error that mentions each part.
func wantBad(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if !errors.Is(err, engine.IO) {
		t.Errorf("%s: error is %v", what, err)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %q is not in: %v", what, p, err)
		}
	}
}

func floats(v ...float32) []byte {
	b := make([]byte, 4*len(v))
	for i, x := range v {
		le.PutUint32(b[4*i:], math.Float32bits(x))
	}
	return b
}

func TestTorchViews(t *testing.T) {
	data := floats(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
	p := newPickler().op("}(")
	p.str("all").tensor("FloatStorage", "0", 12, 0, []int64{3, 4}, []int64{4, 1})
	p.str("transposed").tensor("FloatStorage", "0", 12, 0, []int64{4, 3}, []int64{1, 4})
	p.str("corner").tensor("FloatStorage", "0", 12, 5, []int64{2, 2}, []int64{4, 1})
	p.str("column").tensor("FloatStorage", "0", 12, 3, []int64{3, 1}, []int64{4, 77})
	p.str("scalar").tensor("FloatStorage", "0", 12, 11, nil, nil)
	p.str("none").tensor("FloatStorage", "0", 12, 12, []int64{0, 5}, []int64{5, 1})
	p.str("same").tensor("FloatStorage", "0", 12, 2, []int64{3, 2}, []int64{0, 1})
	p.str("half").tensor("HalfStorage", "1", 3, 0, []int64{3}, []int64{1})
	p.str("v3").global("torch._utils", "_rebuild_tensor_v3").op("(").storage("UntypedStorage", "0", 48).int(1).ints(2).ints(1).
		op("\x89").global("collections", "OrderedDict").op(")R").global("torch", "float32").op("tR")
	p.str("parameter").global("torch._utils", "_rebuild_parameter").op("(").tensor("FloatStorage", "0", 12, 4, []int64{1}, []int64{1}).op("\x88").
		global("collections", "OrderedDict").op(")RtR")
	p.str("odd").tensor("ComplexFloatStorage", "0", 6, 0, []int64{6}, []int64{1})
	p.op("u.")
	f, err := openBytes(archiveOf(t, p.Bytes(), map[string][]byte{"0": data, "1": {0x00, 0x3c, 0x01, 0x00, 0x00, 0xfc}}), OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"all": "[0 1 2 3 4 5 6 7 8 9 10 11]", "transposed": "[0 4 8 1 5 9 2 6 10 3 7 11]", "corner": "[5 6 9 10]", "column": "[3 7 11]",
		"scalar": "[11]", "none": "[]", "same": "[2 3 2 3 2 3]", "half": "[1 5.9604645e-08 -Inf]", "v3": "[1 2]", "parameter": "[4]",
	} {
		info, _ := f.Tensor(name)
		got := make([]float32, info.Elems())
		if err := f.ReadF32(name, got); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	_, err = Check(f, []ParamSpec{{"odd", []int{6}}}, func(string) bool { return true })
	wantBad(t, "complex", err, "ComplexFloatStorage")
	wantBad(t, "complex", f.ReadF32("odd", make([]float32, 6)), "ComplexFloatStorage")
}

// Strided reads cross the pieces in which tensors are streamed.
func TestLargeTransposed(t *testing.T) {
	const rows, cols = 301, 997
	v := make([]float32, rows*cols)
	for i := range v {
		v[i] = float32(i)
	}
	p := newPickler().op("}").str("w").tensor("FloatStorage", "0", rows*cols, 0, []int64{cols, rows}, []int64{1, cols}).op("s.")
	f, err := openBytes(archiveOf(t, p.Bytes(), map[string][]byte{"0": floats(v...)}), OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]float32, rows*cols)
	if err := f.ReadF32("w", got); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if want := float32(i%rows*cols + i/rows); got[i] != want {
			t.Fatalf("element %d is %v, not %v", i, got[i], want)
		}
	}
}

func TestTorchStates(t *testing.T) {
	one := func(p *pickler, key string, at int64) {
		p.str(key).tensor("FloatStorage", "0", 4, at, []int64{1}, []int64{1})
	}
	state := func(p *pickler, name, key string, at int64) {
		p.str(name).op("}(")
		one(p, key, at)
		p.op("u")
	}
	data := map[string][]byte{"0": floats(10, 11, 12, 13)}
	value := func(f *File, name string) float32 {
		v := []float32{-1}
		if err := f.ReadF32(name, v); err != nil {
			t.Error(err)
		}
		return v[0]
	}
	p := newPickler().op("}(")
	state(p, "model", "module.w", 1)
	state(p, "model_ema", "module.w", 2)
	state(p, "state_dict", "w", 3)
	one(p, "w", 0)
	p.op("u.")
	b := archiveOf(t, p.Bytes(), data)
	for want, at := range map[string]float32{"": 12, "model_ema": 12, "model": 11, "state_dict": 13} {
		f, err := openBytes(b, OpenOptions{State: want})
		if err != nil {
			t.Fatal(err)
		}
		if got := value(f, "w"); got != at || len(f.Names()) != 1 {
			t.Errorf("state %q: %v", want, got)
		}
	}
	if _, err := openBytes(b, OpenOptions{State: "nope"}); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "model_ema") {
		t.Error(err)
	}
	// "ema" is either name of averaged weights, and nothing else.
	for key, at := range map[string]float32{"model_ema": 12, "ema": 12, "model": 0} {
		p = newPickler().op("}(")
		state(p, "state_dict", "w", 1)
		state(p, key, "w", 2)
		p.op("u.")
		f, err := openBytes(archiveOf(t, p.Bytes(), data), OpenOptions{State: "ema"})
		if at == 0 {
			if !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), `no state "ema"`) {
				t.Errorf("no ema: %v", err)
			}
		} else if err != nil || value(f, "w") != at || f.State() != key {
			t.Errorf("ema as %s: %v", key, err)
		}
	}
	// A bare dict, a wrapped tokenizer by prefix, and mixed prefixes.
	p = newPickler().op("}(")
	one(p, "w", 0)
	one(p, "module.v", 1)
	one(p, "first_stage_model.w", 2)
	p.op("u.")
	b = archiveOf(t, p.Bytes(), data)
	f, err := openBytes(b, OpenOptions{})
	if err != nil || value(f, "w") != 10 || value(f, "module.v") != 11 {
		t.Error(err)
	}
	f, err = openBytes(b, OpenOptions{Prefix: "first_stage_model."})
	if err != nil || len(f.Names()) != 1 || value(f, "w") != 12 {
		t.Error(err)
	}
	if _, err := openBytes(b, OpenOptions{Prefix: "x."}); !errors.Is(err, engine.Invalid) {
		t.Error(err)
	}
}

// args as the authors' trainer stores it: a Namespace, with a foreign object.
func TestNamespaceArgs(t *testing.T) {
	p := newPickler().op("}(")
	p.str("model").op("}(").str("w").tensor("FloatStorage", "0", 1, 0, []int64{1}, []int64{1}).op("u")
	p.str("args").global("argparse", "Namespace").op(")\x81}(")
	p.str("model").str("mar_huge").str("lr").op("G\x3f\x50\x62\x4d\xd2\xf1\xa9\xfc").str("resume").op("N").str("steps").str("100").str("betas").ints(1, 2)
	p.str("path").global("pathlib", "PosixPath").str("x").op("\x85R")
	p.str("f8").global("numpy.core.multiarray", "scalar").global("numpy", "dtype").str("f8").op("\x89\x88\x87R(K\x03").str("<").op("NNNtb").
		global("_codecs", "encode").str("\x00\x00\x00\x00\x00\x00\u00f8\x3f").str("latin1").op("\x86R\x86R")
	p.op("ubu.")
	f, err := openBytes(archiveOf(t, p.Bytes(), map[string][]byte{"0": floats(1)}), OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	v, ok := f.Value("args")
	if got := fmt.Sprint(v); !ok || got != "map[betas:[1 2] f8:1.5 lr:0.001 model:mar_huge path:<nil> resume:<nil> steps:100]" {
		t.Errorf("%v %v", got, ok)
	}
	if m, err := f.recordedConfig(); err != nil || m["encoder_num_heads"] != int64(16) {
		t.Errorf("%v %v", m, err)
	}
}

func TestHostilePickles(t *testing.T) {
	deep := newPickler().op(strings.Repeat("]", 1000000) + strings.Repeat("a", 999999) + ".")
	self := newPickler().op("]q\x010")
	for range 60 { // each list holds the one before twice
		self.op("]h\x01ah\x01aq\x010")
	}
	self.op("}q\x00").str("args").op("h\x00s").str("l").op("h\x01s").str("w").tensor("FloatStorage", "0", 1, 0, nil, nil).op("s.")
	copies := newPickler().op("](")
	for range 100000 {
		copies.op("K\x01K\x02\x86")
	}
	copies.op("eq\x01")
	for range 1000 {
		copies.global("collections", "OrderedDict").op("h\x01\x85R0")
	}
	for what, x := range map[string]struct {
		pickle []byte
		parts  []string
	}{
		"os.system":   {newPickler().global("os", "system").str("touch /tmp/owned").op("\x85R.").Bytes(), []string{`"os.system"`, "runs no code"}},
		"posix":       {newPickler().global("posix", "system").str("x").op("\x85R.").Bytes(), []string{`"posix.system"`}},
		"eval":        {newPickler().global("builtins", "eval").str("1").op("\x85R.").Bytes(), []string{`"builtins.eval"`}},
		"stackglobal": {newPickler().str("subprocess").str("Popen").op("\x93.").Bytes(), []string{`"subprocess.Popen"`}},
		"runstring":   {newPickler().global("numpy.testing._private.utils", "runstring").op(".").Bytes(), []string{"runstring"}},
		"torch.load":  {newPickler().global("torch", "load").op(".").Bytes(), []string{`"torch.load"`}},
		"from bytes":  {newPickler().global("torch.storage", "_load_from_bytes").op(".").Bytes(), []string{"_load_from_bytes"}},
		"module":      {newPickler().global("torch.nn.modules.linear", "Linear").op(")\x81}b.").Bytes(), []string{"state_dict"}},
		"in state":    {newPickler().op("}").str("model").global("torch.nn.modules.linear", "Linear").op(")\x81s.").Bytes(), []string{"torch.nn.modules.linear.Linear"}},
		"deep":        {deep.Bytes(), []string{"a list"}},
		"copies":      {copies.Bytes(), []string{"copy more than"}},
		"long int":    {newPickler().op("\x8b\xff\xff\xff\x7f.").Bytes(), []string{"ends in the middle"}},
		"long int 2":  {newPickler().op("\x8a\x20" + strings.Repeat("\x01", 32) + ".").Bytes(), []string{"an integer of 32 bytes"}},
		"huge text":   {newPickler().op("\x8d\xff\xff\xff\xff\xff\xff\xff\xff").Bytes(), []string{"ends in the middle"}},
		"memo":        {newPickler().op("Kxr\xff\xff\xff\xffj\xfe\xff\xff\xff.").Bytes(), []string{"nothing was memoized as 4294967294"}},
		"underflow":   {newPickler().op("0.").Bytes(), []string{"underflow"}},
		"mark":        {newPickler().op("(.").Bytes(), []string{"mark"}},
		"no mark":     {newPickler().op("u.").Bytes(), []string{"no mark"}},
		"no end":      {newPickler().op("}").Bytes(), []string{"ends in the middle"}},
		"protocol":    {[]byte("\x80\x09."), []string{"protocol 9"}},
		"opcode":      {newPickler().op("i.").Bytes(), []string{"opcode 0x69"}},
		"persistent":  {newPickler().str("x").op("Q.").Bytes(), []string{"persistent id"}},
		"not a dict":  {newPickler().op("].").Bytes(), []string{"a list"}},
		"empty dict":  {newPickler().op("}.").Bytes(), []string{"no state dict"}},
		"call text":   {newPickler().str("x").op(")R.").Bytes(), []string{"cannot be called"}},
	} {
		_, err := openBytes(archiveOf(t, x.pickle, map[string][]byte{"0": floats(1)}), OpenOptions{})
		wantBad(t, what, err, x.parts...)
	}
	f, err := openBytes(archiveOf(t, self.Bytes(), map[string][]byte{"0": floats(1)}), OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"args", "l"} {
		start := time.Now()
		if _, ok := f.Value(key); ok && key == "l" || time.Since(start) > 5*time.Second {
			t.Errorf("%s, which contains itself or 2^60 lists, gave %v in %v", key, ok, time.Since(start))
		}
	}
}

func TestHostileTensors(t *testing.T) {
	big := int64(math.MaxInt64)
	for what, x := range map[string]struct {
		typ           string
		key           string
		elems, offset int64
		shape, stride []int64
		part          string
	}{
		"outside":        {"FloatStorage", "0", 4, 0, []int64{5}, []int64{1}, "needs 5 elements"},
		"offset":         {"FloatStorage", "0", 4, 2, []int64{3}, []int64{1}, "reach outside"},
		"far offset":     {"FloatStorage", "0", 4, big, []int64{1}, []int64{1}, "reach outside"},
		"stride":         {"FloatStorage", "0", 4, 0, []int64{2, 2}, []int64{3, 1}, "reach outside"},
		"huge stride":    {"FloatStorage", "0", 4, 0, []int64{2, 2}, []int64{big, big}, "reach outside"},
		"stride wrap":    {"FloatStorage", "0", 4, 0, []int64{3}, []int64{big/2 + 1}, "reach outside"},
		"huge shape":     {"FloatStorage", "0", 4, 0, []int64{big, big}, []int64{0, 0}, "too large"},
		"expanded":       {"FloatStorage", "0", 4, 0, []int64{1 << 40}, []int64{0}, "contiguous()"},
		"negative":       {"FloatStorage", "0", 4, 0, []int64{-1}, []int64{1}, "non-negative"},
		"negative off":   {"FloatStorage", "0", 4, -1, []int64{1}, []int64{1}, "offset"},
		"ranks":          {"FloatStorage", "0", 4, 0, []int64{1, 1}, []int64{1}, "2 dimensions, 1 strides"},
		"no member":      {"FloatStorage", "9", 4, 0, []int64{1}, []int64{1}, `no member "data/9"`},
		"traversal":      {"FloatStorage", "../data.pkl", 4, 0, []int64{1}, []int64{1}, "no member"},
		"storage claims": {"DoubleStorage", "0", 3, 0, []int64{1}, []int64{1}, "claims 3 elements"},
		"storage wraps":  {"DoubleStorage", "0", big, 0, []int64{1}, []int64{1}, "claims"},
		"rank":           {"FloatStorage", "0", 4, 0, make([]int64, 17), make([]int64, 17), "17 dimensions"},
	} {
		p := newPickler().op("}").str("w").tensor(x.typ, x.key, x.elems, x.offset, x.shape, x.stride).op("s.")
		_, err := openBytes(archiveOf(t, p.Bytes(), map[string][]byte{"0": floats(1, 2, 3, 4)}), OpenOptions{})
		wantBad(t, what, err, x.part)
	}
}

func TestHostileArchives(t *testing.T) {
	good := newPickler().op("}").str("w").tensor("FloatStorage", "0", 2, 0, []int64{2}, []int64{1}).op("s.").Bytes()
	build := func(edit func(h *zip.FileHeader) (content []byte, raw bool), extra ...string) []byte {
		var b bytes.Buffer
		z := zip.NewWriter(&b)
		members := []string{"a/data.pkl", "a/byteorder", "a/data/0"}
		for _, name := range append(members, extra...) {
			content := map[string][]byte{"a/data.pkl": good, "a/byteorder": []byte("little"), "a/data/0": floats(1, 2)}[name]
			h := &zip.FileHeader{Name: name, Method: zip.Store}
			c, raw := edit(h)
			if c != nil {
				content = c
			}
			if raw {
				if h.UncompressedSize64 == 0 {
					h.UncompressedSize64 = uint64(len(content))
				}
				h.CompressedSize64 = uint64(len(content))
				h.CRC32 = crc32.ChecksumIEEE(content)
				w, err := z.CreateRaw(h)
				if err != nil {
					t.Fatal(err)
				}
				w.Write(content)
				continue
			}
			w, err := z.CreateHeader(h)
			if err != nil {
				t.Fatal(err)
			}
			w.Write(content)
		}
		z.Close()
		return b.Bytes()
	}
	keep := func(h *zip.FileHeader) ([]byte, bool) { return nil, false }
	only := func(name string, f func(h *zip.FileHeader) ([]byte, bool)) func(*zip.FileHeader) ([]byte, bool) {
		return func(h *zip.FileHeader) ([]byte, bool) {
			if h.Name == name {
				return f(h)
			}
			return nil, false
		}
	}
	bomb := bytes.Repeat([]byte{0}, 10<<20)
	for what, x := range map[string]struct {
		b     []byte
		parts []string
	}{
		"bomb":        {build(only("a/data/0", func(h *zip.FileHeader) ([]byte, bool) { h.Method = zip.Deflate; return bomb, false })), []string{"is compressed", "data/0"}},
		"pickle bomb": {build(only("a/data.pkl", func(h *zip.FileHeader) ([]byte, bool) { h.Method = zip.Deflate; return bomb, false })), []string{"is compressed", "data.pkl"}},
		"claims more": {build(only("a/data/0", func(h *zip.FileHeader) ([]byte, bool) { h.UncompressedSize64 = 1 << 50; return nil, true })), []string{"data/0"}},
		"encrypted":   {build(only("a/data/0", func(h *zip.FileHeader) ([]byte, bool) { h.Flags = 1; return nil, true })), []string{"encrypted"}},
		"big-endian":  {build(only("a/byteorder", func(h *zip.FileHeader) ([]byte, bool) { return []byte("big"), false })), []string{`byte order "big"`}},
		"two pickles": {build(keep, "b/data.pkl"), []string{"more than one data.pkl"}},
		"twice":       {build(keep, "a/data/0"), []string{"two members"}},
		"script":      {build(keep, "a/constants.pkl"), []string{"TorchScript"}},
		"npz":         {build(func(h *zip.FileHeader) ([]byte, bool) { h.Name += "x"; return nil, false }), []string{"no data.pkl"}},
		"empty zip":   {[]byte("PK\x05\x06" + strings.Repeat("\x00", 18)), []string{"no data.pkl"}},
		"cut":         {build(keep)[:200], []string{"truncated"}},
		"flipped":     {bytes.Replace(build(keep), good[:30], append([]byte("\x80\x02]"), good[3:30]...), 1), []string{"damaged", "data.pkl"}},
	} {
		_, err := openBytes(x.b, OpenOptions{})
		wantBad(t, what, err, x.parts...)
	}
	// A flipped bit in a tensor shows when the tensor is read.
	b := bytes.Replace(build(keep), floats(1, 2), floats(1, 3), 1)
	f, err := openBytes(b, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]float32, 2)
	wantBad(t, "flipped tensor", f.ReadF32("w", got), "damaged", `"w"`)
	f, _ = openBytes(b, OpenOptions{SkipCRC: true})
	if err := f.ReadF32("w", got); err != nil || got[1] != 3 {
		t.Error(got, err)
	}
}

func TestNotCheckpoints(t *testing.T) {
	for what, x := range map[string][2]string{
		"legacy": {"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", "re-save it"},
		"pickle": {"\x80\x04\x95\x00\x00\x00", "bare pickle"},
		"lfs":    {"version https://git-lfs.github.com/spec/v1\n", "Git LFS"},
		"html":   {"<!DOCTYPE html><html>", "web page"},
		"short":  {"abc", "truncated: 3 bytes"},
		"zeros":  {strings.Repeat("\x00", 100), "zeros"},
		"png":    {"\x89PNG\r\n\x1a\n00000000", "neither safetensors nor"},
	} {
		_, err := openBytes([]byte(x[0]), OpenOptions{})
		wantBad(t, what, err, x[1])
	}
}

// What else torch.save writes: an OrderedDict with attributes, copyreg
// instances, wrapped tensor subclasses, sizes, sets.
func TestOtherConstructs(t *testing.T) {
	p := newPickler().op("}(")
	p.str("model").global("collections", "OrderedDict").op(")R")
	p.str("w").tensor("FloatStorage", "0", 2, 0, []int64{2}, []int64{1}).op("s")
	p.str("sub").global("torch._tensor", "_rebuild_from_type_v2").op("(").global("torch._utils", "_rebuild_tensor_v2").global("torch.nn.parameter", "Parameter").
		op("(").storage("FloatStorage", "0", 2).int(1).ints(1).ints(1).op("\x89").global("collections", "OrderedDict").op(")Rt}tRs")
	p.op("}").str("_metadata").op("}sb") // BUILD: version numbers of modules
	p.str("args").global("copy_reg", "_reconstructor").op("(").global("argparse", "Namespace").global("__builtin__", "object").op("NtR}")
	p.str("size").global("torch", "Size").ints(3, 4).op("\x85Rs").str("set").global("__builtin__", "set").op("]K\x07a\x85Rs")
	p.str("pairs").global("collections", "OrderedDict").op("]").str("k").op("K\x01\x86a\x85Rs").str("bytes").op("C\x02ab").op("s").op("b")
	p.op("u.")
	f, err := openBytes(archiveOf(t, p.Bytes(), map[string][]byte{"0": floats(1, 2)}), OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	v, w := make([]float32, 1), make([]float64, 2)
	if err := errors.Join(f.ReadF32("sub", v), f.ReadF64("w", w)); err != nil || v[0] != 2 || w[0] != 1 || w[1] != 2 {
		t.Error(v, w, err)
	}
	if a, _ := f.Value("args"); fmt.Sprint(a) != "map[bytes:<nil> pairs:map[k:1] set:[7] size:[3 4]]" {
		t.Error(a)
	}
}
