package conformance

import (
	"fmt"

	"margo/engine"
)

func gatedAddCase(m, d int, h engine.DType, gateRows, gap int, inPlace bool, note string, data gen, exact bool) *Case {
	name := fmt.Sprintf("gated_add/%v/%dx%d gate/%d %s", h, m, d, gateRows, note)
	return &Case{Name: name, Op: engine.OpGatedAdd, DType: h, Bench: m*d > 1<<17, exact: exact, build: func(e *env) work {
		e.gap = gap
		a := engine.GatedAddArgs{H: e.in("H", h, data, m, d), GateRows: gateRows}
		if inPlace {
			a.X = e.inout("X", engine.F32, data, m, d)
			a.Y = a.X
		} else {
			a.X, a.Y = e.in("X", engine.F32, data, m, d), e.out("Y", engine.F32, m, d)
		}
		if gateRows > 0 {
			a.Gate = e.in("Gate", engine.F32, data, (m+gateRows-1)/gateRows, d)
		}
		return work{cost: a.Cost(), n: m, grain: max(gateRows, 1), run: func(s engine.Stream) error { return s.GatedAdd(a) },
			part: func(s engine.Stream, lo, hi int) error {
				b := a
				b.X, b.H, b.Y = a.X.RowsAt(lo, hi), a.H.RowsAt(lo, hi), a.Y.RowsAt(lo, hi)
				b.Gate = groupsAt(a.Gate, gateRows, lo, hi)
				return s.GatedAdd(b)
			}}
	}}
}

// rows is a case of Rows: Y, A and B have more rows than Count.
type rows struct {
	count, d   int
	y, a, b    engine.DType
	iy, ia, ib bool
	noB        bool
	negative   bool // every third index is negative
	act        engine.Activation
	note       string
	data       gen
}

func (r rows) cases() *Case {
	return &Case{Name: fmt.Sprintf("rows/%v/%dx%d a=%v b=%v index=%v,%v,%v %v %s", r.y, r.count, r.d, r.a, r.b, r.iy, r.ia, r.ib, r.act, r.note),
		Op: engine.OpRows, DType: r.y, Bench: r.count*r.d > 1<<17, exact: r.act == engine.Identity && r.data == nil, build: r.build}
}

func (r rows) build(e *env) work {
	data := r.data
	if data == nil {
		if data = odd(2000); r.act != engine.Identity {
			data = bell(1)
		}
	}
	ny, na, nb := r.count+3, r.count/2+2, 5
	if !r.ia {
		na = r.count
	}
	if !r.ib {
		nb = r.count + 1
	}
	index := func(name string, n int) *engine.Tensor {
		rnd := e.random(name)
		v := make([]int32, r.count)
		for i := range v {
			v[i] = int32(rnd.next() % uint64(n))
			if r.negative && i%3 == 1 {
				v[i] = -1 - int32(rnd.next()%5)
			}
		}
		return e.ints(name, v)
	}
	e.gap = 3
	a := engine.RowsArgs{Count: r.count, Act: r.act, A: e.in("A", r.a, data, na, r.d),
		Y: e.inout("Y", r.y, integers(9), ny, r.d)} // rows not named keep their contents
	if !r.noB {
		a.B = e.in("B", r.b, data, nb, r.d)
	}
	if r.iy {
		a.IY = e.ints("IY", shuffled(e.random("IY"), r.count, ny))
	}
	if r.ia {
		a.IA = index("IA", na)
	}
	if r.ib {
		a.IB = index("IB", nb)
	}
	return work{cost: a.Cost(), run: func(s engine.Stream) error { return s.Rows(a) }}
}

func castCase(m, n int, x, y engine.DType, scale, shift float32, gap int, note string, data gen, exact bool) *Case {
	return &Case{Name: fmt.Sprintf("cast/%v/%dx%d from %v, %v·x+%v %s", y, m, n, x, scale, shift, note), Op: engine.OpCast, DType: y,
		Bench: m*n > 1<<17, exact: exact, build: func(e *env) work {
			e.gap = gap
			a := engine.CastArgs{X: e.in("X", x, data, m, n), Y: e.out("Y", y, m, n), Scale: scale, Shift: shift}
			return work{cost: a.Cost(), n: m, run: func(s engine.Stream) error { return s.Cast(a) },
				part: func(s engine.Stream, lo, hi int) error {
					b := a
					b.X, b.Y = a.X.RowsAt(lo, hi), a.Y.RowsAt(lo, hi)
					return s.Cast(b)
				}}
		}}
}

func patchifyCase(n, h, w, c, p int, inverse bool, gap int) *Case {
	return &Case{Name: fmt.Sprintf("patchify/f32/%dx%dx%dx%d p=%d inverse=%v gap=%d", n, h, w, c, p, inverse, gap), Op: engine.OpPatchify,
		exact: true, build: func(e *env) work {
			e.gap = gap
			image, tokens := []int{n, h, w, c}, []int{n, h / p * (w / p), c * p * p}
			a := engine.PatchifyArgs{P: p, Inverse: inverse}
			if inverse {
				a.X, a.Y = e.out("X", engine.F32, image...), e.in("Y", engine.F32, bell(1), tokens...)
			} else {
				a.X, a.Y = e.in("X", engine.F32, bell(1), image...), e.out("Y", engine.F32, tokens...)
			}
			return work{cost: a.Cost(), run: func(s engine.Stream) error { return s.Patchify(a) }}
		}}
}

func pointwiseCases() (cs []*Case) {
	const f32, bf16 = engine.F32, engine.BF16
	for _, d := range []engine.DType{f32, bf16} {
		for _, s := range [][2]int{{0, 5}, {1, 1}, {33, 7}, {113, 203}, {6, 64}} {
			for _, gate := range []int{0, 1, 5} {
				cs = append(cs, gatedAddCase(s[0], s[1], d, gate, 0, gate == 1, "", bell(1), false))
			}
		}
		cs = append(cs,
			gatedAddCase(13, 50, d, 4, 3, false, "strided", bell(1), false),
			gatedAddCase(13, 50, d, 4, 3, true, "strided in place", bell(1), false),
			gatedAddCase(13, 50, d, 1, 1, false, "exact", integers(100), true),
			gatedAddCase(5, 40, d, 1, 0, false, "nan", bell(1).with(map[int]float32{41: nan, 99: inf}), false),
			gatedAddCase(320, 768, d, 1, 0, true, "trunk", bell(1), false))

		for _, s := range [][2]int{{0, 4}, {1, 1}, {33, 7}, {40, 203}} {
			cs = append(cs, rows{count: s[0], d: s[1], y: d, a: d, b: f32}.cases())
			cs = append(cs, rows{count: s[0], d: s[1], y: d, a: d, b: d, iy: true, ia: true, ib: true, negative: true}.cases())
		}
		for i := 0; i < 8; i++ {
			cs = append(cs, rows{count: 21, d: 70, y: d, a: f32, b: bf16, iy: i&1 != 0, ia: i&2 != 0, ib: i&4 != 0}.cases())
		}
		cs = append(cs,
			rows{count: 10, d: 33, y: d, a: bf16, b: f32, noB: true, ia: true, note: "no B"}.cases(),
			rows{count: 10, d: 33, y: d, a: d, noB: true, iy: true, note: "scatter"}.cases(),
			rows{count: 30, d: 64, y: d, a: f32, b: f32, ib: true, act: engine.SiLU}.cases(),
			rows{count: 30, d: 40, y: d, a: f32, b: f32, ia: true, negative: true, act: engine.GELUErf}.cases(),
			rows{count: 6, d: 20, y: d, a: f32, b: f32, note: "nan", data: bell(1).with(map[int]float32{25: nan, 70: inf})}.cases(),
			rows{count: 320, d: 768, y: d, a: f32, b: f32, iy: true, ia: true, ib: true, note: "decoder input"}.cases())

		for _, x := range []engine.DType{f32, bf16} {
			for _, s := range [][2]int{{0, 3}, {1, 1}, {7, 33}, {113, 203}} {
				cs = append(cs, castCase(s[0], s[1], x, d, 1, 0, 0, "", bell(1), true))
			}
			cs = append(cs,
				castCase(19, 45, x, d, 2, -3, 5, "exact strided", integers(120), true),
				castCase(19, 45, x, d, 1, 0, 1, "exact rounding", odd(2000), true),
				castCase(30, 50, x, d, 0.2325, 0.1, 2, "", bell(1), false),
				castCase(4, 40, x, d, 0.5, 1, 0, "nan", bell(1).with(map[int]float32{41: nan, 99: inf, 120: -inf}), false))
		}
		cs = append(cs, castCase(320, 768, f32, d, 1, 0, 0, "trunk", bell(1), false))
	}
	for _, inverse := range []bool{false, true} {
		cs = append(cs, patchifyCase(2, 4, 6, 16, 1, inverse, 0), patchifyCase(3, 4, 6, 5, 2, inverse, 0), patchifyCase(2, 8, 12, 3, 4, inverse, 0),
			patchifyCase(1, 6, 4, 7, 2, inverse, 3), patchifyCase(0, 4, 4, 3, 2, inverse, 0), patchifyCase(1, 3, 3, 1, 3, inverse, 0),
			patchifyCase(4, 16, 16, 16, 1, inverse, 0))
	}
	return cs
}
