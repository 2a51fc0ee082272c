package main

import (
	"margo/bench"
	"margo/engine"
	"margo/engine/load"
	"margo/engine/plan"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// benchNeed is what margo's side of a case takes.
type benchNeed struct {
	c                 bench.Case
	weights, activity int64 // bytes
}

// checkMemory refuses cases that the device cannot hold, before anything is loaded or measured. With --interleave
// the largest case of every model must fit beside those of the others.
func (j *benchJob) checkMemory(subjects []*subject, free int64) error {
	if free <= 0 { // the device does not tell
		return nil
	}
	var together int64
	var last benchNeed
	for _, s := range subjects {
		for _, d := range j.dtypes {
			cases, err := j.cases(s, d)
			if err != nil {
				return err
			}
			needs, err := j.memory(s, d, cases)
			if err != nil {
				return err
			}
			var most int64
			for _, n := range needs {
				if n.weights+n.activity > free {
					return failf("not enough memory for the case %s: %s of weights and %s of activations, %s has %s free; nothing was measured",
						n.c.Label(), plan.Size(n.weights), plan.Size(n.activity), j.dev.Name(), plan.Size(free))
				}
				most, last = max(most, n.weights+n.activity), n
			}
			if together += most; j.c.Bool("interleave") && together > free {
				return failf("not enough memory for the case %s: with --interleave all models up to it are held at once and take %s, %s has %s free; leave --interleave out, or compare fewer models",
					last.c.Label(), plan.Size(together), j.dev.Name(), plan.Size(free))
			}
		}
	}
	return nil
}

// memory lays a model and its cases out on a device that only counts.
func (j *benchJob) memory(s *subject, d engine.DType, cases []bench.Case) (needs []benchNeed, err error) {
	dev := plan.For(j.dev)
	own := &bench.Margo{Device: dev, DType: d, Work: s.work}
	var tok tokenizer.Tokenizer
	if s.kl != nil && (s.kind == bench.KindTokenizer || s.work.Decode) {
		k, err := tokenizer.New(s.kl, 1, false)
		if err != nil {
			return nil, err
		}
		if err := load.Allocate(engine.Params(k), dev, d); err != nil {
			return nil, err
		}
		tok = k
	}
	if s.kind == bench.KindTokenizer {
		weights := dev.Report().Live
		x, err := engine.NewCtx(dev, d)
		if err != nil {
			return nil, err
		}
		defer x.Close()
		x.Scoped(func() { tok.Decode(x, x.New(engine.F32, 1, s.work.Latent[0], s.work.Latent[1], s.work.Latent[2])) })
		for _, c := range cases { // images are decoded one by one
			needs = append(needs, benchNeed{c, weights, dev.Report().Peak - weights})
		}
		return needs, x.Err()
	}
	g, err := newGenerator(s.info, j.fp8)
	if err != nil {
		return nil, err
	}
	if err := load.Allocate(g.params, dev, d); err != nil {
		return nil, err
	}
	o := sample.Options{Compute: d}
	if tok == nil { // not a nil in an interface
		own.Engine, err = g.open(nil, dev, o)
	} else {
		own.Engine, err = g.open(tok, dev, o)
	}
	if err != nil {
		return nil, err
	}
	defer own.Engine.Close()
	weights := dev.Report().Live // and what the engine's stream takes
	for _, c := range cases {
		bytes, err := own.Activations(c)
		if err != nil {
			return nil, err
		}
		needs = append(needs, benchNeed{c, weights, bytes})
	}
	return needs, nil
}
