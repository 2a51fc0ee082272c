package cpu

// #include "core.h"
import "C"

import (
	"bytes"
	"unsafe"

	"margo/engine"
)

// stream is engine.Stream. It runs everything at once, so that events and Sync
// have nothing to wait for. While it captures, calls are checked and recorded,
// not run.
type stream struct {
	engine.Unimplemented // of ops added to the contract after this device was written
	dev                  *Device
	rec                  *graph // being captured
	closed               bool
}

var _ engine.Stream = (*stream)(nil)

// graph is a captured sequence. Addresses are looked up at every launch, so
// that a buffer freed meanwhile is an error.
type graph struct {
	dev    *Device
	run    []func() error
	closed bool
}

// Close drops the recording.
func (g *graph) Close() error { g.closed, g.run = true, nil; return nil }

type event struct {
	dev    *Device
	closed bool
}

// Close drops the event.
func (e *event) Close() error { e.closed = true; return nil }

// do runs or records an op. check looks at its arguments, at every launch again:
// a tensor may have changed since it was recorded. call resolves tensors with v
// and makes the native call; where v.err is set it must not.
func (s *stream) do(op engine.Op, check func() error, call func(v *views) C.int) error {
	if s.closed {
		return s.dev.errorf(op, engine.Invalid, "stream is closed")
	}
	run := func() error {
		if err := check(); err != nil {
			return s.dev.named(err)
		}
		v := views{dev: s.dev}
		status := call(&v)
		return s.dev.outcome(op, v.err, status)
	}
	if s.rec == nil {
		return run()
	}
	if err := check(); err != nil {
		return s.dev.named(err)
	}
	s.rec.run = append(s.rec.run, run)
	return nil
}

// mark is do for what only has to be allowed when it is called.
func (s *stream) mark(op engine.Op, err error) error {
	return s.do(op, func() error { return err }, func(*views) C.int { return C.MC_OK })
}

// Device is the device of the stream.
func (s *stream) Device() engine.Device { return s.dev }

// row views row r of t as bytes.
func (v *views) row(t *engine.Tensor, r int) []byte {
	p := v.ptr(t)
	if p == nil {
		return nil
	}
	n := t.Cols() * t.DType.Size()
	return unsafe.Slice((*byte)(unsafe.Add(p, r*t.RowStride*t.DType.Size())), n)
}

// all views a contiguous tensor as bytes.
func (v *views) all(t *engine.Tensor) []byte {
	if p := v.ptr(t); p != nil {
		return unsafe.Slice((*byte)(p), t.Bytes())
	}
	return nil
}

// CopyIn copies src to dst.
func (s *stream) CopyIn(dst *engine.Tensor, src []byte) error {
	if s.rec != nil {
		src = bytes.Clone(src)
	}
	return s.do("copy in", func() error { return engine.CheckHostCopy("copy in", dst, src) }, func(v *views) C.int {
		copy(v.all(dst), src)
		return C.MC_OK
	})
}

// CopyOut copies src to dst.
func (s *stream) CopyOut(dst []byte, src *engine.Tensor) error {
	check := func() error {
		if s.rec != nil {
			return engine.Errorf("copy out", engine.Invalid, "stream is capturing")
		}
		return engine.CheckHostCopy("copy out", src, dst)
	}
	return s.do("copy out", check, func(v *views) C.int {
		copy(dst, v.all(src))
		return C.MC_OK
	})
}

// Copy copies src to dst.
func (s *stream) Copy(dst, src *engine.Tensor) error {
	return s.do("copy", func() error { return engine.CheckCopy(dst, src) }, func(v *views) C.int {
		if dst.Contiguous() && src.Contiguous() {
			copy(v.all(dst), v.all(src))
			return C.MC_OK
		}
		for r := 0; r < dst.Rows(); r++ {
			copy(v.row(dst, r), v.row(src, r))
		}
		return C.MC_OK
	})
}

// Fill sets every element; an I32 takes x's integer part.
func (s *stream) Fill(dst *engine.Tensor, x float32) error {
	return s.do("fill", func() error { return engine.CheckFill(dst) }, func(v *views) C.int {
		for r := 0; r < dst.Rows(); r++ {
			p := v.row(dst, r)
			if len(p) == 0 {
				break
			}
			switch n := dst.Cols(); dst.DType {
			case engine.F32:
				fill(unsafe.Slice((*float32)(unsafe.Pointer(&p[0])), n), x)
			case engine.BF16:
				fill(unsafe.Slice((*uint16)(unsafe.Pointer(&p[0])), n), engine.ToBF16(x))
			case engine.I32:
				fill(unsafe.Slice((*int32)(unsafe.Pointer(&p[0])), n), int32(x))
			}
		}
		return C.MC_OK
	})
}

func fill[E any](v []E, x E) {
	for i := range v {
		v[i] = x
	}
}

// Record marks the current point, which has been reached already.
func (s *stream) Record() (engine.Event, error) {
	return &event{dev: s.dev}, s.mark("record", nil)
}

// Wait has nothing to wait for.
func (s *stream) Wait(e engine.Event) error {
	var err error
	if ev, ok := e.(*event); !ok || ev.dev != s.dev || ev.closed {
		err = engine.Errorf("wait", engine.Invalid, "event is closed or of another device")
	}
	return s.mark("wait", err)
}

// Capture records what f enqueues, without running it.
func (s *stream) Capture(f func() error) (engine.Graph, error) {
	if s.closed || s.rec != nil {
		return nil, s.dev.errorf("capture", engine.Invalid, "stream is closed or capturing already")
	}
	g := &graph{dev: s.dev}
	s.rec = g
	defer func() { s.rec = nil }()
	if err := f(); err != nil {
		return nil, err
	}
	return g, nil
}

// Launch runs a graph of this device.
func (s *stream) Launch(x engine.Graph) error {
	g, ok := x.(*graph)
	if !ok || g.dev != s.dev || g.closed {
		return s.dev.errorf("launch", engine.Invalid, "graph is closed or of another device")
	}
	if s.closed || s.rec != nil {
		return s.dev.errorf("launch", engine.Invalid, "stream is closed or capturing")
	}
	for _, run := range g.run {
		if err := run(); err != nil {
			return err
		}
	}
	return nil
}

// Sync returns at once.
func (s *stream) Sync() error {
	var err error
	if s.rec != nil {
		err = engine.Errorf("sync", engine.Invalid, "stream is capturing")
	}
	return s.mark("sync", err)
}

// Close ends the stream.
func (s *stream) Close() error {
	s.closed = true
	return nil
}
