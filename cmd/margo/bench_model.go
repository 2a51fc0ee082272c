package main

import (
	"path/filepath"
	"slices"
	"strings"

	"margo/bench"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// subject is a model as all sides load it.
type subject struct {
	name   string
	kind   string // bench.KindMAR and so on
	random bool
	info   *checkpoint.Model // nil of a tokenizer alone
	kl     *checkpoint.KLConfig
	path   string // of the weights; "" for random ones
	open   checkpoint.OpenOptions
	tok    *tokenizerFile // closed: what it is and where
	work   bench.Work
	peer   map[string]any // the peers' load command
}

// namesText lists what --model takes beside files.
func namesText() string {
	return strings.Join(append(checkpoint.MARNames(), checkpoint.VariantNames()...), ", ") + " (each also with -ce, -l2 or -gmm), " +
		strings.Join(checkpoint.DiTNames(), ", ") + ", kl-16, kl-8"
}

// namedSubject is a configuration with random weights and the settings of the paper;
// nil if there is none of that name.
func namedSubject(name string) (*subject, error) {
	s := &subject{name: name, random: true, peer: map[string]any{}}
	switch {
	case namedKL[name] != nil:
		s.kind, s.kl = bench.KindTokenizer, namedKL[name]()
		side := s.kl.Resolution / s.kl.Stride()
		s.work = bench.Work{Latent: [3]int{side, side, s.kl.EmbedDim}}
		s.peer["tokenizer"] = map[string]any{"config": s.kl}
		return s, nil
	case checkpoint.Named(name):
		cfg, err := checkpoint.NamedMAR(name)
		if err != nil {
			return nil, err
		}
		s.info = &checkpoint.Model{Kind: checkpoint.KindMAR, MAR: cfg, Sampling: checkpoint.Sampling{Iters: 64, HeadSteps: 100, MaxTimestep: 999, CFG: 3, CFGSchedule: sample.Linear, Temperature: 1}}
		if cfg.HeadKind() == checkpoint.GMMHead {
			s.info.Sampling.CFG = 1
		}
		if s.kl = checkpoint.KL16(); cfg.Discrete() {
			s.kl = nil
		}
		return s, nil
	case slices.Contains(checkpoint.DiTNames(), name):
		cfg, err := checkpoint.NamedDiT(name)
		if err != nil {
			return nil, err
		}
		s.info = &checkpoint.Model{Kind: checkpoint.KindDiT, DiT: cfg, Sampling: checkpoint.DiTSampling()}
		s.info.Sampling.CFG = 1.5 // of the paper's DiT-XL/2-G
		s.kl = checkpoint.KL8()
		return s, nil
	}
	return nil, nil
}

// subject finds out what a name of --model means and whether all sides can take
// it.
func (j *benchJob) subject(name string) (*subject, error) {
	if name == "" {
		return nil, usagef("--model has an empty item; name files, or %s", namesText())
	}
	shape, open, err := shapeOptions(j.c)
	if err != nil {
		return nil, err
	}
	s, err := namedSubject(name)
	switch {
	case err != nil:
		return nil, err
	case s != nil:
		for _, f := range shapeFlags() {
			if flag := f.Names()[0]; j.c.IsSet(flag) {
				return nil, usagef("%s is about a file, and %s is a name: leave it out", dashed(flag), name)
			}
		}
		if s.kind == bench.KindTokenizer {
			return s, nil
		}
	default:
		f, info, err := openModel(name, shape, open)
		if err != nil {
			if !exists(name) && filepath.Ext(name) == "" {
				return nil, usagef("--model: %q is neither a file nor one of %s%s", name, namesText(), didYouMean(suggest(name, configNames())))
			}
			return nil, err
		}
		defer f.Close()
		if err := j.peersRead(f); err != nil {
			return nil, err
		}
		s = &subject{name: strings.TrimSuffix(filepath.Base(name), filepath.Ext(name)), info: info, path: name, open: open, peer: map[string]any{}}
	}
	switch {
	case s.info.Kind == checkpoint.KindDiT:
		s.kind = bench.KindDiT
	case s.info.MAR.IsCausal():
		s.kind = bench.KindAR
	default:
		s.kind = bench.KindMAR
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
	if j.c.Bool("decode") && s.random && s.kl == nil && s.tok == nil {
		return nil, usagef("%s: its tokens are codes, and no tokenizer of codes has a name: give --tokenizer FILE, or leave out --decode", name)
	}
	setSampling(j.c, &s.info.Sampling)
	if s.kind == bench.KindDiT {
		err = j.ditWork(s)
	} else {
		err = j.marWork(s)
	}
	if err != nil {
		return nil, err
	}
	s.work.Decode = j.c.Bool("decode") && s.kl != nil
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

// marWork checks and takes over the settings of a MAR or AR.
func (j *benchJob) marWork(s *subject) error {
	p, m := s.info.Sampling, s.info.MAR
	for _, n := range orDefault(j.headSteps, p.HeadSteps) {
		if err := stepsFit(n, p.MaxTimestep); err != nil {
			return err
		}
	}
	if len(j.modes) > 0 && m.HeadKind() != checkpoint.DiffusionHead {
		return usagef("%s: --against has the diffusion head only", s.name)
	}
	for _, n := range orDefault(j.iters, p.Iters) {
		if n > m.Tokens() && len(j.modes) > 0 && s.kind == bench.KindMAR {
			return usagef("%s has %d tokens, PyTorch cannot sample them in %d iterations: lower --iters", s.name, m.Tokens(), n)
		}
	}
	s.work.MaxTimestep, s.work.CFGSchedule, s.work.Temperature, s.work.Classes = p.MaxTimestep, p.CFGSchedule, p.Temperature, m.ClassNum
	s.peer["config"] = m
	return nil
}

// ditWork checks and takes over the settings of a DiT.
func (j *benchJob) ditWork(s *subject) error {
	for _, steps := range orDefault(j.steps, s.info.Sampling.Steps) {
		if len(j.modes) > 0 && strings.Contains(steps, ",") {
			return usagef("%s: --against has evenly spread steps and ddimN, not sections %s", s.name, steps)
		}
	}
	s.work.Classes, s.work.Temperature = s.info.DiT.NumClasses, 1
	s.peer["config"] = s.info.DiT
	return nil
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
	if s.kl != nil && (s.kind == bench.KindTokenizer || s.work.Decode) {
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
	if own.Tok = tok; s.kind == bench.KindTokenizer {
		return own, nil
	}
	g, err := newGenerator(s.info, j.fp8)
	if err != nil {
		return nil, err
	}
	if err := fill(g.params, s.path, s.open, s.info.Ignorable); err != nil {
		return nil, err
	}
	o := sample.Options{Compute: d, LatentScale: scale, Profile: true}
	own.Open = func() (*sample.Engine, error) {
		if tok == nil { // not a nil in an interface
			return g.open(nil, j.dev, o)
		}
		return g.open(tok, j.dev, o)
	}
	return own, own.Reopen()
}
