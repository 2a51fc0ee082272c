package ptx

import (
	"encoding/binary"
	"fmt"
	"math"
)

// What sm_90a adds to memory: mbarriers, copies of tiles by the tensor memory accelerator (TMA), and the proxy through which TMA and
// wgmma see shared memory. Section numbers are of the PTX ISA 9.0.

// asyncState is what a block knows about its shared memory beside its bytes.
type asyncState struct {
	barriers map[uint64]*mbarrier // by shared address
	low, up  uint64               // of all barriers
	copies   []bulkCopy           // under way, oldest first
	writers  []uint32             // of each byte: thread+1 of the last ordinary write, and its count of proxy fences << 16
}

// mbarrier is an object of section 9.7.13.15: a phase ends when no arrival is pending and all bytes expected have come.
type mbarrier struct {
	count, pending int
	bytes          int64 // expected and not come
	phase          int   // phases that ended
	maker          int   // thread that initialised it
	published      bool  // to the asynchronous proxy
	next           map[int]int
}

// bulkCopy is a tile that TMA brings: it is read and written only when nothing else in the block can go on.
type bulkCopy struct {
	tile    TensorMap
	coords  []int64
	dst     uint64
	size    int
	barrier uint64
	where   string
}

// errAsleep makes lanes wait until an mbarrier's phase ends or registers come free.
var errAsleep = fmt.Errorf("asleep")

const anyBarrier = -1 // what a lane waits for that waits for registers

func (b *block) thread(w *warp, lane int) int { return w.index*32 + lane }

// wake lets the lanes run that wait for an mbarrier.
func (b *block) wake(what int) {
	for _, w := range b.warps {
		for l := range 32 {
			if w.state[l] == sleeping && w.bar[l] == what {
				w.state[l] = running
			}
		}
	}
}

// barrierAt finds an mbarrier that was initialised.
func (b *block) barrierAt(at uint64) (*mbarrier, error) {
	if m := b.async.barriers[at]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("no mbarrier was initialised at shared address %#x", at)
}

// settle ends the phase when it is over.
func (b *block) settle(at uint64, m *mbarrier) error {
	if m.pending == 0 && m.bytes < 0 {
		return fmt.Errorf("mbarrier %#x: %d bytes more have come than its phase expects", at, -m.bytes)
	}
	if m.bytes > 1<<20-1 || m.bytes < -(1<<20-1) {
		return fmt.Errorf("mbarrier %#x: a count of %d bytes", at, m.bytes)
	}
	if m.pending == 0 && m.bytes == 0 {
		m.phase++
		m.pending = m.count
		b.wake(int(at))
	}
	return nil
}

func (b *block) arrive(at uint64, m *mbarrier, n int) error {
	if n < 1 || n > m.pending {
		return fmt.Errorf("mbarrier %#x: %d arrivals where %d are pending", at, n, m.pending)
	}
	m.pending -= n
	return b.settle(at, m)
}

// mbarrierOp builds init, inval, arrive, expect_tx, test_wait and try_wait. Tokens of phases are not known: waits name a parity.
func mbarrierOp(in *instr, mods []string, t string) error {
	if len(mods) == 0 || t != "b64" && mods[0] != "expect_tx" {
		return errUnknown
	}
	what := mods[0]
	m, err := modifiers(mods[1:], "expect_tx", "parity", "shared::cta", "shared", "release", "acquire", "relaxed", "cta", "cluster")
	if err != nil {
		return err
	}
	if what == "try_wait" || what == "test_wait" {
		if !m["parity"] || len(in.args) != 3 && !(what == "try_wait" && len(in.args) == 4) {
			return errUnknown
		}
		in.run = func(w *warp, lanes uint32) error { return in.wait(w, lanes, what == "try_wait") }
		return nil
	}
	args := in.args
	if what == "arrive" {
		if len(args) == 0 || args[0].name != "_" {
			return fmt.Errorf("unknown instruction: an arrival whose token is used")
		}
		args = args[1:]
	}
	if n := len(args); n == 0 || args[0].kind != address || m["parity"] {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		at, b := args[0].get(w, l), w.block
		if what == "init" {
			return b.initBarrier(at, int64(int32(args[1].get(w, l))), b.thread(w, l))
		}
		bar, err := b.barrierAt(at)
		if err != nil {
			return err
		}
		n := 1
		switch {
		case what == "inval":
			delete(b.async.barriers, at)
			return nil
		case what == "expect_tx" || m["expect_tx"]:
			bar.bytes += int64(uint32(args[1].get(w, l)))
			if what == "expect_tx" {
				return b.settle(at, bar)
			}
		case len(args) == 2:
			n = int(uint32(args[1].get(w, l)))
		}
		return b.arrive(at, bar, n)
	})
	want := map[string]int{"init": 2, "inval": 1, "expect_tx": 2, "arrive": 1}[what]
	if m["expect_tx"] {
		want = 2
	}
	if want == 0 || len(args) != want && !(what == "arrive" && len(args) == 2) {
		return errUnknown
	}
	return nil
}

func (b *block) initBarrier(at uint64, count int64, thread int) error {
	a := &b.async
	if at%8 != 0 || count < 1 || count > 1<<20-1 {
		return fmt.Errorf("an mbarrier at %#x for %d arrivals", at, count)
	}
	if a.barriers[at] != nil {
		return fmt.Errorf("mbarrier %#x was initialised before", at)
	}
	w := b.warps[thread/32]
	if _, err := w.at("shared", at, 8, 8, thread%32); err != nil {
		return err
	}
	if a.barriers == nil {
		a.barriers, a.low = map[uint64]*mbarrier{}, math.MaxUint64
	}
	a.low, a.up = min(a.low, at), max(a.up, at+8)
	a.barriers[at] = &mbarrier{count: int(count), pending: int(count), maker: thread, next: map[int]int{}}
	return nil
}

// wait tells lanes whether the phase of a parity has ended. PTX lets it fail at any time; here it fails once, then sleeps. A parity
// means the phase that runs or the one before it: a lane that waits must not be a phase further behind.
func (in *instr) wait(w *warp, lanes uint32, sleeps bool) error {
	var done, failed uint32
	for l := range 32 {
		if lanes>>l&1 == 0 {
			continue
		}
		at, parity := in.args[1].get(w, l), in.args[2].get(w, l)&math.MaxUint32
		m, err := w.block.barrierAt(at)
		if err != nil {
			return err
		}
		if parity > 1 {
			return fmt.Errorf("lane %d: a parity of %d", l, parity)
		}
		if uint64(m.phase&1) == parity {
			failed |= 1 << l
			w.bar[l] = int(at)
			continue
		}
		done |= 1 << l
		thread := w.block.thread(w, l)
		phase := m.next[thread]
		if uint64(phase&1) != parity {
			phase-- // it has waited for this one before, or the barrier is new
		}
		if phase < m.phase-1 {
			return fmt.Errorf("lane %d waits for phase %d of mbarrier %#x, which is in phase %d: the parity is that of another", l, phase, at, m.phase)
		}
		m.next[thread] = phase + 1
	}
	again := w.tried&failed == failed
	if sleeps && done == 0 && again {
		w.tried = 0
		return errAsleep
	}
	w.tried = failed
	w.yields = failed != 0 && (again || !sleeps)
	for l := range 32 {
		if lanes>>l&1 != 0 {
			w.regs[in.args[0].reg*32+l] = uint64(done >> l & 1)
		}
	}
	return nil
}

// fenceOf builds membar and fence. Memory of one proxy is in order here; fences of others are kept account of.
func fenceOf(in *instr, mods []string) error {
	switch {
	case len(mods) > 0 && mods[0] == "mbarrier_init":
		if len(mods) != 3 || mods[1] != "release" || mods[2] != "cluster" {
			return errUnknown
		}
		in.run = each(func(w *warp, l int) error { w.publish(l); return nil })
	case len(mods) > 1 && mods[0] == "proxy" && mods[1] == "async":
		m, err := modifiers(mods[2:], "shared::cta", "shared::cluster", "global")
		if err != nil {
			return err
		}
		in.run = each(func(w *warp, l int) error {
			if !m["global"] {
				w.fences[l]++
				w.publish(l)
			}
			return nil
		})
	default:
		if _, err := modifiers(mods, "gl", "cta", "sys", "gpu", "acq_rel", "sc"); err != nil {
			return err
		}
		in.run = func(*warp, uint32) error { return nil }
	}
	return in.want(0)
}

// publish makes the mbarriers that a lane initialised known to TMA.
func (w *warp) publish(lane int) {
	for _, m := range w.block.async.barriers {
		if m.maker == w.block.thread(w, lane) {
			m.published = true
		}
	}
}

// touch checks an ordinary access of shared memory against what TMA and wgmma are doing. Writes are remembered: the
// asynchronous proxy must not see them before a fence of the thread.
func (b *block) touch(at uint64, n int, write bool, thread int) error {
	a := &b.async
	if at < a.up && at+uint64(n) > a.low {
		for s := at &^ 7; s < at+uint64(n); s += 8 {
			if a.barriers[s] != nil {
				return fmt.Errorf("shared address %#x is part of an mbarrier", s)
			}
		}
	}
	if err := b.underWay(at, n); err != nil {
		return err
	}
	if !write || !b.grid.k.async {
		return nil
	}
	if err := b.read(at, n); err != nil {
		return err
	}
	if a.writers == nil {
		a.writers = make([]uint32, b.grid.k.dynamic+uint64(len(b.dynamic)))
	}
	mark := uint32(thread+1) | uint32(b.warps[thread/32].fences[thread%32])<<16
	for i := at; i < at+uint64(n); i++ {
		a.writers[i] = mark
	}
	return nil
}

// underWay is an error where a copy that was not waited for will write.
func (b *block) underWay(at uint64, n int) error {
	for _, c := range b.async.copies {
		if at < c.dst+uint64(c.size) && c.dst < at+uint64(n) {
			return fmt.Errorf("shared address %#x (%d bytes) is the target of a copy under way (%s)", at, n, c.where)
		}
	}
	return nil
}

// read is an error where a product under way reads.
func (b *block) read(at uint64, n int) error {
	for _, w := range b.warps {
		for _, p := range w.products {
			for _, r := range p.reads {
				if at < r[1] && r[0] < at+uint64(n) {
					return fmt.Errorf("shared address %#x (%d bytes) is read by a product under way (line %d)", at, n, p.line)
				}
			}
		}
	}
	return nil
}

// fenced is an error where an ordinary write was not followed by fence.proxy.async of its thread.
func (b *block) fenced(at uint64, n int) error {
	w := b.async.writers
	for i := at; w != nil && i < at+uint64(n); i++ {
		if t := int(w[i]&0xffff) - 1; t >= 0 && b.warps[t/32].fences[t%32] == uint16(w[i]>>16) {
			return fmt.Errorf("shared address %#x was written by thread %d without fence.proxy.async", i, t)
		}
	}
	return nil
}

// TensorMap describes a tensor to TMA, with what cuTensorMapEncodeTiled takes: the innermost dimension first, no interleave, element
// strides of 1, zeros outside.
type TensorMap struct {
	Base    uint64
	Elem    int      // bytes of an element
	Dims    []uint64 // elements
	Strides []uint64 // bytes from the second dimension on
	Box     []int    // elements
	Swizzle int      // bytes: 0, 32, 64, 128
}

const mapMagic = 0x70616d726f736e74 // NVIDIA's 128 bytes are not documented; these are ours

// Check says what the driver would refuse (cuTensorMapEncodeTiled of the driver's manual).
func (m TensorMap) Check() error {
	rank := len(m.Dims)
	if rank < 1 || rank > 5 || len(m.Strides) != rank-1 || len(m.Box) != rank {
		return fmt.Errorf("tensor map: %d dimensions, %d strides, a box of %d", rank, len(m.Strides), len(m.Box))
	}
	if m.Base%16 != 0 {
		return fmt.Errorf("tensor map: address %#x is no multiple of 16", m.Base)
	}
	if m.Elem != 1 && m.Elem != 2 && m.Elem != 4 && m.Elem != 8 {
		return fmt.Errorf("tensor map: elements of %d bytes", m.Elem)
	}
	for i, d := range m.Dims {
		if d < 1 || d > 1<<32 || m.Box[i] < 1 || m.Box[i] > 256 {
			return fmt.Errorf("tensor map: dimension %d of %d elements, %d in the box", i, d, m.Box[i])
		}
	}
	for i, s := range m.Strides {
		if s%16 != 0 || s >= 1<<40 {
			return fmt.Errorf("tensor map: stride %d of %d bytes", i, s)
		}
	}
	inner := m.Box[0] * m.Elem
	if inner%16 != 0 || m.Swizzle != 0 && m.Swizzle != 32 && m.Swizzle != 64 && m.Swizzle != 128 {
		return fmt.Errorf("tensor map: rows of %d bytes with a swizzle of %d", inner, m.Swizzle)
	}
	if m.Swizzle != 0 && inner != m.Swizzle { // the driver allows shorter rows; where their bytes lie is not documented well enough
		return fmt.Errorf("tensor map: rows of %d bytes with a swizzle of %d are not known", inner, m.Swizzle)
	}
	return nil
}

// Encode gives the 128 bytes that a kernel takes as CUtensorMap.
func (m TensorMap) Encode() ([]byte, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	v := [16]uint64{mapMagic, m.Base, uint64(m.Elem), uint64(len(m.Dims)), uint64(m.Swizzle)}
	for i := range m.Dims {
		v[5+i] = m.Dims[i]<<16 | uint64(m.Box[i])
	}
	copy(v[10:], m.Strides)
	return binary.Append(nil, binary.LittleEndian, v)
}

func decodeMap(b []byte) (m TensorMap, err error) {
	var v [16]uint64
	if _, err := binary.Decode(b, binary.LittleEndian, &v); err != nil || v[0] != mapMagic || v[3] < 1 || v[3] > 5 {
		return m, fmt.Errorf("no tensor map is there")
	}
	m = TensorMap{Base: v[1], Elem: int(v[2]), Swizzle: int(v[4]), Strides: append([]uint64(nil), v[10:10+v[3]-1]...)}
	for _, d := range v[5 : 5+v[3]] {
		m.Dims, m.Box = append(m.Dims, d>>16), append(m.Box, int(d&0xffff))
	}
	return m, m.Check()
}

// tensorMapAt reads a map by its generic address.
func (w *warp) tensorMapAt(at uint64, lane int) (TensorMap, error) {
	b, err := w.at("", at, 128, 64, lane)
	if err != nil {
		return TensorMap{}, err
	}
	return decodeMap(b)
}

func prefetch(in *instr, mods []string, _ string) error {
	if len(mods) != 1 || mods[0] != "tensormap" {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		_, err := w.tensorMapAt(in.args[0].get(w, l), l)
		return err
	})
	return in.want(1)
}

// bulkTensor is cp.async.bulk.tensor from global to shared memory (9.7.9.27.5): [dst], [map, {x, y, …}], [mbarrier].
func bulkTensor(in *instr) error {
	m, err := modifiers(in.op[3:], "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cta", "shared::cluster", "global", "tile", "mbarrier::complete_tx::bytes")
	if err != nil {
		return err
	}
	rank := 0
	for i, s := range []string{"1d", "2d", "3d", "4d", "5d"} {
		if m[s] {
			rank = i + 1
		}
	}
	into := m["shared::cta"] || m["shared::cluster"] // a block of no cluster has the same addresses in both
	if rank == 0 || !into || !m["global"] || !m["mbarrier::complete_tx::bytes"] || len(in.args) != 3 || len(in.args[1].vec) != rank {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		b := w.block
		tile, err := w.tensorMapAt(in.args[1].get(w, l), l)
		if err != nil {
			return err
		}
		if len(tile.Dims) != rank {
			return fmt.Errorf("a map of %d dimensions", len(tile.Dims))
		}
		c := bulkCopy{tile: tile, dst: in.args[0].get(w, l), size: tile.Elem, barrier: in.args[2].get(w, l), where: fmt.Sprintf("line %d", in.line)}
		for i, x := range in.args[1].vec {
			c.coords = append(c.coords, int64(int32(x.get(w, l))))
			c.size *= tile.Box[i]
		}
		bar, err := b.barrierAt(c.barrier)
		if err != nil {
			return err
		}
		if !bar.published {
			return fmt.Errorf("mbarrier %#x: no fence between its initialisation and TMA", c.barrier)
		}
		// The pattern of a swizzle begins where its period does.
		align := max(128, 8*tile.Swizzle)
		if c.dst%uint64(align) != 0 {
			return fmt.Errorf("shared address %#x is no multiple of %d", c.dst, align)
		}
		if _, err := w.at("shared", c.dst, c.size, 16, l); err != nil {
			return err
		}
		for _, check := range []func(uint64, int) error{b.read, b.fenced} {
			if err := check(c.dst, c.size); err != nil {
				return err
			}
		}
		b.async.copies = append(b.async.copies, c)
		copy(b.shared(c.dst, c.size), b.grid.poison(c.size)) // until it has come
		return nil
	})
	return nil
}

// shared gives bytes that at has found before.
func (b *block) shared(at uint64, n int) []byte {
	if d := b.grid.k.dynamic; at >= d {
		return b.dynamic[at-d : at-d+uint64(n)]
	}
	return b.static[at : at+uint64(n)]
}

// swizzled moves bits 4 to 6 of an address by bits 7 to 9 (5.5.6): chunks of 16 bytes change places in rows of so many bytes.
func swizzled(at uint64, bytes int) uint64 {
	if bytes == 0 {
		return at
	}
	return at ^ at>>7&uint64(bytes/16-1)<<4
}

// complete brings the newest copy under way of a block: the order of copies is not defined, and this is not that of waits.
func (b *block) complete() (bool, error) {
	n := len(b.async.copies)
	if n == 0 {
		return false, nil
	}
	c := b.async.copies[n-1]
	b.async.copies = b.async.copies[:n-1]
	fail := func(err error) (bool, error) { return true, fmt.Errorf("block %v, copy of %s: %w", b.id, c.where, err) }
	t, inner := c.tile, c.tile.Box[0]*c.tile.Elem
	for row := range c.size / inner {
		line, from, in, rest := make([]byte, inner), t.Base, true, row
		for i := 1; i < len(t.Dims); i++ {
			x := c.coords[i] + int64(rest%t.Box[i])
			rest /= t.Box[i]
			in = in && x >= 0 && uint64(x) < t.Dims[i]
			from += uint64(x) * t.Strides[i-1]
		}
		first, last := max(c.coords[0], 0), min(c.coords[0]+int64(t.Box[0]), int64(t.Dims[0]))
		if in && first < last {
			src, err := b.grid.mem.Bytes(from+uint64(first)*uint64(t.Elem), int(last-first)*t.Elem)
			if err != nil {
				return fail(err)
			}
			copy(line[int(first-c.coords[0])*t.Elem:], src)
		}
		for i := 0; i < inner; i += 16 {
			copy(b.shared(swizzled(c.dst+uint64(row*inner+i), t.Swizzle), 16), line[i:i+16])
		}
	}
	m, err := b.barrierAt(c.barrier)
	if err != nil {
		return fail(err)
	}
	m.bytes -= int64(c.size)
	if err := b.settle(c.barrier, m); err != nil {
		return fail(err)
	}
	return true, nil
}
