package conformance

import (
	"fmt"

	"margo/engine"
)

// norm is a case of Norm.
type norm struct {
	m, d    int
	x, y    engine.DType
	note    string
	affine  bool
	modRows int // 0: no scale and shift
	gap     int
	data    gen
	bench   bool
	large   bool
}

func (n norm) cases() *Case {
	return &Case{Name: fmt.Sprintf("norm/%v/%dx%d y=%v %s", n.x, n.m, n.d, n.y, n.note), Op: engine.OpNorm, DType: n.x,
		Bench: n.bench || n.large, Large: n.large, build: n.build}
}

func (n norm) build(e *env) work {
	data := n.data
	if data == nil {
		data = bell(2)
	}
	e.gap = n.gap
	a := engine.NormArgs{X: e.in("X", n.x, data, n.m, n.d), Y: e.out("Y", n.y, n.m, n.d), ModRows: n.modRows, Eps: 1e-6}
	if n.affine {
		a.Weight, a.Bias = e.in("Weight", engine.F32, bell(0.3).plus(1), n.d), e.in("Bias", engine.F32, bell(1), n.d)
	}
	if n.modRows > 0 {
		g := (n.m + n.modRows - 1) / n.modRows
		mod := e.in("Modulation", engine.F32, bell(1), g, 3*n.d) // shift, scale, gate
		a.Shift, a.Scale = mod.Slice(0, n.d), mod.Slice(n.d, 2*n.d)
	}
	return work{cost: a.Cost(), n: n.m, grain: max(n.modRows, 1), run: func(s engine.Stream) error { return s.Norm(a) },
		part: func(s engine.Stream, lo, hi int) error {
			b := a
			b.X, b.Y = a.X.RowsAt(lo, hi), a.Y.RowsAt(lo, hi)
			b.Scale, b.Shift = groupsAt(a.Scale, a.ModRows, lo, hi), groupsAt(a.Shift, a.ModRows, lo, hi)
			return s.Norm(b)
		}}
}

func normCases() (cs []*Case) {
	const f32, bf16 = engine.F32, engine.BF16
	add := func(n norm) { cs = append(cs, n.cases()) }
	for _, x := range []engine.DType{f32, bf16} {
		for _, y := range []engine.DType{f32, bf16} {
			for _, s := range [][2]int{{0, 8}, {1, 1}, {3, 2}, {33, 7}, {5, 203}, {113, 64}, {7, 1280}, {900, 20}} {
				add(norm{m: s[0], d: s[1], x: x, y: y, note: "plain"})
			}
			add(norm{m: 17, d: 75, x: x, y: y, affine: true, gap: 3, note: "affine strided"})
			add(norm{m: 17, d: 768, x: x, y: y, modRows: 1, note: "modulated"})
			add(norm{m: 23, d: 96, x: x, y: y, affine: true, modRows: 5, gap: 1, note: "affine modulated/5"})
			add(norm{m: 23, d: 96, x: x, y: y, modRows: 23, note: "modulated/23"})
		}
		add(norm{m: 9, d: 1024, x: x, y: f32, data: bell(1).plus(300), note: "large mean"})
		add(norm{m: 9, d: 200, x: x, y: f32, data: bell(1e-4), note: "small variance"})
		add(norm{m: 3, d: 100, x: x, y: f32, affine: true, data: constant(2.5), note: "no variance"})
		add(norm{m: 6, d: 50, x: x, y: f32, affine: true, data: bell(1).with(map[int]float32{60: nan, 160: inf, 299: -inf}), note: "nan"})
		add(norm{m: 320, d: 768, x: x, y: bf16, affine: true, bench: true, note: "trunk"})
		add(norm{m: 64, d: 1024, x: x, y: bf16, affine: true, modRows: 1, bench: true, note: "head"})
		add(norm{m: 1280, d: 768, x: x, y: bf16, affine: true, large: true, note: "trunk, 4 images"})
	}
	return cs
}

// groupNorm is a case of GroupNorm.
type groupNorm struct {
	n, h, w, c, groups int
	x, y               engine.DType
	act                engine.Activation
	note               string
	data               gen
	bare               bool // no weight, no bias
	gap                int
	bench              bool
	large              bool
}

func (g groupNorm) cases() *Case {
	return &Case{Name: fmt.Sprintf("group_norm/%v/%dx%dx%dx%d in %d y=%v %v %s", g.x, g.n, g.h, g.w, g.c, g.groups, g.y, g.act, g.note),
		Op: engine.OpGroupNorm, DType: g.x, Bench: g.bench || g.large, Large: g.large, build: g.build}
}

func (g groupNorm) build(e *env) work {
	data := g.data
	if data == nil {
		data = bell(2)
	}
	e.gap = g.gap
	a := engine.GroupNormArgs{X: e.in("X", g.x, data, g.n, g.h, g.w, g.c), Y: e.out("Y", g.y, g.n, g.h, g.w, g.c),
		Groups: g.groups, Eps: 1e-6, Act: g.act}
	if !g.bare {
		a.Weight, a.Bias = e.in("Weight", engine.F32, bell(0.3).plus(1), g.c), e.in("Bias", engine.F32, bell(1), g.c)
	}
	return work{cost: a.Cost(), n: g.n, run: func(s engine.Stream) error { return s.GroupNorm(a) },
		part: func(s engine.Stream, lo, hi int) error {
			b := a
			b.X, b.Y = imagesAt(a.X, lo, hi), imagesAt(a.Y, lo, hi)
			return s.GroupNorm(b)
		}}
}

// imagesAt views images [lo, hi) of [N,H,W,C].
func imagesAt(t *engine.Tensor, lo, hi int) *engine.Tensor {
	if t == nil {
		return nil
	}
	pixels := t.Shape[1] * t.Shape[2]
	v := *t
	v.Off += lo * pixels * t.RowStride * t.DType.Size()
	v.Shape = append([]int{hi - lo}, t.Shape[1:]...)
	return &v
}

func groupNormCases() (cs []*Case) {
	add := func(g groupNorm) { cs = append(cs, g.cases()) }
	for _, x := range []engine.DType{engine.F32, engine.BF16} {
		for _, y := range []engine.DType{engine.F32, engine.BF16} {
			add(groupNorm{n: 2, h: 5, w: 7, c: 64, groups: 32, x: x, y: y, act: engine.SiLU})
			add(groupNorm{n: 1, h: 16, w: 16, c: 128, groups: 32, x: x, y: y, act: engine.SiLU})
			add(groupNorm{n: 3, h: 3, w: 3, c: 32, groups: 32, x: x, y: y})
			add(groupNorm{n: 2, h: 4, w: 3, c: 96, groups: 32, x: x, y: y, gap: 5, note: "strided"})
		}
		add(groupNorm{n: 2, h: 1, w: 1, c: 60, groups: 4, x: x, y: engine.F32, bare: true, note: "bare"})
		add(groupNorm{n: 0, h: 4, w: 4, c: 32, groups: 32, x: x, y: engine.F32, note: "no image"})
		add(groupNorm{n: 1, h: 3, w: 2, c: 7, groups: 1, x: x, y: engine.F32, act: engine.GELUErf})
		add(groupNorm{n: 2, h: 11, w: 13, c: 24, groups: 3, x: x, y: engine.F32, data: bell(1).plus(300), note: "large mean"})
		add(groupNorm{n: 1, h: 5, w: 6, c: 12, groups: 3, x: x, y: engine.F32, data: bell(1e-4), note: "small variance"})
		add(groupNorm{n: 1, h: 2, w: 3, c: 8, groups: 2, x: x, y: engine.F32, data: constant(2.5), note: "no variance"})
		add(groupNorm{n: 2, h: 3, w: 5, c: 16, groups: 4, x: x, y: engine.F32, data: bell(1).with(map[int]float32{5: nan, 300: inf}), note: "nan"})
		add(groupNorm{n: 1, h: 64, w: 64, c: 128, groups: 32, x: x, y: engine.BF16, act: engine.SiLU, bench: true, note: "tokenizer"})
		add(groupNorm{n: 1, h: 256, w: 256, c: 128, groups: 32, x: x, y: engine.BF16, act: engine.SiLU, large: true, note: "tokenizer"})
	}
	return cs
}
