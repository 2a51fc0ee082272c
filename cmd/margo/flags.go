package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/sample"
)

// Flags that several commands share.
func deviceFlag() cli.Flag {
	return &cli.StringFlag{Name: "device", Value: "cpu", Category: "Machine", Usage: "`NAME`|where to compute: cpu, cuda:0 (a GPU), emu:0 (the CUDA kernels on the host: for checks, very slow), or ref, the float64 oracle (exact, very slow)"}
}

// headWeightsFlag is --head-weights, or MARGO_HEAD_WEIGHTS; see headFP8.
func headWeightsFlag() cli.Flag {
	return &cli.StringFlag{Name: "head-weights", EnvVars: []string{"MARGO_HEAD_WEIGHTS"}, Category: "Machine", DefaultText: "as --dtype", Usage: "`FORMAT`|fp8 rounds the weights of a MAR's diffusion head to e4m3, with --dtype bf16: half the bytes where MARGO_HEAD_PATH=latency is set on a GPU, elsewhere the same numbers in bf16"}
}

// headFP8 says whether the head's weights are asked for in FP8; all dtypes must be bf16 then.
func headFP8(c *cli.Context, dtypes ...engine.DType) (bool, error) {
	switch v := c.String("head-weights"); v {
	case "":
		return false, nil
	case "fp8":
	default:
		return false, usagef("--head-weights (or MARGO_HEAD_WEIGHTS) is %q, it must be fp8, or left out for weights as --dtype", v)
	}
	for _, d := range dtypes {
		if d != engine.BF16 {
			return false, usagef("--head-weights fp8 needs --dtype bf16, not %v: what is computed in f32 keeps its weights", d)
		}
	}
	return true, nil
}

// fp8Note says what FP8 weights of the head do not do on a device; empty where its kernels read them.
func fp8Note(i engine.Info) string {
	if i.KeepsFP8 {
		return ""
	}
	return fmt.Sprintf("head weights in fp8: %s computes with the rounded numbers in bf16, which saves neither memory nor time; MARGO_HEAD_PATH=latency on a GPU reads the bytes", i.Name)
}

func threadsFlag() cli.Flag {
	return &cli.IntFlag{Name: "threads", Category: "Machine", DefaultText: "all this process may use", Usage: "`N`|threads to use; the result does not depend on it"}
}

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Category: "Output", Usage: "print the result as JSON on standard output"}
}

// shapeFlags supply what a checkpoint's shapes cannot tell.
func shapeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.IntFlag{Name: "heads", Category: "Model", DefaultText: "from the file", Usage: "`N`|attention heads, where the file does not tell"},
		&cli.IntFlag{Name: "patch-size", Category: "Model", DefaultText: "from the file", Usage: "`N`|side of a token in latent positions, where the file does not tell"},
		&cli.IntFlag{Name: "vae-stride", Category: "Model", DefaultText: "from the file, else 16", Usage: "`N`|side of a latent position in pixels, where the file does not tell"},
		&cli.StringFlag{Name: "which", Category: "Model", DefaultText: "ema if the file has it", Usage: "`NAME`|weights to take from a PyTorch file: ema, model, or another entry's name"},
	}
}

func shapeOptions(c *cli.Context) (checkpoint.MAROptions, checkpoint.OpenOptions, error) {
	o := checkpoint.MAROptions{Heads: c.Int("heads"), PatchSize: c.Int("patch-size"), VAEStride: c.Int("vae-stride")}
	for _, name := range []string{"heads", "patch-size", "vae-stride"} {
		if err := inRange(c, name, 1, 1<<16); err != nil {
			return o, checkpoint.OpenOptions{}, err
		}
	}
	return o, checkpoint.OpenOptions{State: c.String("which")}, nil
}

// latentScaleFlag overrides what files record; see givenScale.
func latentScaleFlag(category, otherwise string) cli.Flag {
	return &cli.Float64Flag{Name: "latent-scale", Category: category, DefaultText: otherwise, Usage: "`S`|tokens are latents times S (1 over the latents' standard deviation)"}
}

// givenScale is --latent-scale, 0 if it was not given.
func givenScale(c *cli.Context) (float64, error) {
	s := c.Float64("latent-scale")
	if c.IsSet("latent-scale") && !(s > 0 && s < 1e6) {
		return 0, usagef("--latent-scale is %g, it must be above 0 and below 1000000", s)
	}
	return s, nil
}

// inRange checks an integer flag that was given.
func inRange(c *cli.Context, name string, low, high int) error {
	if v := c.Int(name); c.IsSet(name) && (v < low || v > high) {
		if high >= math.MaxInt32 && v < low {
			return usagef("%s is %d, it must be at least %d", dashed(name), v, low)
		}
		return usagef("%s is %d, it must be between %d and %d", dashed(name), v, low, high)
	}
	return nil
}

// checkSampling checks the settings of a generator that sample and bench have, as far as
// they were given; ranges of the others are the commands' own.
func checkSampling(c *cli.Context) error {
	for _, name := range []string{"cfg", "temperature"} {
		if v := c.Float64(name); !(v >= 0 && v <= 1e4) {
			return usagef("--%s is %g, it must be between 0 and 10000", name, v)
		}
	}
	for _, f := range []struct {
		name    string
		allowed []string
	}{{"cfg-schedule", []string{sample.Linear, sample.Constant}}, {"sampler", []string{sample.DDPM, sample.DDIM}}, {"cfg-channels", []string{sample.GuideThree, sample.GuideAll}}} {
		if c.IsSet(f.name) {
			if err := oneOf(c, f.name, f.allowed...); err != nil {
				return err
			}
		}
	}
	return inRange(c, "max-timestep", 1, 999)
}

// setSampling puts those that were given over a model's own; what is for another kind of
// model is not looked at.
func setSampling(c *cli.Context, s *checkpoint.Sampling) {
	if c.IsSet("max-timestep") {
		s.MaxTimestep = c.Int("max-timestep")
	}
	for name, at := range map[string]*float64{"cfg": &s.CFG, "temperature": &s.Temperature} {
		if c.IsSet(name) {
			*at = c.Float64(name)
		}
	}
	for name, at := range map[string]*string{"cfg-schedule": &s.CFGSchedule, "sampler": &s.Sampler, "cfg-channels": &s.CFGChannels} {
		if c.IsSet(name) {
			*at = c.String(name)
		}
	}
}

// stepsFit refuses more head steps than there are timesteps for.
func stepsFit(steps, maxTimestep int) error {
	if steps > maxTimestep+1 {
		return usagef("%d head steps don't fit into timesteps 0 to %d: lower --head-steps or raise --max-timestep", steps, maxTimestep)
	}
	return nil
}

// oneOf checks a text flag that takes one of a few values.
func oneOf(c *cli.Context, name string, allowed ...string) error {
	if v := c.String(name); !slices.Contains(allowed, v) {
		return usagef("%s is %q, it must be %s", dashed(name), v, strings.Join(allowed, " or "))
	}
	return nil
}

// parseClasses reads a list of class ids, ranges of ids (0-9) and class names,
// separated by commas. A name matches without regard to case, whole or as one
// of the synonyms between its own commas or slashes ("tench, Tinca tinca",
// "T-shirt/top").
func parseClasses(text string, names []string, classNum int) ([]int, error) {
	ids, several := map[string]int{}, map[string]bool{}
	for _, split := range []string{",/", ""} { // whole names win over synonyms
		for id, name := range names {
			parts := strings.FieldsFunc(name, func(r rune) bool { return strings.ContainsRune(split, r) })
			for _, p := range parts {
				key := strings.ToLower(strings.TrimSpace(p))
				at, taken := ids[key]
				switch {
				case split == "" && taken && at < id && strings.EqualFold(strings.TrimSpace(names[at]), key):
					several[key] = true // ImageNet has two cranes
				case split == "" || !taken:
					ids[key] = id
				}
			}
		}
	}
	var out []int
	for _, item := range strings.Split(text, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			return nil, usagef("--classes: an empty item in %q", text)
		}
		low, high := item, item
		if a, b, ok := strings.Cut(item, "-"); ok && a != "" {
			low, high = a, b
		}
		first, err1 := strconv.Atoi(low)
		last, err2 := strconv.Atoi(high)
		if err1 != nil || err2 != nil {
			id, ok := ids[strings.ToLower(item)]
			switch {
			case ok && several[strings.ToLower(item)]:
				return nil, usagef("--classes: several classes of the model are named %q; give the id", item)
			case ok:
				out = append(out, id)
				continue
			case len(names) == 0:
				return nil, usagef("--classes: %q is not a number, and the model has no class names", item)
			}
			known := make([]string, 0, len(ids))
			for name := range ids {
				known = append(known, name)
			}
			slices.Sort(known)
			return nil, usagef("--classes: the model has no class %q%s (margo inspect lists them)", item, didYouMean(suggest(item, known)))
		}
		if first > last {
			return nil, usagef("--classes: %s runs backwards: write %d-%d", item, last, first)
		}
		if first < 0 || last >= classNum {
			return nil, usagef("--classes: %s is outside the model's classes 0 to %d", item, classNum-1)
		}
		for id := first; id <= last; id++ {
			out = append(out, id)
		}
	}
	return out, nil
}

// className names a class for people: "7 (sneaker)", "unconditional".
func className(names []string, id int) string {
	switch {
	case id < 0:
		return "unconditional"
	case id < len(names):
		return names[id]
	}
	return fmt.Sprintf("class %d", id)
}

// seconds rounds for output: milliseconds are enough.
func seconds(d time.Duration) float64 { return math.Round(d.Seconds()*1000) / 1000 }
