package imageio

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"errors"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/atomicfile"
)

// pattern is an image whose every byte depends on its place and on seed.
func pattern(w, h, seed int) *RGB {
	img := NewRGB(w, h)
	for i := range img.Pix {
		img.Pix[i] = uint8(i*7 + seed*31)
	}
	return img
}

func TestByteIsNumpysRound(t *testing.T) {
	// np.round(np.clip((y+1)/2*255, 0, 255)): 127.5 → 128 and 0.5 → 0 (even).
	for _, c := range []struct {
		y    float32
		want uint8
	}{{-1, 0}, {1, 255}, {0, 128}, {-1.5, 0}, {7, 255}, {float32(1.0/255 - 1), 0}, {float32(2*1.0/255 - 1), 1},
		{float32(math.NaN()), 0}, {float32(math.Inf(1)), 255}, {float32(math.Inf(-1)), 0}} {
		if got := Byte(c.y); got != c.want {
			t.Errorf("Byte(%v) = %d, want %d", c.y, got, c.want)
		}
	}
	for b := 0; b < 256; b++ { // reading and writing is the identity
		if got := Byte(float32(b)/127.5 - 1); int(got) != b {
			t.Errorf("%d became %d", b, got)
		}
	}
	if _, ok := FromFloat(1, 1, []float32{0, float32(math.NaN()), 0}); ok {
		t.Error("NaN passed as finite")
	}
	if _, ok := FromFloat(1, 1, []float32{0, 9, -9}); !ok {
		t.Error("9 is finite")
	}
}

func TestPNGRoundTrip(t *testing.T) {
	for _, name := range []string{"T-shirt/top", "Schuhgröße \x00"} { // tEXt and iTXt; NUL is escaped by JSON
		path := filepath.Join(t.TempDir(), "a.png")
		img := pattern(5, 3, 1)
		want := map[string]any{"class": name, "seed": 7.0}
		if err := WritePNG(path, img, want); err != nil {
			t.Fatal(err)
		}
		text, err := ReadText(path)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(text, &got); err != nil || got["class"] != name || got["seed"] != 7.0 {
			t.Errorf("parameters came back as %q (%v)", text, err)
		}
		f, _ := os.Open(path)
		defer f.Close()
		dec, err := png.Decode(f)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < 15; i++ {
			r, g, b, a := dec.At(i%5, i/5).RGBA()
			if uint8(r) != img.Pix[3*i] || uint8(g) != img.Pix[3*i+1] || uint8(b) != img.Pix[3*i+2] || a != 0xffff {
				t.Fatalf("pixel %d is %d %d %d", i, uint8(r), uint8(g), uint8(b))
			}
		}
		// 8-bit truecolour, as every evaluator expects
		data, _ := os.ReadFile(path)
		if data[24] != 8 || data[25] != 2 {
			t.Errorf("bit depth %d, colour type %d", data[24], data[25])
		}
	}
}

func TestPNGErrors(t *testing.T) {
	dir := t.TempDir()
	if err := WritePNG(filepath.Join(dir, "no", "a.png"), pattern(2, 2, 0), nil); !errors.Is(err, atomicfile.ErrWrite) {
		t.Errorf("no folder: %v", err)
	}
	if err := WritePNG(filepath.Join(dir, "a.png"), NewRGB(0, 0), nil); !errors.Is(err, engine.Invalid) {
		t.Errorf("no pixels: %v", err)
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// files lists the names in dir.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		names = append(names, f.Name())
	}
	return names
}

// The chunk goes behind the first bytes however they are cut up.
func TestInserter(t *testing.T) {
	for size := 1; size <= 10; size++ {
		var b bytes.Buffer
		w := &inserter{&b, 4, []byte("XY")}
		for text := "0123456789"; text != ""; {
			n, err := w.Write([]byte(text[:min(size, len(text))]))
			if err != nil || n != min(size, len(text)) {
				t.Fatal(n, err)
			}
			text = text[n:]
		}
		if got := b.String(); got != "0123XY456789" {
			t.Errorf("in pieces of %d: %q", size, got)
		}
	}
}

func TestReadTextOfForeignFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.png")
	if err := WritePNG(path, pattern(4, 4, 0), nil); err != nil {
		t.Fatal(err)
	}
	if text, err := ReadText(path); text != nil || err != nil {
		t.Errorf("no text expected, got %q, %v", text, err)
	}
	data, _ := os.ReadFile(path)
	for name, d := range map[string][]byte{"cut": data[:40], "text": []byte(strings.Repeat("hello ", 20)), "empty": nil} {
		p := filepath.Join(dir, name)
		os.WriteFile(p, d, 0o666)
		if _, err := ReadText(p); !errors.Is(err, engine.IO) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNPZ(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.npz")
	z, err := CreateNPZ(path, 3, 4, 5)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for i := 0; i < 3; i++ {
		img := pattern(5, 4, i)
		want = append(want, img.Pix...)
		if err := z.Add(img); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Add(pattern(5, 4, 3)); err == nil {
		t.Error("a fourth image was accepted")
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := zip.OpenReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if len(r.File) != 1 || r.File[0].Name != "arr_0.npy" || r.File[0].Method != zip.Store {
		t.Fatalf("entries: %v", r.File)
	}
	rc, _ := r.File[0].Open()
	data, err := io.ReadAll(rc) // verifies the checksum too
	if err != nil {
		t.Fatal(err)
	}
	n := 10 + int(data[8]) + int(data[9])<<8
	if string(data[:8]) != "\x93NUMPY\x01\x00" || n%64 != 0 || data[n-1] != '\n' {
		t.Errorf("npy header %q", data[:n])
	}
	if h := strings.TrimRight(string(data[10:n]), " \n"); h != "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4, 5, 3), }" {
		t.Errorf("npy dict %q", h)
	}
	if !bytes.Equal(data[n:], want) {
		t.Error("pixels differ")
	}
}

func TestNPZUnfinished(t *testing.T) {
	dir := t.TempDir()
	z, err := CreateNPZ(filepath.Join(dir, "s.npz"), 2, 4, 5)
	if err != nil {
		t.Fatal(err)
	}
	if err := z.Add(NewRGB(4, 4)); err == nil {
		t.Error("an image of another size was accepted")
	}
	z.Add(NewRGB(5, 4))
	if err := z.Close(); err == nil {
		t.Error("one of two images passed as complete")
	}
	if e, _ := os.ReadDir(dir); len(e) != 0 {
		t.Errorf("left behind: %v", e)
	}
}

func TestGridLayout(t *testing.T) {
	// Three 2×1 images in two columns, doubled, one pixel of padding. Every
	// letter is one pixel; '.' is padding or an empty place.
	var imgs []*RGB
	for i := 0; i < 3; i++ {
		img := NewRGB(2, 1)
		for j := range img.Pix {
			img.Pix[j] = uint8('a' + 2*i + j/3)
		}
		imgs = append(imgs, img)
	}
	g := Grid(imgs, 2, 2, 1)
	var got []string
	for y := 0; y < g.H; y++ {
		line := make([]byte, g.W)
		for x := range line {
			p := g.Pix[(y*g.W+x)*3:][:3]
			if p[0] != p[1] || p[1] != p[2] {
				t.Fatalf("grey became %v", p)
			}
			if line[x] = p[0]; p[0] == 255 {
				line[x] = '.'
			}
		}
		got = append(got, string(line))
	}
	want := []string{
		"...........",
		".aabb.ccdd.",
		".aabb.ccdd.",
		"...........",
		".eeff......",
		".eeff......",
		"...........",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("grid:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, c := range [][3]int{{40, 10, 10}, {16, 2, 4}, {15, 2, 4}, {12, 3, 3}, {18, 3, 3}, {200, 10, 10}, {400, 10, 20}, {5, 10, 5}, {8, 1, 3}, {9, 1, 3}, {1, 1, 1}, {1000, 1000, 32}} {
		if got := GridColumns(c[0], c[1]); got != c[2] {
			t.Errorf("GridColumns(%d, %d) = %d, want %d", c[0], c[1], got, c[2])
		}
	}
	for _, c := range [][2]int{{28, 3}, {32, 3}, {64, 1}, {256, 1}, {1, 96}} {
		if got := GridScale(c[0]); got != c[1] {
			t.Errorf("GridScale(%d) = %d, want %d", c[0], got, c[1])
		}
	}
}

func write(t *testing.T, name string, img image.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if strings.HasSuffix(name, ".jpg") {
		err = jpeg.Encode(f, img, &jpeg.Options{Quality: 100})
	} else {
		err = png.Encode(f, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadImage(t *testing.T) {
	// Same size: exact.
	src := image.NewNRGBA(image.Rect(0, 0, 3, 2))
	for i := range src.Pix {
		src.Pix[i] = uint8(i * 11)
		if i%4 == 3 {
			src.Pix[i] = 255
		}
	}
	got, err := ReadImage(write(t, "a.png", src), 3, 2)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 6; i++ {
		for c := 0; c < 3; c++ {
			if Byte(got[3*i+c]) != src.Pix[4*i+c] {
				t.Errorf("pixel %d channel %d: %v", i, c, got[3*i+c])
			}
		}
	}
	// A constant stays constant under crop and resize, up and down, PNG and JPEG.
	flat := image.NewUniform(color.Gray{100})
	for _, name := range []string{"f.png", "f.jpg"} {
		big := image.NewGray(image.Rect(0, 0, 37, 21))
		for i := range big.Pix {
			big.Pix[i] = flat.C.(color.Gray).Y
		}
		path := write(t, name, big)
		for _, size := range [][2]int{{8, 8}, {64, 64}, {5, 31}} {
			v, err := ReadImage(path, size[0], size[1])
			if err != nil || len(v) != size[0]*size[1]*3 {
				t.Fatal(name, size, len(v), err)
			}
			for _, x := range v {
				if math.Abs(float64(x)-(100/127.5-1)) > 1e-5 {
					t.Fatalf("%s %v: %v", name, size, x)
				}
			}
		}
	}
	// Left half black, right half white, halved: still black and white outside
	// the two columns next to the edge; the centre is cropped from a wide image.
	half := image.NewGray(image.Rect(0, 0, 32, 16))
	for i := range half.Pix {
		if i%32 >= 16 {
			half.Pix[i] = 255
		}
	}
	v, err := ReadImage(write(t, "h.png", half), 8, 8)
	if err != nil {
		t.Fatal(err)
	}
	for x := 0; x < 8; x++ {
		if y := v[x*3]; x < 3 && y != -1 || x > 4 && y != 1 {
			t.Errorf("column %d is %v", x, y)
		}
	}
	// Transparent is white.
	clear := image.NewNRGBA(image.Rect(0, 0, 2, 2))
	if v, _ := ReadImage(write(t, "c.png", clear), 2, 2); v[0] != 1 {
		t.Errorf("transparent black read as %v", v[0])
	}
}

func TestMask(t *testing.T) {
	src := image.NewGray(image.Rect(0, 0, 8, 4))
	src.SetGray(7, 0, color.Gray{255})
	src.SetGray(0, 3, color.Gray{128})
	src.SetGray(3, 3, color.Gray{127})
	m, err := ReadMask(write(t, "m.png", src), 8, 4)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range m {
		if b != (i == 7 || i == 24) {
			t.Errorf("pixel %d: %v", i, b)
		}
	}
	got := Cells(m, 8, 4, 4, 2)
	for i, b := range got {
		if b != (i == 3 || i == 4) {
			t.Errorf("cell %d: %v", i, b)
		}
	}
}

func TestBadImages(t *testing.T) {
	dir := t.TempDir()
	good := write(t, "a.png", image.NewGray(image.Rect(0, 0, 9, 9)))
	data, _ := os.ReadFile(good)
	huge := bytes.Clone(data)
	copy(huge[16:], []byte{0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff}) // IHDR; its checksum is now wrong too
	for name, d := range map[string][]byte{"empty": nil, "text": []byte("hello"), "cut": data[:50], "huge": huge} {
		p := filepath.Join(dir, name)
		os.WriteFile(p, d, 0o666)
		if _, err := ReadImage(p, 4, 4); !errors.Is(err, engine.IO) || !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ReadMask(filepath.Join(dir, "none"), 4, 4); !errors.Is(err, engine.IO) {
		t.Errorf("missing: %v", err)
	}
}

func FuzzFindText(f *testing.F) {
	f.Add([]byte("\x89PNG\r\n\x1a\n"))
	f.Add(append([]byte("\x89PNG\r\n\x1a\n"), textChunk(TextKey, []byte(`{"a":1}`))...))
	f.Add(append([]byte("\x89PNG\r\n\x1a\n"), textChunk(TextKey, []byte(`{"ä":1}`))...))
	f.Fuzz(func(t *testing.T, data []byte) { findText(data) })
}
