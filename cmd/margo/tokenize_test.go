package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"image"
	"image/color"
	"image/png"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/imageio"
	"margo/engine/ref"
)

const (
	goldens   = "../../testdata/goldens/"
	vqTaming  = goldens + "vq_taming.ckpt"
	klLDM     = goldens + "kl_ldm.safetensors"
	diffusers = goldens + "kl_diffusers.safetensors"
)

// picture writes a PNG of smooth colours.
func picture(t *testing.T, path string, w, h int) string {
	t.Helper()
	img := image.NewNRGBA(image.Rect(0, 0, w, h))
	for y := range h {
		for x := range w {
			s := func(f float64) uint8 { return uint8(128 + 90*math.Sin(f)) }
			img.SetNRGBA(x, y, color.NRGBA{s(float64(x) / 5), s(float64(y) / 7), s(float64(x+y) / 9), 255})
		}
	}
	var b bytes.Buffer
	if err := png.Encode(&b, img); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o666); err != nil {
		t.Fatal(err)
	}
	return path
}

// There and back through a file of latents gives the pixels that encode's own
// reconstruction has, whose PSNR it prints; sizes that are no multiple of the
// stride come back.
func TestEncodeDecode(t *testing.T) {
	for _, tok := range []string{fashionKL, vqTaming, diffusers} {
		dir := t.TempDir()
		at := func(name string) string { return filepath.Join(dir, name) }
		a, b := picture(t, at("a.png"), 31, 21), picture(t, at("b.png"), 32, 22)
		var r struct {
			Kind   string
			Images []encoded
		}
		if err := json.Unmarshal([]byte(ok(t, "encode", a, b, "-t", tok, "--out", at("l.safetensors"), "--recon", at("r"), "--json")), &r); err != nil {
			t.Fatal(err)
		}
		if got := files(t, at("r")); !slices.Equal(got, []string{"a.png", "b.png"}) || len(r.Images) != 2 {
			t.Fatalf("%v, %+v", got, r)
		}
		ok(t, "decode", at("l.safetensors"), "-t", tok, "--out", at("d"))
		for i, name := range []string{"a.png", "b.png"} {
			src, recon, back := pixels(t, at(name)), pixels(t, at("r/"+name)), pixels(t, at("d/"+name))
			if recon.W != 31+i || recon.H != 21+i || !bytes.Equal(recon.Pix, back.Pix) {
				t.Errorf("%s %s: %d×%d, or other pixels from the file", tok, name, recon.W, recon.H)
			}
			sum := 0.0
			for j, p := range src.Pix {
				sum += math.Pow(float64(p)-float64(recon.Pix[j]), 2)
			}
			want := 10 * math.Log10(255*255/(sum/float64(len(src.Pix))))
			if im := r.Images[i]; im.PSNR == nil || math.Abs(*im.PSNR-want) > 1e-9 || im.Width != 31+i || im.Height != 21+i {
				t.Errorf("%s %s: %+v, want a PSNR of %g", tok, name, im, want)
			}
		}
		f, err := checkpoint.Open(at("l.safetensors"), checkpoint.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		z, _ := f.Tensor("latents")
		codes, hasCodes := f.Tensor("codes")
		s := r.Images[0].Latents
		if !slices.Equal(z.Shape, []int{2, s[0], s[1], s[2]}) || hasCodes != (r.Kind == "vq") || hasCodes && !slices.Equal(codes.Shape, []int{2, s[1], s[2]}) {
			t.Errorf("%s: latents %v, codes %v", tok, z.Shape, codes.Shape)
		}
		// One image to one file, in text.
		out := ok(t, "encode", a, "-t", tok, "--size", "16", "--out", at("one.safetensors"), "--draw", "--seed", "3")
		if !strings.Contains(out, "16×16 pixels") || strings.Contains(out, "PSNR") {
			t.Error(out)
		}
		ok(t, "decode", at("one.safetensors"), "-t", tok, "--out", at("one.png"), "--dtype", "bf16")
		if img := pixels(t, at("one.png")); img.W != 16 || img.H != 16 {
			t.Errorf("%d×%d", img.W, img.H)
		}
	}
}

// A draw differs from the mean, by the seed.
func TestEncodeDraws(t *testing.T) {
	dir := t.TempDir()
	a := picture(t, filepath.Join(dir, "a.png"), 28, 28)
	read := func(name string, args ...string) []float32 {
		path := filepath.Join(dir, name)
		ok(t, append([]string{"encode", a, "-t", fashionKL, "--out", path}, args...)...)
		f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		v := make([]float32, 7*7*16)
		if err := f.ReadF32("latents", v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	mean, one, two, again := read("m.safetensors"), read("1.safetensors", "--draw"), read("2.safetensors", "--draw", "--seed", "2"), read("3.safetensors", "--draw")
	if slices.Equal(mean, one) || slices.Equal(one, two) || !slices.Equal(one, again) {
		t.Error("draws do not depend on the seed alone")
	}
}

// Tiles change little where the network was trained on images of their size, and
// say what they do.
func TestEncodeTiles(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	a := picture(t, at("a.png"), 100, 56)
	ok(t, "encode", a, "-t", fashionKL, "--recon", at("whole"))
	code, out, msg := margo("encode", a, "-t", fashionKL, "--recon", at("tiles"), "--tile", "40", "--overlap", "12")
	if code != 0 || !strings.Contains(out, "PSNR") || !strings.Contains(msg, "8 tiles of 40 pixels, blended over 12") {
		t.Fatalf("exit %d: %s%s", code, out, msg)
	}
	src, whole, tiles := pixels(t, a), pixels(t, at("whole/a.png")), pixels(t, at("tiles/a.png"))
	t.Logf("PSNR %.2f dB whole, %.2f dB in tiles, %.2f dB between them", imageio.PSNR(src, whole), imageio.PSNR(src, tiles), imageio.PSNR(whole, tiles))
	if bytes.Equal(whole.Pix, tiles.Pix) || imageio.PSNR(src, tiles) < imageio.PSNR(src, whole)-3 {
		t.Error("tiles change nothing, or lose too much")
	}
	// An image of a tile's size is left alone.
	ok(t, "encode", a, "-t", fashionKL, "--recon", at("one"), "--tile", "128")
	if !bytes.Equal(pixels(t, at("one/a.png")).Pix, whole.Pix) {
		t.Error("an image smaller than a tile is changed")
	}
	_, _, msg = margo(quick("-n", "1", "--tile", "16", "--out", at("s"))...)
	if msg != "" { // --quiet
		t.Error(msg)
	}
	code, _, msg = margo("sample", "--model", fashion, "--iters", "1", "--head-steps", "2", "-n", "1", "--tile", "16", "--out", at("s2"))
	if code != 0 || !strings.Contains(msg, "4 tiles of 16 pixels") {
		t.Errorf("exit %d: %s", code, msg)
	}
}

// A file of latents that another program made needs the tensor alone.
func TestDecodeForeign(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	save := func(name string, meta map[string]string, entries ...checkpoint.Entry) string {
		if err := checkpoint.Save(context.Background(), at(name), entries, meta); err != nil {
			t.Fatal(err)
		}
		return at(name)
	}
	tensor := func(name string, d checkpoint.DType, shape ...int) checkpoint.Entry {
		return checkpoint.Entry{Info: checkpoint.Info{Name: name, DType: d, Shape: shape}, Write: func(w io.Writer) error {
			n := 1
			for _, s := range shape {
				n *= s
			}
			v := make([]int32, n)
			for i := range v {
				if v[i] = int32(i % 128); d == checkpoint.F32 {
					v[i] = int32(math.Float32bits(float32(math.Sin(float64(i)))))
				}
			}
			return binary.Write(w, binary.LittleEndian, v)
		}}
	}
	ok(t, "decode", save("z.safetensors", nil, tensor("latents", checkpoint.F32, 2, 4, 3, 5)), "-t", klLDM, "--out", at("z"))
	if got := files(t, at("z")); !slices.Equal(got, []string{"00000.png", "00001.png"}) || pixels(t, at("z/00001.png")).W != 10 {
		t.Errorf("%v", got)
	}
	ok(t, "decode", save("c.safetensors", nil, tensor("codes", checkpoint.I32, 1, 3, 5)), "-t", vqTaming, "--out", at("c.png"))

	a := picture(t, at("a.png"), 16, 16)
	other := picture(t, at("other.png"), 40, 16)
	folder := at("folder")
	os.Mkdir(folder, 0o777)
	same := picture(t, filepath.Join(folder, "a.png"), 16, 16)
	latents := save("l.safetensors", map[string]string{"kind": "latents", "stride": "8"}, tensor("latents", checkpoint.F32, 1, 4, 2, 2))
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"encode"}, 2, "name the images"},
		{[]string{"encode", a, "-t", klLDM}, 2, "nothing would be written"},
		{[]string{"encode", a, "--out", at("o.safetensors")}, 2, "--tokenizer FILE is needed"},
		{[]string{"encode", a, "-t", klLDM, "--out", at("o.npz")}, 2, "written as .safetensors"},
		{[]string{"encode", a, other, "-t", klLDM, "--out", at("o.safetensors")}, 2, "a file holds one size"},
		{[]string{"encode", a, same, "-t", klLDM, "--recon", at("o")}, 2, "would both be written"},
		{[]string{"encode", a, "-t", klLDM, "--recon", dir}, 2, "would be overwritten"},
		{[]string{"encode", a, "-t", klLDM, "--recon", at("o.npz")}, 2, "name a folder"},
		{[]string{"encode", a, "-t", klLDM, "--recon", at("o"), "--size", "10by10"}, 2, "WIDTHxHEIGHT"},
		{[]string{"encode", a, "-t", fashion, "--recon", at("o")}, 3, "holds a MAR, not a tokenizer"},
		{[]string{"encode", at("none.png"), "-t", klLDM, "--recon", at("o")}, 3, "no such file"},
		{[]string{"encode", klLDM, "-t", klLDM, "--recon", at("o")}, 3, "neither PNG nor JPEG"},
		{[]string{"encode", a, "-t", klLDM, "--recon", at("o"), "--tile", "15"}, 2, "--tile is 15, it must be a multiple of the tokenizer's stride 2"},
		{[]string{"encode", a, "-t", klLDM, "--recon", at("o"), "--tile", "8", "--overlap", "8"}, 2, "--overlap is 8, it must be below --tile 8"},
		{[]string{"encode", a, "-t", klLDM, "--recon", at("o"), "--overlap", "8"}, 2, "give --tile too"},
		{[]string{"encode", a, "-t", klLDM, "--recon", at("o"), "--dtype", "f16"}, 2, "f32 or bf16"},
		{[]string{"decode", "-t", klLDM}, 2, "name one file of latents"},
		{[]string{"decode", latents, "-t", klLDM, "--out", at("o")}, 2, "made at stride 8, the tokenizer has stride 2"},
		{[]string{"decode", at("z.safetensors"), "-t", fashionKL, "--out", at("o")}, 2, "4 channels, the tokenizer 16"},
		{[]string{"decode", at("z.safetensors"), "-t", klLDM, "--out", at("o.png")}, 2, "has 2 images: name a folder"},
		{[]string{"decode", at("z.safetensors"), "-t", klLDM, "--out", at("o.npz")}, 2, "decode writes PNG"},
		{[]string{"decode", at("c.safetensors"), "-t", klLDM, "--out", at("o")}, 3, `has no tensor "latents"`},
		{[]string{"decode", save("k.safetensors", nil, tensor("codes", checkpoint.I32, 1, 20, 20)), "-t", goldens + "vq_ldm.safetensors", "--out", at("k")}, 0, ""},
		{[]string{"decode", klLDM, "-t", vqTaming, "--out", at("o")}, 3, `"codes" [N,h,w]`},
		{[]string{"decode", fashionKL, "-t", vqTaming, "--out", at("o")}, 3, "holds a kl, not latents"},
		{[]string{"decode", save("m.safetensors", map[string]string{"images": `[{"name":"x","width":11,"height":6}]`}, tensor("latents", checkpoint.F32, 1, 4, 3, 5)),
			"-t", klLDM, "--out", at("o")}, 3, "said to have 11×6 pixels, its latents make 10×6"},
		{[]string{"decode", save("n.safetensors", map[string]string{"images": `[]`}, tensor("latents", checkpoint.F32, 1, 4, 3)), "-t", klLDM, "--out", at("o")}, 3, "expected floating-point [N,C,h,w]"},
	} {
		code, out, msg := margo(c.args...)
		if code != c.code || !strings.Contains(out+msg, c.want) {
			t.Errorf("%v: exit %d, want %d and %q: %s%s", c.args, code, c.code, c.want, out, msg)
		}
	}
	if exists(at("o")) || exists(at("o.npz")) || exists(at("o.safetensors")) {
		t.Errorf("something is left: %v", files(t, dir))
	}
}

// small is a device with little memory.
type small struct {
	engine.Device
	free int64
}

func (s small) Info() engine.Info {
	i := s.Device.Info()
	i.MemFree = s.free
	return i
}

// What does not fit is refused before any work, with the way out.
func TestTokenizeMemory(t *testing.T) {
	f, info, err := openKind(vqTaming, checkpoint.KindKL, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tok := &tokenize{tokenizerFile: tokenizerFile{path: vqTaming, file: f, info: info, scale: 1}, dev: small{ref.New(ref.Exact), 64 << 20}}
	defer tok.close()
	if err := tok.fits(32, 32, true, true); err != nil {
		t.Errorf("64×64 pixels: %v", err)
	}
	err = tok.fits(256, 512, true, true)
	if exitCode(err) != exitFailed || !strings.Contains(err.Error(), "an image of 1024×512 pixels in f32 needs") || !strings.Contains(err.Error(), "--tile 512 needs less") {
		t.Errorf("1024×512 pixels: %v", err)
	}
	tok.tiling = tiling{64, 16}
	if err := tok.fits(256, 512, true, true); err != nil {
		t.Errorf("in tiles: %v", err)
	}
	tok.dev = small{ref.New(ref.Exact), 1 << 20}
	if err := tok.fits(256, 512, false, true); err == nil || !strings.Contains(err.Error(), "smaller tiles need less") {
		t.Errorf("1 MiB: %v", err)
	}
}

// A name in a file's metadata leads nowhere but into the folder.
func TestDecodeHostileNames(t *testing.T) {
	dir := t.TempDir()
	a := picture(t, filepath.Join(dir, "a.png"), 8, 8)
	path := filepath.Join(dir, "l.safetensors")
	ok(t, "encode", a, "-t", klLDM, "--out", path)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(data, []byte(`a.png`), []byte(`/../x`), 1), 0o666); err != nil {
		t.Fatal(err)
	}
	ok(t, "decode", path, "-t", klLDM, "--out", filepath.Join(dir, "in"))
	if got := files(t, filepath.Join(dir, "in")); !slices.Equal(got, []string{"x.png"}) || exists(filepath.Join(dir, "x.png")) {
		t.Errorf("%v", got)
	}
}

// A MAR of tokens of 2×2 positions on the latents of a KL-8 in diffusers' layout
// (P45) makes images, and refuses tokenizers of other latents.
func TestSampleKL8(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	run := []string{"sample", "--model", goldens + "mar_kl8.safetensors", "-n", "1", "--max-timestep", "600", "--quiet"}
	ok(t, append(run, "--out", at("a.png"))...)
	if img := pixels(t, at("a.png")); img.W != 256 || img.H != 256 {
		t.Errorf("%d×%d pixels", img.W, img.H)
	}
	if p := parameters(t, at("a.png")); p["tokenizer"] != "kl_diffusers_old.safetensors" || p["latent_scale"] != 0.5 {
		t.Errorf("%v", p)
	}
	code, _, msg := margo(append(run, "--tokenizer", vqTaming, "--out", at("b.png"))...)
	if code != 2 || !strings.Contains(msg, "latents of 16 channels at stride 2, the model") || !strings.Contains(msg, "wants 4 at stride 8") {
		t.Errorf("exit %d: %s", code, msg)
	}
	d := inspectJSON(t, goldens+"mar_kl8.safetensors")
	if d.Config["patch_size"] != 2.0 || d.Config["vae_stride"] != 8.0 {
		t.Errorf("%+v", d.Config)
	}
	d = inspectJSON(t, vqTaming)
	if d.Kind != "vq" || d.Config["n_embed"] != 128.0 || len(d.Parts) != 3 || d.Parts[2] != (part{"codebook", 2048}) {
		t.Errorf("%+v", d)
	}
	if out := ok(t, "inspect", diffusers, "--tensors"); !strings.Contains(out, "layout         diffusers") || !strings.Contains(out, "decoder.mid_block.attentions.0.to_out.0.bias") {
		t.Error(out)
	}
	out := ok(t, "convert", goldens+"kl_diffusers_old.safetensors", at("k.safetensors"))
	if d := inspectJSON(t, at("k.safetensors")); !strings.Contains(out, "diffusers' 0.18215 is assumed") || d.Scale != 0.18215 || d.Kind != "kl" {
		t.Errorf("%s%+v", out, d)
	}
}
