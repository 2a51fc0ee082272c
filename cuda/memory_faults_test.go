package cuda

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"margo/engine"
)

// told is what an error for want of memory says: asked, held, cached and free.
var told = regexp.MustCompile(`asked, \d+\.\d MiB held, \d+\.\d MiB cached( and given back)?, \d+\.\d of \d+\.\d MiB free`)

func wantNoMemory(t *testing.T, what string, err error, text string) {
	t.Helper()
	wantError(t, what, err, engine.OutOfMemory, text)
	if err != nil && !told.MatchString(err.Error()) {
		t.Errorf("%s: %q does not say what was asked, held, cached and free", what, err)
	}
	var e *engine.Error
	if errors.As(err, &e) && (e.Op == "" || e.Device == "") {
		t.Errorf("%s: %v names op %q and device %q", what, err, e.Op, e.Device)
	}
}

// full is an emulated device of 32 MiB whose driver takes what takes says, with 24 MiB that the pool caches, or holds.
func full(t *testing.T, takes string, held bool) (*Device, func()) {
	t.Helper()
	t.Setenv("MARGO_EMU_TAKES", takes)
	t.Setenv("MARGO_EMU_MEMORY", fmt.Sprint(32*mebi))
	d := openDevice(t, Options{Cache: 30 * mebi})
	b, err := d.Alloc(24 * mebi)
	if err != nil {
		t.Fatal(err)
	}
	free := func() {
		if err := b.Free(); err != nil {
			t.Error(err)
		}
	}
	if !held {
		free()
		free = func() {}
		if c := d.Counters(); c.Cached != 24*mebi {
			t.Fatalf("%d bytes are cached", c.Cached)
		}
	}
	return d, free
}

// TestDriverTakesMemory: streams, events, graphs and kernels take memory of the driver's. Where the pool has cached it, it is
// given back and the call goes through; where it is held, the error names the call and says what there is, and the device
// goes on working once there is memory.
func TestDriverTakesMemory(t *testing.T) {
	emulatorOnly(t)
	const takes = "%s:16777216" // half of the device's memory
	tensor := func(d *Device) *engine.Tensor {
		t.Helper()
		b, err := d.Alloc(4 * 64)
		if err != nil {
			t.Fatal(err)
		}
		return engine.NewTensor(b, 0, engine.F32, 8, 8)
	}
	for _, c := range []struct {
		takes, says string
		call        func(d *Device, s engine.Stream, x *engine.Tensor) error
	}{
		{"stream", "making a stream", nil},
		{"event", "making an event", func(d *Device, s engine.Stream, _ *engine.Tensor) error {
			e, err := s.Record()
			if err == nil {
				err = e.Close()
			}
			return err
		}},
		{"graph", "making a graph", func(d *Device, s engine.Stream, x *engine.Tensor) error {
			g, err := s.Capture(func() error { return s.Fill(x, 1) })
			if err == nil {
				err = errors.Join(s.Launch(g), s.Sync(), g.Close())
			}
			return err
		}},
		{"kernel", "fill", func(d *Device, s engine.Stream, x *engine.Tensor) error { return s.Fill(x, 1) }},
	} {
		for _, held := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/held=%v", c.takes, held), func(t *testing.T) {
				// The device makes two streams when it is opened, which must fit: so little for a stream, and more of them.
				text, call := fmt.Sprintf(takes, c.takes), c.call
				if call == nil {
					text = "stream:3145728"
					call = func(d *Device, _ engine.Stream, _ *engine.Tensor) error {
						s, err := d.NewStream()
						if err == nil {
							err = s.Close()
						}
						return err
					}
				}
				if c.takes == "event" {
					text = "event:4194304" // freed memory carries one as well
				}
				d, free := full(t, text, held)
				var s engine.Stream
				var x *engine.Tensor
				if c.call != nil {
					var err error
					if s, err = d.NewStream(); err != nil {
						t.Fatal(err)
					}
					x = tensor(d)
				}
				if c.takes == "event" { // what else is free
					if e, err := s.Record(); err == nil {
						defer e.Close()
					}
				}
				err := call(d, s, x)
				if held {
					wantNoMemory(t, "held", err, c.says+": memory for the driver's own use asked, ")
					free()
					if err := d.Trim(); err != nil {
						t.Fatal(err)
					}
					err = call(d, s, x)
				}
				if err != nil {
					t.Errorf("with memory that is cached or free: %v", err)
				}
				if n := d.Counters().Trims; !held && n != 1 {
					t.Errorf("%d buffers were given back", n)
				}
				if s != nil {
					if err := errors.Join(x.Buf.Free(), s.Close()); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

// TestCommTakesMemory: where NCCL finds no memory on a rank, all try once more, with what that rank had cached; where it is
// held, that rank says what there is, the other which rank it was, and the group of hosts can try later.
func TestCommTakesMemory(t *testing.T) {
	t.Setenv("MARGO_EMU_MEMORY", fmt.Sprint(32*mebi))
	for _, c := range []struct{ takes, says string }{
		{"nccl:16777216", "meeting the other ranks: unhandled cuda error (Cuda failure 2 'out of memory')"},
		{"connect:16777216", "broadcast: unhandled cuda error (Cuda failure 2 'out of memory')"},
	} {
		for _, held := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/held=%v", c.takes, held), func(t *testing.T) {
				t.Setenv("MARGO_EMU_TAKES", c.takes)
				devices := commDevices(t, 2)
				if err := devices[1].SetMemory(0, 30*mebi); err != nil {
					t.Fatal(err)
				}
				b, err := devices[1].Alloc(24 * mebi)
				if err != nil {
					t.Fatal(err)
				}
				if !held {
					if err := b.Free(); err != nil {
						t.Fatal(err)
					}
				}
				errs := asComm(t, devices, time.Minute, true, collectives)
				if !held {
					fine(t, errs)
					return
				}
				wantError(t, "the other rank", errs[0], engine.CommFault, "rank 1 of 2 has no memory to join")
				wantNoMemory(t, "the rank without memory", errs[1], c.says)
				if errs[1] != nil && strings.Count(errs[1].Error(), "twice") != 1 {
					t.Errorf("%v: was it tried twice?", errs[1])
				}
				if err := b.Free(); err != nil {
					t.Fatal(err)
				}
				fine(t, asComm(t, devices, time.Minute, true, collectives))
			})
		}
	}
}

// TestCuBLASLtOpenTakesMemory: a device with too little memory for cuBLASLt is not opened, and says why.
func TestCuBLASLtOpenTakesMemory(t *testing.T) {
	emulatorOnly(t)
	t.Setenv("MARGO_EMU_TAKES", "cublaslt:16777216")
	t.Setenv("MARGO_EMU_MEMORY", fmt.Sprint(8*mebi))
	t.Setenv("MARGO_CUBLASLT", "1")
	_, err := Open("emu:0", Options{})
	wantNoMemory(t, "a device", err, "cublasLtCreate: ")
}

// TestCuBLASLtTakesMemory: cuBLASLt's calls that find no memory are made once more, after the cache was given back; and what
// autotune times in is memory of the pool's, which the limit counts.
func TestCuBLASLtTakesMemory(t *testing.T) {
	emulatorOnly(t)
	product := ltGemm{m: 64, n: 1024, k: 8, in: engine.F32, out: engine.F32} // Y has 256 KiB
	open := func(use string) (*Device, engine.Stream) {
		t.Helper()
		t.Setenv("MARGO_CUDA_CACHE", "16MiB")
		d := ltDevice(t, use)
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return d, s
	}
	for _, function := range []string{"MatmulAlgoGetHeuristic", "Matmul"} {
		d, s := open("1")
		b, err := d.Alloc(mebi)
		if err == nil {
			err = b.Free()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("MARGO_EMU_CUBLASLT", function+":3:1") // CUBLAS_STATUS_ALLOC_FAILED, once
		product.check(t, d, s)
		if n, c := served(d), d.Counters(); n != 1 || c.Trims != 1 {
			t.Errorf("%s: cuBLASLt made %d products, %d buffers were given back", function, n, c.Trims)
		}
		t.Setenv("MARGO_EMU_CUBLASLT", "Matmul:3")
		a := engine.GemmArgs{}
		for _, m := range []**engine.Tensor{&a.X, &a.W, &a.Y} {
			b, err := d.Alloc(4 * 64)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Free()
			*m = engine.NewTensor(b, 0, engine.F32, 8, 8)
		}
		wantNoMemory(t, "a product", s.Gemm(a), "cublasLtMatmul: an allocation failed (3): memory for the driver's own use asked, ")
		t.Setenv("MARGO_EMU_CUBLASLT", "")
	}
	// A limit that has room for the operands and not for a second Y: the product is untimed, and the limit kept.
	for _, c := range []struct {
		room int64
		want int32
	}{{64 << 10, heuristic}, {mebi, tuned}} {
		d, s := open("autotune")
		// The driver's words for what the product takes: X, W and Y.
		operands := int64(4 * (64*8 + 1024*8 + 64*1024))
		if err := d.SetMemory(int64(d.Counters().Taken)+operands+c.room, 0); err != nil {
			t.Fatal(err)
		}
		product.check(t, d, s)
		all := d.products()
		if len(all) != 1 || all[0].choice != c.want {
			t.Errorf("%d bytes of room: %+v, want choice %d", c.room, all, c.want)
		}
		if n := d.Counters(); n.TakenPeak > n.Limit || c.want == tuned && n.TakenPeak < uint64(d.lt.workspace)+uint64(operands)+4*64*1024 {
			t.Errorf("%d bytes of room: at most %d bytes were taken, the limit is %d", c.room, n.TakenPeak, n.Limit)
		}
	}
	if os.Getenv("MARGO_EMU_CUBLASLT") != "" {
		t.Error("a fault stays injected")
	}
}
