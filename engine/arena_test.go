package engine

import (
	"errors"
	"math"
	"testing"
)

// heap is a Device that only has memory, limited, and counts it.
type heap struct {
	Device
	used, limit, allocs int
}

type block struct {
	h *heap
	n int
}

func (h *heap) Alloc(n int) (Buffer, error) {
	if h.used+n > h.limit {
		return nil, Errorf("alloc", OutOfMemory, "%d bytes", n)
	}
	h.used += n
	h.allocs++
	return &block{h, n}, nil
}

func (b *block) Bytes() int  { return b.n }
func (b *block) Free() error { b.h.used -= b.n; return nil }

// take allocates and checks that no two live pieces overlap.
func take(t *testing.T, a *Arena, n int) (Buffer, int) {
	t.Helper()
	b, off, err := a.Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	if off%256 != 0 || off+n > b.Bytes() {
		t.Fatalf("%d bytes at %d of %d", n, off, b.Bytes())
	}
	return b, off
}

func TestArena(t *testing.T) {
	h := &heap{limit: 100 << 20}
	a := NewArena(h)
	b1, o1 := take(t, a, 1000)
	m := a.Mark()
	b2, o2 := take(t, a, 1)
	if b1 != b2 || o2 != o1+1024 {
		t.Errorf("second piece at %d, want %d of the same chunk", o2, o1+1024)
	}
	big, _ := take(t, a, 5<<20) // does not fit the chunk
	if big == b1 {
		t.Error("5 MiB in a chunk of 4")
	}
	peak := a.Peak()
	if want := 1024 + 256 + 5<<20; peak != want {
		t.Errorf("peak %d, want %d", peak, want)
	}
	a.Release(m)
	if b, o := take(t, a, 1); b != b2 || o != o2 {
		t.Error("released memory is not used again")
	}
	if a.Peak() != peak {
		t.Error("peak fell")
	}
	if err := a.Reset(); err != nil {
		t.Fatal(err)
	}
	before := h.allocs
	for step := 0; step < 3; step++ { // the same needs again: one chunk, no allocation
		c1, _ := take(t, a, 1000)
		take(t, a, 1)
		if c2, _ := take(t, a, 5<<20); c1 != c2 {
			t.Error("the chunks were not joined")
		}
		if err := a.Reset(); err != nil {
			t.Fatal(err)
		}
	}
	if h.allocs != before {
		t.Errorf("%d allocations in later steps", h.allocs-before)
	}
	if err := a.Close(); err != nil || h.used != 0 {
		t.Errorf("closed with %d bytes in use: %v", h.used, err)
	}
}

func TestArenaReserve(t *testing.T) {
	h := &heap{limit: 100 << 20}
	a := NewArena(h)
	if err := a.Reserve(30 << 20); err != nil {
		t.Fatal(err)
	}
	take(t, a, 29<<20)
	if h.allocs != 1 {
		t.Errorf("%d allocations", h.allocs)
	}
	if err := a.Reserve(1); !errors.Is(err, Internal) {
		t.Errorf("reserve while in use: %v", err)
	}
	if err := a.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := a.Reserve(10 << 20); err != nil || h.allocs != 1 {
		t.Errorf("reserving less allocates: %v", err)
	}
	if _, _, err := a.Alloc(-1); !errors.Is(err, Invalid) {
		t.Errorf("negative: %v", err)
	}
	if _, _, err := a.Alloc(math.MaxInt - 1); !errors.Is(err, OutOfMemory) {
		t.Errorf("far too much: %v", err)
	}
	if _, _, err := a.Alloc(101 << 20); !errors.Is(err, OutOfMemory) {
		t.Errorf("too much: %v", err)
	}
	take(t, a, 10) // still usable
}
