package main

import (
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/verify"
)

func verifyCommand() *cli.Command {
	return &cli.Command{
		Name:      "verify",
		Usage:     "replay a recorded trace of the authors' code and compare",
		UsageText: "margo verify --model WEIGHTS --trace TRACE [flags]",
		Description: `A trace holds tensors recorded from the authors' PyTorch code: encoder and decoder, diffusion head, a whole sampling loop with every random draw, a DiT's forward pass or sampling loop, or a tokenizer's input and output (KL, VQ with its codes, or the tokens of a MAR to pixels). Each stage is fed the recorded inputs and compared with the recorded outputs; a sampling loop also runs free, from the first draw to the final tokens.

A line per stage shows the largest difference, the same as a share of the largest recorded value, and the limit. Limits come from the float64 oracle, not from experience: twice the recording's own distance from it in f32, twice the oracle's own error with rounded operands in bf16. A recording that the oracle itself misses by more than rounding explains is of other weights or another model, and fails. In bf16 free loops are reported, not judged: their first step amplifies a rounding error hundreds of times.

Exit code 0 means every judged stage is within its limit, 1 that one is not.

Examples:
  margo verify --model testdata/goldens/mar_tiny.safetensors \
      --trace testdata/goldens/mar_sample_cfg3_linear.safetensors
  margo verify --model vae.safetensors --trace vae_io.safetensors --dtype bf16`,
		Flags: slices.Concat([]cli.Flag{
			&cli.StringFlag{Name: "model", Aliases: []string{"m"}, Category: "Model", Usage: "`FILE`|with the weights the trace was recorded with (needed)"},
			&cli.StringFlag{Name: "trace", Category: "Model", Usage: "`FILE`|with the recorded tensors, safetensors (needed)"},
		}, shapeFlags(), []cli.Flag{
			deviceFlag(),
			&cli.StringFlag{Name: "dtype", Category: "Machine", Value: "f32", Usage: "`DTYPE`|to compute in: f32 or bf16"},
			threadsFlag(),
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Category: "Output", Usage: "print only stages beyond their limit, and the verdict"},
			jsonFlag(),
		}),
		Action: runVerify,
	}
}

func runVerify(c *cli.Context) error {
	if c.NArg() > 0 {
		return usagef("verify takes no arguments; name files with --model and --trace")
	}
	for _, name := range []string{"model", "trace"} {
		if c.String(name) == "" {
			return usagef("verify needs --%s FILE", name)
		}
	}
	if err := inRange(c, "threads", 1, 4096); err != nil {
		return err
	}
	shape, open, err := shapeOptions(c)
	if err != nil {
		return err
	}
	dtype, err := engine.ParseDType(c.String("dtype"))
	if err != nil {
		return usagef("--dtype: %q is not a dtype; use f32 or bf16", c.String("dtype"))
	}
	dev, err := openDevice(c.String("device"), c.Int("threads"))
	if err != nil {
		return err
	}
	defer dev.Close()
	w, asJSON, quiet := c.App.Writer, c.Bool("json"), c.Bool("quiet")
	header := !quiet // before the first stage: an error has none
	o := verify.Options{Model: c.String("model"), Trace: c.String("trace"), Device: dev, DType: dtype, MAR: shape, Open: open}
	if !asJSON {
		o.Stage = func(s verify.Stage) {
			if header {
				fmt.Fprintf(w, "%-44s %11s %11s %11s\n", "stage", "max|Δ|", "/max|golden|", "limit")
				header = false
			}
			verdict := "ok"
			switch {
			case !s.Gated:
				verdict = "reported only"
			case !s.Pass:
				verdict = "FAILED: " + s.Reason
				if !(s.Oracle <= s.OracleLimit) {
					verdict += fmt.Sprintf(" (by %.3e, at most %.3e is rounding)", s.Oracle, s.OracleLimit)
				}
			case quiet:
				return
			}
			if !quiet || s.Gated {
				fmt.Fprintf(w, "%-44s %11.3e %11.3e %11.3e  %s\n", s.Name, s.MaxAbs, s.Rel, s.Limit, verdict)
			}
		}
	}
	r, err := verify.Run(c.Context, o)
	if err != nil {
		return err
	}
	failed := 0
	for _, s := range r.Stages {
		if s.Gated && !s.Pass {
			failed++
		}
	}
	if asJSON {
		if err := printJSON(w, r); err != nil {
			return err
		}
	} else if r.Pass {
		fmt.Fprintf(w, "%s: %d stages of %s within their limits (%s, %s)\n", o.Trace, len(r.Stages), r.Kind, dev.Name(), dtype)
	}
	if failed > 0 {
		return failf("%s: %d of %d stages beyond their limits (%s, %s)", o.Trace, failed, len(r.Stages), dev.Name(), dtype)
	}
	return nil
}
