package ptx

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// wgmmaText is a kernel of one warpgroup: it copies an image into shared memory, multiplies once and stores its accumulators, thread
// by thread. A comes from shared memory or from registers.
func wgmmaText(n, words, transA, transB int, registers bool) string {
	list := func(prefix string, n int) string {
		var s []string
		for i := range n {
			s = append(s, fmt.Sprintf("%%%s%d", prefix, i))
		}
		return strings.Join(s, ",")
	}
	a, trans := "%rd5", fmt.Sprintf("%d,%d", transA, transB)
	if registers {
		a, trans = "{%a0,%a1,%a2,%a3}", fmt.Sprint(transB)
	}
	text := fmt.Sprintf(`.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.entry product(
	.param .u64 image,
	.param .u64 fragments,
	.param .u64 out,
	.param .u64 da,
	.param .u64 db
)
{
	.reg .b32 %%r<9>;
	mov.u32 %%r0, smem;
	mov.u32 %%r1, %%tid.x;
	mov.u32 %%r2, %%r1;
	ld.param.u64 %%rd1, [image];
LOOP:
	setp.ge.u32 %%p1, %%r2, %d;
	@%%p1 bra COPIED;
	mul.wide.u32 %%rd2, %%r2, 4;
	add.s64 %%rd3, %%rd1, %%rd2;
	ld.global.u32 %%r3, [%%rd3];
	shl.b32 %%r4, %%r2, 2;
	add.s32 %%r4, %%r4, %%r0;
	st.shared.u32 [%%r4], %%r3;
	add.s32 %%r2, %%r2, 128;
	bra LOOP;
COPIED:
	fence.proxy.async.shared::cta;
	bar.sync 0;
	shr.u32 %%r5, %%r0, 4;
	cvt.u64.u32 %%rd4, %%r5;
	ld.param.u64 %%rd5, [da];
	add.s64 %%rd5, %%rd5, %%rd4;
	ld.param.u64 %%rd6, [db];
	add.s64 %%rd6, %%rd6, %%rd4;
	ld.param.u64 %%rd7, [fragments];
	mul.wide.u32 %%rd8, %%r1, 16;
	add.s64 %%rd7, %%rd7, %%rd8;
	ld.global.v4.u32 {%%a0,%%a1,%%a2,%%a3}, [%%rd7];
	setp.ne.b32 %%p2, %%r1, %%r1;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n%dk16.f32.bf16.bf16 {%s},%s,%%rd6,%%p2,1,1,%s;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	ld.param.u64 %%rd9, [out];
	mul.wide.u32 %%rd10, %%r1, %d;
	add.s64 %%rd9, %%rd9, %%rd10;
`, words, n, list("f", n/2), a, trans, 2*n)
	for i := range n / 2 {
		text += fmt.Sprintf("\tst.global.f32 [%%rd9+%d], %%f%d;\n", 4*i, i)
	}
	return text + "\tret;\n}\n"
}

// smemLayout is a layout as the PTX ISA writes the canonical ones: shape and strides in elements of rows and of k, and the bits of the
// swizzle. k is 16.
type smemLayout struct {
	name            string
	shape, strides  []int // of M or N
	kShape, kStride [2]int
	swizzle         uint // Swizzle<swizzle, 4, 3> of byte addresses
	lead, stride    int  // bytes
	mode            uint64
	mn              int // 1: MN-major
}

// layouts: those MN-major are the examples of the PTX ISA for bf16 (9.7.15.5.1.2.1.3), for 128 bytes as its table continues them; those K-major
// are its table with T = 8. Every one is of 32 rows or more.
var layouts = []smemLayout{
	{"K, none", []int{8, 8}, []int{8, 160}, [2]int{8, 2}, [2]int{1, 72}, 0, 144, 320, 0, 0},
	{"K, 32 bytes", []int{8, 8}, []int{16, 128}, [2]int{8, 2}, [2]int{1, 8}, 1, 16, 256, 3, 0},
	{"K, 64 bytes", []int{8, 8}, []int{32, 256}, [2]int{8, 2}, [2]int{1, 8}, 2, 0, 512, 2, 0},
	{"K, 128 bytes", []int{8, 8}, []int{64, 512}, [2]int{8, 2}, [2]int{1, 8}, 3, 16, 1024, 1, 0},
	{"MN, none", []int{8, 1, 8}, []int{1, 8, 64}, [2]int{8, 2}, [2]int{8, 512}, 0, 1024, 128, 0, 1},
	{"MN, 32 bytes", []int{8, 2, 4}, []int{1, 8, 128}, [2]int{8, 2}, [2]int{16, 512}, 1, 256, 1024, 3, 1},
	{"MN, 64 bytes", []int{8, 4, 2}, []int{1, 8, 256}, [2]int{8, 2}, [2]int{32, 512}, 2, 512, 1024, 2, 1},
	{"MN, 128 bytes", []int{8, 8, 1}, []int{1, 8, 0}, [2]int{8, 2}, [2]int{64, 512}, 3, 16, 1024, 1, 1},
}

// at gives the byte where element (i, k) lies, from a start at a multiple of 1024.
func (l smemLayout) at(i, k int) int {
	e := k%8*l.kStride[0] + k/8*l.kStride[1]
	for j, n := range l.shape {
		e += i % n * l.strides[j]
		i /= n
	}
	b := uint(2 * e)
	return int(b ^ b>>3&((1<<l.swizzle-1)<<4))
}

func (l smemLayout) descriptor(offset int) uint64 {
	return uint64(offset>>4) | uint64(l.lead>>4)<<16 | uint64(l.stride>>4)<<32 | l.mode<<62
}

// checkProduct multiplies 64 × 16 by 16 × 64 with A and B in two layouts (A nil: in registers) and counts wrong sums.
func checkProduct(t *testing.T, a *smemLayout, b smemLayout, change func(string) string) (wrong int, err error) {
	t.Helper()
	const n, half = 64, 16 << 10
	r := rand.New(rand.NewPCG(7, 8))
	ab, af := small(r, 64*16)
	bb, bf := small(r, n*16)
	image := make([]byte, 2*half)
	var fragments []uint32
	descA := uint64(0)
	for i := range 64 {
		for k := range 16 {
			if a != nil {
				store(image[a.at(i, k):][:2], uint64(ab[16*i+k]))
			}
			store(image[half+b.at(i, k):][:2], uint64(bb[16*i+k]))
		}
	}
	transA := 0
	if a != nil {
		descA, transA = a.descriptor(0), a.mn
	}
	for thread := range 128 {
		row, col := thread/32*16+thread%32/4, thread%4*2
		for _, f := range [4][2]int{{row, col}, {row + 8, col}, {row, col + 8}, {row + 8, col + 8}} {
			fragments = append(fragments, uint32(ab[16*f[0]+f[1]])|uint32(ab[16*f[0]+f[1]+1])<<16)
		}
	}
	text := wgmmaText(n, len(image)/4, transA, b.mn, a == nil)
	if change != nil {
		was := text
		if text = change(text); text == was {
			t.Fatal("the change is none")
		}
	}
	k, err := parsed(t, text).Kernel("product")
	if err != nil {
		return 0, err
	}
	mem := &Memory{}
	at := mem.Alloc(len(image))
	to, err := mem.Bytes(at, len(image))
	if err != nil {
		t.Fatal(err)
	}
	copy(to, image)
	out := mem.Alloc(64 * n * 4)
	if err := k.Run(mem, Launch{Block: [3]int{128}, Shared: len(image), Args: []any{at, mem.U32(fragments), out, descA, b.descriptor(half)}}); err != nil {
		return 0, err
	}
	got := floats(t, mem, out, 64*n)
	for thread := range 128 {
		for j := range n / 2 {
			row, col, want := thread/32*16+thread%32/4+j%4/2*8, j/4*8+thread%4*2+j%2, float32(0)
			for k := range 16 {
				want += af[16*row+k] * bf[16*col+k]
			}
			if got[thread*n/2+j] != want {
				wrong++
			}
		}
	}
	return wrong, nil
}

// TestWgmma multiplies in every layout of a descriptor, A in shared memory and in registers.
func TestWgmma(t *testing.T) {
	for i, b := range layouts {
		a := layouts[(i+3)%len(layouts)]
		if wrong, err := checkProduct(t, &a, b, nil); err != nil || wrong != 0 {
			t.Errorf("A %s, B %s: %d wrong sums, %v", a.name, b.name, wrong, err)
		}
		if wrong, err := checkProduct(t, nil, b, nil); err != nil || wrong != 0 {
			t.Errorf("A in registers, B %s: %d wrong sums, %v", b.name, wrong, err)
		}
	}
}

// TestWgmmaMisuse breaks the kernel: each must be seen for what it is.
func TestWgmmaMisuse(t *testing.T) {
	replace := func(old, with string) func(string) string {
		return func(s string) string { return strings.Replace(s, old, with, 1) }
	}
	for _, c := range []struct {
		what      string
		registers bool
		change    func(string) string
		want      string
	}{
		{"stores that no fence shows to wgmma", false, replace("fence.proxy.async.shared::cta;", ""), "without fence.proxy.async"},
		{"no wgmma.fence", false, replace("wgmma.fence.sync.aligned;", ""), "no wgmma.fence"},
		{"A written after the fence", true, replace("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\nmov.u32 %a1, 0;"), "no wgmma.fence between another access to %a1"},
		{"an accumulator written after the fence", false, replace("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\nmov.f32 %f3, 0f00000000;"), "no wgmma.fence between another access to %f3"},
		{"an accumulator read before the wait", false, replace("wgmma.wait_group.sync.aligned 0;", "mov.f32 %f99, %f3;\nwgmma.wait_group.sync.aligned 0;"), "nobody waited for"},
		{"A changed before the wait", true, replace("wgmma.wait_group.sync.aligned 0;", "mov.u32 %a2, 0;\nwgmma.wait_group.sync.aligned 0;"), "nobody waited for"},
		{"a wait that leaves a group", false, replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"), "nobody waited for"},
		{"no commit", false, replace("wgmma.commit_group.sync.aligned;", ""), "nobody waited for"},
		{"a store into what is being read", false, replace("wgmma.commit_group.sync.aligned;", "wgmma.commit_group.sync.aligned;\nst.shared.u32 [%r0+64], %r1;"), "read by a product under way"},
		{"a warp that takes no part", false, replace("wgmma.fence.sync.aligned;", "setp.ge.u32 %p3, %r1, 96;\n@%p3 ret;\nwgmma.fence.sync.aligned;"), "took part in 0 of 4"},
		{"half a warp", false, replace("wgmma.fence.sync.aligned;", "setp.ge.u32 %p3, %r1, 112;\n@%p3 ret;\nwgmma.fence.sync.aligned;"), "have left"},
		{"warps with other operands", false, replace("shr.u32 %r5, %r0, 4;", "shr.u32 %r5, %r1, 5;\nshr.u32 %r6, %r0, 4;\nadd.s32 %r5, %r5, %r6;"), "the warps of a warpgroup differ"},
		{"lanes with other operands", false, replace("shr.u32 %r5, %r0, 4;", "and.b32 %r5, %r1, 1;\nshr.u32 %r6, %r0, 4;\nadd.s32 %r5, %r5, %r6;"), "in lane 0"},
		{"a bit without meaning", false, replace("ld.param.u64 %rd6, [db];", "ld.param.u64 %rd6, [db];\nadd.s64 %rd6, %rd6, 16384;"), "bits that mean nothing"},
		{"a base offset", false, replace("ld.param.u64 %rd6, [db];", "ld.param.u64 %rd6, [db];\nor.b64 %rd6, %rd6, 562949953421312;"), "base offsets"},
		{"a pattern that begins in its second row", false, replace("add.s64 %rd6, %rd6, %rd4;", "add.s64 %rd6, %rd6, %rd4;\nadd.s64 %rd6, %rd6, 8;"), "whose pattern begins"},
		{"a tile outside", false, replace("add.s64 %rd6, %rd6, %rd4;", "add.s64 %rd6, %rd6, %rd4;\nadd.s64 %rd6, %rd6, 1024;"), "outside its"},
		{"an accumulator twice", false, replace("%f5,", "%f4,"), "no register of its own"},
		{"a shape that does not exist", false, replace("m64n64k16", "m64n60k16"), "unknown instruction"},
		{"another type", false, replace("f32.bf16.bf16", "f32.f16.f16"), "unknown instruction"},
	} {
		a := &layouts[3]
		if c.registers {
			a = nil
		}
		wrong, err := checkProduct(t, a, layouts[3], c.change)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %d wrong sums, %v", c.what, wrong, err)
		}
	}
}

const tmaText = `.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.entry tile(
	.param .align 64 .b8 map[128],
	.param .u64 out,
	.param .u32 x,
	.param .u32 y,
	.param .u32 z,
	.param .u32 bytes
)
{
	mov.u32 %r0, smem;
	add.s32 %r9, %r0, 8192;
	mov.u32 %r1, %tid.x;
	setp.ne.u32 %p1, %r1, 0;
	@%p1 bra ALL;
	mbarrier.init.shared::cta.b64 [%r9], 1;
	fence.mbarrier_init.release.cluster;
	ld.param.u32 %r2, [x];
	ld.param.u32 %r3, [y];
	ld.param.u32 %r4, [z];
	ld.param.u32 %r5, [bytes];
	mov.b64 %rd1, map;
	cvta.param.u64 %rd2, %rd1;
	prefetch.tensormap [%rd2];
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], %r5;
	cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0],[%rd2,{%r2,%r3,%r4}],[%r9];
ALL:
	bar.sync 0;
	{
	.reg .pred p;
WAIT:
	mbarrier.try_wait.parity.shared::cta.b64 p, [%r9], 0;
	@!p bra WAIT;
	}
	ld.param.u64 %rd3, [out];
	shl.b32 %r6, %r1, 4;
	cvt.u64.u32 %rd4, %r6;
	add.s64 %rd3, %rd3, %rd4;
	add.s32 %r7, %r0, %r6;
	ld.shared.v4.u32 {%r10,%r11,%r12,%r13}, [%r7];
	st.global.v4.u32 [%rd3], {%r10,%r11,%r12,%r13};
	ret;
}
`

// checkTile brings a box of a tensor of 3 × 5 × 72 words of 16 bits and counts wrong words.
func checkTile(t *testing.T, swizzle, inner int, at [3]int, change func(string) string) (wrong int, err error) {
	t.Helper()
	dims, box := [3]int{72, 5, 3}, [3]int{inner, 4, 2} // innermost first
	mem := &Memory{}
	base := mem.Alloc(160 * 15)
	src, err := mem.Bytes(base, 160*15)
	if err != nil {
		t.Fatal(err)
	}
	value := func(x, y, z int) uint64 { return uint64(1 + x + 100*y + 1000*z) }
	for z := range 3 {
		for y := range 5 {
			for x := range 72 {
				store(src[160*(5*z+y)+2*x:][:2], value(x, y, z))
			}
		}
	}
	m := encode(t, TensorMap{Base: base, Elem: 2, Dims: []uint64{72, 5, 3}, Strides: []uint64{160, 800}, Box: box[:], Swizzle: swizzle})
	size := 2 * box[0] * box[1] * box[2]
	out := mem.Alloc(size)
	text := tmaText
	if change != nil {
		if text = change(text); text == tmaText {
			t.Fatal("the change is none")
		}
	}
	k, err := parsed(t, text).Kernel("tile")
	if err != nil {
		return 0, err
	}
	if err := k.Run(mem, Launch{Block: [3]int{size / 16}, Shared: 8200, Args: []any{m, out, int32(at[0]), int32(at[1]), int32(at[2]), int32(size)}}); err != nil {
		return 0, err
	}
	got, err := mem.Bytes(out, size)
	if err != nil {
		t.Fatal(err)
	}
	for z := range box[2] {
		for y := range box[1] {
			for x := range box[0] {
				row, want := y+box[1]*z, uint64(0)
				// Chunks of 16 bytes of a row are exchanged: by its number in rows of 128 bytes, by half of it and a quarter in shorter ones.
				chunk := map[int]int{0: x / 8, 32: x/8 ^ row/4%2, 64: x/8 ^ row/2%4, 128: x/8 ^ row%8}[swizzle]
				g := [3]int{at[0] + x, at[1] + y, at[2] + z}
				if min(g[0], g[1], g[2]) >= 0 && g[0] < dims[0] && g[1] < dims[1] && g[2] < dims[2] {
					want = value(g[0], g[1], g[2])
				}
				if load(got[2*(row*box[0]+8*chunk+x%8):][:2]) != want {
					wrong++
				}
			}
		}
	}
	return wrong, nil
}

// TestTMA brings boxes that lie inside, and such as hang over every edge, by every swizzle.
func TestTMA(t *testing.T) {
	for _, swizzle := range []int{0, 32, 64, 128} {
		inner := 24
		if swizzle > 0 {
			inner = swizzle / 2
		}
		for _, at := range [][3]int{{8, 1, 0}, {60, 3, 2}, {-5, -2, -1}, {71, 4, 1}, {100, 0, 0}} {
			if wrong, err := checkTile(t, swizzle, inner, at, nil); err != nil || wrong != 0 {
				t.Errorf("swizzle %d at %v: %d wrong words, %v", swizzle, at, wrong, err)
			}
		}
	}
}

func TestTMAMisuse(t *testing.T) {
	const wait, arrive = "\t@!p bra WAIT;\n", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], %r5;"
	for _, c := range []struct{ what, old, with, want string }{
		{"no wait", wait, "", "target of a copy under way"},
		{"nobody looks", "\tmbarrier.try_wait.parity.shared::cta.b64 p, [%r9], 0;\n" + wait, "", "target of a copy under way"},
		{"a wait for the phase before", "[%r9], 0;", "[%r9], 1;", "target of a copy under way"},
		{"a parity of 2", "[%r9], 0;", "[%r9], 2;", "a parity of 2"},
		{"no fence after the initialisation", "fence.mbarrier_init.release.cluster;", "", "no fence between"},
		{"16 bytes too few", arrive, "add.s32 %r5, %r5, -16;\n" + arrive, "more have come"},
		{"16 bytes too many", arrive, "add.s32 %r5, %r5, 16;\n" + arrive, "lacks 0 arrivals and 16 bytes"},
		{"no arrival", arrive, "", "lacks 1 arrivals"},
		{"two arrivals for one", arrive, arrive + "\n" + arrive, "1 arrivals where 0 are pending"},
		{"no initialisation", "mbarrier.init.shared::cta.b64 [%r9], 1;", "", "no mbarrier was initialised"},
		{"two initialisations", "mbarrier.init.shared::cta.b64 [%r9], 1;", "mbarrier.init.shared::cta.b64 [%r9], 1;\nmbarrier.init.shared::cta.b64 [%r9], 1;", "initialised before"},
		{"a store over the mbarrier", "ALL:", "st.shared.u32 [%r9+4], %r1;\nALL:", "part of an mbarrier"},
		{"a target that is not aligned", "[%r0],[%rd2", "[%r0+128],[%rd2", "no multiple of 1024"},
		{"no map", "cvta.param.u64 %rd2, %rd1;", "ld.param.u64 %rd2, [out];", "no tensor map"},
		{"a map of other dimensions", "3d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0],[%rd2,{%r2,%r3,%r4}]", "2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0],[%rd2,{%r2,%r3}]", "a map of 3 dimensions"},
		{"an unknown form", "global.mbarrier", "global.multicast::cluster.mbarrier", "unknown instruction"},
		{"a store that no fence shows to TMA", "\tmbarrier.arrive.expect_tx", "\tst.shared.u32 [%r0+32], %r1;\n\tmbarrier.arrive.expect_tx", "without fence.proxy.async"},
		{"a block that ends while it comes", "\tbar.sync 0;", "\tret;", "ends while the copy"},
	} {
		wrong, err := checkTile(t, 128, 64, [3]int{8, 1, 0}, func(s string) string { return strings.Replace(s, c.old, c.with, 1) })
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %d wrong words, %v", c.what, wrong, err)
		}
	}
	for _, m := range []TensorMap{
		{Base: 8, Elem: 2, Dims: []uint64{64}, Box: []int{64}},
		{Elem: 2, Dims: []uint64{64, 2}, Strides: []uint64{136}, Box: []int{64, 2}},
		{Elem: 2, Dims: []uint64{64}, Box: []int{257}},
		{Elem: 2, Dims: []uint64{64}, Box: []int{20}},
		{Elem: 2, Dims: []uint64{0}, Box: []int{64}},
		{Elem: 2, Dims: []uint64{64}, Box: []int{128}, Swizzle: 128},
		{Elem: 3, Dims: []uint64{64}, Box: []int{64}},
	} {
		if _, err := m.Encode(); err == nil {
			t.Errorf("%+v was encoded", m)
		}
	}
}

// TestParities sees a lane that falls two phases behind an mbarrier.
func TestParities(t *testing.T) {
	w := &warp{block: &block{threads: 32, grid: &grid{k: &Kernel{}}}, regs: make([]uint64, 96)}
	w.block.warps = []*warp{w}
	m := &mbarrier{count: 1, pending: 1, next: map[int]int{}}
	w.block.async.barriers = map[uint64]*mbarrier{64: m}
	in := &instr{args: []operand{{kind: register}, {kind: immediate, value: 64}, {kind: immediate}}}
	wait := func(parity uint64) (bool, error) {
		in.args[2].value = parity
		err := in.wait(w, 1, false)
		return w.regs[0] == 1, err
	}
	for i, step := range []struct {
		arrivals int
		parity   uint64
		done     bool
		fails    bool
	}{{0, 1, true, false}, {0, 0, false, false}, {1, 0, true, false}, {0, 0, true, false}, {1, 1, true, false}, {3, 0, true, true}} {
		for range step.arrivals {
			if err := w.block.arrive(64, m, 1); err != nil {
				t.Fatal(err)
			}
		}
		if done, err := wait(step.parity); done != step.done && !step.fails || (err != nil) != step.fails {
			t.Errorf("step %d: %v, %v", i, done, err)
		}
	}
}
