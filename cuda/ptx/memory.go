package ptx

import (
	"encoding/binary"
	"fmt"
	"math"
	"sort"
)

// Windows of the generic address space.
const (
	globalBase = 0x7f0000000000
	sharedBase = 0x600000000000
	localBase  = 0x500000000000
	paramBase  = 0x400000000000
)

// Memory is global memory: buffers with unused addresses between them.
type Memory struct {
	buffers []buffer
	next    uint64
}

type buffer struct {
	base uint64
	data []byte
}

// Alloc gives the address of n new bytes 0xff, a multiple of 256.
func (m *Memory) Alloc(n int) uint64 {
	if m.next == 0 {
		m.next = globalBase
	}
	b := buffer{m.next, make([]byte, n)}
	for i := range b.data {
		b.data[i] = 0xff
	}
	m.buffers = append(m.buffers, b)
	m.next += uint64(n+255)/256*256 + 4096
	return b.base
}

// Bytes gives the n bytes at an address, which must lie in one buffer.
func (m *Memory) Bytes(at uint64, n int) ([]byte, error) {
	i := sort.Search(len(m.buffers), func(i int) bool { return m.buffers[i].base > at }) - 1
	if i >= 0 {
		if off := at - m.buffers[i].base; off+uint64(n) <= uint64(len(m.buffers[i].data)) {
			return m.buffers[i].data[off : off+uint64(n)], nil
		}
	}
	return nil, fmt.Errorf("global address %#x (%d bytes) is outside every buffer", at, n)
}

// F32 allocates a buffer of float32.
func (m *Memory) F32(v []float32) uint64 {
	at := m.Alloc(4 * len(v))
	b, _ := m.Bytes(at, 4*len(v))
	for i, x := range v {
		binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(x))
	}
	return at
}

// U32 allocates a buffer of uint32.
func (m *Memory) U32(v []uint32) uint64 {
	at := m.Alloc(4 * len(v))
	b, _ := m.Bytes(at, 4*len(v))
	for i, x := range v {
		binary.LittleEndian.PutUint32(b[4*i:], x)
	}
	return at
}

// ReadU32 reads n words.
func (m *Memory) ReadU32(at uint64, n int) ([]uint32, error) {
	b, err := m.Bytes(at, 4*n)
	if err != nil {
		return nil, err
	}
	v := make([]uint32, n)
	for i := range v {
		v[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return v, nil
}

// ReadF32 reads n float32.
func (m *Memory) ReadF32(at uint64, n int) ([]float32, error) {
	u, err := m.ReadU32(at, n)
	v := make([]float32, len(u))
	for i, x := range u {
		v[i] = math.Float32frombits(x)
	}
	return v, err
}

// at finds n bytes of a space ("" is generic) as a lane sees it; n is also the alignment.
func (w *warp) at(space string, addr uint64, n, align, lane int) ([]byte, error) {
	if addr%uint64(align) != 0 {
		return nil, fmt.Errorf("%s address %#x is no multiple of %d", space, addr, align)
	}
	if space == "" {
		switch {
		case addr >= globalBase:
			space = "global"
		case addr >= sharedBase:
			space, addr = "shared", addr-sharedBase
		case addr >= localBase:
			space, addr = "local", addr-localBase
		case addr >= paramBase:
			space, addr = "param", addr-paramBase
		default:
			return nil, fmt.Errorf("generic address %#x points nowhere", addr)
		}
	}
	mem := []byte(nil)
	switch space {
	case "global":
		return w.block.grid.mem.Bytes(addr, n)
	case "shared":
		mem = w.block.static
		addr &= 1<<32 - 1
		if err := w.block.touch(addr, n, false, 0); err != nil {
			return nil, err
		}
		if d := w.block.grid.k.dynamic; addr >= d {
			mem, addr = w.block.dynamic, addr-d
		}
	case "local":
		mem = w.local[lane]
	case "param":
		mem = w.block.grid.params
	default:
		return nil, fmt.Errorf("unknown space %s", space)
	}
	if addr+uint64(n) > uint64(len(mem)) || addr+uint64(n) < addr {
		return nil, fmt.Errorf("%s address %#x (%d bytes) is outside its %d bytes", space, addr, n, len(mem))
	}
	return mem[addr : addr+uint64(n)], nil
}

// wrote tells the block of a write that at has allowed.
func (w *warp) wrote(space string, addr uint64, n, lane int) error {
	if space == "shared" || space == "" && addr >= sharedBase && addr < globalBase {
		return w.block.touch(addr&(1<<32-1), n, true, w.block.thread(w, lane))
	}
	return nil
}

func load(b []byte) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(b))
	case 4:
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(b)
}

func store(b []byte, v uint64) {
	switch len(b) {
	case 1:
		b[0] = byte(v)
	case 2:
		binary.LittleEndian.PutUint16(b, uint16(v))
	case 4:
		binary.LittleEndian.PutUint32(b, uint32(v))
	default:
		binary.LittleEndian.PutUint64(b, v)
	}
}
