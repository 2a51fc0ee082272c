package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"margo/engine"
)

// stFile puts a header before data, with the right length.
func stFile(header string, data []byte) []byte {
	b := le.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), data...)
}

func TestHostileSafetensors(t *testing.T) {
	tensor := func(name, dtype, shape, offsets string) string {
		return fmt.Sprintf(`%q:{"dtype":"%s","shape":%s,"data_offsets":%s}`, name, dtype, shape, offsets)
	}
	a := tensor("a", "F32", "[2]", "[0,8]")
	d8, d16 := make([]byte, 8), make([]byte, 16)
	for what, x := range map[string]struct {
		b     []byte
		parts []string
	}{
		"10 TB":           {append(le.AppendUint64(nil, 10<<40), '{', '}'), []string{"10995116277760", "limit"}},
		"2^64-1":          {append(le.AppendUint64(nil, math.MaxUint64), '{', '}'), []string{"limit"}},
		"header cut":      {stFile("{"+a+"}", d8)[:40], []string{"truncated"}},
		"data cut":        {stFile("{"+a+"}", d8[:7]), []string{"truncated", `"a"`}},
		"rest":            {stFile("{"+a+"}", d16), []string{"last 8 bytes"}},
		"overlap":         {stFile("{"+a+","+tensor("b", "F32", "[2]", "[4,12]")+"}", d16), []string{`"a" and "b" overlap`}},
		"same place":      {stFile("{"+a+","+tensor("b", "F32", "[2]", "[0,8]")+"}", d8), []string{"overlap"}},
		"hole":            {stFile("{"+a+","+tensor("b", "F32", "[1]", "[12,16]")+"}", d16), []string{"bytes 8 to 12", `"b"`}},
		"hole first":      {stFile("{"+tensor("b", "F32", "[1]", "[4,8]")+"}", d8), []string{"bytes 0 to 4"}},
		"outside":         {stFile("{"+tensor("b", "F32", "[2]", "[9223372036854775799,9223372036854775807]")+"}", d8), []string{"truncated"}},
		"shape":           {stFile("{"+tensor("a", "F32", "[3]", "[0,8]")+"}", d8), []string{"has 12 bytes", "span 8"}},
		"shape overflow":  {stFile("{"+tensor("a", "F32", "[4294967296,4294967296,4294967296]", "[0,8]")+"}", d8), []string{"too large"}},
		"bytes overflow":  {stFile("{"+tensor("a", "F64", "[2305843009213693953]", "[0,8]")+"}", d8), []string{"too large"}},
		"negative":        {stFile("{"+tensor("a", "F32", "[-2]", "[0,8]")+"}", d8), []string{`"-2"`}},
		"fraction":        {stFile("{"+tensor("a", "F32", "[2.0]", "[0,8]")+"}", d8), []string{`"2.0"`}},
		"backwards":       {stFile("{"+tensor("a", "F32", "[2]", "[8,0]")+"}", d8), []string{"[8 0]"}},
		"three offsets":   {stFile("{"+tensor("a", "F32", "[2]", "[0,8,8]")+"}", d8), []string{"more than 2"}},
		"rank":            {stFile("{"+tensor("a", "F32", "["+strings.Repeat("1,", 16)+"2]", "[0,8]")+"}", d8), []string{"more than 16"}},
		"dtype":           {stFile("{"+tensor("a", "Q4_0", "[2]", "[0,8]")+"}", d8), []string{`unknown dtype "Q4_0"`}},
		"duplicate":       {stFile("{"+a+","+a+"}", d8), []string{`duplicate key "a"`}},
		"duplicate field": {stFile(`{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}`, d8), []string{`duplicate key "dtype"`}},
		"duplicate meta":  {stFile(`{"__metadata__":{"k":"1","k":"2"},`+a+"}", d8), []string{`duplicate key "k"`}},
		"meta number":     {stFile(`{"__metadata__":{"k":1},`+a+"}", d8), []string{"string was expected"}},
		"no shape":        {stFile(`{"a":{"dtype":"F32","data_offsets":[0,8]}}`, d8), []string{"no shape"}},
		"no offsets":      {stFile(`{"a":{"dtype":"F32","shape":[0]}}`, nil), []string{"no data_offsets"}},
		"extra field":     {stFile(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}`, d8), []string{`unknown field "x"`}},
		"not an object":   {stFile(`{"a":[[[[[[[`, d8), []string{"["}},
		"nesting":         {stFile(`{"a":`+strings.Repeat("[", 1<<20), d8), []string{`"a"`}},
		"not closed":      {stFile("{"+a, d8), []string{"unexpected EOF"}},
		"text after":      {stFile("{"+a+"}{}", d8), []string{"text after"}},
		"not UTF-8":       {stFile("{\"\xff\":1}", d8), []string{"UTF-8"}},
		"long name":       {stFile(`{"`+strings.Repeat("n", 1000)+`":1}`, d8), []string{"(1000 bytes)"}},
	} {
		_, err := openBytes(x.b, OpenOptions{})
		wantBad(t, what, err, x.parts...)
	}
	if _, err := openBytes(stFile("{"+a+"}", d8), OpenOptions{State: "model"}); !errors.Is(err, engine.Invalid) {
		t.Error(err)
	}
	// Legal oddities: padding, empty tensors, no alignment, no tensors.
	f, err := openBytes(stFile("{"+tensor("i", "U8", "[3]", "[0,3]")+","+tensor("e", "F32", "[0,7]", "[3,3]")+","+tensor("s", "F32", "[]", "[3,7]")+"}   ",
		append([]byte{7, 8, 9}, floats(1.5)...)), OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s, i := make([]float32, 1), make([]int64, 3)
	if err := errors.Join(f.ReadF32("s", s), f.ReadI64("i", i), f.ReadF32("e", nil)); err != nil || s[0] != 1.5 || !slices.Equal(i, []int64{7, 8, 9}) {
		t.Error(s, i, err)
	}
	wantBad(t, "absent", f.ReadF32("zz", nil), `no tensor "zz"`)
	if err := f.ReadF32("s", make([]float32, 2)); !errors.Is(err, engine.Invalid) {
		t.Error(err)
	}
	if _, err := openBytes(stFile("{}", nil), OpenOptions{}); err != nil {
		t.Error(err)
	}
}

func TestConversions(t *testing.T) {
	// Ties and neighbours of bfloat16 around 1, subnormals, specials.
	values := []float64{0, math.Copysign(0, -1), 1, 1 + 1.0/256, 1 + 3.0/256, 1 + 1.0/256 + 1e-12, 1 + 1.0/256 - 1e-12, -1 - 1.0/256 - 1e-12,
		math.Inf(1), math.Inf(-1), math.NaN(), 1e-40, 3.4e38, 1e300, -65504, 6e-8, math.Pi}
	want := []float32{0, float32(math.Copysign(0, -1)), 1, 1, 1 + 4.0/256, 1 + 2.0/256, 1, -1 - 2.0/256,
		float32(math.Inf(1)), float32(math.Inf(-1)), float32(math.NaN())}
	for i, v := range want {
		var src, dst [8]byte
		le.PutUint64(src[:], math.Float64bits(values[i]))
		if !convert(dst[:2], BF16, src[:], F64) {
			t.Fatal("no conversion")
		}
		got := engine.FromBF16(le.Uint16(dst[:]))
		if math.Float32bits(got) != math.Float32bits(v) && !(v != v && got != got) {
			t.Errorf("F64 %v to BF16 is %v, not %v", values[i], got, v)
		}
	}
	// Narrowing by way of F32 agrees wherever F32 is exact.
	rng := rand.New(rand.NewSource(1))
	for range 100000 {
		f := math.Float32frombits(rng.Uint32())
		var a, b [2]byte
		src32, src64 := le.AppendUint32(nil, math.Float32bits(f)), le.AppendUint64(nil, math.Float64bits(float64(f)))
		convert(a[:], BF16, src32, F32)
		convert(b[:], BF16, src64, F64)
		if a != b && f == f {
			t.Fatalf("%v: %x and %x", f, a, b)
		}
	}
	// All halves against their definition.
	for h := range 1 << 16 {
		sign, exp, frac := 1-2*float64(h>>15), h>>10&31, float64(h&1023)
		want := sign * math.Ldexp(1+frac/1024, exp-15)
		switch {
		case exp == 0:
			want = sign * math.Ldexp(frac, -24)
		case exp == 31 && frac == 0:
			want = sign * math.Inf(1)
		case exp == 31:
			want = math.NaN()
		}
		if got := float64(halfToF32(uint16(h))); got != want && !(got != got && want != want) || got == 0 && math.Signbit(got) != (sign < 0) {
			t.Fatalf("half %04x is %v, not %v", h, got, want)
		}
	}
	if convert(make([]byte, 4), F32, make([]byte, 4), I32) {
		t.Error("an integer was converted to a float")
	}
}

func entry(name string, d DType, shape []int, data []byte) Entry {
	return Entry{Info{name, d, shape}, func(w io.Writer) error { _, err := w.Write(data); return err }}
}

func TestSaveAndReadBack(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "w.safetensors")
	meta := map[string]string{"b": "2", "a": "\"quoted\" é \x00"}
	entries := []Entry{
		entry("z", U8, []int{3}, []byte{1, 2, 3}),
		entry("b", F32, []int{2}, floats(1, 2)), entry("a", F32, []int{1, 1}, floats(3)),
		entry("h", BF16, []int{1}, []byte{0x80, 0x3f}), entry("scalar", F64, nil, le.AppendUint64(nil, math.Float64bits(0.1))),
		entry("none", I64, []int{0}, nil), entry("odd \"name\" é", Bool, []int{1}, []byte{1}),
	}
	if err := Save(context.Background(), path, entries, meta); err != nil {
		t.Fatal(err)
	}
	first, _ := os.ReadFile(path)
	slices.Reverse(entries)
	if err := Save(context.Background(), path, entries, meta); err != nil {
		t.Fatal(err)
	}
	if second, _ := os.ReadFile(path); !bytes.Equal(first, second) {
		t.Error("the order of the entries shows in the file")
	}
	if (8+le.Uint64(first))%8 != 0 {
		t.Error("the data is not aligned")
	}
	f := mustOpen(t, path, OpenOptions{})
	if got := f.Metadata(); len(got) != 2 || got["a"] != meta["a"] || got["b"] != "2" {
		t.Errorf("%q", got)
	}
	if got := f.Names(); len(got) != len(entries) {
		t.Error(got)
	}
	v, d := make([]float32, 2), make([]float64, 1)
	if err := errors.Join(f.ReadF32("b", v), f.ReadF64("scalar", d)); err != nil || v[1] != 2 || d[0] != 0.1 {
		t.Error(v, d, err)
	}
	if err := f.ReadF32("h", v[:1]); err != nil || v[0] != 1 {
		t.Error(v, err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// Whatever goes wrong, the old file stays and no other appears.
func TestSaveLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "w.safetensors")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	for what, x := range map[string]struct {
		entries []Entry
		kind    engine.Kind
	}{
		"error":     {[]Entry{{Info{"a", F32, []int{1}}, func(io.Writer) error { return io.ErrClosedPipe }}}, engine.IO},
		"too short": {[]Entry{entry("a", F32, []int{2}, floats(1))}, engine.Internal},
		"too long":  {[]Entry{entry("a", F32, []int{1}, floats(1, 2))}, engine.Internal},
		"twice":     {[]Entry{entry("a", F32, []int{1}, floats(1)), entry("b", F32, []int{1}, floats(1)), entry("a", U8, []int{1}, []byte{1})}, engine.Invalid},
		"no dtype":  {[]Entry{entry("a", "X", []int{1}, floats(1))}, engine.Invalid},
		"reserved":  {[]Entry{entry("__metadata__", F32, []int{1}, floats(1))}, engine.Invalid},
		"cancelled": {[]Entry{{Info{"a", F32, []int{1}}, func(w io.Writer) error { cancel(); _, err := w.Write(floats(1)); return err }}}, engine.Cancelled},
	} {
		if err := Save(ctx, path, x.entries, nil); !errors.Is(err, x.kind) {
			t.Errorf("%s: %v", what, err)
		}
		ctx, cancel = context.WithCancel(context.Background())
	}
	func() {
		defer func() { recover() }()
		Save(ctx, path, []Entry{{Info{"a", F32, []int{1}}, func(io.Writer) error { panic("x") }}}, nil)
	}()
	cancel()
	left, _ := os.ReadDir(dir)
	if b, _ := os.ReadFile(path); len(left) != 1 || string(b) != "old" {
		t.Errorf("left %v, contents %q", left, b)
	}
	if err := Save(context.Background(), filepath.Join(dir, "no", "w"), nil, nil); !errors.Is(err, engine.IO) || !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A file that is cut while it is mapped gives an error, not a signal.
func TestCutWhileMapped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.safetensors")
	big := make([]byte, 4<<20)
	if err := Save(context.Background(), path, []Entry{entry("a", F32, []int{1 << 20}, big), entry("b", F32, []int{1}, floats(1))}, nil); err != nil {
		t.Fatal(err)
	}
	f := mustOpen(t, path, OpenOptions{})
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	v := make([]float32, 1<<20)
	wantBad(t, "F32", f.ReadF32("a", v), `"a"`, "truncated while")
	wantBad(t, "BF16", f.ReadAs("a", engine.BF16, make([]byte, 2<<20)), "truncated while")
	wantBad(t, "last", f.ReadF32("b", v[:1]), "truncated while")
	wantBad(t, "WriteTo", f.WriteTo(io.Discard, "a", F32), "truncated while")
	if runtime.GOOS == "linux" && !f.region.mapped {
		t.Error("the file was not mapped")
	}
}

// Without a mapping everything works through reads.
func TestUnmapped(t *testing.T) {
	r, err := openRegion(goldens + "vae_tiny.pth")
	if err != nil {
		t.Fatal(err)
	}
	if r.mapped {
		munmap(r.mem)
		r.mem, r.mapped = nil, false
	}
	f, err := openFrom(r, "unmapped", OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	sameTensors(t, f, mustOpen(t, goldens+"vae_tiny.safetensors", OpenOptions{}))
	f.Close()
	wantBad(t, "closed", f.ReadF32("quant_conv.bias", make([]float32, 8)), "closed")

	path := filepath.Join(t.TempDir(), "w")
	if err := Save(context.Background(), path, []Entry{entry("a", F32, []int{4}, floats(1, 2, 3, 4))}, nil); err != nil {
		t.Fatal(err)
	}
	if r, err = openRegion(path); err != nil {
		t.Fatal(err)
	}
	if r.mapped {
		munmap(r.mem)
		r.mem, r.mapped = nil, false
	}
	if f, err = openFrom(r, path, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	os.Truncate(path, r.size-4)
	wantBad(t, "cut", f.ReadF32("a", make([]float32, 4)), "truncated while")
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(filepath.Join(dir, "none"), OpenOptions{})
	wantBad(t, "none", err, "no such file")
	if !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	_, err = Open(dir, OpenOptions{})
	wantBad(t, "folder", err, "not a regular file")
	os.WriteFile(filepath.Join(dir, "empty"), nil, 0o644)
	_, err = Open(filepath.Join(dir, "empty"), OpenOptions{})
	wantBad(t, "empty", err, "empty")
}

// Readers and Close may meet: a read gives the data or an error.
func TestConcurrentClose(t *testing.T) {
	f, err := Open(goldens+"vae_tiny.pth", OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			v := make([]float32, 8)
			for range 200 {
				if err := f.ReadF32("quant_conv.bias", v); err != nil && !strings.Contains(err.Error(), "closed") {
					t.Error(err)
				}
				f.Release("quant_conv.bias")
			}
		}()
	}
	f.Close()
	wg.Wait()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestIntegers(t *testing.T) {
	ones := bytes.Repeat([]byte{0xff}, 8)
	for d, want := range map[DType]int64{U8: 255, I8: -1, U16: 65535, I16: -1, U32: 1<<32 - 1, I32: -1, I64: -1} {
		n := d.Size()
		f, err := openBytes(stFile(fmt.Sprintf(`{"a":{"dtype":"%s","shape":[1],"data_offsets":[0,%d]}}`, d, n), ones[:n]), OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]int64, 1)
		if err := f.ReadI64("a", got); err != nil || got[0] != want {
			t.Errorf("%s: %d, %v", d, got[0], err)
		}
		if err := f.ReadAs("a", engine.I32, make([]byte, 4)); (err != nil) != (d == U32) {
			t.Errorf("%s as I32: %v", d, err)
		}
	}
	for _, d := range []DType{U64, Bool, F8E4M3, F32} { // too large, not 0 or 1, no integer
		n := d.Size()
		f, err := openBytes(stFile(fmt.Sprintf(`{"a":{"dtype":"%s","shape":[1],"data_offsets":[0,%d]}}`, d, n), ones[:n]), OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		wantBad(t, string(d), f.ReadI64("a", make([]int64, 1)), `tensor "a"`)
	}
}
