package imageio

import (
	"archive/zip"
	"bufio"
	"fmt"
	"strings"

	"margo/engine"
	"margo/engine/atomicfile"
)

// NPZ streams samples into a file that ADM's evaluator and numpy read: a zip,
// stored without compression, with the one array arr_0, uint8 [N,H,W,3] in C
// order. Images are not kept in memory; above 4 GiB the zip is a zip64.
type NPZ struct {
	path    string
	file    *atomicfile.File
	buf     *bufio.Writer
	zip     *zip.Writer
	w       writer
	n, next int
	size    int
}

type writer interface{ Write([]byte) (int, error) }

// CreateNPZ starts a file of n images of h×w pixels.
func CreateNPZ(path string, n, h, w int) (*NPZ, error) {
	f, err := atomicfile.Create(path)
	if err != nil {
		return nil, err
	}
	z := &NPZ{path: path, file: f, n: n, size: h * w * 3}
	z.buf = bufio.NewWriterSize(f, 1<<20)
	z.zip = zip.NewWriter(z.buf)
	z.w, err = z.zip.CreateHeader(&zip.FileHeader{Name: "arr_0.npy", Method: zip.Store})
	if err == nil {
		_, err = z.w.Write(npyHeader(n, h, w))
	}
	if err != nil {
		f.Abort()
		return nil, err
	}
	return z, nil
}

// npyHeader is the version 1.0 header of numpy's format: magic, length and a
// Python dict, padded with spaces to a multiple of 64 bytes.
func npyHeader(n, h, w int) []byte {
	dict := fmt.Sprintf("{'descr': '|u1', 'fortran_order': False, 'shape': (%d, %d, %d, 3), }", n, h, w)
	dict += strings.Repeat(" ", 63-(10+len(dict))%64) + "\n"
	return append([]byte{0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, byte(len(dict)), byte(len(dict) >> 8)}, dict...)
}

// Add appends an image; there must be exactly n of them.
func (z *NPZ) Add(img *RGB) error {
	if z.next >= z.n || len(img.Pix) != z.size {
		return engine.Errorf("write "+z.path, engine.Invalid, "image %d of %d×%d does not fit the declared array of %d", z.next, img.H, img.W, z.n)
	}
	z.next++
	_, err := z.w.Write(img.Pix)
	return err
}

// Close completes the file, or removes it if images are missing.
func (z *NPZ) Close() error {
	if z.next != z.n {
		z.Abort()
		return engine.Errorf("write "+z.path, engine.Invalid, "%d of %d images were written", z.next, z.n)
	}
	err := z.zip.Close()
	if err == nil {
		err = z.buf.Flush()
	}
	if err != nil {
		z.Abort()
		return err
	}
	return z.file.Commit()
}

// Abort removes the unfinished file.
func (z *NPZ) Abort() { z.file.Abort() }
