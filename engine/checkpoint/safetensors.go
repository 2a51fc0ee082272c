package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"
)

// Limits on a safetensors header. The size is the reference implementation's.
const (
	maxHeader  = 100_000_000
	maxTensors = 1 << 20
	maxRank    = 16
)

// openSafetensors reads the header: 8 bytes of length, then JSON that maps each
// name to {dtype, shape, data_offsets}, and __metadata__ to text. The data must
// be covered exactly: no overlap, no hole, no rest.
// Format: https://github.com/huggingface/safetensors#format
func openSafetensors(r *region, path string) (*File, error) {
	var b [8]byte
	if n, err := r.ReadAt(b[:], 0); n < 8 {
		return nil, badFile(path, "safetensors: %w", err)
	}
	n := le.Uint64(b[:])
	switch {
	case n > maxHeader:
		return nil, badFile(path, "safetensors: the header claims %d bytes, the limit is %d", n, maxHeader)
	case int64(n) > r.size-8:
		return nil, badFile(path, "safetensors: truncated: the header claims %d bytes, the file has %d", n, r.size)
	}
	head := make([]byte, n)
	if got, err := r.ReadAt(head, 8); got < len(head) {
		return nil, badFile(path, "safetensors: %w", err)
	}
	f := &File{path: path, format: "safetensors", region: r, tensors: map[string]*tensor{}, meta: map[string]string{}}
	if err := f.parseHeader(head); err != nil {
		return nil, badFile(path, "safetensors header: %w", err)
	}
	if err := f.checkLayout(8+int64(n), r.size); err != nil {
		return nil, badFile(path, "safetensors: %w", err)
	}
	return f, nil
}

// headerReader walks JSON token by token, which keeps duplicate keys visible
// and rejects whatever is not expected as soon as it appears.
type headerReader struct{ *json.Decoder }

func (f *File) parseHeader(head []byte) error {
	if !utf8.Valid(head) {
		return errors.New("not UTF-8")
	}
	h := headerReader{json.NewDecoder(bytes.NewReader(head))}
	h.UseNumber()
	err := h.object(func(name string) error {
		if name == "__metadata__" {
			return h.object(func(key string) error {
				s, err := h.text()
				f.meta[key] = s
				return err
			})
		}
		if len(f.tensors) == maxTensors {
			return fmt.Errorf("more than %d tensors", maxTensors)
		}
		t, err := h.tensor(name)
		if err != nil {
			return fmt.Errorf("tensor %s: %w", quote(name), err)
		}
		f.tensors[name] = t
		return nil
	})
	if err != nil {
		return err
	}
	if _, err := h.Token(); err != io.EOF {
		return errors.New("text after the end")
	}
	return nil
}

// object reads {"key": value, …}; value reads each value. Keys are unique.
func (h headerReader) object(value func(key string) error) error {
	if err := h.delim('{'); err != nil {
		return err
	}
	seen := map[string]bool{}
	for h.More() {
		key, err := h.text()
		if err != nil {
			return err
		}
		if seen[key] {
			return fmt.Errorf("duplicate key %s", quote(key))
		}
		seen[key] = true
		if err := value(key); err != nil {
			return err
		}
	}
	return h.delim('}')
}

func (h headerReader) delim(d json.Delim) error {
	t, err := h.next()
	if err == nil && t != d {
		err = fmt.Errorf("%s where %q was expected, at byte %d", tokenText(t), rune(d), h.InputOffset())
	}
	return err
}

func (h headerReader) text() (string, error) {
	t, err := h.next()
	if err != nil {
		return "", err
	}
	s, ok := t.(string)
	if !ok {
		return "", fmt.Errorf("%s where a string was expected, at byte %d", tokenText(t), h.InputOffset())
	}
	return s, nil
}

func (h headerReader) next() (json.Token, error) {
	t, err := h.Token()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return t, err
}

func tokenText(t json.Token) string {
	if s, ok := t.(string); ok {
		return "the string " + quote(s)
	}
	return fmt.Sprint(t)
}

// numbers reads an array of non-negative integers.
func (h headerReader) numbers(most int) ([]int64, error) {
	if err := h.delim('['); err != nil {
		return nil, err
	}
	var out []int64
	for h.More() {
		t, err := h.next()
		if err != nil {
			return nil, err
		}
		n, ok := t.(json.Number)
		if !ok {
			return nil, fmt.Errorf("%s where a number was expected", tokenText(t))
		}
		v, err := strconv.ParseInt(n.String(), 10, 64)
		if err != nil || v < 0 {
			return nil, fmt.Errorf("%s is not a size", quote(n.String()))
		}
		if len(out) == most {
			return nil, fmt.Errorf("more than %d numbers in an array", most)
		}
		out = append(out, v)
	}
	return out, h.delim(']')
}

func (h headerReader) tensor(name string) (*tensor, error) {
	var dtype string
	var shape, offsets []int64
	have := map[string]bool{}
	err := h.object(func(key string) (err error) {
		have[key] = true
		switch key {
		case "dtype":
			dtype, err = h.text()
		case "shape":
			shape, err = h.numbers(maxRank)
		case "data_offsets":
			offsets, err = h.numbers(2)
		default:
			err = fmt.Errorf("unknown field %s", quote(key))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, key := range []string{"dtype", "shape", "data_offsets"} {
		if !have[key] {
			return nil, fmt.Errorf("no %s", key)
		}
	}
	size := DType(dtype).Size()
	if size == 0 {
		return nil, fmt.Errorf("unknown dtype %s", quote(dtype))
	}
	if len(offsets) != 2 || offsets[0] > offsets[1] {
		return nil, fmt.Errorf("data_offsets %v are not [begin, end]", offsets)
	}
	elems, ok := product(shape)
	bytes, ok2 := mul(elems, size)
	if !ok || !ok2 {
		return nil, fmt.Errorf("shape %v is too large", shape)
	}
	if bytes != offsets[1]-offsets[0] {
		return nil, fmt.Errorf("%s of shape %v has %d bytes, data_offsets %v span %d", dtype, shape, bytes, offsets, offsets[1]-offsets[0])
	}
	return &tensor{Info: Info{Name: name, DType: DType(dtype), Shape: toInts(shape)}, off: offsets[0], span: bytes}, nil
}

// checkLayout verifies that the tensors tile the data and turns their offsets
// into file offsets.
func (f *File) checkLayout(base, size int64) error {
	data, end := size-base, int64(0)
	var prev *tensor
	for _, t := range sortedTensors(f.tensors) {
		switch {
		case t.off > data || t.span > data-t.off:
			return fmt.Errorf("truncated: tensor %s ends at byte %d of the data, which has %d", quote(t.Name), t.off+t.span, data)
		case t.off < end:
			return fmt.Errorf("tensors %s and %s overlap", quote(prev.Name), quote(t.Name))
		case t.off > end:
			return fmt.Errorf("bytes %d to %d of the data, before tensor %s, belong to no tensor", end, t.off, quote(t.Name))
		}
		end, prev = t.off+t.span, t
	}
	if end != data {
		return fmt.Errorf("the last %d bytes belong to no tensor", data-end)
	}
	for _, t := range f.tensors {
		t.off += base
	}
	return nil
}
