package checkpoint

import (
	"fmt"
	"slices"
	"sort"
	"strings"

	"margo/engine"
)

// ParamSpec is a tensor that a model needs: its key and exact shape.
type ParamSpec struct {
	Name  string
	Shape []int
}

// Elems is the number of elements.
func (p ParamSpec) Elems() int64 {
	n := int64(1)
	for _, s := range p.Shape {
		n *= int64(s)
	}
	return n
}

// CountParams sums the elements of the parameters whose names begin with
// prefix; "" counts all.
func CountParams(specs []ParamSpec, prefix string) int64 {
	n := int64(0)
	for _, p := range specs {
		if strings.HasPrefix(p.Name, prefix) {
			n += p.Elems()
		}
	}
	return n
}

// Check compares a file with the parameters of a model. A tensor that is
// missing, unexpected, of another shape or not floating-point makes an error
// that names it. Unexpected tensors for which ignore is true are passed over
// and returned, sorted; ignore may be nil.
func Check(f *File, specs []ParamSpec, ignore func(name string) bool) (ignored []string, err error) {
	var problems []string
	want := make(map[string]bool, len(specs))
	for _, p := range specs {
		want[p.Name] = true
		info, ok := f.Tensor(p.Name)
		switch {
		case !ok:
			problems = append(problems, "missing "+quote(f.stored(p.Name))+" "+engine.ShapeString(p.Shape))
		case !slices.Equal(info.Shape, p.Shape):
			problems = append(problems, fmt.Sprintf("%s has shape %s instead of %s", quote(f.stored(p.Name)), engine.ShapeString(info.Shape), engine.ShapeString(p.Shape)))
		case !info.DType.Float():
			problems = append(problems, fmt.Sprintf("%s is %s instead of floating-point", quote(f.stored(p.Name)), info.DType))
		}
	}
	for _, name := range f.Names() {
		if want[name] {
			continue
		}
		if ignore != nil && ignore(name) {
			ignored = append(ignored, name)
			continue
		}
		info, _ := f.Tensor(name)
		problems = append(problems, "unexpected "+quote(name)+" "+engine.ShapeString(info.Shape))
	}
	if len(problems) == 0 {
		return ignored, nil
	}
	n := len(problems)
	sort.Strings(problems)
	if n > 8 {
		problems = append(problems[:8], fmt.Sprintf("and %d more", n-8))
	}
	return nil, engine.Errorf("check "+f.path, engine.IO, "the tensors are not those of the model (%d of %d): %s", n, len(specs), strings.Join(problems, "; "))
}

// builder collects the parameters of a model in the order of its definition.
type builder struct{ out []ParamSpec }

func (b *builder) add(name string, shape ...int) { b.out = append(b.out, ParamSpec{name, shape}) }

func (b *builder) linear(name string, out, in int) {
	b.add(name+".weight", out, in)
	b.add(name+".bias", out)
}

func (b *builder) norm(name string, n int) {
	b.add(name+".weight", n)
	b.add(name+".bias", n)
}

func (b *builder) conv(name string, out, in, k int) {
	b.add(name+".weight", out, in, k, k)
	b.add(name+".bias", out)
}
