package sample

import (
	"fmt"
	"testing"

	"margo/cpu"
	"margo/engine"
)

// On the CPU device an image has the same bits in a batch of 1, 3 or 8 and with
// 1, 2 or 3 threads.
func TestCPUInvariance(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		var want []Image
		for _, threads := range []int{1, 2, 3} {
			dev, err := cpu.New(cpu.Options{Threads: threads, Poison: true})
			if err != nil {
				t.Fatal(err)
			}
			e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, d), dev, d)
			for _, batch := range []int{8, 3, 1} {
				r := request(8)
				r.Batch, r.MaxTimestep = batch, 999 // with an exact step
				got := collect(t, e, r)
				if want == nil {
					want = got
				}
				same(t, fmt.Sprintf("%v, %d threads, batch %d", d, threads, batch), got, want)
			}
		}
	}
}
