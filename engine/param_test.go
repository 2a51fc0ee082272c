package engine

import (
	"errors"
	"slices"
	"testing"
)

type TestLinear struct {
	W *Param `param:"weight"`
	B *Param `param:"bias"`
}

type TestBlock struct {
	Norm   TestLinear  `param:"norm"`
	Fc     *TestLinear `param:"mlp.0"`
	Absent *TestLinear `param:"absent"`
	note   *Param      //nolint:unused // unexported and untagged: no parameter
}

type testModel struct {
	TestLinear             // embedded: adds nothing to the key
	Blocks     []TestBlock `param:"blocks"`
	Same       TestLinear  `param:""`
	Any        any         `param:"any"`
	Width      int         `param:"width"` // no parameter inside
	Scratch    *Param      // no tag
}

func TestParams(t *testing.T) {
	p := func() *Param { return &Param{Shape: []int{2, 3}} }
	m := &testModel{Blocks: []TestBlock{{Norm: TestLinear{p(), p()}, Fc: &TestLinear{W: p()}}, {}},
		Same: TestLinear{W: p()}, Any: &TestLinear{B: p()}, Scratch: p()}
	m.Blocks[0].note = p()
	m.W = p()
	var names []string
	for _, n := range Params(m) {
		names = append(names, n.Name)
	}
	want := []string{"weight", "blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.mlp.0.weight", "weight", "any.bias"}
	if !slices.Equal(names, want) {
		t.Errorf("%v, want %v", names, want)
	}
	if got := Params(m)[len(names)-1].Param; got != m.Any.(*TestLinear).B {
		t.Error("not the same parameter")
	}
}

func TestParamShapes(t *testing.T) {
	for _, c := range []struct {
		p     Param
		shape []int
		d     DType
	}{
		{Param{Shape: []int{5}, Role: Vector}, []int{5}, F32},
		{Param{Shape: []int{4, 6}, Role: Vector}, []int{4, 6}, F32},
		{Param{Shape: []int{4, 6}, Role: Weight}, []int{4, 6}, BF16},
		{Param{Shape: []int{4, 6}, Role: Weight, F32: true}, []int{4, 6}, F32},
		{Param{Shape: []int{8, 3, 3, 2}, Role: Conv}, []int{8, 18}, BF16},
		{Param{Shape: []int{0, 6}, Role: Weight}, []int{0, 0}, BF16},
	} {
		if got := c.p.DeviceShape(); !slices.Equal(got, c.shape) {
			t.Errorf("%+v: shape %v, want %v", c.p, got, c.shape)
		}
		if got := c.p.DType(BF16); got != c.d {
			t.Errorf("%+v: %v, want %v", c.p, got, c.d)
		}
	}
}

func TestStack(t *testing.T) {
	a, b := &Param{Shape: []int{3, 4}, Role: Weight}, &Param{Shape: []int{2, 4}, Role: Weight}
	s, err := NewStack(a, b)
	if err != nil || !slices.Equal(s.Shape, []int{5, 4}) || a.Row != 0 || b.Row != 3 || b.Stack != s || s.Role != Weight {
		t.Errorf("%+v, %v", s, err)
	}
	for name, parts := range map[string][]*Param{
		"no parts":      nil,
		"other columns": {{Shape: []int{3, 4}}, {Shape: []int{3, 5}}},
		"other role":    {{Shape: []int{3, 4}}, {Shape: []int{3, 4}, Role: Weight}},
		"scalar":        {{}},
	} {
		if _, err := NewStack(parts...); !errors.Is(err, Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParamFree(t *testing.T) {
	h := &heap{limit: 1 << 20}
	tensor := func() *Tensor { b, _ := h.Alloc(64); return NewTensor(b, 0, F32, 16) }
	p := &Param{T: tensor(), T32: tensor(), Pack: packedBlock{h}, Pack32: packedBlock{h}}
	h.used += 20
	for range 2 { // twice does no harm
		if err := p.Free(); err != nil || h.used != 0 {
			t.Errorf("%d bytes left, %v", h.used, err)
		}
	}
	part := &Param{Shape: []int{2, 2}, Role: Weight}
	s, _ := NewStack(part)
	s.T = tensor()
	part.T = s.T.Reshape(4, 4).RowsAt(0, 1)
	if err := part.Free(); err != nil || h.used != 0 || s.T != nil {
		t.Errorf("stack not freed with its part: %d bytes left, %v", h.used, err)
	}
}

type packedBlock struct{ h *heap }

func (packedBlock) Bytes() int    { return 10 }
func (p packedBlock) Free() error { p.h.used -= 10; return nil }
