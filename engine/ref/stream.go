package ref

import (
	"encoding/binary"
	"math"

	"margo/engine"
)

// stream runs everything at once, so that events and Sync have nothing to wait
// for. While it captures, calls are checked and recorded, not run.
type stream[F number] struct {
	dev    *Device
	rec    *graph // being captured
	closed bool
}

type graph struct {
	dev    *Device
	run    []func() error
	closed bool
}

func (g *graph) Close() error { g.closed, g.run = true, nil; return nil }

type event struct {
	dev    *Device
	closed bool
}

func (e *event) Close() error { e.closed = true; return nil }

// do runs or records f, the work of an op whose arguments gave err.
func (s *stream[F]) do(op engine.Op, err error, f func()) error {
	if err == nil && s.closed {
		err = s.dev.errorf(op, engine.Invalid, "stream is closed")
	}
	if err != nil {
		return s.dev.named(err)
	}
	run := func() (err error) {
		defer s.dev.catch(op, &err)
		f()
		return nil
	}
	if s.rec != nil {
		s.rec.run = append(s.rec.run, run)
		return nil
	}
	return run()
}

func (s *stream[F]) Device() engine.Device { return s.dev }

// CopyIn stores what the bytes say.
func (s *stream[F]) CopyIn(dst *engine.Tensor, src []byte) error {
	err := engine.CheckHostCopy("copy in", dst, src)
	var v []float64
	if err == nil {
		v = make([]float64, dst.Elems())
		for i := range v {
			switch dst.DType {
			case engine.F32:
				v[i] = float64(math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:])))
			case engine.BF16:
				v[i] = float64(engine.FromBF16(binary.LittleEndian.Uint16(src[2*i:])))
			case engine.I32:
				v[i] = float64(int32(binary.LittleEndian.Uint32(src[4*i:])))
			}
		}
	}
	return s.do("copy in", err, func() { store(s.dev, dst, 0, v) })
}

// CopyOut rounds to the tensor's dtype, in either mode.
func (s *stream[F]) CopyOut(dst []byte, src *engine.Tensor) error {
	err := engine.CheckHostCopy("copy out", src, dst)
	if err == nil && s.rec != nil {
		err = engine.Errorf("copy out", engine.Invalid, "stream is capturing")
	}
	return s.do("copy out", err, func() {
		if src.DType == engine.I32 {
			for i, v := range load[float64](s.dev, src) {
				binary.LittleEndian.PutUint32(dst[4*i:], uint32(int32(v)))
			}
			return
		}
		for i, v := range load[float64](s.dev, src) {
			if src.DType == engine.BF16 {
				binary.LittleEndian.PutUint16(dst[2*i:], engine.ToBF16(float32(v)))
			} else {
				binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(float32(v)))
			}
		}
	})
}

func (s *stream[F]) Copy(dst, src *engine.Tensor) error {
	return s.do("copy", engine.CheckCopy(dst, src), func() {
		store(s.dev, dst, 0, load[float64](s.dev, src))
	})
}

// Fill sets every element; an I32 takes v's integer part.
func (s *stream[F]) Fill(dst *engine.Tensor, v float32) error {
	return s.do("fill", engine.CheckFill(dst), func() {
		x := float64(v)
		if dst.DType == engine.I32 {
			x = math.Trunc(x)
		}
		line := make([]float64, dst.Cols())
		for i := range line {
			line[i] = x
		}
		for r := 0; r < dst.Rows(); r++ {
			store(s.dev, dst, r, line)
		}
	})
}

func (s *stream[F]) Record() (engine.Event, error) {
	return &event{dev: s.dev}, s.do("record", nil, func() {})
}

func (s *stream[F]) Wait(e engine.Event) error {
	var err error
	if ev, ok := e.(*event); !ok || ev.dev != s.dev || ev.closed {
		err = engine.Errorf("wait", engine.Invalid, "event is closed or of another device")
	}
	return s.do("wait", err, func() {})
}

// Capture records what f enqueues, without running it.
func (s *stream[F]) Capture(f func() error) (engine.Graph, error) {
	if s.closed || s.rec != nil {
		return nil, s.dev.errorf("capture", engine.Invalid, "stream is closed or capturing already")
	}
	g := &graph{dev: s.dev}
	s.rec = g
	err := f()
	s.rec = nil
	if err != nil {
		return nil, err
	}
	return g, nil
}

// Launch runs a graph of this device.
func (s *stream[F]) Launch(x engine.Graph) error {
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

func (s *stream[F]) Sync() error {
	var err error
	if s.rec != nil {
		err = engine.Errorf("sync", engine.Invalid, "stream is capturing")
	}
	return s.do("sync", err, func() {})
}

func (s *stream[F]) Close() error {
	s.closed = true
	return nil
}
