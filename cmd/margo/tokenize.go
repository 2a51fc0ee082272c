package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/imageio"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/tokenizer"
)

// tileFlags choose to work on images tile by tile.
func tileFlags() []cli.Flag {
	return []cli.Flag{
		&cli.IntFlag{Name: "tile", Category: "Tiles", DefaultText: "the whole image at once", Usage: "`PIXELS`|work on tiles of this size and blend them: less memory for large images, but colours may drift from tile to tile"},
		&cli.IntFlag{Name: "overlap", Category: "Tiles", DefaultText: "a quarter of --tile", Usage: "`PIXELS`|that neighbouring tiles share; their results are blended there"},
	}
}

// tiling is what tileFlags say, in pixels; a tile of 0 is none.
type tiling struct{ tile, overlap int }

func readTiling(c *cli.Context) (tiling, error) {
	t := tiling{c.Int("tile"), c.Int("overlap")}
	for _, name := range []string{"tile", "overlap"} {
		if err := inRange(c, name, map[string]int{"tile": 1}[name], 1<<20); err != nil {
			return t, err
		}
	}
	if c.IsSet("overlap") && !c.IsSet("tile") {
		return t, usagef("--overlap is of tiles: give --tile too")
	}
	if !c.IsSet("overlap") {
		t.overlap = -1
	}
	return t, nil
}

// shared is the overlap in pixels; if none was given, a quarter of the tile, up to
// whole latent positions of stride pixels.
func (t tiling) shared(stride int) int {
	if t.overlap < 0 {
		return upTo(t.tile/4, stride)
	}
	return t.overlap
}

// wrap makes tok work tile by tile, if that was asked for.
func (t tiling) wrap(tok tokenizer.Tokenizer) (tokenizer.Tokenizer, error) {
	if t.tile == 0 {
		return tok, nil
	}
	s := tok.Stride()
	overlap := t.shared(s)
	for name, v := range map[string]int{"tile": t.tile, "overlap": overlap} {
		if v%s != 0 {
			return nil, usagef("--%s is %d, it must be a multiple of the tokenizer's stride %d", name, v, s)
		}
	}
	if overlap >= t.tile {
		return nil, usagef("--overlap is %d, it must be below --tile %d", overlap, t.tile)
	}
	return tokenizer.NewTiled(tok, t.tile/s, overlap/s)
}

// tokenize is the common part of encode and decode: a tokenizer on a device.
type tokenize struct {
	tokenizerFile
	tok   tokenizer.Tokenizer // tiled, if that was asked for
	vq    *tokenizer.VQ       // its codebook, if it has one
	dev   engine.Device
	dtype engine.DType
}

// tokenizeFlags are those of both directions.
func tokenizeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "tokenizer", Aliases: []string{"t"}, Category: "Model", Usage: "`FILE`|the tokenizer's weights: KL or VQ, in the layout of MAR, LDM, taming or diffusers (needed)"},
		&cli.StringFlag{Name: "which", Category: "Model", DefaultText: "ema if the file has it", Usage: "`NAME`|weights to take from a PyTorch file: ema, model, or another entry's name"},
	}
}

func machineFlags() []cli.Flag {
	return []cli.Flag{
		deviceFlag(),
		&cli.StringFlag{Name: "dtype", Category: "Machine", Value: "f32", Usage: "`DTYPE`|compute in f32, or in bf16: faster where the CPU has it, half the memory, small differences"},
		threadsFlag(),
	}
}

// openTokenize opens the file that --tokenizer names; nothing is loaded yet.
func openTokenize(c *cli.Context) (*tokenize, error) {
	path := c.String("tokenizer")
	if path == "" {
		return nil, usagef("--tokenizer FILE is needed: the weights to %s with", c.Command.Name)
	}
	if err := inRange(c, "threads", 1, 4096); err != nil {
		return nil, err
	}
	tiles, err := readTiling(c)
	if err != nil {
		return nil, err
	}
	t := &tokenize{}
	if t.dtype, err = engine.ParseDType(c.String("dtype")); err != nil {
		return nil, usagef("--dtype: %q is not a dtype; use f32 or bf16", c.String("dtype"))
	}
	f, info, err := openKind(path, checkpoint.KindKL, checkpoint.MAROptions{}, checkpoint.OpenOptions{State: c.String("which")})
	if err != nil {
		return nil, err
	}
	t.tokenizerFile = tokenizerFile{path: path, file: f, info: info, scale: 1, tiling: tiles}
	if info.KL.InChannels != 3 || info.KL.OutChannels != 3 {
		f.Close()
		return nil, usagef("the tokenizer %s is of images with %d channels (%d decoded), not RGB", path, info.KL.InChannels, info.KL.OutChannels)
	}
	if t.dev, err = openDevice(c.String("device"), c.Int("threads")); err != nil {
		f.Close()
		return nil, err
	}
	return t, nil
}

func (t *tokenize) close() {
	if t.dev != nil {
		t.dev.Close()
	}
	t.tokenizerFile.close()
}

// fits refuses an image of h×w latent positions that the device cannot hold:
// the work is laid out on a device that only counts.
func (t *tokenize) fits(h, w int, encode, decode bool) error {
	free := t.dev.Info().MemFree
	if free <= 0 {
		return nil
	}
	dev := plan.For(t.dev)
	tok, params, err := t.make(encode)
	if err != nil {
		return err
	}
	if err := load.Allocate(params, dev, t.dtype); err != nil {
		return err
	}
	c, err := engine.NewCtx(dev, t.dtype)
	if err != nil {
		return err
	}
	defer c.Close()
	s := tok.Stride()
	if encode {
		c.Scoped(func() { tok.Encode(c, c.New(engine.F32, 1, h*s, w*s, 3)) })
	}
	if decode {
		c.Scoped(func() { tok.Decode(c, c.New(engine.F32, 1, h, w, tok.Channels())) })
	}
	if c.Err() != nil {
		return c.Err()
	}
	if need := dev.Report().Peak; need > free {
		hint := "; --tile 512 needs less"
		if t.tile > 0 {
			hint = "; smaller tiles need less"
		}
		return failf("not enough memory: an image of %d×%d pixels in %s needs %s, %s has %s free%s", w*s, h*s, t.dtype, plan.Size(need), t.dev.Name(), plan.Size(free), hint)
	}
	return nil
}

// bind loads the weights and calls f with a context that stops when ctx is done.
func (t *tokenize) bind(ctx context.Context, encode bool, f func(c *engine.Ctx) error) (err error) {
	raw, err := t.loadRaw(ctx, t.dev, t.dtype, encode)
	if err != nil {
		return err
	}
	t.vq, _ = raw.(*tokenizer.VQ)
	if t.tok, err = t.wrap(raw); err != nil {
		return err
	}
	c, err := engine.NewCtx(t.dev, t.dtype)
	if err != nil {
		return err
	}
	var stop uint32
	defer context.AfterFunc(ctx, func() { atomic.StoreUint32(&stop, 1) })()
	c.Cancel = &stop
	defer func() {
		if e := c.Close(); err == nil {
			err = e
		}
	}()
	return f(c)
}

// tileNote says what tiling does to an image of h×w latent positions; "" if it
// does nothing.
func tileNote(tok tokenizer.Tokenizer, h, w int) string {
	tiled, ok := tok.(*tokenizer.Tiled)
	if !ok || tiled.Count(h, w) == 1 {
		return ""
	}
	s := tiled.Stride()
	return fmt.Sprintf("%d tiles of %d pixels, blended over %d: the network sees a tile at a time, so colours may differ from those of the whole image; larger tiles differ less",
		tiled.Count(h, w), tiled.Tile*s, tiled.Overlap*s)
}

// picture decodes latents z [1,h,w,C] to an image of which w×h pixels are kept.
func (t *tokenize) picture(c *engine.Ctx, z *engine.Tensor, w, h int, name string) (*imageio.RGB, error) {
	out := t.tok.Decode(c, z)
	v := c.Download(out)
	if c.Err() != nil {
		return nil, c.Err()
	}
	img, finite := imageio.FromFloat(w, h, crop(v, out.Shape[2], w, h))
	if !finite {
		return nil, failf("%s: the decoded image is not finite (NaN or infinite pixels): the weights or the latents are broken", name)
	}
	return img, nil
}

// crop keeps the first w×h pixels of an RGB image whose rows have full pixels.
func crop(v []float32, full, w, h int) []float32 {
	if full == w {
		return v[:w*h*3]
	}
	out := make([]float32, 0, w*h*3)
	for y := range h {
		out = append(out, v[y*full*3:(y*full+w)*3]...)
	}
	return out
}

// pad repeats the last column and row until the image has fw×fh pixels.
func pad(v []float32, w, h, fw, fh int) []float32 {
	if w == fw && h == fh {
		return v
	}
	out := make([]float32, 0, fw*fh*3)
	for y := range fh {
		row := v[min(y, h-1)*w*3:][:w*3]
		out = append(out, row...)
		for range fw - w {
			out = append(out, row[(w-1)*3:]...)
		}
	}
	return out
}

// upTo is the least multiple of s that is n or more.
func upTo(n, s int) int { return (n + s - 1) / s * s }

// pngName is where an image is written: named after its source.
func pngName(dir, source string) string {
	base := filepath.Base(source)
	return filepath.Join(dir, strings.TrimSuffix(base, filepath.Ext(base))+".png")
}

// pngNames names one PNG for each source, and refuses two of one name.
func pngNames(dir string, sources []string) ([]string, error) {
	seen, out := map[string]string{}, make([]string, len(sources))
	for i, s := range sources {
		out[i] = pngName(dir, s)
		if other, ok := seen[out[i]]; ok {
			return nil, usagef("%s and %s would both be written to %s", other, s, out[i])
		}
		seen[out[i]] = s
	}
	return out, nil
}

// keepSources refuses to write over an image that is read.
func keepSources(files, sources []string) error {
	for _, f := range files {
		a, err := os.Stat(f)
		if err != nil {
			continue
		}
		for _, s := range sources {
			if b, err := os.Stat(s); err == nil && os.SameFile(a, b) {
				return usagef("%s would be overwritten by a reconstruction; name another folder", s)
			}
		}
	}
	return nil
}

// decibels writes a PSNR for people.
func decibels(v float64) string {
	if math.IsInf(v, 1) {
		return "identical"
	}
	return fmt.Sprintf("%.2f dB", v)
}
