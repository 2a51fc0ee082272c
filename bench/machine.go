package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// Machine is where and with what a result was made.
type Machine struct {
	CPU     string    `json:"cpu"`
	Cores   int       `json:"cores"`
	OS      string    `json:"os"`
	Kernel  string    `json:"kernel"`
	Go      string    `json:"go"`
	Commit  string    `json:"commit"`
	Command string    `json:"command"` // with the variables MARGO_… that were set, for some choose kernels
	Time    time.Time `json:"time"`
	Device  string    `json:"device"` // name, instruction set and threads
	PeakF32 float64   `json:"peak_f32_flops"`
	PeakB16 float64   `json:"peak_bf16_flops"`
	ReadBW  float64   `json:"read_bytes_per_s"`
	// PeaksDerived: the peaks follow from the clocks and units that the driver reports;
	// otherwise they were measured.
	PeaksDerived bool     `json:"peaks_derived"`
	Health       []string `json:"health,omitempty"` // of a GPU, before the first case and after the last
}

// ThisMachine fills in everything but the device's figures.
func ThisMachine() Machine {
	m := Machine{CPU: cpuModel(), Cores: runtime.NumCPU(), OS: runtime.GOOS + "/" + runtime.GOARCH,
		Go: runtime.Version(), Commit: commit(), Command: command(os.Environ(), os.Args), Time: time.Now().UTC().Truncate(time.Second)}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(b))
	}
	return m
}

func command(environ, args []string) string {
	var set []string
	for _, kv := range environ {
		if strings.HasPrefix(kv, "MARGO_") {
			set = append(set, kv)
		}
	}
	slices.Sort(set)
	return strings.Join(append(set, args...), " ")
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return runtime.GOARCH
}

// commit asks the build first, then git in the working directory.
func commit() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		rev, dirty := "", ""
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				rev = s.Value
			case s.Key == "vcs.modified" && s.Value == "true":
				dirty = "+"
			}
		}
		if rev != "" {
			return rev[:min(12, len(rev))] + dirty
		}
	}
	return describe(".")
}

// describe is the commit of margo's sources around dir; "unknown" where those are of
// another program, whose commit says nothing about this one.
func describe(dir string) string {
	git := func(args ...string) string {
		out, _ := exec.Command("git", append([]string{"-C", dir}, args...)...).Output()
		return strings.TrimSpace(string(out))
	}
	top := git("rev-parse", "--show-toplevel")
	if mod, err := os.ReadFile(filepath.Join(top, "go.mod")); top == "" || err != nil || !strings.HasPrefix(string(mod), "module margo\n") {
		return "unknown"
	}
	if commit := git("describe", "--always", "--dirty=+"); commit != "" {
		return commit
	}
	return "unknown"
}
