package cuda

import (
	"encoding/binary"
	"strings"
	"testing"

	"margo/engine"
)

// TestIndexOutOfRange: an index that only the device can see to be wrong is
// reported by the next wait, once, and writes nothing.
func TestIndexOutOfRange(t *testing.T) {
	d := testDevice(t)
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tensor := func(dt engine.DType, words []uint32, shape ...int) *engine.Tensor {
		b := make([]byte, 0, 4*len(words))
		for _, w := range words {
			b = binary.LittleEndian.AppendUint32(b, w)
		}
		return upload(t, d, s, dt, b, shape...)
	}
	zeros := func(rows, cols int) *engine.Tensor { return tensor(engine.F32, make([]uint32, rows*cols), rows, cols) }
	bad := -1 // as a table entry: 2^32-1

	y := zeros(3, 4)
	ones := tensor(engine.F32, []uint32{0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000}, 2, 4)
	cases := []struct {
		name, want string
		run        func() error
	}{
		{"rows", "row 1 of rows", func() error {
			return s.Rows(engine.RowsArgs{Y: y, A: ones, IY: tensor(engine.I32, []uint32{2, 3}, 2), Count: 2})
		}},
		{"one query", "sequence 1", func() error {
			off := []int32{0, 1, 2}
			return s.Attention(engine.AttentionArgs{Q: zeros(2, 8), K: zeros(4, 8), V: zeros(4, 8), O: zeros(2, 8), Heads: 1, Scale: 1,
				QOff: tensor(engine.I32, []uint32{0, 1, 2}, 3), KOff: tensor(engine.I32, []uint32{0, 1, 2}, 3), QOffHost: off, KOffHost: off,
				Blocks: tensor(engine.I32, []uint32{0, uint32(bad)}, 2, 1), BlockSize: 2})
		}},
		{"queries", "sequence 0", func() error {
			off := []int32{0, 3}
			return s.Attention(engine.AttentionArgs{Q: zeros(3, 8), K: zeros(4, 8), V: zeros(4, 8), O: zeros(3, 8), Heads: 1, Scale: 1,
				QOff: tensor(engine.I32, []uint32{0, 3}, 2), KOff: tensor(engine.I32, []uint32{0, 3}, 2), QOffHost: off, KOffHost: off,
				Blocks: tensor(engine.I32, []uint32{0, 2}, 1, 2), BlockSize: 2})
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if err := c.run(); err != nil {
				t.Fatalf("enqueuing: %v", err)
			}
			if err := s.Sync(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("sync: %v, want an error that names %q", err, c.want)
			}
			if err := s.Sync(); err != nil {
				t.Errorf("the error came twice: %v", err)
			}
		})
	}
	got := make([]byte, 48)
	if err := s.CopyOut(got, y); err != nil {
		t.Fatal(err)
	}
	for r, want := range []uint32{0, 0, 0x3f800000} {
		if w := binary.LittleEndian.Uint32(got[16*r:]); w != want {
			t.Errorf("row %d of Y begins with %#x, want %#x", r, w, want)
		}
	}
}
