package ptx

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
)

// Launch describes one launch.
type Launch struct {
	Grid, Block [3]int // 0 counts as 1
	Shared      int    // bytes of dynamic shared memory
	Cooperative bool   // all blocks take turns, in place of one after the other
	Args        []any  // uint32, int32, float32, uint64, int64, float64, or []byte for a struct
	Poison      byte   // of new shared memory and of the targets of copies under way; 0: 0xff
	MaxSteps    int    // of all warps together; 0: 2^28
	StepTime    int    // nanoseconds of a step for those who look at a clock; 0: 1
}

type grid struct {
	k      *Kernel
	mem    *Memory
	params []byte
	launch Launch
	steps  int
}

type block struct {
	grid            *grid
	id              [3]int
	static, dynamic []byte
	warps           []*warp
	threads         int
	arrived         map[int]int // barrier → threads
	async           asyncState
	issued          [][]issue // by warpgroup
}

type laneState int

const (
	running  laneState = iota
	waiting            // at a collective: others of its mask have not come
	barred             // at a barrier of the block
	sleeping           // at an mbarrier, or for registers
	exited
)

type copyAsync struct {
	dst   uint64
	src   uint64
	size  int
	bytes int // read; the rest is zero
}

type warp struct {
	block  *block
	index  int
	regs   []uint64 // reg·32 + lane
	pc     [32]int
	state  [32]laneState
	bar    [32]int // what a barred or sleeping lane waits for
	local  [32][]byte
	yields bool              // its turn is over
	issued [32][]copyAsync   // of no group yet
	groups [32][][]copyAsync // committed, oldest first

	// Of sm_90a.
	tried         uint32     // lanes whose last wait for an mbarrier failed
	fences        [32]uint16 // of the asynchronous proxy
	registers     int        // of a thread
	products      []product  // under way, oldest first
	productGroups []int      // committed groups, oldest first: how many products lie before their end
	issuedCount   int
	epoch         int    // wgmma.fence so far
	touched       []int  // register → epoch of the last ordinary access
	busy          []bool // register → part of a product under way
	roles         []int  // register → N of the product whose accumulator it is, -1 in A
}

// Run launches a kernel on mem. What goes wrong is an error with kernel, line, block and thread.
func (k *Kernel) Run(mem *Memory, l Launch) error {
	for i := range 3 {
		l.Grid[i], l.Block[i] = max(l.Grid[i], 1), max(l.Block[i], 1)
	}
	if l.MaxSteps == 0 {
		l.MaxSteps = 1 << 28
	}
	g := &grid{k: k, mem: mem, launch: l}
	if err := g.arguments(); err != nil {
		return fmt.Errorf("ptx: %s: %w", k.Name, err)
	}
	var blocks []*block
	for z := range l.Grid[2] {
		for y := range l.Grid[1] {
			for x := range l.Grid[0] {
				blocks = append(blocks, g.newBlock([3]int{x, y, z}))
				if l.Cooperative {
					continue
				}
				if err := run(blocks); err != nil {
					return fmt.Errorf("ptx: %s: %w", k.Name, err)
				}
				blocks = nil
			}
		}
	}
	if err := run(blocks); err != nil {
		return fmt.Errorf("ptx: %s: %w", k.Name, err)
	}
	return nil
}

func (g *grid) arguments() error {
	if len(g.launch.Args) != len(g.k.params) {
		return fmt.Errorf("%d arguments for %d parameters", len(g.launch.Args), len(g.k.params))
	}
	g.params = make([]byte, g.k.bytes)
	for i, a := range g.launch.Args {
		p := g.k.params[i]
		raw, ok := a.([]byte)
		if !ok {
			var e error
			if raw, e = binary.Append(nil, binary.LittleEndian, a); e != nil {
				return fmt.Errorf("argument %d: %w", i, e)
			}
		}
		if len(raw) != p.size {
			return fmt.Errorf("argument %d has %d bytes, its parameter %d", i, len(raw), p.size)
		}
		copy(g.params[p.offset:], raw)
	}
	return nil
}

func poisoned(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = 0xff
	}
	return b
}

// poison is shared memory that nobody has written.
func (g *grid) poison(n int) []byte {
	b := poisoned(n)
	if p := g.launch.Poison; p != 0 {
		for i := range b {
			b[i] = p
		}
	}
	return b
}

func (g *grid) newBlock(id [3]int) *block {
	b := &block{grid: g, id: id, static: g.poison(g.k.shared), dynamic: g.poison(g.launch.Shared), arrived: map[int]int{}}
	d := g.launch.Block
	b.threads = d[0] * d[1] * d[2]
	b.issued = make([][]issue, (b.threads+127)/128)
	for i := 0; i < b.threads; i += 32 {
		w := &warp{block: b, index: i / 32, regs: make([]uint64, g.k.regs*32)}
		for r := range w.regs {
			w.regs[r] = math.MaxUint64
		}
		for l := range 32 {
			if i+l >= b.threads {
				w.state[l] = exited
			}
			w.local[l] = poisoned(g.k.local)
		}
		if g.k.async {
			w.registers, w.touched, w.busy, w.roles = g.k.registers(b), make([]int, g.k.regs), make([]bool, g.k.regs), make([]int, g.k.regs)
		}
		b.warps = append(b.warps, w)
	}
	return b
}

// run lets the warps of all blocks take turns until every thread has left.
func run(blocks []*block) error {
	const turn = 2000
	for {
		done, moved, spun := true, false, false
		for _, b := range blocks {
			for _, w := range b.warps {
				for range turn {
					ok, err := w.step()
					if err != nil {
						return err
					}
					if !ok {
						break
					}
					if w.yields {
						spun, w.yields = true, false
						break
					}
					moved = true
				}
				done = done && w.live() == 0
			}
		}
		if done {
			for _, b := range blocks {
				if err := b.finished(); err != nil {
					return err
				}
			}
			return nil
		}
		if moved {
			continue
		}
		for _, b := range blocks {
			came, err := b.complete()
			if err != nil {
				return err
			}
			spun = spun || came
		}
		if !spun {
			return fmt.Errorf("deadlock: %s", stuck(blocks))
		}
	}
}

func stuck(blocks []*block) string {
	for _, b := range blocks {
		for _, w := range b.warps {
			for l := range 32 {
				if w.state[l] == exited {
					continue
				}
				s := fmt.Sprintf("first of those that wait: block %v, thread %d, %s", b.id, w.index*32+l, w.where(l))
				if m := b.async.barriers[uint64(w.bar[l])]; m != nil && w.state[l] == sleeping {
					s += fmt.Sprintf(" (phase %d lacks %d arrivals and %d bytes)", m.phase, m.pending, m.bytes)
				}
				return s
			}
		}
	}
	return "nobody waits"
}

func (w *warp) where(lane int) string {
	code := w.block.grid.k.code
	if w.pc[lane] >= len(code) {
		return "past the end"
	}
	return fmt.Sprintf("line %d: %s", code[w.pc[lane]].line, code[w.pc[lane]].text)
}

func (w *warp) live() uint32 {
	var m uint32
	for l := range 32 {
		if w.state[l] != exited {
			m |= 1 << l
		}
	}
	return m
}

// step runs one instruction of the lanes with the lowest program counter; false when no lane can run.
func (w *warp) step() (bool, error) {
	pc, lanes := math.MaxInt, uint32(0)
	for l := range 32 {
		if w.state[l] != running {
			continue
		}
		if w.pc[l] < pc {
			pc, lanes = w.pc[l], 0
		}
		if w.pc[l] == pc {
			lanes |= 1 << l
		}
	}
	if lanes == 0 {
		return false, nil
	}
	g := w.block.grid
	if g.steps++; g.steps > g.launch.MaxSteps {
		return false, fmt.Errorf("more than %d steps: %s", g.launch.MaxSteps, w.where(bits.TrailingZeros32(lanes)))
	}
	if pc >= len(g.k.code) {
		return false, fmt.Errorf("ran past the last instruction")
	}
	in := g.k.code[pc]
	act := lanes
	if in.guard >= 0 {
		act = 0
		for l := range 32 {
			if lanes>>l&1 == 0 {
				continue
			}
			p := w.regs[in.guard*32+l]
			if p > 1 {
				return false, fmt.Errorf("line %d: %s: block %v, warp %d, lane %d: the predicate was never written", in.line, in.text, w.block.id, w.index, l)
			}
			if (p != 0) != in.unless {
				act |= 1 << l
			}
		}
	}
	if in.all && act != 0 { // come lanes that wait here already
		for l := range 32 {
			if w.state[l] == waiting && w.pc[l] == pc {
				act |= 1 << l
			}
		}
		lanes |= act
	}
	if act != 0 && g.k.async {
		for _, r := range in.touches {
			if w.busy[r] {
				return false, fmt.Errorf("line %d: %s: block %v, warp %d: a register of a product that nobody waited for", in.line, in.text, w.block.id, w.index)
			}
			w.touched[r] = w.epoch
		}
	}
	if act != 0 {
		err := in.run(w, act)
		if err == errLanesMissing || err == errAsleep {
			state := waiting
			if err == errAsleep {
				state = sleeping
			}
			for l := range 32 {
				if act>>l&1 != 0 {
					w.state[l] = state
				} else if lanes>>l&1 != 0 {
					w.pc[l]++
				}
			}
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("line %d: %s: block %v, warp %d, lanes %08x: %w", in.line, in.text, w.block.id, w.index, act, err)
		}
	}
	for l := range 32 {
		if lanes>>l&1 == 0 {
			continue
		}
		if w.state[l] == waiting {
			w.state[l] = running
		}
		if act>>l&1 != 0 {
			switch in.op[0] {
			case "bra":
				w.pc[l] = in.target
				continue
			case "brx": // run has set pc
				continue
			}
		}
		w.pc[l]++
	}
	return true, nil
}

// barrier lets lanes arrive at a barrier of count threads and opens it when all have come.
func (w *warp) barrier(id, count int, lanes uint32) error {
	b := w.block
	if count%32 != 0 && count != b.threads || count > b.threads || id > 15 {
		return fmt.Errorf("barrier %d of %d threads in a block of %d", id, count, b.threads)
	}
	for l := range 32 {
		if lanes>>l&1 != 0 {
			w.state[l], w.bar[l] = barred, id
		}
	}
	b.arrived[id] += bits.OnesCount32(lanes)
	if b.arrived[id] > count {
		return fmt.Errorf("%d threads at barrier %d of %d", b.arrived[id], id, count)
	}
	if b.arrived[id] == count {
		b.arrived[id] = 0
		for _, o := range b.warps {
			for l := range 32 {
				if o.state[l] == barred && o.bar[l] == id {
					o.state[l] = running
				}
			}
		}
	}
	return nil
}
