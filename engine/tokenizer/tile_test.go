package tokenizer

import (
	"errors"
	"math"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

// local is a tokenizer that looks at nothing but a position's own pixels: tiling
// must not change what it does. Latents are the means of squares, decoding
// repeats them; calls numbers the tiles where number is set.
type local struct {
	stride int
	number bool
	calls  int
	sizes  [][2]int
}

func (l *local) Stride() int          { return l.stride }
func (l *local) Channels() int        { return 3 }
func (l *local) LatentScale() float32 { return 1 }

func (l *local) Encode(c *engine.Ctx, img *engine.Tensor) *Posterior {
	n, h, w, s := img.Shape[0], img.Shape[1]/l.stride, img.Shape[2]/l.stride, l.stride
	l.sizes = append(l.sizes, [2]int{h, w})
	v, p := c.Download(img), newPosterior(n, h, w, 3)
	for i, x := range v {
		ch, px, py, im := i%3, i/3%(w*s), i/3/(w*s)%(h*s), i/3/(w*s)/(h*s)
		p.Mean[((im*h+py/s)*w+px/s)*3+ch] += x / float32(s*s)
	}
	for i, m := range p.Mean {
		p.LogVar[i] = m - 1
	}
	p.spread()
	return p
}

func (l *local) Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor {
	n, h, w, s := z.Shape[0], z.Shape[1], z.Shape[2], l.stride
	l.sizes = append(l.sizes, [2]int{h, w})
	v, out := c.Download(z), make([]float32, n*h*s*w*s*3)
	for i := range out {
		ch, px, py, im := i%3, i/3%(w*s), i/3/(w*s)%(h*s), i/3/(w*s)/(h*s)
		out[i] = v[((im*h+py/s)*w+px/s)*3+ch]
		if l.number {
			out[i] = float32(l.calls)
		}
	}
	l.calls++
	return c.F32(out, n, h*s, w*s, 3)
}

func context(t *testing.T) *engine.Ctx {
	t.Helper()
	c, err := engine.NewCtx(ref.New(ref.Rounded), engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Spans cover everything, are equally long, overlap as asked, and their weights
// add up to 1.
func TestCut(t *testing.T) {
	for n := 1; n <= 40; n++ {
		for tile := 1; tile <= 12; tile++ {
			for overlap := range tile {
				spans := cut(n, tile, overlap)
				if spans[0].at != 0 || spans[len(spans)-1].at+spans[len(spans)-1].n != n {
					t.Fatalf("%d in %d/%d: %v", n, tile, overlap, spans)
				}
				for i, s := range spans {
					if s.n != min(n, tile) || i > 0 && (s.at <= spans[i-1].at || spans[i-1].at+s.n-s.at < overlap) {
						t.Fatalf("%d in %d/%d: %v", n, tile, overlap, spans)
					}
				}
				for scale := 1; scale <= 3; scale += 2 {
					sum := make([]float64, n*scale)
					for i, w := range weights(spans, scale) {
						for p, v := range w {
							if !(v > 0 && v <= 1) {
								t.Fatalf("%d in %d/%d: weight %g", n, tile, overlap, v)
							}
							sum[spans[i].at*scale+p] += float64(v)
						}
					}
					for p, v := range sum {
						if math.Abs(v-1) > 1e-6 {
							t.Fatalf("%d in %d/%d: weights at %d add up to %g", n, tile, overlap, p, v)
						}
					}
				}
			}
		}
	}
}

func TestTiledIsLocal(t *testing.T) {
	c := context(t)
	const n, h, w, s = 2, 9, 20, 2
	img := make([]float32, n*h*s*w*s*3)
	for i := range img {
		img[i] = float32(math.Sin(float64(i)))
	}
	whole := &local{stride: s}
	want := whole.Encode(c, c.F32(img, n, h*s, w*s, 3))
	inner := &local{stride: s}
	tiled, err := NewTiled(inner, 8, 3)
	if err != nil {
		t.Fatal(err)
	}
	got := tiled.Encode(c, c.F32(img, n, h*s, w*s, 3))
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	if len(inner.sizes) != tiled.Count(h, w) || tiled.Count(h, w) != 2*4 || inner.sizes[0] != [2]int{8, 8} {
		t.Errorf("%d tiles of %v", len(inner.sizes), inner.sizes)
	}
	near(t, "means", got.Mean, want.Mean, 1e-6)
	near(t, "log variances", got.LogVar, want.LogVar, 1e-6)
	near(t, "deviations", got.Std, want.Std, 1e-6)
	z := c.F32(want.Mean, n, h, w, 3)
	near(t, "pixels", c.Download(tiled.Decode(c, z)), c.Download(whole.Decode(c, z)), 1e-6)

	// Across a seam the result goes from one tile's to the next in equal steps.
	inner = &local{stride: s, number: true}
	tiled, _ = NewTiled(inner, 8, 4)
	v := c.Download(tiled.Decode(c, c.New(engine.F32, 1, 1, 12, 3)))
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	for x := range 12 * s {
		want := min(max((float64(x-4*s)+0.5)/(4*s), 0), 1)
		if math.Abs(float64(v[3*x])-want) > 1e-6 {
			t.Errorf("column %d is %g, want %g", x, v[3*x], want)
		}
	}
	// What fits into a tile is passed through.
	inner = &local{stride: s}
	tiled, _ = NewTiled(inner, 20, 4)
	if tiled.Decode(c, z); len(inner.sizes) != 1 || inner.sizes[0] != [2]int{h, w} {
		t.Errorf("tiles of %v", inner.sizes)
	}
	for _, bad := range [][2]int{{0, 0}, {4, 4}, {4, -1}} {
		if _, err := NewTiled(inner, bad[0], bad[1]); !errors.Is(err, engine.Invalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// Through real networks: tiles change the result, but not much and not its size;
// a VQ tokenizer's latents stay certain.
func TestTiledNetworks(t *testing.T) {
	for _, name := range []string{"kl_ldm.safetensors", "vq_ldm.safetensors"} {
		tok, c := bound(t, name, ref.New(ref.Rounded), engine.F32)
		tiled, err := NewTiled(tok, 8, 4)
		if err != nil {
			t.Fatal(err)
		}
		img := make([]float32, 24*40*3)
		for i := range img {
			img[i] = float32(math.Sin(float64(i) / 40))
		}
		x := c.F32(img, 1, 24, 40, 3)
		a, b := tok.Encode(c, x), tiled.Encode(c, x)
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		if b.H != 12 || b.W != 20 || b.C != a.C || (b.Std[0] == 0) != (name[0] == 'v') {
			t.Errorf("%s: %d×%d, deviation %g", name, b.H, b.W, b.Std[0])
		}
		out := c.Download(tiled.Decode(c, c.F32(a.Mean, 1, 12, 20, a.C)))
		whole := c.Download(tok.Decode(c, c.F32(a.Mean, 1, 12, 20, a.C)))
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		codes := []int32{}
		if v, ok := tok.(*VQ); ok {
			codes = v.Nearest(c, c.F32(a.Mean, 1, 12, 20, a.C))
			if v.Codes() != tiled.Codes() || !slices.Equal(out, c.Download(tiled.DecodeCodes(c, codes, 1, 12, 20))) {
				t.Errorf("%s: codes give other pixels than their latents: %v", name, c.Err())
			}
		} else if tiled.DecodeCodes(c, codes, 1, 0, 0); tiled.Codes() != 0 || !errors.Is(c.ClearErr(), engine.Invalid) {
			t.Errorf("%s: it has no codebook", name)
		}
		for what, p := range map[string][2][]float32{"latents": {b.Mean, a.Mean}, "pixels": {out, whole}} {
			var diff, size float64
			for i, v := range p[1] {
				diff += math.Pow(float64(v-p[0][i]), 2)
				size += float64(v) * float64(v)
			}
			t.Logf("%s: %s differ by %.2g", name, what, math.Sqrt(diff/size))
			if diff == 0 || diff > size || len(p[0]) != len(p[1]) {
				t.Errorf("%s: %s differ by %g of %g", name, what, diff, size)
			}
		}
	}
	stopped := uint32(1)
	tok, c := bound(t, "kl_ldm.safetensors", ref.New(ref.Rounded), engine.F32)
	tiled, _ := NewTiled(tok, 8, 4)
	z := c.New(engine.F32, 1, 12, 20, 4)
	c.Cancel = &stopped
	if tiled.Decode(c, z); !errors.Is(c.ClearErr(), engine.Cancelled) {
		t.Error("a set cancel flag does not stop Decode")
	}
}
