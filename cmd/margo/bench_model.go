package main

import (
	"path/filepath"
	"strings"

	"margo/bench"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// subject is a model as all sides load it.
type subject struct {
	name   string
	kind   string
	random bool
	info   *checkpoint.Model
	kl     *checkpoint.KLConfig
	path   string // of the weights; "" for random ones
	open   checkpoint.OpenOptions
	tok    *tokenizerFile // closed: what it is and where
	work   bench.Work
	peer   map[string]any // the peers' load command
}

// subject finds out what a name of --model means and whether all sides can take
// it.
func (j *benchJob) subject(name string) (*subject, error) {
	if name == "kl-16" {
		kl := checkpoint.KL16()
		return &subject{name: name, kind: checkpoint.KindKL, random: true, kl: kl, work: bench.Work{Latent: [3]int{16, 16, kl.EmbedDim}},
			peer: map[string]any{"tokenizer": map[string]any{"config": kl}}}, nil
	}
	if name == "" {
		return nil, usagef("--model has an empty item; name files, or %s, kl-16", strings.Join(append(checkpoint.MARNames(), checkpoint.VariantNames()...), ", "))
	}
	shape, open, err := shapeOptions(j.c)
	if err != nil {
		return nil, err
	}
	s := &subject{name: name, kind: checkpoint.KindMAR, open: open, peer: map[string]any{}}
	if checkpoint.Named(name) {
		for _, f := range shapeFlags() {
			if flag := f.Names()[0]; j.c.IsSet(flag) {
				return nil, usagef("%s is about a file, and %s is a name: leave it out", dashed(flag), name)
			}
		}
		cfg, err := checkpoint.NamedMAR(name)
		if err != nil {
			return nil, err
		}
		s.random = true
		s.info = &checkpoint.Model{Kind: checkpoint.KindMAR, MAR: cfg, Sampling: checkpoint.Sampling{Iters: 64, HeadSteps: 100, MaxTimestep: 999, CFG: 3, CFGSchedule: sample.Linear, Temperature: 1}}
		s.kl = checkpoint.KL16()
		if cfg.IsCausal() {
			s.info.Sampling.Iters = cfg.Tokens()
		}
		if cfg.HeadKind() == checkpoint.GMMHead {
			s.info.Sampling.CFG = 1
		}
		if cfg.Discrete() {
			s.kl = nil
		}
	} else {
		f, info, err := openModel(name, shape, open)
		if err != nil {
			if !exists(name) && filepath.Base(name) == name && filepath.Ext(name) == "" {
				return nil, usagef("--model: %q is neither a file nor one of %s, kl-16", name, strings.Join(append(checkpoint.MARNames(), checkpoint.VariantNames()...), ", "))
			}
			return nil, err
		}
		defer f.Close()
		if info.Kind != checkpoint.KindMAR {
			return nil, usagef("--model: %s holds a model of kind %s, and bench measures MARs and kl-16", name, info.Kind)
		}
		if err := j.peersRead(f); err != nil {
			return nil, err
		}
		s.info, s.path, s.name = info, name, strings.TrimSuffix(filepath.Base(name), filepath.Ext(name))
	}
	if j.c.Bool("decode") && (!s.random || j.c.IsSet("tokenizer")) {
		if s.tok, err = openTokenizer(j.c.String("tokenizer"), name, s.info, j.log); err != nil {
			return nil, err
		}
		defer s.tok.close()
		if s.tok.info != nil {
			if err := j.peersRead(s.tok.file); err != nil {
				return nil, err
			}
			if s.kl = s.tok.info.KL; len(j.modes) > 0 && (s.kl.NEmbed > 0 || s.kl.NoQuantConv) {
				return nil, usagef("%s: --against has KL tokenizers with quant_conv only; leave out --decode", s.tok.path)
			}
		}
	}
	p := &s.info.Sampling
	for _, f := range []struct {
		name string
		at   *int
	}{{"iters", &p.Iters}, {"head-steps", &p.HeadSteps}, {"max-timestep", &p.MaxTimestep}} {
		if j.c.IsSet(f.name) {
			*f.at = j.c.Int(f.name)
		}
	}
	if j.c.IsSet("cfg") {
		p.CFG = j.c.Float64("cfg")
	}
	if j.c.IsSet("cfg-schedule") {
		p.CFGSchedule = j.c.String("cfg-schedule")
	}
	if p.HeadSteps > p.MaxTimestep+1 {
		return nil, usagef("%d head steps don't fit into timesteps 0 to %d: lower --head-steps or raise --max-timestep", p.HeadSteps, p.MaxTimestep)
	}
	if m := s.info.MAR; m.IsCausal() && p.Iters != m.Tokens() {
		return nil, usagef("%s predicts one token at a time: leave out --iters, or give %d", name, m.Tokens())
	} else if m.IsCausal() && j.c.IsSet("subset") {
		return nil, usagef("%s: each token sees the cache of all before it, so --subset cannot leave any out", name)
	} else if len(j.modes) > 0 && (m.IsCausal() || m.HeadKind() != checkpoint.DiffusionHead) {
		return nil, usagef("%s: --against has MAR with the diffusion head only", name)
	}
	if n := s.info.MAR.Tokens(); len(j.modes) > 0 && p.Iters > n {
		return nil, usagef("%s has %d tokens, PyTorch cannot sample them in %d iterations: lower --iters", name, n, p.Iters)
	}
	s.work = bench.Work{MaxTimestep: p.MaxTimestep, CFGSchedule: p.CFGSchedule, Temperature: p.Temperature, Classes: s.info.MAR.ClassNum, Decode: j.c.Bool("decode") && s.kl != nil}
	s.peer["config"] = s.info.MAR
	if s.path != "" {
		s.peer["weights"] = s.path
	}
	if s.work.Decode {
		t := map[string]any{"config": s.kl}
		if s.tok != nil && s.tok.path != "" {
			t["weights"], t["latent_scale"] = s.tok.path, s.tok.scale
		}
		s.peer["tokenizer"] = t
	}
	return s, nil
}

// peersRead refuses, before any work, a file that --against cannot load.
func (j *benchJob) peersRead(f *checkpoint.File) error {
	if len(j.modes) == 0 || f.Format() == "safetensors" && f.Layout() == "" {
		return nil
	}
	out := strings.TrimSuffix(f.Path(), filepath.Ext(f.Path())) + ".safetensors"
	if f.Layout() != "" {
		return usagef("%s has the names of %s, and --against reads LDM's; convert it first: margo convert %s OUT.safetensors", f.Path(), f.Layout(), f.Path())
	}
	return usagef("%s is a PyTorch file, and --against reads safetensors only; convert it first: margo convert %s %s", f.Path(), f.Path(), out)
}

// margo loads our side.
func (j *benchJob) margo(s *subject, d engine.DType) (*bench.Margo, error) {
	own := &bench.Margo{Device: j.dev, DType: d, Work: s.work}
	var params []engine.NamedParam
	own.Free = func() { load.Free(params) }
	fill := func(p []engine.NamedParam, path string, open checkpoint.OpenOptions, ignore func(string) bool) error {
		params = append(params, p...)
		if path == "" {
			return load.Random(p, j.dev, d, 0)
		}
		f, err := checkpoint.Open(path, open)
		if err != nil {
			return err
		}
		defer f.Close()
		return load.Bind(p, f, j.dev, d, load.Options{Ignore: ignore})
	}
	var tok tokenizer.Tokenizer
	scale := 1.0
	if s.kl != nil && (s.kind == checkpoint.KindKL || s.work.Decode) {
		k, err := tokenizer.New(s.kl, 1, false)
		if err != nil {
			return nil, err
		}
		path := ""
		if s.tok != nil {
			path, scale = s.tok.path, s.tok.scale
		}
		if err := fill(engine.Params(k), path, checkpoint.OpenOptions{}, k.Unused); err != nil {
			return nil, err
		}
		tok = k
	}
	if own.Tok = tok; s.kind == checkpoint.KindKL {
		return own, nil
	}
	m, err := mar.New(s.info.MAR)
	if err != nil {
		return nil, err
	}
	if err := fill(engine.Params(m), s.path, s.open, s.info.Ignorable); err != nil {
		return nil, err
	}
	o := sample.Options{Compute: d, LatentScale: scale, Profile: true}
	own.Open = func() (*sample.Engine, error) {
		if tok == nil { // not a nil in an interface
			return sample.Open(m, nil, j.dev, o)
		}
		return sample.Open(m, tok, j.dev, o)
	}
	return own, own.Reopen()
}
