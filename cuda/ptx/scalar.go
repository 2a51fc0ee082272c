package ptx

import (
	"fmt"
	"math"
	"math/bits"
)

// get reads an operand of a lane.
func (o *operand) get(w *warp, lane int) uint64 {
	switch o.kind {
	case register:
		v := w.regs[o.reg*32+lane]
		if o.neg {
			v ^= 1
		}
		return v
	case special:
		return w.special(o.name, lane)
	case address:
		if o.reg >= 0 {
			return w.regs[o.reg*32+lane] + o.value
		}
	}
	return o.value
}

func (w *warp) special(name string, lane int) uint64 {
	g := w.block.grid
	axis := 0
	if n := len(name); name[n-2] == '.' {
		axis, name = int(name[n-1]-'x'), name[:n-2]
	}
	t := w.index*32 + lane
	d := g.launch.Block
	switch name {
	case "%tid":
		return uint64([3]int{t % d[0], t / d[0] % d[1], t / (d[0] * d[1])}[axis])
	case "%ntid":
		return uint64(d[axis])
	case "%ctaid":
		return uint64(w.block.id[axis])
	case "%nctaid":
		return uint64(g.launch.Grid[axis])
	case "%laneid":
		return uint64(lane)
	case "%warpid":
		return uint64(w.index)
	case "%lanemask_lt":
		return uint64(1)<<lane - 1
	}
	return uint64(g.steps * max(g.launch.StepTime, 1)) // %globaltimer, %clock64: time is counted in steps
}

// shape says how a type lies in a register: norm brings bits to it, sign or zero extended.
type shape struct {
	unused uint8 // upper bits
	signed bool
}

func shapeOf(t string) shape {
	switch {
	case t == "pred":
		return shape{unused: 63}
	case sizes[t] == 0:
		return shape{}
	}
	return shape{uint8(64 - 8*sizes[t]), t[0] == 's'}
}

func (s shape) norm(v uint64) uint64 {
	if s.signed {
		return uint64(int64(v<<s.unused) >> s.unused)
	}
	return v << s.unused >> s.unused
}

var errUnknown = fmt.Errorf("unknown instruction")

// modifiers takes the allowed ones out of mods; the rest must be empty.
func modifiers(mods []string, allowed ...string) (map[string]bool, error) {
	got := map[string]bool{}
next:
	for _, m := range mods {
		for _, a := range allowed {
			if m == a {
				got[m] = true
				continue next
			}
		}
		return nil, fmt.Errorf("unknown instruction: modifier %s", m)
	}
	return got, nil
}

func flush(on bool, v uint64) uint64 {
	if on && v&0x7f800000 == 0 {
		return v & 0x80000000
	}
	return v
}

// fma64 is a·b + c of float32 rounded to odd in 53 bits: rounding it once more gives the exact operation's rounding.
func fmaOdd(a, b, c float32) float64 {
	p, q := float64(a)*float64(b), float64(c)
	s := p + q
	if math.IsInf(s, 0) || math.IsNaN(s) {
		return s
	}
	// Twice rounded is once rounded, unless the bits that float32 drops are those of a tie, or the number is subnormal there.
	if u := math.Float64bits(s); u&(1<<29-1) != 1<<28 && u>>52&0x7ff > 1023-126 && u&(1<<29-1) != 0 {
		return s
	}
	t := s - p
	e := (p - (s - t)) + (q - t)
	if e != 0 && math.Float64bits(s)&1 == 0 {
		if (e > 0) == (s > 0) {
			return math.Float64frombits(math.Float64bits(s) + 1)
		}
		return math.Float64frombits(math.Float64bits(s) - 1)
	}
	return s
}

// round32 rounds to float32 in the direction rn, rz, rm or rp.
func round32(x float64, mode string) float32 {
	r := float32(x)
	if mode == "rn" || math.IsNaN(x) || float64(r) == x {
		return r
	}
	down := mode == "rm" || mode == "rz" && x > 0
	if down && float64(r) > x {
		return math.Nextafter32(r, float32(math.Inf(-1)))
	}
	if !down && float64(r) < x {
		return math.Nextafter32(r, float32(math.Inf(1)))
	}
	return r
}

func mode(m map[string]bool) string {
	for _, r := range []string{"rz", "rm", "rp"} {
		if m[r] {
			return r
		}
	}
	return "rn"
}

// arithmetic gives the function of an instruction with one result, up to three operands already brought to their type.
func arithmetic(op string, mods []string, t string) (func(a, b, c uint64) uint64, error) {
	switch t {
	case "f32":
		return float(op, mods)
	case "f64":
		return double(op, mods)
	}
	return integer(op, mods, t)
}

// floatModifiers are those that f32 instructions may have.
var floatModifiers = map[string][]string{
	"add": {"rn", "rz", "rm", "rp", "ftz", "sat"}, "sub": {"rn", "rz", "rm", "rp", "ftz", "sat"}, "mul": {"rn", "rz", "rm", "rp", "ftz", "sat"},
	"fma": {"rn", "rz", "rm", "rp", "ftz", "sat"}, "abs": {"ftz"}, "neg": {"ftz"}, "min": {"ftz"}, "max": {"ftz"},
	"div": {"rn", "approx", "full", "ftz"}, "rcp": {"rn", "approx", "ftz"}, "sqrt": {"rn", "approx", "ftz"},
	"rsqrt": {"approx", "ftz"}, "ex2": {"approx", "ftz"}, "lg2": {"approx", "ftz"}, "sin": {"approx", "ftz"}, "cos": {"approx", "ftz"}, "tanh": {"approx"},
}

func float(op string, mods []string) (func(a, b, c uint64) uint64, error) {
	m, err := modifiers(mods, floatModifiers[op]...)
	if err != nil {
		return nil, err
	}
	r, ftz, sat := mode(m), m["ftz"], m["sat"]
	exact := func(f func(a, b, c float32) float64) func(a, b, c uint64) uint64 {
		return func(a, b, c uint64) uint64 {
			v := round32(f(f32(flush(ftz, a)), f32(flush(ftz, b)), f32(flush(ftz, c))), r)
			if sat {
				if !(v > 0) {
					v = 0
				}
				v = min(v, 1)
			}
			return flush(ftz, b32(v))
		}
	}
	switch op {
	case "add":
		return exact(func(a, b, _ float32) float64 { return fmaOdd(a, 1, b) }), nil
	case "sub":
		return exact(func(a, b, _ float32) float64 { return fmaOdd(a, 1, -b) }), nil
	case "mul":
		return exact(func(a, b, _ float32) float64 { return float64(a) * float64(b) }), nil
	case "fma":
		return exact(fmaOdd), nil
	case "abs":
		return func(a, _, _ uint64) uint64 { return flush(ftz, a&0x7fffffff) }, nil
	case "neg":
		return func(a, _, _ uint64) uint64 { return flush(ftz, a^0x80000000) }, nil
	case "copysign": // the sign of a on b
		return func(a, b, _ uint64) uint64 { return a&0x80000000 | b&0x7fffffff }, nil
	case "min", "max":
		return exact(func(a, b, _ float32) float64 {
			switch {
			case a != a:
				return float64(b)
			case b != b:
				return float64(a)
			case op == "min":
				return math.Min(float64(a), float64(b))
			}
			return math.Max(float64(a), float64(b))
		}), nil
	}
	if r != "rn" { // quotients and roots of 53 bits round twice without harm to the nearest only
		return nil, errUnknown
	}
	switch op {
	case "div":
		return exact(func(a, b, _ float32) float64 { return float64(a) / float64(b) }), nil
	case "rcp":
		return exact(func(a, _, _ float32) float64 { return 1 / float64(a) }), nil
	case "sqrt":
		return exact(func(a, _, _ float32) float64 { return math.Sqrt(float64(a)) }), nil
	}
	if !m["approx"] {
		return nil, errUnknown
	}
	switch op {
	case "rsqrt":
		return exact(func(a, _, _ float32) float64 { return 1 / math.Sqrt(float64(a)) }), nil
	case "ex2":
		return exact(func(a, _, _ float32) float64 { return math.Exp2(float64(a)) }), nil
	case "lg2":
		return exact(func(a, _, _ float32) float64 { return math.Log2(float64(a)) }), nil
	case "sin":
		return exact(func(a, _, _ float32) float64 { return math.Sin(float64(a)) }), nil
	case "cos":
		return exact(func(a, _, _ float32) float64 { return math.Cos(float64(a)) }), nil
	case "tanh":
		return exact(func(a, _, _ float32) float64 { return math.Tanh(float64(a)) }), nil
	}
	return nil, errUnknown
}

func double(op string, mods []string) (func(a, b, c uint64) uint64, error) {
	if op == "rcp" && len(mods) == 2 && mods[0] == "approx" && mods[1] == "ftz" {
		return roughReciprocal, nil
	}
	if _, err := modifiers(mods, "rn"); err != nil {
		return nil, err
	}
	f := map[string]func(a, b, c float64) float64{
		"add": func(a, b, _ float64) float64 { return a + b }, "sub": func(a, b, _ float64) float64 { return a - b },
		"mul": func(a, b, _ float64) float64 { return a * b }, "div": func(a, b, _ float64) float64 { return a / b },
		"fma": math.FMA, "neg": func(a, _, _ float64) float64 { return -a }, "abs": func(a, _, _ float64) float64 { return math.Abs(a) },
		"sqrt": func(a, _, _ float64) float64 { return math.Sqrt(a) }, "rcp": func(a, _, _ float64) float64 { return 1 / a },
	}[op]
	if f == nil {
		return nil, errUnknown
	}
	return func(a, b, c uint64) uint64 { return b64(f(f64(a), f64(b), f64(c))) }, nil
}

// roughReciprocal is rcp.approx.ftz.f64: of the upper 32 bits of a, as many bits of the result, the others zero. A seed of iterations.
func roughReciprocal(a, _, _ uint64) uint64 {
	flushed := func(v uint64) uint64 {
		if v&0x7ff0000000000000 == 0 {
			return v & (1 << 63)
		}
		return v
	}
	const upper = math.MaxUint32 << 32
	return flushed(b64(1/f64(flushed(a)&upper)) & upper)
}

func integer(op string, mods []string, t string) (func(a, b, c uint64) uint64, error) {
	signed := t[0] == 's'
	width := uint64(8 * sizes[t])
	if op == "mul" || op == "mad" {
		m, err := modifiers(mods, "lo", "hi", "wide")
		if err != nil || len(m) != 1 {
			return nil, errUnknown
		}
		product := func(a, b uint64) uint64 { return a * b }
		if m["hi"] && width == 64 {
			product = func(a, b uint64) uint64 {
				hi, _ := bits.Mul64(a, b)
				if signed {
					hi -= a*(b>>63) + b*(a>>63)
				}
				return hi
			}
		} else if m["hi"] && signed {
			product = func(a, b uint64) uint64 { return uint64(int64(a*b) >> width) }
		} else if m["hi"] {
			product = func(a, b uint64) uint64 { return a * b >> width }
		}
		if op == "mul" {
			return func(a, b, _ uint64) uint64 { return product(a, b) }, nil
		}
		return func(a, b, c uint64) uint64 { return product(a, b) + c }, nil
	}
	if op == "bfind" && len(mods) == 1 && mods[0] == "shiftamt" && !signed { // how far to the left the highest bit can go
		return func(a, _, _ uint64) uint64 {
			if a == 0 {
				return math.MaxUint32
			}
			return uint64(bits.LeadingZeros64(a)) - (64 - width)
		}, nil
	}
	if len(mods) != 0 {
		return nil, fmt.Errorf("unknown instruction: modifiers %v", mods)
	}
	less := func(a, b uint64) bool { return a < b }
	if signed {
		less = func(a, b uint64) bool { return int64(a) < int64(b) }
	}
	switch op {
	case "add":
		return func(a, b, _ uint64) uint64 { return a + b }, nil
	case "sub":
		return func(a, b, _ uint64) uint64 { return a - b }, nil
	case "neg":
		return func(a, _, _ uint64) uint64 { return -a }, nil
	case "abs":
		return func(a, _, _ uint64) uint64 { return uint64(max(int64(a), -int64(a))) }, nil
	case "min":
		return func(a, b, _ uint64) uint64 {
			if less(b, a) {
				return b
			}
			return a
		}, nil
	case "max":
		return func(a, b, _ uint64) uint64 {
			if less(a, b) {
				return b
			}
			return a
		}, nil
	case "div", "rem":
		return func(a, b, _ uint64) uint64 {
			if b == 0 { // unspecified by PTX; all ones here
				return math.MaxUint64
			}
			switch {
			case signed && op == "div":
				return uint64(int64(a) / int64(b))
			case signed:
				return uint64(int64(a) % int64(b))
			case op == "div":
				return a / b
			}
			return a % b
		}, nil
	case "and":
		return func(a, b, _ uint64) uint64 { return a & b }, nil
	case "or":
		return func(a, b, _ uint64) uint64 { return a | b }, nil
	case "xor":
		return func(a, b, _ uint64) uint64 { return a ^ b }, nil
	case "not":
		return func(a, _, _ uint64) uint64 { return ^a }, nil
	case "shl":
		return func(a, b, _ uint64) uint64 { return a << min(b, 64) }, nil
	case "shr":
		if signed {
			return func(a, b, _ uint64) uint64 { return uint64(int64(a) >> min(b, 63)) }, nil
		}
		return func(a, b, _ uint64) uint64 { return a >> min(b, 64) }, nil
	case "popc":
		return func(a, _, _ uint64) uint64 { return uint64(bits.OnesCount64(a)) }, nil
	case "clz":
		return func(a, _, _ uint64) uint64 { return uint64(bits.LeadingZeros64(a)) - (64 - width) }, nil
	case "brev":
		return func(a, _, _ uint64) uint64 { return bits.Reverse64(a) >> (64 - width) }, nil
	case "prmt":
		return func(a, b, c uint64) uint64 {
			all, r := b<<32|a, uint64(0)
			for i := range 4 {
				s := c >> (4 * i)
				v := all >> (8 * (s & 7)) & 0xff
				if s&8 != 0 {
					v = uint64(int64(int8(v))>>7) & 0xff
				}
				r |= v << (8 * i)
			}
			return r
		}, nil
	case "bfe":
		if signed {
			return nil, errUnknown
		}
		return func(a, b, c uint64) uint64 { return a >> min(b&0xff, 64) & (1<<min(c&0xff, 64) - 1) }, nil
	}
	return nil, errUnknown
}
