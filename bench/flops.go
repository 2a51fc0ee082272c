package bench

import (
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/tokenizer"
)

// DecodeFLOPs counts what decoding latents of h×w positions to one image takes,
// by a dry run. Every implementation computes the same layers.
func DecodeFLOPs(cfg *checkpoint.KLConfig, h, w int) (float64, error) {
	k, err := tokenizer.New(cfg, 1, false)
	if err != nil {
		return 0, err
	}
	dev := plan.New(0)
	params := engine.Params(k)
	if err := load.Allocate(params, dev, engine.F32); err != nil {
		return 0, err
	}
	defer load.Free(params)
	c, err := engine.NewCtx(dev, engine.F32)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	k.Decode(c, c.New(engine.F32, 1, h, w, cfg.EmbedDim))
	return float64(dev.Report().Total().FLOPs()), c.Err()
}
