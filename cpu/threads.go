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
// without a limit. Both versions of the hierarchy are looked at, and every
// level from the process's own group to the root.
func quota(read func(string) ([]byte, error)) int {
	groups, err := read("/proc/self/cgroup")
	if err != nil {
		return 0
	}
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
	for s := bufio.NewScanner(bytes.NewReader(groups)); s.Scan(); {
		f := strings.SplitN(s.Text(), ":", 3) // hierarchy:controllers:path
		if len(f) != 3 {
			continue
		}
		v2 := f[0] == "0" && f[1] == ""
		if !v2 && !strings.Contains(","+f[1]+",", ",cpu,") {
			continue
		}
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) {
			if v2 {
				if b, err := read(path.Join("/sys/fs/cgroup", dir, "cpu.max")); err == nil {
					if w := strings.Fields(string(b)); len(w) == 2 {
						lower(w[0], w[1])
					}
				}
			} else {
				q, err1 := read(path.Join("/sys/fs/cgroup/cpu", dir, "cpu.cfs_quota_us"))
				p, err2 := read(path.Join("/sys/fs/cgroup/cpu", dir, "cpu.cfs_period_us"))
				if err1 == nil && err2 == nil {
					lower(strings.TrimSpace(string(q)), strings.TrimSpace(string(p)))
				}
			}
			if dir == "/" {
				break
			}
		}
	}
	return limit
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

// memory is the machine's memory and how much of it is available, in bytes; 0
// where the system does not tell.
func memory() (total, free int64) {
	b, _ := os.ReadFile("/proc/meminfo")
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			total = kb << 10
		case "MemAvailable:":
			free = kb << 10
		}
	}
	return total, free
}
