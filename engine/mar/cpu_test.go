//go:build cgo

package mar

import (
	"testing"

	"margo/cpu"
	"margo/engine"
	"margo/engine/checkpoint"
)

// The CPU sums in one order whatever the number of rows, so there too a cache
// changes no bit, paged attention being the other kind with its keys gathered.
func TestCPUCausalCache(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		dev, err := cpu.New(cpu.Options{Threads: 2, Poison: true})
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		checkCausalCache(t, context(t, dev, d), randomVariant(t, variantConfig(checkpoint.Causal, ""), dev, d))
	}
}
