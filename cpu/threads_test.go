package cpu

import (
	"os"
	"testing"
)

// TestMemory reads the machine's memory and the limits of cgroups of both
// versions.
func TestMemory(t *testing.T) {
	const meminfo = "MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:   6000 kB\n"
	const kib = 1 << 10
	type tree map[string]string
	for _, c := range []struct {
		name        string
		files       tree
		total, free int64
	}{
		{"nothing is told", nil, 0, 0},
		{"no groups", tree{}, 8000 * kib, 6000 * kib},
		{"v2 without a limit", tree{"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/memory.max": "max\n", "/sys/fs/cgroup/a/memory.current": "1024000\n"}, 8000 * kib, 6000 * kib},
		{"v2", tree{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "4096000\n", "/sys/fs/cgroup/a/b/memory.current": "1024000\n"}, 4000 * kib, 3000 * kib},
		{"v2 with file pages", tree{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "4096000\n", "/sys/fs/cgroup/a/b/memory.current": "3072000\n",
			"/sys/fs/cgroup/a/b/memory.stat": "anon 1024000\nfile 2048000\nactive_file 512000\ninactive_file 1024000\n"}, 4000 * kib, 2500 * kib},
		{"v2 parent", tree{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n", "/sys/fs/cgroup/a/memory.max": "2048000\n", "/sys/fs/cgroup/a/memory.current": "1024000\n"}, 2000 * kib, 1000 * kib},
		{"v2 total and free from different levels", tree{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "2048000\n", "/sys/fs/cgroup/a/b/memory.current": "0\n",
			"/sys/fs/cgroup/a/memory.max": "4096000\n", "/sys/fs/cgroup/a/memory.current": "3072000\n"}, 2000 * kib, 1000 * kib},
		{"v2 root of a container", tree{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "2048000\n", "/sys/fs/cgroup/memory.current": "1024000\n"}, 2000 * kib, 1000 * kib},
		{"v2 limit above what is free", tree{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "7168000\n", "/sys/fs/cgroup/memory.current": "0\n"}, 7000 * kib, 6000 * kib},
		{"v2 over the limit", tree{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "1024000\n", "/sys/fs/cgroup/memory.current": "1024001\n"}, 1000 * kib, 1},
		{"v1", tree{"/proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/y\n0::/\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "4096000\n", "/sys/fs/cgroup/memory/x/memory.usage_in_bytes": "3072000\n",
			"/sys/fs/cgroup/memory/x/memory.stat": "inactive_file 7\ntotal_inactive_file 1024000\ntotal_active_file 0\n"}, 4000 * kib, 2000 * kib},
		{"v1 parent", tree{"/proc/self/cgroup": "5:memory:/x/y\n", "/sys/fs/cgroup/memory/x/y/memory.limit_in_bytes": "9223372036854771712\n", "/sys/fs/cgroup/memory/x/y/memory.usage_in_bytes": "1024000\n",
			"/sys/fs/cgroup/memory/memory.limit_in_bytes": "2048000\n", "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1024000\n"}, 2000 * kib, 1000 * kib},
		{"address space", tree{"/proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units     \nMax address space         3072000              unlimited            bytes     \n",
			"/proc/self/status": "Name:\tmargo\nVmSize:\t    1000 kB\n"}, 8000 * kib, 2000 * kib},
		{"no limit of address space", tree{"/proc/self/limits": "Max address space         unlimited            unlimited            bytes     \n"}, 8000 * kib, 6000 * kib},
	} {
		if c.files != nil {
			c.files["/proc/meminfo"] = meminfo
		}
		total, free := memoryOf(func(name string) ([]byte, error) {
			if s, ok := c.files[name]; ok {
				return []byte(s), nil
			}
			return nil, os.ErrNotExist
		})
		if total != c.total || free != c.free {
			t.Errorf("%s: %d total, %d free, want %d and %d", c.name, total, free, c.total, c.free)
		}
	}
	if total, free := Memory(); total < 1<<20 || free < 1 || free > total {
		t.Errorf("this machine: %d total, %d free", total, free)
	}
}
