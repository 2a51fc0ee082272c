package engine

import (
	"fmt"
	"math"
	"strings"
)

// Every args struct has a Check method that a device calls on entry: what it
// passes has the right dtypes and shapes, lies within its buffers and does not
// overlap where it must not. What only the device can see (the numbers in an
// index tensor) is not checked here.

// check collects the first complaint about the arguments of an op. The tensors
// are remembered so that an error can show all shapes.
type check struct {
	op  Op
	err error
	n   int
	t   [20]named
}

type named struct {
	name string
	t    *Tensor
}

// dtypes is a set of DType.
type dtypes uint8

const (
	onlyF32 dtypes = 1 << F32
	onlyI32 dtypes = 1 << I32
	floats  dtypes = 1<<F32 | 1<<BF16
	anyType dtypes = 1<<F32 | 1<<BF16 | 1<<I32
)

func (d dtypes) String() string {
	var s []string
	for i := F32; i <= I32; i++ {
		if d>>i&1 != 0 {
			s = append(s, i.String())
		}
	}
	return strings.Join(s, " or ")
}

func (c *check) fail(format string, args ...any) {
	if c.err != nil {
		return
	}
	var s []string
	for _, t := range c.t[:c.n] {
		if t.t != nil {
			s = append(s, t.name+" "+t.t.String())
		}
	}
	c.err = &Error{Op: string(c.op), Kind: Invalid, Shapes: strings.Join(s, ", "), Err: fmt.Errorf(format, args...)}
}

// tensor demands a tensor of one of the dtypes that lies within its buffer.
func (c *check) tensor(name string, t *Tensor, ok dtypes) {
	if t == nil {
		c.fail("%s is nil", name)
		return
	}
	c.optional(name, t, ok)
}

// optional is tensor, but nil is fine.
func (c *check) optional(name string, t *Tensor, ok dtypes) {
	if !c.form(name, t, ok) || t.Elems() == 0 {
		return
	}
	if t.Buf == nil {
		c.fail("%s has no buffer", name)
		return
	}
	if end := t.end(); t.Off < 0 || end > t.Buf.Bytes() {
		c.fail("%s takes bytes %d to %d of a buffer of %d", name, t.Off, end, t.Buf.Bytes())
	} else if t.Off%t.DType.Size() != 0 {
		c.fail("%s starts at byte %d, not a multiple of %d", name, t.Off, t.DType.Size())
	}
}

// weight is a tensor whose buffer may have been dropped after packing.
func (c *check) weight(name string, t *Tensor, p Packed) {
	if p != nil && t != nil && t.Buf == nil {
		c.form(name, t, floats)
		return
	}
	c.tensor(name, t, floats)
}

// form looks at dtype, shape and stride; false for nil or a complaint.
func (c *check) form(name string, t *Tensor, ok dtypes) bool {
	if t == nil || c.err != nil {
		return false
	}
	if c.n < len(c.t) {
		c.t[c.n] = named{name, t}
		c.n++
	}
	if t.DType > I32 || ok>>t.DType&1 == 0 {
		c.fail("%s is %v, want %v", name, t.DType, ok)
		return false
	}
	for _, s := range t.Shape {
		if s < 0 {
			c.fail("%s has a negative dimension", name)
			return false
		}
	}
	if t.RowStride < t.Cols() && t.Rows() > 1 {
		c.fail("%s has row stride %d for %d columns", name, t.RowStride, t.Cols())
		return false
	}
	return true
}

// list demands a contiguous tensor of n elements, whatever its shape; nil is fine.
func (c *check) list(name string, t *Tensor, ok dtypes, n int) {
	c.optional(name, t, ok)
	if t == nil || c.err != nil {
		return
	}
	if t.Elems() != n {
		c.fail("%s elements: %d, want %d", name, t.Elems(), n)
	}
	c.contiguous(name, t)
}

func (c *check) contiguous(name string, t *Tensor) {
	if c.err == nil && t != nil && !t.Contiguous() {
		c.fail("%s has gaps between its rows (row stride %d)", name, t.RowStride)
	}
}

// matrix demands a tensor whose matrix view is rows × cols; nil is fine.
func (c *check) matrix(name string, t *Tensor, rows, cols int) {
	if t != nil && c.err == nil && (t.Rows() != rows || t.Cols() != cols) {
		c.fail("%s is %d×%d, want %d×%d", name, t.Rows(), t.Cols(), rows, cols)
	}
}

// groups demands [G, cols] with enough rows for m rows, per at a time; nil is fine.
func (c *check) groups(name string, t *Tensor, perName string, per, m, cols int) {
	if t == nil || c.err != nil {
		return
	}
	if per < 1 {
		c.fail("%s is %d, want at least 1 with %s", perName, per, name)
		return
	}
	c.matrix(name, t, t.Rows(), cols)
	need := m / per
	if m%per > 0 {
		need++
	}
	if t.Rows() < need {
		c.fail("%s has %d rows, %d rows in groups of %d need %d", name, t.Rows(), m, per, need)
	}
}

func (c *check) eq(what string, got, want int) {
	if c.err == nil && got != want {
		c.fail("%s: %d, want %d", what, got, want)
	}
}

func (c *check) atLeast(what string, got, min int) {
	if c.err == nil && got < min {
		c.fail("%s: %d, want at least %d", what, got, min)
	}
}

func (c *check) finite(what string, v float64) {
	if c.err == nil && v-v != 0 {
		c.fail("%s is %v", what, v)
	}
}

func (c *check) act(a Activation) {
	if a > SiLU {
		c.fail("Act is %d, not an Activation", a)
	}
}

// rng demands a purpose and steps that fit the counter.
func (c *check) rng(r RNG, steps int) {
	if r.Purpose == 0 || r.Purpose > 255 {
		c.fail("RNG.Purpose is %d, want 1 to 255", r.Purpose)
	}
	if r.Step < 0 || r.Step > 1<<24-steps {
		c.fail("RNG.Step is %d for %d steps, want 0 to 2^24", r.Step, steps)
	}
}

// apart demands that y and t share no element; nil is fine.
func (c *check) apart(yName string, y *Tensor, name string, t *Tensor) {
	if c.err == nil && overlap(y, t) {
		c.fail("%s overlaps %s", yName, name)
	}
}

// sameOrApart demands that t is y itself or shares nothing with it.
func (c *check) sameOrApart(yName string, y *Tensor, name string, t *Tensor) {
	if t == nil || c.err != nil {
		return
	}
	same := y.Buf == t.Buf && y.Off == t.Off && y.DType == t.DType && (y.RowStride == t.RowStride || y.Rows() <= 1) &&
		y.Rows() == t.Rows() && y.Cols() == t.Cols()
	if !same {
		c.apart(yName, y, name, t)
	}
}

// overlap reports whether a and b share a byte. Two slices of columns of one
// wider tensor interleave and share none. Buffers are compared by identity.
func overlap(a, b *Tensor) bool {
	if a == nil || b == nil || a.Buf == nil || a.Buf != b.Buf || a.Elems() == 0 || b.Elems() == 0 {
		return false
	}
	if a.Off >= b.end() || b.Off >= a.end() {
		return false
	}
	sa, sb := a.DType.Size(), b.DType.Size()
	stride := a.RowStride * sa
	if a.Rows() <= 1 || b.Rows() <= 1 || stride != b.RowStride*sb {
		return true
	}
	// Columns of b, seen from the start of a row of a, in a ring of one stride.
	d := ((b.Off-a.Off)%stride + stride) % stride
	return d < a.Cols()*sa || d+b.Cols()*sb > stride
}

// end is the byte after the last element of a tensor that has one, or
// math.MaxInt where an int cannot hold that.
func (t *Tensor) end() int {
	sum := func(a, b int) int {
		if a > math.MaxInt-b {
			return math.MaxInt
		}
		return a + b
	}
	return sum(volume(sum(volume(t.Rows()-1, t.RowStride), t.Cols()), t.DType.Size()), max(t.Off, 0))
}
