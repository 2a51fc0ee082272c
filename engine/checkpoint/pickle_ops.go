package checkpoint

import (
	"errors"
	"fmt"
	"math"
	"unicode/utf8"
)

// scalar handles the opcodes that push a number, text, bytes or constant.
func (u *unpickler) scalar(op byte) (handled bool, err error) {
	var b []byte
	var n uint64
	switch op {
	case 'N':
		return true, u.push(nil)
	case 0x88, 0x89: // NEWTRUE, NEWFALSE
		return true, u.push(op == 0x88)
	case 'J': // BININT
		if n, err = u.uint(4); err == nil {
			err = u.push(int64(int32(n)))
		}
	case 'K': // BININT1
		if n, err = u.uint(1); err == nil {
			err = u.push(int64(n))
		}
	case 'M': // BININT2
		if n, err = u.uint(2); err == nil {
			err = u.push(int64(n))
		}
	case 0x8a, 0x8b: // LONG1, LONG4
		if b, err = u.counted(map[byte]uint64{0x8a: 1, 0x8b: 4}[op]); err == nil {
			err = u.long(b)
		}
	case 'G': // BINFLOAT, big-endian
		if b, err = u.take(8); err == nil {
			bits := uint64(0)
			for _, c := range b {
				bits = bits<<8 | uint64(c)
			}
			err = u.push(math.Float64frombits(bits))
		}
	case 'X', 0x8c, 0x8d: // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
		if b, err = u.counted(map[byte]uint64{'X': 4, 0x8c: 1, 0x8d: 8}[op]); err == nil {
			if !utf8.Valid(b) { // surrogates; no key or setting of ours has them
				return true, errors.New("text that is not UTF-8")
			}
			err = u.push(string(b))
		}
	case 'T', 'U': // BINSTRING, SHORT_BINSTRING: Python 2 text
		if b, err = u.counted(map[byte]uint64{'T': 4, 'U': 1}[op]); err == nil {
			err = u.push(string(b))
		}
	case 'B', 'C', 0x8e, 0x96: // BINBYTES, SHORT_BINBYTES, BINBYTES8, BYTEARRAY8
		if b, err = u.counted(map[byte]uint64{'B': 4, 'C': 1, 0x8e: 8, 0x96: 8}[op]); err == nil {
			err = u.push(b)
		}
	default:
		return false, nil
	}
	return true, err
}

// long pushes a two's complement little-endian integer.
func (u *unpickler) long(b []byte) error {
	if len(b) > maxLongInt {
		return fmt.Errorf("an integer of %d bytes", len(b))
	}
	v := uint64(0)
	for i := len(b) - 1; i >= 0; i-- {
		v = v<<8 | uint64(b[i])
	}
	if n := len(b); n > 0 && n < 8 && b[n-1]&0x80 != 0 {
		v |= ^uint64(0) << (8 * n)
	}
	return u.push(int64(v))
}

// container handles the opcodes that make or fill tuples, lists, dicts, sets.
func (u *unpickler) container(op byte) error {
	switch op {
	case ')':
		return u.push(tuple{})
	case ']', 0x8f: // EMPTY_LIST, EMPTY_SET
		return u.push(&list{})
	case '}':
		return u.push(&dict{})
	case 0x85, 0x86, 0x87: // TUPLE1 to TUPLE3
		t, err := u.popN(int(op) - 0x84)
		if err != nil {
			return err
		}
		return u.push(t)
	case 't', 'l', 'd', 0x91, 'e', 'u', 0x90: // those that end at a mark
		items, err := u.popMark()
		if err != nil {
			return err
		}
		switch op {
		case 't':
			return u.push(items)
		case 'l', 0x91: // LIST, FROZENSET
			return u.push(&list{items})
		case 'd':
			if err := u.push(&dict{}); err != nil {
				return err
			}
			return u.setItems(items)
		case 'u':
			return u.setItems(items)
		}
		return u.appendItems(items) // APPENDS, ADDITEMS
	case 's', 'a': // SETITEM, APPEND
		n := 1
		if op == 's' {
			n = 2
		}
		items, err := u.popN(n)
		if err != nil {
			return err
		}
		if op == 's' {
			return u.setItems(items)
		}
		return u.appendItems(items)
	}
	return fmt.Errorf("opcode 0x%02x is not supported", op)
}

func (u *unpickler) setItems(items tuple) error {
	v, err := u.top()
	if err != nil {
		return err
	}
	if len(items)%2 != 0 {
		return errors.New("a key without a value")
	}
	switch d := v.(type) {
	case *dict:
		for i := 0; i < len(items); i += 2 {
			d.set(items[i], items[i+1])
		}
		return nil
	case *object: // a class derived from dict; its contents are not interpreted
		return nil
	}
	return fmt.Errorf("items set on %s", kindOf(v))
}

func (u *unpickler) appendItems(items tuple) error {
	v, err := u.top()
	if err != nil {
		return err
	}
	switch l := v.(type) {
	case *list:
		l.items = append(l.items, items...)
		return nil
	case *object:
		return nil
	}
	return fmt.Errorf("items appended to %s", kindOf(v))
}

func kindOf(v any) string {
	switch v := v.(type) {
	case nil:
		return "None"
	case *dict:
		return "a dict"
	case *list:
		return "a list"
	case tuple:
		return "a tuple"
	case *tensorRef:
		return "a tensor"
	case *storageRef:
		return "a storage"
	case *object:
		return "an object of class " + quote(v.class.String())
	case global:
		return "the name " + quote(v.String())
	}
	return fmt.Sprintf("a %T", v)
}
