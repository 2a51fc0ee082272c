package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"margo/bench"
	"margo/cuda"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/conformance"
	"margo/engine/plan"
)

// selftestTiming is an op against the device's peaks.
type selftestTiming struct {
	Case     string  `json:"case"`
	Op       string  `json:"op"`
	DType    string  `json:"dtype"`
	Seconds  float64 `json:"seconds"` // the fastest run
	FLOPs    int64   `json:"flops"`
	Bytes    int64   `json:"bytes"`                      // unavoidable memory traffic
	Roofline float64 `json:"roofline_seconds,omitempty"` // the least that the peaks allow; 0: peaks not known
	Bound    string  `json:"bound_by,omitempty"`
}

// speed times ops against the device's peaks, then a small sample as margo bench does.
func (t *selftest) speed() {
	var timings []conformance.Timing
	var err error
	if t.leftOut("the timing of real shapes: small ones run once, and say nothing of the device's speed"); t.small {
		timings, err = conformance.BenchSmall(t.dev)
	} else {
		timings, err = conformance.Bench(t.dev, nil, 20*time.Millisecond)
	}
	if err != nil {
		t.fail("%v", err)
	}
	info := t.dev.Info()
	for _, x := range timings {
		least, bound := x.Roofline(info)
		line := selftestTiming{x.Case, string(x.Op), x.DType.String(), x.Seconds, int64(x.Cost.FLOPs()), int64(x.Cost.Bytes), least, bound}
		t.report.Roofline = append(t.report.Roofline, line)
		share := ""
		if least > 0 {
			share = fmt.Sprintf("  at least %.1f µs by %s: %3.0f %% of the roofline", least*1e6, bound, 100*least/x.Seconds)
		}
		t.printf("%v%s\n", x, share)
	}
	t.at.Passed += len(timings)
	t.kernels()
	t.printf("\n")
	if err := t.bench(); err != nil && t.ctx.Err() == nil {
		t.fail("margo bench: %v", err)
	}
}

// kernels says what the compiler made of the kernels that ran.
func (t *selftest) kernels() {
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
	t.report.Kernels = kernels
}

// bench samples with margo bench's code: MAR-B with random weights and a subset of its iterations, or, at small sizes,
// the tiny trained MAR.
func (t *selftest) bench() error {
	s, err := namedSubject("mar-base")
	if err != nil {
		return err
	}
	c, d := bench.Case{Iters: 64, HeadSteps: 100, Subset: 2, Batch: 1}, engine.F32
	switch {
	case t.small:
		path := filepath.Join(t.goldens, "mar_tiny_trained.safetensors")
		f, info, err := openModel(path, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
		if err != nil {
			return err
		}
		f.Close()
		s = &subject{name: "mar_tiny_trained", info: info, path: path, peer: map[string]any{}}
		c.Iters, c.HeadSteps, c.Subset = 4, 4, 0
		t.leftOut("MAR-B in margo bench: the tiny trained MAR takes its place")
	case isCUDA(t.dev.Name()):
		c.Batch, c.Subset, d = 8, 8, engine.BF16
	}
	j := &benchJob{log: t.log, dev: t.dev, report: &bench.Report{Machine: t.report.Machine}}
	s.kind = bench.KindMAR
	if err := j.marWork(s); err != nil {
		return err
	}
	c.Model, c.Kind, c.DType, c.Part, c.CFG, c.Pixels = s.name, s.kind, d.String(), "sample", 3, s.info.PixelSize()
	own, err := j.margo(s, d)
	if err != nil {
		return err
	}
	defer own.Close()
	authors, ours, err := j.flops(s, c, own)
	if err != nil {
		return err
	}
	rows, err := bench.Compare(t.ctx, []bench.Unit{{Case: c, Sides: []bench.Side{own}}}, 1, func(m string) { t.log.Debug(m) })
	if err != nil {
		return err
	}
	j.measure() // peaks again, after the work: the higher count
	r, m := &rows[0], j.report.Machine
	r.FLOPs, r.OwnFLOPs, r.RandomWeight = authors, ours, s.random
	r.Peak = map[engine.DType]float64{engine.F32: m.PeakF32, engine.BF16: m.PeakB16}[d]
	t.report.Machine.PeakF32, t.report.Machine.PeakB16, t.report.Machine.ReadBW = m.PeakF32, m.PeakB16, m.ReadBW
	t.report.Bench = rows
	t.at.Passed++
	t.printf("margo bench: %s %s, batch %d, %d × %d, guidance %g: %.4g s/image, %.3g images/s (encoder %.4g, decoder %.4g, head %.4g s)\n", c.Model, c.DType,
		c.Batch, c.Iters, c.HeadSteps, c.CFG, r.Seconds()/float64(c.Batch), r.ImagesPerSecond(), r.PartSeconds("encoder"), r.PartSeconds("decoder"), r.PartSeconds("head"))
	if c.Subset > 0 {
		t.printf("%d of %d iterations were run, and the time scaled; weights are random\n", c.Subset, c.Iters)
	}
	if r.Peak > 0 {
		t.printf("%.1f %% of peak arithmetic (the authors' algorithm: %.3g FLOP)\n", 100*r.PeakShare(), r.FLOPs)
	}
	if r.MemoryBytes > 0 {
		t.printf("%s of memory at most\n", plan.Size(r.MemoryBytes))
	}
	return nil
}
