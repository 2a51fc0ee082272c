package cpu

import (
	"testing"

	"margo/engine/conformance"
)

// TestConformance runs the table of op cases against the float64 oracle: all of
// it on the best instruction set, without the large shapes on the others.
func TestConformance(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		d, err := New(Options{Threads: 3})
		if err != nil {
			t.Fatal(err)
		}
		if ISA() == ISAs()[0] && !testing.Short() {
			conformance.Run(t, d)
		} else {
			for _, c := range conformance.Cases() {
				if c.Large || c.Bench {
					continue
				}
				for _, r := range c.Check(d) {
					if r.Status != conformance.Pass {
						t.Error(r)
					}
				}
			}
		}
		if d.Used() != 0 {
			t.Errorf("%d bytes are still in use", d.Used())
		}
	})
}
