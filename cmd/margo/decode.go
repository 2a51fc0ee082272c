package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/imageio"
)

func decodeCommand() *cli.Command {
	return &cli.Command{
		Name:      "decode",
		Usage:     "turn a tokenizer's latents into images",
		UsageText: "margo decode LATENTS --tokenizer FILE [--out OUT] [flags]",
		Description: `LATENTS is what margo encode wrote, or any safetensors or PyTorch file with a tensor latents [N,C,h,w], as the tokenizer's encoder gives them (divided by the latent scale, if a MAR made them). A VQ tokenizer takes codes [N,h,w] if the file has them, and quantises latents otherwise.

--out is a folder, which gets a PNG for each image, named after the image that was encoded, else 00000.png and so on; or NAME.png for a single image.

--tile works tile by tile, for images that are too large for the memory; tiles overlap and are blended. The result is not that of the whole: normalisation and attention see one tile only, so colours may drift from tile to tile.

Examples:
  margo decode latents.safetensors --tokenizer kl16.safetensors --out again
  margo decode large.safetensors --tokenizer kl16.safetensors --tile 512 --out large.png`,
		Flags: slices.Concat(tokenizeFlags(), tileFlags(), machineFlags(), []cli.Flag{
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", Value: "decoded", Usage: "`OUT`|a folder, or NAME.png for one image"},
			jsonFlag(),
		}),
		Action: runDecode,
	}
}

func runDecode(c *cli.Context) error {
	if c.NArg() != 1 {
		return usagef("name one file of latents: margo decode LATENTS --tokenizer FILE --out FOLDER")
	}
	path, out := c.Args().First(), c.String("out")
	t, err := openTokenize(c)
	if err != nil {
		return err
	}
	defer t.close()
	l, err := readLatents(path, t.info.KL, t.dev.Info().MemFree)
	if err != nil {
		return err
	}
	if err := t.fits(l.h, l.w, false, true); err != nil {
		return err
	}
	single := strings.EqualFold(filepath.Ext(out), ".png")
	if single && len(l.images) > 1 {
		return usagef("--out %s is one file, %s has %s: name a folder", out, path, images(len(l.images)))
	}
	o, err := openOutput(out)
	if err != nil {
		return err
	}
	defer o.abort()
	if o.kind == "npz" {
		return usagef("--out %s: decode writes PNG; name a folder or a .png file", out)
	}
	files := []string{out}
	if !single {
		names := make([]string, len(l.images))
		for i, im := range l.images {
			if names[i] = filepath.Base(im.Name); im.Name == "" {
				names[i] = fmt.Sprintf("%05d", i)
			}
		}
		if files, err = pngNames(out, names); err != nil {
			return err
		}
	}
	err = t.bind(c.Context, false, func(x *engine.Ctx) error {
		if note := tileNote(t.tok, l.h, l.w); note != "" {
			logger(c).Info(note)
		}
		for i, im := range l.images {
			var img *imageio.RGB
			var err error
			x.Scoped(func() {
				var z *engine.Tensor
				if size := l.h * l.w; l.codes != nil {
					z = t.vq.Vectors(x, l.codes[i*size:(i+1)*size], 1, l.h, l.w)
				} else {
					size *= l.c
					z = x.F32(channelsLast(l.latents[i*size:(i+1)*size], l.h, l.w, l.c), 1, l.h, l.w, l.c)
				}
				if x.Err() == nil {
					img, err = t.picture(x, z, im.Width, im.Height, fmt.Sprintf("%s, image %d", path, i))
				}
			})
			if err == nil {
				err = x.Err()
			}
			if err == nil {
				err = asFailure(imageio.WritePNG(files[i], img, map[string]any{"software": "margo " + c.App.Version, "latents": filepath.Base(path),
					"tokenizer": filepath.Base(t.path), "index": i, "device": t.dev.Name(), "dtype": t.dtype.String()}))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]any{"files": files, "tokenizer": t.path, "kind": t.info.Kind})
	}
	fmt.Fprintf(c.App.Writer, "%s: %s\n", out, images(len(files)))
	return nil
}
