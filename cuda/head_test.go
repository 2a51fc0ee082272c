package cuda

import (
	"regexp"
	"testing"

	"margo/engine/conformance"
)

// TestHeadLatency runs the table's head steps by the persistent kernel: BF16 cases that it serves whole and in parts (at
// most 16 rows, widths that are multiples of 16 and fit the device).
func TestHeadLatency(t *testing.T) {
	d := testDevice(t)
	d.SetHeadPath(2)
	conformance.Run(t, d, conformance.Options{Quick: testing.Short(), Match: regexp.MustCompile(`^head_steps/bf16/n=[1-5] c=\d+ w=(32|64|128|1024) `)})
}
