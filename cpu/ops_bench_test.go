package cpu

import (
	"fmt"
	"math/rand"
	"testing"
	"time"

	"margo/engine"
)

// best runs call a few times per round and returns the seconds of the fastest.
func best(b *testing.B, call func() error) float64 {
	least := 1e9
	for range b.N {
		for range 5 {
			start := time.Now()
			if err := call(); err != nil {
				b.Fatal(err)
			}
			least = min(least, time.Since(start).Seconds())
		}
	}
	b.StopTimer()
	return least
}

// rate reports GF/s and the share of the peak measured in the same run.
func rate(b *testing.B, dt engine.DType, flops, seconds float64) {
	b.ReportMetric(flops/seconds/1e9, "GF/s")
	peak := PeakFLOPS(dt, DefaultThreads())
	b.ReportMetric(100*flops/seconds/peak, "%peak")
}

func BenchmarkAttention(b *testing.B) {
	for _, dt := range floats {
		for _, c := range []struct {
			name               string
			seqs, heads, dh, l int
			queries            int
			causal             bool
		}{
			{"mar-base", 2, 12, 64, 320, 320, false},
			{"mar-base last block", 2, 12, 64, 320, 4, false},
			{"mar-huge", 2, 16, 80, 320, 320, false},
			{"tokenizer 16x16", 1, 1, 512, 256, 256, false},
			{"tokenizer 32x32", 1, 1, 512, 1024, 1024, false},
			{"causal", 2, 12, 64, 320, 320, true},
		} {
			b.Run(fmt.Sprintf("%v/%s", dt, c.name), func(b *testing.B) {
				f := open(b, DefaultThreads())
				q, k := make([]int, c.seqs), make([]int, c.seqs)
				for i := range q {
					q[i], k[i] = c.queries, c.l
				}
				a := f.sequences(rand.New(rand.NewSource(1)), dt, c.heads, c.dh, q, k)
				a.Causal = c.causal
				flops := 4 * float64(c.seqs*c.heads*c.queries*c.l*c.dh)
				if c.causal {
					flops /= 2
				}
				rate(b, dt, flops, best(b, func() error { return f.s.Attention(a) }))
			})
		}
	}
}

func BenchmarkConv(b *testing.B) {
	for _, dt := range floats {
		for _, c := range []struct {
			cin, cout, size int
			up              bool
		}{
			{16, 512, 16, false}, {512, 512, 16, false}, {512, 512, 32, false}, {512, 512, 16, true}, {256, 256, 64, false},
			{256, 256, 128, false}, {128, 128, 256, false}, {128, 3, 256, false}, {3, 128, 256, false},
		} {
			name := fmt.Sprintf("%v/%d-%d@%d", dt, c.cin, c.cout, c.size)
			if c.up {
				name += "up"
			}
			b.Run(name, func(b *testing.B) {
				f := open(b, DefaultThreads())
				r := rand.New(rand.NewSource(1))
				w := f.put(dt, randn(r, c.cout*9*c.cin, 0.01), c.cout, 9*c.cin)
				a := engine.Conv2DArgs{X: f.image(dt, randn(r, c.size*c.size*c.cin, 1), 1, c.size, c.size, c.cin), W: w, Packed: f.pack(w, dt),
					Bias: f.put(engine.F32, randn(r, c.cout, 1), 1, c.cout), Kernel: 3, Stride: 1, Upsample: c.up,
					PadTop: 1, PadLeft: 1, PadBottom: 1, PadRight: 1}
				ho, wo := a.OutSize()
				a.Y = f.image(engine.F32, nil, 1, ho, wo, c.cout)
				rate(b, dt, 2*float64(ho*wo*c.cout*9*c.cin), best(b, func() error { return f.s.Conv2D(a) }))
			})
		}
	}
}

func BenchmarkRowOps(b *testing.B) {
	for _, dt := range floats { // of the output
		f := open(b, DefaultThreads())
		r := rand.New(rand.NewSource(1))
		for _, s := range [][2]int{{256, 128}, {64, 512}} {
			size, ch := s[0], s[1]
			b.Run(fmt.Sprintf("groupnorm+silu/%v/%dx%dx%d", dt, size, size, ch), func(b *testing.B) {
				x := f.image(engine.F32, randn(r, size*size*ch, 1), 1, size, size, ch)
				a := engine.GroupNormArgs{X: x, Y: f.image(dt, nil, 1, size, size, ch), Groups: 32, Eps: 1e-6, Act: engine.SiLU}
				b.ReportMetric(1e9*best(b, func() error { return f.s.GroupNorm(a) })/float64(x.Elems()), "ns/element")
			})
		}
		b.Run(fmt.Sprintf("norm/%v/640x768", dt), func(b *testing.B) {
			a := engine.NormArgs{X: f.put(engine.F32, randn(r, 640*768, 1), 640, 768), Y: f.tensor(dt, 640, 768, 768), Eps: 1e-6}
			b.ReportMetric(1e9*best(b, func() error { return f.s.Norm(a) })/(640*768), "ns/element")
		})
	}
}
