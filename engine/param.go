package engine

import (
	"fmt"
	"reflect"
	"strings"
)

// Role says how a parameter is used, which decides how it is stored.
type Role uint8

const (
	Vector Role = iota // bias, norm, embedding table: F32, read directly
	Weight             // GEMM or convolution weight: compute dtype, packed
)

// Param is one trained tensor. Shape is that of the checkpoint. T is its value
// on the device; for a packed Weight, T.Buf may have been dropped while T's
// shape and dtype stay valid.
type Param struct {
	Shape []int
	Role  Role
	F32   bool // keep F32 whatever the compute dtype
	T     *Tensor
	Pack  Packed
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

// Free releases the device memory.
func (p *Param) Free() error {
	var err error
	if p.Pack != nil {
		err = p.Pack.Free()
		p.Pack = nil
	}
	if p.T != nil && p.T.Buf != nil {
		if e := p.T.Buf.Free(); err == nil {
			err = e
		}
	}
	p.T = nil
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
