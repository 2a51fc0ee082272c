// Package imageio writes what a sampler makes and reads what in-painting needs:
// PNG files with their parameters inside, contact sheets (grids), folders of
// numbered PNGs, ADM's .npz of samples, and PNG/JPEG images and masks.
//
// Every file appears complete or not at all (package atomicfile); an existing
// file is replaced.
//
// Pixels are RGB, HWC. Float pixels are in [-1,1]; Byte maps them to uint8 as
// the authors' code does (engine_mar.py:evaluate).
package imageio

import "math"

// RGB is an 8-bit image: Pix[(y·W+x)·3+c].
type RGB struct {
	W, H int
	Pix  []uint8
}

// NewRGB makes a black image.
func NewRGB(w, h int) *RGB { return &RGB{W: w, H: h, Pix: make([]uint8, w*h*3)} }

// Byte is round(clip(255·(y+1)/2, 0, 255)) in float32, halves to even as
// np.round does. NaN gives 0: callers that care look for it first.
func Byte(y float32) uint8 {
	v := (y + 1) / 2 * 255
	if !(v > 0) {
		return 0
	}
	if v > 255 {
		return 255
	}
	return uint8(math.RoundToEven(float64(v)))
}

// FromFloat converts h·w·3 float pixels; finite is false if any of them is NaN
// or infinite.
func FromFloat(w, h int, y []float32) (img *RGB, finite bool) {
	img, finite = NewRGB(w, h), true
	for i, v := range y[:w*h*3] {
		if d := v - v; d != 0 { // NaN for NaN and ±Inf
			finite = false
		}
		img.Pix[i] = Byte(v)
	}
	return img, finite
}
