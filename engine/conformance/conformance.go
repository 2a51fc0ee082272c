package conformance

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"margo/engine"
)

// Case is one line of the table.
type Case struct {
	Name  string // starts with op/dtype/
	Op    engine.Op
	DType engine.DType // the one that Device.Supports is asked for
	Bench bool         // a shape of a real model, worth timing
	// Large is a case too big for the oracle; it is only timed. Huge ones are timed only
	// where a device asks for a large working set: they fill a GPU.
	Large, Huge bool

	exact   bool // integers: one right result
	aligned bool // tensors begin where an arena lets them, as those of Bench do
	build   func(*env) work
}

// work is a case on a device.
type work struct {
	cost engine.Cost
	run  func(engine.Stream) error
	// part computes items lo … hi-1 of n, both multiples of grain (or n); nil
	// where nothing is promised about it.
	n, grain int
	part     func(s engine.Stream, lo, hi int) error
}

// Check runs a device through the table and the system checks.
func Check(dev engine.Device, opt Options) *Report {
	rep := &Report{Device: dev.Name()}
	start := time.Now()
	add := func(rs ...Result) {
		rep.Results = append(rep.Results, rs...)
		if opt.OnResult != nil {
			for _, r := range rs {
				opt.OnResult(r)
			}
		}
	}
	var wanted []*Case
	for _, c := range Cases() {
		if opt.want(c) {
			wanted = append(wanted, c)
		}
	}
	results := make([]chan []Result, len(wanted)) // in the table's order, whoever is first
	for i := range results {
		results[i] = make(chan []Result, 1)
	}
	var next atomic.Int64
	for range max(opt.Workers, 1) {
		go func() {
			for i := next.Add(1) - 1; i < int64(len(wanted)); i = next.Add(1) - 1 {
				results[i] <- wanted[i].Check(dev)
			}
		}()
	}
	for _, r := range results {
		add(<-r...)
	}
	for _, c := range systemChecks {
		if opt.match("system/" + c.name) {
			add(c.check(dev))
		}
	}
	rep.Elapsed = time.Since(start)
	return rep
}

// T is *testing.T. Package testing is not imported, because margo's own binary
// contains this package.
type T[Self any] interface {
	Run(string, func(Self)) bool
	Error(...any)
	Skip(...any)
	Log(...any)
	Helper()
}

// Same demands that two devices give the same bits in every case, as a device
// must with any number of threads.
func Same(a, b engine.Device, opt Options) *Report {
	rep := &Report{Device: a.Name() + " and " + b.Name()}
	start := time.Now()
	for _, c := range Cases() {
		if !opt.want(c) || !a.Supports(c.Op, c.DType) || !b.Supports(c.Op, c.DType) {
			continue
		}
		r := Result{Case: c.Name, Op: c.Op, DType: c.DType, Mode: Identical, Status: Pass}
		if err := c.same(a, b); err != nil {
			r.Status, r.Detail = Fail, err.Error()
		}
		rep.Results = append(rep.Results, r)
		if opt.OnResult != nil {
			opt.OnResult(r)
		}
	}
	rep.Elapsed = time.Since(start)
	return rep
}

func (c *Case) same(a, b engine.Device) (err error) {
	defer caught(func(e error) { err = e })
	var got [2]map[string][]uint32
	var e *env
	for i, dev := range []engine.Device{a, b} {
		e = newEnv(dev, c, 0)
		defer e.close()
		got[i] = e.run(c.build(e).run)
	}
	return e.differ(got[0], got[1])
}

// Run is Check in a test: every case is a subtest, and what is skipped says so.
// Without options it is the whole table.
func Run[S T[S]](t S, dev engine.Device, opts ...Options) {
	t.Helper()
	var opt Options
	if len(opts) > 0 {
		opt = opts[0]
	}
	report := func(t S, rs ...Result) {
		for _, r := range rs {
			if opt.OnResult != nil {
				opt.OnResult(r)
			}
			switch r.Status {
			case Fail:
				t.Error(r)
			case Skip:
				t.Skip(r)
			}
		}
	}
	for _, c := range Cases() {
		if opt.want(c) {
			t.Run(c.Name, func(t S) { report(t, c.Check(dev)...) })
		}
	}
	for _, c := range systemChecks {
		if opt.match("system/" + c.name) {
			t.Run("system/"+c.name, func(t S) { report(t, c.check(dev)) })
		}
	}
	t.Log("\n" + Support(dev))
}

// Cases is the whole table.
func Cases() []*Case {
	var all []*Case
	for _, f := range []func() []*Case{gemmCases, attentionCases, normCases, groupNormCases, pointwiseCases,
		diffusionCases, headCases, convCases, pagedCases, categoricalCases} {
		all = append(all, f()...)
	}
	return all
}

// Check runs one case on a device in every mode.
func (c *Case) Check(dev engine.Device) (results []Result) {
	add := func(m Mode, err error) *Result {
		r := Result{Case: c.Name, Op: c.Op, DType: c.DType, Mode: m, Status: Pass}
		if err != nil {
			r.Status, r.Detail = Fail, err.Error()
		}
		results = append(results, r)
		return &results[len(results)-1]
	}
	if !dev.Supports(c.Op, c.DType) {
		r := add(Oracle, fmt.Errorf("%s does not support %s in %v", dev.Name(), c.Op, c.DType))
		r.Status = Skip
		return results
	}
	defer caught(func(err error) { add(Failed, err) })
	want := c.oracle()
	e := newEnv(dev, c, 0)
	defer e.close()
	w := c.build(e)
	first := e.run(w.run)
	add(Guards, e.touched(first))
	c.judge(e, first, want, add)
	again := e.run(w.run)
	add(Determinism, e.differ(first, again))
	if w.part != nil {
		split := e.run(func(s engine.Stream) error { return w.inParts(s) })
		add(Batch, e.differ(first, split))
	}
	return results
}

// caught is deferred: it reports a fatal that was thrown.
func caught(report func(error)) {
	switch r := recover().(type) {
	case nil:
	case fatal:
		if errors.Is(r.err, engine.Unsupported) {
			r.err = fmt.Errorf("the device claims to support this, but %w", r.err)
		}
		report(r.err)
	default:
		panic(r)
	}
}

// judge compares the outputs with the oracle's.
func (c *Case) judge(e *env, memory map[string][]uint32, want map[string]*expected, add func(Mode, error) *Result) {
	mode := Oracle
	if c.exact {
		mode = Exact
	}
	best := Result{Err: -1}
	for _, a := range e.args {
		if !a.output {
			continue
		}
		x := want[a.name].on(e.dev, c)
		m, worst, err := x.compare(a.name, max(a.t.Cols(), 1), e.values(a, memory[a.name]), c.exact || a.t.DType == engine.I32)
		if err != nil {
			r := add(m, err)
			r.Err, r.Limit = worst, x.limit
			return
		}
		if best.Err < 0 || worst*best.Limit > best.Err*x.limit {
			best.Err, best.Limit = worst, x.limit
		}
	}
	r := add(mode, nil)
	r.Err, r.Limit = max(best.Err, 0), best.Limit
}

// differ compares the outputs of two runs bit for bit.
func (e *env) differ(a, b map[string][]uint32) error {
	for _, x := range e.args {
		for i, v := range a[x.name] {
			if x.output && v != b[x.name][i] {
				return fmt.Errorf("%s: %s is %#08x, was %#08x", x.name, x.where(i), b[x.name][i], v)
			}
		}
	}
	return nil
}

// inParts computes the items in four calls: few, some, half of the rest, the rest.
func (w *work) inParts(s engine.Stream) error {
	grain := max(w.grain, 1)
	units := (w.n + grain - 1) / grain
	lo := 0
	for _, size := range []int{1, 6, (units - 7) / 2, units} {
		hi := min(lo+max(size, 1), units)
		if lo < hi {
			if err := w.part(s, lo*grain, min(hi*grain, w.n)); err != nil {
				return err
			}
		}
		lo = hi
	}
	return nil
}
