package main

import (
	"margo/cpu"
	"margo/engine/imageio"
	"margo/engine/plan"
)

// checkImage is the size of an image. It refuses one that free bytes of the host's
// memory are too few to read; 0 is no limit. Half a megabyte of PNG may hold 64
// megapixels.
func checkImage(path string, free int64) (w, h int, err error) {
	if w, h, err = imageio.ImageSize(path); err != nil {
		return 0, 0, err
	}
	if need := imageio.ReadBytes(w, h); free > 0 && need > free {
		return 0, 0, failf("not enough memory: to read the %d×%d pixels of %s takes %s, there are %s free", w, h, path, plan.Size(need), plan.Size(free))
	}
	return w, h, nil
}

// hostMemory is what is free where images are read, whatever the device has.
func hostMemory() int64 {
	_, free := cpu.Memory()
	return free
}
