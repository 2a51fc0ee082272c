package checkpoint

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"

	"margo/engine"
)

// Kinds of model a file may hold.
const (
	KindDiT = "dit" // a diffusion transformer over all tokens
	KindMAR = "mar" // a masked autoregressive model with a diffusion head
	KindKL  = "kl"  // a KL tokenizer
	KindVQ  = "vq"  // a VQ tokenizer: an autoencoder with a codebook
)

// DefaultLatentScale is the factor between KL-16's latents and MAR's tokens in
// the authors' code (engine_mar.py): 1 over the latents' standard deviation.
const DefaultLatentScale = 0.2325

// Sampling is a model's own choice of how to sample from it. Steps, which is "" for
// a MAR, tells the kinds apart.
type Sampling struct {
	// Of a MAR.
	Iters       int    `json:"iters,omitempty"`        // autoregressive steps
	HeadSteps   int    `json:"head_steps,omitempty"`   // diffusion steps of the head, 2 to max_timestep + 1
	MaxTimestep int    `json:"max_timestep,omitempty"` // largest diffusion timestep, 1 to 999
	CFGSchedule string `json:"cfg_schedule,omitempty"` // linear or constant

	// Of a DiT.
	Steps       string  `json:"steps,omitempty"`        // respacing: a count, counts of sections, or ddimN
	Sampler     string  `json:"sampler,omitempty"`      // ddpm or ddim
	Eta         float64 `json:"eta,omitempty"`          // of ddim: 0 is deterministic
	CFGChannels string  `json:"cfg_channels,omitempty"` // what is guided: 3 or all

	CFG         float64 `json:"cfg"` // guidance scale, 1 is off
	Temperature float64 `json:"temperature"`
}

// DiTSampling is what DiT's authors sample with (sample.py).
func DiTSampling() Sampling {
	return Sampling{Steps: "250", Sampler: "ddpm", CFGChannels: "3", CFG: 4, Temperature: 1}
}

// Model is what a checkpoint says about itself, in its metadata, or without any
// in its names and shapes.
type Model struct {
	Kind        string
	MAR         *MARConfig // of KindMAR
	DiT         *DiTConfig // of KindDiT
	KL          *KLConfig  // of KindKL and KindVQ
	Layout      string     // whose names the file's tensors have, if not its kind's own: LayoutDiffusers
	LatentScale float64    // tokens = latents · LatentScale; 0 is unknown
	Sampling    Sampling   // of a generator, authors' settings where the file has none
	ClassNames  []string   // of a generator, by class; nil if unknown
	Tokenizer   string     // of a generator: file name of its tokenizer, beside it; "" if unknown
}

// Params lists the model's tensors.
func (m *Model) Params() []ParamSpec {
	switch {
	case m.IsTokenizer():
		return m.KL.Params()
	case m.Kind == KindDiT:
		return m.DiT.Params()
	}
	return m.MAR.Params()
}

// Latents is the shape of what a generator samples: side² positions of channels.
func (m *Model) Latents() (side, channels int) {
	if m.Kind == KindDiT {
		return m.DiT.InputSize, m.DiT.InChannels
	}
	return m.MAR.Grid() * m.MAR.PatchSize, m.MAR.VAEEmbedDim
}

// Stride is the pixels per side of a latent position.
func (m *Model) Stride() int {
	if m.Kind == KindDiT {
		return m.DiT.VAEStride
	}
	return m.MAR.VAEStride
}

// PixelSize is the side of a generator's images.
func (m *Model) PixelSize() int {
	side, _ := m.Latents()
	return side * m.Stride()
}

// Classes is the number of classes that a generator knows.
func (m *Model) Classes() int {
	if m.Kind == KindDiT {
		return m.DiT.NumClasses
	}
	return m.MAR.ClassNum
}

// IsGenerator reports whether m makes images: MAR or DiT is set.
func (m *Model) IsGenerator() bool { return m.Kind == KindMAR || m.Kind == KindDiT }

// IsTokenizer reports whether m turns images into latents and back: KL is set.
func (m *Model) IsTokenizer() bool { return m.Kind == KindKL || m.Kind == KindVQ }

// Ignorable reports whether a tensor that the model does not need may be there.
func (m *Model) Ignorable(name string) bool { return m.IsTokenizer() && IgnorableKL(name) }

// Describe finds out what a file holds. Check(f, m.Params(), m.Ignorable) then
// says whether all of it is there.
func Describe(f *File, o MAROptions) (*Model, error) {
	return describe(f, o, f.meta)
}

func describe(f *File, o MAROptions, meta map[string]string) (*Model, error) {
	m := &Model{Kind: meta["kind"], Layout: f.layout}
	if m.Kind == "" {
		switch {
		case f.tensors["encoder.conv_in.weight"] != nil && f.tensors[codebook] != nil:
			m.Kind = KindVQ
		case f.tensors["encoder.conv_in.weight"] != nil:
			m.Kind = KindKL
		case (f.tensors["mask_token"] != nil || f.tensors["target_pos_embed_learned"] != nil) && f.tensors["diffusion_pos_embed_learned"] != nil:
			m.Kind = KindMAR
		case f.isDiT():
			m.Kind = KindDiT
		default:
			return nil, badFile(f.path, "neither a MAR, a DiT nor a KL or VQ tokenizer: it has none of the tensors %q, %q and %q", "mask_token", ditTable, "encoder.conv_in.weight")
		}
	}
	var err error
	switch m.Kind {
	case KindMAR:
		m.MAR, err = InferMAR(f, o)
	case KindDiT:
		if m.DiT, err = InferDiT(f, o); err == nil {
			err = f.sameEmbedders()
		}
	case KindKL, KindVQ:
		if m.KL, err = InferKL(f); err == nil && m.KL.Kind() != m.Kind {
			err = badFile(f.path, "metadata kind is %q, but the tensors are those of a tokenizer of kind %q", m.Kind, m.KL.Kind())
		}
	default:
		err = badFile(f.path, "metadata kind %s is not known to this version of margo", quote(m.Kind))
	}
	if err != nil {
		return nil, err
	}
	if m.LatentScale, err = f.latentScale(meta); err != nil {
		return nil, badFile(f.path, "latent_scale: %w", err)
	}
	if m.IsGenerator() {
		if err := m.sampling(meta); err != nil {
			return nil, badFile(f.path, "metadata %w", err)
		}
	}
	return m, nil
}

// latentScale is recorded in metadata, at the top of a PyTorch file, or in
// diffusers' config.json.
func (f *File) latentScale(meta map[string]string) (float64, error) {
	var x any
	if s, ok := meta["latent_scale"]; ok {
		x = s
	} else if x, ok = f.Value("latent_scale"); !ok {
		var err error
		if x, err = f.scalingFactor(); x == nil {
			return 0, err
		}
	}
	v, err := number(x)
	if err == nil && !(v > 0 && v < 1e6) {
		err = fmt.Errorf("%g is not between 0 and 1e6", v)
	}
	return v, err
}

// sampling fills the settings of a generator from metadata, over the authors'.
func (m *Model) sampling(meta map[string]string) error {
	if m.Kind == KindDiT {
		m.Sampling = DiTSampling()
	} else {
		m.marSampling()
	}
	values := make(map[string]any, len(meta))
	for k, v := range meta {
		values[k] = v
	}
	if err := setFields(&m.Sampling, values); err != nil {
		return err
	}
	m.Tokenizer = meta["tokenizer"]
	if s, ok := meta["class_names"]; ok {
		if len(s) > maxJSON {
			return fmt.Errorf("class_names: %d bytes", len(s))
		}
		if err := json.Unmarshal([]byte(s), &m.ClassNames); err != nil {
			return fmt.Errorf("class_names: %w", err)
		}
		if len(m.ClassNames) != m.Classes() {
			return fmt.Errorf("class_names: %d names for %d classes", len(m.ClassNames), m.Classes())
		}
	}
	return m.Sampling.Validate()
}

// marSampling is what the authors sample a MAR with.
func (m *Model) marSampling() {
	m.Sampling = Sampling{Iters: 64, HeadSteps: m.MAR.NumSamplingSteps, MaxTimestep: 999, CFG: 1, CFGSchedule: "linear", Temperature: 1}
	if m.MAR.IsCausal() {
		m.Sampling.Iters = m.MAR.Tokens() // one token at a time
	}
	if m.Sampling.HeadSteps < 2 { // nothing can be sampled in one step
		m.Sampling.HeadSteps = marDefaults().NumSamplingSteps
	}
	if c := m.MAR; c.VAEEmbedDim == 16 && c.HeadKind() == DiffusionHead && !c.IsCausal() { // README.md of LTH14/mar
		m.Sampling.CFG = map[marSize]float64{
			{768, 12, 12, 6, 1024}: 2.9, {1024, 16, 16, 8, 1280}: 3.0, {1280, 20, 16, 12, 1536}: 3.2,
		}[marSize{c.EncoderEmbedDim, c.EncoderDepth, c.EncoderNumHeads, c.DiffLossD, c.DiffLossW}]
		if m.Sampling.CFG == 0 {
			m.Sampling.CFG = 1
		}
	}
}

// Validate reports the first setting that cannot be.
func (s *Sampling) Validate() error {
	bad := func(format string, args ...any) error {
		return engine.Errorf("sampling", engine.Invalid, format, args...)
	}
	switch {
	case s.Steps != "" && s.Sampler != "ddpm" && s.Sampler != "ddim":
		return bad("sampler is %s, it must be ddpm or ddim", quote(s.Sampler))
	case s.Steps != "" && !(s.Eta >= 0 && s.Eta <= 1):
		return bad("eta is %g, it must be between 0 and 1", s.Eta)
	case s.Steps != "" && s.Eta != 0 && s.Sampler != "ddim":
		return bad("eta is %g, which is for the sampler ddim; ddpm has a learned variance", s.Eta)
	case s.Steps != "" && s.CFGChannels != "3" && s.CFGChannels != "all":
		return bad("cfg_channels is %s, it must be 3 or all", quote(s.CFGChannels))
	case s.Steps != "": // the rest is checked below
	case s.Iters < 1 || s.Iters > 1<<20:
		return bad("iters is %d, it must be at least 1", s.Iters)
	case s.HeadSteps < 2 || s.HeadSteps > 1000:
		return bad("head_steps is %d, it must be between 2 and 1000", s.HeadSteps)
	case s.MaxTimestep < 1 || s.MaxTimestep > 999:
		return bad("max_timestep is %d, it must be between 1 and 999", s.MaxTimestep)
	case s.HeadSteps > s.MaxTimestep+1:
		return bad("%d head_steps don't fit into timesteps 0 to %d: lower head_steps or raise max_timestep", s.HeadSteps, s.MaxTimestep)
	case s.CFGSchedule != "linear" && s.CFGSchedule != "constant":
		return bad("cfg_schedule is %s, it must be linear or constant", quote(s.CFGSchedule))
	}
	switch {
	case !(s.CFG >= 0 && s.CFG <= 1e4):
		return bad("cfg is %g, it must be between 0 and 10000", s.CFG)
	case !(s.Temperature >= 0 && s.Temperature <= 1e4):
		return bad("temperature is %g, it must be between 0 and 10000", s.Temperature)
	}
	return nil
}

// AuthorsLatents reports whether the latents have the shape of the authors', so
// that DefaultLatentScale is a good guess.
func (m *Model) AuthorsLatents() bool {
	if m.IsTokenizer() {
		return sameTokenizer(m.KL, KL16())
	}
	if m.Kind == KindDiT {
		return false
	}
	return m.MAR.VAEEmbedDim == 16 && m.MAR.VAEStride == 16
}

// DiffusersLatentScale is the scaling_factor of diffusers' AutoencoderKL where
// its config does not give one, as that of sd-vae-ft-mse and -ema does not.
const DiffusersLatentScale = 0.18215

// AssumedScale is a good guess where LatentScale is not recorded: the authors'
// for latents of their shape, diffusers' for a KL tokenizer of 4 channels in its
// layout, DiT's for a DiT of 4 channels at stride 8; else 0.
func (m *Model) AssumedScale() float64 {
	switch {
	case m.AuthorsLatents():
		return DefaultLatentScale
	case m.Kind == KindDiT && m.DiT.InChannels == 4 && m.DiT.VAEStride == 8:
		return DiTLatentScale
	case m.Kind == KindKL && m.Layout == LayoutDiffusers && m.KL.EmbedDim == 4:
		return DiffusersLatentScale
	}
	return 0
}

// metadata is m as a safetensors file records it.
func (m *Model) metadata() (map[string]string, error) {
	var config any = m.MAR
	if m.IsTokenizer() {
		config = m.KL
	} else if m.Kind == KindDiT {
		config = m.DiT
	}
	text, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	out := map[string]string{"kind": m.Kind, "config": string(text)}
	if m.LatentScale > 0 {
		out["latent_scale"] = floatText(m.LatentScale)
	}
	if m.Kind == KindMAR {
		s := m.Sampling
		out["iters"], out["head_steps"], out["max_timestep"] = strconv.Itoa(s.Iters), strconv.Itoa(s.HeadSteps), strconv.Itoa(s.MaxTimestep)
		out["cfg"], out["cfg_schedule"], out["temperature"] = floatText(s.CFG), s.CFGSchedule, floatText(s.Temperature)
	}
	if m.Kind == KindDiT {
		s := m.Sampling
		out["steps"], out["sampler"], out["eta"], out["cfg_channels"] = s.Steps, s.Sampler, floatText(s.Eta), s.CFGChannels
		out["cfg"], out["temperature"] = floatText(s.CFG), floatText(s.Temperature)
	}
	return out, nil
}

// floatText is the shortest text that reads back as v.
func floatText(v float64) string {
	if v == math.Trunc(v) && math.Abs(v) < 1e15 {
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}
