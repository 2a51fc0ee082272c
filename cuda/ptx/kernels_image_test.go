package ptx

import (
	"strings"
	"testing"

	"margo/engine"
)

// groupNormKernel runs the three kernels of GroupNorm for the operand types of one: 2 images of 5 × 7 pixels in chunks of 16, the
// last cut, 3 groups, weight, bias and SiLU.
func groupNormKernel(t testing.TB, m *Module, name string) {
	a := template(t, name, "_kernel")
	x, y, vec := a[0], "f32", a[1]
	if len(a) == 3 && a[1][0] != '0' && a[1][0] != '1' { // of group_apply
		y, vec = a[1], a[2]
	}
	groupNorm(t, m, x, y, vec, map[string]int{"1": 24, "0": 21}[vec], 3)
	if x == "f32" && y == "f32" && len(a) == 3 && strings.Contains(name, "apply") {
		groupNorm(t, m, x, y, vec, map[string]int{"1": 1040, "0": 1035}[vec], 5) // more than 4 channels for each thread
	}
}

func groupNorm(t testing.TB, m *Module, xType, yType, vec string, ch, groups int) {
	const images, high, wide, chunk, threads = 2, 5, 7, 16, 256
	const pixels, chunks = high * wide, (high*wide + chunk - 1) / chunk
	p := newProblem(t)
	p.gap = 4
	x := p.in(dtype(xType), normal(1), images, high, wide, ch)
	y, weight, bias := p.out(dtype(yType), images, high, wide, ch), p.f32(ch), p.f32(ch)
	sums, squares := p.mem.Alloc(4*images*groups*chunks), p.mem.Alloc(4*images*groups*chunks)
	const eps = 1e-6
	arg := args(x.at, y.at, weight.at, bias.at, sums, squares, int64(x.ld), int64(y.ld), int64(pixels), int32(ch), int32(groups), int32(chunks), int32(chunk),
		int32(engine.SiLU), float32(eps))
	quads := (ch + 3) / 4
	lanes := max(threads/quads, 1)
	types := map[string]string{"f32": "f", "bf16": "4bf16"}
	part := "group_part_kernelI" + types[xType] + "Lb" + vec + "E"
	apply := "group_apply_kernelI" + types[xType] + types[yType] + "Lb" + vec + "E"
	if xType == "bf16" && yType == "bf16" {
		apply = "group_apply_kernelI4bf16S1_Lb" + vec + "E"
	}
	l := Launch{Grid: [3]int{chunks, images}, Block: [3]int{threads}, Shared: 4 * (groups + lanes*quads*4), Args: []any{arg}}
	launch(t, m, p.mem, l, part+"Lb0E")
	launch(t, m, p.mem, l, part+"Lb1E")
	l.Shared = 8 * groups
	launch(t, m, p.mem, l, apply)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.GroupNorm(engine.GroupNormArgs{X: at(x), Y: at(y), Weight: at(weight), Bias: at(bias), Groups: groups, Eps: eps, Act: engine.SiLU})
	})
}

// convolution is a call of Conv2D with square kernels.
type convolution struct {
	x, w, y                  engine.DType
	cin, kernel, stride      int
	top, left, bottom, right int
	up, residual             bool
}

// convKernel runs a kernel of conv.cu: 3 × 3 with stride 2 and uneven padding where loads are whole, and with upsampling where they
// are by element (asynchronous copies are always whole). More than 64 products a sum take a second step in k.
func convKernel(t testing.TB, m *Module, name string) {
	n, async := tile(name)
	c := convolution{x: engine.F32, w: engine.F32, y: engine.F32, cin: 8, kernel: 3, stride: 2, top: 1, bottom: 0, left: 0, right: 1, residual: true}
	d := convolution{x: engine.F32, w: engine.F32, y: engine.BF16, cin: 9, kernel: 3, stride: 1, top: 1, bottom: 1, left: 1, right: 1, up: true}
	l := Launch{Block: [3]int{256}, Shared: 4 * 2 * 16 * (n[0] + n[1] + 8)}
	if len(n) > 2 {
		c.w, d.w, d.x = engine.BF16, engine.BF16, engine.BF16
		if async {
			c.x, d.cin = engine.BF16, 16
		}
		l = Launch{Block: [3]int{32 * n[2] * n[3]}, Shared: n[4] * (n[0] + n[1]) * 64 * 2}
	}
	c.run(t, m, l, n[0], n[1], name)
	d.run(t, m, l, n[0], n[1], name)
}

func (c convolution) run(t testing.TB, m *Module, l Launch, bm, bn int, name string) {
	t.Helper()
	const images, high, wide, cout = 2, 5, 6, 20
	scale, up := 1, int32(0)
	if c.up {
		scale, up = 2, 1
	}
	ho, wo := (high*scale+c.top+c.bottom-c.kernel)/c.stride+1, (wide*scale+c.left+c.right-c.kernel)/c.stride+1
	k := c.kernel * c.kernel * c.cin
	p := newProblem(t)
	g := normal(1)
	if c.w == engine.BF16 {
		g = g.bf16Of() // what is F32 is rounded on the way in
	}
	p.gap = 8
	if c.cin%4 != 0 {
		p.gap = 3
	}
	x := p.in(c.x, g, images, high, wide, c.cin)
	p.gap = 8
	if k%8 != 0 {
		p.gap = 8 - k%8
	}
	w := p.in(c.w, normal(0.2), cout, k)
	p.gap = 4
	bias, residual, y := p.f32(cout), p.f32(images, ho, wo, cout), p.out(c.y, images, ho, wo, cout)
	rows := images * ho * wo
	flag := func(b bool) int32 {
		if b {
			return 1
		}
		return 0
	}
	r := residual.at
	if !c.residual {
		r = 0
	}
	half := flag(c.w == engine.BF16)
	whole := flag(c.cin%8 == 0)
	l.Grid = [3]int{(rows + bm - 1) / bm * ((cout + bn - 1) / bn)}
	l.Args = []any{args(x.at, w.at, int64(w.ld), half, int32(1), int64(rows), int64(cout), int64(k), flag(c.x == engine.BF16), whole, int64(x.ld),
		int32(high), int32(wide), int32(ho), int32(wo), int32(c.cin), int32(c.kernel), int32(c.stride), int32(c.top), int32(c.left), up,
		bias.at, uint64(0), r, y.at, int64(0), int64(1), int64(residual.ld), int64(y.ld), int32(0), flag(c.y == engine.BF16), int32(1))}
	launch(t, m, p.mem, l, name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		a := engine.Conv2DArgs{X: at(x), W: at(w), Bias: at(bias), Y: at(y), Kernel: c.kernel, Stride: c.stride,
			PadTop: c.top, PadLeft: c.left, PadBottom: c.bottom, PadRight: c.right, Upsample: c.up}
		if c.residual {
			a.Residual = at(residual)
		}
		return s.Conv2D(a)
	})
}
