package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"

	"margo/engine"
)

// systemCheck looks at what a device is beside its kernels.
type systemCheck struct {
	name string
	f    func(dev engine.Device, s engine.Stream) error
}

var systemChecks = []systemCheck{
	{"info", checkInfo}, {"memory", checkMemory}, {"copies", checkCopies}, {"fill", checkFill},
	{"events", checkEvents}, {"graphs", checkGraphs}, {"refusals", checkRefusals}, {"cancel", checkCancel},
	{"concurrency", checkConcurrency},
}

func (c systemCheck) check(dev engine.Device) (r Result) {
	r = Result{Case: "system/" + c.name, Mode: System, Status: Pass}
	fail := func(err error) { r.Status, r.Detail = Fail, err.Error() }
	defer caught(fail)
	s := must(dev.NewStream())
	err := c.f(dev, s)
	if errors.Is(err, engine.Unsupported) {
		r.Status, r.Detail = Skip, err.Error()
	} else if err != nil {
		fail(err)
	}
	check(s.Close())
	return r
}

func checkInfo(dev engine.Device, s engine.Stream) error {
	if i := dev.Info(); i.Name == "" || i.Name != dev.Name() || s.Device() != dev {
		return fmt.Errorf("device %q says it is %+v, its stream is of %q", dev.Name(), i, s.Device().Name())
	}
	return nil
}

// checkMemory asks for impossible memory, and for much memory piece by piece.
func checkMemory(dev engine.Device, _ engine.Stream) error {
	if b, err := dev.Alloc(1 << 60); !errors.Is(err, engine.OutOfMemory) {
		return fmt.Errorf("2^60 bytes: buffer %v, error %v; want out of memory", b, err)
	}
	if b, err := dev.Alloc(-1); !errors.Is(err, engine.Invalid) {
		return fmt.Errorf("-1 bytes: buffer %v, error %v; want invalid", b, err)
	}
	const size = 4 << 20
	for i := 0; i < 50; i++ {
		b := must(dev.Alloc(size))
		if b.Bytes() < size {
			return fmt.Errorf("%d bytes asked, %d given", size, b.Bytes())
		}
		check(b.Free())
	}
	return nil
}

// tensor is a tensor in a buffer of its own; the buffer is the caller's to free.
func tensor(dev engine.Device, d engine.DType, shape ...int) *engine.Tensor {
	t := engine.NewTensor(nil, 0, d, shape...)
	t.Buf = must(dev.Alloc(t.Bytes()))
	return t
}

func pattern8(n int, d engine.DType) []byte {
	b := make([]byte, n*d.Size())
	r := newRandom(0, "copies", d.String())
	w := make([]uint32, n)
	for i := range w {
		if w[i] = word(bell(1)(r, i), d); d == engine.I32 {
			w[i] = uint32(r.next())
		}
	}
	copy(b, toBytes(w, d))
	return b
}

func checkCopies(dev engine.Device, s engine.Stream) error {
	for _, d := range []engine.DType{engine.F32, engine.BF16, engine.I32} {
		size := d.Size()
		src, dst := tensor(dev, d, 13, 9), tensor(dev, d, 13, 20)
		defer func() { check(src.Buf.Free()); check(dst.Buf.Free()) }()
		want, got := pattern8(13*9, d), make([]byte, 13*9*size)
		host := bytes.Clone(want)
		check(s.CopyIn(src, host))
		clear(host) // CopyIn has taken the data
		check(s.CopyOut(got, src))
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%v: CopyIn and CopyOut don't give the same bytes", d)
		}
		base := pattern8(13*20, d)
		check(s.CopyIn(dst, base))
		check(s.Copy(dst.Slice(4, 13), src))
		check(s.Copy(dst.RowsAt(2, 5).Slice(14, 17), src.RowsAt(7, 10).Slice(1, 4)))
		for r := 0; r < 13; r++ {
			copy(base[(r*20+4)*size:], want[r*9*size:(r+1)*9*size])
		}
		for r := 0; r < 3; r++ {
			copy(base[((r+2)*20+14)*size:], want[((r+7)*9+1)*size:((r+7)*9+4)*size])
		}
		all := make([]byte, len(base))
		check(s.CopyOut(all, dst))
		if !bytes.Equal(all, base) {
			return fmt.Errorf("%v: strided Copy is wrong", d)
		}
		row := make([]byte, 20*size)
		check(s.CopyOut(row, dst.RowsAt(3, 4)))
		if !bytes.Equal(row, base[3*20*size:4*20*size]) {
			return fmt.Errorf("%v: CopyOut of one row is wrong", d)
		}
	}
	return nil
}

func checkFill(dev engine.Device, s engine.Stream) error {
	for _, d := range []engine.DType{engine.F32, engine.BF16, engine.I32} {
		t := tensor(dev, d, 7, 11)
		defer func() { check(t.Buf.Free()) }()
		check(s.Fill(t, -3))
		check(s.Fill(t.Slice(2, 6), 200))
		b := make([]byte, t.Bytes())
		check(s.CopyOut(b, t))
		for i, w := range fromBytes(b, d) {
			v, want := float32(int32(w)), float32(-3)
			if d != engine.I32 {
				v = floatOf(w)
			}
			if c := i % 11; c >= 2 && c < 6 {
				want = 200
			}
			if v != want {
				return fmt.Errorf("%v: element %d is %v, want %v", d, i, v, want)
			}
		}
	}
	return nil
}

// add enqueues x += 1.
func add(s engine.Stream, x, one *engine.Tensor) error {
	return s.GatedAdd(engine.GatedAddArgs{X: x, H: one, Y: x})
}

// read waits for the first element of x.
func read(s engine.Stream, x *engine.Tensor) float32 {
	b := make([]byte, x.Bytes())
	check(s.CopyOut(b, x))
	return floatOf(fromBytes(b, engine.F32)[0])
}

// checkEvents makes two streams take turns.
func checkEvents(dev engine.Device, s engine.Stream) error {
	other := must(dev.NewStream())
	defer func() { check(other.Close()) }()
	x, one := tensor(dev, engine.F32, 64, 1000), tensor(dev, engine.F32, 64, 1000)
	defer func() { check(x.Buf.Free()); check(one.Buf.Free()) }()
	check(s.Fill(one, 1))
	check(s.Fill(x, 0))
	from, to := s, other
	for i := 0; i < 50; i++ {
		ev, err := from.Record()
		if err != nil {
			return err
		}
		check(to.Wait(ev))
		check(add(to, x, one))
		check(ev.Close())
		from, to = to, from
	}
	if got := read(from, x); got != 50 {
		return fmt.Errorf("50 additions on two streams gave %v", got)
	}
	return nil
}

// checkGraphs captures x += 1, x += 1 and launches it again and again.
func checkGraphs(dev engine.Device, s engine.Stream) error {
	x, one := tensor(dev, engine.F32, 3, 5), tensor(dev, engine.F32, 3, 5)
	defer func() { check(x.Buf.Free()); check(one.Buf.Free()) }()
	check(s.Fill(one, 1))
	check(s.Fill(x, 10))
	g, err := s.Capture(func() error {
		if err := add(s, x, one); err != nil {
			return err
		}
		return add(s, x, one)
	})
	if err != nil {
		return err
	}
	if got := read(s, x); got != 10 {
		return fmt.Errorf("capturing ran the kernels: 10 became %v", got)
	}
	for i := 0; i < 3; i++ {
		check(s.Launch(g))
	}
	check(s.Fill(one, 100))
	check(s.Launch(g))
	if got := read(s, x); got != 216 {
		return fmt.Errorf("10 + 3·2·1 + 2·100 gave %v", got)
	}
	check(g.Close())
	broken := errors.New("broken")
	if g, err := s.Capture(func() error { return broken }); g != nil || !errors.Is(err, broken) {
		return fmt.Errorf("a capture that fails gives graph %v and error %v", g, err)
	}
	return add(s, x, one)
}

// checkRefusals calls every op with arguments that cannot work. Each must give
// an *engine.Error of kind Invalid that names the op, and do nothing.
func checkRefusals(dev engine.Device, s engine.Stream) error {
	m := tensor(dev, engine.F32, 4, 6)
	idx := tensor(dev, engine.I32, 4)
	defer func() { check(m.Buf.Free()); check(idx.Buf.Free()) }()
	outside := *m
	outside.Off = 8
	wrong := *m
	wrong.DType = engine.I32
	calls := []struct {
		op   engine.Op
		what string
		err  error
	}{
		{engine.OpGemm, "nil", s.Gemm(engine.GemmArgs{})},
		{engine.OpGemm, "shapes", s.Gemm(engine.GemmArgs{X: m, W: m.Slice(0, 4), Y: m})},
		{engine.OpGemm, "out of bounds", s.Gemm(engine.GemmArgs{X: &outside, W: m, Y: m})},
		{engine.OpAttention, "nil", s.Attention(engine.AttentionArgs{})},
		{engine.OpNorm, "nil", s.Norm(engine.NormArgs{})},
		{engine.OpNorm, "dtype", s.Norm(engine.NormArgs{X: &wrong, Y: m})},
		{engine.OpGatedAdd, "nil", s.GatedAdd(engine.GatedAddArgs{})},
		{engine.OpGatedAdd, "shapes", s.GatedAdd(engine.GatedAddArgs{X: m, H: m.Slice(0, 5), Y: m})},
		{engine.OpRows, "nil", s.Rows(engine.RowsArgs{})},
		{engine.OpRows, "count", s.Rows(engine.RowsArgs{Y: m, A: m.RowsAt(0, 2), IA: idx, Count: 9})},
		{engine.OpCast, "nil", s.Cast(engine.CastArgs{})},
		{engine.OpTimestepEmbedding, "nil", s.TimestepEmbedding(engine.TimestepEmbeddingArgs{})},
		{engine.OpNormal, "nil", s.Normal(engine.NormalArgs{})},
		{engine.OpDiffusionStep, "nil", s.DiffusionStep(engine.DiffusionStepArgs{})},
		{engine.OpHeadSteps, "nil", s.HeadSteps(engine.HeadStepsArgs{})},
		{engine.OpConv2D, "nil", s.Conv2D(engine.Conv2DArgs{})},
		{engine.OpGroupNorm, "nil", s.GroupNorm(engine.GroupNormArgs{})},
		{engine.OpPatchify, "nil", s.Patchify(engine.PatchifyArgs{})},
		{engine.OpCategorical, "nil", s.Categorical(engine.CategoricalArgs{})},
		{"fill", "nil", s.Fill(nil, 1)},
		{"copy", "nil", s.Copy(nil, m)},
		{"copy in", "bytes", s.CopyIn(m, make([]byte, 95))},
		{"copy out", "bytes", s.CopyOut(make([]byte, 97), m)},
		{"copy out", "strided", s.CopyOut(make([]byte, 16), m.Slice(0, 1))},
	}
	for _, c := range calls {
		var e *engine.Error
		if errors.Is(c.err, engine.Unsupported) && !dev.Supports(c.op, engine.F32) {
			continue // refused for a better reason
		}
		if !errors.As(c.err, &e) || e.Kind != engine.Invalid || !strings.HasPrefix(e.Op, string(c.op)) {
			return fmt.Errorf("%s with bad %s: error is %v, want an invalid-argument error of %s", c.op, c.what, c.err, c.op)
		}
	}
	return s.Fill(m, 0)
}

// checkCancel starts a head loop that is cancelled before its first step.
func checkCancel(dev engine.Device, s engine.Stream) error {
	if !dev.Supports(engine.OpHeadSteps, engine.F32) {
		return engine.Errorf(string(engine.OpHeadSteps), engine.Unsupported, "%s has no head_steps", dev.Name())
	}
	stop := uint32(1)
	e := &env{dev: dev, s: s, name: "cancel", guard: 64}
	defer func() {
		for _, f := range e.free {
			check(f())
		}
	}()
	h := headCase{n: 3, c: 4, w: 32, blocks: 1, steps: 3, d: engine.F32}
	a := engine.HeadStepsArgs{
		X: e.inout("X", engine.F32, bell(1), 3, 4), Cond: e.in("Cond", engine.F32, bell(1), 3, 32), Time: e.in("Time", engine.F32, bell(1), 3, 32),
		Weights: h.weights(e, "", engine.F32), Steps: make([]engine.StepCoef, 3), IDs: tokenIDs(e, 3),
		RNG: engine.RNG{Purpose: engine.PurposeStepNoise}, Temperature: 1, Cancel: &stop,
	}
	e.upload()
	err := s.HeadSteps(a)
	if err == nil {
		err = s.Sync()
	}
	if !errors.Is(err, engine.Cancelled) {
		return fmt.Errorf("a cancelled head loop gives %v, want cancelled", err)
	}
	stop = 0
	check(s.HeadSteps(a)) // the stream is usable again
	return s.Sync()
}

// checkConcurrency runs several cases at the same time, each on a stream of its
// own, again and again: none may disturb another.
func checkConcurrency(dev engine.Device, _ engine.Stream) error {
	cases := []*Case{
		gemm{m: 33, n: 90, k: 70, bias: true, note: "concurrent"}.cases(),
		gemm{m: 5, n: 300, k: 128, w: engine.BF16, bias: true, note: "concurrent"}.cases(),
		attention{heads: 2, dh: 32, q: []int{20, 40}, k: []int{20, 40}}.cases(),
		headCase{n: 6, c: 4, w: 64, blocks: 1, steps: 2, guidance: true, note: "concurrent"}.cases(),
	}
	errs := make([]error, len(cases))
	var wg sync.WaitGroup
	for i, c := range cases {
		if !dev.Supports(c.Op, c.DType) {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer caught(func(err error) { errs[i] = err })
			e := newEnv(dev, c, 0)
			defer e.close()
			w := c.build(e)
			first := e.run(w.run)
			for n := 0; n < 20 && errs[i] == nil; n++ {
				errs[i] = e.differ(first, e.run(w.run))
			}
		}()
	}
	wg.Wait()
	return errors.Join(errs...)
}
