package verify

import (
	"context"
	"errors"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/dit"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/ref"
	"margo/engine/tokenizer"
)

// Options say what to replay on what.
type Options struct {
	Model, Trace string
	Device       engine.Device
	DType        engine.DType
	MAR          checkpoint.MAROptions  // for weights without a config
	Open         checkpoint.OpenOptions // which weights of Model
	Stage        func(Stage)            // called as stages finish; may be nil
}

// room is the free memory of the host, as a device that computes in it tells; 0 if
// none does.
func (o Options) room() int64 {
	if o.Device == nil {
		return 0
	}
	if i := o.Device.Info(); !i.OwnMemory {
		return i.MemFree
	}
	return 0
}

// Result is a whole replay.
type Result struct {
	Kind   Kind    `json:"kind"`
	Stages []Stage `json:"stages"`
	Pass   bool    `json:"pass"`
}

// models holds what a side has bound: a MAR, a DiT or a tokenizer.
type models struct {
	mar *mar.Model
	dit *dit.Model
	tok tokenizer.Autoencoder
	kl  *tokenizer.KL // the tokenizer's networks
	vq  *tokenizer.VQ // nil for a KL tokenizer
}

type verifier struct {
	ctx                    context.Context
	o                      Options
	t                      *trace
	model                  *checkpoint.Model
	dtype                  engine.DType
	result                 Result
	device, exact, rounded *side
	single                 *side // rounded in F32; the same as rounded if dtype is F32
}

func (v *verifier) add(s Stage) {
	v.result.Stages = append(v.result.Stages, s)
	if s.Gated && !s.Pass {
		v.result.Pass = false
	}
	if v.o.Stage != nil {
		v.o.Stage(s)
	}
}

// openModel opens the model's file, which the caller closes, and says what it holds.
func (o Options) openModel() (*checkpoint.File, *checkpoint.Model, error) {
	f, err := checkpoint.Open(o.Model, o.Open)
	if err != nil {
		return nil, nil, err
	}
	desc, err := checkpoint.Describe(f, o.MAR)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, desc, nil
}

// Run replays the trace. The error is about files and devices; a stage that
// misses its limit is in the result.
func Run(ctx context.Context, o Options) (*Result, error) {
	t, err := openTrace(o.Trace, o.room())
	if err != nil {
		return nil, err
	}
	defer t.Close()
	f, desc, err := o.openModel()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if want := kindOf(t.kind); desc.Kind != want && !(want == checkpoint.KindKL && desc.IsTokenizer()) {
		return nil, engine.Errorf("verify", engine.Invalid, "the trace %s is of a %s, but %s holds a model of kind %q", o.Trace, t.kind, o.Model, desc.Kind)
	}
	v := &verifier{ctx: ctx, o: o, t: t, model: desc, dtype: o.DType, result: Result{Kind: t.kind, Pass: true}}
	defer v.close()
	sides := []struct {
		at      **side
		dev     engine.Device
		compute engine.DType
	}{
		{&v.exact, ref.New(ref.Exact), engine.F32}, // first: it has the least memory, and says so
		{&v.rounded, ref.New(ref.Rounded), o.DType},
		{&v.device, o.Device, o.DType},
		{&v.single, ref.New(ref.Rounded), engine.F32},
	}
	if o.DType == engine.F32 {
		sides = sides[:3]
	}
	for _, s := range sides {
		if *s.at, err = v.bind(f, s.dev, s.compute); err != nil {
			return nil, err
		}
	}
	if v.single == nil {
		v.single = v.rounded
	}
	run := map[Kind]func() error{EncDec: v.encdec, HeadNet: v.head, Sampling: v.sampling, Tokenizer: v.tokenizer,
		DiTForward: v.ditForward, DiTSampling: v.ditSampling}[t.kind]
	if err := run(); err != nil {
		return nil, err
	}
	if len(v.result.Stages) == 0 {
		return nil, engine.Errorf("verify", engine.Internal, "no stage was compared")
	}
	return &v.result, nil
}

// bind loads the model onto a device.
func (v *verifier) bind(f *checkpoint.File, dev engine.Device, compute engine.DType) (*side, error) {
	c, err := engine.NewCtx(dev, compute)
	if err != nil {
		return nil, err
	}
	s := &side{dev: dev, compute: compute, c: c}
	var params []engine.NamedParam
	if v.model.Kind == checkpoint.KindMAR {
		if s.m.mar, err = mar.New(v.model.MAR); err == nil {
			params = engine.Params(s.m.mar)
		}
	} else if v.model.Kind == checkpoint.KindDiT {
		if s.m.dit, err = dit.New(v.model.DiT); err == nil {
			params = engine.Params(s.m.dit)
		}
	} else if s.m.tok, err = tokenizer.New(v.model.KL, 1, true); err == nil {
		params = engine.Params(s.m.tok)
		switch t := s.m.tok.(type) {
		case *tokenizer.KL:
			s.m.kl = t
		case *tokenizer.VQ:
			s.m.kl, s.m.vq = &t.KL, t
		}
	}
	if err == nil {
		err = load.Bind(params, f, dev, compute, load.Options{Ignore: v.model.Ignorable})
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return s, nil
}

func (s *side) params() []engine.NamedParam {
	if s.m.mar != nil {
		return engine.Params(s.m.mar)
	}
	if s.m.dit != nil {
		return engine.Params(s.m.dit)
	}
	return engine.Params(s.m.tok)
}

func (v *verifier) close() {
	if v.single == v.rounded {
		v.single = nil
	}
	for _, s := range []*side{v.device, v.exact, v.rounded, v.single} {
		if s != nil {
			load.Free(s.params())
			s.c.Close()
		}
	}
}

// all compares the stages in order, unless the caller gives up.
func (v *verifier) all(checks []check) error {
	for _, c := range checks {
		if err := v.ctx.Err(); err != nil {
			return engine.Errorf("verify", engine.Cancelled, "%w", err)
		}
		if err := v.compare(c); err != nil {
			return err
		}
	}
	return nil
}
