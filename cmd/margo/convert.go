package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/plan"
)

func convertCommand() *cli.Command {
	return &cli.Command{
		Name:      "convert",
		Usage:     "write a checkpoint as safetensors with its settings",
		UsageText: "margo convert IN OUT [flags]",
		Description: `IN is any checkpoint that margo reads: the authors' .pth and .ckpt, or safetensors; of tokenizers also Lightning's .ckpt of taming-transformers and latent diffusion, and diffusers' autoencoders, whose tensors get LDM's names; of DiT the authors' .pt and diffusers' layout, whose tensors get the authors' names. OUT is a safetensors file with the configuration, the latent scale and the sampling defaults in its metadata, so that later commands need no flags. Every tensor of the model must be there with its shape, and no other. OUT appears complete or not at all, and replaces a file of that name.

bf16 halves the file and costs the precision that computing in bf16 costs anyway; f32 stays exact.

Examples:
  margo convert checkpoint-last.pth mar-base.safetensors --dtype bf16
  margo convert kl16.ckpt kl16.safetensors
  margo convert my.pth my.safetensors --tokenizer my-kl.safetensors \
      --set max_timestep=950 --set cfg=2 --set 'class_names=["cat","dog"]'`,
		Flags: slices.Concat([]cli.Flag{
			&cli.StringFlag{Name: "dtype", Category: "Output", DefaultText: "as stored", Usage: "`DTYPE`|of the written tensors: f32 or bf16"},
			latentScaleFlag("Metadata", "from the file or diffusers' config.json beside it, else the authors' 0.2325 where the latents have their shape (16 channels at stride 16) and diffusers' 0.18215 for its autoencoders of 4 channels"),
			&cli.StringFlag{Name: "tokenizer", Category: "Metadata", Usage: "`NAME`|file of the tokenizer that belongs to a MAR or DiT, beside it"},
			&cli.StringSliceFlag{Name: "set", Category: "Metadata", Usage: "`KEY=VALUE`|record a setting; margo reads iters, head_steps, max_timestep, cfg_schedule (of a MAR), steps, sampler, eta, cfg_channels (of a DiT), cfg, temperature, class_names (a JSON list)"},
			&cli.StringFlag{Name: "kind", Category: "Model", DefaultText: "from the tensors", Usage: "`KIND`|what the file holds: mar, dit, kl or vq"},
			&cli.StringFlag{Name: "prefix", Category: "Model", Usage: "`TEXT`|use the tensors whose names begin so, and drop it (first_stage_model. in an LDM)"},
			&cli.BoolFlag{Name: "skip-crc", Category: "Model", Usage: "accept a PyTorch archive whose checksums don't match"},
		}, shapeFlags(), []cli.Flag{jsonFlag()}),
		Action: convert,
	}
}

func convert(c *cli.Context) error {
	if c.NArg() != 2 {
		return usagef("name the input and the output: margo convert IN OUT")
	}
	in, out := c.Args().Get(0), c.Args().Get(1)
	if !strings.EqualFold(filepath.Ext(out), ".safetensors") && !isFolder(out) {
		return usagef("%s: checkpoints are written as .safetensors", out)
	}
	shape, open, err := shapeOptions(c)
	if err != nil {
		return err
	}
	o := checkpoint.ConvertOptions{Open: open, MAR: shape, Metadata: map[string]string{}}
	o.Open.Prefix, o.Open.SkipCRC = c.String("prefix"), c.Bool("skip-crc")
	if c.IsSet("dtype") {
		d, err := engine.ParseDType(c.String("dtype"))
		if err != nil {
			return usagef("--dtype: %q is not a dtype; use f32 or bf16", c.String("dtype"))
		}
		o.DType = map[engine.DType]checkpoint.DType{engine.F32: checkpoint.F32, engine.BF16: checkpoint.BF16}[d]
	}
	if c.IsSet("kind") {
		if err := oneOf(c, "kind", checkpoint.KindMAR, checkpoint.KindDiT, checkpoint.KindKL, checkpoint.KindVQ); err != nil {
			return err
		}
		o.Metadata["kind"] = c.String("kind")
	}
	if s, err := givenScale(c); err != nil {
		return err
	} else if s > 0 {
		o.Metadata["latent_scale"] = strconv.FormatFloat(s, 'g', -1, 64)
	}
	if t := c.String("tokenizer"); t != "" {
		o.Metadata["tokenizer"] = filepath.Base(t)
	}
	for _, kv := range c.StringSlice("set") {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return usagef("--set takes KEY=VALUE, not %q", kv)
		}
		o.Metadata[k] = v
	}
	if err := checkWritable(out); err != nil {
		return err
	}
	done, err := checkpoint.Convert(c.Context, in, out, o)
	if err != nil {
		return err
	}
	size := int64(0)
	if s, err := os.Stat(out); err == nil {
		size = s.Size()
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]any{
			"file": out, "kind": done.Model.Kind, "state": done.State, "parameters": done.Params, "bytes": size, "ignored": done.Ignored,
			"latent_scale": done.Model.LatentScale, "latent_scale_assumed": done.AssumedScale,
		})
	}
	state := ""
	if done.State != "" {
		state = " of " + done.State
	}
	fmt.Fprintf(c.App.Writer, "%s: %s, %s parameters%s, %s\n", out, done.Model.Kind, thousands(done.Params), state, plan.Size(size))
	switch m := done.Model; {
	case done.AssumedScale:
		fmt.Fprintf(c.App.Writer, "latent scale: %s %g is assumed, since none is recorded (--latent-scale sets another)\n",
			map[bool]string{true: "the authors'", false: "diffusers'"}[m.AuthorsLatents() || m.Kind == checkpoint.KindDiT], m.LatentScale)
	case m.LatentScale == 0 && m.IsGenerator() && m.Stride() > 1:
		fmt.Fprintf(c.App.Writer, "latent scale: not recorded; the tokenizer's will be used (--latent-scale sets one)\n")
	}
	if n := len(done.Ignored); n > 0 {
		logger(c).Warnf("%d tensors are not part of the model and were left out, such as %s", n, oneLine(done.Ignored[0]))
	}
	return nil
}
