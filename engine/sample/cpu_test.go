//go:build cgo

package sample

import (
	"fmt"
	"slices"
	"testing"

	"margo/cpu"
	"margo/engine"
	"margo/engine/checkpoint"
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

// On the CPU device a replayed run ends where the authors' ends.
func TestCPUReplay(t *testing.T) {
	dev, err := cpu.New(cpu.Options{Threads: 2, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	m := loadTiny(t, "mar_tiny_trained", dev, engine.F32)
	e := openEngine(t, m, dev, engine.F32)
	tr := trace{t, openGolden(t, "mar_trained_sample_cfg3_linear_100steps")}
	var got []float32
	for _, im := range collect(t, e, tr.request()) {
		got = append(got, im.Tokens...)
	}
	// Twice the recorded run's own distance from float64: see TestReplay.
	compare(t, "final tokens", got, patchOne(tr.floats("final_tokens"), m.Config.TokenDim(), m.Config.Tokens()), 8.4e-5)
	if slices.ContainsFunc(got, func(v float32) bool { return v > 4 || v < -4 }) {
		t.Error("tokens of a trained model are of order 1")
	}
}

// Every legal combination samples on the CPU, and an image is the same alone and
// in a batch, bit for bit.
func TestCPUCombinations(t *testing.T) {
	dev, err := cpu.New(cpu.Options{Threads: 2, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, attention := range attentions {
		for _, order := range orderKinds {
			for _, head := range heads {
				tok := "kl"
				if head == checkpoint.CategoricalHead {
					tok = "vq"
				}
				for _, d := range []engine.DType{engine.F32, engine.BF16} {
					t.Run(fmt.Sprint(attention, "/", order, "/", head, "/", d), func(t *testing.T) {
						checkCombination(t, dev, d, attention, RandomOrder, order, head, tok)
					})
				}
			}
		}
	}
}
