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
		conformance.Run(t, d, conformance.Options{Quick: testing.Short() || ISA() != ISAs()[0]})
		if d.Used() != 0 {
			t.Errorf("%d bytes are still in use", d.Used())
		}
	})
}

// TestThreads demands the same bits whatever the number of threads.
func TestThreads(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		one, err := New(Options{Threads: 1})
		if err != nil {
			t.Fatal(err)
		}
		for _, threads := range []int{2, 3} {
			d, err := New(Options{Threads: threads})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range conformance.Same(one, d, conformance.Options{Quick: testing.Short()}).With(conformance.Fail) {
				t.Errorf("%d threads: %v", threads, r)
			}
		}
	})
}
