package plan_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/load"
	"margo/engine/nn"
	"margo/engine/plan"
)

func newCtx(t *testing.T, dev engine.Device, compute engine.DType) *engine.Ctx {
	t.Helper()
	c, err := engine.NewCtx(dev, compute)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A block of MAR-B's decoder over 256 tokens and 64 buffer tokens, by hand.
func TestBlock(t *testing.T) {
	const d, rows = 768, 320
	dev := plan.New(0)
	b := nn.NewBlock(d, 12, 4, 1e-6)
	if err := load.Allocate(engine.Params(b), dev, engine.BF16); err != nil {
		t.Fatal(err)
	}
	if r := dev.Report(); r.Packed != 12*d*d*2 || r.Live != r.Packed+(3+1+4+1+2+2)*d*4 || r.Total().Calls != 0 {
		t.Errorf("the weights: %v", r)
	}
	c := newCtx(t, dev, engine.BF16)
	host := []int32{0, rows}
	s := nn.Spans{Off: c.I32(host), Host: host}
	x := c.New(engine.F32, rows, d)
	before := dev.Report()
	b.Forward(c, x, s)
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	r := dev.Report().Since(before)
	gemm, attention := int64(2*rows*12*d*d), int64(4*rows*rows*d)
	if g := r.Ops[engine.OpGemm]; g.BF16 != gemm || g.Calls != 4 {
		t.Errorf("gemm %+v, want %d FLOPs in 4 calls", g, gemm)
	}
	if a := r.Ops[engine.OpAttention]; a.BF16 != attention || a.Calls != 1 {
		t.Errorf("attention %+v, want %d FLOPs", a, attention)
	}
	if n := r.Ops[engine.OpNorm]; n.Calls != 2 || n.FLOPs() != 0 || n.Bytes != 2*(rows*d*(4+2)+2*d*4) {
		t.Errorf("norm %+v", n)
	}
	if r.Total().FLOPs() != gemm+attention {
		t.Errorf("%d FLOPs in all, want %d", r.Total().FLOPs(), gemm+attention)
	}
	if _, ok := r.Ops[plan.OpCopyIn]; ok {
		t.Error("Since keeps ops that did not run since")
	}
	if !strings.Contains(r.String(), "gemm") || !strings.Contains(r.String(), "peak memory") {
		t.Errorf("report:\n%v", r)
	}
}

func TestMemory(t *testing.T) {
	dev := plan.New(1000)
	a, err := dev.Alloc(600)
	if err != nil {
		t.Fatal(err)
	}
	_, err = dev.Alloc(500)
	if !errors.Is(err, engine.OutOfMemory) || !strings.Contains(err.Error(), "needs 1.1 KiB, the device has 1000 B") {
		t.Errorf("too much: %v", err)
	}
	if err := a.Free(); err != nil {
		t.Fatal(err)
	}
	if err := a.Free(); !errors.Is(err, engine.Internal) {
		t.Errorf("freed twice: %v", err)
	}
	if _, err := dev.Alloc(900); err != nil {
		t.Fatal(err)
	}
	r := dev.Report()
	if r.Live != 900 || r.Peak != 900 || r.Allocs != 2 || dev.Info().MemFree != 100 {
		t.Errorf("%+v", r)
	}
	r.Peak = 21*1<<30 + 3<<28
	err = r.Fits("cuda:0", 16<<30)
	if !errors.Is(err, engine.OutOfMemory) || !strings.Contains(err.Error(), "needs 21.8 GiB, cuda:0 has 16.0 GiB") {
		t.Errorf("does not fit: %v", err)
	}
	if err := r.Fits("cuda:0", r.Peak); err != nil {
		t.Errorf("fits: %v", err)
	}
}

// What a capture holds is counted when it is launched, as often as it is.
func TestGraph(t *testing.T) {
	dev := plan.New(0)
	c := newCtx(t, dev, engine.F32)
	x := c.New(engine.F32, 4, 8)
	g, err := c.Stream.Capture(func() error {
		c.Cast(engine.CastArgs{X: x, Y: c.New(engine.BF16, 4, 8), Scale: 1})
		return c.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	for want := int64(0); want < 3; want++ {
		if n := dev.Report().Ops[engine.OpCast]; n.Calls != want || n.Bytes != want*32*6 {
			t.Errorf("after %d launches: %+v", want, n)
		}
		if err := c.Stream.Launch(g); err != nil {
			t.Fatal(err)
		}
	}
}

// A plan finds wrong shapes, and reads as zeros.
func TestChecks(t *testing.T) {
	c := newCtx(t, plan.New(0), engine.F32)
	x := c.F32([]float32{1, 2, 3, 4}, 2, 2)
	if v := c.Download(x); len(v) != 4 || v[0] != 0 || v[3] != 0 {
		t.Errorf("a plan computed %v", v)
	}
	c.Cast(engine.CastArgs{X: x, Y: c.New(engine.F32, 2, 3), Scale: 1})
	if err := c.ClearErr(); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "cast") {
		t.Errorf("wrong shapes: %v", err)
	}
}

// Every op of the contract is counted under its own name.
func TestAllOps(t *testing.T) {
	dev := plan.New(0)
	s, err := dev.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	kernels := reflect.TypeFor[engine.Kernels]()
	for i := 0; i < kernels.NumMethod(); i++ {
		// Empty arguments fail the check, which names the op.
		name := kernels.Method(i).Name
		m := reflect.ValueOf(s).MethodByName(name)
		out := m.Call([]reflect.Value{reflect.Zero(m.Type().In(0))})
		err, _ := out[0].Interface().(error)
		var e *engine.Error
		if !errors.As(err, &e) || !strings.EqualFold(strings.ReplaceAll(e.Op, "_", ""), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := dev.Report().Total().Calls; n != 0 {
		t.Errorf("%d calls counted that failed", n)
	}
}
