package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/bench"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/dit"
	"margo/engine/mar"
)

// list splits what a flag of several values holds; nil for nothing.
func list(v string) []string {
	if v == "" {
		return nil
	}
	out := strings.Split(v, ",")
	for i := range out {
		out[i] = strings.TrimSpace(out[i])
	}
	return out
}

// intList is a flag of several numbers; what names one of them.
func intList(c *cli.Context, name, what string, low, high int) ([]int, error) {
	var out []int
	for _, s := range list(c.String(name)) {
		n, err := strconv.Atoi(s)
		if err != nil || n < low || n > high {
			return nil, usagef("--%s: %q is not %s, %d to %d", name, s, what, low, high)
		}
		out = append(out, n)
	}
	if out == nil && c.IsSet(name) {
		return nil, usagef("--%s is empty; give %s, or several with commas", name, what)
	}
	return out, nil
}

// plotFormat is the ending of --plot, without the dot.
func plotFormat(c *cli.Context) string {
	return strings.TrimPrefix(strings.ToLower(filepath.Ext(c.String("plot"))), ".")
}

// needed refuses flags that none of the models has a use for.
func (j *benchJob) needed(subjects []*subject) error {
	kinds, diffusing := map[string]bool{}, false
	for _, s := range subjects {
		kinds[s.kind] = true
		diffusing = diffusing || s.info != nil && s.info.MAR != nil && s.info.MAR.HeadKind() == checkpoint.DiffusionHead
	}
	ofMAR := kinds[bench.KindMAR] || kinds[bench.KindAR]
	for _, f := range []struct {
		name, what string
		used       bool
	}{{"iters", "a MAR (a causal model takes one for each token)", kinds[bench.KindMAR]}, {"head-steps", "a MAR or AR with the diffusion head", diffusing}, {"max-timestep", "a MAR or AR with the diffusion head", diffusing}, {"cfg-schedule", "a MAR or AR", ofMAR},
		{"steps", "a DiT", kinds[bench.KindDiT]}, {"sampler", "a DiT", kinds[bench.KindDiT]}, {"cfg-channels", "a DiT", kinds[bench.KindDiT]}} {
		if j.c.IsSet(f.name) && !f.used {
			return usagef("--%s is for %s, and --model has none", f.name, f.what)
		}
	}
	return nil
}

// cases are what is to be run of a model in a dtype.
func (j *benchJob) cases(s *subject, d engine.DType) ([]bench.Case, error) {
	base := bench.Case{Model: s.name, Kind: s.kind, DType: d.String(), Part: "sample"}
	if s.kind == bench.KindTokenizer {
		base.Part, base.Pixels = "decode", s.work.Latent[0]*s.kl.Stride()
		return j.batched([]bench.Case{base}), nil
	}
	p := s.info.Sampling
	base.CFG, base.Pixels = p.CFG, s.info.PixelSize()
	var out []bench.Case
	if s.kind == bench.KindDiT {
		for _, steps := range orDefault(j.steps, p.Steps) {
			proc, err := diffusion.DiT(steps)
			if err != nil {
				return nil, err
			}
			c := base
			c.Steps, c.Sampler, c.Guided, c.Iters = steps, p.Sampler, p.CFGChannels, proc.Len()
			c.Subset = strata(j.c.Int("subset"), c.Iters)
			out = append(out, c)
		}
		return j.batched(out), nil
	}
	iters := orDefault(j.iters, p.Iters)
	if s.kind == bench.KindAR {
		iters = []int{s.info.MAR.Tokens()}
	}
	for _, n := range iters {
		for _, steps := range orDefault(j.headSteps, p.HeadSteps) {
			c := base
			c.Iters = n
			if s.info.MAR.HeadKind() == checkpoint.DiffusionHead {
				c.HeadSteps = steps
			}
			if s.kind != bench.KindAR { // of a causal model none can be left out
				c.Subset = strata(j.c.Int("subset"), n)
			}
			if len(out) == 0 || out[len(out)-1] != c { // other heads have no steps to vary
				out = append(out, c)
			}
		}
	}
	return j.batched(out), nil
}

func orDefault[T any](list []T, def T) []T {
	if list == nil {
		return []T{def}
	}
	return list
}

// strata is how many of n iterations are run for --subset k: strata of equal size, so
// that one factor scales all.
func strata(k, n int) int {
	for k > 0 && k < n && n%k != 0 {
		k++
	}
	return min(k, n)
}

// batched are the cases at every batch size.
func (j *benchJob) batched(cases []bench.Case) []bench.Case {
	var out []bench.Case
	for _, c := range cases {
		for _, c.Batch = range j.batches {
			out = append(out, c)
		}
	}
	return out
}

// group is a model in a dtype, loaded on every side.
type group struct {
	s     *subject
	own   *bench.Margo
	sides []bench.Side
	cases []bench.Case
}

func (g *group) close() {
	for _, side := range g.sides {
		side.Close()
	}
}

// open loads a model on every side.
func (j *benchJob) open(s *subject, d engine.DType) (*group, error) {
	cases, err := j.cases(s, d)
	if err != nil {
		return nil, err
	}
	own, err := j.margo(s, d)
	if err != nil {
		return nil, err
	}
	g := &group{s, own, []bench.Side{own}, cases}
	for _, mode := range j.modes {
		load := map[string]any{"dtype": d.String(), "threads": j.dev.Info().Threads, "device": peerDevice(j.dev.Name())}
		for k, v := range s.peer {
			load[k] = v
		}
		j.log.Infof("starting PyTorch (%s) for %s %s", mode, s.name, d)
		p, err := bench.StartPyTorch(j.c.Context, j.c.String("peers"), mode, s.work, load)
		if err != nil {
			g.close()
			return nil, failf("%w", err)
		}
		p.Device = j.dev
		g.sides = append(g.sides, p)
	}
	return g, nil
}

// peerDevice is PyTorch's name of the device that a margo device runs on.
func peerDevice(name string) string {
	if strings.HasPrefix(name, "cuda:") {
		return name
	}
	return "cpu"
}

// all runs every case; what is complete is in the report, whatever happens.
func (j *benchJob) all(subjects []*subject) error {
	if j.c.Bool("interleave") {
		return j.together(subjects)
	}
	for _, s := range subjects {
		for _, d := range j.dtypes {
			if err := j.oneByOne(s, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// oneByOne runs the cases of a model one after the other.
func (j *benchJob) oneByOne(s *subject, d engine.DType) error {
	g, err := j.open(s, d)
	if err != nil {
		return err
	}
	defer g.close()
	for _, c := range g.cases {
		if err := g.own.Reopen(); err != nil {
			return err
		}
		if err := j.compare([]*group{g}, []bench.Unit{{Case: c, Sides: g.sides}}); err != nil {
			return err
		}
	}
	return nil
}

// together loads everything and lets all cases take turns.
func (j *benchJob) together(subjects []*subject) error {
	var groups []*group // of each unit
	var units []bench.Unit
	for _, s := range subjects {
		for _, d := range j.dtypes {
			g, err := j.open(s, d)
			if err != nil {
				return err
			}
			defer g.close()
			for _, c := range g.cases {
				groups, units = append(groups, g), append(units, bench.Unit{Case: c, Sides: g.sides})
			}
		}
	}
	return j.compare(groups, units)
}

// compare measures units, the i-th of groups[i], and adds the rows.
func (j *benchJob) compare(groups []*group, units []bench.Unit) error {
	type work struct{ authors, own float64 }
	var of []work // of each row
	for i, u := range units {
		authors, own, err := j.flops(groups[i].s, u.Case, groups[i].own)
		if err != nil {
			return err
		}
		for range u.Sides {
			of = append(of, work{authors, own})
		}
	}
	rows, err := bench.Compare(j.c.Context, units, j.c.Int("reps"), func(m string) { j.log.Info(m) })
	if err != nil {
		return err
	}
	j.measure()
	random := map[string]bool{}
	for _, g := range groups {
		random[g.s.name] = g.s.random
	}
	for i := range rows {
		rows[i].FLOPs, rows[i].RandomWeight = of[i].authors, random[rows[i].Model]
		if rows[i].Side == "margo" {
			rows[i].OwnFLOPs = of[i].own
		}
		if rows[i].Kind == bench.KindAR && j.c.IsSet("subset") {
			rows[i].Note = "every token of a causal model was run: each depends on the ones before"
		}
	}
	j.report.Rows = append(j.report.Rows, rows...)
	return nil
}

// flops counts the authors' algorithm and margo's own work for a whole batch.
func (j *benchJob) flops(s *subject, cs bench.Case, own *bench.Margo) (authors, ours float64, err error) {
	n := float64(cs.Batch)
	switch s.kind {
	case bench.KindTokenizer:
		f, err := bench.DecodeFLOPs(s.kl, own.Work.Latent[0], own.Work.Latent[1])
		return f * n, f * n, err
	case bench.KindDiT:
		authors = dit.CountFLOPs(s.info.DiT, cs.Iters, cs.CFG != 1) * n
	default:
		authors = mar.CountFLOPs(s.info.MAR, cs.Iters, cs.HeadSteps, cs.CFG != 1).Total() * n
	}
	if ours, err = own.OwnFLOPs(cs); err != nil || own.Tok == nil {
		return authors, ours, err
	}
	side := s.info.PixelSize() / s.kl.Stride()
	f, err := bench.DecodeFLOPs(s.kl, side, side)
	return authors + f*n, ours, err
}

// fromFiles writes reports that were measured before.
func (j *benchJob) fromFiles() error {
	for _, f := range j.c.Command.Flags {
		if name := f.Names()[0]; j.c.IsSet(name) && !slices.Contains([]string{"from", "plot", "format", "out"}, name) {
			return usagef("%s is about measuring, and --from measures nothing: leave it out", dashed(name))
		}
	}
	for i, path := range list(j.c.String("from")) {
		b, err := readText(path, 64<<20)
		if err != nil {
			return filef("--from: %w", err)
		}
		rep := &bench.Report{}
		if err := json.Unmarshal(b, rep); err != nil || len(rep.Rows) == 0 {
			if err == nil {
				err = fmt.Errorf("it has no rows")
			}
			return filef("--from: %s is not a report of margo bench --format json: %w", path, err)
		}
		if i == 0 {
			j.report = rep
			continue
		}
		j.report.Add(rep)
	}
	return j.write()
}
