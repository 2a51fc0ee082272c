package ptx

import (
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"sync"
)

// Module is one file of PTX: the text of its kernels, which are parsed when first launched.
type Module struct {
	lines   []string
	entries map[string][2]int // name → first line of its header, and the line after its body (both from 0)
	dynamic map[string]bool   // extern shared arrays
	mu      sync.Mutex
	kernels map[string]*Kernel
}

// Kernel is a parsed entry.
type Kernel struct {
	Name   string
	params []param
	code   []*instr
	regs   int
	bytes  int  // of parameters
	local  int  // bytes of local memory of a thread
	shared int  // bytes of static shared memory
	async  bool // uses what only sm_90a has

	dynamic               uint64 // address of dynamic shared memory in its space; static arrays lie below
	maxThreads, minBlocks int    // launch bounds; 0: none
}

type param struct {
	name   string
	offset int
	size   int
}

type operandKind int

const (
	register operandKind = iota
	immediate
	special
	address // [base + offset], or a symbol without brackets
	vector
	label
)

type operand struct {
	kind   operandKind
	reg    int    // register, or base of an address (-1: none)
	value  uint64 // immediate, offset
	neg    bool   // !%p
	name   string
	vec    []operand
	second int // p|q: register q, or -1
}

type instr struct {
	line    int // from 1
	text    string
	op      []string // "ld", "global", "f32"
	args    []operand
	guard   int // predicate register, or -1
	unless  bool
	target  int   // of bra
	table   []int // of brx.idx
	run     func(w *warp, lanes uint32) error
	all     bool  // run waits for all lanes of its mask
	touches []int // registers that run reads or writes at once
}

// Parse reads a module. Kernels are looked at more closely when they are launched.
func Parse(text string) (*Module, error) {
	m := &Module{lines: strings.Split(text, "\n"), entries: map[string][2]int{}, dynamic: map[string]bool{}, kernels: map[string]*Kernel{}}
	for i := 0; i < len(m.lines); i++ {
		line := strings.TrimSpace(m.lines[i])
		switch {
		case strings.HasPrefix(line, ".extern .shared"):
			f := strings.Fields(strings.TrimSuffix(line, ";"))
			m.dynamic[strings.TrimSuffix(f[len(f)-1], "[]")] = true
		case strings.Contains(line, ".entry "):
			name := line[strings.Index(line, ".entry ")+7:]
			name = strings.TrimSpace(strings.TrimRight(name, "( )"))
			from, depth := i, 0
			for ; i < len(m.lines); i++ { // inner blocks are indented by nvcc, and not by cuobjdump
				code, _, _ := strings.Cut(m.lines[i], "//")
				depth += strings.Count(code, "{") - strings.Count(code, "}")
				if depth == 0 && strings.Contains(code, "}") {
					break
				}
			}
			if i == len(m.lines) {
				return nil, fmt.Errorf("ptx: line %d: kernel %s has no end", from+1, name)
			}
			m.entries[name] = [2]int{from, i + 1}
		case line == "" || strings.HasPrefix(line, "//") || strings.HasPrefix(line, ".version") || strings.HasPrefix(line, ".target") ||
			strings.HasPrefix(line, ".address_size"):
		default:
			return nil, fmt.Errorf("ptx: line %d: not known outside a kernel: %s", i+1, line)
		}
	}
	return m, nil
}

// Kernels gives the names of all entries, sorted.
func (m *Module) Kernels() []string {
	var names []string
	for n := range m.entries {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// Kernel parses the only entry whose name contains every part.
func (m *Module) Kernel(parts ...string) (*Kernel, error) {
	var found []string
next:
	for _, n := range m.Kernels() {
		for _, p := range parts {
			if !strings.Contains(n, p) {
				continue next
			}
		}
		found = append(found, n)
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("ptx: %d kernels have %q in their names, not one: %v", len(found), parts, found)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if k := m.kernels[found[0]]; k != nil {
		return k, nil
	}
	k, err := m.parse(found[0])
	if err != nil {
		return nil, err
	}
	m.kernels[k.Name] = k
	return k, nil
}

var sizes = map[string]int{"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
	"b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1}

// body is what is known while a kernel is parsed.
type body struct {
	*Kernel
	m       *Module
	names   map[string]int    // registers
	symbols map[string]uint64 // shared and local arrays, as addresses in their spaces
	labels  map[string]int
	tables  map[string][]string
	scoped  map[string]bool // registers whose names are no %name: those of inline assembly
}

func (m *Module) parse(name string) (*Kernel, error) {
	k := &body{Kernel: &Kernel{Name: name}, m: m, names: map[string]int{}, symbols: map[string]uint64{}, labels: map[string]int{}, tables: map[string][]string{},
		scoped: map[string]bool{}}
	span := m.entries[name]
	i := span[0] + 1
	for ; i < span[1] && strings.TrimSpace(m.lines[i]) != "{"; i++ {
		line := strings.TrimRight(strings.TrimSpace(m.lines[i]), ",")
		if strings.HasPrefix(line, ".param") {
			if err := k.param(line); err != nil {
				return nil, fmt.Errorf("ptx: %s, line %d: %w", name, i+1, err)
			}
			continue
		}
		f := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == ',' || r == '\t' })
		var n [3]int
		for j := 1; j < len(f) && j <= 3; j++ {
			n[j-1], _ = strconv.Atoi(f[j])
		}
		switch {
		case line == "" || line == ")":
		case f[0] == ".maxntid":
			k.maxThreads = n[0] * max(n[1], 1) * max(n[2], 1)
		case f[0] == ".minnctapersm":
			k.minBlocks = n[0]
		default:
			return nil, fmt.Errorf("ptx: %s, line %d: not known before a kernel's body: %s", name, i+1, line)
		}
	}
	statement, first := "", 0
	for i++; i < span[1]-1; i++ {
		line := m.lines[i]
		if c := strings.Index(line, "//"); c >= 0 {
			line = line[:c]
		}
		line = strings.TrimSpace(line)
		if statement == "" && (line == "" || line == "{" || line == "}") {
			continue
		}
		if strings.HasSuffix(line, ":") && statement == "" {
			k.labels[strings.TrimSuffix(line, ":")] = len(k.code)
			continue
		}
		if statement == "" {
			first = i + 1
		}
		statement += " " + line
		for {
			end := strings.IndexByte(statement, ';')
			if end < 0 {
				break
			}
			if s := strings.Trim(statement[:end], " \t{"); s != "" {
				if err := k.statement(s, first); err != nil {
					return nil, fmt.Errorf("ptx: %s, line %d: %s: %w", name, first, s, err)
				}
			}
			statement = strings.Trim(statement[end+1:], " \t}")
		}
	}
	k.dynamic = uint64(k.shared+1023)/1024*1024 + 1024 // sm_90 keeps the first KiB
	for _, in := range k.code {
		if err := k.link(in); err != nil {
			return nil, fmt.Errorf("ptx: %s, line %d: %s: %w", name, in.line, in.text, err)
		}
	}
	for _, in := range k.code {
		if in.touches = in.registers(); in.op[0] == "wgmma" {
			in.touches = nil // says itself what it does
		}
		k.async = k.async || in.op[0] == "wgmma" || in.op[0] == "mbarrier" || in.op[0] == "setmaxnreg"
	}
	k.regs = len(k.names)
	return k.Kernel, nil
}

// param: ".param .u64 name" or ".param .align 8 .b8 name[104]".
func (k *body) param(line string) error {
	f := strings.Fields(line)
	size, align, count := 0, 0, 1
	for i := 1; i < len(f)-1; i++ {
		t := strings.TrimPrefix(f[i], ".")
		if t == "align" {
			align, _ = strconv.Atoi(f[i+1])
			i++
		} else if s, ok := sizes[t]; ok {
			size = s
		} else if t != "ptr" && t != "global" {
			return fmt.Errorf("parameter of unknown type %s", f[i])
		}
	}
	name := f[len(f)-1]
	if b := strings.IndexByte(name, '['); b >= 0 {
		n, err := strconv.Atoi(strings.TrimSuffix(name[b+1:], "]"))
		if err != nil {
			return err
		}
		name, count = name[:b], n
	}
	if size == 0 {
		return fmt.Errorf("parameter without a type: %s", line)
	}
	align = max(align, size)
	k.bytes = (k.bytes + align - 1) / align * align
	k.params = append(k.params, param{name, k.bytes, size * count})
	k.bytes += size * count
	return nil
}

func (k *body) statement(s string, line int) error {
	switch f := strings.Fields(s); {
	case strings.HasPrefix(f[0], ".reg"):
		if name := f[len(f)-1]; name[0] != '%' {
			k.scoped[name] = true
		}
		return nil
	case strings.HasPrefix(f[0], ".pragma"):
		return nil
	case f[0] == ".local" || f[0] == ".shared":
		align, _ := strconv.Atoi(f[2])
		name := f[len(f)-1]
		b := strings.IndexByte(name, '[')
		if len(f) != 5 || f[1] != ".align" || f[3] != ".b8" || b < 0 || align < 1 {
			return fmt.Errorf("not an array of bytes")
		}
		n, err := strconv.Atoi(strings.TrimSuffix(name[b+1:], "]"))
		if err != nil {
			return err
		}
		used := &k.local
		if f[0] == ".shared" {
			used = &k.shared
		}
		at := (*used + align - 1) / align * align
		k.symbols[name[:b]] = uint64(at)
		*used = at + n
		return nil
	}
	if c := strings.Index(s, ": .branchtargets"); c >= 0 {
		k.tables[strings.TrimSpace(s[:c])] = splitArgs(s[c+len(": .branchtargets"):])
		return nil
	}
	in := &instr{line: line, text: s, guard: -1, target: -1}
	if s[0] == '@' {
		sp := strings.IndexAny(s, " \t")
		guard := s[1:sp]
		in.unless = guard[0] == '!'
		in.guard = k.reg(strings.TrimPrefix(guard, "!"))
		s = strings.TrimSpace(s[sp:])
	}
	op, rest := s, ""
	if sp := strings.IndexAny(s, " \t"); sp >= 0 {
		op, rest = s[:sp], s[sp:]
	}
	in.op = strings.Split(op, ".")
	for _, a := range splitArgs(rest) {
		o, err := k.operand(a)
		if err != nil {
			return err
		}
		in.args = append(in.args, o)
	}
	k.code = append(k.code, in)
	return nil
}

// splitArgs splits at commas outside brackets.
func splitArgs(s string) []string {
	var out []string
	depth, from := 0, 0
	for i, c := range s {
		switch c {
		case '{', '[', '(':
			depth++
		case '}', ']', ')':
			depth--
		case ',':
			if depth == 0 {
				out = append(out, strings.TrimSpace(s[from:i]))
				from = i + 1
			}
		}
	}
	if last := strings.TrimSpace(s[from:]); last != "" {
		out = append(out, last)
	}
	return out
}

func (k *body) reg(name string) int {
	if name == "_" {
		name = "%_sink"
	}
	r, ok := k.names[name]
	if !ok {
		r = len(k.names)
		k.names[name] = r
	}
	return r
}

func (k *body) operand(s string) (operand, error) {
	o := operand{name: s, reg: -1, second: -1}
	switch {
	case s[0] == '{':
		o.kind = vector
		for _, a := range splitArgs(s[1 : len(s)-1]) {
			e, err := k.operand(a)
			if err != nil {
				return o, err
			}
			o.vec = append(o.vec, e)
		}
		return o, nil
	case s[0] == '[':
		o.kind = address
		base, offset := strings.TrimSpace(s[1:len(s)-1]), ""
		if parts := splitArgs(base); len(parts) == 2 { // of a tensor: [map, {x, y}]
			e, err := k.operand(parts[1])
			if err != nil || e.kind != vector {
				return o, fmt.Errorf("%s is no address", s)
			}
			base, o.vec = parts[0], e.vec
		}
		if p := strings.IndexByte(base, '+'); p >= 0 {
			base, offset = base[:p], base[p+1:]
		}
		if offset != "" {
			v, err := strconv.ParseInt(offset, 0, 64)
			if err != nil {
				return o, err
			}
			o.value = uint64(v)
		}
		o.name = base
		if base[0] == '%' && !isSpecial(base) {
			o.reg = k.reg(base)
		}
		return o, nil
	case s[0] == '!':
		o.neg = true
		o.reg = k.reg(s[1:])
		return o, nil
	case isSpecial(s):
		o.kind = special
		return o, nil
	case s[0] == '%' || s == "_" || strings.HasPrefix(s, "_|") || k.scoped[s]:
		if p, q, ok := strings.Cut(s, "|"); ok {
			o.reg, o.second = k.reg(p), k.reg(q)
		} else {
			o.reg = k.reg(s)
		}
		return o, nil
	case strings.HasPrefix(s, "0f") || strings.HasPrefix(s, "0d"):
		o.kind = immediate
		v, err := strconv.ParseUint(s[2:], 16, 64)
		o.value = v
		return o, err
	case s[0] >= '0' && s[0] <= '9' || s[0] == '-':
		o.kind = immediate
		if v, err := strconv.ParseInt(strings.TrimSuffix(s, "U"), 0, 64); err == nil {
			o.value = uint64(v)
			return o, nil
		}
		v, err := strconv.ParseUint(strings.TrimSuffix(s, "U"), 0, 64)
		o.value = v
		return o, err
	}
	o.kind = label // or a symbol: link says
	return o, nil
}

var specials = map[string]bool{"%tid": true, "%ntid": true, "%ctaid": true, "%nctaid": true, "%laneid": true, "%warpid": true, "%globaltimer": true,
	"%clock64": true, "%lanemask_lt": true, "%SP": false}

func isSpecial(s string) bool { return specials[strings.SplitN(s, ".", 2)[0]] }

// link resolves symbols and labels and builds what the instruction does.
func (k *body) link(in *instr) error {
	for i := range in.args {
		o := &in.args[i]
		if o.kind != label && (o.kind != address || o.reg >= 0) {
			continue
		}
		if at, ok := k.labels[o.name]; ok && in.op[0] == "bra" {
			in.target = at
			continue
		}
		if t, ok := k.tables[o.name]; ok && in.op[0] == "brx" {
			for _, l := range t {
				at, ok := k.labels[l]
				if !ok {
					return fmt.Errorf("no label %s", l)
				}
				in.table = append(in.table, at)
			}
			continue
		}
		at, ok := k.symbols[o.name]
		if !ok && k.m.dynamic[o.name] {
			at, ok = k.dynamic, true
		}
		for _, p := range k.params {
			if p.name == o.name {
				at, ok = uint64(p.offset), true
			}
		}
		if !ok {
			if v, err := strconv.ParseUint(o.name, 0, 64); err == nil && o.kind == address {
				at, ok = v, true
			}
		}
		if !ok {
			return fmt.Errorf("no symbol or label %s", o.name)
		}
		if o.kind == label {
			o.kind = immediate
		}
		o.value += at
	}
	return build(in)
}

// registers are all that an instruction names.
func (in *instr) registers() []int {
	var out []int
	var add func(o *operand)
	add = func(o *operand) {
		if o.kind == register || o.kind == address && o.reg >= 0 {
			out = append(out, o.reg)
		}
		if o.second >= 0 {
			out = append(out, o.second)
		}
		for i := range o.vec {
			add(&o.vec[i])
		}
	}
	for i := range in.args {
		add(&in.args[i])
	}
	if in.guard >= 0 {
		out = append(out, in.guard)
	}
	return out
}

func f32(bits uint64) float32 { return math.Float32frombits(uint32(bits)) }
func b32(f float32) uint64    { return uint64(math.Float32bits(f)) }
func f64(bits uint64) float64 { return math.Float64frombits(bits) }
func b64(f float64) uint64    { return math.Float64bits(f) }
