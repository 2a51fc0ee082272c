package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/imageio"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// knownImage is an image to complete: its pixels, and the tokens to be filled.
type knownImage struct {
	size    int // pixels per side
	pixels  []float32
	unknown []bool // per token
}

// readKnownImage reads --image and --mask; nil if they are not given.
func readKnownImage(c *cli.Context, cfg *checkpoint.MARConfig) (*knownImage, error) {
	if !c.IsSet("image") {
		return nil, nil
	}
	k := &knownImage{size: cfg.Grid() * cfg.PatchSize * cfg.VAEStride}
	if k.size > imageio.MaxPixels/k.size {
		return nil, usagef("--image: the model's images have %d×%d pixels, at most %d are read", k.size, k.size, imageio.MaxPixels)
	}
	for _, name := range []string{"image", "mask"} {
		if _, _, err := checkImage(c.String(name), hostMemory()); err != nil {
			return nil, err
		}
	}
	var err error
	if k.pixels, err = imageio.ReadImage(c.String("image"), k.size, k.size); err != nil {
		return nil, err
	}
	mask, err := imageio.ReadMask(c.String("mask"), k.size, k.size)
	if err != nil {
		return nil, err
	}
	k.unknown = imageio.Cells(mask, k.size, k.size, cfg.Grid(), cfg.Grid())
	n := 0
	for _, u := range k.unknown {
		if u {
			n++
		}
	}
	if n == 0 {
		return nil, usagef("--mask %s has no white pixel: there is nothing to fill", c.String("mask"))
	}
	logger(c).Infof("filling %d of %d tokens", n, len(k.unknown))
	return k, nil
}

// encode turns the pixels into tokens: the mean of the tokenizer's posterior,
// scaled as the model expects, or its nearest codes where tokens are codes.
func (k *knownImage) encode(ctx context.Context, dev engine.Device, tok tokenizer.Tokenizer, cfg *checkpoint.MARConfig, d engine.DType) (known *sample.Known, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err := engine.NewCtx(dev, d)
	if err != nil {
		return nil, err
	}
	defer func() {
		if e := c.Close(); err == nil {
			err = e
		}
	}()
	p := tok.Encode(c, c.F32(k.pixels, 1, k.size, k.size, 3))
	if c.Err() != nil {
		return nil, c.Err()
	}
	z := c.F32(p.Mean, 1, p.H, p.W, p.C)
	if cfg.Discrete() {
		if t, ok := tok.(*tokenizer.Tiled); ok {
			tok = t.Tokenizer // a code is of one position
		}
		vq, ok := tok.(*tokenizer.VQ)
		if !ok { // openScaled has seen a codebook
			return nil, engine.Errorf("known image", engine.Internal, "tokens are codes and the tokenizer has none")
		}
		codes := vq.Nearest(c, z)
		return &sample.Known{Codes: codes, Unknown: k.unknown}, c.Err()
	}
	tokens := c.Download(tokenizer.Tokens(c, z, cfg.PatchSize, tok.LatentScale()))
	if c.Err() != nil {
		return nil, c.Err()
	}
	return &sample.Known{Tokens: tokens, Unknown: k.unknown}, nil
}
