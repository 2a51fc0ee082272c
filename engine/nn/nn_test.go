package nn

import (
	"encoding/binary"
	"math"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/load"
	"margo/engine/ref"
)

// draws gives every parameter normal values of deviation 0.3, by name.
type draws struct{}

func (draws) Release(string) {}
func (draws) ReadAs(name string, d engine.DType, dst []byte) error {
	for i := range len(dst) / d.Size() {
		v := value(name, i)
		if d == engine.BF16 {
			binary.LittleEndian.PutUint16(dst[2*i:], engine.ToBF16(v))
		} else {
			binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(v))
		}
	}
	return nil
}

func value(name string, i int) float32 {
	seed := uint64(0)
	for _, b := range []byte(name) {
		seed = seed*131 + uint64(b)
	}
	return float32(0.3 * engine.NormalAt(engine.RNG{Seed: seed, Purpose: engine.PurposeTest}, i, 0, 0))
}

func values(name string, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = value(name, i)
	}
	return v
}

func block(t *testing.T, dim, heads int, ratio float64, m ref.Mode, d engine.DType) (*Block, *engine.Ctx) {
	t.Helper()
	dev := ref.New(m)
	b := NewBlock(dim, heads, ratio, 1e-6)
	if err := load.Fill(engine.Params(b), draws{}, dev, d, nil); err != nil {
		t.Fatal(err)
	}
	c, err := engine.NewCtx(dev, d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return b, c
}

func spans(c *engine.Ctx, host ...int32) Spans { return Spans{Off: c.I32(host), Host: host} }

// The block written down a second time, from the paper's formulas, one row and
// one head after the other.
func TestBlockFormula(t *testing.T) {
	const dim, heads, hidden, n = 12, 3, 30, 5
	b, c := block(t, dim, heads, 2.5, ref.Exact, engine.F32)
	in := values("x", n*dim)
	got := c.Download(b.Forward(c, c.F32(in, n, dim), spans(c, 0, n)))

	p := func(name string) func(i int) float64 { return func(i int) float64 { return float64(value(name, i)) } }
	norm := func(x []float64, name string) []float64 {
		mean, v := 0.0, 0.0
		for _, a := range x {
			mean += a / dim
		}
		for _, a := range x {
			v += (a - mean) * (a - mean) / dim
		}
		y := make([]float64, dim)
		for i, a := range x {
			y[i] = (a-mean)/math.Sqrt(v+1e-6)*p(name+".weight")(i) + p(name+".bias")(i)
		}
		return y
	}
	linear := func(x []float64, name string, out int) []float64 {
		y := make([]float64, out)
		for o := range y {
			y[o] = p(name + ".bias")(o)
			for i, a := range x {
				y[o] += a * p(name+".weight")(o*len(x)+i)
			}
		}
		return y
	}
	x, qkv := make([][]float64, n), make([][]float64, n)
	for r := range x {
		for _, v := range in[r*dim : (r+1)*dim] {
			x[r] = append(x[r], float64(v))
		}
		qkv[r] = linear(norm(x[r], "norm1"), "attn.qkv", 3*dim)
	}
	for r := range x {
		o := make([]float64, dim)
		for h := range heads {
			const dh = dim / heads
			weights, sum := make([]float64, n), 0.0
			for k := range weights {
				dot := 0.0
				for j := range dh {
					dot += qkv[r][h*dh+j] * qkv[k][dim+h*dh+j]
				}
				weights[k] = math.Exp(dot / math.Sqrt(dh))
				sum += weights[k]
			}
			for k, w := range weights {
				for j := range dh {
					o[h*dh+j] += w / sum * qkv[k][2*dim+h*dh+j]
				}
			}
		}
		for i, v := range linear(o, "attn.proj", dim) {
			x[r][i] += v
		}
		f := linear(norm(x[r], "norm2"), "mlp.fc1", hidden)
		for i, v := range f {
			f[i] = v / 2 * (1 + math.Erf(v/math.Sqrt2))
		}
		for i, v := range linear(f, "mlp.fc2", dim) {
			x[r][i] += v
			if want := x[r][i]; math.Abs(float64(got[r*dim+i])-want) > 1e-6*(1+math.Abs(want)) {
				t.Errorf("row %d column %d: %g, want %g", r, i, got[r*dim+i], want)
			}
		}
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}

// Sequences side by side are sequences alone; some rows only are these rows; rows
// with precomputed queries, keys and values are as without. All bit for bit.
func TestBlockVariants(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		const dim = 16
		b, c := block(t, dim, 2, 4, ref.Rounded, d)
		in := values("x", 9*dim)
		copy(in[8*dim:], in[2*dim:3*dim]) // rows 2 and 8 are the same
		x := func() *engine.Tensor { return c.F32(in, 9, dim) }
		s := spans(c, 0, 4, 4, 9) // the second sequence is empty
		all := c.Download(b.Forward(c, x(), s))

		alone := slices.Concat(
			c.Download(b.Forward(c, c.F32(in[:4*dim], 4, dim), spans(c, 0, 4))),
			c.Download(b.Forward(c, c.F32(in[4*dim:], 5, dim), spans(c, 0, 5))))
		if !slices.Equal(alone, all) {
			t.Errorf("%v: sequences influence each other", d)
		}
		table := b.QKV(c, c.F32(slices.Concat(in[:dim], in[2*dim:3*dim]), 2, dim))
		fixed := b.ForwardFixed(c, x(), s, &Fixed{Table: table, To: c.I32([]int32{8, 2}), From: c.I32([]int32{1, 1}),
			Others: c.I32([]int32{0, 1, 3, 4, 5, 6, 7})})
		if !slices.Equal(c.Download(fixed), all) {
			t.Errorf("%v: precomputed rows change the result", d)
		}
		kept := x()
		some := c.Download(b.ForwardRows(c, kept, s, c.I32([]int32{3, 5, 8}), spans(c, 0, 1, 1, 3)))
		if !slices.Equal(some, slices.Concat(all[3*dim:4*dim], all[5*dim:6*dim], all[8*dim:])) {
			t.Errorf("%v: some rows differ from all", d)
		}
		if !slices.Equal(c.Download(kept), in) {
			t.Errorf("%v: ForwardRows changed its input", d)
		}
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
	}
}

// The MLP works on pieces of many rows; where they end makes no difference.
func TestManyRows(t *testing.T) {
	const dim, n = 4, mlpRows + 3
	b, c := block(t, dim, 1, 1, ref.Rounded, engine.F32)
	in := values("x", n*dim)
	y := c.Download(func() *engine.Tensor { x := c.F32(in, n, dim); b.mlp(c, x, n); return x }())
	tail := c.F32(in[(n-5)*dim:], 5, dim)
	b.mlp(c, tail, 5)
	if !slices.Equal(c.Download(tail), y[(n-5)*dim:]) {
		t.Error("the last rows differ")
	}
}

// After an error the layers do nothing and return nothing.
func TestAfterError(t *testing.T) {
	b, c := block(t, 4, 1, 1, ref.Exact, engine.F32)
	c.Fail(engine.Errorf("test", engine.Internal, "stop"))
	if b.Forward(c, nil, Spans{}) != nil || b.ForwardRows(c, nil, Spans{}, nil, Spans{}) != nil || b.QKV(c, nil) != nil ||
		Gather(c, nil, nil) != nil || b.Norm1.Forward(c, nil, engine.F32) != nil || b.MLP.Fc1.Forward(c, nil, engine.F32) != nil {
		t.Error("something was returned")
	}
}
