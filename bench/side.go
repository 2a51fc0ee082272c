package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"margo/engine"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// Side does cases. Sides of one comparison take turns.
type Side interface {
	Name() string
	Warm(ctx context.Context, c Case) error
	// Run measures a case. Between iterations a side of this process calls between, which
	// says how much of the time was its own.
	Run(ctx context.Context, c Case, between func() time.Duration) (Run, error)
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
	if r.Only = only(c); c.Kind == KindDiT {
		r.Steps, r.Sampler, r.CFGChannels, r.CFG = c.Steps, c.Sampler, c.Guided, c.CFG
		return r
	}
	r.Iters, r.HeadSteps, r.MaxTimestep = c.Iters, c.HeadSteps, m.Work.MaxTimestep
	r.CFG, r.CFGSchedule, r.Temperature = c.CFG, m.Work.CFGSchedule, m.Work.Temperature
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

// Activations is what a case takes of the device's memory beside the weights, in bytes, counted by a dry run.
func (m *Margo) Activations(c Case) (int64, error) {
	est, err := m.Engine.Estimate(m.request(c))
	return est.Memory, err
}

// Warm runs one iteration from the middle with few steps, so that memory, huge
// pages and threads are there.
func (m *Margo) Warm(ctx context.Context, c Case) error {
	if m.Engine == nil {
		_, err := m.decode(ctx, c)
		return err
	}
	r := m.request(c)
	r.Only = []int{c.Iters / 2, c.Iters - 1}
	if r.HeadSteps = min(r.HeadSteps, 4); c.Kind == KindAR {
		r.Only, r.HeadSteps = nil, min(r.HeadSteps, 2) // no token can be left out
	}
	return m.Engine.Run(ctx, r, nil, func(sample.Image) error { return nil })
}

// Run measures a case.
func (m *Margo) Run(ctx context.Context, c Case, between func() time.Duration) (Run, error) {
	if c.Part == "decode" {
		return m.decode(ctx, c)
	}
	var own time.Duration
	start := time.Now()
	pause := func(sample.Progress) { own += between() }
	if err := m.Engine.Run(ctx, m.request(c), pause, func(sample.Image) error { return nil }); err != nil {
		return Run{}, err
	}
	total := (time.Since(start) - own).Seconds()
	p, k := m.Engine.Parts(), scale(c)
	if m.Tok == nil {
		p.Tokenizer = 0 // of a clock read twice
	}
	run := Run{Parts: map[string]float64{"encoder": p.Encoder.Seconds() * k, "decoder": p.Decoder.Seconds() * k,
		"head": p.Head.Seconds() * k, "denoiser": p.Denoiser.Seconds() * k, "tokenizer": p.Tokenizer.Seconds()}}
	looped := p.Encoder + p.Decoder + p.Head + p.Denoiser
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
	Mode   string // "eager": the authors' operations one for one; "tuned": the best we could make of it
	Work   Work
	Device engine.Device // margo's name of where it computes, for its counter of energy
	peer   *Peer
	away   bool // on a device with memory of its own, which the process's size does not show
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
	r := map[string]any{"cmd": cmd, "batch": c.Batch, "labels": p.Work.labels(c.Batch), "cfg": c.CFG, "decode": p.Work.Decode, "seed": 0}
	if c.Kind == KindDiT {
		r["steps"], r["sampler"], r["cfg_channels"] = c.Steps, c.Sampler, c.Guided
	} else {
		r["iters"], r["head_steps"], r["max_timestep"] = c.Iters, c.HeadSteps, p.Work.MaxTimestep
		r["cfg_schedule"], r["temperature"] = p.Work.CFGSchedule, p.Work.Temperature
	}
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
func (p *PyTorch) Run(ctx context.Context, c Case, _ func() time.Duration) (Run, error) {
	var a struct {
		Total float64 `json:"seconds_total"`
		Enc   float64 `json:"enc"`
		Dec   float64 `json:"dec"`
		Head  float64 `json:"head"`
		Joint float64 `json:"denoiser"`
		VAE   float64 `json:"vae"`
	}
	if err := p.peer.Call(ctx, p.request("run", c), &a, peerTimeout); err != nil {
		return Run{}, err
	}
	if c.Part == "decode" {
		return Run{Seconds: a.Total, Parts: map[string]float64{"tokenizer": a.Total}}, nil
	}
	k := scale(c)
	looped := a.Enc + a.Dec + a.Head + a.Joint
	return Run{Seconds: a.Total + looped*(k-1), Parts: map[string]float64{"encoder": a.Enc * k, "decoder": a.Dec * k,
		"head": a.Head * k, "denoiser": a.Joint * k, "tokenizer": a.VAE, "other": a.Total - looped - a.VAE}}, nil
}
