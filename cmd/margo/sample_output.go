package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"margo/engine/imageio"
)

// output is where sample's images go: a folder of PNGs, one sheet, or an npz.
type output struct {
	path    string
	kind    string // dir, png, npz
	made    []string
	job     *job
	npz     *imageio.NPZ
	sheet   []*imageio.RGB
	files   []string
	running bool
}

// openOutput decides by the name what is written and finds out, before any
// work, whether it can be.
func openOutput(path string) (*output, error) {
	o := &output{path: path}
	switch ext := strings.ToLower(filepath.Ext(path)); ext {
	case ".png", ".npz":
		o.kind = ext[1:]
		return o, checkWritable(path)
	case ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".zip":
		return nil, usagef("--out: %s files are not written; use a folder, NAME.png or NAME.npz", ext)
	}
	if path == "" {
		return nil, usagef("--out is empty; name a folder, a .png or an .npz file")
	}
	o.kind = "dir"
	if err := o.makeFolder(path); err != nil {
		o.abort()
		return nil, failf("cannot make the folder %s: %w", path, cause(err))
	}
	if err := checkWritable(filepath.Join(path, "00000.png")); err != nil {
		o.abort()
		return nil, err
	}
	return o, nil
}

// makeFolder is os.MkdirAll that remembers what it made, so that a run that
// fails leaves no empty folders.
func (o *output) makeFolder(path string) error {
	if s, err := os.Stat(path); err == nil {
		if !s.IsDir() {
			return fmt.Errorf("a file has that name")
		}
		return nil
	}
	if parent := filepath.Dir(path); parent != path {
		if err := o.makeFolder(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, 0o777); err != nil {
		if s, again := os.Stat(path); again == nil && s.IsDir() {
			return nil // another rank was faster
		}
		return err
	}
	o.made = append(o.made, path)
	return nil
}

// keepFolders leaves the folders that were made where they are, whatever happens:
// other ranks write into them.
func (o *output) keepFolders() { o.made = nil }

// begin starts writing the job's images.
func (o *output) begin(j *job) error {
	o.job, o.running = j, true
	if o.kind != "npz" {
		return nil
	}
	var err error
	o.npz, err = imageio.CreateNPZ(o.path, j.n, j.imageSize(), j.imageSize())
	return asFailure(err)
}

// add takes the next image; images come in the order of their index.
func (o *output) add(index, class int, img *imageio.RGB) error {
	switch o.kind {
	case "npz":
		return asFailure(o.npz.Add(img))
	case "png":
		o.sheet = append(o.sheet, img)
		return nil
	}
	path := filepath.Join(o.path, fmt.Sprintf("%05d.png", index))
	if err := imageio.WritePNG(path, img, o.job.describeImage(index, class)); err != nil {
		return asFailure(err)
	}
	o.files = append(o.files, path)
	return nil
}

// finish completes the output and names its files.
func (o *output) finish() ([]string, error) {
	o.running = false
	switch o.kind {
	case "npz":
		o.files = []string{o.path}
		return o.files, asFailure(o.npz.Close())
	case "png":
		o.files = []string{o.path}
		img := o.sheet[0]
		if len(o.sheet) > 1 { // one image is written as it is
			img = imageio.Grid(o.sheet, o.columns(o.job), imageio.GridScale(img.W), gridPad)
		}
		return o.files, asFailure(imageio.WritePNG(o.path, img, o.describe(o.job)))
	}
	return o.files, nil
}

// memory is what the output keeps in memory, in bytes: a sheet's images until
// all are there, then the sheet and the PNG encoder's RGBA copy of it.
func (o *output) memory(j *job) int64 {
	if o.kind != "png" {
		return 0
	}
	n, w, h := float64(j.n), j.imageSize(), j.imageSize()
	bytes := n * 3 * float64(w) * float64(h)
	perPixel := 4.
	if j.n > 1 {
		w, h = imageio.GridSize(j.n, w, h, o.columns(j), imageio.GridScale(w), gridPad)
		perPixel += 3
	}
	return int64(min(bytes+perPixel*float64(w)*float64(h), 1<<60)) // beyond any memory
}

// gridPad is the white space between the images of a sheet, in pixels.
const gridPad = 2

// written lists the files that are complete.
func (o *output) written() []string { return o.files }

// abort removes what is not complete, and folders that were made for nothing.
// After finish it does nothing.
func (o *output) abort() {
	if o.npz != nil {
		o.npz.Abort()
	}
	for i := len(o.made) - 1; i >= 0; i-- {
		os.Remove(o.made[i]) // fails, as it should, if anything is in it
	}
}

// columns of the sheet.
func (o *output) columns(j *job) int {
	if o.kind != "png" || j.n == 1 {
		return 0
	}
	return imageio.GridColumns(j.n, j.period())
}

// describe gives the parameters of the output as a whole.
func (o *output) describe(j *job) imageParams {
	if o.kind == "png" && j.n == 1 {
		return j.describeImage(j.first, j.label(j.first))
	}
	p := j.params
	p.FirstIndex, p.Images, p.Columns = &j.first, j.n, o.columns(j)
	for i := range j.period() {
		p.Classes = append(p.Classes, j.label(j.first+i))
	}
	p.ClassNames = j.classNames()
	return p
}

// describeImage gives the parameters of one image.
func (j *job) describeImage(index, class int) imageParams {
	p := j.params
	p.Index, p.Class, p.ClassName = &index, &class, className(j.info.ClassNames, class)
	return p
}

// asFailure marks an error of writing: its exit code is not that of a bad input
// file.
func asFailure(err error) error {
	if err == nil {
		return nil
	}
	return &exitError{exitFailed, err}
}
