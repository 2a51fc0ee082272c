package checkpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"margo/engine"
	"margo/engine/atomicfile"
)

// Entry is a tensor to be written. Write must write exactly the bytes of the
// shape and dtype, row-major and little-endian.
type Entry struct {
	Info
	Write func(w io.Writer) error
}

// Save writes a safetensors file: wider dtypes first, then by name, the header
// padded to 8 bytes, so that every tensor is aligned and equal contents give
// equal bytes. The file appears at path complete and synced, or not at all
// (package atomicfile): an error that is atomicfile.ErrWrite is one of writing,
// any other comes from an entry's Write.
func Save(ctx context.Context, path string, entries []Entry, meta map[string]string) error {
	op := "write " + path
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b Entry) int {
		if d := b.DType.Size() - a.DType.Size(); d != 0 {
			return int(d)
		}
		return strings.Compare(a.Name, b.Name)
	})
	head, err := header(entries, meta)
	if err != nil {
		return &engine.Error{Op: op, Kind: engine.Invalid, Err: err}
	}
	err = atomicfile.Write(ctx, path, func(w io.Writer) error {
		if _, err := w.Write(head); err != nil {
			return err
		}
		for _, e := range entries {
			cw := &countWriter{w: w}
			if err := e.Write(cw); err != nil {
				return err
			}
			if cw.n != e.Bytes() {
				return engine.Errorf(op, engine.Internal, "tensor %s wrote %d bytes instead of %d", quote(e.Name), cw.n, e.Bytes())
			}
		}
		return nil
	})
	var ee *engine.Error
	if err == nil || errors.As(err, &ee) {
		return err
	}
	return &engine.Error{Op: op, Kind: engine.IO, Err: err}
}

// header is the length and JSON for entries in file order.
func header(entries []Entry, meta map[string]string) ([]byte, error) {
	var b bytes.Buffer
	b.Write(make([]byte, 8))
	sep := "{"
	if len(meta) > 0 {
		m, err := json.Marshal(meta) // keys come out sorted
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, `{"__metadata__":%s`, m)
		sep = ","
	}
	off := int64(0)
	seen := map[string]bool{}
	for _, e := range entries {
		if e.DType.Size() == 0 || e.Name == "" || e.Name == "__metadata__" {
			return nil, fmt.Errorf("tensor %s of dtype %s cannot be written", quote(e.Name), e.DType)
		}
		if seen[e.Name] {
			return nil, fmt.Errorf("two tensors are named %s", quote(e.Name))
		}
		seen[e.Name] = true
		name, err := json.Marshal(e.Name)
		if err != nil {
			return nil, err
		}
		shape := e.Shape
		if shape == nil {
			shape = []int{}
		}
		dims, err := json.Marshal(shape)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, `%s%s:{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]}`, sep, name, e.DType, dims, off, off+e.Bytes())
		off += e.Bytes()
		sep = ","
	}
	if sep == "{" {
		b.WriteString("{")
	}
	b.WriteString("}")
	for b.Len()%8 != 0 {
		b.WriteByte(' ')
	}
	if b.Len()-8 > maxHeader {
		return nil, fmt.Errorf("the header would have %d bytes, the limit is %d", b.Len()-8, maxHeader)
	}
	le.PutUint64(b.Bytes(), uint64(b.Len()-8))
	return b.Bytes(), nil
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
