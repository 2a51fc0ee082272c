package ptx

import (
	"fmt"
	"slices"
)

// wgmma (section 9.7.15): the four warps of a warpgroup multiply 64×16 by 16×N. A product is issued, committed with others to a
// group and computed when a wait asks for the group: until then nobody may touch its registers or write what it reads. That is an
// error here, as is a product whose registers were touched after the last wgmma.fence.

// product is one wgmma.mma_async of a warp, its descriptors read.
type product struct {
	line       int
	d, a       []operand // a: registers, or none
	rows       []uint64  // of A in shared memory, of this warp: address of element (row, k) at 16·row + k
	cols       []uint64  // of B: address of element (k, col) at 16·col + k
	reads      [2][2]uint64
	accumulate bool
	sa, sb     float64 // 1 or -1
}

// issue is what the warps of a warpgroup do together, in the order of their program.
type issue struct {
	line                   int
	a, b, accumulate, regs uint64
}

// together4 says whether the warps of a warpgroup do the same, of which each comes here in its own time.
func (w *warp) together4(i issue) error {
	b := w.block
	if (w.index/4+1)*128 > b.threads { // warps after the last warpgroup may do other things
		return fmt.Errorf("warp %d of a block of %d threads is in no warpgroup", w.index, b.threads)
	}
	all := &b.issued[w.index/4]
	if n := w.issuedCount; n == len(*all) {
		*all = append(*all, i)
	} else if (*all)[n] != i {
		return fmt.Errorf("the warps of a warpgroup differ: line %d with operands %#x, and line %d with %#x", i.line, i, (*all)[n].line, (*all)[n])
	}
	w.issuedCount++
	return nil
}

// leaving checks a warp whose lanes exit.
func (w *warp) leaving() error {
	if len(w.products) > 0 {
		return fmt.Errorf("the warp leaves while the product of line %d is under way", w.products[0].line)
	}
	return nil
}

// finished checks a block whose threads have left.
func (b *block) finished() error {
	if len(b.async.copies) > 0 {
		return fmt.Errorf("block %v: the block ends while the copy of %s is under way", b.id, b.async.copies[0].where)
	}
	for _, w := range b.warps {
		if n := len(b.issued[w.index/4]); w.issuedCount != n {
			return fmt.Errorf("block %v: warp %d took part in %d of %d steps of its warpgroup", b.id, w.index, w.issuedCount, n)
		}
	}
	return nil
}

func wgmma(in *instr, _ []string, _ string) error {
	if len(in.op) < 4 || in.op[2] != "sync" || in.op[3] != "aligned" {
		return errUnknown
	}
	switch in.op[1] {
	case "fence":
		in.together(nil, func(w *warp, _ uint32) error {
			w.epoch++
			return w.together4(issue{line: in.line})
		})
		return in.want(0)
	case "commit_group":
		in.together(nil, func(w *warp, _ uint32) error {
			w.productGroups = append(w.productGroups, len(w.products))
			return w.together4(issue{line: in.line})
		})
		return in.want(0)
	case "wait_group":
		if len(in.args) != 1 || in.args[0].kind != immediate {
			return errUnknown
		}
		in.together(nil, func(w *warp, _ uint32) error {
			for len(w.productGroups) > int(in.args[0].value) {
				n := w.productGroups[0]
				for _, p := range w.products[:n] {
					if err := w.multiply(p); err != nil {
						return err
					}
				}
				w.products = w.products[n:]
				w.productGroups = w.productGroups[1:]
				for i := range w.productGroups {
					w.productGroups[i] -= n
				}
			}
			w.markBusy()
			return w.together4(issue{line: in.line})
		})
		return nil
	case "mma_async":
		return in.product()
	}
	return errUnknown
}

// markBusy collects the registers of products under way.
func (w *warp) markBusy() {
	clear(w.busy)
	for _, p := range w.products {
		for _, o := range slices.Concat(p.d, p.a) {
			w.busy[o.reg] = true
		}
	}
}

// product builds wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16: d, a-desc or {a0, …, a3}, b-desc, scale-d, imm-scale-a,
// imm-scale-b[, imm-trans-a], imm-trans-b.
func (in *instr) product() error {
	n := 0
	if len(in.op) != 8 || !slices.Equal(in.op[5:], []string{"f32", "bf16", "bf16"}) {
		return errUnknown
	}
	if _, err := fmt.Sscanf(in.op[4], "m64n%dk16", &n); err != nil || n < 8 || n > 256 || n%8 != 0 || in.op[4] != fmt.Sprintf("m64n%dk16", n) {
		return errUnknown
	}
	fromRegisters := len(in.args) > 1 && in.args[1].kind == vector
	want := 8
	if fromRegisters {
		want = 7
	}
	if err := in.want(want); err != nil {
		return err
	}
	d, a := vectorOf(in.args[0]), []operand(nil)
	if fromRegisters {
		if a = in.args[1].vec; len(a) != 4 {
			return fmt.Errorf("%d registers of A, not 4", len(a))
		}
	}
	if len(d) != n/2 {
		return fmt.Errorf("%d accumulators, not %d", len(d), n/2)
	}
	seen := map[int]bool{}
	for _, o := range slices.Concat(d, a) {
		if o.kind != register || o.neg || seen[o.reg] {
			return fmt.Errorf("%s is no register of its own", o.name)
		}
		seen[o.reg] = true
	}
	imm := [4]int64{} // scale a, scale b, trans a, trans b
	for i, o := range in.args[4:] {
		if o.kind != immediate {
			return errUnknown
		}
		if fromRegisters && i == 2 {
			i = 3
		}
		imm[i] = int64(o.value)
	}
	if imm[0]*imm[0] != 1 || imm[1]*imm[1] != 1 || imm[2]>>1 != 0 || imm[3]>>1 != 0 {
		return fmt.Errorf("scales of %d and %d, transpositions of %d and %d", imm[0], imm[1], imm[2], imm[3])
	}
	in.together(nil, func(w *warp, _ uint32) error {
		p := product{line: in.line, d: d, a: a, sa: float64(imm[0]), sb: float64(imm[1])}
		values := func(o *operand) (uint64, error) {
			v := o.get(w, 0)
			for l := range 32 {
				if o.get(w, l) != v {
					return 0, fmt.Errorf("%s is %#x in lane 0 and %#x in lane %d", o.name, v, o.get(w, l), l)
				}
			}
			return v, nil
		}
		i := issue{line: in.line}
		var err error
		if i.b, err = values(&in.args[2]); err != nil {
			return err
		}
		if i.accumulate, err = values(&in.args[3]); err != nil {
			return err
		}
		if i.accumulate > 1 {
			return fmt.Errorf("the predicate was never written")
		}
		p.accumulate = i.accumulate == 1
		if !fromRegisters {
			if i.a, err = values(&in.args[1]); err != nil {
				return err
			}
			first := w.index % 4 * 16 // rows of this warp
			if p.rows, p.reads[0], err = w.block.matrix(i.a, first, 16, imm[2] == 1); err != nil {
				return fmt.Errorf("A: %w", err)
			}
		}
		if p.cols, p.reads[1], err = w.block.matrix(i.b, 0, n, imm[3] == 1); err != nil {
			return fmt.Errorf("B: %w", err)
		}
		for j, o := range slices.Concat(d, a) {
			role := n
			if j >= len(d) {
				role = -1 // A, which several products may read
			}
			if w.touched[o.reg] >= w.epoch {
				return fmt.Errorf("no wgmma.fence between another access to %s and the product", o.name)
			}
			if w.busy[o.reg] && w.roles[o.reg] != role {
				return fmt.Errorf("%s belongs to a product under way, as another operand or of another shape", o.name)
			}
			w.roles[o.reg] = role
		}
		w.products = append(w.products, p)
		w.markBusy()
		return w.together4(i)
	})
	return nil
}

// matrix reads a descriptor (9.7.15.5.1.2.2) and gives the address of every element of rows first … first+n-1 of A or columns of
// B, 16 in k each, and the range that they lie in. Layouts are the canonical ones of 9.7.15.5.1.2.1.3 with T = 8.
func (b *block) matrix(desc uint64, first, n int, mnMajor bool) (at []uint64, span [2]uint64, err error) {
	const known = 0x3fff | 0x3fff<<16 | 0x3fff<<32 | 7<<49 | 3<<62
	start, lead, stride := desc&0x3fff<<4, int(desc>>16&0x3fff<<4), int(desc>>32&0x3fff<<4)
	if desc&^uint64(known) != 0 {
		return nil, span, fmt.Errorf("descriptor %#x has bits that mean nothing", desc)
	}
	atom := [4]int{16, 128, 64, 32}[desc>>62] // bytes of a row of the pattern
	swizzle := atom
	if desc>>62 == 0 {
		swizzle = 0
	}
	if desc>>49&7 != 0 {
		return nil, span, fmt.Errorf("descriptor %#x: base offsets are not known here", desc)
	}
	if start>>7&uint64(atom/16-1) != 0 {
		return nil, span, fmt.Errorf("descriptor %#x: a swizzle of %d bytes whose pattern begins at %#x, with no base offset", desc, swizzle, start)
	}
	if !mnMajor && swizzle != 0 && lead > 16 {
		return nil, span, fmt.Errorf("descriptor %#x: a leading offset of %d bytes, which this layout has not", desc, lead)
	}
	offset := func(i, k int) int { // i along M or N
		switch {
		case mnMajor && swizzle == 0:
			return i%8*2 + i/8*stride + k%8*16 + k/8*lead
		case mnMajor:
			return i%(atom/2)*2 + i/(atom/2)*lead + k%8*atom + k/8*stride
		case swizzle == 0:
			return i%8*16 + i/8*stride + k%8*2 + k/8*lead
		}
		return i%8*atom + i/8*stride + k*2
	}
	at = make([]uint64, 16*n)
	span[0] = 1 << 63
	for i := range n {
		for k := range 16 {
			p := swizzled(start+uint64(offset(first+i, k)), swizzle)
			at[16*i+k] = p
			if p%16 != 0 { // every chunk has a first element
				continue
			}
			span[0], span[1] = min(span[0], p), max(span[1], p+16)
			if _, err := b.warps[0].at("shared", p, 16, 16, 0); err != nil {
				return nil, span, err
			}
			if err := b.fenced(p, 16); err != nil {
				return nil, span, err
			}
		}
	}
	return at, span, nil
}

// multiply computes a product. Lane l of warp i holds of D and A, as of mma.m16n8k16, rows 16i + l/4 and + 8 (9.7.15.5.1.1.1).
func (w *warp) multiply(p product) error {
	element := func(at uint64) float64 { return float64(f32(load(w.block.shared(at, 2)) << 16)) }
	for _, r := range p.reads {
		if r[1] > r[0] {
			if err := w.block.underWay(r[0], int(r[1]-r[0])); err != nil {
				return fmt.Errorf("product of line %d: %w", p.line, err)
			}
		}
	}
	var A [16][16]float64
	if p.a == nil {
		for i := range A {
			for k := range A[i] {
				A[i][k] = p.sa * element(p.rows[16*i+k])
			}
		}
	}
	for i, o := range p.a {
		for l := range 32 {
			v := w.regs[o.reg*32+l]
			for h := range 2 {
				A[l/4+8*(i%2)][2*(l%4)+8*(i/2)+h] = p.sa * float64(f32(v>>(16*h)&0xffff<<16))
			}
		}
	}
	B := make([][16]float64, len(p.cols)/16)
	for i := range B {
		for k := range B[i] {
			B[i][k] = p.sb * element(p.cols[16*i+k])
		}
	}
	for j, o := range p.d {
		for l := range 32 {
			row, col, sum := &A[l/4+8*(j%4/2)], &B[j/4*8+2*(l%4)+j%2], 0.0
			for k := range row {
				sum += row[k] * col[k]
			}
			if r := &w.regs[o.reg*32+l]; p.accumulate {
				*r = b32(float32(sum + float64(f32(*r))))
			} else {
				*r = b32(float32(sum))
			}
		}
	}
	return nil
}

// setmaxnreg moves registers between warpgroups: an increase waits until the block has enough.
func setmaxnreg(in *instr, mods []string, t string) error {
	if len(mods) != 3 || mods[0] != "inc" && mods[0] != "dec" || mods[1] != "sync" || mods[2] != "aligned" || t != "u32" || len(in.args) != 1 || in.args[0].kind != immediate {
		return errUnknown
	}
	n := int(in.args[0].value)
	if n < 24 || n > 256 || n%8 != 0 {
		return fmt.Errorf("%d registers", n)
	}
	in.together(nil, func(w *warp, _ uint32) error {
		b := w.block
		used, most := 0, b.grid.k.registers(b)*len(b.warps)
		for _, o := range b.warps {
			if o != w {
				used += o.registers
			}
		}
		switch {
		case mods[0] == "dec" && n > w.registers || mods[0] == "inc" && n < w.registers:
			return fmt.Errorf("from %d to %d registers", w.registers, n)
		case used+n > most:
			for l := range 32 {
				w.bar[l] = anyBarrier
			}
			return errAsleep
		}
		w.registers = n
		b.wake(anyBarrier)
		return w.together4(issue{line: in.line, regs: uint64(n)})
	})
	return nil
}

// registers are those that a thread of the kernel may begin with: the multiprocessor's 65536 shared by the blocks of its bounds.
func (k *Kernel) registers(b *block) int {
	threads := max(k.maxThreads, b.threads) * max(k.minBlocks, 1)
	return min(65536/threads/8*8, 255)
}

// elect.sync d|p, mask: the lowest lane of the mask is the leader.
func elect(in *instr, mods []string, _ string) error {
	if len(mods) != 1 || mods[0] != "sync" || len(in.args) != 2 || in.args[0].second < 0 {
		return errUnknown
	}
	in.together(&in.args[1], func(w *warp, lanes uint32) error {
		leader := -1
		for l := range 32 {
			if lanes>>l&1 == 0 {
				continue
			}
			if leader < 0 {
				leader = l
			}
			w.regs[in.args[0].reg*32+l] = uint64(leader)
			w.regs[in.args[0].second*32+l] = 0
			if l == leader {
				w.regs[in.args[0].second*32+l] = 1
			}
		}
		return nil
	})
	return nil
}
