package cuda

// #include "calls.h"
import "C"

import (
	"runtime"
	"unsafe"

	"margo/engine"
)

// Stream is an ordered queue of kernels of a Device.
type Stream struct {
	engine.Unimplemented // of ops added to the contract after this device was written
	dev                  *Device
	s                    *C.margo_stream // nil once closed
	work                 *buffer         // workspace of ops, kept and grown
	cublasLt             *buffer         // workspace of cuBLASLt
	capturing            bool
}

var _ engine.Stream = (*Stream)(nil)

// NewStream makes a stream.
func (d *Device) NewStream() (engine.Stream, error) {
	if err := d.open("new stream"); err != nil {
		return nil, err
	}
	s := &Stream{Unimplemented: engine.Unimplemented{DeviceName: d.name}, dev: d}
	if err := d.status("new stream", C.m_stream_create(d.p.api, d.ctx, &s.s)); err != nil {
		return nil, err
	}
	if d.lt != nil { // a stream's own, since products of streams run at the same time
		var err error
		if s.cublasLt, err = d.alloc("new stream", d.lt.workspace, "workspace of cuBLASLt"); err == nil {
			err = d.status("new stream", C.m_cublaslt_workspace(d.p.api, s.s, s.cublasLt.addr, C.uint64_t(s.cublasLt.bytes)))
		}
		if err != nil {
			s.Close()
			return nil, err
		}
	}
	return s, nil
}

// Device is the device of the stream.
func (s *Stream) Device() engine.Device { return s.dev }

// ready reports why nothing can be enqueued, or what check found.
func (s *Stream) ready(op engine.Op, check error) error {
	if s.s == nil {
		return s.dev.errorf(op, engine.Invalid, "stream is closed")
	}
	if err := s.dev.open(op); err != nil {
		return err
	}
	return s.dev.named(check)
}

// address is where a tensor begins; 0 for none. The first error sticks in err.
func (s *Stream) address(t *engine.Tensor, err *error) C.uint64_t {
	if t == nil || *err != nil || t.Elems() == 0 {
		return 0
	}
	b, ok := t.Buf.(*buffer)
	if !ok || b.dev != s.dev || b.addr == 0 {
		*err = s.dev.errorf("", engine.Invalid, "tensor %v is of another device, or its memory was freed", t)
		return 0
	}
	return b.addr + C.uint64_t(t.Off)
}

// mat describes a tensor to the plugin; the zero value for nil.
func (s *Stream) mat(t *engine.Tensor, err *error) C.margo_mat {
	if t == nil {
		return C.margo_mat{}
	}
	return C.margo_mat{p: s.address(t, err), rows: C.int64_t(t.Rows()), cols: C.int64_t(t.Cols()),
		ld: C.int64_t(t.RowStride), dtype: C.int32_t(t.DType)}
}

// named gives an error of address the op's name.
func (s *Stream) named(op engine.Op, err error) error {
	if e, ok := err.(*engine.Error); ok && e.Op == "" {
		e.Op = string(op)
	}
	return err
}

// run enqueues an op whose arguments have been made with err.
func (s *Stream) run(op engine.Op, args unsafe.Pointer, err error) error {
	if err != nil {
		return s.named(op, err)
	}
	e := entries[op]
	if C.m_has(s.dev.p.api, e) == 0 {
		return s.dev.errorf(op, engine.Unsupported, "the plugin %s has no such op", s.dev.p.path)
	}
	return s.dev.status(op, C.m_run(s.dev.p.api, e, s.s, args))
}

// workspace is memory of at least need bytes that ops of this stream share. Where there is less it becomes take bytes. Growing
// waits for the device, and can't be done while the stream captures.
func (s *Stream) workspace(op engine.Op, need, take C.uint64_t) (C.uint64_t, error) {
	if s.work != nil && C.uint64_t(s.work.bytes) >= need {
		return s.work.addr, nil
	}
	if need == 0 {
		return 0, nil
	}
	if s.capturing {
		return 0, s.dev.errorf(op, engine.Invalid, "%d bytes of workspace cannot be taken while the stream captures; run it once before", take)
	}
	if s.work != nil {
		if err := s.work.Free(); err != nil {
			return 0, err
		}
		s.work = nil
	}
	b, err := s.dev.alloc(op, int(take), "workspace of "+string(op))
	if err != nil {
		return 0, err
	}
	s.work = b
	return b.addr, nil
}

// CopyIn copies src to dst.
func (s *Stream) CopyIn(dst *engine.Tensor, src []byte) error {
	const op = "copy in"
	err := s.ready(op, engine.CheckHostCopy(op, dst, src))
	if err != nil || len(src) == 0 {
		return err
	}
	p := s.address(dst, &err)
	if err != nil {
		return s.named(op, err)
	}
	return s.dev.status(op, C.m_copy_in(s.dev.p.api, s.s, p, unsafe.Pointer(&src[0]), C.uint64_t(len(src))))
}

// CopyOut waits and copies src to dst.
func (s *Stream) CopyOut(dst []byte, src *engine.Tensor) error {
	const op = "copy out"
	err := s.ready(op, engine.CheckHostCopy(op, src, dst))
	if err != nil || len(dst) == 0 {
		return err
	}
	p := s.address(src, &err)
	if err != nil {
		return s.named(op, err)
	}
	return s.waited(op, C.m_copy_out(s.dev.p.api, s.s, unsafe.Pointer(&dst[0]), p, C.uint64_t(len(dst))))
}

// waited is the error of a call that has waited for the stream, or of a collective that its work comes after.
func (s *Stream) waited(op engine.Op, status C.margo_status) error {
	if err := s.dev.status(op, status); err != nil {
		return err
	}
	return s.dev.ranks.waited(op, s)
}

// Copy copies src to dst.
func (s *Stream) Copy(dst, src *engine.Tensor) error {
	err := s.ready("copy", engine.CheckCopy(dst, src))
	if err != nil {
		return err
	}
	d, x := s.mat(dst, &err), s.mat(src, &err)
	if err != nil {
		return s.named("copy", err)
	}
	return s.dev.status("copy", C.m_copy(s.dev.p.api, s.s, &d, &x))
}

// Fill sets every element; an I32 takes v's integer part.
func (s *Stream) Fill(dst *engine.Tensor, v float32) error {
	err := s.ready("fill", engine.CheckFill(dst))
	if err != nil {
		return err
	}
	d := s.mat(dst, &err)
	if err != nil {
		return s.named("fill", err)
	}
	return s.dev.status("fill", C.m_fill(s.dev.p.api, s.s, &d, C.float(v)))
}

// event is engine.Event.
type event struct {
	dev   *Device
	e     *C.margo_event
	after behind
}

// Close gives the event back; work that waits for it is not disturbed.
func (e *event) Close() error {
	if e.e == nil {
		return nil
	}
	err := e.dev.open("close event")
	if err == nil {
		err = e.dev.status("close event", C.m_event_destroy(e.dev.p.api, e.e))
	}
	e.e = nil
	return err
}

// Record marks the current end of the queue.
func (s *Stream) Record() (engine.Event, error) {
	if err := s.ready("record", nil); err != nil {
		return nil, err
	}
	e := &event{dev: s.dev, after: s.dev.ranks.before(s)}
	if err := s.dev.status("record", C.m_event_record(s.dev.p.api, s.s, &e.e)); err != nil {
		return nil, err
	}
	return e, nil
}

// Wait makes later work of this stream wait for an event of the same device.
func (s *Stream) Wait(x engine.Event) error {
	e, ok := x.(*event)
	if !ok || e.dev != s.dev || e.e == nil {
		return s.dev.errorf("wait", engine.Invalid, "event is closed or of another device")
	}
	if err := s.ready("wait", nil); err != nil {
		return err
	}
	s.dev.ranks.comesAfter(s, e.after)
	return s.dev.status("wait", C.m_event_wait(s.dev.p.api, s.s, e.e))
}

// Seconds is the device's time since an earlier event of the same device; it waits for
// both.
func (e *event) Seconds(since engine.Event) (float64, error) {
	from, ok := since.(*event)
	if !ok || from.e == nil || e.e == nil || from.dev != e.dev {
		return 0, e.dev.errorf("elapsed", engine.Invalid, "events are closed or of different devices")
	}
	var ms C.float
	err := e.dev.status("elapsed", C.m_event_elapsed(e.dev.p.api, from.e, e.e, &ms))
	if err == nil {
		err = e.after.outcome("elapsed")
	}
	return float64(ms) / 1e3, err
}

// graph is engine.Graph.
type graph struct {
	dev *Device
	g   *C.margo_graph
}

// Close gives the graph back. Its work must have finished.
func (g *graph) Close() error {
	if g.g == nil {
		return nil
	}
	err := g.dev.open("close graph")
	if err == nil {
		err = g.dev.status("close graph", C.m_graph_destroy(g.dev.p.api, g.g))
	}
	g.g = nil
	return err
}

// Capture records what f enqueues, without running it. CopyIn, CopyOut and Sync are
// refused meanwhile.
func (s *Stream) Capture(f func() error) (engine.Graph, error) {
	if err := s.ready("capture", nil); err != nil {
		return nil, err
	}
	// Its end has to come from the thread that began it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := s.dev.status("capture", C.m_capture_begin(s.dev.p.api, s.s)); err != nil {
		return nil, err
	}
	s.capturing = true
	err := f()
	s.capturing = false
	if err != nil {
		C.m_capture_end(s.dev.p.api, s.s, nil)
		return nil, err
	}
	g := &graph{dev: s.dev}
	if err := s.dev.status("capture", C.m_capture_end(s.dev.p.api, s.s, &g.g)); err != nil {
		return nil, err
	}
	return g, nil
}

// Launch enqueues a graph of this device.
func (s *Stream) Launch(x engine.Graph) error {
	g, ok := x.(*graph)
	if !ok || g.dev != s.dev || g.g == nil {
		return s.dev.errorf("launch", engine.Invalid, "graph is closed or of another device")
	}
	if err := s.ready("launch", nil); err != nil {
		return err
	}
	return s.dev.status("launch", C.m_graph_launch(s.dev.p.api, s.s, g.g))
}

// Sync waits for everything enqueued.
func (s *Stream) Sync() error {
	if err := s.ready("sync", nil); err != nil {
		return err
	}
	return s.waited("sync", C.m_stream_sync(s.dev.p.api, s.s))
}

// Close waits and gives the stream and its workspace back.
func (s *Stream) Close() error {
	if s.s == nil {
		return nil
	}
	if err := s.dev.open("close stream"); err != nil { // its end is that of all its streams
		s.s, s.work, s.cublasLt = nil, nil, nil
		return err
	}
	err := s.waited("close stream", C.m_stream_destroy(s.dev.p.api, s.s))
	s.s = nil
	for _, b := range []**buffer{&s.work, &s.cublasLt} {
		if *b != nil {
			if e := (*b).Free(); err == nil {
				err = e
			}
			*b = nil
		}
	}
	return err
}
