package engine

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Role says how a parameter is used, which decides how it is stored.
type Role uint8

const (
	Vector Role = iota // bias, norm, embedding table: F32, read directly
	Weight             // GEMM weight [out, in…]: compute dtype, packed as [out, in]
	Conv               // convolution weight [Cout,Cin,kh,kw]: packed as [Cout, kh·kw·Cin]
)

// Param is one trained tensor. Shape is that of the checkpoint. T is its value
// on the device, of shape DeviceShape; for a packed weight, T.Buf may have been
// dropped while T's shape and dtype stay valid.
//
// Exact asks the loader for a second copy of a Weight in F32, beside that in
// BF16: T32 and Pack32, with the same rules as T and Pack. With F32 compute
// both stay nil, and T and Pack serve: see Matrix.
//
// FP8 asks the loader to round the BF16 copy of a Weight to e4m3 times a power
// of two for each row (RoundE4M3); the F32 copy stays as it is. With another
// compute dtype it is an error. A part of a stack cannot ask for it.
//
// Stack, if not nil, is a larger parameter whose rows Row … Row+Shape[0]-1
// this one is (for a vector: elements). The loader puts the rows into the
// stack's tensor, packs the stack once all its parts are there, and leaves this
// parameter's T a view (with Buf dropped or not, like the stack's) and its Pack
// nil. A stack has no checkpoint key: Params doesn't list it, its parts are.
//
// Order, if not nil, permutes the rows (elements of a vector) on the way to the
// device: row i of T is row Order[i] of the checkpoint.
type Param struct {
	Shape  []int
	Role   Role
	F32    bool  // keep F32 whatever the compute dtype
	Exact  bool  // keep an F32 copy too
	FP8    bool  // round to e4m3, a power of two for each row
	Order  []int // of the rows; nil: as they are
	T      *Tensor
	Pack   Packed
	T32    *Tensor
	Pack32 Packed
	Stack  *Param
	Row    int
}

// NamedParam is a parameter with its checkpoint key.
type NamedParam struct {
	Name string
	*Param
}

// Elems is the number of elements.
func (p *Param) Elems() int {
	n := 1
	for _, s := range p.Shape {
		n *= s
	}
	return n
}

// DType is what the device holds the parameter in.
func (p *Param) DType(compute DType) DType {
	if p.Role == Vector || p.F32 {
		return F32
	}
	return compute
}

// DeviceShape is the shape of T: Shape for a Vector, [Shape[0], rest] for a
// weight.
func (p *Param) DeviceShape() []int {
	if p.Role == Vector || len(p.Shape) == 0 {
		return p.Shape
	}
	return []int{p.Shape[0], p.Elems() / max(p.Shape[0], 1)}
}

// NewStack makes the stack of parts, in order: [N1,K] and [N2,K] become
// [N1+N2,K], vectors of one dimension are joined end to end. Parts must agree
// in Role, F32, Exact and in every dimension but the first.
func NewStack(parts ...*Param) (*Param, error) {
	if len(parts) == 0 {
		return nil, Errorf("stack", Invalid, "no parameters")
	}
	a := parts[0]
	s := &Param{Role: a.Role, F32: a.F32, Exact: a.Exact, Shape: slices.Clone(a.Shape)}
	if len(a.Shape) > 0 {
		s.Shape[0] = 0
	}
	for i, p := range parts {
		if len(p.Shape) == 0 || p.Role != a.Role || p.F32 != a.F32 || p.Exact != a.Exact || !slices.Equal(p.Shape[1:], a.Shape[1:]) {
			return nil, Errorf("stack", Invalid, "part %d %s does not fit part 0 %s", i, ShapeString(p.Shape), ShapeString(a.Shape))
		}
		p.Stack, p.Row = s, s.Shape[0]
		s.Shape[0] += p.Shape[0]
	}
	return s, nil
}

// Matrix is the weight with its bias (nil: none) as ops take it; exact picks the
// F32 copy where there is one.
func (p *Param) Matrix(bias *Param, exact bool) Matrix {
	m := Matrix{W: p.T, Packed: p.Pack}
	if exact && p.T32 != nil {
		m.W, m.Packed = p.T32, p.Pack32
	}
	if bias != nil {
		m.Bias = bias.T
	}
	return m
}

// Free releases the device memory; of a part, that of its whole stack.
func (p *Param) Free() error {
	if p.Stack != nil {
		p.T = nil
		return p.Stack.Free()
	}
	var err error
	for _, k := range []Packed{p.Pack, p.Pack32} {
		if k != nil {
			err = errors.Join(err, k.Free())
		}
	}
	for _, t := range []*Tensor{p.T, p.T32} {
		if t != nil && t.Buf != nil {
			err = errors.Join(err, t.Buf.Free())
		}
	}
	p.T, p.T32, p.Pack, p.Pack32 = nil, nil, nil, nil
	return err
}

// Params lists the parameters of a model: the fields of type *Param of a struct
// and its nested structs, pointers and slices that carry a tag `param:"key"`,
// keys joined by dots, slice elements by their index. An embedded struct or a
// tag "" adds nothing to the key; a nil pointer is an absent option. Reading
// the struct is reading the checkpoint's keys.
func Params(model any) []NamedParam {
	var out []NamedParam
	walk(reflect.ValueOf(model), "", &out)
	return out
}

var paramType = reflect.TypeOf((*Param)(nil))

func walk(v reflect.Value, prefix string, out *[]NamedParam) {
	if v.Type() == paramType {
		if !v.IsNil() {
			*out = append(*out, NamedParam{strings.TrimSuffix(prefix, "."), v.Interface().(*Param)})
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			walk(v.Elem(), prefix, out)
		}
	case reflect.Slice:
		for i := 0; i < v.Len(); i++ {
			walk(v.Index(i), fmt.Sprintf("%s%d.", prefix, i), out)
		}
	case reflect.Struct:
		for i := 0; i < v.NumField(); i++ {
			f := v.Type().Field(i)
			tag, ok := f.Tag.Lookup("param")
			if !ok && !f.Anonymous || !f.IsExported() {
				continue
			}
			p := prefix
			if tag != "" {
				p += tag + "."
			}
			walk(v.Field(i), p, out)
		}
	}
}
