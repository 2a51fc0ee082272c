package cpu

import (
	"testing"

	"margo/engine/conformance"
)

// TestConformance runs the table of op cases against the float64 oracle.
func TestConformance(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, threads := range []int{1, 3} {
			d, err := New(Options{Threads: threads})
			if err != nil {
				t.Fatal(err)
			}
			conformance.Run(t, d)
			if d.Used() != 0 {
				t.Errorf("%d bytes are still in use", d.Used())
			}
		}
	})
}
