package conformance

import (
	"fmt"
	"math"
	"regexp"
	"strings"
	"time"

	"margo/engine"
)

// Timing is how fast a device does one case.
type Timing struct {
	Case    string
	Op      engine.Op
	DType   engine.DType
	Cost    engine.Cost
	Seconds float64 // the fastest of Runs
	Runs    int
}

// FLOPS is arithmetic per second of matrix products.
func (t Timing) FLOPS() float64 { return float64(t.Cost.FLOPs()) / t.Seconds }

// Bandwidth is unavoidable memory traffic per second.
func (t Timing) Bandwidth() float64 { return float64(t.Cost.Bytes) / t.Seconds }

// Roofline is the least time that a device with these peaks could take, and what bounds it: "arithmetic" or
// "memory". 0 where the peaks are not known.
func (t Timing) Roofline(i engine.Info) (seconds float64, bound string) {
	if i.PeakF32 <= 0 || i.PeakBF16 <= 0 || i.PeakMemory <= 0 {
		return 0, ""
	}
	arithmetic, memory := float64(t.Cost.F32)/i.PeakF32+float64(t.Cost.BF16)/i.PeakBF16, float64(t.Cost.Bytes)/i.PeakMemory
	if arithmetic > memory {
		return arithmetic, "arithmetic"
	}
	return memory, "memory"
}

func (t Timing) String() string {
	return fmt.Sprintf("%-80s %10.1f µs %8.1f GFLOP/s %7.1f GB/s", t.Case, t.Seconds*1e6, t.FLOPS()/1e9, t.Bandwidth()/1e9)
}

// Bench times the cases of real shapes that match (nil: all), each for about
// the given time, and tells the fastest run. What the device does not support
// is left out.
func Bench(dev engine.Device, match *regexp.Regexp, each time.Duration) (ts []Timing, err error) {
	for _, c := range Cases() {
		if c.Bench && dev.Supports(c.Op, c.DType) && (!c.Huge || dev.Info().WorkingSet > 0) && (match == nil || match.MatchString(c.Name)) {
			t, err := c.time(dev, 3, each)
			if err != nil {
				return ts, fmt.Errorf("%s: %w", c.Name, err)
			}
			ts = append(ts, t)
		}
	}
	return ts, nil
}

// BenchSmall is Bench for devices that are too slow for real shapes: it times two small cases of every op and dtype,
// once each.
func BenchSmall(dev engine.Device) (ts []Timing, err error) {
	for _, c := range representatives(dev) {
		t, err := c.time(dev, 1, 0)
		if err != nil {
			return ts, fmt.Errorf("%s: %w", c.Name, err)
		}
		ts = append(ts, t)
	}
	return ts, nil
}

// timed is an event that knows the device's own time.
type timed interface {
	Seconds(since engine.Event) (float64, error)
}

// once runs f and returns the time it took: the device's own where events tell, which
// leaves out the way to the device and back.
func once(s engine.Stream, f func() error) float64 {
	check(s.Sync())
	from := must(s.Record())
	defer from.Close()
	at := time.Now()
	check(f())
	to := must(s.Record())
	defer to.Close()
	check(s.Sync())
	if t, ok := to.(timed); ok {
		return must(t.Seconds(from))
	}
	return time.Since(at).Seconds()
}

// time runs a case at least so often, and until the time is over.
func (c *Case) time(dev engine.Device, least int, each time.Duration) (t Timing, err error) {
	defer caught(func(e error) { err = e })
	e := newEnv(dev, c, 0)
	defer e.close()
	w := c.build(e)
	t = Timing{Case: c.Name, Op: c.Op, DType: c.DType, Cost: w.cost, Seconds: math.Inf(1)}
	start := time.Now()
	for t.Runs < least || time.Since(start) < each {
		e.upload() // ops in place would run away otherwise
		t.Seconds = min(t.Seconds, once(e.s, func() error { return w.run(e.s) }))
		t.Runs++
	}
	return t, nil
}

// Table is timings as text.
func Table(ts []Timing) string {
	var b strings.Builder
	for _, t := range ts {
		fmt.Fprintln(&b, t)
	}
	return b.String()
}
