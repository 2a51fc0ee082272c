package engine

import "math"

// Arena is bump-allocated device memory for the activations of a step. It
// grows by chunks while a first step shows what is needed; Reset then joins
// the chunks into one, and later steps allocate nothing.
type Arena struct {
	dev    Device
	chunks []Buffer
	cur    int // chunk in use
	off    int // bytes used of it
	used   int // bytes used of full chunks before it
	peak   int
}

// Mark is a position of an Arena.
type Mark struct{ cur, off, used int }

const (
	arenaAlign = 256     // enough for any vector load and for CUDA
	arenaChunk = 4 << 20 // smallest chunk
)

// NewArena makes an empty arena on d.
func NewArena(d Device) *Arena { return &Arena{dev: d} }

// Alloc takes bytes, aligned to 256.
func (a *Arena) Alloc(bytes int) (Buffer, int, error) {
	if bytes < 0 {
		return nil, 0, Errorf("arena", Invalid, "negative size %d", bytes)
	}
	if bytes > math.MaxInt/2 {
		return nil, 0, Errorf("arena", OutOfMemory, "%d bytes asked", bytes)
	}
	n := (bytes + arenaAlign - 1) / arenaAlign * arenaAlign
	for a.cur < len(a.chunks) && a.off+n > a.chunks[a.cur].Bytes() {
		a.used += a.off
		a.cur, a.off = a.cur+1, 0
	}
	if a.cur == len(a.chunks) {
		size := max(n, arenaChunk)
		if k := len(a.chunks); k > 0 {
			size = max(size, a.chunks[k-1].Bytes()) // few chunks, whatever the need
		}
		b, err := a.dev.Alloc(size)
		if err != nil {
			return nil, 0, err
		}
		a.chunks = append(a.chunks, b)
	}
	off := a.off
	a.off += n
	a.peak = max(a.peak, a.used+a.off)
	return a.chunks[a.cur], off, nil
}

// Mark remembers the position.
func (a *Arena) Mark() Mark { return Mark{a.cur, a.off, a.used} }

// Release goes back to a mark; memory taken since is free again.
func (a *Arena) Release(m Mark) { a.cur, a.off, a.used = m.cur, m.off, m.used }

// ReserveBytes is the size of the chunk that Reserve takes.
func ReserveBytes(bytes int) int { return max(bytes, arenaChunk) }

// Chunks are the sizes of what the arena holds of its device's memory.
func (a *Arena) Chunks() (sizes []int) {
	for _, b := range a.chunks {
		sizes = append(sizes, b.Bytes())
	}
	return sizes
}

// Peak is the most bytes ever in use at once.
func (a *Arena) Peak() int { return a.peak }

// Reserve makes the empty arena one chunk of at least bytes.
func (a *Arena) Reserve(bytes int) error {
	if a.cur != 0 || a.off != 0 {
		return Errorf("arena", Internal, "reserve while in use")
	}
	if len(a.chunks) == 1 && a.chunks[0].Bytes() >= bytes {
		return nil
	}
	if err := a.Close(); err != nil {
		return err
	}
	b, err := a.dev.Alloc(ReserveBytes(bytes))
	if err != nil {
		return err
	}
	a.chunks = []Buffer{b}
	return nil
}

// Reset frees everything taken and joins the chunks into one of the size that
// was needed at the peak.
func (a *Arena) Reset() error {
	a.Release(Mark{})
	if len(a.chunks) > 1 {
		return a.Reserve(a.peak + a.peak/8)
	}
	return nil
}

// Close frees the memory.
func (a *Arena) Close() error {
	a.Release(Mark{})
	var first error
	for _, b := range a.chunks {
		if err := b.Free(); err != nil && first == nil {
			first = err
		}
	}
	a.chunks = nil
	return first
}
