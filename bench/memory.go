package bench

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// resetPeak makes the system forget the largest resident size that a process
// had so far (Linux, proc_pid_clear_refs(5)), and says whether it could. The
// figure of getrusage cannot be reset, and a child's begins with its parent's.
func resetPeak(pid int) bool {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/clear_refs", pid), os.O_WRONLY, 0)
	if err != nil {
		return false
	}
	_, err = f.WriteString("5")
	return f.Close() == nil && err == nil
}

// peakResident is the largest resident size that a process had since resetPeak,
// in bytes; 0 where the system does not tell.
func peakResident(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
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

// memoryMeter reads the memory that a side takes for a case.
type memoryMeter struct {
	reset func()
	peak  func() (bytes int64, device bool) // 0: not known
}

// meter is the meter of a side: of the device where that has memory of its own and
// counts, otherwise of the process.
func meter(s Side) memoryMeter {
	if m, ok := s.(*Margo); ok {
		if d, ok := m.Device.(interface {
			PeakUsed() int64
			ResetPeakUsed()
		}); ok {
			return memoryMeter{d.ResetPeakUsed, func() (int64, bool) { return d.PeakUsed(), true }}
		}
	}
	if p, ok := s.(*PyTorch); ok && p.away {
		return memoryMeter{func() {}, func() (int64, bool) { return 0, true }}
	}
	known := false
	return memoryMeter{func() { known = resetPeak(s.PID()) }, func() (int64, bool) {
		if !known {
			return 0, false // an earlier case's
		}
		return peakResident(s.PID()), false
	}}
}
