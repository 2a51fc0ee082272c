package checkpoint

import (
	"errors"
	"fmt"
)

// Limits of a pickle. Every opcode makes at most one small value, so together
// they bound memory; real checkpoints stay below a tenth of them.
const (
	maxPickle  = 64 << 20 // bytes
	maxOps     = 4 << 20
	maxCopied  = 32 << 20 // bytes copied by calls, whose arguments may be shared
	maxLongInt = 8        // bytes of an integer
)

// The values a pickle can make, beside nil, bool, int64, float64 and string:
// []byte, tuple, *list, *dict, global, *object, *storageRef and *tensorRef.
// There is no other: loading a pickle builds data and runs nothing.
type (
	tuple []any
	list  struct{ items []any }
	// dict keeps the order of insertion, as Python's does.
	dict struct {
		keys, vals []any
		index      map[any]int // of the keys that can be compared
	}
	// global is the name of a Python class or function.
	global struct{ module, name string }
	// object stands for an instance of a class that is not interpreted; state
	// holds its attributes if it has any (argparse.Namespace).
	object struct {
		class global
		state *dict
	}
	storageRef struct {
		dtype DType
		key   string
		elems int64
	}
	tensorRef struct {
		storage       *storageRef
		dtype         DType
		offset        int64 // in elements
		shape, stride []int64
	}
)

func (g global) String() string { return g.module + "." + g.name }

func hashable(k any) bool {
	switch k.(type) {
	case string, int64, bool, float64, nil, global:
		return true
	}
	return false
}

func (d *dict) set(k, v any) {
	if hashable(k) {
		if i, ok := d.index[k]; ok {
			d.vals[i] = v
			return
		}
		if d.index == nil {
			d.index = map[any]int{}
		}
		d.index[k] = len(d.keys)
	}
	d.keys = append(d.keys, k)
	d.vals = append(d.vals, v)
}

func (d *dict) get(k string) (any, bool) {
	if d == nil {
		return nil, false
	}
	i, ok := d.index[k]
	if !ok {
		return nil, false
	}
	return d.vals[i], true
}

type mark struct{}

// unpickler is a stack machine for the opcodes of protocols 2 to 5 that
// torch.save emits.
type unpickler struct {
	in    []byte
	pos   int
	stack []any
	memo  map[uint32]any // sparse: a pickle may name any index

	copied int // see maxCopied
}

var errPickleEnd = errors.New("ends in the middle")

// unpickle loads one pickle. Errors name the byte they arose at.
func unpickle(in []byte) (any, error) {
	if len(in) > maxPickle {
		return nil, fmt.Errorf("the pickle has %d bytes, the limit is %d", len(in), maxPickle)
	}
	u := &unpickler{in: in, memo: map[uint32]any{}}
	for ops := 0; ; ops++ {
		if ops == maxOps {
			return nil, fmt.Errorf("more than %d pickle operations", maxOps)
		}
		at := u.pos
		op, err := u.byte()
		if err == nil && op == '.' {
			return u.pop()
		}
		if err == nil {
			err = u.step(op)
		}
		if err != nil {
			return nil, fmt.Errorf("pickle, byte %d: %w", at, err)
		}
	}
}

func (u *unpickler) byte() (byte, error) {
	if u.pos >= len(u.in) {
		return 0, errPickleEnd
	}
	u.pos++
	return u.in[u.pos-1], nil
}

func (u *unpickler) take(n uint64) ([]byte, error) {
	if n > uint64(len(u.in)-u.pos) {
		return nil, errPickleEnd
	}
	b := u.in[u.pos : u.pos+int(n)]
	u.pos += int(n)
	return b, nil
}

// uint reads a little-endian number of n bytes.
func (u *unpickler) uint(n uint64) (uint64, error) {
	b, err := u.take(n)
	v := uint64(0)
	for i := len(b) - 1; i >= 0; i-- {
		v = v<<8 | uint64(b[i])
	}
	return v, err
}

// counted reads a length of n bytes and that many bytes.
func (u *unpickler) counted(n uint64) ([]byte, error) {
	size, err := u.uint(n)
	if err != nil {
		return nil, err
	}
	return u.take(size)
}

func (u *unpickler) line() (string, error) {
	for i := u.pos; i < len(u.in); i++ {
		if u.in[i] == '\n' {
			s := string(u.in[u.pos:i])
			u.pos = i + 1
			return s, nil
		}
	}
	return "", errPickleEnd
}

func (u *unpickler) push(v any) error {
	u.stack = append(u.stack, v)
	return nil
}

func (u *unpickler) pop() (any, error) {
	v, err := u.top()
	if err == nil {
		u.stack = u.stack[:len(u.stack)-1]
	}
	return v, err
}

func (u *unpickler) top() (any, error) {
	if len(u.stack) == 0 {
		return nil, errors.New("stack underflow")
	}
	v := u.stack[len(u.stack)-1]
	if _, ok := v.(mark); ok {
		return nil, errors.New("a mark where a value was expected")
	}
	return v, nil
}

// popN takes the n topmost values.
func (u *unpickler) popN(n int) (tuple, error) {
	out := make(tuple, n)
	for i := n - 1; i >= 0; i-- {
		v, err := u.pop()
		if err != nil {
			return nil, err
		}
		out[i] = v
	}
	return out, nil
}

// popMark takes the values above the last mark, and the mark.
func (u *unpickler) popMark() (tuple, error) {
	for i := len(u.stack) - 1; i >= 0; i-- {
		if _, ok := u.stack[i].(mark); ok {
			out := append(tuple(nil), u.stack[i+1:]...)
			u.stack = u.stack[:i]
			return out, nil
		}
	}
	return nil, errors.New("no mark on the stack")
}

func (u *unpickler) step(op byte) error {
	switch op {
	case 0x80: // PROTO
		v, err := u.byte()
		if err == nil && (v < 2 || v > 5) {
			err = fmt.Errorf("protocol %d, only 2 to 5 are read", v)
		}
		return err
	case 0x95: // FRAME: a hint about buffering
		_, err := u.take(8)
		return err
	case '(':
		return u.push(mark{})
	case '0': // POP
		_, err := u.pop()
		return err
	case '1': // POP_MARK
		_, err := u.popMark()
		return err
	case '2': // DUP
		v, err := u.top()
		if err != nil {
			return err
		}
		return u.push(v)
	case 'c': // GLOBAL
		module, err := u.line()
		if err != nil {
			return err
		}
		name, err := u.line()
		if err != nil {
			return err
		}
		return u.global(module, name)
	case 0x93: // STACK_GLOBAL
		v, err := u.popN(2)
		if err != nil {
			return err
		}
		module, ok := v[0].(string)
		name, ok2 := v[1].(string)
		if !ok || !ok2 {
			return errors.New("STACK_GLOBAL needs two strings")
		}
		return u.global(module, name)
	case 'R', 0x81: // REDUCE, NEWOBJ
		v, err := u.popN(2)
		if err != nil {
			return err
		}
		return u.call(v[0], v[1])
	case 0x92: // NEWOBJ_EX: class, args, keyword args
		v, err := u.popN(3)
		if err != nil {
			return err
		}
		return u.call(v[0], v[1])
	case 'b': // BUILD
		state, err := u.pop()
		if err != nil {
			return err
		}
		obj, err := u.top()
		if err != nil {
			return err
		}
		return build(obj, state)
	case 'Q': // BINPERSID
		id, err := u.pop()
		if err != nil {
			return err
		}
		s, err := persistent(id)
		if err != nil {
			return err
		}
		return u.push(s)
	case 'q', 'r', 0x94, 'h', 'j':
		return u.memoize(op)
	}
	if handled, err := u.scalar(op); handled || err != nil {
		return err
	}
	return u.container(op)
}

func (u *unpickler) memoize(op byte) error {
	width := uint64(1)
	if op == 'r' || op == 'j' {
		width = 4
	}
	i := uint64(len(u.memo)) // MEMOIZE numbers in order
	if op != 0x94 {
		var err error
		if i, err = u.uint(width); err != nil {
			return err
		}
	}
	if op == 'h' || op == 'j' { // BINGET, LONG_BINGET
		v, ok := u.memo[uint32(i)]
		if !ok {
			return fmt.Errorf("nothing was memoized as %d", i)
		}
		return u.push(v)
	}
	v, err := u.top() // BINPUT, LONG_BINPUT, MEMOIZE
	if err != nil {
		return err
	}
	u.memo[uint32(i)] = v
	return nil
}
