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
	like  engine.Info // what models ask a device about, see Like
	mu    sync.Mutex
	r     Report
}

// New makes a plan. An allocation beyond limit bytes fails with OutOfMemory;
// 0 means no limit.
func New(limit int64) *Device {
	return &Device{limit: limit, r: Report{Ops: map[engine.Op]Total{}}}
}

// Like makes a plan without a limit for a device with this Info. Models lay their work
// out by what WorkingSet and OwnMemory say: a plan of New's counts the groups of a CPU, which are
// gigabytes smaller than a GPU's.
func Like(i engine.Info) *Device {
	d := New(0)
	d.like = engine.Info{WorkingSet: i.WorkingSet, OwnMemory: i.OwnMemory}
	return d
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
func (d *Device) NewStream() (engine.Stream, error) { return &stream{d: d}, nil }

// Alloc counts the bytes; there is no memory behind the buffer.
func (d *Device) Alloc(bytes int) (engine.Buffer, error) {
	if bytes < 0 {
		return nil, engine.Errorf("alloc", engine.Invalid, "negative size %d", bytes)
	}
	if err := d.take(int64(bytes), false); err != nil {
		return nil, err
	}
	return &memory{d: d, bytes: bytes}, nil
}

// Pack counts the elements of W in the packed dtype; a real device may pad them.
func (d *Device) Pack(a engine.PackArgs) (engine.Packed, error) {
	if err := a.Check(); err != nil {
		return nil, err
	}
	n := a.W.Elems() * a.DType.Size()
	if err := d.take(int64(n), true); err != nil {
		return nil, err
	}
	return &memory{d: d, bytes: n, packed: true}, nil
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

// memory is a buffer or a packed weight: a size.
type memory struct {
	d      *Device
	bytes  int
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
	m.d.r.Live -= int64(m.bytes)
	if m.packed {
		m.d.r.Packed -= int64(m.bytes)
	}
	return nil
}

// count adds one launch of op; work under a capture is counted there.
func (d *Device) count(op engine.Op, c engine.Cost) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.r.add(op, Total{Calls: 1, Cost: c})
}
