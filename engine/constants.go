package engine

import (
	"bytes"
	"hash/maphash"
)

// Constants are the numbers that a run takes from the host while it runs: rows, positions,
// masks, timesteps, guidance. All are known beforehand. A dry run of the same code with
// Ctx.Constants set to new ones records them, equal lists once; Load then copies them to
// a device in one piece, and a run with Ctx.Constants set to loaded ones takes them from
// there, in the order in which they were recorded. What the run asks for is compared with
// what was recorded: from the first difference on it is copied as it comes.
//
// Tensors that Ctx.F32 and Ctx.I32 return are then shared: kernels must not write them. The
// device's memory must be bytes in host order, which the oracle's is not.
type Constants struct {
	data   []byte
	seed   maphash.Seed
	known  map[uint64][]span // by hash
	asked  []span
	buffer *Tensor // where data lies on a device; nil while it is recorded
	next   int     // of asked
}

type span struct{ at, n int }

// NewConstants begins a recording.
func NewConstants() *Constants {
	return &Constants{seed: maphash.MakeSeed(), known: map[uint64][]span{}}
}

// Bytes is the memory that Load takes.
func (k *Constants) Bytes() int { return len(k.data) }

// Load copies what was recorded into c's arena, where it must stay for as long as it is
// used, and ends the recording.
func (k *Constants) Load(c *Ctx) {
	if c.Err() != nil || len(k.data) == 0 {
		return
	}
	t := c.New(I32, len(k.data)/4)
	if c.err == nil {
		c.err = c.Stream.CopyIn(t, k.data)
	}
	if c.err == nil {
		k.buffer, k.next = t, 0
	}
}

// constant is the tensor of a list if it is the next of c's Constants; nil if it must be
// copied.
func (c *Ctx) constant(d DType, b []byte, shape []int) *Tensor {
	k := c.Constants
	if k == nil || c.err != nil || len(b) == 0 {
		return nil
	}
	if k.buffer == nil {
		k.record(b)
		return nil
	}
	if k.next == len(k.asked) {
		return nil
	}
	s := k.asked[k.next]
	if !bytes.Equal(k.data[s.at:s.at+s.n], b) {
		k.next = len(k.asked) // the run is not the one that was recorded
		return nil
	}
	k.next++
	return NewTensor(k.buffer.Buf, k.buffer.Off+s.at, d, shape...)
}

func (k *Constants) record(b []byte) {
	h := maphash.Bytes(k.seed, b)
	for _, s := range k.known[h] {
		if bytes.Equal(k.data[s.at:s.at+s.n], b) {
			k.asked = append(k.asked, s)
			return
		}
	}
	s := span{len(k.data), len(b)}
	k.data = append(k.data, b...)
	for len(k.data)%arenaAlign != 0 {
		k.data = append(k.data, 0)
	}
	k.known[h] = append(k.known[h], s)
	k.asked = append(k.asked, s)
}
