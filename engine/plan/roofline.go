package plan

import "margo/engine"

// Machine is a device as a roofline sees it.
type Machine struct {
	Name      string
	F32, BF16 float64 // FLOP/s of multiply-adds, dense
	Memory    float64 // bytes/s
	// Dependent is the time from one kernel to the next that needs it, in seconds: what
	// a chain of kernels takes that have nothing to do.
	Dependent float64
	// Exchange is that of multiprocessors that pass values on within a kernel.
	Exchange float64
}

// H100 and H200 as their data sheets have them (SXM, dense). Dependent is 1.3 µs, as published
// for kernels in a graph on an H100 (Hazy Research, "No Bubbles"); Exchange, 1 µs, is an
// estimate for a counter in L2 with one release and one acquire.
var (
	H100 = Machine{"H100", 66.9e12, 989e12, 3.35e12, 1.3e-6, 1e-6}
	H200 = Machine{"H200", 66.9e12, 989e12, 4.8e12, 1.3e-6, 1e-6}
)

// Chain is how many kernels, or exchanges within one, follow each other.
type Chain struct{ Kernels, Exchanges int64 }

// Bound is the least time that the work of an op takes by three limits, in seconds.
type Bound struct {
	Op engine.Op
	Total
	Compute float64 // F32/Machine.F32 + BF16/Machine.BF16
	Memory  float64 // Bytes/Machine.Memory: as if no tensor stayed in a cache between ops
	Serial  float64 // Kernels·Dependent + Exchanges·Exchange
}

// Seconds is the largest of the three: as if they overlapped without loss.
func (b Bound) Seconds() float64 { return max(b.Compute, b.Memory, b.Serial) }

// By names the limit that Seconds is: "compute", "memory" or "chain".
func (b Bound) By() string {
	switch b.Seconds() {
	case b.Compute:
		return "compute"
	case b.Memory:
		return "memory"
	}
	return "chain"
}

// Roofline bounds the work of each op of r, in the order of engine.Ops. Ops run one after
// another, so that the sum of Seconds bounds the whole. An op is a chain of one kernel a
// call unless chains says how many all of its calls make. Copies and fills are left out.
func (m Machine) Roofline(r Report, chains map[engine.Op]Chain) []Bound {
	var all []Bound
	for _, op := range engine.Ops {
		t, ok := r.Ops[op]
		if !ok {
			continue
		}
		c, ok := chains[op]
		if !ok {
			c.Kernels = t.Calls
		}
		all = append(all, Bound{op, t, float64(t.F32)/m.F32 + float64(t.BF16)/m.BF16, float64(t.Bytes) / m.Memory,
			float64(c.Kernels)*m.Dependent + float64(c.Exchanges)*m.Exchange})
	}
	return all
}
