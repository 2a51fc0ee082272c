package tokenizer

import (
	"math"

	"margo/engine"
)

// Tiled works on images tile by tile, so that memory and the cost of attention
// grow with the tile, not with the image, and any height and width fit that are
// multiples of Stride. Neighbouring tiles overlap, and their results are blended
// with weights that fall linearly across the overlap, latents in Encode (before
// they are quantised, where they are) and pixels in Decode.
//
// The result is not that of the whole image: GroupNorm's statistics and the
// attention of the lowest level see a tile only, so that colours may drift from
// tile to tile, and what blending mixes is softer. Images no larger than a tile
// are passed through as they are.
type Tiled struct {
	Tokenizer
	Tile    int // positions of latents per side
	Overlap int // positions that neighbours share, at least
}

// NewTiled checks the sizes: 0 ≤ overlap < tile, else an error of kind Invalid.
func NewTiled(t Tokenizer, tile, overlap int) (*Tiled, error) {
	if tile < 1 || overlap < 0 || overlap >= tile {
		return nil, engine.Errorf("tiles", engine.Invalid, "tiles of %d latent positions with an overlap of %d: tiles must be larger than the overlap", tile, overlap)
	}
	return &Tiled{t, tile, overlap}, nil
}

// Count is the number of tiles for latents of h×w.
func (t *Tiled) Count(h, w int) int {
	return len(cut(h, t.Tile, t.Overlap)) * len(cut(w, t.Tile, t.Overlap))
}

// span is a tile along one side: positions [at, at+n).
type span struct{ at, n int }

// cut covers n positions with equally long spans, evenly spaced, of which
// neighbours share overlap positions or more.
func cut(n, tile, overlap int) []span {
	if n <= tile {
		return []span{{0, n}}
	}
	k := (n - overlap + tile - overlap - 1) / (tile - overlap)
	out := make([]span, k)
	for i := range out {
		out[i] = span{i * (n - tile) / (k - 1), tile}
	}
	return out
}

// weights gives for each span the weight of each of its positions, in units of
// 1/scale positions: linear from a neighbour's far edge to the own, and together
// 1 everywhere.
func weights(spans []span, scale int) [][]float32 {
	last := spans[len(spans)-1]
	sum := make([]float64, (last.at+last.n)*scale)
	raw := make([][]float64, len(spans))
	for i, s := range spans {
		raw[i] = make([]float64, s.n*scale)
		for p := range raw[i] {
			w := 1.0
			if i > 0 { // shared with the span before
				w = min(w, (float64(p)+0.5)/float64(max(spans[i-1].at+spans[i-1].n-s.at, 1)*scale))
			}
			if i+1 < len(spans) {
				w = min(w, (float64(s.n*scale-p)-0.5)/float64(max(s.at+s.n-spans[i+1].at, 1)*scale))
			}
			raw[i][p] = w
			sum[s.at*scale+p] += w
		}
	}
	out := make([][]float32, len(spans))
	for i, s := range spans {
		out[i] = make([]float32, len(raw[i]))
		for p, w := range raw[i] {
			out[i][p] = float32(w / sum[s.at*scale+p])
		}
	}
	return out
}

// block views a part of images [N,H,W,C] on the host.
type block struct {
	v          []float32
	n, h, w, c int
}

// part copies the h×w positions from (y, x) on of every image.
func (b block) part(y, x, h, w int) []float32 {
	out := make([]float32, 0, b.n*h*w*b.c)
	for i := range b.n {
		for r := y; r < y+h; r++ {
			at := ((i*b.h+r)*b.w + x) * b.c
			out = append(out, b.v[at:at+w*b.c]...)
		}
	}
	return out
}

// blend adds part [N,h,w,C], weighted by wy and wx, at (y, x).
func (b block) blend(part []float32, y, x int, wy, wx []float32) {
	for i := range b.n {
		for r, a := range wy {
			at := ((i*b.h+y+r)*b.w + x) * b.c
			from := (i*len(wy) + r) * len(wx) * b.c
			for j := range len(wx) * b.c {
				b.v[at+j] += a * wx[j/b.c] * part[from+j]
			}
		}
	}
}

// each calls f for every tile of latents h×w, with its weights at scale units per
// position, until c has an error.
func (t *Tiled) each(c *engine.Ctx, h, w, scale int, f func(y, x span, wy, wx []float32)) {
	ys, xs := cut(h, t.Tile, t.Overlap), cut(w, t.Tile, t.Overlap)
	wy, wx := weights(ys, scale), weights(xs, scale)
	for i, y := range ys {
		for j, x := range xs {
			if c.Poll() {
				return
			}
			c.Scoped(func() { f(y, x, wy[i], wx[j]) })
		}
	}
}

// Encode encodes each tile of img [N,H,W,3] F32 and blends means and log
// variances. It waits for the device.
func (t *Tiled) Encode(c *engine.Ctx, img *engine.Tensor) *Posterior {
	s := t.Stride()
	if c.Err() != nil || img == nil || len(img.Shape) != 4 || img.Shape[1]%s != 0 || img.Shape[2]%s != 0 ||
		img.Shape[1] <= t.Tile*s && img.Shape[2] <= t.Tile*s {
		return t.Tokenizer.Encode(c, img)
	}
	src := block{c.Download(img), img.Shape[0], img.Shape[1], img.Shape[2], img.Cols()}
	h, w := src.h/s, src.w/s
	p := newPosterior(src.n, h, w, t.Channels())
	mean, logvar := block{p.Mean, p.N, h, w, p.C}, block{p.LogVar, p.N, h, w, p.C}
	certain := false
	t.each(c, h, w, 1, func(y, x span, wy, wx []float32) {
		tile := t.Tokenizer.Encode(c, c.F32(src.part(y.at*s, x.at*s, y.n*s, x.n*s), src.n, y.n*s, x.n*s, src.c))
		if c.Err() != nil {
			return
		}
		mean.blend(tile.Mean, y.at, x.at, wy, wx)
		if certain = math.IsInf(float64(tile.LogVar[0]), -1); !certain {
			logvar.blend(tile.LogVar, y.at, x.at, wy, wx)
		}
	})
	if c.Err() != nil {
		return nil
	}
	if certain {
		p.certain()
	} else {
		p.spread()
	}
	return p
}

// Decode decodes each tile of latents z [N,h,w,Channels] F32 and blends the
// pixels.
func (t *Tiled) Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor {
	s := t.Stride()
	if c.Err() != nil || z == nil || len(z.Shape) != 4 || z.Shape[1] <= t.Tile && z.Shape[2] <= t.Tile {
		return t.Tokenizer.Decode(c, z)
	}
	src := block{c.Download(z), z.Shape[0], z.Shape[1], z.Shape[2], z.Cols()}
	var out block
	t.each(c, src.h, src.w, s, func(y, x span, wy, wx []float32) {
		tile := t.Tokenizer.Decode(c, c.F32(src.part(y.at, x.at, y.n, x.n), src.n, y.n, x.n, src.c))
		v := c.Download(tile)
		if c.Err() != nil {
			return
		}
		if out.v == nil {
			out = block{make([]float32, src.n*src.h*s*src.w*s*tile.Cols()), src.n, src.h * s, src.w * s, tile.Cols()}
		}
		out.blend(v, y.at*s, x.at*s, wy, wx)
	})
	if c.Err() != nil {
		return nil
	}
	return c.F32(out.v, out.n, out.h, out.w, out.c)
}

// Codes is the number of codes of a tokenizer with a codebook, 0 of another.
func (t *Tiled) Codes() int {
	if v, ok := t.Tokenizer.(*VQ); ok {
		return v.Codes()
	}
	return 0
}

// DecodeCodes decodes codes [N·h·w] of a tokenizer with a codebook tile by tile, as
// Decode does their vectors.
func (t *Tiled) DecodeCodes(c *engine.Ctx, codes []int32, n, h, w int) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	v, ok := t.Tokenizer.(*VQ)
	if !ok {
		c.Fail(engine.Errorf("decode", engine.Invalid, "codes, and the tokenizer has no codebook"))
		return nil
	}
	if h <= t.Tile && w <= t.Tile {
		return v.DecodeCodes(c, codes, n, h, w)
	}
	networks := Tiled{&v.KL, t.Tile, t.Overlap} // the vectors need no search
	return networks.Decode(c, v.Vectors(c, codes, n, h, w))
}
