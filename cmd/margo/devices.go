package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/cuda"
	"margo/engine"
	"margo/engine/plan"
)

func devicesCommand() *cli.Command {
	return &cli.Command{
		Name:      "devices",
		Usage:     "list the devices that margo can compute on",
		UsageText: "margo devices [flags]",
		Description: `A device's name is what --device of the other commands takes. With --measure the peaks that benchmarks are compared with are measured, which takes a moment and wants an idle machine; a GPU's follow from its clocks and units. For a GPU there is also what NVML tells (temperature, power, clocks and what holds them back, and how busy it is) and which cuBLASLt there is, or why none. Where there is no CUDA device the last line says what is missing. With the plugin for CUDA a line tells the version of NCCL, which connects the devices of ranks, or why there is none.

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

	MemoryLimit uint64 `json:"memory_limit_bytes,omitempty"` // MARGO_CUDA_MEMORY
	MemoryCache uint64 `json:"memory_cache_bytes,omitempty"` // freed memory that is kept at most

	Health     *cuda.Health `json:"nvml,omitempty"`
	HealthNote string       `json:"nvml_missing,omitempty"` // why there is none

	CuBLASLt     *cuda.CuBLASLt `json:"cublaslt,omitempty"`
	CuBLASLtNote string         `json:"cublaslt_missing,omitempty"`
}

// cudaDevices opens every CUDA device, or says why there is none. margo never links
// CUDA: plugin and driver are looked for at run time, so that one binary starts
// everywhere.
func cudaDevices() (lines []deviceLine, why string) {
	n, err := cuda.Count("cuda")
	if err != nil {
		return nil, noCUDA + ": " + oneLine(err.Error())
	}
	if n == 0 {
		return nil, noCUDA + ": the driver shows none"
	}
	for i := range n {
		dev, err := cuda.Open(fmt.Sprintf("cuda:%d", i), cuda.Options{})
		if err != nil {
			return lines, oneLine(err.Error())
		}
		dev.MeasurePeaks()
		l, c := lineOf(dev.Info()), dev.Counters()
		l.MemoryLimit, l.MemoryCache = c.Limit, c.Cache
		if l.Health, err = dev.Health(); err != nil {
			l.HealthNote = oneLine(err.Error())
		}
		if l.CuBLASLt, err = dev.CuBLASLt(); err != nil {
			l.CuBLASLtNote = oneLine(err.Error())
		}
		lines = append(lines, l)
		if err := dev.Close(); err != nil {
			return lines, oneLine(err.Error())
		}
	}
	return lines, ""
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
	gpus, why := cudaDevices()
	lines = append(lines, gpus...)
	nccl, noNCCL := ncclLine()
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]any{"devices": lines, "cuda": why, "nccl": nccl, "nccl_missing": noNCCL})
	}
	for _, l := range lines {
		fmt.Fprintf(c.App.Writer, "%-6s %s, %s, %d %s, %s of %s memory free\n", l.Name, l.Model, l.Arch, l.Threads, units(l.Name), plan.Size(l.MemFree), plan.Size(l.MemTotal))
		if l.PeakF32 > 0 {
			fmt.Fprintf(c.App.Writer, "       peak %.0f GFLOP/s f32, %.0f GFLOP/s bf16, %.1f GB/s from memory\n", l.PeakF32/1e9, l.PeakBF16/1e9, l.PeakMemory/1e9)
		}
		if l.MemoryCache > 0 || l.MemoryLimit > 0 {
			limit := "no limit"
			if l.MemoryLimit > 0 {
				limit = "limit " + plan.Size(int64(l.MemoryLimit))
			}
			fmt.Fprintf(c.App.Writer, "       memory pool: %s, caches up to %s\n", limit, plan.Size(int64(l.MemoryCache)))
		}
		switch {
		case l.Health != nil:
			fmt.Fprintf(c.App.Writer, "       %v\n", l.Health)
		case l.HealthNote != "":
			fmt.Fprintf(c.App.Writer, "       %s\n", l.HealthNote)
		}
		switch {
		case l.CuBLASLt != nil:
			fmt.Fprintf(c.App.Writer, "       cuBLASLt %s (%s), MARGO_CUBLASLT: %s\n", l.CuBLASLt.Version, l.CuBLASLt.Library, l.CuBLASLt.Use)
		case l.CuBLASLtNote != "":
			fmt.Fprintf(c.App.Writer, "       %s\n", l.CuBLASLtNote)
		}
	}
	if why != "" {
		fmt.Fprintf(c.App.Writer, "%-6s %s\n", "cuda", why)
	}
	if line := nccl + noNCCL; line != "" {
		fmt.Fprintf(c.App.Writer, "%-6s %s\n", "nccl", line)
	}
	return nil
}

// ncclLine is NCCL's version, or why there is none; both are empty without a plugin
// that could use it, which is said elsewhere.
func ncclLine() (version, missing string) {
	version, err := cuda.NCCLVersion("cuda")
	var e *engine.Error
	if errors.As(err, &e) && e.Op == "open NCCL" {
		return "", oneLine(err.Error())
	}
	return version, ""
}

// units is what a device's Threads counts.
func units(name string) string {
	if isCUDA(name) {
		return "multiprocessors"
	}
	return "threads"
}

func lineOf(i engine.Info) deviceLine {
	return deviceLine{Name: i.Name, Model: i.Model, Arch: i.Arch, Threads: i.Threads, MemTotal: i.MemTotal, MemFree: i.MemFree,
		PeakF32: i.PeakF32, PeakBF16: i.PeakBF16, PeakMemory: i.PeakMemory}
}

// healthOf is a line of what NVML says about a GPU, or why it says nothing; empty for
// other devices.
func healthOf(dev engine.Device) string {
	d, ok := dev.(*cuda.Device)
	if !ok || !strings.HasPrefix(d.Name(), "cuda:") {
		return ""
	}
	h, err := d.Health()
	if err != nil {
		return oneLine(err.Error())
	}
	return h.String()
}
