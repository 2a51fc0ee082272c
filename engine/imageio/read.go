package imageio

import (
	"bufio"
	"errors"
	"image"
	_ "image/jpeg" // decoders of ReadImage and ReadMask
	_ "image/png"
	"io"
	"io/fs"
	"math"
	"os"

	"margo/engine"
)

var (
	errNotPNG = errors.New("not a PNG file")
	errCutPNG = errors.New("PNG is cut off")
)

// MaxPixels is the size of the largest image that is read: what a decoder may
// allocate for a hostile header.
const MaxPixels = 1 << 26

func pathCause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// open opens a regular file: opening a FIFO would wait for its writer.
func open(path string) (*os.File, error) {
	s, err := os.Stat(path)
	if err == nil && !s.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	var f *os.File
	if err == nil {
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, engine.Errorf("read "+path, engine.IO, "%w", pathCause(err))
	}
	return f, nil
}

func decode(path string) (image.Image, error) {
	fail := func(format string, a ...any) (image.Image, error) {
		return nil, engine.Errorf("read "+path, engine.IO, format, a...)
	}
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := header(path, f); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fail("%w", pathCause(err))
	}
	img, _, err := image.Decode(bufio.NewReader(f))
	if err != nil {
		return fail("%w", err)
	}
	return img, nil
}

// plane is a float image of k channels, values 0..255.
type plane struct {
	w, h, k int
	v       []float32
}

// rgbPlane takes the colours of img over a white background.
func rgbPlane(img image.Image) *plane {
	b := img.Bounds()
	p := &plane{b.Dx(), b.Dy(), 3, make([]float32, b.Dx()*b.Dy()*3)}
	i := 0
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			r, g, bl, a := img.At(x, y).RGBA() // premultiplied, 16 bits
			for _, c := range [3]uint32{r, g, bl} {
				p.v[i] = float32(c+0xffff-a) / 257
				i++
			}
		}
	}
	return p
}

// ReadImage reads a PNG or JPEG as h·w·3 float pixels x/127.5 − 1. An image of
// another size is cropped to the wanted shape about its centre and resized
// with an antialiased triangle filter. Transparent pixels lie on white.
func ReadImage(path string, w, h int) ([]float32, error) {
	img, err := decode(path)
	if err != nil {
		return nil, err
	}
	p := rgbPlane(img).fit(w, h)
	for i, v := range p.v {
		p.v[i] = v/127.5 - 1
	}
	return p.v, nil
}

// ReadMask reads a PNG or JPEG as h·w booleans: true, to be filled, where the
// mask is at least half white (mean of R, G and B ≥ 128; transparent is
// white). It is fitted as ReadImage fits the image, so a mask painted over the
// original matches.
func ReadMask(path string, w, h int) ([]bool, error) {
	img, err := decode(path)
	if err != nil {
		return nil, err
	}
	p := rgbPlane(img).fit(w, h)
	m := make([]bool, w*h)
	for i := range m {
		m[i] = p.v[3*i]+p.v[3*i+1]+p.v[3*i+2] >= 3*128
	}
	return m, nil
}

// Cells reduces a mask of h×w pixels to rows×cols cells, raster order: a cell
// is true if any of its pixels is.
func Cells(mask []bool, w, h, cols, rows int) []bool {
	out := make([]bool, rows*cols)
	for y := 0; y < h; y++ {
		for x := 0; x < w; x++ {
			if mask[y*w+x] {
				out[(y*rows/h)*cols+x*cols/w] = true
			}
		}
	}
	return out
}

// fit crops to the aspect w:h about the centre and resizes.
func (p *plane) fit(w, h int) *plane {
	if p.w == w && p.h == h {
		return p
	}
	cw, ch := p.w, p.h
	if p.w*h > p.h*w {
		cw = max(1, p.h*w/h)
	} else {
		ch = max(1, p.w*h/w)
	}
	c := &plane{cw, ch, p.k, make([]float32, cw*ch*p.k)}
	x0, y0 := (p.w-cw)/2, (p.h-ch)/2
	for y := 0; y < ch; y++ {
		copy(c.v[y*cw*p.k:(y+1)*cw*p.k], p.v[((y+y0)*p.w+x0)*p.k:])
	}
	return c.resizeRows(w).transpose().resizeRows(h).transpose()
}

// resizeRows resamples each row to w pixels: the triangle filter, widened by
// the factor of reduction, so that no source pixel is skipped.
func (p *plane) resizeRows(w int) *plane {
	if p.w == w {
		return p
	}
	o := &plane{w, p.h, p.k, make([]float32, w*p.h*p.k)}
	scale := float64(p.w) / float64(w)
	radius := max(1, scale)
	for x := 0; x < w; x++ {
		centre := (float64(x)+0.5)*scale - 0.5
		from, to := max(0, int(centre-radius)), min(p.w-1, int(centre+radius)+1)
		weight, sum := make([]float64, to-from+1), 0.0
		for i := from; i <= to; i++ {
			d := max(float64(i)-centre, centre-float64(i))
			weight[i-from] = max(0, 1-d/radius)
			sum += weight[i-from]
		}
		for y := 0; y < p.h; y++ {
			for c := 0; c < p.k; c++ {
				acc := 0.0
				for i := from; i <= to; i++ {
					acc += weight[i-from] * float64(p.v[(y*p.w+i)*p.k+c])
				}
				o.v[(y*w+x)*p.k+c] = float32(acc / sum)
			}
		}
	}
	return o
}

func (p *plane) transpose() *plane {
	o := &plane{p.h, p.w, p.k, make([]float32, len(p.v))}
	for y := 0; y < p.h; y++ {
		for x := 0; x < p.w; x++ {
			copy(o.v[(x*p.h+y)*p.k:(x*p.h+y+1)*p.k], p.v[(y*p.w+x)*p.k:])
		}
	}
	return o
}

// ImageSize is the width and height of a PNG or JPEG, from its header.
func ImageSize(path string) (w, h int, err error) {
	f, err := open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	c, err := header(path, f)
	return c.Width, c.Height, err
}

// ReadBytes is about what reading an image of w×h pixels takes at most: 8 bytes a
// pixel as decoded, 12 as floats, and 12 once more where it is cropped.
func ReadBytes(w, h int) int64 { return int64(w) * int64(h) * 32 }

// header reads an image's size and checks that it can be decoded.
func header(path string, r io.Reader) (image.Config, error) {
	c, _, err := image.DecodeConfig(bufio.NewReader(r))
	switch {
	case errors.Is(err, image.ErrFormat):
		err = engine.Errorf("read "+path, engine.IO, "neither PNG nor JPEG")
	case err != nil:
		err = engine.Errorf("read "+path, engine.IO, "%w", err)
	case c.Width <= 0 || c.Height <= 0 || c.Width > MaxPixels/c.Height:
		err = engine.Errorf("read "+path, engine.IO, "%d×%d pixels: at most %d are read", c.Width, c.Height, MaxPixels)
	}
	return c, err
}

// PSNR is the peak signal-to-noise ratio of two images of one size in dB,
// 10·log₁₀(255²/MSE) over all pixels and channels; +Inf for equal images.
func PSNR(a, b *RGB) float64 {
	sum := 0.0
	for i, x := range a.Pix {
		d := float64(x) - float64(b.Pix[i])
		sum += d * d
	}
	return 10 * math.Log10(255*255*float64(len(a.Pix))/sum)
}
