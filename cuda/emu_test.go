package cuda

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/conformance"
)

// mutants lists the seeded bugs of kernels/emu/test/mutants.cu and how each must end, in the plain
// emulator and in the check build. "ok" in the plain one means that the bug needs another schedule
// to show, which no test can count on: there the checker must find it. MARGO_EMU_REPORT counts those
// that are right but slow.
var mutants = []struct {
	kernel       string
	bug          int
	plain, check string // regular expressions
}{
	{"tiles", 0, `^ok$`, `^ok$`},
	{"tiles", 1, `^wrong result$`, `^wrong result$|race`},                      // cp.async not waited for
	{"tiles", 2, `^wrong result$`, `race: .* shared memory .*mutants\.cu:\d+`}, // no __syncthreads after the load
	{"tiles", 3, `^wrong result$|^ok$`, `race: .* shared memory`},              // none before the slot is filled again
	{"tiles", 4, `^ok$`, `^ok$`},                                               // no swizzle: bank conflicts
	{"tiles", 5, `past the end of a buffer`, `write of 4 bytes at byte \d+ of a buffer of 15616`},
	{"tiles", 6, `MisalignedAddress: .*ldmatrix.*mutants\.cu:\d+, block`, `MisalignedAddress: .*ldmatrix`},
	{"tiles", 7, `IllegalAddress: .*cp\.async: source`, `IllegalAddress: .*cp\.async: source`},
	{"sums", 0, `^ok$`, `^ok$`},
	{"sums", 1, `^wrong result$`, `race: .* shared memory`}, // no __syncthreads between write and read
	{"sums", 2, `divergent barrier`, `divergent barrier`},
	{"sums", 3, `deadlock: .* in a shuffle at mutants\.cu:\d+ .* in __syncthreads|divergent`, `deadlock|divergent`},
	{"sums", 4, `^wrong result$|^ok$`, `race: .* shared memory`},
	{"sums", 5, `shuffle: lane \d+ reads lane \d+, which does not take part|not in its own mask`, `does not take part|not in its own mask`},
	{"sums", 6, `divergent .* exit`, `divergent .* exit`},
	{"sums", 7, `MisalignedAddress: .*vector of 16 bytes.*mutants\.cu:\d+`, `MisalignedAddress`},
	{"sums", 8, `past the 16 bytes of its shared memory`, `write of 4 bytes at byte 16 of 16 bytes of shared memory`},
	{"hopper", 0, `^ok$`, `^ok$`},
	{"hopper", 1, `^wrong result$|deadlock|arrivals`, `race|deadlock|arrivals`}, // TMA not waited for
	{"hopper", 2, `^wrong result$`, `^wrong result$`},                           // wgmma not waited for
	{"hopper", 3, `wgmma without wgmma_fence`, `wgmma without wgmma_fence`},
	{"hopper", 4, `^ok$|^wrong result$`, `race: .*write of shared memory`}, // slot released before the products have read it
	{"hopper", 5, `mbarrier: more than 1 arrivals|wrong result`, `mbarrier: more than 1 arrivals|race`},
	{"hopper", 6, `copies of TMA under way|wrong result|deadlock|arrivals`, `copies of TMA under way|wrong result|race|deadlock|arrivals`},
	{"hopper", 7, `mbarrier: .* not initialised`, `mbarrier: .* not initialised`},
	{"values", 0, `^ok$`, `^ok$`},
	{"values", 1, `wgmma without wgmma_fence`, `wgmma without wgmma_fence`},
	{"values", 2, `^wrong result$|deadlock|arrivals`, `race|deadlock|arrivals`}, // TMA not waited for
	{"values", 3, `^wrong result$|deadlock|arrivals`, `race|deadlock|arrivals`}, // the other phase waited for
	{"values", 4, `product that writes them is under way`, `product that writes them is under way`},
	{"values", 5, `^ok$|^wrong result$`, `race: .*write of shared memory`}, // slot released before the products have read it
	{"values", 6, `^wrong result$`, `^wrong result$`},                      // A's registers changed before the wait
	{"values", 7, `product that reads them is under way`, `product that reads them is under way`},
	{"values", 8, `b, transposed, begins 32 bytes into 1024`, `b, transposed, begins 32 bytes into 1024`}, // k advances as if it were not transposed
	{"values", 9, `next columns 16 bytes on, inside the first ones`, `next columns 16 bytes on`},
	{"values", 10, `16 columns in blocks of 64`, `16 columns in blocks of 64`}, // the box of 16 taken for one of 64
	{"values", 11, `^wrong result$`, `^wrong result$`},                         // another head
	{"values", 12, `copies of TMA under way|wrong result|deadlock|arrivals`, `copies of TMA under way|wrong result|race|deadlock|arrivals`},
	{"values", 13, `MisalignedAddress: .*tma_load: destination is no multiple of 256`, `MisalignedAddress: .*no multiple of 256`},
	{"values", 14, `groups of 8 rows every 2048 bytes`, `groups of 8 rows every 2048 bytes`},
	{"phases", 0, `^ok$`, `^ok$`},
	{"phases", 1, `^ok$|wrong result`, `race: .* global memory`}, // no grid barrier
	{"phases", 2, `^ok$|wrong result`, `race: .* global memory`}, // its load does not acquire
	{"phases", 3, `^ok$|wrong result`, `race: .* global memory`}, // its add does not release
	{"phases", 4, `^ok$|wrong result`, `race: .* global memory`}, // a block counts for all
	{"phases", 5, `^ok$|wrong result`, `race: .* global memory`}, // a thread arrives before its block has written
	{"phases", 6, `deadlock: polling for what never comes`, `deadlock: polling for what never comes`},
	{"phases", 7, `deadlock: .*ordinary launch`, `deadlock: .*ordinary launch|race`}, // a grid barrier in an ordinary launch
	{"counts", 0, `^ok$`, `^ok$`},
	{"counts", 1, `^ok$|wrong result`, `race: .* global memory`}, // blocks add without atomics
	{"streams", 0, `^ok$`, `^ok$`},
	{"streams", 1, `^wrong result$`, `^wrong result$`}, // an event not waited for
	{"streams", 2, `^wrong result$`, `^wrong result$`}, // a pinned buffer used again too early
	{"streams", 3, `^wrong result$`, `^wrong result$`}, // a memset that nothing waits for
	{"strided", 0, `^ok$`, `^ok$`},                     // right and slow: see counted
	{"strided", 1, `^ok$`, `^ok$`},
	{"strided", 2, `^ok$`, `^ok$`},
	{"vectors", 0, `^ok$`, `^ok$`},
	{"vectors", 1, `^ok$`, `^ok$`},
	{"vectors", 2, `^ok$`, `^ok$`},
}

// counted is what the check build must report for the launches of strided and vectors. Four warps load and store once in
// each memory. A warp's 32 floats are 4 sectors side by side, 8 if every other one is taken, 32 if they lie 36
// bytes apart; in shared memory 1 turn of the banks, 8 if they lie 8 words apart (8 lanes to each of 4 banks), 1
// if they lie 33 words apart. 32 vectors of 16 bytes are 16 sectors and 4 turns, of 8 lanes each; 8 turns if they lie 32 bytes apart.
var counted = []string{
	`^strided global.load=4 waves=16 least=16 global.store=4 waves=16 least=16 shared.load=4 waves=4 least=4 shared.store=4 waves=4 least=4$`,
	`^strided global.load=4 waves=32 least=16 worst=mutants\.cu:\d+:32/16 global.store=4 waves=16 least=16 ` +
		`shared.load=4 waves=32 least=4 worst=mutants\.cu:\d+:32/4 shared.store=4 waves=32 least=4 worst=mutants\.cu:\d+:32/4$`,
	`^strided global.load=4 waves=128 least=16 worst=mutants\.cu:\d+:128/16 global.store=4 waves=16 least=16 shared.load=4 waves=4 least=4 shared.store=4 waves=4 least=4$`,
	`^vectors global.load=4 waves=64 least=64 global.store=4 waves=64 least=64 shared.load=4 waves=16 least=16 shared.store=4 waves=16 least=16$`,
	`^vectors global.load=4 waves=64 least=64 global.store=4 waves=64 least=64 ` +
		`shared.load=4 waves=32 least=16 worst=mutants\.cu:\d+:32/16 shared.store=4 waves=32 least=16 worst=mutants\.cu:\d+:32/16$`,
	`^vectors global.load=4 waves=64 least=64 global.store=4 waves=64 least=64 ` +
		`shared.load=4 waves=32 least=16 worst=mutants\.cu:\d+:32/16 shared.store=4 waves=32 least=16 worst=mutants\.cu:\d+:32/16$`,
}

// runMutants runs the program and returns how each kernel and bug ended.
func runMutants(t *testing.T, program string, env ...string) map[string]string {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), append([]string{"MARGO_EMU_CC=90"}, env...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: the program must survive every bug\n%s", err, out)
	}
	ends := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		name, end, _ := strings.Cut(line, ": ")
		ends[name] = end
	}
	return ends
}

// TestMutants: every seeded bug is found, and nothing is found where there is none.
func TestMutants(t *testing.T) {
	for _, san := range []string{"", "check"} {
		program := buildEmu(t, san, "mutants")
		for seed := range 4 { // 0: the fixed order
			t.Run(filepath.Base(filepath.Dir(program))+"/seed "+strconv.Itoa(seed), func(t *testing.T) {
				report := filepath.Join(t.TempDir(), "report")
				ends := runMutants(t, program, "MARGO_EMU_SEED="+strconv.Itoa(seed), "MARGO_EMU_REPORT="+report)
				for _, m := range mutants {
					want, name := m.plain, m.kernel+" "+strconv.Itoa(m.bug)
					if san == "check" {
						want = m.check
					}
					if seed > 0 && m.kernel == "streams" && m.bug > 0 {
						continue // another order may happen to be right
					}
					if seed > 0 && san == "" && want == `^wrong result$` {
						want = `^wrong result$|^ok$`
					}
					if seed > 0 && m.kernel == "phases" && m.bug == 4 {
						want += `|^ok$` // in another order all may have arrived in time, and then all is ordered
					}
					if end, ok := ends[name]; !ok || !regexp.MustCompile(want).MatchString(end) {
						t.Errorf("%s ended with %q, want %s", name, end, want)
					}
				}
				if len(ends) != len(mutants) {
					t.Errorf("%d bugs ran, the table has %d", len(ends), len(mutants))
				}
				text, err := os.ReadFile(report)
				if err != nil {
					t.Fatal(err)
				}
				var lines []string
				for _, line := range strings.Split(string(text), "\n") {
					if strings.HasPrefix(line, "strided") || strings.HasPrefix(line, "vectors") {
						lines = append(lines, line)
					}
				}
				for i, want := range counted {
					if san == "" {
						want = `^(strided|vectors)$` // the plain build sees no accesses
					}
					if len(lines) != len(counted) || !regexp.MustCompile(want).MatchString(lines[i]) {
						t.Errorf("launch %d: want %s in the report, got %q", i, want, lines)
					}
				}
				if n := strings.Count(string(text), "tiles ldmatrix=1280 conflicts=8.00"); n != 1 {
					t.Errorf("%d launches have eightfold bank conflicts, want that without swizzle:\n%s", n, text)
				}
			})
		}
	}
}

// TestInjectedFaults: what the emulator is told to do wrong comes back as errors of the right kind.
func TestInjectedFaults(t *testing.T) {
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("faults are injected into the emulator only")
	}
	open := func() error {
		d, err := Open("emu:0", Options{})
		if err != nil {
			return err
		}
		defer d.Close()
		s, err := d.NewStream()
		if err != nil {
			return err
		}
		defer s.Close()
		buf, err := d.Alloc(1 << 20)
		if err != nil {
			return err
		}
		defer buf.Free()
		y := engine.NewTensor(buf, 0, engine.F32, 64, 64)
		for range 3 {
			if err := s.Fill(y, 1); err != nil {
				return err
			}
			if err := s.Sync(); err != nil {
				return err
			}
		}
		return nil
	}
	for _, c := range []struct {
		variable, value string
		kind            engine.Kind
		text            string
	}{
		{"MARGO_EMU_DEVICES", "0", engine.DeviceFault, "no CUDA-capable device"},
		{"MARGO_EMU_DRIVER", "12020", engine.DeviceFault, "driver version is insufficient"},
		{"MARGO_EMU_MEMORY", "100000", engine.OutOfMemory, "1.0 MiB asked"},
		{"MARGO_EMU_FAIL_ALLOC", "1", engine.OutOfMemory, "1.0 MiB asked"},
		{"MARGO_EMU_LOSE_DEVICE", "2", engine.DeviceFault, "device was lost"},
	} {
		t.Run(c.variable, func(t *testing.T) {
			t.Setenv(c.variable, c.value)
			err := open()
			var e *engine.Error
			if !errors.As(err, &e) || e.Kind != c.kind || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.kind, c.text)
			}
		})
	}
	if err := open(); err != nil {
		t.Errorf("after the faults: %v", err)
	}
}

// TestTiles: the largest tiles that fit into a device's shared memory are right: 163 KiB a block on 8.0, 99 on 8.6. With one
// multiprocessor gemm takes its largest for anything.
func TestTiles(t *testing.T) {
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("emulated devices")
	}
	t.Setenv("MARGO_EMU_SMS", "1")
	for cc, want := range map[string]string{"80": "gemm_bf16_128x256", "86": "gemm_bf16_128x128"} {
		t.Run(cc, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "trace")
			t.Setenv("MARGO_EMU_CC", cc)
			t.Setenv("MARGO_EMU_TRACE", path)
			conformance.Run(t, testDevice(t), conformance.Options{Quick: true,
				Match: regexp.MustCompile(`^gemm/bf16/(45x75x8|3x65x33 )|^conv2d/bf16/.*residual=y|^attention/bf16/1x(256|512) `)})
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{want, want + "_convert", "attention_256", "attention_unaligned_512"} {
				if !strings.Contains(string(text), "kernel "+name+" ") {
					t.Errorf("no launch of %s", name)
				}
			}
		})
	}
}

// TestAttentionPaths: the quick table launches attention's kernels for aligned rows, which are those that models take, and
// those for any others. Launches are looked at only.
func TestAttentionPaths(t *testing.T) {
	emulatorOnly(t)
	path := filepath.Join(t.TempDir(), "trace")
	t.Setenv("MARGO_EMU_CC", "80") // a Hopper has kernels of its own for some of these
	t.Setenv("MARGO_EMU_RUN", "0")
	t.Setenv("MARGO_EMU_TRACE", path)
	conformance.Check(testDevice(t), conformance.Options{Quick: true,
		Match: regexp.MustCompile(`^attention/bf16/.*(whole tiles|aligned|q=\[21 40\])|^paged_attention/(bf16|f32)/.*( aligned|block=16 q=\[1 1 1\])`)})
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"16", "32", "48", "64", "72", "80", "96", "128", "192", "256", "512",
		"unaligned_16", "unaligned_48", "unaligned_64", "unaligned_72", "unaligned_80", "unaligned_128", "unaligned_512",
		"paged_16", "paged_48", "paged_64", "paged_72", "paged_128", "paged_256", "paged_512",
		"decode_16", "decode_64", "decode_128", "decode_256", "decode_512", "decode_unaligned_16", "decode_unaligned_64", "decode_unaligned_128"} {
		if !strings.Contains(string(text), "kernel attention_"+name+" ") {
			t.Errorf("no launch of attention_%s", name)
		}
	}
}

// TestTrace: the trace names every launch of a kernel in order.
func TestTrace(t *testing.T) {
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("the emulator's trace")
	}
	path := filepath.Join(t.TempDir(), "trace")
	t.Setenv("MARGO_EMU_TRACE", path)
	d := testDevice(t)
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	buf, err := d.Alloc(4 * 64 * 64)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Free()
	other, err := d.Alloc(4 * 64 * 64)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Free()
	y, h := engine.NewTensor(buf, 0, engine.F32, 64, 64), engine.NewTensor(other, 0, engine.F32, 64, 64)
	if err := errors.Join(s.Fill(y, 1), s.Fill(h, 2), s.GatedAdd(engine.GatedAddArgs{X: y, H: h, Y: y}), s.Sync()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := regexp.MustCompile(`^kernel fill grid=\d+,\d+,1 block=\d+,\d+,1 smem=0 stream=\d+\nkernel fill .*\nkernel gated_add grid=`); !want.Match(text) {
		t.Errorf("trace is\n%s", text)
	}
}

// TestCaptureThread: a capture ends on the thread that began it, wherever Go would go on.
func TestCaptureThread(t *testing.T) {
	d := testDevice(t)
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b, err := d.Alloc(4 * 64)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	x := engine.NewTensor(b, 0, engine.F32, 64)
	for range 20 {
		over := make(chan bool)
		g, err := s.Capture(func() error {
			resume := make(chan bool)
			go func() { // takes a thread for itself: the one of who waits, as a rule
				runtime.LockOSThread()
				resume <- true
				<-over
			}()
			<-resume
			return s.Fill(x, 1)
		})
		close(over)
		if err == nil {
			err = errors.Join(s.Launch(g), s.Sync(), g.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestAfterClose: what belongs to a closed device refuses, whatever is called.
func TestAfterClose(t *testing.T) {
	d, err := Open("emu:0", Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	g, err := s.Capture(func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	_, alloc := d.Alloc(1)
	_, stream := d.NewStream()
	_, record := s.Record()
	for _, err := range []error{alloc, stream, record, s.Sync(), s.Launch(g), g.Close(), s.Close()} {
		wantError(t, "a closed device", err, engine.Invalid, "the device was closed")
	}
	if err := errors.Join(g.Close(), s.Close()); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}
