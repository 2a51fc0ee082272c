package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/plan"
)

func devicesCommand() *cli.Command {
	return &cli.Command{
		Name:      "devices",
		Usage:     "list the devices that margo can compute on",
		UsageText: "margo devices [flags]",
		Description: `A device's name is what --device of the other commands takes. With --measure the peaks that benchmarks are compared with are measured, which takes a moment and wants an idle machine.

Example:
  margo devices --measure`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "measure", Category: "Machine", Usage: "measure peak FLOP/s of f32 and bf16 and memory bandwidth"},
			threadsFlag(),
			jsonFlag(),
		},
		Action: devices,
	}
}

// deviceLine is a device as devices prints it.
type deviceLine struct {
	Name       string  `json:"name"`
	Model      string  `json:"model"`
	Arch       string  `json:"arch"`
	Threads    int     `json:"threads"`
	MemTotal   int64   `json:"memory_bytes"`
	MemFree    int64   `json:"memory_free_bytes"`
	PeakF32    float64 `json:"peak_f32_flops,omitempty"`
	PeakBF16   float64 `json:"peak_bf16_flops,omitempty"`
	PeakMemory float64 `json:"peak_memory_bytes_per_second,omitempty"`
}

// cudaStatus says why there is no CUDA device. margo never links CUDA: a driver
// is looked for at run time, so that one binary starts everywhere.
func cudaStatus() string {
	if !libraryOpens("libcuda.so.1") {
		return "no CUDA device: libcuda.so.1 not found"
	}
	return "no CUDA device: libcuda.so.1 was found, but this build of margo has no CUDA plugin"
}

func devices(c *cli.Context) error {
	if c.NArg() > 0 {
		return usagef("devices takes no arguments")
	}
	if err := inRange(c, "threads", 1, 4096); err != nil {
		return err
	}
	var lines []deviceLine
	for _, name := range []string{"cpu", "ref"} {
		dev, err := openDevice(name, c.Int("threads"))
		if err != nil {
			return err
		}
		if m, ok := dev.(interface{ MeasurePeaks() }); ok && c.Bool("measure") {
			m.MeasurePeaks()
		}
		lines = append(lines, lineOf(dev.Info()))
		if err := dev.Close(); err != nil {
			return err
		}
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]any{"devices": lines, "cuda": cudaStatus()})
	}
	for _, l := range lines {
		fmt.Fprintf(c.App.Writer, "%-6s %s, %s, %d threads, %s of %s memory free\n", l.Name, l.Model, l.Arch, l.Threads, plan.Size(l.MemFree), plan.Size(l.MemTotal))
		if l.PeakF32 > 0 {
			fmt.Fprintf(c.App.Writer, "       peak %.0f GFLOP/s f32, %.0f GFLOP/s bf16, %.1f GB/s from memory\n", l.PeakF32/1e9, l.PeakBF16/1e9, l.PeakMemory/1e9)
		}
	}
	fmt.Fprintf(c.App.Writer, "%-6s %s\n", "cuda", cudaStatus())
	return nil
}

func lineOf(i engine.Info) deviceLine {
	return deviceLine{i.Name, i.Model, i.Arch, i.Threads, i.MemTotal, i.MemFree, i.PeakF32, i.PeakBF16, i.PeakMemory}
}
