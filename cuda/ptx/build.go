package ptx

import (
	"fmt"
	"math"
)

// each makes a run of a function of one lane.
func each(f func(w *warp, lane int) error) func(w *warp, lanes uint32) error {
	return func(w *warp, lanes uint32) error {
		for l := range 32 {
			if lanes>>l&1 != 0 {
				if err := f(w, l); err != nil {
					return fmt.Errorf("lane %d: %w", l, err)
				}
			}
		}
		return nil
	}
}

// want checks the number of operands.
func (in *instr) want(n int) error {
	if len(in.args) != n {
		return fmt.Errorf("%d operands, not %d", len(in.args), n)
	}
	return nil
}

// build sets in.run.
func build(in *instr) error {
	op, mods := in.op[0], in.op[1:]
	t := in.op[len(in.op)-1]
	if _, ok := sizes[t]; ok {
		mods = mods[:len(mods)-1]
	} else {
		t = ""
	}
	switch op {
	case "bra":
		if _, err := modifiers(mods, "uni"); err != nil || in.target < 0 {
			return fmt.Errorf("bad branch")
		}
		in.run = func(*warp, uint32) error { return nil }
		return nil
	case "brx":
		if len(mods) != 1 || mods[0] != "idx" || len(in.args) != 2 || in.table == nil {
			return fmt.Errorf("bad branch")
		}
		in.run = each(func(w *warp, l int) error {
			i := uint32(in.args[0].get(w, l))
			if int(i) >= len(in.table) {
				return fmt.Errorf("index %d of %d targets", i, len(in.table))
			}
			w.pc[l] = in.table[i]
			return nil
		})
		return nil
	case "ret", "exit":
		if _, err := modifiers(mods, "uni"); err != nil {
			return err
		}
		in.run = each(func(w *warp, l int) error {
			w.state[l] = exited
			return w.leaving()
		})
		return nil
	case "ld":
		return in.load(mods, t)
	case "st":
		return in.store(mods, t)
	case "mov":
		return in.mov(mods, t)
	case "cvta":
		return in.cvta(mods)
	case "setp":
		return in.setp(mods, t)
	case "cvt":
		return in.cvt(mods, t)
	case "selp":
		return in.selp(mods)
	case "bfi":
		return in.bfi(mods, t)
	case "atom", "red":
		return in.atomic(mods, t)
	case "nanosleep": // others run first
		if len(mods) != 0 || t != "u32" {
			return errUnknown
		}
		in.run = func(w *warp, _ uint32) error {
			w.yields = true
			return nil
		}
		return in.want(1)
	case "membar", "fence":
		return fenceOf(in, mods)
	}
	if f, ok := collectives[op]; ok {
		return f(in, mods, t)
	}
	return in.compute(op, mods, t)
}

// compute builds arithmetic: d, a[, b[, c]].
func (in *instr) compute(op string, mods []string, t string) error {
	if t == "" || len(in.args) < 2 || in.args[0].kind != register {
		return errUnknown
	}
	d, n := in.args[0], len(in.args)-1
	lut := uint64(0)
	if op == "lop3" {
		if n != 4 || t != "b32" {
			return errUnknown
		}
		lut, n = in.args[4].value, 3
	}
	if n > 3 {
		return errUnknown
	}
	var f func(a, b, c uint64) uint64
	var err error
	if op == "lop3" {
		f = func(a, b, c uint64) uint64 {
			r := uint64(0)
			for i := range 8 {
				if lut>>i&1 == 0 {
					continue
				}
				m := uint64(math.MaxUint64)
				for j, v := range []uint64{c, b, a} {
					if i>>j&1 == 0 {
						v = ^v
					}
					m &= v
				}
				r |= m
			}
			return r
		}
	} else if f, err = arithmetic(op, mods, t); err != nil {
		return err
	}
	own := shapeOf(t)
	types, result := [3]shape{own, own, own}, own
	wide := len(mods) == 1 && mods[0] == "wide"
	switch {
	case op == "shl" || op == "shr":
		types[1] = shapeOf("u32")
	case op == "bfe":
		types[1], types[2] = shapeOf("u32"), shapeOf("u32")
	case op == "popc" || op == "clz" || op == "bfind":
		result = shapeOf("u32")
	case wide:
		double := map[string]string{"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[t]
		if double == "" {
			return errUnknown
		}
		result = shapeOf(double)
		types[2] = result
	}
	in.run = lanewise(d, in.args[1:1+n], types, result, f)
	return nil
}

// lanewise runs f on every lane. Operands are looked up once for all.
func lanewise(d operand, args []operand, types [3]shape, result shape, f func(a, b, c uint64) uint64) func(w *warp, lanes uint32) error {
	var constant [3]*[32]uint64 // where they are no registers
	for i := range constant {
		if constant[i] = new([32]uint64); i < len(args) && args[i].kind == immediate {
			for l := range 32 {
				constant[i][l] = args[i].value
			}
		}
	}
	return func(w *warp, lanes uint32) error {
		v := constant
		for i := range args {
			switch o := &args[i]; {
			case o.kind == register && !o.neg:
				v[i] = (*[32]uint64)(w.regs[o.reg*32:])
			case o.kind != immediate:
				v[i] = new([32]uint64)
				for l := range 32 {
					if lanes>>l&1 != 0 {
						v[i][l] = o.get(w, l)
					}
				}
			}
		}
		to := (*[32]uint64)(w.regs[d.reg*32:])
		for l := range 32 {
			if lanes>>l&1 != 0 {
				to[l] = result.norm(f(types[0].norm(v[0][l]), types[1].norm(v[1][l]), types[2].norm(v[2][l])))
			}
		}
		return nil
	}
}

// bfi: d, a, b, position, length: a's low bits put into b. Bits beyond the width fall away.
func (in *instr) bfi(mods []string, t string) error {
	own := shapeOf(t)
	if len(mods) != 0 || t != "b32" && t != "b64" {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		a, b := in.args[1].get(w, l), in.args[2].get(w, l)
		pos, n := min(in.args[3].get(w, l)&0xff, 64), min(in.args[4].get(w, l)&0xff, 64)
		field := (uint64(1)<<n - 1) << pos
		w.regs[in.args[0].reg*32+l] = own.norm(a<<pos&field | b&^field)
		return nil
	})
	return in.want(5)
}

// vectorOf gives the elements of a vector operand, or the operand itself.
func vectorOf(o operand) []operand {
	if o.kind == vector {
		return o.vec
	}
	return []operand{o}
}

// access parses the modifiers of ld and st: space and count of elements. own are those that the other has not.
func access(mods []string, own ...string) (space string, n int, err error) {
	n = 1
	for _, m := range mods {
		switch m {
		case "global", "shared", "local", "param":
			space = m
		case "v2":
			n = 2
		case "v4":
			n = 4
		case "ca", "cg", "cs", "volatile", "relaxed", "weak", "gpu", "sys", "cta":
		default:
			known := false
			for _, o := range own {
				known = known || m == o
			}
			if !known {
				return "", 0, fmt.Errorf("unknown instruction: modifier %s", m)
			}
		}
	}
	return space, n, nil
}

func (in *instr) load(mods []string, t string) error {
	own := shapeOf(t)
	space, n, err := access(mods, "nc", "lu", "acquire")
	if err != nil || t == "" || len(in.args) != 2 {
		return fmt.Errorf("unknown form of ld (%v)", err)
	}
	d, a, size := vectorOf(in.args[0]), in.args[1], sizes[t]
	if len(d) != n {
		return fmt.Errorf("%d registers for %d elements", len(d), n)
	}
	in.run = each(func(w *warp, l int) error {
		b, err := w.at(space, a.get(w, l), n*size, n*size, l)
		if err != nil {
			return err
		}
		for i := range d {
			w.regs[d[i].reg*32+l] = own.norm(load(b[i*size : (i+1)*size]))
		}
		return nil
	})
	return nil
}

func (in *instr) store(mods []string, t string) error {
	space, n, err := access(mods, "wb", "wt", "release")
	if err != nil || t == "" || len(in.args) != 2 || space == "param" {
		return fmt.Errorf("unknown form of st (%v)", err)
	}
	a, v, size := in.args[0], vectorOf(in.args[1]), sizes[t]
	if len(v) != n {
		return fmt.Errorf("%d registers for %d elements", len(v), n)
	}
	in.run = each(func(w *warp, l int) error {
		b, err := w.at(space, a.get(w, l), n*size, n*size, l)
		if err != nil {
			return err
		}
		for i := range v {
			store(b[i*size:(i+1)*size], v[i].get(w, l))
		}
		return w.wrote(space, a.get(w, l), n*size, l)
	})
	return nil
}

// mov moves, packs and unpacks.
func (in *instr) mov(mods []string, t string) error {
	own := shapeOf(t)
	if len(mods) != 0 || t == "" || len(in.args) != 2 {
		return errUnknown
	}
	d, s := vectorOf(in.args[0]), vectorOf(in.args[1])
	if len(d) > 1 && len(s) > 1 {
		return errUnknown
	}
	if len(d) == 1 && len(s) == 1 {
		in.run = lanewise(d[0], s, [3]shape{own, own, own}, own, func(a, _, _ uint64) uint64 { return a })
		return nil
	}
	bits := 8 * sizes[t]
	in.run = each(func(w *warp, l int) error {
		v := uint64(0)
		part := bits / len(s)
		for i := range s {
			x := s[i].get(w, l)
			if len(s) > 1 {
				x &= 1<<part - 1
			}
			v |= x << (part * i)
		}
		part = bits / len(d)
		for i := range d {
			x := v >> (part * i)
			if len(d) > 1 {
				x &= 1<<part - 1
			}
			w.regs[d[i].reg*32+l] = own.norm(x)
		}
		return nil
	})
	return nil
}

func (in *instr) cvta(mods []string) error {
	to := len(mods) == 2 && mods[0] == "to"
	if !to && len(mods) != 1 {
		return errUnknown
	}
	base, ok := map[string]uint64{"global": 0, "shared": sharedBase, "local": localBase, "param": paramBase}[mods[len(mods)-1]]
	if !ok {
		return errUnknown
	}
	if to {
		base = -base
	}
	in.run = each(func(w *warp, l int) error {
		w.regs[in.args[0].reg*32+l] = in.args[1].get(w, l) + base
		return nil
	})
	return in.want(2)
}

func (in *instr) selp(mods []string) error {
	if len(mods) != 0 {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		s := &in.args[2]
		if in.args[3].get(w, l)&1 != 0 {
			s = &in.args[1]
		}
		w.regs[in.args[0].reg*32+l] = s.get(w, l)
		return nil
	})
	return in.want(4)
}

// compare gives the relation of a name for a type.
func compare(name, t string) func(a, b uint64) bool {
	var less, equal func(a, b uint64) bool
	unordered := func(a, b uint64) bool { return false }
	switch {
	case t == "f32" || t == "f64":
		conv := f64
		if t == "f32" {
			conv = func(v uint64) float64 { return float64(f32(v)) }
		}
		less = func(a, b uint64) bool { return conv(a) < conv(b) }
		equal = func(a, b uint64) bool { return conv(a) == conv(b) }
		unordered = func(a, b uint64) bool { return math.IsNaN(conv(a)) || math.IsNaN(conv(b)) }
		switch name {
		case "num":
			return func(a, b uint64) bool { return !unordered(a, b) }
		case "nan":
			return unordered
		case "equ", "neu", "ltu", "leu", "gtu", "geu":
			f := compare(name[:2], t)
			return func(a, b uint64) bool { return unordered(a, b) || f(a, b) }
		}
	case t[0] == 's':
		less = func(a, b uint64) bool { return int64(a) < int64(b) }
		equal = func(a, b uint64) bool { return a == b }
	default:
		less = func(a, b uint64) bool { return a < b }
		equal = func(a, b uint64) bool { return a == b }
	}
	switch name {
	case "eq":
		return equal
	case "ne":
		return func(a, b uint64) bool { return !equal(a, b) && !unordered(a, b) }
	case "lt", "lo":
		return less
	case "le", "ls":
		return func(a, b uint64) bool { return less(a, b) || equal(a, b) }
	case "gt", "hi":
		return func(a, b uint64) bool { return less(b, a) }
	case "ge", "hs":
		return func(a, b uint64) bool { return less(b, a) || equal(a, b) }
	}
	return nil
}

func (in *instr) setp(mods []string, t string) error {
	own := shapeOf(t)
	if t == "" || len(mods) == 0 || len(in.args) < 3 {
		return errUnknown
	}
	f := compare(mods[0], t)
	m, err := modifiers(mods[1:], "and", "or", "xor", "ftz")
	if f == nil || err != nil {
		return errUnknown
	}
	combine := m["and"] || m["or"] || m["xor"]
	if combine != (len(in.args) == 4) {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		a, b := own.norm(in.args[1].get(w, l)), own.norm(in.args[2].get(w, l))
		if m["ftz"] {
			a, b = flush(true, a), flush(true, b)
		}
		p := f(a, b)
		q := !p
		if combine {
			c := in.args[3].get(w, l)&1 != 0
			with := func(v bool) bool {
				switch {
				case m["and"]:
					return v && c
				case m["or"]:
					return v || c
				}
				return v != c
			}
			p, q = with(p), with(q)
		}
		set := func(r int, v bool) {
			w.regs[r*32+l] = 0
			if v {
				w.regs[r*32+l] = 1
			}
		}
		set(in.args[0].reg, p)
		if in.args[0].second >= 0 {
			set(in.args[0].second, q)
		}
		return nil
	})
	return nil
}

// bf16of rounds to the nearest bfloat16, ties to even.
func bf16of(v uint64) uint64 {
	u := uint32(v)
	if u&0x7fffffff > 0x7f800000 {
		return 0x7fff
	}
	return uint64((u + 0x7fff + u>>16&1) >> 16)
}

func (in *instr) cvt(mods []string, s string) error {
	if len(mods) == 0 || s == "" {
		return errUnknown
	}
	d := mods[len(mods)-1]
	m, err := modifiers(mods[:len(mods)-1], "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat")
	if err != nil {
		return err
	}
	if d == "bf16x2" && s == "f32" && m["rn"] && len(m) == 1 { // the first source in the upper half
		in.run = each(func(w *warp, l int) error {
			w.regs[in.args[0].reg*32+l] = bf16of(in.args[1].get(w, l))<<16 | bf16of(in.args[2].get(w, l))
			return nil
		})
		return in.want(3)
	}
	f, from, to := convert(d, s, m), shapeOf(s), shapeOf(d)
	if f == nil {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		w.regs[in.args[0].reg*32+l] = to.norm(f(from.norm(in.args[1].get(w, l))))
		return nil
	})
	return in.want(2)
}

// convert gives the conversion from s to d, or nil.
func convert(d, s string, m map[string]bool) func(v uint64) uint64 {
	toFloat := func(v uint64) float64 { return f64(v) }
	if s == "f32" {
		toFloat = func(v uint64) float64 { return float64(f32(flush(m["ftz"], v))) }
	}
	whole := func(x float64) float64 {
		switch {
		case m["rni"]:
			return math.RoundToEven(x)
		case m["rzi"]:
			return math.Trunc(x)
		case m["rmi"]:
			return math.Floor(x)
		case m["rpi"]:
			return math.Ceil(x)
		}
		return x
	}
	isFloat := func(t string) bool { return t == "f32" || t == "f64" }
	switch {
	case d == "bf16" && s == "f32" && m["rn"]:
		return bf16of
	case d == "f32" && s == "bf16":
		return func(v uint64) uint64 { return v << 16 }
	case d == "bf16" || s == "bf16" || d == "f16" || s == "f16" || d[0] == 'b' || s[0] == 'b':
		return nil
	case isFloat(d) && isFloat(s):
		return func(v uint64) uint64 {
			x := whole(toFloat(v))
			if m["sat"] {
				if !(x > 0) {
					x = 0
				}
				x = min(x, 1)
			}
			if d == "f64" {
				return b64(x)
			}
			return flush(m["ftz"], b32(round32(x, mode(m))))
		}
	case isFloat(d): // of an integer: to the nearest
		if mode(m) != "rn" {
			return nil
		}
		return func(v uint64) uint64 {
			switch {
			case d == "f64" && s[0] == 's':
				return b64(float64(int64(v)))
			case d == "f64":
				return b64(float64(v))
			case s[0] == 's':
				return b32(float32(int64(v)))
			}
			return b32(float32(v))
		}
	case isFloat(s): // to an integer: the nearest that there is; NaN gives 0
		if !(m["rni"] || m["rzi"] || m["rmi"] || m["rpi"]) {
			return nil
		}
		bits := 8 * sizes[d]
		return func(v uint64) uint64 {
			x := whole(toFloat(v))
			if math.IsNaN(x) {
				return 0
			}
			if d[0] == 's' {
				if x >= math.Ldexp(1, bits-1) {
					return 1<<(bits-1) - 1
				}
				return uint64(int64(max(x, -math.Ldexp(1, bits-1))))
			}
			if x >= math.Ldexp(1, bits) {
				return math.MaxUint64 >> (64 - bits)
			}
			return uint64(max(x, 0))
		}
	case m["sat"]:
		return nil
	}
	return func(v uint64) uint64 { return v }
}

func (in *instr) atomic(mods []string, t string) error {
	own := shapeOf(t)
	space, op := "", ""
	for _, m := range mods {
		switch m {
		case "global", "shared":
			space = m
		case "add", "max", "min", "or", "and", "exch", "cas":
			op = m
		case "relaxed", "release", "acquire", "acq_rel", "gpu", "cta", "sys":
		default:
			return fmt.Errorf("unknown instruction: modifier %s", m)
		}
	}
	args, d := in.args, -1
	if in.op[0] == "atom" {
		d, args = in.args[0].reg, in.args[1:]
	}
	if op == "" || t == "" || len(args) != 2 && op != "cas" || op == "cas" && len(args) != 3 {
		return errUnknown
	}
	var f func(a, b, c uint64) uint64
	switch {
	case op == "exch":
		f = func(_, b, _ uint64) uint64 { return b }
	case op == "cas":
		f = func(a, b, c uint64) uint64 {
			if a == b {
				return c
			}
			return a
		}
	default:
		var err error
		if f, err = arithmetic(op, nil, t); err != nil {
			return err
		}
	}
	in.run = each(func(w *warp, l int) error {
		b, err := w.at(space, args[0].get(w, l), sizes[t], sizes[t], l)
		if err != nil {
			return err
		}
		old, c := own.norm(load(b)), uint64(0)
		if op == "cas" {
			c = own.norm(args[2].get(w, l))
		}
		store(b, f(old, own.norm(args[1].get(w, l)), c))
		if d >= 0 {
			w.regs[d*32+l] = old
		}
		return w.wrote(space, args[0].get(w, l), sizes[t], l)
	})
	return nil
}
