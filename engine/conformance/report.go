package conformance

import (
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
	Identical   Mode = "identical"
	Failed      Mode = "failed" // an op that should work gave an error
)

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
	Quick bool           // leave out the shapes of real models, which take most of the time
	// Workers is how many cases Check runs at the same time, on streams of their own; 0 is
	// 1. The oracle is what takes the time.
	Workers int
	// OnResult, if not nil, is told every result as it is found.
	OnResult func(Result)
}

// want reports whether a case is to be run; Large ones never are.
func (o *Options) want(c *Case) bool {
	return !c.Large && !(o.Quick && c.Bench) && o.match(c.Name)
}

func (o *Options) match(name string) bool { return o.Match == nil || o.Match.MatchString(name) }

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
