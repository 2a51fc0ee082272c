package conformance

import (
	"fmt"
	"math"

	"margo/engine"
)

// conv is a case of Conv2D.
type conv struct {
	n, h, w, cin, cout int
	kernel, stride     int
	pad                [4]int // top, left, bottom, right
	up                 bool
	x, d, y            engine.DType // X, W, Y
	residual           int          // 0: none, 1: another tensor, 2: Y itself
	noBias             bool
	gap                int
	unpacked           bool
	exact, nan, raw    bool
	bench, large       bool
	note               string
}

func (v conv) cases() *Case {
	name := fmt.Sprintf("conv2d/%v/%dx%dx%dx%d>%d k=%d s=%d pad=%v", v.d, v.n, v.h, v.w, v.cin, v.cout, v.kernel, v.stride, v.pad)
	if v.up {
		name += " up"
	}
	name += fmt.Sprintf(" x=%v y=%v %s", v.x, v.y, v.note)
	return &Case{Name: name, Op: engine.OpConv2D, DType: v.d, Bench: v.bench || v.large, Large: v.large, exact: v.exact, build: v.build}
}

func (v conv) build(e *env) work {
	k := v.kernel * v.kernel * v.cin
	x, w, rest := bell(1), bell(1/math.Sqrt(float64(k))), bell(1)
	if v.exact {
		x, w, rest = odd(2000), integers(4), integers(64)
		if v.x == engine.BF16 {
			x = integers(100)
		}
	} else if !v.raw && v.d == engine.BF16 {
		x = x.toBF16()
	}
	if v.nan {
		x = x.with(map[int]float32{v.cin*(v.w+1) + 1: nan, v.cin * (v.h*v.w - 1): inf})
	}
	e.gap = v.gap
	a := engine.Conv2DArgs{Kernel: v.kernel, Stride: v.stride, Upsample: v.up,
		PadTop: v.pad[0], PadLeft: v.pad[1], PadBottom: v.pad[2], PadRight: v.pad[3],
		X: e.operand("X", v.x, v.d, x, v.n, v.h, v.w, v.cin)}
	if v.unpacked {
		a.W = e.in("W", v.d, w, v.cout, k)
	} else {
		a.W, a.Packed = e.packed("W", v.d, v.d, w, v.cout, k)
	}
	if !v.noBias {
		a.Bias = e.in("Bias", engine.F32, rest, v.cout)
	}
	ho, wo := a.OutSize()
	if v.residual == 2 {
		a.Y = e.inout("Y", v.y, rest, v.n, ho, wo, v.cout)
		a.Residual = a.Y
	} else {
		a.Y = e.out("Y", v.y, v.n, ho, wo, v.cout)
	}
	if v.residual == 1 {
		a.Residual = e.in("Residual", engine.F32, rest, v.n, ho, wo, v.cout)
	}
	return work{cost: a.Cost(), n: v.n, run: func(s engine.Stream) error { return s.Conv2D(a) },
		part: func(s engine.Stream, lo, hi int) error {
			b := a
			b.X, b.Y, b.Residual = imagesAt(a.X, lo, hi), imagesAt(a.Y, lo, hi), imagesAt(a.Residual, lo, hi)
			return s.Conv2D(b)
		}}
}

func convCases() (cs []*Case) {
	const f32, bf16 = engine.F32, engine.BF16
	same, down := [4]int{1, 1, 1, 1}, [4]int{0, 0, 1, 1} // down: the authors pad right and bottom only
	for _, d := range []engine.DType{f32, bf16} {
		add := func(v conv) {
			if v.kernel == 0 {
				v.kernel, v.pad = 3, same
			}
			if v.stride == 0 {
				v.stride = 1
			}
			v.d = d
			cs = append(cs, v.cases())
		}
		for _, x := range []engine.DType{f32, bf16} {
			for _, y := range []engine.DType{f32, bf16} {
				add(conv{n: 2, h: 5, w: 7, cin: 19, cout: 35, x: x, y: y})
				add(conv{n: 1, h: 6, w: 5, cin: 32, cout: 40, x: x, y: y, up: true})
				add(conv{n: 2, h: 8, w: 6, cin: 16, cout: 24, kernel: 3, stride: 2, pad: down, x: x, y: y})
				add(conv{n: 3, h: 4, w: 9, cin: 33, cout: 20, kernel: 1, x: x, y: y})
				add(conv{n: 2, h: 5, w: 6, cin: 9, cout: 33, x: x, y: y, exact: true, note: "exact"})
			}
			add(conv{n: 1, h: 9, w: 11, cin: 32, cout: 3, x: x, y: f32, note: "to pixels"})
			add(conv{n: 2, h: 9, w: 6, cin: 3, cout: 32, x: x, y: d, note: "from pixels"})
			add(conv{n: 2, h: 3, w: 5, cin: 24, cout: 40, x: x, y: f32, gap: 3, residual: 1, note: "residual strided"})
		}
		add(conv{n: 1, h: 7, w: 8, cin: 40, cout: 40, x: d, y: f32, residual: 2, note: "residual=y"})
		add(conv{n: 1, h: 7, w: 8, cin: 17, cout: 40, x: d, y: bf16, residual: 1, note: "residual"})
		add(conv{n: 2, h: 5, w: 4, cin: 48, cout: 32, kernel: 1, x: d, y: f32, residual: 2, gap: 1, note: "residual=y"})
		add(conv{n: 0, h: 4, w: 4, cin: 8, cout: 8, x: d, y: f32, note: "no image"})
		add(conv{n: 1, h: 1, w: 1, cin: 1, cout: 1, x: d, y: f32})
		add(conv{n: 1, h: 1, w: 1, cin: 8, cout: 32, x: d, y: f32, up: true})
		add(conv{n: 2, h: 7, w: 5, cin: 12, cout: 12, kernel: 3, stride: 2, pad: same, x: d, y: f32, noBias: true, note: "no bias"})
		add(conv{n: 2, h: 7, w: 5, cin: 12, cout: 12, kernel: 3, stride: 2, pad: down, x: d, y: f32, exact: true, note: "exact"})
		add(conv{n: 2, h: 5, w: 5, cin: 8, cout: 10, kernel: 3, x: d, y: f32, note: "no padding"})
		add(conv{n: 1, h: 6, w: 4, cin: 8, cout: 10, kernel: 3, stride: 2, pad: [4]int{2, 0, 1, 2}, up: true, x: d, y: f32, note: "all at once"})
		add(conv{n: 2, h: 6, w: 4, cin: 8, cout: 10, kernel: 1, stride: 2, x: d, y: f32})
		add(conv{n: 1, h: 5, w: 6, cin: 20, cout: 36, x: d, y: f32, unpacked: true, note: "unpacked"})
		add(conv{n: 2, h: 4, w: 6, cin: 20, cout: 36, up: true, x: d, y: f32, exact: true, note: "exact"})
		add(conv{n: 1, h: 6, w: 7, cin: 16, cout: 32, x: d, y: f32, nan: true, note: "nan"})
		add(conv{n: 1, h: 6, w: 7, cin: 16, cout: 32, x: d, y: f32, up: true, nan: true, note: "nan"})
		add(conv{n: 1, h: 16, w: 16, cin: 256, cout: 256, x: d, y: f32, residual: 1, bench: true, note: "tokenizer"})
		add(conv{n: 1, h: 32, w: 32, cin: 128, cout: 128, x: d, y: d, bench: true, note: "tokenizer"})
		for _, l := range []conv{
			{h: 16, w: 16, cin: 512, cout: 512}, {h: 64, w: 64, cin: 256, cout: 256}, {h: 128, w: 128, cin: 256, cout: 256, up: true},
			{h: 256, w: 256, cin: 128, cout: 128}, {h: 256, w: 256, cin: 128, cout: 3},
		} {
			l.n, l.x, l.y, l.large, l.note = 1, d, f32, true, "KL-16 decoder"
			add(l)
		}
	}
	cs = append(cs, conv{n: 2, h: 6, w: 5, cin: 30, cout: 33, kernel: 3, stride: 1, pad: same, x: f32, d: bf16, y: f32, raw: true,
		note: "operand to be rounded"}.cases())
	return cs
}
