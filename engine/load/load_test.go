package load

import (
	"encoding/binary"
	"errors"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/plan"
	"margo/engine/ref"
)

// model has every kind of parameter: a vector, a weight, a weight with an F32
// copy, a convolution, and stacks of weights and of biases.
type model struct {
	Table *engine.Param `param:"table"`
	Fc    *engine.Param `param:"fc.weight"`
	Exact *engine.Param `param:"exact.weight"`
	Conv  *engine.Param `param:"conv.weight"`
	Ada   []layer       `param:"ada"`
	ada   layer
}

type layer struct {
	Weight *engine.Param `param:"weight"`
	Bias   *engine.Param `param:"bias"`
}

func newModel(t *testing.T) *model {
	t.Helper()
	m := &model{
		Table: &engine.Param{Shape: []int{1, 5, 3}},
		Fc:    &engine.Param{Shape: []int{4, 3}, Role: engine.Weight},
		Exact: &engine.Param{Shape: []int{2, 6}, Role: engine.Weight, Exact: true},
		Conv:  &engine.Param{Shape: []int{2, 3, 3, 3}, Role: engine.Conv},
	}
	var w, b []*engine.Param
	for _, rows := range []int{3, 1, 2} {
		l := layer{&engine.Param{Shape: []int{rows, 4}, Role: engine.Weight, Exact: true}, &engine.Param{Shape: []int{rows}}}
		m.Ada = append(m.Ada, l)
		w, b = append(w, l.Weight), append(b, l.Bias)
	}
	var err error
	if m.ada.Weight, err = engine.NewStack(w...); err != nil {
		t.Fatal(err)
	}
	if m.ada.Bias, err = engine.NewStack(b...); err != nil {
		t.Fatal(err)
	}
	return m
}

// numbers gives element i of tensor k the value base[k]+i/64, which bf16 rounds.
type numbers struct {
	base     map[string]float32
	fail     string // reading this one fails
	released int
}

func newNumbers(params []engine.NamedParam) *numbers {
	n := &numbers{base: map[string]float32{}}
	for i, p := range params {
		n.base[p.Name] = float32(100 * (i + 1))
	}
	return n
}

func (n *numbers) at(name string, i int) float32 { return n.base[name] + float32(i)/64 }

func (n *numbers) ReadAs(name string, d engine.DType, dst []byte) error {
	if name == n.fail {
		return engine.Errorf("read", engine.IO, "tensor %q is cut short", name)
	}
	for i := 0; i < len(dst)/d.Size(); i++ {
		put(dst, i, d, n.at(name, i))
	}
	return nil
}

func (n *numbers) Release(string) { n.released++ }

// keeper is the oracle as a device that packs nothing, so that a weight's
// layout can be read back.
type keeper struct{ *ref.Device }

func (keeper) Pack(engine.PackArgs) (engine.Packed, error) { return nil, nil }

func values(t *testing.T, x *engine.Tensor) []float64 {
	t.Helper()
	v, err := ref.Float64s(x)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestLayout(t *testing.T) {
	for _, compute := range []engine.DType{engine.F32, engine.BF16} {
		m := newModel(t)
		params := engine.Params(m)
		src := newNumbers(params)
		var seen []int64
		if err := Fill(params, src, keeper{ref.New(ref.Exact)}, compute, func(done, total int64) error { seen = append(seen, done, total); return nil }); err != nil {
			t.Fatal(err)
		}
		rounded := func(d engine.DType, v float32) float64 {
			if d == engine.BF16 {
				v = engine.FromBF16(engine.ToBF16(v))
			}
			return float64(v)
		}
		same := func(name string, x *engine.Tensor, d engine.DType, want func(i int) float32) {
			t.Helper()
			if x == nil || x.DType != d {
				t.Fatalf("%s is %v, want %v", name, x, d)
			}
			for i, v := range values(t, x) {
				if w := rounded(d, want(i)); v != w {
					t.Fatalf("%v %s[%d] is %g, want %g", compute, name, i, v, w)
				}
			}
		}
		plain := func(name string) func(int) float32 { return func(i int) float32 { return src.at(name, i) } }
		same("table", m.Table.T, engine.F32, plain("table"))
		same("fc", m.Fc.T, compute, plain("fc.weight"))
		same("exact", m.Exact.T, compute, plain("exact.weight"))
		same("conv", m.Conv.T, compute, func(i int) float32 {
			o, tap, c := i/27, i%27/3, i%3
			return src.at("conv.weight", o*27+c*9+tap)
		})
		if got := engine.ShapeString(m.Conv.T.Shape); got != "[2,27]" {
			t.Errorf("conv has shape %s", got)
		}
		starts, names := []int{0, 3, 4, 6}, []string{"ada.0.", "ada.1.", "ada.2."}
		part := func(row int) (string, int) {
			k := 0
			for row >= starts[k+1] {
				k++
			}
			return names[k], row - starts[k]
		}
		weight := func(i int) float32 { n, r := part(i / 4); return src.at(n+"weight", r*4+i%4) }
		same("stack", m.ada.Weight.T, compute, weight)
		same("stack's bias", m.ada.Bias.T, engine.F32, func(i int) float32 { n, r := part(i); return src.at(n+"bias", r) })
		same("part", m.Ada[2].Weight.T, compute, plain("ada.2.weight"))
		same("part's bias", m.Ada[1].Bias.T, engine.F32, plain("ada.1.bias"))
		if compute == engine.F32 {
			if m.Exact.T32 != nil || m.ada.Weight.T32 != nil {
				t.Error("an F32 copy beside F32")
			}
		} else {
			same("exact copy", m.Exact.T32, engine.F32, plain("exact.weight"))
			same("exact stack", m.ada.Weight.T32, engine.F32, weight)
			same("exact part", m.Ada[1].Weight.T32, engine.F32, plain("ada.1.weight"))
		}
		if n := len(seen); n == 0 || seen[n-1] != Elems(params) || seen[n-2] != Elems(params) {
			t.Errorf("progress %v", seen)
		}
		if src.released != len(params) {
			t.Errorf("%d of %d tensors released", src.released, len(params))
		}
	}
}

// A packed weight has given its buffer back, a GEMM finds it all the same, and
// freeing returns every byte.
func TestPacked(t *testing.T) {
	dev := ref.New(ref.Exact)
	free := dev.Info().MemFree
	m := newModel(t)
	params := engine.Params(m)
	src := newNumbers(params)
	if err := Fill(params, src, dev, engine.BF16, nil); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*engine.Param{m.Fc, m.Exact, m.Conv, m.ada.Weight} {
		if p.Pack == nil || p.T.Buf != nil || p.Exact != (p.Pack32 != nil) || p.Exact && p.T32.Buf != nil {
			t.Errorf("%v is not packed as it should be: %+v", p.Shape, p)
		}
	}
	if p := m.Ada[0].Weight; p.Pack != nil || p.T.Buf != nil || p.T32.Buf != nil || engine.ShapeString(p.T.Shape) != "[3,4]" {
		t.Errorf("part of a packed stack: %+v", p)
	}
	c, err := engine.NewCtx(dev, engine.BF16)
	if err != nil {
		t.Fatal(err)
	}
	x, y := c.F32([]float32{0, 0, 1, 0}, 1, 4), c.New(engine.F32, 1, 6)
	ada := m.ada.Weight.Matrix(m.ada.Bias, true)
	c.Gemm(engine.GemmArgs{X: x, W: ada.W, Packed: ada.Packed, Bias: ada.Bias, Y: y})
	got := c.Download(y)
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	if want := src.at("ada.2.weight", 4+2) + src.at("ada.2.bias", 1); got[5] != want {
		t.Errorf("row 5 of the stack gives %g, want %g", got[5], want)
	}
	if err := errors.Join(c.Close(), Free(params)); err != nil {
		t.Fatal(err)
	}
	if now := dev.Info().MemFree; now != free {
		t.Errorf("%d bytes are not given back", free-now)
	}
}

func TestFillErrors(t *testing.T) {
	dev := ref.New(ref.Exact)
	free := dev.Info().MemFree
	m := newModel(t)
	params := engine.Params(m)
	src := newNumbers(params)
	src.fail = "ada.2.weight"
	err := Fill(params, src, dev, engine.F32, nil)
	if !errors.Is(err, engine.IO) || !strings.Contains(err.Error(), src.fail) {
		t.Errorf("a source that fails: %v", err)
	}
	if now := dev.Info().MemFree; now != free {
		t.Errorf("%d bytes are not given back after an error", free-now)
	}
	// Progress may stop it: two targets are loaded, and freed again.
	stop, calls := errors.New("stop"), 0
	err = Fill(params, newNumbers(params), dev, engine.F32, func(int64, int64) error {
		if calls++; calls == 2 {
			return stop
		}
		return nil
	})
	if err != stop || calls != 2 || dev.Info().MemFree != free {
		t.Errorf("stopped after %d: %v, %d bytes are not given back", calls, err, free-dev.Info().MemFree)
	}
	if err := Fill(params[:len(params)-1], newNumbers(params), dev, engine.F32, nil); !errors.Is(err, engine.Internal) {
		t.Errorf("a stack with a part missing: %v", err)
	}
	small := plan.New(500)
	if err := Allocate(engine.Params(newModel(t)), small, engine.F32); !errors.Is(err, engine.OutOfMemory) {
		t.Errorf("500 bytes: %v", err)
	}
	if live := small.Report().Live; live != 0 {
		t.Errorf("%d bytes are not given back after running out", live)
	}
}

// What Bytes estimates is what a device without padding holds, and on the way
// there is one tensor more.
func TestBytes(t *testing.T) {
	for compute, want := range map[engine.DType]int64{
		engine.F32:  4 * (15 + 12 + 12 + 54 + 24 + 6),
		engine.BF16: 4*(15+6) + 2*(12+12+54+24) + 4*(12+24),
	} {
		params := engine.Params(newModel(t))
		dev := plan.New(0)
		if err := Allocate(params, dev, compute); err != nil {
			t.Fatal(err)
		}
		r := dev.Report()
		if r.Live != want || Bytes(params, compute) != want {
			t.Errorf("%v: %d bytes live, %d estimated, want %d", compute, r.Live, Bytes(params, compute), want)
		}
		if largest := int64(54 * 4); r.Peak > want+largest {
			t.Errorf("%v: peak %d for %d bytes of parameters", compute, r.Peak, want)
		}
	}
}

func TestBind(t *testing.T) {
	f, err := checkpoint.Open(filepath.Join("..", "..", "testdata", "goldens", "vae_tiny.safetensors"), checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	one := func(name string, shape ...int) []engine.NamedParam {
		return []engine.NamedParam{{Name: name, Param: &engine.Param{Shape: shape, Role: engine.Weight}}}
	}
	others := func(name string) bool { return name != "quant_conv.bias" }
	all := func(string) bool { return true }
	for _, tc := range []struct {
		params []engine.NamedParam
		ignore func(string) bool
		want   string
	}{
		{one("quant_conv.weight", 8, 8, 1, 1), others, `unexpected "quant_conv.bias"`},
		{one("quant_conv.weight", 8, 7, 1, 1), all, `"quant_conv.weight" has shape [8,8,1,1] instead of [8,7,1,1]`},
		{one("quant.weight", 8, 8), all, `missing "quant.weight" [8,8]`},
	} {
		err := Bind(tc.params, f, ref.New(ref.Exact), engine.F32, Options{Ignore: tc.ignore})
		if !errors.Is(err, engine.IO) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v, want %s", err, tc.want)
		}
		if tc.params[0].T != nil {
			t.Errorf("%s: something was loaded", tc.want)
		}
	}
	p := one("quant_conv.weight", 8, 8, 1, 1)
	dev := keeper{ref.New(ref.Exact)}
	if err := Bind(p, f, dev, engine.F32, Options{Ignore: all}); err != nil {
		t.Fatal(err)
	}
	if err := Bind(p, f, dev, engine.F32, Options{Ignore: all}); !errors.Is(err, engine.Invalid) || p[0].T == nil {
		t.Errorf("loaded twice: %v", err)
	}
	want := make([]float64, 64)
	if err := f.ReadF64("quant_conv.weight", want); err != nil {
		t.Fatal(err)
	}
	for i, v := range values(t, p[0].T) {
		if v != want[i] {
			t.Fatalf("element %d is %g, want %g", i, v, want[i])
		}
	}
}

func TestRandom(t *testing.T) {
	read := func(seed uint64, compute engine.DType) (norm, w []float64) {
		params := []engine.NamedParam{
			{Name: "norm.weight", Param: &engine.Param{Shape: []int{8}}},
			{Name: "fc.weight", Param: &engine.Param{Shape: []int{500, 401}, Role: engine.Weight}},
			{Name: "fc2.weight", Param: &engine.Param{Shape: []int{500, 401}, Role: engine.Weight}},
		}
		if err := Random(params, keeper{ref.New(ref.Exact)}, compute, seed); err != nil {
			t.Fatal(err)
		}
		if a, b := values(t, params[1].T), values(t, params[2].T); a[0] == b[0] && a[1] == b[1] && a[2] == b[2] {
			t.Error("two names have the same numbers")
		}
		return values(t, params[0].T), values(t, params[1].T)
	}
	norm, a := read(1, engine.F32)
	_, again := read(1, engine.F32)
	_, other := read(2, engine.F32)
	_, half := read(1, engine.BF16)
	sum, square, fourth, differ := 0.0, 0.0, 0.0, 0
	for i, v := range a {
		if v != again[i] {
			t.Fatalf("element %d differs between two runs", i)
		}
		if h := engine.FromBF16(engine.ToBF16(float32(v))); half[i] != float64(h) {
			t.Fatalf("element %d is %g in bf16, want %g", i, half[i], h)
		}
		if v != other[i] {
			differ++
		}
		sum, square, fourth = sum+v, square+v*v, fourth+v*v*v*v
	}
	n := float64(len(a))
	sd := math.Sqrt(square / n)
	// Four standard errors. The kurtosis of a sum of four uniforms is 2.7.
	if math.Abs(sum/n) > 4*0.02/math.Sqrt(n) || math.Abs(sd-0.02) > 0.0002 || math.Abs(fourth/n/math.Pow(sd, 4)-2.7) > 0.05 {
		t.Errorf("mean %g, standard deviation %g, kurtosis %g", sum/n, sd, fourth/n/math.Pow(sd, 4))
	}
	if float64(differ) < 0.99*n {
		t.Errorf("only %d of %g elements depend on the seed", differ, n)
	}
	for _, v := range norm {
		if v != 1 {
			t.Errorf("a norm weight of %g", v)
		}
	}
	// Pinned: benchmarks of different versions use the same numbers.
	var b [16]byte
	if err := (random{seed: 1}).ReadAs("fc.weight", engine.F32, b[:]); err != nil {
		t.Fatal(err)
	}
	w := engine.Philox([4]uint32{0, uint32(engine.PurposeInit) << 24, 0, 0}, fnvOf("fc.weight")^1)
	for i, u := range w {
		s := float64(u&255) + float64(u>>8&255) + float64(u>>16&255) + float64(u>>24)
		want := (s - 510) * 0.02 / math.Sqrt(21845)
		got := float64(math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])))
		if math.Abs(got-want) > 1e-8 {
			t.Errorf("element %d is %g, want %g", i, got, want)
		}
	}
}

// fnvOf is FNV-1a, 64 bits.
func fnvOf(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := 0; i < len(s); i++ {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

func BenchmarkRandom(b *testing.B) {
	dst := make([]byte, 4<<20)
	b.SetBytes(int64(len(dst)))
	for i := 0; i < b.N; i++ {
		if err := (random{seed: 1}).ReadAs("w", engine.F32, dst); err != nil {
			b.Fatal(err)
		}
	}
}

// A weight in FP8 is rounded row by row from what the file has; its F32 copy and all others are as they were.
func TestFP8(t *testing.T) {
	m := newModel(t)
	m.Exact.FP8 = true
	params := engine.Params(m)
	src := newNumbers(params)
	src.base["exact.weight"] = 0.3
	if err := Fill(params, src, keeper{ref.New(ref.Exact)}, engine.BF16, nil); err != nil {
		t.Fatal(err)
	}
	got, exact, other := values(t, m.Exact.T), values(t, m.Exact.T32), values(t, m.Fc.T)
	for r := range 2 {
		row := make([]float32, 6)
		for i := range row {
			row[i] = src.at("exact.weight", 6*r+i)
		}
		if err := engine.FromBF16(engine.ToBF16(row[1])) - row[1]; err == 0 {
			t.Fatal("bf16 rounds nothing here")
		}
		engine.RoundE4M3(row, make([]byte, 6))
		for i, v := range row {
			if got[6*r+i] != float64(v) || exact[6*r+i] != float64(src.at("exact.weight", 6*r+i)) {
				t.Errorf("(%d,%d) is %g, in F32 %g; want %g and %g", r, i, got[6*r+i], exact[6*r+i], v, src.at("exact.weight", 6*r+i))
			}
		}
	}
	if want := float64(engine.FromBF16(engine.ToBF16(src.at("fc.weight", 5)))); other[5] != want {
		t.Errorf("another weight is %g, want %g", other[5], want)
	}
	if err := Free(params); err != nil {
		t.Fatal(err)
	}

	err := Fill(params, src, ref.New(ref.Exact), engine.F32, nil)
	if !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), `"exact.weight" cannot be rounded to fp8`) {
		t.Errorf("in F32: %v", err)
	}
}

// keepsCodes is a device that keeps codes and scales of FP8 beside BF16.
type keepsCodes struct{ *plan.Device }

func (d keepsCodes) PackedBytes(a engine.PackArgs) int64 {
	n := d.Device.PackedBytes(a)
	if a.FP8 {
		n += int64(a.W.Elems() + 4*a.W.Rows())
	}
	return n
}

// A plan counts what a device keeps beside, once, though the weight has an F32 copy too.
func TestFP8Memory(t *testing.T) {
	live := func(keeps, fp8 bool) int64 {
		m := newModel(t)
		m.Exact.FP8 = fp8
		dev := plan.New(0)
		if keeps {
			dev = plan.For(keepsCodes{dev})
		}
		if err := Allocate(engine.Params(m), dev, engine.BF16); err != nil {
			t.Fatal(err)
		}
		return dev.Report().Live
	}
	if plain := live(true, false); live(false, true) != plain || live(true, true) != plain+12+2*4 {
		t.Errorf("%d bytes, with fp8 %d, where codes are kept %d", plain, live(false, true), live(true, true))
	}
}
