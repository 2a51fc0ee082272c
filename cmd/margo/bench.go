package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"margo/bench"
	"margo/engine"
	"margo/engine/atomicfile"
	"margo/engine/diffusion"
)

func benchCommand() *cli.Command {
	return &cli.Command{
		Name:      "bench",
		Usage:     "measure images per second, alone or against PyTorch",
		UsageText: "margo bench [--model LIST] [--batch LIST] [--dtype LIST] [flags]",
		Description: `Times how long margo takes to sample images, and prints a row for each combination of --model, --dtype, --batch and the work asked for (--iters and --head-steps of a MAR, --steps of a DiT): images per second, seconds by part of the model, memory, energy where the machine tells, and how much of this machine's speed that is. No images are written. A row is the median of --reps runs; "spread" is the distance between the slowest and the fastest.

A model is a file, or a name, which gets random weights that take as long as trained ones: mar-base, mar-large and mar-huge are the paper's models; ar-raster-base, ar-random-base and so on its causal controls with a KV cache, each also with another head (mar-base-ce, -l2, -gmm); dit-s, dit-b, dit-l and dit-xl with /2, /4 or /8 the rival; kl-16 and kl-8 the tokenizers alone, which turn latents into pixels. Whole samples of the paper's models take minutes on a CPU: --subset 8 runs 8 of the iterations, or of a DiT's steps, evenly spread, and scales the time; the report says so. A causal model always runs whole.

--against pytorch lets PyTorch do the same work, in turn with margo on the same threads: "eager" computes the authors' operations one for one, "tuned" is the fastest PyTorch that we could write. Run make peers once, in the folder of margo's sources, to install it. It reads safetensors files only; margo convert makes them.

The sides of a case take turns; --interleave lets all cases do so, which compares models fairly on a machine whose speed changes, and holds all of them in memory. What makes models unequal is printed below the table.

"peak share" is the speed reached over the fastest multiply-adds measured here, before and after each run; "of peak then" takes those beside the run instead, on average, for a machine whose speed changes. Both count the arithmetic of the authors' algorithm for every side, so work that margo avoids counts as done; "own TFLOP" is what margo really executes.

A case whose weights and activations do not fit into the free memory is refused before anything is measured; what a peer takes is not counted. Measure on a machine that does nothing else. Ctrl-C stops, PyTorch too, and still reports the cases that are complete; so does a case that fails.

Examples:
  margo bench --subset 8
  margo bench --model mar-base --batch 1,4 --dtype f32,bf16 --subset 8 --against pytorch
  margo bench --model mar-base,ar-raster-base,dit-xl/2 --steps 50,100,250 --subset 8 --interleave --plot speed.png
  margo bench --model models/fashion-mar.safetensors --batch 8,100 --reps 5 --decode
  margo bench --model mar-base.pth --heads 12 --which ema --subset 8
  margo bench --model kl-16 --against pytorch --format json --out decode.json
  margo bench --from decode.json,mar.json --plot both.svg`,
		Flags: slices.Concat([]cli.Flag{
			&cli.StringFlag{Name: "model", Aliases: []string{"m"}, Category: "Model", Value: "mar-base", Usage: "`LIST`|of files (safetensors, .pth, .pt or .ckpt) and names: mar-base, ar-raster-base, dit-xl/2, kl-16 and others"},
			&cli.StringFlag{Name: "tokenizer", Aliases: []string{"t"}, Category: "Model", DefaultText: "the file that the model names, beside it; for a named model KL-16 or KL-8 with random weights", Usage: "`FILE`|the KL tokenizer's weights, for --decode"},
		}, shapeFlags(), []cli.Flag{
			&cli.StringFlag{Name: "batch", Category: "Work", Value: "1", Usage: "`LIST`|of batch sizes: images sampled at a time"},
			&cli.StringFlag{Name: "dtype", Category: "Work", Value: "f32", Usage: "`LIST`|of number formats to compute in: f32, bf16"},
			&cli.StringFlag{Name: "iters", Category: "Work", DefaultText: "the model's, else 64", Usage: "`LIST`|of autoregressive iterations of a MAR, at least 1; the paper uses 64 to 256"},
			&cli.StringFlag{Name: "head-steps", Category: "Work", DefaultText: "the model's, else 100", Usage: "`LIST`|of diffusion steps for each token of a MAR or AR, 2 to 1000"},
			&cli.StringFlag{Name: "steps", Category: "Work", DefaultText: "the model's, else 250", Usage: "`LIST`|of reverse steps of a DiT: counts, 2 to 1000, or ddimN"},
			&cli.StringFlag{Name: "sampler", Category: "Work", DefaultText: "the model's, else ddpm", Usage: "`NAME`|of a DiT: ddpm or ddim; takes the same time"},
			&cli.StringFlag{Name: "cfg-channels", Category: "Work", DefaultText: "the model's, else 3", Usage: "`WHICH`|latent channels that a DiT's guidance covers: 3, as the authors', or all, as diffusers'"},
			&cli.IntFlag{Name: "max-timestep", Category: "Work", DefaultText: "the model's, else 999", Usage: "`T`|largest diffusion timestep, 1 to 999; does not change the speed"},
			&cli.Float64Flag{Name: "cfg", Category: "Work", DefaultText: "the model's; 3 for a named MAR or AR, 1.5 for a named DiT", Usage: "`S`|classifier-free guidance scale; 1 is off and about twice as fast, other values take the same time"},
			&cli.StringFlag{Name: "cfg-schedule", Category: "Work", DefaultText: "the model's, else linear", Usage: "`KIND`|linear or constant; does not change the speed"},
			&cli.BoolFlag{Name: "decode", Category: "Work", Usage: "turn the latents into pixels too, and time that as \"tokenizer\""},
			&cli.IntFlag{Name: "subset", Category: "Work", DefaultText: "all", Usage: "run `N`|of the iterations or of a DiT's steps, evenly spread, and scale (take at least 8 for figures that you quote)"},
			&cli.IntFlag{Name: "reps", Category: "Work", Value: 3, Usage: "`N`|measured runs of each side, after one to warm up"},

			&cli.StringFlag{Name: "against", Category: "Comparison", DefaultText: "margo alone", Usage: "`PEERS`|to compare with: pytorch (both modes), pytorch-eager, pytorch-tuned"},
			&cli.StringFlag{Name: "peers", Category: "Comparison", Value: ".", Usage: "`DIR`|of margo's sources, where make peers was run"},
			&cli.BoolFlag{Name: "interleave", Category: "Comparison", Usage: "let all cases take turns, not only the sides of one; all models are in memory at once"},
			deviceFlag(),
			headWeightsFlag(),
			threadsFlag(),
			&cli.StringFlag{Name: "from", Category: "Output", DefaultText: "measure", Usage: "measure nothing: write or plot the reports in `FILES`|(a list) that --format json made"},
			&cli.StringFlag{Name: "plot", Category: "Output", DefaultText: "none", Usage: "also draw seconds per image against work into `FILE`|, .png or .svg"},
			&cli.StringFlag{Name: "format", Category: "Output", Value: "table", Usage: "`FORMAT`|table; csv or json with all figures (json with every run); benchstat for Go's tool of that name"},
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", DefaultText: "standard output", Usage: "write the report to `FILE`|(complete or not at all)"},
		}),
		Action: runBench,
	}
}

// benchJob is a bench command whose flags were found possible.
type benchJob struct {
	c         *cli.Context
	log       *logrus.Logger
	dev       engine.Device
	modes     []string // of PyTorch
	batches   []int
	dtypes    []engine.DType
	fp8       bool     // weights of the head
	iters     []int    // nil: the model's
	headSteps []int    // nil: the model's
	steps     []string // nil: the model's
	report    *bench.Report
}

func runBench(c *cli.Context) error {
	// What the flags alone decide, then what files decide, then the work.
	j, err := readBenchFlags(c)
	if err != nil {
		return err
	}
	if len(j.modes) > 0 {
		if _, err := bench.FindPyTorch(c.String("peers")); err != nil {
			return failf("%w", err)
		}
	}
	for _, f := range []string{"out", "plot"} {
		if c.IsSet(f) {
			if err := checkWritable(c.String(f)); err != nil {
				return err
			}
		}
	}
	if c.IsSet("from") {
		return j.fromFiles()
	}
	var subjects []*subject
	for _, name := range strings.Split(c.String("model"), ",") {
		s, err := j.subject(strings.TrimSpace(name))
		if err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	if err := j.needed(subjects); err != nil {
		return err
	}
	if j.dev, err = openDevice(c.String("device"), c.Int("threads")); err != nil {
		return err
	}
	defer j.dev.Close()
	if err := j.checkMemory(subjects, j.dev.Info().MemFree); err != nil {
		return err
	}
	j.report = &bench.Report{Machine: bench.ThisMachine(), Decoded: c.Bool("decode"), Interleaved: c.Bool("interleave")}
	if j.fp8 {
		j.report.Notes = append(j.report.Notes, "margo's head weights are in fp8")
		if note := fp8Note(j.dev.Info()); note != "" {
			j.report.Notes = append(j.report.Notes, note)
			j.log.Warn(note)
		}
	}
	j.measure()
	j.health("before")
	failed := j.all(subjects)
	j.health("after")
	return j.finish(failed)
}

// readBenchFlags checks all that can be said without a file.
func readBenchFlags(c *cli.Context) (*benchJob, error) {
	if c.NArg() > 0 {
		return nil, usagef("bench takes no arguments, only flags: what is %q?", c.Args().First())
	}
	for _, f := range []struct {
		name      string
		low, high int
	}{{"subset", 1, 1 << 20}, {"reps", 1, 1000}, {"threads", 1, 4096}} {
		if err := inRange(c, f.name, f.low, f.high); err != nil {
			return nil, err
		}
	}
	if err := checkSampling(c); err != nil {
		return nil, err
	}
	if err := oneOf(c, "format", bench.Formats...); err != nil {
		return nil, err
	}
	for _, name := range []string{"out", "plot", "from"} {
		if c.IsSet(name) && c.String(name) == "" {
			return nil, usagef("--%s is empty; name a file", name)
		}
	}
	if end := plotFormat(c); c.IsSet("plot") && !slices.Contains(bench.PlotFormats, end) {
		return nil, usagef("--plot: %s does not end in .png or .svg", c.String("plot"))
	}
	if c.IsSet("tokenizer") && !c.Bool("decode") {
		return nil, usagef("--tokenizer is used with --decode only")
	}
	j := &benchJob{c: c, log: logger(c)}
	switch against := c.String("against"); against {
	case "":
	case "pytorch":
		j.modes = []string{"eager", "tuned"}
	case "pytorch-eager", "pytorch-tuned":
		j.modes = []string{strings.TrimPrefix(against, "pytorch-")}
	default:
		return nil, usagef("--against: %q is not a peer; use pytorch, pytorch-eager or pytorch-tuned", against)
	}
	var err error
	if j.batches, err = intList(c, "batch", "a batch size", 1, 1<<16); err != nil {
		return nil, err
	}
	if j.iters, err = intList(c, "iters", "a number of iterations", 1, 1<<20); err != nil {
		return nil, err
	}
	if j.headSteps, err = intList(c, "head-steps", "a number of diffusion steps", 2, 1000); err != nil {
		return nil, err
	}
	for _, s := range list(c.String("steps")) {
		if _, err := diffusion.DiT(s); err != nil {
			return nil, usagef("--steps: %q is neither a count, 2 to 1000, nor ddimN: %w", s, err)
		}
		j.steps = append(j.steps, s)
	}
	for _, s := range strings.Split(c.String("dtype"), ",") {
		d, err := engine.ParseDType(strings.TrimSpace(s))
		if err != nil {
			return nil, usagef("--dtype: %q is not a dtype; use f32, bf16 or f32,bf16", s)
		}
		j.dtypes = append(j.dtypes, d)
	}
	if j.fp8, err = headFP8(c, j.dtypes...); err != nil {
		return nil, err
	}
	return j, nil
}

// finish writes the report, unless nothing was measured, and returns why the
// work ended early, if it did.
func (j *benchJob) finish(failed error) error {
	rep := j.report
	if failed != nil {
		if len(rep.Rows) == 0 {
			return failed
		}
		if rep.Incomplete = "interrupted"; exitCode(failed) != exitInterrupted {
			rep.Incomplete = oneLine(failed.Error())
		}
		j.log.Warnf("the report has the complete cases only")
	}
	for i := range rep.Rows {
		r := &rep.Rows[i]
		r.Peak = map[string]float64{"f32": rep.Machine.PeakF32, "bf16": rep.Machine.PeakB16}[r.DType]
	}
	err := j.write()
	if failed != nil && err != nil {
		j.log.Errorf("%s", oneLine(err.Error()))
		return failed
	}
	if failed != nil {
		return failed
	}
	return err
}

// write prints the report and draws the plot.
func (j *benchJob) write() error {
	format := j.c.String("format")
	file := func(name string, fill func(io.Writer) error) error {
		// Also after Ctrl-C: not with the command's context.
		return asFailure(atomicfile.Write(context.Background(), j.c.String(name), fill))
	}
	var err error
	if j.c.IsSet("out") {
		err = file("out", func(w io.Writer) error { return j.report.Write(w, format) })
	} else {
		err = j.report.Write(j.c.App.Writer, format)
	}
	if err == nil && j.c.IsSet("plot") {
		err = file("plot", func(w io.Writer) error { return j.report.Plot(w, plotFormat(j.c)) })
	}
	return err
}

// measure takes the machine's peaks, before the first case and after each one. The device
// keeps the highest of these and of what is measured around each run: a shared machine is
// slow at times, and a share of a peak that was measured at such a time would flatter.
func (j *benchJob) measure() {
	if m, ok := j.dev.(interface{ MeasurePeaks() }); ok {
		m.MeasurePeaks()
	}
	info, m := j.dev.Info(), &j.report.Machine
	m.Device = fmt.Sprintf("%s, %s, %d %s", info.Name, info.Arch, info.Threads, units(info.Name))
	if isCUDA(info.Name) {
		m.Device = fmt.Sprintf("%s, %s", info.Model, m.Device)
	}
	m.PeaksDerived = isCUDA(info.Name)
	m.PeakF32, m.PeakB16, m.ReadBW = info.PeakF32, info.PeakBF16, info.PeakMemory
}

// health notes what NVML says about a GPU: a throttled or shared one explains odd times.
func (j *benchJob) health(when string) {
	if line := healthOf(j.dev); line != "" {
		j.report.Machine.Health = append(j.report.Machine.Health, when+": "+line)
	}
}
