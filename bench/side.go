package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"margo/engine"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// Side does cases. Sides of one comparison take turns.
type Side interface {
	Name() string
	Warm(ctx context.Context, c Case) error
	Run(ctx context.Context, c Case) (Run, error)
	PID() int // of the process that does the work
	Close() error
}

// Work is what a case needs beyond its name: the settings that are the same for
// all cases of a benchmark.
type Work struct {
	MaxTimestep int
	CFGSchedule string
	Temperature float64
	Classes     int
	Decode      bool   // images are decoded too
	Latent      [3]int // of the tokenizer alone: height, width, channels
}

// labels gives image i class i mod Classes, as both sides must.
func (w Work) labels(n int) []int {
	l := make([]int, n)
	for i := range l {
		l[i] = i % max(w.Classes, 1)
	}
	return l
}

// only lists the iterations that are run, nil for all.
func only(c Case) []int {
	if c.Subset <= 0 || c.Subset >= c.Iters {
		return nil
	}
	var v []int
	for _, s := range Strata(c.Iters, c.Subset) {
		v = append(v, s.Iteration)
	}
	return v
}

// scale is by how much the time of the iterations that were run is multiplied.
func scale(c Case) float64 {
	if v := only(c); v != nil {
		return float64(c.Iters) / float64(len(v))
	}
	return 1
}

// Margo is margo itself.
type Margo struct {
	Device engine.Device
	Engine *sample.Engine
	Open   func() (*sample.Engine, error) // for Reopen; nil where only the tokenizer is measured
	Tok    tokenizer.Tokenizer            // nil: images are not decoded
	DType  engine.DType
	Work   Work
	Free   func() // releases weights; may be nil
}

// Name is "margo".
func (m *Margo) Name() string { return "margo" }

// Reopen gives back the working memory that an engine keeps of its largest
// batch, so that the next case's memory is its own.
func (m *Margo) Reopen() error {
	if m.Open == nil {
		return nil
	}
	var err error
	if m.Engine != nil {
		err = m.Engine.Close()
	}
	if m.Engine = nil; err == nil {
		m.Engine, err = m.Open()
	}
	return err
}

// PID is this process.
func (m *Margo) PID() int { return os.Getpid() }

// Close releases engine and weights.
func (m *Margo) Close() error {
	var err error
	if m.Engine != nil {
		err = m.Engine.Close()
	}
	if m.Free != nil {
		m.Free()
	}
	return err
}

func (m *Margo) request(c Case) sample.Request {
	r := sample.Defaults()
	r.Labels, r.N, r.Batch = m.Work.labels(c.Batch), c.Batch, c.Batch
	r.Iters, r.HeadSteps, r.MaxTimestep = c.Iters, c.HeadSteps, m.Work.MaxTimestep
	r.CFG, r.CFGSchedule, r.Temperature = c.CFG, m.Work.CFGSchedule, m.Work.Temperature
	r.Only = only(c)
	return r
}

// OwnFLOPs is what the device executes for a whole case, counted by a dry run.
func (m *Margo) OwnFLOPs(c Case) (float64, error) {
	if m.Engine == nil {
		return 0, nil
	}
	r := m.request(c)
	r.Only = nil
	est, err := m.Engine.Estimate(r)
	return float64(est.Work.Total().FLOPs()), err
}

// Warm runs one iteration from the middle with few steps, so that memory, huge
// pages and threads are there.
func (m *Margo) Warm(ctx context.Context, c Case) error {
	if m.Engine == nil {
		_, err := m.Run(ctx, c)
		return err
	}
	r := m.request(c)
	r.Only, r.HeadSteps = []int{c.Iters / 2, c.Iters - 1}, min(c.HeadSteps, 4)
	return m.Engine.Run(ctx, r, nil, func(sample.Image) error { return nil })
}

// Run measures a case.
func (m *Margo) Run(ctx context.Context, c Case) (Run, error) {
	if c.Part == "decode" {
		return m.decode(ctx, c)
	}
	start := time.Now()
	if err := m.Engine.Run(ctx, m.request(c), nil, func(sample.Image) error { return nil }); err != nil {
		return Run{}, err
	}
	total := time.Since(start).Seconds()
	p, k := m.Engine.Parts(), scale(c)
	if m.Tok == nil {
		p.Tokenizer = 0 // of a clock read twice
	}
	run := Run{Parts: map[string]float64{"encoder": p.Encoder.Seconds() * k, "decoder": p.Decoder.Seconds() * k,
		"head": p.Head.Seconds() * k, "tokenizer": p.Tokenizer.Seconds()}}
	looped := p.Encoder + p.Decoder + p.Head
	run.Parts["other"] = total - looped.Seconds() - p.Tokenizer.Seconds()
	run.Seconds = total + looped.Seconds()*(k-1)
	return run, nil
}

func (m *Margo) decode(ctx context.Context, c Case) (Run, error) {
	x, err := engine.NewCtx(m.Device, m.DType)
	if err != nil {
		return Run{}, err
	}
	defer x.Close()
	h, w, ch := m.Work.Latent[0], m.Work.Latent[1], m.Work.Latent[2]
	v := make([]float32, c.Batch*h*w*ch)
	for i := range v {
		v[i] = float32(engine.NormalAt(engine.RNG{Purpose: engine.PurposeTest}, i%ch, i/ch, 0))
	}
	start := time.Now()
	for i := range c.Batch {
		if err := ctx.Err(); err != nil {
			return Run{}, engine.Errorf("bench", engine.Cancelled, "%w", err)
		}
		x.Scoped(func() {
			x.Download(m.Tok.Decode(x, x.F32(v[i*h*w*ch:(i+1)*h*w*ch], 1, h, w, ch)))
		})
	}
	s := time.Since(start).Seconds()
	return Run{Seconds: s, Parts: map[string]float64{"tokenizer": s}}, x.Err()
}

// PyTorch is the peer of bench/peers in one of its modes.
type PyTorch struct {
	Mode string // "eager": the authors' operations one for one; "tuned": the best we could make of it
	Work Work
	peer *Peer
	away bool // on a device with memory of its own, which the process's size does not show
}

// FindPyTorch is the Python under root, margo's sources, that make peers has
// set up.
func FindPyTorch(root string) (string, error) {
	python := filepath.Join(root, ".peers", "bin", "python")
	for _, path := range []string{python, server(root)} {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("the PyTorch to compare with is not installed: there is no %s; run make peers in the folder of margo's sources, and bench there or with --peers", path)
		}
	}
	return python, nil
}

func server(root string) string { return filepath.Join(root, "bench", "peers", "mar_torch.py") }

// StartPyTorch starts the peer under root and loads the model: load holds the
// fields of its "load" command.
func StartPyTorch(ctx context.Context, root, mode string, w Work, load map[string]any) (*PyTorch, error) {
	python, err := FindPyTorch(root)
	if err != nil {
		return nil, err
	}
	p, err := StartPeer(python, "-u", server(root))
	if err != nil {
		return nil, err
	}
	load["cmd"], load["mode"] = "load", mode
	if err := p.Call(ctx, load, nil, 10*time.Minute); err != nil {
		p.Close()
		return nil, err
	}
	device, _ := load["device"].(string)
	return &PyTorch{Mode: mode, Work: w, peer: p, away: device != "" && device != "cpu"}, nil
}

// Name is "pytorch eager" or "pytorch tuned".
func (p *PyTorch) Name() string { return "pytorch " + p.Mode }

// Close ends the process.
func (p *PyTorch) Close() error { return p.peer.Close() }

// PID is the Python process.
func (p *PyTorch) PID() int { return p.peer.PID() }

func (p *PyTorch) request(cmd string, c Case) map[string]any {
	if c.Part == "decode" {
		return map[string]any{"cmd": "decode", "batch": c.Batch, "height": p.Work.Latent[0], "width": p.Work.Latent[1]}
	}
	r := map[string]any{"cmd": cmd, "batch": c.Batch, "labels": p.Work.labels(c.Batch), "iters": c.Iters, "head_steps": c.HeadSteps,
		"cfg": c.CFG, "cfg_schedule": p.Work.CFGSchedule, "temperature": p.Work.Temperature, "max_timestep": p.Work.MaxTimestep,
		"decode": p.Work.Decode, "seed": 0}
	if v := only(c); v != nil {
		r["subset"] = v
	}
	return r
}

const peerTimeout = 4 * time.Hour // a whole MAR-L sample takes PyTorch the better part of one

// Warm lets the peer compile and fill its caches.
func (p *PyTorch) Warm(ctx context.Context, c Case) error {
	return p.peer.Call(ctx, p.request("warm", c), nil, peerTimeout)
}

// Run measures a case.
func (p *PyTorch) Run(ctx context.Context, c Case) (Run, error) {
	var a struct {
		Total float64 `json:"seconds_total"`
		Enc   float64 `json:"enc"`
		Dec   float64 `json:"dec"`
		Head  float64 `json:"head"`
		VAE   float64 `json:"vae"`
	}
	if err := p.peer.Call(ctx, p.request("run", c), &a, peerTimeout); err != nil {
		return Run{}, err
	}
	if c.Part == "decode" {
		return Run{Seconds: a.Total, Parts: map[string]float64{"tokenizer": a.Total}}, nil
	}
	k := scale(c)
	looped := a.Enc + a.Dec + a.Head
	return Run{Seconds: a.Total + looped*(k-1), Parts: map[string]float64{"encoder": a.Enc * k, "decoder": a.Dec * k,
		"head": a.Head * k, "tokenizer": a.VAE, "other": a.Total - looped - a.VAE}}, nil
}

// Compare warms every side up and lets them take turns, reps times. The order
// within a turn alternates, so that no side always runs on a machine the other
// has just heated. Rows are in the order of sides.
func Compare(ctx context.Context, c Case, sides []Side, reps int, log func(string)) ([]Row, error) {
	rows := make([]Row, len(sides))
	memory := make([]memoryMeter, len(sides))
	debug.FreeOSMemory() // what earlier cases left
	for i, s := range sides {
		log(fmt.Sprintf("%s %s batch %d: %s warms up", c.Model, c.DType, c.Batch, s.Name()))
		memory[i] = meter(s)
		memory[i].reset()
		if err := s.Warm(ctx, c); err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name(), err)
		}
		rows[i] = Row{Case: c, Side: s.Name()}
	}
	for rep := range reps {
		for j := range sides {
			i := j
			if rep%2 == 1 {
				i = len(sides) - 1 - j
			}
			if err := ctx.Err(); err != nil {
				return nil, engine.Errorf("bench", engine.Cancelled, "%w", err)
			}
			r, err := sides[i].Run(ctx, c)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", sides[i].Name(), err)
			}
			log(fmt.Sprintf("%s %s batch %d: run %d of %d, %s: %.4g s/image", c.Model, c.DType, c.Batch, rep+1, reps, sides[i].Name(), r.Seconds/float64(c.Batch)))
			rows[i].Runs = append(rows[i].Runs, r)
		}
	}
	for i := range sides {
		rows[i].MemoryBytes, rows[i].DeviceMemory = memory[i].peak()
	}
	return rows, nil
}
