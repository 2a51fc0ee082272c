package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"margo/bench"
	"margo/engine"
	"margo/engine/atomicfile"
	"margo/engine/checkpoint"
	"margo/engine/mar"
	"margo/engine/sample"
)

func benchCommand() *cli.Command {
	return &cli.Command{
		Name:      "bench",
		Usage:     "measure images per second, alone or against PyTorch",
		UsageText: "margo bench [--model LIST] [--batch LIST] [--dtype LIST] [flags]",
		Description: `Times how long margo takes to sample images, and prints a row for each combination of --model, --dtype and --batch: images per second, seconds by part of the model, memory, and how much of this machine's speed that is. No images are written. A row is the median of --reps runs; "spread" is the distance between the slowest and the fastest.

A model is a file, or a name: mar-base, mar-large and mar-huge are the paper's models with random weights, which take as long as trained ones, so nothing need be downloaded; kl-16 is their tokenizer alone, which turns latents into pixels. Whole samples of the paper's models take minutes on a CPU: --subset 8 runs 8 of the iterations, evenly spread, and scales the time; the report says so.

--against pytorch lets PyTorch do the same work, in turn with margo on the same threads: "eager" computes the authors' operations one for one, "tuned" is the fastest PyTorch that we could write. Run make peers once, in the folder of margo's sources, to install it. It reads safetensors files only; margo convert makes them.

"peak share" is the speed reached over the fastest matrix product measured here, before the first case and after each. It counts the arithmetic of the authors' algorithm for every side, so work that margo avoids counts as done; "own TFLOP" is what margo really executes.

Measure on a machine that does nothing else. Ctrl-C stops, PyTorch too, and still reports the cases that are complete; so does a case that fails.

Examples:
  margo bench --subset 8
  margo bench --model mar-base --batch 1,4 --dtype f32,bf16 --subset 8 --against pytorch
  margo bench --model models/fashion-mar.safetensors --batch 8,100 --reps 5 --decode
  margo bench --model mar-base.pth --heads 12 --which ema --subset 8
  margo bench --model kl-16 --against pytorch --format json --out decode.json`,
		Flags: slices.Concat([]cli.Flag{
			&cli.StringFlag{Name: "model", Aliases: []string{"m"}, Category: "Model", Value: "mar-base", Usage: "`LIST`|of files (safetensors, .pth, .pt or .ckpt) and names: mar-base, mar-large, mar-huge, kl-16"},
			&cli.StringFlag{Name: "tokenizer", Category: "Model", DefaultText: "the file that the model names, beside it; for a named model KL-16 with random weights", Usage: "`FILE`|the KL tokenizer's weights, for --decode"},
		}, shapeFlags(), []cli.Flag{
			&cli.StringFlag{Name: "batch", Category: "Work", Value: "1", Usage: "`LIST`|of batch sizes: images sampled at a time"},
			&cli.StringFlag{Name: "dtype", Category: "Work", Value: "f32", Usage: "`LIST`|of number formats to compute in: f32, bf16"},
			&cli.IntFlag{Name: "iters", Category: "Work", DefaultText: "the model's, else 64", Usage: "`N`|autoregressive iterations, at least 1; the paper uses 64 to 256"},
			&cli.IntFlag{Name: "head-steps", Category: "Work", DefaultText: "the model's, else 100", Usage: "`N`|diffusion steps for each token, 1 to 1000"},
			&cli.IntFlag{Name: "max-timestep", Category: "Work", DefaultText: "the model's, else 999", Usage: "`T`|largest diffusion timestep, 0 to 999; does not change the speed"},
			&cli.Float64Flag{Name: "cfg", Category: "Work", DefaultText: "the model's; 3 for a named model", Usage: "`S`|classifier-free guidance scale; 1 is off and about twice as fast, other values take the same time"},
			&cli.StringFlag{Name: "cfg-schedule", Category: "Work", DefaultText: "the model's, else linear", Usage: "`KIND`|linear or constant; does not change the speed"},
			&cli.BoolFlag{Name: "decode", Category: "Work", Usage: "turn the latents into pixels too, and time that as \"tokenizer\""},
			&cli.IntFlag{Name: "subset", Category: "Work", DefaultText: "all", Usage: "run `N`|of the iterations, evenly spread, and scale (take at least 8 for figures that you quote)"},
			&cli.IntFlag{Name: "reps", Category: "Work", Value: 3, Usage: "`N`|measured runs of each side, after one to warm up"},

			&cli.StringFlag{Name: "against", Category: "Comparison", DefaultText: "margo alone", Usage: "`PEERS`|to compare with: pytorch (both modes), pytorch-eager, pytorch-tuned"},
			&cli.StringFlag{Name: "peers", Category: "Comparison", Value: ".", Usage: "`DIR`|of margo's sources, where make peers was run"},
			deviceFlag(),
			threadsFlag(),
			&cli.StringFlag{Name: "format", Category: "Output", Value: "table", Usage: "`FORMAT`|table; csv or json with all figures (json with every run); benchstat for Go's tool of that name"},
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", DefaultText: "standard output", Usage: "write the report to `FILE`|(complete or not at all)"},
		}),
		Action: runBench,
	}
}

// benchJob is a bench command whose flags were found possible.
type benchJob struct {
	c       *cli.Context
	log     *logrus.Logger
	dev     engine.Device
	modes   []string // of PyTorch
	batches []int
	dtypes  []engine.DType
	report  *bench.Report
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
	if c.IsSet("out") {
		if err := checkWritable(c.String("out")); err != nil {
			return err
		}
	}
	var subjects []*subject
	for _, name := range strings.Split(c.String("model"), ",") {
		s, err := j.subject(strings.TrimSpace(name))
		if err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	if j.dev, err = openDevice(c.String("device"), c.Int("threads")); err != nil {
		return err
	}
	defer j.dev.Close()
	j.report = &bench.Report{Machine: bench.ThisMachine()}
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
	}{{"iters", 1, 1 << 20}, {"head-steps", 1, 1000}, {"max-timestep", 0, 999}, {"subset", 1, 1 << 20}, {"reps", 1, 1000}, {"threads", 1, 4096}} {
		if err := inRange(c, f.name, f.low, f.high); err != nil {
			return nil, err
		}
	}
	if v := c.Float64("cfg"); !(v >= 0 && v <= 1e4) {
		return nil, usagef("--cfg is %g, it must be between 0 and 10000", v)
	}
	if err := oneOf(c, "format", bench.Formats...); err != nil {
		return nil, err
	}
	if c.IsSet("cfg-schedule") {
		if err := oneOf(c, "cfg-schedule", sample.Linear, sample.Constant); err != nil {
			return nil, err
		}
	}
	if c.IsSet("out") && c.String("out") == "" {
		return nil, usagef("--out is empty; name a file")
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
	for _, s := range strings.Split(c.String("batch"), ",") {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1 || n > 1<<16 {
			return nil, usagef("--batch: %q is not a batch size, 1 to 65536", s)
		}
		j.batches = append(j.batches, n)
	}
	for _, s := range strings.Split(c.String("dtype"), ",") {
		d, err := engine.ParseDType(strings.TrimSpace(s))
		if err != nil {
			return nil, usagef("--dtype: %q is not a dtype; use f32, bf16 or f32,bf16", s)
		}
		j.dtypes = append(j.dtypes, d)
	}
	return j, nil
}

// all runs every case; what is complete is in the report, whatever happens.
func (j *benchJob) all(subjects []*subject) error {
	for _, s := range subjects {
		for _, d := range j.dtypes {
			if err := j.model(s, d); err != nil {
				return err
			}
		}
	}
	return nil
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

func (j *benchJob) write() error {
	format := j.c.String("format")
	if !j.c.IsSet("out") {
		return j.report.Write(j.c.App.Writer, format)
	}
	// Also after Ctrl-C: not with the command's context.
	return asFailure(atomicfile.Write(context.Background(), j.c.String("out"), func(w io.Writer) error {
		return j.report.Write(w, format)
	}))
}

// measure takes the machine's peaks, before the first case and after each one,
// and keeps the highest: a shared machine is slow at times, and a share of a
// peak that was measured at such a time would flatter.
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
	m.PeakF32, m.PeakB16, m.ReadBW = max(m.PeakF32, info.PeakF32), max(m.PeakB16, info.PeakBF16), max(m.ReadBW, info.PeakMemory)
}

// health notes what NVML says about a GPU: a throttled or shared one explains odd times.
func (j *benchJob) health(when string) {
	if line := healthOf(j.dev); line != "" {
		j.report.Machine.Health = append(j.report.Machine.Health, when+": "+line)
	}
}

func (j *benchJob) model(s *subject, d engine.DType) error {
	own, err := j.margo(s, d)
	if err != nil {
		return err
	}
	sides := []bench.Side{own}
	defer func() {
		for _, side := range sides {
			side.Close()
		}
	}()
	for _, mode := range j.modes {
		load := map[string]any{"dtype": d.String(), "threads": j.dev.Info().Threads, "device": peerDevice(j.dev.Name())}
		for k, v := range s.peer {
			load[k] = v
		}
		j.log.Infof("starting PyTorch (%s) for %s %s", mode, s.name, d)
		p, err := bench.StartPyTorch(j.c.Context, j.c.String("peers"), mode, s.work, load)
		if err != nil {
			return failf("%w", err)
		}
		sides = append(sides, p)
	}
	for _, batch := range j.batches {
		if err := j.run(s, d, batch, own, sides); err != nil {
			return err
		}
	}
	return nil
}

// peerDevice is PyTorch's name of the device that a margo device runs on.
func peerDevice(name string) string {
	if strings.HasPrefix(name, "cuda:") {
		return name
	}
	return "cpu"
}

func (j *benchJob) run(s *subject, d engine.DType, batch int, own *bench.Margo, sides []bench.Side) error {
	cs := bench.Case{Model: s.name, DType: d.String(), Batch: batch, Part: "sample", Subset: j.c.Int("subset")}
	if s.kind == checkpoint.KindKL {
		cs.Part, cs.Subset = "decode", 0
	} else {
		p := s.info.Sampling
		cs.Iters, cs.HeadSteps, cs.CFG = p.Iters, p.HeadSteps, p.CFG
		for cs.Subset > 0 && cs.Subset < cs.Iters && cs.Iters%cs.Subset != 0 {
			cs.Subset++ // strata of equal size, so that one factor scales all
		}
		cs.Subset = min(cs.Subset, cs.Iters)
	}
	if err := own.Reopen(); err != nil {
		return err
	}
	flops, ownFLOPs, err := j.flops(s, cs, own)
	if err != nil {
		return err
	}
	rows, err := bench.Compare(j.c.Context, cs, sides, j.c.Int("reps"), func(m string) { j.log.Info(m) })
	if err != nil {
		return err
	}
	j.measure()
	for i := range rows {
		rows[i].FLOPs, rows[i].RandomWeight = flops, s.random
		if rows[i].Side == "margo" {
			rows[i].OwnFLOPs = ownFLOPs
		}
	}
	j.report.Rows = append(j.report.Rows, rows...)
	return nil
}

// flops counts the authors' algorithm and margo's own work for a whole batch.
func (j *benchJob) flops(s *subject, cs bench.Case, own *bench.Margo) (authors, ours float64, err error) {
	n := float64(cs.Batch)
	if s.kind == checkpoint.KindKL {
		f, err := bench.DecodeFLOPs(s.kl, own.Work.Latent[0], own.Work.Latent[1])
		return f * n, f * n, err
	}
	authors = mar.CountFLOPs(s.info.MAR, cs.Iters, cs.HeadSteps, cs.CFG != 1).Total() * n
	if ours, err = own.OwnFLOPs(cs); err != nil || own.Tok == nil {
		return authors, ours, err
	}
	side := s.info.MAR.ImgSize / s.kl.Stride()
	f, err := bench.DecodeFLOPs(s.kl, side, side)
	return authors + f*n, ours, err
}
