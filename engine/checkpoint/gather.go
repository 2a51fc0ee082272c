package checkpoint

// sparseSpan is how many times its own bytes a strided tensor may span before the
// pages that it touched are given back after every piece: one element may keep a
// page resident.
const sparseSpan = 16

// cursor walks the elements of a strided tensor in row-major order, in runs that
// lie together in the file. It counts in bytes: there is a step for each element of
// a transposed matrix.
type cursor struct {
	run, done int64 // length of a run, and what has been passed of this one
	at        int64 // file offset of this run
	index     []int // of this run, in the dimensions outside of runs
	shape     []int
	stride    []int64
}

// newCursor stands at element first of t.
func newCursor(t *tensor, first int64) *cursor {
	outer, elems, size := len(t.Shape), int64(1), t.DType.Size()
	for ; outer > 0; outer-- {
		n := t.Shape[outer-1]
		if n != 1 && t.stride[outer-1] != elems {
			break
		}
		elems *= int64(n)
	}
	c := &cursor{run: elems * size, done: first % elems * size, at: t.off, index: make([]int, outer), shape: t.Shape[:outer], stride: make([]int64, outer)}
	rest := first / elems
	for d := outer - 1; d >= 0; d-- {
		n := int64(t.Shape[d])
		c.stride[d] = t.stride[d] * size
		c.index[d] = int(rest % n)
		c.at += rest % n * c.stride[d]
		rest /= n
	}
	return c
}

// next is the offset in the file and the length of the next bytes that lie
// together, at most room of them.
func (c *cursor) next(room int) (off int64, n int) {
	k := min(c.run-c.done, int64(room))
	off = c.at + c.done
	if c.done += k; c.done < c.run {
		return off, int(k)
	}
	c.done = 0
	for d := len(c.index) - 1; d >= 0; d-- {
		c.index[d]++
		c.at += c.stride[d]
		if c.index[d] < c.shape[d] {
			break
		}
		c.at -= int64(c.index[d]) * c.stride[d]
		c.index[d] = 0
	}
	return off, int(k)
}
