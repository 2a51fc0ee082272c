package imageio

// GridColumns chooses the columns of a grid of n images whose classes repeat
// with the given period (image i has class i mod period): about as many columns
// as rows, but a multiple of the period, so that a column holds one class, if
// that makes a sensible sheet.
func GridColumns(n, period int) int {
	c := 1
	for c*c < n {
		c++
	}
	if period < 1 || period > 32 {
		return c
	}
	return min(n, max(period, c/period*period))
}

// GridScale is the whole factor by which a grid magnifies images that are too
// small to look at (under 64 pixels wide): up to 96 pixels.
func GridScale(w int) int {
	if w <= 0 || w >= 64 {
		return 1
	}
	return 96 / w
}

// GridSize is the size in pixels of the sheet that Grid makes of n images of
// w×h pixels.
func GridSize(n, w, h, cols, scale, pad int) (int, int) {
	rows := (n + cols - 1) / cols
	return cols*(w*scale+pad) + pad, rows*(h*scale+pad) + pad
}

// Grid lays images of one size out in rows of cols, each magnified scale times
// (every pixel becomes a square), with pad white pixels between and around
// them. Places without an image stay white.
func Grid(imgs []*RGB, cols, scale, pad int) *RGB {
	if len(imgs) == 0 || cols < 1 || scale < 1 {
		return NewRGB(0, 0)
	}
	w, h := imgs[0].W*scale, imgs[0].H*scale
	g := NewRGB(GridSize(len(imgs), imgs[0].W, imgs[0].H, cols, scale, pad))
	for i := range g.Pix {
		g.Pix[i] = 255
	}
	for i, img := range imgs {
		x0, y0 := pad+i%cols*(w+pad), pad+i/cols*(h+pad)
		for y := 0; y < h; y++ {
			for x := 0; x < w; x++ {
				src := ((y/scale)*img.W + x/scale) * 3
				copy(g.Pix[((y0+y)*g.W+x0+x)*3:][:3], img.Pix[src:src+3])
			}
		}
	}
	return g
}
