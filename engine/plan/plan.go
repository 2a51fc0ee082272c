// Package plan is a device that computes nothing and counts everything. Model
// code run on it with the shapes of a real run tells, before the first kernel,
// how many FLOPs, bytes and launches the run takes and how much memory it needs
// at its peak: for refusing what cannot fit, for sizing the arena once over a
// whole sampling plan, and for the FLOP columns of benchmarks.
//
// Every op checks its arguments as a real device would, so a plan also finds
// wrong shapes. Reading a tensor back gives zeros: work whose amount depends on
// computed values cannot be planned.
package plan

import (
	"sync"

	"margo/engine"
)

// Device is an engine.Device that counts. Its methods may be called from any
// goroutine.
type Device struct {
	limit int64
	like  engine.Info      // what models ask a device about, see For
	of    engine.Footprint // of the device that is planned for; nil: buffers as they are asked
	mu    sync.Mutex
	r     Report
}

// New makes a plan. An allocation beyond limit bytes fails with OutOfMemory;
// 0 means no limit.
func New(limit int64) *Device {
	return &Device{limit: limit, r: Report{Ops: map[engine.Op]Total{}}}
}

// For makes a plan without a limit for a device. Models lay their work out by what WorkingSet and OwnMemory of its Info
// say: a plan of New's counts the groups of a CPU, which are gigabytes smaller than a GPU's. Memory is counted as the device takes it,
// if it is an engine.Footprint: with what it rounds and pads, and the workspaces of its streams.
func For(dev engine.Device) *Device {
	d, i := New(0), dev.Info()
	d.like = engine.Info{WorkingSet: i.WorkingSet, OwnMemory: i.OwnMemory}
	d.of, _ = dev.(engine.Footprint)
	return d
}

var _ engine.Footprint = (*Device)(nil)

// Block is that of the device planned for, or bytes.
func (d *Device) Block(bytes int64) int64 {
	if d.of != nil {
		return d.of.Block(bytes)
	}
	return bytes
}

// PackedBytes is that of the device planned for, or the size of the elements.
func (d *Device) PackedBytes(a engine.PackArgs) int64 {
	if d.of != nil {
		return d.of.PackedBytes(a)
	}
	return int64(a.W.Elems()) * int64(a.DType.Size())
}

// StreamBytes is that of the device planned for, or 0.
func (d *Device) StreamBytes() int64 {
	if d.of != nil {
		return d.of.StreamBytes()
	}
	return 0
}

// HeadBytes is that of the device planned for, or what the arguments allow, but no more than modulations of all steps and a few
// rows of the head's width take.
func (d *Device) HeadBytes(a engine.HeadStepsArgs) (need, take int64) {
	if d.of != nil {
		return d.of.HeadBytes(a)
	}
	rows, w := int64(a.Cond.Rows()), int64(a.Cond.Cols())
	need = 4 * rows * w * (int64(len(a.Steps))*int64(3*len(a.Weights.Blocks)+3) + 8)
	need = min(need, int64(a.Scratch))
	return need, need
}

// GroupNormBytes is that of the device planned for, or 0.
func (d *Device) GroupNormBytes(a engine.GroupNormArgs) int64 {
	if d.of != nil {
		return d.of.GroupNormBytes(a)
	}
	return 0
}

// Name is "plan".
func (d *Device) Name() string { return "plan" }

// Info gives the limit as the memory.
func (d *Device) Info() engine.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := d.like
	i.Name, i.Model, i.Arch, i.Threads, i.MemTotal = "plan", "counts, computes nothing", "none", 1, d.limit
	if d.limit > 0 {
		i.MemFree = d.limit - d.r.Live
	}
	return i
}

// Supports is always true.
func (d *Device) Supports(engine.Op, engine.DType) bool { return true }

// NewStream makes a stream that counts into d.
func (d *Device) NewStream() (engine.Stream, error) {
	s := &stream{d: d}
	if n := d.StreamBytes(); n > 0 {
		if err := d.take(d.Block(n), false); err != nil {
			return nil, err
		}
		s.own = n
	}
	return s, nil
}

// Alloc counts the bytes; there is no memory behind the buffer.
func (d *Device) Alloc(bytes int) (engine.Buffer, error) {
	if bytes < 0 {
		return nil, engine.Errorf("alloc", engine.Invalid, "negative size %d", bytes)
	}
	m := &memory{d: d, bytes: bytes, taken: d.Block(int64(bytes))}
	if err := d.take(m.taken, false); err != nil {
		return nil, err
	}
	return m, nil
}

// Pack counts what the device planned for makes of W.
func (d *Device) Pack(a engine.PackArgs) (engine.Packed, error) {
	if err := a.Check(); err != nil {
		return nil, err
	}
	n := d.PackedBytes(a)
	m := &memory{d: d, bytes: int(n), taken: d.Block(n), packed: true}
	if err := d.take(m.taken, true); err != nil {
		return nil, err
	}
	return m, nil
}

// Close does nothing.
func (d *Device) Close() error { return nil }

// Report is what was counted so far.
func (d *Device) Report() Report {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.clone()
}

func (d *Device) take(n int64, packed bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.limit > 0 && d.r.Live+n > d.limit {
		return &engine.Error{Op: "alloc", Kind: engine.OutOfMemory, Device: "plan",
			Err: errNeeds(d.r.Live+n, "the device", d.limit)}
	}
	d.r.Live += n
	d.r.Peak = max(d.r.Peak, d.r.Live)
	d.r.Allocs++
	if packed {
		d.r.Packed += n
	}
	return nil
}

func (d *Device) give(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.r.Live -= n
}

// memory is a buffer or a packed weight: a size, and what that takes.
type memory struct {
	d      *Device
	bytes  int
	taken  int64
	packed bool
	freed  bool
}

func (m *memory) Bytes() int { return m.bytes }

func (m *memory) Free() error {
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	if m.freed {
		return engine.Errorf("free", engine.Internal, "freed twice")
	}
	m.freed = true
	m.d.r.Live -= m.taken
	if m.packed {
		m.d.r.Packed -= m.taken
	}
	return nil
}

// count adds one launch of op; work under a capture is counted there.
func (d *Device) count(op engine.Op, c engine.Cost) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.r.add(op, Total{Calls: 1, Cost: c})
}
