package plan

import (
	"fmt"
	"maps"
	"strings"

	"margo/engine"
)

// Names of the stream's own operations in a Report.
const (
	OpCopyIn  engine.Op = "copy_in"
	OpCopyOut engine.Op = "copy_out"
	OpCopy    engine.Op = "copy"
	OpFill    engine.Op = "fill"
)

// Total is the work of one op over all its launches.
type Total struct {
	Calls int64
	engine.Cost
}

// Report is what a plan counted.
type Report struct {
	Ops    map[engine.Op]Total
	Live   int64 // bytes allocated now, packed weights and workspaces of streams included
	Packed int64 // of them, packed weights
	Peak   int64 // most bytes allocated at once
	Allocs int64 // number of allocations
}

// Total is the sum over all ops.
func (r Report) Total() Total {
	var t Total
	for _, o := range r.Ops {
		t.Calls += o.Calls
		t.Cost = t.Cost.Add(o.Cost)
	}
	return t
}

// Since is the work done after an earlier report of the same plan; memory
// figures stay those of r.
func (r Report) Since(earlier Report) Report {
	out := r.clone()
	for op, t := range earlier.Ops {
		o := out.Ops[op]
		o.Calls, o.Cost = o.Calls-t.Calls, o.Cost.Sub(t.Cost)
		if out.Ops[op] = o; o == (Total{}) {
			delete(out.Ops, op)
		}
	}
	return out
}

// Fits is nil if the peak fits into free bytes of the named device, else an
// error of kind OutOfMemory: "needs 21.3 GiB, cuda:0 has 16.0 GiB".
func (r Report) Fits(device string, free int64) error {
	if r.Peak <= free {
		return nil
	}
	return &engine.Error{Op: "plan", Kind: engine.OutOfMemory, Device: device, Err: errNeeds(r.Peak, device, free)}
}

// String lists the ops in the order of engine.Ops, one a line, and the memory.
func (r Report) String() string {
	var b strings.Builder
	line := func(name string, t Total) {
		fmt.Fprintf(&b, "%-18s %8d calls %12.3f GFLOP %12.3f MB\n", name, t.Calls, float64(t.FLOPs())/1e9, float64(t.Bytes)/1e6)
	}
	for _, op := range append([]engine.Op{OpCopyIn, OpCopyOut, OpCopy, OpFill}, engine.Ops...) {
		if t, ok := r.Ops[op]; ok {
			line(string(op), t)
		}
	}
	line("total", r.Total())
	fmt.Fprintf(&b, "peak memory %s, of it packed weights %s\n", Size(r.Peak), Size(r.Packed))
	return b.String()
}

// Size formats bytes with a binary unit: "21.3 GiB".
func Size(bytes int64) string {
	v, unit := float64(bytes), "B"
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	if unit == "B" {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%.1f %s", v, unit)
}

func errNeeds(need int64, device string, has int64) error {
	return fmt.Errorf("needs %s, %s has %s", Size(need), device, Size(has))
}

func (r *Report) add(op engine.Op, t Total) {
	o := r.Ops[op]
	o.Calls += t.Calls
	o.Cost = o.Cost.Add(t.Cost)
	r.Ops[op] = o
}

func (r Report) clone() Report {
	r.Ops = maps.Clone(r.Ops)
	return r
}
