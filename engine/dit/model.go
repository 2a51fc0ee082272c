package dit

import (
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/nn"
)

const (
	normEps       = 1e-6  // of all norms, which have no parameters; fixed in the authors' code
	frequencyDim  = 256   // of the sinusoidal timestep embedding
	maxTimePeriod = 10000 // slowest frequency of it
)

// GuidedChannels is the number of channels that the authors' guidance covers
// ("for exact reproducibility reasons", models.py forward_with_cfg).
const GuidedChannels = 3

// Config is the constructor's arguments of the authors' code.
type Config = checkpoint.DiTConfig

// Model is a DiT of width D. Field tags are the keys of the authors' checkpoints. The
// embeddings of tokens and timesteps and the final layer stay F32 in every compute
// dtype.
type Model struct {
	Config Config

	Pos   *engine.Param `param:"pos_embed"` // [1, L, D], fixed
	Patch nn.Linear     `param:"x_embedder.proj"`
	Time1 nn.Linear     `param:"t_embedder.mlp.0"`                  // 256 → D
	Time2 nn.Linear     `param:"t_embedder.mlp.2"`                  // D → D
	Table *engine.Param `param:"y_embedder.embedding_table.weight"` // [classes+1, D]; the last row is no class

	Layers []*Block  `param:"blocks"`
	Final  FinalPart `param:"final_layer"`

	adaW, adaB *engine.Param // all modulation layers, stacked: [(6·depth+2)·D, D]
}

// Block is a transformer block with AdaLN-zero:
//
//	x ← x + gate₁ ⊙ proj(attn(LN(x)·(1+scale₁) + shift₁))
//	x ← x + gate₂ ⊙ fc2(GELU(fc1(LN(x)·(1+scale₂) + shift₂)))
//
// with shift₁, scale₁, gate₁, shift₂, scale₂, gate₂ = Ada(SiLU(c)), norms without
// parameters and the tanh form of GELU (models.py DiTBlock).
type Block struct {
	Attn nn.Attn   `param:"attn"`
	MLP  nn.MLP    `param:"mlp"`
	Ada  nn.Linear `param:"adaLN_modulation.1"` // D → 6D
}

// FinalPart is linear(LN(x)·(1+scale) + shift) (models.py FinalLayer).
type FinalPart struct {
	Linear nn.Linear `param:"linear"`             // D → 2·C·p²
	Ada    nn.Linear `param:"adaLN_modulation.1"` // D → 2D: shift, scale
}

// New describes the model of cfg: parameters have shapes but no values yet. Fails with
// Invalid if cfg cannot work.
func New(cfg *Config) (*Model, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	d, p := cfg.HiddenSize, cfg.PatchSize
	m := &Model{
		Config: *cfg,
		Pos:    nn.Vec(1, cfg.Tokens(), d),
		Patch:  nn.NewLinear(cfg.TokenDim(), d).InF32(),
		Time1:  nn.NewLinear(frequencyDim, d).InF32(),
		Time2:  nn.NewLinear(d, d).InF32(),
		Table:  nn.Vec(cfg.NumClasses+1, d),
		Final:  FinalPart{nn.NewLinear(d, 2*cfg.TokenDim()).InF32(), nn.NewLinear(d, 2*d)},
	}
	m.Patch.Weight.Shape = []int{d, cfg.InChannels, p, p} // a convolution with stride p: columns (c, py, px)
	order := FinalOrder(cfg)
	m.Final.Linear.Weight.Order, m.Final.Linear.Bias.Order = order, order
	var w, b []*engine.Param
	for range cfg.Depth {
		k := &Block{
			Attn: nn.Attn{QKV: nn.NewLinear(d, 3*d), Proj: nn.NewLinear(d, d), Heads: cfg.NumHeads},
			MLP:  nn.MLP{Fc1: nn.NewLinear(d, cfg.Hidden()), Fc2: nn.NewLinear(cfg.Hidden(), d)},
			Ada:  nn.NewLinear(d, 6*d),
		}
		m.Layers = append(m.Layers, k)
		w, b = append(w, k.Ada.Weight), append(b, k.Ada.Bias)
	}
	w, b = append(w, m.Final.Ada.Weight), append(b, m.Final.Ada.Bias)
	var err error
	if m.adaW, err = engine.NewStack(w...); err != nil {
		return nil, err
	}
	m.adaB, err = engine.NewStack(b...)
	return m, err
}

// Loaded returns an error that names the first parameter without a value.
func (m *Model) Loaded() error {
	for _, p := range engine.Params(m) {
		if p.T == nil {
			return engine.Errorf("model", engine.Invalid, "parameter %s has no value", p.Name)
		}
	}
	return nil
}

// Group is a range of a token's columns, (c, py, px), that is guided or not as a
// whole, with its place in the network's output.
type Group struct {
	From, To int // columns of the token
	Out      int // first column of ε in the output; v follows at Out + To − From
}

// Groups are the channels that the authors guide, then the others.
func Groups(cfg *Config) []Group {
	all := cfg.TokenDim()
	n := min(GuidedChannels*cfg.PatchSize*cfg.PatchSize, all)
	g := []Group{{0, n, 0}}
	if n < all {
		g = append(g, Group{n, all, 2 * n})
	}
	return g
}

// FinalOrder is the order of the final layer's rows on the device: for each group ε,
// then v, each (c, py, px). The authors' rows are (py, px, c) with ε in the first C of
// 2C channels (models.py unpatchify).
func FinalOrder(cfg *Config) []int {
	pp, ch := cfg.PatchSize*cfg.PatchSize, cfg.InChannels
	var out []int
	for _, g := range Groups(cfg) {
		for _, first := range []int{0, ch} {
			for k := g.From; k < g.To; k++ {
				out = append(out, k%pp*2*ch+first+k/pp)
			}
		}
	}
	return out
}
