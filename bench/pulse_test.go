package bench

import (
	"slices"
	"testing"
	"time"
)

// TestPulse: the mean weighs a rate by the time it stood for, and what measuring takes
// belongs to nobody.
func TestPulse(t *testing.T) {
	now := time.Unix(1000, 0)
	rates, asked := []float64{8, 4, 2}, []time.Duration{}
	p := pulse{now: func() time.Time { return now }, rate: func(over time.Duration) float64 {
		asked = append(asked, over)
		now = now.Add(over)
		return rates[len(asked)-1]
	}}
	p.probe(pulseEnds)
	now = now.Add(pulseEvery - 1)
	if d := p.between(); d != 0 {
		t.Errorf("between took %v so soon after a measurement", d)
	}
	now = now.Add(3*time.Second - pulseEvery + 1)
	if d := p.between(); d != pulseWithin {
		t.Errorf("between took %v", d)
	}
	now = now.Add(time.Second)
	p.probe(pulseEnds)
	if want := (3*6 + 1*3) / 4.0; p.mean() != want {
		t.Errorf("mean %g over %g s, not %g over 4 s", p.mean(), p.span, want)
	}
	if !slices.Equal(asked, []time.Duration{pulseEnds, pulseWithin, pulseEnds}) {
		t.Errorf("measured for %v", asked)
	}
}

// TestPulseUnknown: nothing is measured where a side's device tells nothing.
func TestPulseUnknown(t *testing.T) {
	p := newPulse(&PyTorch{}, Case{DType: "f32"})
	p.probe(pulseEnds)
	if d := p.between(); d != 0 || p.mean() != 0 {
		t.Errorf("between took %v, mean %g", d, p.mean())
	}
}
