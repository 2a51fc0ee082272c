package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"margo/bench"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

func benchCommand() *cli.Command {
	return &cli.Command{
		Name:      "bench",
		Usage:     "measure images per second, alone or against PyTorch",
		UsageText: "margo bench --model LIST [--batch LIST] [--dtype LIST] [flags]",
		Description: `Every combination of --model, --dtype and --batch is sampled --reps times, all sides in turn on the same machine, and the medians are printed with time per part, FLOPs and the share of the machine's peak, which is measured just before. A model is a file, or a name with random weights: mar-base, mar-large, mar-huge, or kl-16, the tokenizer alone.

Peak share counts the FLOPs of the authors' algorithm, so work that margo avoids counts as done; "own TFLOP" is what it really executes.

--against pytorch runs the same work in PyTorch (make peers installs it): "eager" computes the authors' operations one for one, "tuned" is the fastest PyTorch we could write. --subset runs only some of the iterations, the same on every side, and scales; the report says so.

Examples:
  margo bench --model mar-base --batch 1,4 --dtype f32,bf16 --cfg 3 --subset 8 --against pytorch
  margo bench --model models/fashion-mar.safetensors --batch 8,100 --reps 5
  margo bench --model kl-16 --against pytorch --format json --out decode.json`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "model", Aliases: []string{"m"}, Category: "Work", Value: "mar-base", Usage: "`LIST`|of files and names"},
			&cli.StringFlag{Name: "batch", Category: "Work", Value: "1", Usage: "`LIST`|of batch sizes"},
			&cli.StringFlag{Name: "dtype", Category: "Work", Value: "f32", Usage: "`LIST`|of f32 and bf16"},
			&cli.IntFlag{Name: "iters", Category: "Work", DefaultText: "the model's, else 64", Usage: "`N`|autoregressive iterations"},
			&cli.IntFlag{Name: "head-steps", Category: "Work", DefaultText: "the model's, else 100", Usage: "`N`|diffusion steps of the head"},
			&cli.IntFlag{Name: "max-timestep", Category: "Work", DefaultText: "the model's, else 999", Usage: "`T`|largest diffusion timestep"},
			&cli.Float64Flag{Name: "cfg", Category: "Work", DefaultText: "the model's, else 3", Usage: "`S`|guidance scale; 1 is off"},
			&cli.StringFlag{Name: "cfg-schedule", Category: "Work", Value: sample.Linear, Usage: "`KIND`|linear or constant"},
			&cli.BoolFlag{Name: "decode", Category: "Work", Usage: "decode the images too (random KL-16 weights for a named model)"},
			&cli.IntFlag{Name: "subset", Category: "Work", DefaultText: "all", Usage: "run `N`|of the iterations, evenly spread (at least 8 for figures that are quoted)"},
			&cli.IntFlag{Name: "reps", Category: "Work", Value: 3, Usage: "`N`|runs of each side"},
			&cli.StringFlag{Name: "against", Category: "Work", Usage: "`PEERS`|to compare with: pytorch (both modes), pytorch-eager, pytorch-tuned"},
			&cli.StringFlag{Name: "peers", Category: "Work", Value: ".", Usage: "`DIR`|of margo's sources, where make peers was run"},
			deviceFlag(),
			threadsFlag(),
			&cli.StringFlag{Name: "format", Category: "Output", Value: "table", Usage: "`FORMAT`|" + strings.Join(bench.Formats, ", ")},
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", Usage: "write to `FILE`|instead of standard output"},
		},
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
	report  *bench.Report
}

func runBench(c *cli.Context) (err error) {
	if c.NArg() > 0 {
		return usagef("bench takes no arguments; name models with --model")
	}
	for _, f := range []struct {
		name      string
		low, high int
	}{{"iters", 1, 1 << 20}, {"head-steps", 2, 1000}, {"max-timestep", 1, 999}, {"subset", 1, 1 << 20}, {"reps", 1, 1000}, {"threads", 1, 1024}} {
		if err := inRange(c, f.name, f.low, f.high); err != nil {
			return err
		}
	}
	if err := errors.Join(oneOf(c, "format", bench.Formats...), oneOf(c, "cfg-schedule", sample.Linear, sample.Constant)); err != nil {
		return err
	}
	j := &benchJob{c: c, log: c.App.Metadata["log"].(*logrus.Logger)}
	switch c.String("against") {
	case "":
	case "pytorch":
		j.modes = []string{"eager", "tuned"}
	case "pytorch-eager", "pytorch-tuned":
		j.modes = []string{strings.TrimPrefix(c.String("against"), "pytorch-")}
	default:
		return usagef("--against: %q is not a peer; use pytorch, pytorch-eager or pytorch-tuned", c.String("against"))
	}
	for _, s := range strings.Split(c.String("batch"), ",") {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1 || n > 1<<16 {
			return usagef("--batch: %q is not a batch size", s)
		}
		j.batches = append(j.batches, n)
	}
	var dtypes []engine.DType
	for _, s := range strings.Split(c.String("dtype"), ",") {
		d, err := engine.ParseDType(strings.TrimSpace(s))
		if err != nil {
			return usagef("--dtype: %q is not a dtype; use f32, bf16 or both", s)
		}
		dtypes = append(dtypes, d)
	}
	if j.dev, err = openDevice(c.String("device"), c.Int("threads")); err != nil {
		return err
	}
	defer j.dev.Close()
	j.report = &bench.Report{Machine: bench.ThisMachine()}
	j.measure()
	for _, name := range strings.Split(c.String("model"), ",") {
		for _, d := range dtypes {
			if err := j.model(strings.TrimSpace(name), d); err != nil {
				return err
			}
		}
	}
	for i := range j.report.Rows {
		r := &j.report.Rows[i]
		r.Peak = map[string]float64{"f32": j.report.Machine.PeakF32, "bf16": j.report.Machine.PeakB16}[r.DType]
	}
	if path := c.String("out"); path != "" {
		f, err := os.Create(path)
		if err != nil {
			return usagef("--out: %w", err)
		}
		return errors.Join(j.report.Write(f, c.String("format")), f.Close())
	}
	return j.report.Write(c.App.Writer, c.String("format"))
}

// measure takes the machine's peaks, before the first case and after each one,
// and keeps the highest: a shared machine is slow at times, and a share of a
// peak that was measured at such a time would flatter.
func (j *benchJob) measure() {
	if m, ok := j.dev.(interface{ MeasurePeaks() }); ok {
		m.MeasurePeaks()
	}
	info, m := j.dev.Info(), &j.report.Machine
	m.Device = fmt.Sprintf("%s, %s, %d threads", info.Name, info.Arch, info.Threads)
	m.PeakF32, m.PeakB16, m.ReadBW = max(m.PeakF32, info.PeakF32), max(m.PeakB16, info.PeakBF16), max(m.ReadBW, info.PeakMemory)
}

// subject is a model as all sides load it.
type subject struct {
	name   string
	kind   string
	random bool
	info   *checkpoint.Model
	kl     *checkpoint.KLConfig
	path   string // of the weights; "" for random ones
	tok    *tokenizerFile
	work   bench.Work
	peer   map[string]any // the peers' load command
}

func (j *benchJob) model(name string, d engine.DType) error {
	s, err := j.subject(name)
	if err != nil {
		return err
	}
	if s.tok != nil {
		defer s.tok.close()
	}
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
		load := map[string]any{"dtype": d.String(), "threads": j.dev.Info().Threads}
		for k, v := range s.peer {
			load[k] = v
		}
		j.log.Infof("starting PyTorch (%s) for %s %s", mode, s.name, d)
		p, err := bench.StartPyTorch(j.c.String("peers"), mode, s.work, load)
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
	rows, err := bench.Compare(j.c.Context, cs, sides, j.c.Int("reps"), func(m string) { j.log.Info(m) })
	if err != nil {
		return err
	}
	j.measure()
	flops, ownFLOPs, err := j.flops(s, cs, own)
	if err != nil {
		return err
	}
	for i := range rows {
		rows[i].FLOPs, rows[i].RandomWeight = flops, s.random
		if rows[i].Side == "margo" {
			rows[i].OwnFLOPs, rows[i].MemoryBytes = ownFLOPs, residentPeak()
		} else if p, ok := sides[i].(*bench.PyTorch); ok {
			rows[i].MemoryBytes = p.Memory()
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

// subject finds out what a name of --model means.
func (j *benchJob) subject(name string) (*subject, error) {
	if name == "kl-16" {
		kl := checkpoint.KL16()
		return &subject{name: name, kind: checkpoint.KindKL, random: true, kl: kl, work: bench.Work{Latent: [3]int{16, 16, kl.EmbedDim}},
			peer: map[string]any{"tokenizer": map[string]any{"config": kl}}}, nil
	}
	s := &subject{name: name, kind: checkpoint.KindMAR, peer: map[string]any{}}
	if slices.Contains(checkpoint.MARNames(), name) {
		cfg, err := checkpoint.NamedMAR(name)
		if err != nil {
			return nil, err
		}
		s.random = true
		s.info = &checkpoint.Model{Kind: checkpoint.KindMAR, MAR: cfg, Sampling: checkpoint.Sampling{Iters: 64, HeadSteps: 100, MaxTimestep: 999, CFG: 3, CFGSchedule: sample.Linear, Temperature: 1}}
		s.kl = checkpoint.KL16()
	} else {
		f, info, err := openMAR(name, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
		if err != nil {
			return nil, err
		}
		f.Close()
		s.info, s.path, s.name = info, name, strings.TrimSuffix(filepath.Base(name), filepath.Ext(name))
		if j.c.Bool("decode") {
			if s.tok, err = openTokenizer("", name, info, j.log); err != nil {
				return nil, err
			}
			if s.tok.info != nil {
				s.kl = s.tok.info.KL
			}
		}
	}
	p := &s.info.Sampling
	for _, f := range []struct {
		name string
		at   *int
	}{{"iters", &p.Iters}, {"head-steps", &p.HeadSteps}, {"max-timestep", &p.MaxTimestep}} {
		if j.c.IsSet(f.name) {
			*f.at = j.c.Int(f.name)
		}
	}
	if j.c.IsSet("cfg") {
		p.CFG = j.c.Float64("cfg")
	}
	if j.c.IsSet("cfg-schedule") {
		p.CFGSchedule = j.c.String("cfg-schedule")
	}
	s.work = bench.Work{MaxTimestep: p.MaxTimestep, CFGSchedule: p.CFGSchedule, Temperature: p.Temperature, Classes: s.info.MAR.ClassNum, Decode: j.c.Bool("decode")}
	s.peer["config"] = s.info.MAR
	if s.path != "" {
		s.peer["weights"] = s.path
	}
	if s.work.Decode && s.kl != nil {
		t := map[string]any{"config": s.kl}
		if s.tok != nil && s.tok.path != "" {
			t["weights"], t["latent_scale"] = s.tok.path, s.tok.scale
		}
		s.peer["tokenizer"] = t
	}
	return s, nil
}

// margo loads our side.
func (j *benchJob) margo(s *subject, d engine.DType) (*bench.Margo, error) {
	own := &bench.Margo{Device: j.dev, DType: d, Work: s.work}
	var params []engine.NamedParam
	own.Free = func() { load.Free(params) }
	fill := func(p []engine.NamedParam, path string, ignore func(string) bool) error {
		params = append(params, p...)
		if path == "" {
			return load.Random(p, j.dev, d, 0)
		}
		f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
		if err != nil {
			return err
		}
		defer f.Close()
		return load.Bind(p, f, j.dev, d, load.Options{Ignore: ignore})
	}
	var tok tokenizer.Tokenizer
	scale := 1.0
	if s.kl != nil && (s.kind == checkpoint.KindKL || s.work.Decode) {
		k, err := tokenizer.NewKL(s.kl, 1, false)
		if err != nil {
			return nil, err
		}
		path := ""
		if s.tok != nil {
			path, scale = s.tok.path, s.tok.scale
		}
		if err := fill(engine.Params(k), path, k.Unused); err != nil {
			return nil, err
		}
		tok = k
	}
	if own.Tok = tok; s.kind == checkpoint.KindKL {
		return own, nil
	}
	m, err := mar.New(s.info.MAR)
	if err != nil {
		return nil, err
	}
	if err := fill(engine.Params(m), s.path, s.info.Ignorable); err != nil {
		return nil, err
	}
	o := sample.Options{Compute: d, LatentScale: scale, Profile: true}
	if tok == nil {
		own.Engine, err = sample.Open(m, nil, j.dev, o)
	} else {
		own.Engine, err = sample.Open(m, tok, j.dev, o)
	}
	return own, err
}

// residentPeak is the most memory this process ever had resident, in bytes; 0
// where the system does not tell.
func residentPeak() int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for _, line := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			return kib << 10
		}
	}
	return 0
}
