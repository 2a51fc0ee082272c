package cpu

import (
	"bufio"
	"bytes"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// DefaultThreads is the number of CPUs this process may use: its affinity mask,
// limited by the CPU quota of its cgroups, at least 1.
func DefaultThreads() int { return defaultThreads() }

var defaultThreads = sync.OnceValue(func() int {
	n := runtime.NumCPU()
	if q := quota(os.ReadFile); q > 0 && q < n {
		n = q
	}
	return n
})

// quota is the number of CPUs that cgroup limits allow, rounded up, or 0
// without a limit.
func quota(read func(string) ([]byte, error)) int {
	limit := 0
	lower := func(quota, period string) {
		q, err1 := strconv.ParseInt(quota, 10, 64)
		p, err2 := strconv.ParseInt(period, 10, 64)
		if err1 != nil || err2 != nil || q <= 0 || p <= 0 { // "max" and -1: none
			return
		}
		if n := max(int((q+p-1)/p), 1); limit == 0 || n < limit {
			limit = n
		}
	}
	cgroups(read, "cpu", func(dir string, v2 bool) {
		if v2 {
			if b, err := read(path.Join(dir, "cpu.max")); err == nil {
				if w := strings.Fields(string(b)); len(w) == 2 {
					lower(w[0], w[1])
				}
			}
			return
		}
		q, err1 := read(path.Join(dir, "cpu.cfs_quota_us"))
		p, err2 := read(path.Join(dir, "cpu.cfs_period_us"))
		if err1 == nil && err2 == nil {
			lower(strings.TrimSpace(string(q)), strings.TrimSpace(string(p)))
		}
	})
	return limit
}

// cgroups names the folders whose limits on a controller hold for this process:
// in both versions of the hierarchy, every level from the process's own group
// to the root.
func cgroups(read func(string) ([]byte, error), controller string, visit func(dir string, v2 bool)) {
	groups, err := read("/proc/self/cgroup")
	if err != nil {
		return
	}
	for s := bufio.NewScanner(bytes.NewReader(groups)); s.Scan(); {
		f := strings.SplitN(s.Text(), ":", 3) // hierarchy:controllers:path
		if len(f) != 3 {
			continue
		}
		root, v2 := "/sys/fs/cgroup", f[0] == "0" && f[1] == ""
		if !v2 {
			if !strings.Contains(","+f[1]+",", ","+controller+",") {
				continue
			}
			root = path.Join(root, controller)
		}
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) {
			visit(path.Join(root, dir), v2)
			if dir == "/" {
				break
			}
		}
	}
}

// cpuModel is the processor's name as the system tells it.
var cpuModel = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for _, line := range strings.Split(string(b), "\n") {
		if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return runtime.GOARCH
})

// Memory is the memory that this process may use and how much of it is
// available, in bytes: the machine's, limited by its cgroups and by what is left of
// its address space (ulimit -v); 0 where the system does not tell.
func Memory() (total, free int64) { return memoryOf(os.ReadFile) }

func memoryOf(read func(string) ([]byte, error)) (total, free int64) {
	b, _ := read("/proc/meminfo")
	info := fields(b)
	total, free = info["MemTotal:"]<<10, info["MemAvailable:"]<<10 // from KiB
	cgroups(read, "memory", func(dir string, v2 bool) {
		most, current, prefix := "memory.max", "memory.current", ""
		if !v2 {
			most, current, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
		}
		limit, ok := number(read, path.Join(dir, most))
		if !ok { // "max": none
			return
		}
		used, _ := number(read, path.Join(dir, current))
		// Pages of files count as used but are given up when memory is short, as
		// MemAvailable knows: a model that was just read is not in its own way.
		b, _ := read(path.Join(dir, "memory.stat"))
		stat := fields(b)
		used -= min(used, stat[prefix+"active_file"]+stat[prefix+"inactive_file"])
		if total == 0 || limit < total {
			total = limit
		}
		if left := max(limit-used, 1); free == 0 || left < free { // 0 would be unknown
			free = left
		}
	})
	if limit, ok := addressSpace(read); ok {
		status, _ := read("/proc/self/status")
		if left := max(limit-fields(status)["VmSize:"]<<10, 1); free == 0 || left < free {
			free = left
		}
	}
	return total, free
}

// addressSpace is this process's limit of it.
func addressSpace(read func(string) ([]byte, error)) (limit int64, ok bool) {
	b, _ := read("/proc/self/limits")
	for _, line := range strings.Split(string(b), "\n") {
		if v, found := strings.CutPrefix(line, "Max address space"); found {
			if f := strings.Fields(v); len(f) > 0 { // "unlimited", or bytes
				n, err := strconv.ParseInt(f[0], 10, 64)
				return n, err == nil
			}
		}
	}
	return 0, false
}

// number reads a file that holds one number.
func number(read func(string) ([]byte, error), name string) (int64, bool) {
	b, err := read(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil && n >= 0
}

// fields reads lines of a name and a number.
func fields(b []byte) map[string]int64 {
	out := map[string]int64{}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if f := strings.Fields(s.Text()); len(f) >= 2 {
			out[f[0]], _ = strconv.ParseInt(f[1], 10, 64)
		}
	}
	return out
}
