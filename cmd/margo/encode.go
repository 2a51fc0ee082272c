package main

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/imageio"
)

func encodeCommand() *cli.Command {
	return &cli.Command{
		Name:      "encode",
		Usage:     "turn images into a tokenizer's latents",
		UsageText: "margo encode IMAGE… --tokenizer FILE [--out FILE] [--recon FOLDER] [flags]",
		Description: `Images are PNG or JPEG of any size and shape; sides that are no multiple of the tokenizer's stride are filled up by repeating the last pixels, and decode cuts that off again. --size crops about the centre and resizes first.

--out gets a safetensors file with latents [N,C,h,w], float32: the mean of the posterior, or with --draw a draw from it; of a VQ tokenizer what is then quantised, and codes [N,h,w], int32, beside it. They are not multiplied by the latent scale. All images of a file must have latents of one size.

--recon decodes the latents again, writes the images as PNG and prints their PSNR: 10·log10(255²/MSE) over all pixels and channels.

Large images need much memory (KL-16 in f32: 2 GB for 1024×1024 pixels and 7 GB for 2048×2048, with --recon 3 and 12 GB). --tile works tile by tile instead and needs what a tile needs; tiles overlap, which can double the work, and are blended. The result is not that of the whole image: normalisation and attention see one tile only.

Examples:
  margo encode dog.png cat.jpg --tokenizer kl16.safetensors --size 256x256 --out latents.safetensors
  margo encode photo.png --tokenizer sd-vae-ft-mse.safetensors --recon again --tile 512`,
		Flags: slices.Concat(tokenizeFlags(), []cli.Flag{
			&cli.StringFlag{Name: "size", Category: "Images", DefaultText: "each image's own", Usage: "`WxH`|crop to this shape and resize to these pixels (256 is 256x256)"},
			&cli.BoolFlag{Name: "draw", Category: "Images", Usage: "draw latents from the posterior instead of taking its mean"},
			&cli.Uint64Flag{Name: "seed", Category: "Images", DefaultText: "0", Usage: "`SEED`|of --draw; image i depends on it and i only"},
		}, tileFlags(), machineFlags(), []cli.Flag{
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", Usage: "`FILE`|for the latents, safetensors"},
			&cli.StringFlag{Name: "recon", Category: "Output", Usage: "`FOLDER`|for the images as the tokenizer decodes them"},
			jsonFlag(),
		}),
		Action: runEncode,
	}
}

// encoded is an image as encode prints it.
type encoded struct {
	Image   string   `json:"image"`
	Width   int      `json:"width"`
	Height  int      `json:"height"`
	Latents [3]int   `json:"latents"` // C, h, w
	Recon   string   `json:"reconstruction,omitempty"`
	PSNR    *float64 `json:"psnr_db,omitempty"` // absent if the images are equal
}

func runEncode(c *cli.Context) error {
	sources := c.Args().Slice()
	if len(sources) == 0 {
		return usagef("name the images: margo encode IMAGE… --tokenizer FILE --out LATENTS.safetensors")
	}
	out, recon := c.String("out"), c.String("recon")
	if out == "" && recon == "" {
		return usagef("nothing would be written: give --out FILE for the latents, --recon FOLDER for the images as they are decoded, or both")
	}
	if ext := strings.ToLower(filepath.Ext(out)); out != "" && ext != ".safetensors" {
		return usagef("--out %s: latents are written as .safetensors", out)
	}
	w, h, err := parseSize(c.String("size"))
	if err != nil {
		return err
	}
	t, err := openTokenize(c)
	if err != nil {
		return err
	}
	defer t.close()

	// Everything that may be refused, before any work.
	stride := t.info.KL.Stride()
	list := &latents{tokenizer: filepath.Base(t.path), stride: stride, scale: t.info.LatentScale}
	for _, path := range sources {
		iw, ih, err := checkImage(path, hostMemory())
		if err != nil {
			return err
		}
		if w > 0 {
			iw, ih = w, h
		}
		list.images = append(list.images, latentImage{filepath.Base(path), iw, ih})
		lw, lh := upTo(iw, stride)/stride, upTo(ih, stride)/stride
		if out != "" && len(list.images) > 1 && (lw != list.w || lh != list.h) {
			return usagef("%s has latents of %d×%d, %s of %d×%d: a file holds one size; give --size, or encode them into files of their own", sources[0], list.w, list.h, path, lw, lh)
		}
		list.w, list.h = lw, lh
		if err := t.fits(lh, lw, true, recon != ""); err != nil {
			return err
		}
	}
	var names []string
	if recon != "" {
		if names, err = pngNames(recon, sources); err != nil {
			return err
		}
		if err := keepSources(names, sources); err != nil {
			return err
		}
		o, err := openOutput(recon) // makes the folder
		if err != nil {
			return err
		}
		if o.kind != "dir" {
			return usagef("--recon %s: name a folder", recon)
		}
		defer o.abort()
	}
	if out != "" {
		if err := checkWritable(out); err != nil {
			return err
		}
	}
	var results []encoded
	err = t.bind(c.Context, true, func(x *engine.Ctx) error {
		for i, path := range sources {
			r, err := t.encodeImage(x, list, i, path, names, c)
			if err != nil {
				return err
			}
			if results = append(results, r); !c.Bool("json") {
				r.print(c)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if out != "" {
		if err := list.save(c.Context, out); err != nil {
			return err
		}
		if !c.Bool("json") {
			fmt.Fprintf(c.App.Writer, "%s: latents of %s, %d channels of %d×%d\n", out, images(len(sources)), list.c, list.w, list.h)
		}
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]any{"file": out, "images": results, "tokenizer": t.path, "kind": t.info.Kind})
	}
	return nil
}

// encodeImage encodes image i, appends its latents to list and, where names has
// a file for it, writes its reconstruction.
func (t *tokenize) encodeImage(x *engine.Ctx, list *latents, i int, path string, names []string, c *cli.Context) (r encoded, err error) {
	im := list.images[i]
	v, err := imageio.ReadImage(path, im.Width, im.Height)
	if err != nil {
		return r, err
	}
	fw, fh := upTo(im.Width, list.stride), upTo(im.Height, list.stride)
	if note := tileNote(t.tok, fh/list.stride, fw/list.stride); note != "" {
		logger(c).Infof("%s: %s", path, note)
	}
	x.Scoped(func() {
		p := t.tok.Encode(x, x.F32(pad(v, im.Width, im.Height, fw, fh), 1, fh, fw, 3))
		if x.Err() != nil {
			return
		}
		z := p.Mean
		if c.Bool("draw") {
			z = p.Draw(c.Uint64("seed"), i)
		}
		zt := x.F32(z, 1, p.H, p.W, p.C)
		if list.c = p.C; c.String("out") != "" {
			list.latents = append(list.latents, channelsFirst(z, p.H, p.W, p.C)...)
			if t.vq != nil {
				list.codes = append(list.codes, t.vq.Nearest(x, zt)...)
			}
		}
		r = encoded{Image: path, Width: im.Width, Height: im.Height, Latents: [3]int{p.C, p.H, p.W}}
		if names == nil || x.Err() != nil {
			return
		}
		var img *imageio.RGB
		if img, err = t.picture(x, zt, im.Width, im.Height, path); err != nil {
			return
		}
		src, _ := imageio.FromFloat(im.Width, im.Height, v)
		if db := imageio.PSNR(src, img); !math.IsInf(db, 1) {
			r.PSNR = &db
		}
		r.Recon = names[i]
		err = asFailure(imageio.WritePNG(names[i], img, map[string]any{"software": "margo " + c.App.Version, "image": im.Name,
			"tokenizer": filepath.Base(t.path), "device": t.dev.Name(), "dtype": t.dtype.String(), "psnr_db": r.PSNR}))
	})
	if err == nil {
		err = x.Err()
	}
	return r, err
}

func (r *encoded) print(c *cli.Context) {
	fmt.Fprintf(c.App.Writer, "%s: %d×%d pixels, latents %d×%d of %d channels", r.Image, r.Width, r.Height, r.Latents[2], r.Latents[1], r.Latents[0])
	if r.Recon != "" {
		db := math.Inf(1)
		if r.PSNR != nil {
			db = *r.PSNR
		}
		fmt.Fprintf(c.App.Writer, ", PSNR %s: %s", decibels(db), r.Recon)
	}
	fmt.Fprintln(c.App.Writer)
}

// parseSize reads WxH, or one number for a square; 0, 0 if there is none.
func parseSize(text string) (w, h int, err error) {
	if text == "" {
		return 0, 0, nil
	}
	a, b, two := strings.Cut(strings.ReplaceAll(strings.ToLower(text), "×", "x"), "x")
	if !two {
		b = a
	}
	w, err1 := strconv.Atoi(a)
	h, err2 := strconv.Atoi(b)
	if err1 != nil || err2 != nil || w < 1 || h < 1 {
		return 0, 0, usagef("--size is %q, it must be WIDTHxHEIGHT in pixels, as 256x256", text)
	}
	if w > imageio.MaxPixels/h { // what images may have that are read
		return 0, 0, usagef("--size is %q, it must have at most %d pixels", text, imageio.MaxPixels)
	}
	return w, h, nil
}

// channelsFirst turns [h,w,c] into [c,h,w].
func channelsFirst(v []float32, h, w, c int) []float32 {
	out := make([]float32, len(v))
	for i, x := range v {
		out[i%c*h*w+i/c] = x
	}
	return out
}

// channelsLast turns [c,h,w] into [h,w,c].
func channelsLast(v []float32, h, w, c int) []float32 {
	out := make([]float32, len(v))
	for i, x := range v {
		out[i%(h*w)*c+i/(h*w)] = x
	}
	return out
}
