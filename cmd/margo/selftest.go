package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"margo/cuda"
	"margo/engine"
	"margo/engine/atomicfile"
	"margo/engine/conformance"
	"margo/engine/plan"
	"margo/engine/verify"
)

func selftestCommand() *cli.Command {
	return &cli.Command{
		Name:      "selftest",
		Usage:     "check that a device computes what it should, and how fast",
		UsageText: "margo selftest --device NAME [flags]",
		Description: `The first thing to run on a new GPU. In this order:

  table     every op in every dtype against the float64 oracle, twice for determinism,
            in parts for independence of the batch, with guards around every tensor;
            streams, events, graphs, several streams at the same time
  memory    more than the device has is refused with a clear error, and the device
            goes on working
  traces    the recorded runs of the authors' code in --goldens, in f32 and bf16
  speed     ops of real shapes, their share of the device's peaks, and what the compiler
            made of the kernels that ran

The report goes to standard output and, with --out, to a file. Exit code 1 if
anything failed.

Examples:
  margo selftest --device cuda:0 --out selftest.txt
  margo selftest --device emu:0 --quick`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "device", Value: "cuda:0", Category: "Machine", Usage: "`NAME`|to test: cuda:0, emu:0, cpu or ref"},
			threadsFlag(),
			&cli.BoolFlag{Name: "no-speed", Category: "Work", Usage: "leave out the speed"},
			&cli.BoolFlag{Name: "quick", Category: "Work", Usage: "leave out shapes of real models and the speed"},
			&cli.StringFlag{Name: "goldens", Value: filepath.Join("testdata", "goldens"), Category: "Work", Usage: "`DIR`|with the recorded traces; a folder that is not there is an error"},
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", DefaultText: "standard output only", Usage: "also write the report to `FILE`|(complete or not at all)"},
		},
		Action: runSelftest,
	}
}

// selftest collects a report while it prints it.
type selftest struct {
	ctx    context.Context
	w      io.Writer
	dev    engine.Device
	quick  bool
	failed int
}

func (t *selftest) printf(format string, args ...any) { fmt.Fprintf(t.w, format, args...) }

func (t *selftest) fail(format string, args ...any) {
	t.failed++
	t.printf("FAIL "+format+"\n", args...)
}

func runSelftest(c *cli.Context) error {
	if c.NArg() > 0 {
		return usagef("selftest takes no arguments")
	}
	if err := inRange(c, "threads", 1, 4096); err != nil {
		return err
	}
	goldens := c.String("goldens")
	if _, err := os.Stat(goldens); err != nil {
		return usagef("--goldens: there is no folder %s; run in the folder of margo's sources or name it", goldens)
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
	var report bytes.Buffer
	t := &selftest{ctx: c.Context, w: io.MultiWriter(c.App.Writer, &report), dev: dev, quick: c.Bool("quick")}
	start := time.Now()
	t.head()
	for _, step := range []struct {
		name string
		run  func()
	}{{"table", t.table}, {"memory", t.memory}, {"traces", func() { t.traces(goldens) }}, {"speed", t.speed}} {
		if step.name == "speed" && (t.quick || c.Bool("no-speed")) {
			continue
		}
		if c.Context.Err() != nil {
			break
		}
		t.printf("\n== %s\n", step.name)
		at := time.Now()
		step.run()
		t.printf("%s took %.1f s\n", step.name, time.Since(at).Seconds())
	}
	if h := healthOf(t.dev); h != "" {
		t.printf("\n%s\n", h)
	}
	if err := dev.Close(); err != nil {
		t.fail("closing the device: %v", err)
	}
	verdict := "passed"
	if t.failed > 0 {
		verdict = fmt.Sprintf("%d FAILURES", t.failed)
	}
	t.printf("\nselftest of %s: %s in %.1f s\n", c.String("device"), verdict, time.Since(start).Seconds())
	if c.IsSet("out") {
		err := atomicfile.Write(context.Background(), c.String("out"), func(w io.Writer) error {
			_, err := w.Write(report.Bytes())
			return err
		})
		if err != nil {
			return asFailure(err)
		}
	}
	switch {
	case c.Context.Err() != nil:
		return engine.Errorf("selftest", engine.Cancelled, "%w", context.Cause(c.Context))
	case t.failed > 0:
		return failf("%s failed %d checks", c.String("device"), t.failed)
	}
	return nil
}

func (t *selftest) head() {
	if m, ok := t.dev.(interface{ MeasurePeaks() }); ok {
		m.MeasurePeaks()
	}
	i := t.dev.Info()
	t.printf("margo selftest, %s, %s\n", version(), time.Now().UTC().Format("2006-01-02 15:04 UTC"))
	t.printf("%s: %s, %s, %d %s, %s of %s memory free\n", i.Name, i.Model, i.Arch, i.Threads, units(i.Name), plan.Size(i.MemFree), plan.Size(i.MemTotal))
	if h := healthOf(t.dev); h != "" {
		t.printf("%s\n", h)
	}
	if i.PeakF32 > 0 {
		t.printf("peaks: %.1f TFLOP/s f32, %.1f TFLOP/s bf16, %.0f GB/s\n", i.PeakF32/1e12, i.PeakBF16/1e12, i.PeakMemory/1e9)
	}
}

func (t *selftest) table() {
	rep := conformance.Check(t.dev, conformance.Options{Quick: t.quick, Workers: runtime.GOMAXPROCS(0)})
	for _, r := range append(rep.With(conformance.Fail), rep.With(conformance.Skip)...) {
		if r.Status == conformance.Fail {
			t.failed++
		}
		t.printf("%v\n", r)
	}
	t.printf("%d passed, %d failed, %d skipped\n", len(rep.With(conformance.Pass)), len(rep.With(conformance.Fail)), len(rep.With(conformance.Skip)))
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

func (t *selftest) traces(dir string) {
	n := 0
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
				worst := 0.0
				for _, s := range res.Stages {
					if s.Gated && !s.Pass {
						t.fail("%s %v: %s is off by %.3g, limit %.3g: %s", filepath.Base(file), d, s.Name, s.MaxAbs, s.Limit, s.Reason)
					}
					if s.Gated && s.Limit > 0 {
						worst = max(worst, s.MaxAbs/s.Limit)
					}
				}
				t.printf("%-46s %-4v %3d stages, worst at %.0f %% of its limit\n", filepath.Base(file), d, len(res.Stages), 100*worst)
			}
		}
	}
	t.printf("%d replays\n", n)
}

// speed times ops of real shapes against the device's peaks.
func (t *selftest) speed() {
	info := t.dev.Info()
	timings, err := conformance.Bench(t.dev, nil, 20*time.Millisecond)
	for _, x := range timings {
		share := ""
		if peak := map[engine.DType]float64{engine.F32: info.PeakF32, engine.BF16: info.PeakBF16}[x.DType]; peak > 0 {
			share = fmt.Sprintf("  %3.0f %% of peak arithmetic, %3.0f %% of bandwidth", 100*x.FLOPS()/peak, 100*x.Bandwidth()/info.PeakMemory)
		}
		t.printf("%v%s\n", x, share)
	}
	if err != nil {
		t.fail("%v", err)
	}
	d, ok := t.dev.(*cuda.Device)
	if !ok {
		return
	}
	t.printf("\n%-36s %9s %6s %7s %8s %10s %9s\n", "kernel", "registers", "local", "shared", "threads", "blocks/SM", "launches")
	kernels := d.Kernels()
	slices.SortFunc(kernels, func(a, b cuda.Kernel) int { return strings.Compare(a.Name, b.Name) })
	for _, k := range kernels {
		t.printf("%-36s %9d %6d %7d %8d %10d %9d\n", k.Name, k.Registers, k.Local, k.Shared, k.Threads, k.BlocksPerMultiprocessor, k.Launches)
	}
}
