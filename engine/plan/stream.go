package plan

import "margo/engine"

// stream counts each op after checking its arguments.
type stream struct {
	d         *Device
	rec       *graph // being captured; nil: not capturing
	own, work int64  // bytes asked from the beginning, and for the workspace of ops
}

// workspace makes the workspace one of take bytes where it has less than need. The old one is given back before.
func (s *stream) workspace(need, take int64) error {
	if need <= s.work {
		return nil
	}
	if s.work > 0 {
		s.d.give(s.d.Block(s.work))
		s.work = 0
	}
	if err := s.d.take(s.d.Block(take), false); err != nil {
		return err
	}
	s.work = take
	return nil
}

// Held is what the stream takes for itself.
func (s *stream) Held() (n int64) {
	for _, bytes := range []int64{s.own, s.work} {
		if bytes > 0 {
			n += s.d.Block(bytes)
		}
	}
	return n
}

// graph is the work counted during a capture.
type graph struct{ ops []captured }

type captured struct {
	op   engine.Op
	cost engine.Cost
}

func (*graph) Close() error { return nil }

type event struct{}

func (event) Close() error { return nil }

// run counts a checked op.
func (s *stream) run(op engine.Op, err error, cost func() engine.Cost) error {
	if err != nil {
		return err
	}
	c := cost()
	if s.rec != nil {
		s.rec.ops = append(s.rec.ops, captured{op, c})
		return nil
	}
	s.d.count(op, c)
	return nil
}

func traffic(t *engine.Tensor, times int) func() engine.Cost {
	return func() engine.Cost { return engine.Cost{Bytes: int64(times * t.Bytes())} }
}

func (s *stream) Device() engine.Device { return s.d }

func (s *stream) CopyIn(dst *engine.Tensor, src []byte) error {
	return s.run(OpCopyIn, engine.CheckHostCopy(OpCopyIn, dst, src), traffic(dst, 1))
}

// CopyOut gives zeros.
func (s *stream) CopyOut(dst []byte, src *engine.Tensor) error {
	err := engine.CheckHostCopy(OpCopyOut, src, dst)
	if err == nil {
		clear(dst)
	}
	return s.run(OpCopyOut, err, traffic(src, 1))
}

func (s *stream) Copy(dst, src *engine.Tensor) error {
	return s.run(OpCopy, engine.CheckCopy(dst, src), traffic(dst, 2))
}

func (s *stream) Fill(dst *engine.Tensor, _ float32) error {
	return s.run(OpFill, engine.CheckFill(dst), traffic(dst, 1))
}

func (s *stream) Record() (engine.Event, error) { return event{}, nil }
func (s *stream) Wait(engine.Event) error       { return nil }
func (s *stream) Sync() error                   { return nil }

// Close gives the stream's workspace back.
func (s *stream) Close() error {
	s.d.give(s.Held())
	s.own, s.work = 0, 0
	return nil
}

// Capture collects the work of f, which is counted at each Launch.
func (s *stream) Capture(f func() error) (engine.Graph, error) {
	if s.rec != nil {
		return nil, engine.Errorf("capture", engine.Invalid, "a capture is already under way")
	}
	s.rec = &graph{}
	err := f()
	g := s.rec
	s.rec = nil
	return g, err
}

func (s *stream) Launch(g engine.Graph) error {
	w, ok := g.(*graph)
	if !ok {
		return engine.Errorf("launch", engine.Invalid, "not a graph of this device")
	}
	for _, o := range w.ops {
		if err := s.run(o.op, nil, func() engine.Cost { return o.cost }); err != nil {
			return err
		}
	}
	return nil
}

func (s *stream) Gemm(a engine.GemmArgs) error { return s.run(engine.OpGemm, a.Check(), a.Cost) }
func (s *stream) Attention(a engine.AttentionArgs) error {
	return s.run(engine.OpAttention, a.Check(), a.Cost)
}
func (s *stream) Norm(a engine.NormArgs) error { return s.run(engine.OpNorm, a.Check(), a.Cost) }
func (s *stream) GatedAdd(a engine.GatedAddArgs) error {
	return s.run(engine.OpGatedAdd, a.Check(), a.Cost)
}
func (s *stream) Rows(a engine.RowsArgs) error { return s.run(engine.OpRows, a.Check(), a.Cost) }
func (s *stream) Cast(a engine.CastArgs) error { return s.run(engine.OpCast, a.Check(), a.Cost) }
func (s *stream) TimestepEmbedding(a engine.TimestepEmbeddingArgs) error {
	return s.run(engine.OpTimestepEmbedding, a.Check(), a.Cost)
}
func (s *stream) Normal(a engine.NormalArgs) error {
	return s.run(engine.OpNormal, a.Check(), a.Cost)
}
func (s *stream) DiffusionStep(a engine.DiffusionStepArgs) error {
	return s.run(engine.OpDiffusionStep, a.Check(), a.Cost)
}
func (s *stream) HeadSteps(a engine.HeadStepsArgs) error {
	err := a.Check()
	if err == nil {
		err = s.workspace(s.d.HeadBytes(a))
	}
	return s.run(engine.OpHeadSteps, err, a.Cost)
}
func (s *stream) Conv2D(a engine.Conv2DArgs) error {
	return s.run(engine.OpConv2D, a.Check(), a.Cost)
}
func (s *stream) GroupNorm(a engine.GroupNormArgs) error {
	err := a.Check()
	if err == nil {
		n := s.d.GroupNormBytes(a)
		err = s.workspace(n, n)
	}
	return s.run(engine.OpGroupNorm, err, a.Cost)
}
func (s *stream) Categorical(a engine.CategoricalArgs) error {
	return s.run(engine.OpCategorical, a.Check(), a.Cost)
}

func (s *stream) Patchify(a engine.PatchifyArgs) error {
	return s.run(engine.OpPatchify, a.Check(), a.Cost)
}
