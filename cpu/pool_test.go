package cpu

import (
	"errors"
	"math/rand"
	"os"
	"sync"
	"testing"
	"time"

	"margo/engine"
)

// TestPoolStress: regions of all sizes from many goroutines, with barriers in
// them (the head's column schedule), on fewer CPUs than threads.
func TestPoolStress(t *testing.T) {
	want := make(map[int][]float32)
	for _, n := range []int{1, 2, 3} {
		f := newHeadFixture(t, 1, 3, 64, 2, 4, 4, f32)
		a := f.args(0, n)
		f.ok(f.s.HeadSteps(a))
		want[n] = f.get(a.X)
	}
	var wg sync.WaitGroup
	for g := range 6 {
		f := newHeadFixture(t, 1+g*7%8, 3, 64, 2, 4, 4, f32) // 1 to 8 threads
		args := []engine.HeadStepsArgs{f.args(0, 1), f.args(0, 2), f.args(0, 3)}
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 60 {
				n := 1 + i%3
				a := args[n-1]
				f.set(a.X, f.x[:n*f.ch])
				if err := f.s.HeadSteps(a); err != nil {
					t.Error(err)
					return
				}
				if j := sameBits(f.get(a.X), want[n]); j >= 0 {
					t.Errorf("goroutine %d, round %d: element %d differs", g, i, j)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// TestPoolFewThreads: where the system gives no more threads, those there are do
// the work.
func TestPoolFewThreads(t *testing.T) {
	one := newHeadFixture(t, 1, 3, 64, 2, 4, 4, f32)
	a := one.args(0, 3)
	one.ok(one.s.HeadSteps(a))
	want := one.get(a.X)

	limitPool(0)
	defer limitPool(-1)
	f := newHeadFixture(t, 900, 3, 64, 2, 4, 4, f32)
	a = f.args(0, 3)
	f.ok(f.s.HeadSteps(a))
	if i := sameBits(f.get(a.X), want); i >= 0 {
		t.Errorf("element %d differs", i)
	}
	if best, mean := PeakFLOPS(f32, 900), MeanFLOPS(f32, 900, time.Millisecond); best <= 0 || mean <= 0 {
		t.Errorf("best %g, mean %g", best, mean)
	}
}

// TestPoolCPUs: the pool goes by the quota, as DefaultThreads does.
func TestPoolCPUs(t *testing.T) {
	open(t, 1)
	n := DefaultThreads()
	if got := setPoolCPUs(1); got != n {
		t.Errorf("the pool counts on %d CPUs, DefaultThreads is %d", got, n)
	}
	defer setPoolCPUs(n)
	TestTwoEngines(t) // in turn
}

// TestTwoEngines: two devices with streams of their own compute at the same
// time, each what it computes alone.
func TestTwoEngines(t *testing.T) {
	const m, n, k = 40, 96, 64
	var wg sync.WaitGroup
	for e := range 2 {
		f := open(t, 1+e)
		r := rand.New(rand.NewSource(int64(e)))
		x, w := f.put(f32, randn(r, m*k, 1), m, k), f.put(f32, randn(r, n*k, 1), n, k)
		p, y := f.pack(w, f32), f.tensor(f32, m, n, n)
		f.ok(f.s.Gemm(engine.GemmArgs{X: x, W: w, Packed: p, Y: y}))
		want := f.get(y)
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 500 {
				if err := f.s.Gemm(engine.GemmArgs{X: x, W: w, Packed: p, Act: engine.Identity, Y: y}); err != nil {
					t.Error(err)
					return
				}
				if i := sameBits(want, f.get(y)); i >= 0 {
					t.Errorf("engine %d: element %d differs", e, i)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// TestQuota reads cgroup limits of both versions.
func TestQuota(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  int
	}{
		{"none", nil, 0},
		{"v2 max", map[string]string{"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 0},
		{"v2", map[string]string{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 3},
		{"v2 parent", map[string]string{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "/sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1},
		{"v2 root", map[string]string{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2},
		{"v1", map[string]string{"/proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n", "/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "150000\n", "/sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 2},
		{"v1 none", map[string]string{"/proc/self/cgroup": "4:cpu:/x\n", "/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 0},
	} {
		got := quota(func(name string) ([]byte, error) {
			if s, ok := c.files[name]; ok {
				return []byte(s), nil
			}
			return nil, os.ErrNotExist
		})
		if got != c.want {
			t.Errorf("%s: %d CPUs, want %d", c.name, got, c.want)
		}
	}
	if n := DefaultThreads(); n < 1 {
		t.Errorf("DefaultThreads() = %d", n)
	}
}

// TestDevice: memory, errors and capture.
func TestDevice(t *testing.T) {
	f := open(t, 2)
	if _, err := New(Options{Threads: -1}); !errors.Is(err, engine.Invalid) {
		t.Errorf("negative threads: %v", err)
	}
	t.Setenv("MARGO_CPU_ISA", "avx1024")
	if _, err := New(Options{}); !errors.Is(err, engine.Invalid) {
		t.Errorf("unknown instruction set: %v", err)
	}
	os.Unsetenv("MARGO_CPU_ISA")
	if _, err := f.d.Alloc(1 << 60); !errors.Is(err, engine.OutOfMemory) {
		t.Errorf("allocating 2^60 bytes: %v", err)
	}
	for _, size := range []int{0, 1, 63, 1 << 12, 1<<20 - 1, 1 << 20, 5<<20 + 3} {
		b, err := f.d.Alloc(size)
		f.ok(err)
		if b.Bytes() != size {
			t.Errorf("%d bytes asked, %d given", size, b.Bytes())
		}
		f.ok(b.Free())
		if err := b.Free(); err == nil {
			t.Errorf("a buffer was freed twice")
		}
	}
	info := f.d.Info()
	if info.Threads != 2 || info.MemTotal <= 0 || info.Arch != ISA() {
		t.Errorf("Info: %+v", info)
	}

	x, w := f.put(f32, []float32{1, 2}, 1, 2), f.put(f32, []float32{3, 4}, 1, 2)
	y := f.tensor(f32, 1, 1, 1)
	g, err := f.s.Capture(func() error { return f.s.Gemm(engine.GemmArgs{X: x, W: w, Y: y}) })
	f.ok(err)
	if v := f.get(y)[0]; v == v {
		t.Errorf("capture ran the kernel: %v", v)
	}
	f.ok(f.s.Launch(g))
	if v := f.get(y)[0]; v != 11 {
		t.Errorf("launch gave %v, want 11", v)
	}
	x.Shape = []int{1 << 20, 2}
	y.Shape = []int{1 << 20, 1}
	if err := f.s.Launch(g); !errors.Is(err, engine.Invalid) {
		t.Errorf("launch with tensors that have become larger than their buffers: %v", err)
	}
	x.Shape, y.Shape = []int{1, 2}, []int{1, 1}
	f.ok(f.s.Launch(g))
	gone := f.put(f32, []float32{1, 2}, 1, 2)
	g, err = f.s.Capture(func() error { return f.s.Gemm(engine.GemmArgs{X: gone, W: w, Y: y}) })
	f.ok(err)
	f.ok(gone.Buf.Free())
	if err := f.s.Launch(g); !errors.Is(err, engine.Invalid) {
		t.Errorf("launch with a freed buffer: %v", err)
	}
	other := open(t, 1)
	if err := other.s.Gemm(engine.GemmArgs{X: x, W: w, Y: y}); !errors.Is(err, engine.Invalid) {
		t.Errorf("tensors of another device: %v", err)
	}
}
