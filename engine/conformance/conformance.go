package conformance

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"margo/engine"
)

// Mode is a way to look at a device.
type Mode string

// Modes, as package documentation describes them.
const (
	Oracle      Mode = "oracle"
	Exact       Mode = "exact"
	NaN         Mode = "nan"
	Guards      Mode = "guards"
	Determinism Mode = "determinism"
	Batch       Mode = "batch"
	System      Mode = "system"
	Failed      Mode = "failed" // an op that should work gave an error
)

// Case is one line of the table.
type Case struct {
	Name  string // starts with op/dtype/
	Op    engine.Op
	DType engine.DType // the one that Device.Supports is asked for
	Bench bool         // a shape of a real model, worth timing
	// Large is a case too big for the oracle; it is only timed.
	Large bool

	exact bool // integers: one right result
	build func(*env) work
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

// Status of a Result.
type Status string

// Statuses.
const (
	Pass Status = "pass"
	Fail Status = "FAIL"
	Skip Status = "SKIP"
)

// Result is what one mode found about one case.
type Result struct {
	Case, Detail string
	Op           engine.Op
	DType        engine.DType
	Mode         Mode
	Status       Status
	Err, Limit   float64 // mode oracle: of the output nearest to its limit
}

func (r Result) String() string {
	s := fmt.Sprintf("%s %s %s", r.Status, r.Case, r.Mode)
	if r.Detail != "" {
		s += ": " + r.Detail
	}
	return s
}

// Options choose cases. The zero value is the whole table.
type Options struct {
	Match *regexp.Regexp // of case names; nil: all
	// OnResult, if not nil, is told every result as it is found.
	OnResult func(Result)
}

// Report is the outcome of Check.
type Report struct {
	Device  string
	Results []Result
	Elapsed time.Duration
}

// With returns the results of a status.
func (r *Report) With(s Status) (out []Result) {
	for _, x := range r.Results {
		if x.Status == s {
			out = append(out, x)
		}
	}
	return out
}

// String is a summary with every failure and skip.
func (r *Report) String() string {
	var b strings.Builder
	for _, x := range append(r.With(Fail), r.With(Skip)...) {
		fmt.Fprintln(&b, x)
	}
	fmt.Fprintf(&b, "%s: %d passed, %d failed, %d skipped in %.1f s\n", r.Device,
		len(r.With(Pass)), len(r.With(Fail)), len(r.With(Skip)), r.Elapsed.Seconds())
	return b.String()
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
	for _, c := range Cases() {
		if !c.Large && (opt.Match == nil || opt.Match.MatchString(c.Name)) {
			add(c.Check(dev)...)
		}
	}
	for _, c := range systemChecks {
		if opt.Match == nil || opt.Match.MatchString("system/"+c.name) {
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

// Run is Check in a test: every case is a subtest, and what is skipped says so.
func Run[S T[S]](t S, dev engine.Device) {
	t.Helper()
	report := func(t S, rs ...Result) {
		for _, r := range rs {
			switch r.Status {
			case Fail:
				t.Error(r)
			case Skip:
				t.Skip(r)
			}
		}
	}
	for _, c := range Cases() {
		if !c.Large {
			t.Run(c.Name, func(t S) { report(t, c.Check(dev)...) })
		}
	}
	for _, c := range systemChecks {
		t.Run("system/"+c.name, func(t S) { report(t, c.check(dev)) })
	}
	t.Log("\n" + Support(dev))
}

// Cases is the whole table.
func Cases() []*Case {
	var all []*Case
	for _, f := range []func() []*Case{gemmCases, attentionCases, normCases, groupNormCases, pointwiseCases,
		diffusionCases, headCases, convCases} {
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
		x := want[a.name]
		m, worst, err := x.compare(a.name, max(a.t.Cols(), 1), e.values(a, memory[a.name]), c.exact)
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

// Support is a table in Markdown of the ops and dtypes that a device has.
func Support(devs ...engine.Device) string {
	var b strings.Builder
	dtypes := []engine.DType{engine.F32, engine.BF16}
	b.WriteString("| op |")
	for _, d := range devs {
		for _, t := range dtypes {
			fmt.Fprintf(&b, " %s %v |", d.Name(), t)
		}
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(devs)*len(dtypes)) + "\n")
	for _, op := range engine.Ops {
		fmt.Fprintf(&b, "| %s |", op)
		for _, d := range devs {
			for _, t := range dtypes {
				mark := "no"
				if d.Supports(op, t) {
					mark = "yes"
				}
				fmt.Fprintf(&b, " %s |", mark)
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}
