package bench

import (
	"time"

	"margo/engine"
)

const (
	pulseEnds   = 100 * time.Millisecond // of arithmetic before and after a run
	pulseWithin = 20 * time.Millisecond  // between iterations
	pulseEvery  = 250 * time.Millisecond // at most so often
)

// pulse follows the arithmetic that a side's device gives while the side runs: others may
// use the machine, and what they take changes from second to second.
type pulse struct {
	rate func(over time.Duration) float64 // FLOP/s; nil: cannot be measured
	now  func() time.Time
	at   time.Time // of the last measurement
	last float64
	sum  float64 // integral of the rate from the first measurement to the last
	span float64 // seconds
}

func newPulse(s Side, c Case) *pulse {
	d, ok := deviceOf(s).(interface {
		ProbePeak(engine.DType)
		Arithmetic(engine.DType, time.Duration) float64
	})
	t, err := engine.ParseDType(c.DType)
	if !ok || err != nil {
		return &pulse{}
	}
	d.ProbePeak(t)
	return &pulse{now: time.Now, rate: func(over time.Duration) float64 { return d.Arithmetic(t, over) }}
}

// probe measures now. Between two measurements the rate counts as linear; the time that
// they take does not count.
func (p *pulse) probe(over time.Duration) {
	if p.rate == nil {
		return
	}
	idle := p.now().Sub(p.at).Seconds()
	r := p.rate(over)
	if !p.at.IsZero() {
		p.sum += (p.last + r) / 2 * idle
		p.span += idle
	}
	p.at, p.last = p.now(), r
}

// between is what a side calls between iterations; it returns how long it took.
func (p *pulse) between() time.Duration {
	if p.rate == nil {
		return 0
	}
	start := p.now()
	if start.Sub(p.at) < pulseEvery {
		return 0
	}
	p.probe(pulseWithin)
	return p.now().Sub(start)
}

// mean is the rate's mean over time; 0: not known.
func (p *pulse) mean() float64 {
	if p.span == 0 {
		return 0
	}
	return p.sum / p.span
}
