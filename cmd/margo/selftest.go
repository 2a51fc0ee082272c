package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"margo/bench"
	"margo/cuda"
	"margo/engine"
	"margo/engine/atomicfile"
	"margo/engine/checkpoint"
	"margo/engine/conformance"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/sample"
	"margo/engine/verify"
)

func selftestCommand() *cli.Command {
	return &cli.Command{
		Name:      "selftest",
		Usage:     "check that a device computes what it should, and how fast",
		UsageText: "margo selftest --device NAME [flags]",
		Description: `The first thing to run on a new GPU. In this order:

  table        every op in every dtype against the float64 oracle, twice for
               determinism, in parts for independence of the batch, with guards
               around every tensor; streams, events, graphs
  memory       more than the device has is refused with a clear error, and the
               device goes on working
  streams      a race of many streams: ops of every kind on two hundred streams
               at the same time, which must give the bits that each gives alone
  determinism  whole samples: again, and one by one instead of in a batch, the
               same bits
  traces       the recorded runs of the authors' code in --goldens, in f32 and
               bf16
  fp8          what weights in FP8 (sample --head-weights fp8) cost the head:
               errors of weights and of predicted noise by layer, pictures of
               the demo model
  speed        a roofline: ops of real shapes and the least time that the
               device's peaks allow them, what the compiler made of the kernels
               that ran, and margo bench of a small MAR job

The report goes to standard output and, with --out, to a file: as text, or as JSON with
all figures if the file's name ends in .json; --json prints JSON in place of the text. So
one run gives both. Exit code 1 if anything failed; the report is complete then too.

An emulated device and ref are too slow for real shapes: they take small ones throughout,
as --quick does for all, and the report lists what was left out.

Examples:
  margo selftest --device cuda:0 --out selftest.txt --json > selftest.json
  margo selftest --device emu:0
  margo selftest --device cuda:0 --only streams,determinism`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "device", Value: "cuda:0", Category: "Machine", Usage: "`NAME`|to test: cuda:0, emu:0, cpu or ref"},
			threadsFlag(),
			&cli.StringFlag{Name: "only", Category: "Work", DefaultText: "all", Usage: "run only the parts in `LIST`|of table, memory, streams, determinism, traces, fp8, speed"},
			&cli.BoolFlag{Name: "no-speed", Category: "Work", Usage: "leave out the speed"},
			&cli.BoolFlag{Name: "quick", Category: "Work", Usage: "small sizes: leave out the shapes of real models"},
			&cli.StringFlag{Name: "goldens", Value: filepath.Join("testdata", "goldens"), Category: "Work", Usage: "`DIR`|with the recorded traces; a folder that is not there is an error"},
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", DefaultText: "standard output only", Usage: "also write the report to `FILE`|(complete or not at all); JSON if it ends in .json"},
			jsonFlag(),
		},
		Action: runSelftest,
	}
}

// selftest collects a report while it prints it.
type selftest struct {
	ctx     context.Context
	w       io.Writer
	log     *logrus.Logger
	dev     engine.Device
	small   bool // no shapes of real models
	goldens string
	report  selftestReport
	at      *selftestStep // that is under way; nil between steps
}

// selftestReport is the report for machines.
type selftestReport struct {
	Machine    bench.Machine    `json:"machine"`
	Version    string           `json:"version"`
	Device     deviceLine       `json:"device"`
	Small      bool             `json:"small"` // shapes of real models were left out
	LeftOut    []string         `json:"left_out,omitempty"`
	Steps      []*selftestStep  `json:"steps"`
	Roofline   []selftestTiming `json:"roofline,omitempty"`
	Kernels    []cuda.Kernel    `json:"kernels,omitempty"`
	FP8        *selftestFP8     `json:"fp8,omitempty"`
	Memory     *cuda.Counters   `json:"counters,omitempty"` // of the device when it was closed
	Bench      []bench.Row      `json:"bench,omitempty"`
	Failed     int              `json:"failed"`
	Seconds    float64          `json:"seconds"`
	Incomplete string           `json:"incomplete,omitempty"` // why not all steps ran
	Passed     bool             `json:"passed"`
}

type selftestStep struct {
	Name     string   `json:"name"`
	Seconds  float64  `json:"seconds"`
	Passed   int      `json:"passed"` // checks
	Skipped  int      `json:"skipped,omitempty"`
	Failures []string `json:"failures,omitempty"`
}

func (t *selftest) printf(format string, args ...any) { fmt.Fprintf(t.w, format, args...) }

func (t *selftest) fail(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	t.report.Failed++
	t.printf("FAIL %s\n", text)
	t.at.Failures = append(t.at.Failures, text)
}

// leftOut notes, once, what a run of small sizes does not do.
func (t *selftest) leftOut(text string) {
	if t.small && !slices.Contains(t.report.LeftOut, text) {
		t.report.LeftOut = append(t.report.LeftOut, text)
		t.printf("left out: %s\n", text)
	}
}

// step runs a part of the test.
func (t *selftest) step(name string, f func()) {
	t.printf("\n== %s\n", name)
	start := time.Now()
	t.at = &selftestStep{Name: name}
	f()
	t.at.Seconds = time.Since(start).Seconds()
	t.report.Steps = append(t.report.Steps, t.at)
	t.printf("%s took %.1f s\n", name, t.at.Seconds)
}

func runSelftest(c *cli.Context) error {
	if c.NArg() > 0 {
		return usagef("selftest takes no arguments")
	}
	if err := inRange(c, "threads", 1, 4096); err != nil {
		return err
	}
	t := &selftest{ctx: c.Context, log: logger(c), goldens: c.String("goldens")}
	steps := []struct {
		name string
		run  func()
	}{{"table", t.table}, {"memory", t.memory}, {"streams", t.streams}, {"determinism", t.determinism}, {"traces", t.traces}, {"fp8", t.fp8}, {"speed", t.speed}}
	only := list(c.String("only"))
	if c.IsSet("only") && only == nil {
		return usagef("--only is empty; name parts, or leave it out for all")
	}
	for _, name := range only {
		known := false
		for _, s := range steps {
			known = known || s.name == name
		}
		if !known {
			return usagef("--only: %q is not a part; use table, memory, streams, determinism, traces, fp8 or speed", name)
		}
	}
	if _, err := os.Stat(t.goldens); err != nil {
		return usagef("--goldens: there is no folder %s; run in the folder of margo's sources or name it", t.goldens)
	}
	if c.IsSet("out") {
		if err := checkWritable(c.String("out")); err != nil {
			return err
		}
	}
	dev, err := openDevice(c.String("device"), c.Int("threads"))
	if err != nil {
		return err
	}
	var text bytes.Buffer
	t.w, t.dev = io.MultiWriter(c.App.Writer, &text), dev
	if c.Bool("json") {
		t.w = &text
	}
	t.small = c.Bool("quick") || dev.Name() == "ref" || strings.HasPrefix(dev.Name(), "emu")
	start := time.Now()
	t.head()
	for _, s := range steps {
		if s.name == "speed" && c.Bool("no-speed") || only != nil && !slices.Contains(only, s.name) {
			continue
		}
		if c.Context.Err() != nil {
			t.report.Incomplete = "interrupted"
			break
		}
		t.step(s.name, s.run)
	}
	if h := healthOf(t.dev); h != "" {
		t.printf("\n%s\n", h)
		t.report.Machine.Health = append(t.report.Machine.Health, "after: "+h)
	}
	t.step("closing", func() {
		if d, ok := dev.(*cuda.Device); ok {
			c := d.Counters()
			t.report.Memory = &c
			t.printf("memory: %v\n", c)
		}
		if err := dev.Close(); err != nil {
			t.fail("closing the device: %v", err)
		} else {
			t.at.Passed++
		}
	})
	if c.Context.Err() != nil {
		t.report.Incomplete = "interrupted"
	}
	r := &t.report
	r.Seconds, r.Passed = time.Since(start).Seconds(), r.Failed == 0 && r.Incomplete == ""
	verdict := "passed"
	switch {
	case r.Failed > 0:
		verdict = fmt.Sprintf("%d FAILURES", r.Failed)
	case r.Incomplete != "":
		verdict = r.Incomplete
	}
	t.printf("\nselftest of %s: %s in %.1f s\n", c.String("device"), verdict, r.Seconds)
	if c.Bool("json") {
		if err := printJSON(c.App.Writer, r); err != nil {
			return err
		}
	}
	if c.IsSet("out") {
		err := atomicfile.Write(context.Background(), c.String("out"), func(w io.Writer) error {
			if strings.EqualFold(filepath.Ext(c.String("out")), ".json") {
				return printJSON(w, r)
			}
			_, err := w.Write(text.Bytes())
			return err
		})
		if err != nil {
			return asFailure(err)
		}
	}
	switch {
	case c.Context.Err() != nil:
		return engine.Errorf("selftest", engine.Cancelled, "%w", context.Cause(c.Context))
	case r.Failed > 0:
		return failf("%s failed %d checks", c.String("device"), r.Failed)
	}
	return nil
}

func (t *selftest) head() {
	if m, ok := t.dev.(interface{ MeasurePeaks() }); ok {
		m.MeasurePeaks()
	}
	i := t.dev.Info()
	t.report.Machine, t.report.Version, t.report.Device, t.report.Small = bench.ThisMachine(), version(), lineOf(i), t.small
	m := &t.report.Machine
	m.Device, m.PeakF32, m.PeakB16, m.ReadBW, m.PeaksDerived = i.Model, i.PeakF32, i.PeakBF16, i.PeakMemory, isCUDA(i.Name)
	t.printf("margo selftest, %s, %s\n", version(), time.Now().UTC().Format("2006-01-02 15:04 UTC"))
	t.printf("%s: %s, %s, %d %s, %s of %s memory free\n", i.Name, i.Model, i.Arch, i.Threads, units(i.Name), plan.Size(i.MemFree), plan.Size(i.MemTotal))
	if h := healthOf(t.dev); h != "" {
		t.printf("%s\n", h)
		m.Health = append(m.Health, "before: "+h)
	}
	if i.PeakF32 > 0 {
		t.printf("peaks: %.1f TFLOP/s f32, %.1f TFLOP/s bf16, %.0f GB/s\n", i.PeakF32/1e12, i.PeakBF16/1e12, i.PeakMemory/1e9)
	}
}

func (t *selftest) table() {
	t.leftOut("the table's shapes of real models")
	rep := conformance.Check(t.dev, conformance.Options{Quick: t.small, Workers: runtime.GOMAXPROCS(0)})
	for _, r := range rep.With(conformance.Fail) {
		t.fail("%s", strings.TrimPrefix(r.String(), "FAIL "))
	}
	for _, r := range rep.With(conformance.Skip) {
		t.printf("%v\n", r)
	}
	t.at.Passed, t.at.Skipped = len(rep.With(conformance.Pass)), len(rep.With(conformance.Skip))
	t.printf("%d passed, %d failed, %d skipped\n", t.at.Passed, len(t.at.Failures), t.at.Skipped)
}

// memory asks for more than there is, and then computes something.
func (t *selftest) memory() {
	total := t.dev.Info().MemTotal
	if total <= 0 {
		t.printf("the device does not tell its memory: not checked\n")
		return
	}
	if b, err := t.dev.Alloc(int(2 * total)); !errors.Is(err, engine.OutOfMemory) {
		if err == nil {
			err = b.Free()
		}
		t.fail("asking for twice the memory gives %v, want out of memory", err)
		return
	} else {
		t.printf("refused as it should be: %v\n", err)
	}
	c, err := engine.NewCtx(t.dev, engine.F32)
	if err != nil {
		t.fail("after a refusal: %v", err)
		return
	}
	x, y := c.F32([]float32{1, 2, 3, 4}, 2, 2), c.New(engine.F32, 2, 2)
	c.Cast(engine.CastArgs{X: x, Y: y, Scale: 2, Shift: 1})
	if got := c.Download(y); !slices.Equal(got, []float32{3, 5, 7, 9}) {
		t.fail("after a refusal the device computes %v (%v)", got, c.Err())
	}
	if err := c.Close(); err != nil {
		t.fail("after a refusal: %v", err)
	}
	t.at.Passed = 2 - min(len(t.at.Failures), 2)
}

// streams races many streams.
func (t *selftest) streams() {
	o := conformance.RaceOptions{Workers: 4, Rounds: 10}
	if t.small {
		o = conformance.RaceOptions{Workers: 2, Rounds: 2}
		t.leftOut("all but 2 of the race's 4 workers and 2 of its 10 rounds")
	}
	if d, ok := t.dev.(*cuda.Device); ok {
		// Freed memory is reused while other streams work, also where the emulator caches none otherwise.
		before := d.Counters()
		if err := d.SetMemory(int64(before.Limit), max(int64(before.Cache), 64<<20)); err != nil {
			t.fail("%v", err)
		}
		defer func() {
			t.printf("memory: %d of %d allocations reused freed memory\n", d.Counters().Reuses-before.Reuses, d.Counters().Allocs-before.Allocs)
			if err := d.SetMemory(int64(before.Limit), int64(before.Cache)); err != nil {
				t.fail("%v", err)
			}
		}()
	}
	r := conformance.Race(t.dev, o)
	for _, f := range r.Failures {
		t.fail("%s", f)
	}
	t.at.Passed = r.Runs - min(len(r.Failures), r.Runs)
	t.printf("%d cases on %d streams, %d runs: %d differ from the case alone\n", r.Cases, r.Streams, r.Runs, len(r.Failures))
}

// determinism samples a small trained MAR three times: the same seeds must give the same tokens when they are sampled
// again, and alone.
func (t *selftest) determinism() {
	path := filepath.Join(t.goldens, "mar_tiny_trained.safetensors")
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		if err := t.sameTwice(path, d); err != nil && t.ctx.Err() == nil {
			t.fail("%s %v: %v", filepath.Base(path), d, err)
		}
	}
}

func (t *selftest) sameTwice(path string, d engine.DType) error {
	f, info, err := openModel(path, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := loadModel(t.ctx, f, info, t.dev, d, false)
	if err != nil {
		return err
	}
	defer load.Free(g.params)
	e, err := g.open(nil, t.dev, sample.Options{Compute: d})
	if err != nil {
		return err
	}
	defer e.Close()
	draw := func(first, n int) (tokens [][]float32, err error) {
		r := sample.Defaults()
		r.N, r.Batch, r.FirstIndex, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.Seed, r.Labels = n, n, first, 4, 10, 950, 3, 17, []int{1, 3, 7}
		err = e.Run(t.ctx, r, nil, func(im sample.Image) error { tokens = append(tokens, im.Tokens); return nil })
		return tokens, err
	}
	const n = 3
	first, err := draw(0, n)
	if err != nil {
		return err
	}
	again, err := draw(0, n)
	if err != nil {
		return err
	}
	for i := range n {
		alone, err := draw(i, 1)
		if err != nil {
			return err
		}
		switch {
		case !slices.Equal(first[i], again[i]):
			t.fail("%v: image %d has other tokens when it is sampled again", d, i)
		case !slices.Equal(first[i], alone[0]):
			t.fail("%v: image %d has other tokens alone than in a batch of %d", d, i, n)
		default:
			t.at.Passed++
		}
	}
	sum := sha256.New()
	for _, v := range first {
		for _, x := range v {
			binary.Write(sum, binary.LittleEndian, math.Float32bits(x))
		}
	}
	t.printf("%v: %d images sampled in a batch, again and alone; tokens sha256 %x\n", d, n, sum.Sum(nil)[:8])
	return nil
}

// recordings pairs weights with the traces that were recorded with them.
var recordings = []struct{ model, traces string }{
	{"mar_tiny.safetensors", "mar_encdec_*.safetensors"},
	{"mar_tiny.safetensors", "mar_diffloss_net.safetensors"},
	{"mar_tiny.safetensors", "mar_sample_*.safetensors"},
	{"mar_tiny_trained.safetensors", "mar_trained_sample_*.safetensors"},
	{"vae_tiny.safetensors", "vae_io*.safetensors"},
	{"vq_ldm.safetensors", "vq_ldm_*.safetensors"},
	{"dit_tiny.safetensors", "dit_forward.safetensors"},
	{"dit_tiny.safetensors", "dit_p_sample_loop_*.safetensors"},
	{"dit_tiny.safetensors", "dit_ddim_sample_loop_*.safetensors"},
}

func (t *selftest) traces() {
	dir, n := t.goldens, 0
	for _, r := range recordings {
		files, _ := filepath.Glob(filepath.Join(dir, r.traces))
		if len(files) == 0 {
			t.fail("no %s in %s", r.traces, dir)
		}
		for _, file := range files {
			for _, d := range []engine.DType{engine.F32, engine.BF16} {
				if t.ctx.Err() != nil {
					return
				}
				n++
				res, err := verify.Run(t.ctx, verify.Options{Model: filepath.Join(dir, r.model), Trace: file, Device: t.dev, DType: d})
				if err != nil {
					t.fail("%s %v: %v", filepath.Base(file), d, err)
					continue
				}
				worst, failed := 0.0, len(t.at.Failures)
				for _, s := range res.Stages {
					if s.Gated && !s.Pass {
						t.fail("%s %v: %s is off by %.3g, limit %.3g: %s", filepath.Base(file), d, s.Name, s.MaxAbs, s.Limit, s.Reason)
					}
					if s.Gated && s.Limit > 0 {
						worst = max(worst, s.MaxAbs/s.Limit)
					}
				}
				if len(t.at.Failures) == failed {
					t.at.Passed++
				}
				t.printf("%-46s %-4v %3d stages, worst at %.0f %% of its limit\n", filepath.Base(file), d, len(res.Stages), 100*worst)
			}
		}
	}
	t.printf("%d replays\n", n)
}
