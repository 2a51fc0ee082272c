package main

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"fmt"
	"image"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/imageio"
)

// pixels decodes a PNG to RGB.
func pixels(t *testing.T, path string) *imageio.RGB {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	out := imageio.NewRGB(img.Bounds().Dx(), img.Bounds().Dy())
	for i := 0; i < out.W*out.H; i++ {
		r, g, b, _ := img.At(i%out.W, i/out.W).RGBA()
		copy(out.Pix[3*i:], []uint8{uint8(r >> 8), uint8(g >> 8), uint8(b >> 8)})
	}
	return out
}

func parameters(t *testing.T, path string) map[string]any {
	t.Helper()
	text, err := imageio.ReadText(path)
	if err != nil {
		t.Fatal(err)
	}
	var p map[string]any
	if err := json.Unmarshal(text, &p); err != nil {
		t.Fatalf("%s: %q: %v", path, text, err)
	}
	return p
}

func TestSampleFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "folder")
	out := ok(t, quick("--classes", "sneaker,1", "-n", "3", "--seed", "7", "--first-index", "5", "--temperature", "0.9", "--out", dir, "--json")...)
	if got := files(t, dir); !slices.Equal(got, []string{"00005.png", "00006.png", "00007.png"}) {
		t.Fatalf("files %v", got)
	}
	p := parameters(t, filepath.Join(dir, "00006.png"))
	for k, want := range map[string]any{"model": "fashion-mar.safetensors", "tokenizer": "fashion-kl.safetensors", "seed": 7.0, "index": 6.0,
		"class": 7.0, "class_name": "sneaker", "iters": 1.0, "head_steps": 2.0, "max_timestep": 950.0, "cfg": 2.0, "cfg_schedule": "linear",
		"temperature": 0.9, "device": "cpu", "dtype": "f32"} {
		if p[k] != want {
			t.Errorf("%s is %v, want %v", k, p[k], want)
		}
	}
	if img := pixels(t, filepath.Join(dir, "00006.png")); img.W != 28 || img.H != 28 {
		t.Errorf("%d×%d pixels", img.W, img.H)
	}
	var r result
	if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.Files) != 3 || r.Images != 3 || r.Rate <= 0 || r.Parameters.Seed != 7 {
		t.Errorf("--json gave %s (%v)", out, err)
	}
}

// An image depends on seed and index only: not on batch, threads, the number of
// images, or the container.
func TestSampleSameImages(t *testing.T) {
	dir := t.TempDir()
	a, b, c := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "s.npz")
	ok(t, quick("-n", "5", "--batch", "5", "--threads", "1", "--out", a)...)
	ok(t, quick("-n", "3", "--batch", "2", "--threads", "2", "--first-index", "2", "--out", b)...)
	ok(t, quick("-n", "5", "--batch", "2", "--out", c)...)

	z, err := zip.OpenReader(c)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	r, err := z.File[0].Open()
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	n := 10 + int(data[8]) + int(data[9])<<8
	if !strings.Contains(string(data[:n]), "'shape': (5, 28, 28, 3)") || len(data) != n+5*28*28*3 {
		t.Fatalf("npy header %q and %d bytes", data[:n], len(data)-n)
	}
	for i, name := range []string{"00000.png", "00001.png", "00002.png", "00003.png", "00004.png"} {
		img := pixels(t, filepath.Join(a, name))
		if !bytes.Equal(img.Pix, data[n+i*28*28*3:][:28*28*3]) {
			t.Errorf("image %d differs between PNG and npz", i)
		}
		if i >= 2 && !bytes.Equal(img.Pix, pixels(t, filepath.Join(b, name)).Pix) {
			t.Errorf("image %d depends on batch, threads or first index", i)
		}
	}
	if bytes.Equal(data[n:][:28*28*3], data[n+28*28*3:][:28*28*3]) {
		t.Error("images 0 and 1 are equal")
	}
}

// Weights of the head in FP8 are in the picture's parameters, and a device that only rounds them is warned of.
func TestSampleFP8(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("MARGO_HEAD_WEIGHTS", "fp8")
	code, _, msg := margo(quick("-n", "1", "--dtype", "bf16", "--out", dir)...)
	if code != 0 || !strings.Contains(msg, "head weights in fp8: cpu computes with the rounded numbers in bf16") {
		t.Errorf("exit %d: %s", code, msg)
	}
	if p := parameters(t, filepath.Join(dir, "00000.png")); p["head_weights"] != "fp8" || p["dtype"] != "bf16" {
		t.Errorf("%v", p)
	}
}

func TestSampleSheet(t *testing.T) {
	dir := t.TempDir()
	sheet, single := filepath.Join(dir, "sheet.png"), filepath.Join(dir, "single.png")
	out := ok(t, "sample", "--model", fashion, "--iters", "1", "--head-steps", "2", "--progress", "off", "--classes", "0-2", "-n", "5", "-o", sheet)
	if !strings.Contains(out, "5 images") || !strings.Contains(out, "columns: T-shirt/top, trouser, pullover") {
		t.Errorf("printed %q", out)
	}
	// 3 columns, 2 rows, 28·3 pixels each, padding of 2.
	img := pixels(t, sheet)
	if img.W != 3*86+2 || img.H != 2*86+2 {
		t.Errorf("sheet of %d×%d", img.W, img.H)
	}
	p := parameters(t, sheet)
	if p["images"] != 5.0 || p["columns"] != 3.0 || p["first_index"] != 0.0 {
		t.Errorf("parameters %v", p)
	}
	// Image 4, class 1, is in column 1 of row 1; a single image is written as it is.
	ok(t, quick("--classes", "0-2", "-n", "1", "--first-index", "4", "-o", single)...)
	one := pixels(t, single)
	if one.W != 28 || parameters(t, single)["class"] != 1.0 {
		t.Fatalf("single image %d wide, %v", one.W, parameters(t, single))
	}
	for y := range 28 {
		for x := range 28 {
			s := ((2+86+3*y+1)*img.W + 2 + 86 + 3*x + 1) * 3
			if !bytes.Equal(img.Pix[s:s+3], one.Pix[(y*28+x)*3:][:3]) {
				t.Fatalf("pixel %d,%d of the sheet is not that of the image", x, y)
			}
		}
	}
}

func TestSampleReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.png")
	os.WriteFile(path, []byte("old"), 0o666)
	os.WriteFile(filepath.Join(dir, "mine.txt"), []byte("mine"), 0o666)
	ok(t, quick("-n", "1", "--uncond", "-o", path)...)
	if p := parameters(t, path); p["class"] != -1.0 || p["class_name"] != "unconditional" || p["cfg"] != 1.0 {
		t.Errorf("parameters %v", p)
	}
	ok(t, quick("-n", "1", "-o", dir)...)
	if got := files(t, dir); !slices.Equal(got, []string{"00000.png", "mine.txt", "x.png"}) {
		t.Errorf("files %v", got)
	}
}

func TestInpaint(t *testing.T) {
	dir := t.TempDir()
	source, mask, out := filepath.Join(dir, "s.png"), filepath.Join(dir, "m.png"), filepath.Join(dir, "o")
	ok(t, "sample", "--model", fashion, "--iters", "12", "--head-steps", "25", "--classes", "trouser", "-n", "1", "--seed", "1", "--quiet", "-o", source)
	writeMask(t, mask, 28, 20) // the two lower rows of tokens
	code, _, msg := margo("sample", "--model", fashion, "--iters", "4", "--head-steps", "25", "--classes", "trouser", "-n", "2", "--image", source, "--mask", mask, "-o", out)
	if code != 0 || !strings.Contains(msg, "filling 14 of 49 tokens") {
		t.Fatalf("exit %d: %s", code, msg)
	}
	want := pixels(t, source)
	a, b := pixels(t, filepath.Join(out, "00000.png")), pixels(t, filepath.Join(out, "00001.png"))
	diff := func(x, y *imageio.RGB, from, to int) float64 { // mean over rows
		sum := 0.0
		for i := from * 28 * 3; i < to*28*3; i++ {
			sum += max(float64(x.Pix[i])-float64(y.Pix[i]), float64(y.Pix[i])-float64(x.Pix[i]))
		}
		return sum / float64((to-from)*28*3)
	}
	if d := diff(a, want, 0, 16); d > 12 {
		t.Errorf("the kept part differs by %.1f of 255", d)
	}
	if d := diff(a, b, 22, 28); d == 0 {
		t.Error("the filled part is the same in both images")
	}
	if parameters(t, filepath.Join(out, "00000.png"))["mask"] != filepath.Base(mask) {
		t.Error("the mask's name is not recorded")
	}
	// Nothing to fill: a black mask.
	if code, _, msg := margo(quick("--image", source, "--mask", writeGray(t, dir, 0), "-o", out)...); code != exitUsage || !strings.Contains(msg, "no white pixel") {
		t.Errorf("exit %d: %s", code, msg)
	}
	// Everything to fill: what the image shows does not matter.
	all := writeGray(t, dir, 255)
	ok(t, quick("--image", source, "--mask", all, "-n", "1", "-o", filepath.Join(dir, "p.png"))...)
	ok(t, quick("--image", all, "--mask", all, "-n", "1", "-o", filepath.Join(dir, "q.png"))...)
	ok(t, quick("-n", "1", "-o", filepath.Join(dir, "r.png"))...)
	p, q, r := pixels(t, filepath.Join(dir, "p.png")), pixels(t, filepath.Join(dir, "q.png")), pixels(t, filepath.Join(dir, "r.png"))
	if !bytes.Equal(p.Pix, q.Pix) || !bytes.Equal(p.Pix, r.Pix) {
		t.Error("an image that is masked completely has an influence")
	}
}

// writeMask makes a mask that is white from row from on.
func writeMask(t *testing.T, path string, side, from int) {
	t.Helper()
	m := image.NewGray(image.Rect(0, 0, side, side))
	for i := from * side; i < len(m.Pix); i++ {
		m.Pix[i] = 255
	}
	writePNG(t, path, m)
}

func writePNG(t *testing.T, path string, m image.Image) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := png.Encode(f, m); err != nil {
		t.Fatal(err)
	}
}

func writeGray(t *testing.T, dir string, v uint8) string {
	t.Helper()
	m := image.NewGray(image.Rect(0, 0, 40, 30))
	for i := range m.Pix {
		m.Pix[i] = v
	}
	path := filepath.Join(dir, fmt.Sprintf("gray%d.png", v))
	writePNG(t, path, m)
	return path
}

func TestInterrupt(t *testing.T) {
	for _, name := range []string{"folder", "grid.png", "s.npz"} {
		dir := t.TempDir()
		signals := make(chan os.Signal, 2)
		var out, errs buffer
		done := make(chan int)
		go func() {
			done <- run([]string{"sample", "--model", fashion, "--iters", "49", "--head-steps", "100", "-n", "100000", "--batch", "1",
				"--out", filepath.Join(dir, name)}, &out, &errs, signals)
		}()
		time.Sleep(700 * time.Millisecond)
		start := time.Now()
		signals <- os.Interrupt
		select {
		case code := <-done:
			if code != exitInterrupted {
				t.Errorf("%s: exit %d: %s", name, code, errs.String())
			}
		case <-time.After(60 * time.Second):
			t.Fatalf("%s: still running a minute after the signal", name)
		}
		t.Logf("%s: stopped after %v", name, time.Since(start))
		if !strings.HasSuffix(errs.String(), "margo: interrupted\n") {
			t.Errorf("%s: %q", name, errs.String())
		}
		left := files(t, dir)
		if name != "folder" {
			if len(left) != 0 {
				t.Errorf("%s: left %v", name, left)
			}
			continue
		}
		for _, f := range left { // the folder, if it has whole images
			images := files(t, filepath.Join(dir, f))
			for _, i := range images {
				pixels(t, filepath.Join(dir, f, i))
			}
			if len(images) == 0 {
				t.Error("an empty folder stayed")
			}
		}
	}
}

// smallDevice is a device with little memory.
type smallDevice struct {
	engine.Device
	free int64
}

func (d smallDevice) Name() string { return "small" }

func (d smallDevice) Info() engine.Info { return engine.Info{Name: "small", MemFree: d.free} }

func TestNotEnoughMemory(t *testing.T) {
	f, info, err := openModel(fashion, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var log buffer
	tok, err := openTokenizer("", fashion, info, newLogger(&log))
	if err != nil {
		t.Fatal(err)
	}
	defer tok.close()
	newJob := func(batch int) *job {
		return &job{settings: info.Sampling, labels: []int{0}, n: 64, batch: batch, info: info, tokenizer: tok}
	}
	one, err := newJob(1).memory(smallDevice{}, false)
	if err != nil {
		t.Fatal(err)
	}
	if weights := int64(4 * (2379744 + 594387)); one < weights || one > 4*weights {
		t.Errorf("%d bytes for a batch of 1 with %d bytes of weights", one, weights)
	}
	// A batch that was asked for is refused, another one shrinks, down to 1.
	j, dev := newJob(64), smallDevice{free: one + one/2}
	if err := j.checkMemory(true, dev, false, 0, newLogger(&log)); exitCode(err) != exitFailed || !strings.Contains(err.Error(), "not enough memory") || !strings.Contains(err.Error(), "MiB") {
		t.Errorf("64 images: %v", err)
	}
	if err := j.checkMemory(false, dev, false, 0, newLogger(&log)); err != nil || j.batch < 1 || j.batch >= 64 || !strings.Contains(log.String(), "for want of memory") {
		t.Errorf("batch %d: %v: %s", j.batch, err, log.String())
	}
	if err := newJob(64).checkMemory(false, smallDevice{free: one - 1}, false, 0, newLogger(&log)); err == nil {
		t.Error("less memory than one image takes was enough")
	}
	// A sheet's images are all kept: 64 of them, 8×8 magnified by 3 on the sheet,
	// which is held as RGB and as RGBA.
	j = newJob(1)
	j.labels = []int{0, 1, 2, 3, 4, 5, 6, 7}
	side := int64(8*(28*3+gridPad) + gridPad)
	sheet := (&output{kind: "png"}).memory(j)
	if want := 64*28*28*3 + 7*side*side; sheet != want {
		t.Errorf("a sheet of 64 takes %d bytes, want %d", sheet, want)
	}
	for kind, want := range map[string]int64{"npz": 0, "dir": 0} {
		if got := (&output{kind: kind}).memory(j); got != want {
			t.Errorf("%s: %d bytes, want %d", kind, got, want)
		}
	}
	if err := j.checkMemory(false, smallDevice{free: one + sheet}, false, sheet, newLogger(&log)); err != nil {
		t.Error(err)
	}
	for _, free := range []int64{one + sheet - 1, sheet - 1} {
		err := newJob(4).checkMemory(false, smallDevice{free: free}, false, sheet, newLogger(&log))
		if exitCode(err) != exitFailed || !strings.Contains(err.Error(), "a sheet of 64 images needs") || !strings.Contains(err.Error(), "a folder or .npz") {
			t.Errorf("%d bytes: %v", free, err)
		}
	}
	j.n = 1 << 31
	if huge := (&output{kind: "png"}).memory(j); huge < 1<<42 {
		t.Errorf("2^31 images take %d bytes", huge)
	}
}
