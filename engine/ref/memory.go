package ref

import (
	"runtime"
	"sync"

	"margo/engine"
)

// number is the arithmetic an op runs in: float64 when Exact, float32 when
// Rounded. Products are converted, F(a*b), wherever a sum follows: Go may
// otherwise fuse the two and skip a rounding.
type number interface{ float32 | float64 }

// round rounds v to a dtype; I32 is left alone.
func round(v float64, t engine.DType) float64 {
	switch t {
	case engine.F32:
		return float64(float32(v))
	case engine.BF16:
		return float64(engine.FromBF16(engine.ToBF16(float32(v))))
	}
	return v
}

// slots gives the memory of a tensor that has elements, and the slot of
// element (r, c) as first + r·row + c·col.
func slots(d *Device, t *engine.Tensor) (mem []float64, first, row, col int) {
	b, ok := t.Buf.(*buffer)
	if !ok || b.dev != d {
		d.fault("%v is not in memory of this device", t)
	}
	if b.slots == nil {
		d.fault("%v is used after its buffer was freed", t)
	}
	col = t.DType.Size() / 2
	return b.slots, t.Off / 2, t.RowStride * col, col
}

// load reads a tensor as a dense matrix, row after row; nil for nil.
func load[F number](d *Device, t *engine.Tensor) []F {
	if t == nil {
		return nil
	}
	out := make([]F, t.Elems())
	if len(out) == 0 {
		return out
	}
	mem, first, row, col := slots(d, t)
	n := t.Cols()
	for r := 0; r < t.Rows(); r++ {
		at := first + r*row
		for c := range out[r*n : r*n+n] {
			out[r*n+c] = F(mem[at])
			at += col
		}
	}
	return out
}

// store writes rows r, r+1, … of a tensor from a dense matrix, rounded to the
// tensor's dtype in mode Rounded.
func store[F number](d *Device, t *engine.Tensor, r int, v []F) {
	if len(v) == 0 {
		return
	}
	mem, first, row, col := slots(d, t)
	n := t.Cols()
	for ; len(v) > 0; r, v = r+1, v[n:] {
		at := first + r*row
		for _, x := range v[:n] {
			y := float64(x)
			if d.mode == Rounded {
				y = round(y, t.DType)
			}
			mem[at] = y
			at += col
		}
	}
}

// ints reads an index tensor; nil for nil. Each must be in [min, max).
func ints(d *Device, name string, t *engine.Tensor, min, max int) []int {
	if t == nil {
		return nil
	}
	out := make([]int, t.Elems())
	for i, v := range load[float64](d, t) {
		if v != v {
			d.fault("%s[%d] was never written", name, i)
		}
		if v < float64(min) || v >= float64(max) {
			d.fault("%s[%d] is %d, want %d to %d", name, i, int(v), min, max-1)
		}
		out[i] = int(v)
	}
	return out
}

// weights gives W, or what was packed in its place, as [N,K], to be read only;
// bf16 tells whether operands that meet it are rounded to BF16.
func weights[F number](d *Device, w *engine.Tensor, p engine.Packed) (v []F, bf16 bool) {
	if p == nil {
		return load[F](d, w), w.DType == engine.BF16 && d.mode == Rounded
	}
	q, ok := p.(*packed)
	if !ok || q.dev != d {
		d.fault("weight is packed for another device")
	}
	if q.v == nil {
		d.fault("packed weight is used after it was freed")
	}
	if q.n != w.Elems() {
		d.fault("packed weight has %d elements, W is %v", q.n, w)
	}
	return q.v.([]F), q.dtype == engine.BF16 && d.mode == Rounded
}

// toBF16 rounds every element.
func toBF16[F number](v []F) {
	for i, x := range v {
		v[i] = F(engine.FromBF16(engine.ToBF16(float32(x))))
	}
}

// parallel splits 0 … n-1 among the processors; f must not fault.
func parallel(n int, f func(lo, hi int)) {
	p := min(runtime.GOMAXPROCS(0), n)
	var wg sync.WaitGroup
	for i := 0; i < p; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f(n*i/p, n*(i+1)/p)
		}()
	}
	wg.Wait()
}
