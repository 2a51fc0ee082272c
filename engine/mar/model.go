package mar

import (
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/nn"
)

// Model is MAR's trunk and head. Field tags are the keys of the authors'
// checkpoints; De and Dd are the widths of encoder and decoder, B the number of
// buffer ([cls]) tokens.
type Model struct {
	Config Config

	ClassEmb   Embedding     `param:"class_emb"`   // [classes, De]
	FakeLatent *engine.Param `param:"fake_latent"` // [1, De]: the class of unconditional sampling

	ZProj      nn.Linear     `param:"z_proj"`
	ZProjLN    nn.LayerNorm  `param:"z_proj_ln"`
	EncoderPos *engine.Param `param:"encoder_pos_embed_learned"` // [1, B+L, De]
	Encoder    []*nn.Block   `param:"encoder_blocks"`
	EncoderOut nn.LayerNorm  `param:"encoder_norm"`

	DecoderIn  nn.Linear     `param:"decoder_embed"`
	MaskToken  *engine.Param `param:"mask_token"`                // [1, 1, Dd]
	DecoderPos *engine.Param `param:"decoder_pos_embed_learned"` // [1, B+L, Dd]
	Decoder    []*nn.Block   `param:"decoder_blocks"`
	DecoderOut nn.LayerNorm  `param:"decoder_norm"`

	HeadPos *engine.Param `param:"diffusion_pos_embed_learned"` // [1, L, Dd]
	Head    *Head         `param:"diffloss.net"`
}

// Embedding is a table of rows, read directly.
type Embedding struct {
	Weight *engine.Param `param:"weight"`
}

// Config is the constructor's arguments of the authors' code.
type Config = checkpoint.MARConfig

// New describes the model of cfg: parameters have shapes but no values yet.
// Fails with Invalid if cfg cannot work.
func New(cfg *Config) (*Model, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	de, dd, eps := cfg.EncoderEmbedDim, cfg.DecoderEmbedDim, cfg.LayerNormEps
	rows := cfg.BufferSize + cfg.Tokens()
	m := &Model{
		Config:     *cfg,
		ClassEmb:   Embedding{nn.Vec(cfg.ClassNum, de)},
		FakeLatent: nn.Vec(1, de),
		ZProj:      nn.NewLinear(cfg.TokenDim(), de).InF32(),
		ZProjLN:    nn.NewLayerNorm(de, 1e-6), // fixed in the authors' code
		EncoderPos: nn.Vec(1, rows, de),
		EncoderOut: nn.NewLayerNorm(de, eps),
		DecoderIn:  nn.NewLinear(de, dd),
		MaskToken:  nn.Vec(1, 1, dd),
		DecoderPos: nn.Vec(1, rows, dd),
		DecoderOut: nn.NewLayerNorm(dd, eps),
		HeadPos:    nn.Vec(1, cfg.Tokens(), dd),
	}
	for range cfg.EncoderDepth {
		m.Encoder = append(m.Encoder, nn.NewBlock(de, cfg.EncoderNumHeads, cfg.MLPRatio, eps))
	}
	for range cfg.DecoderDepth {
		m.Decoder = append(m.Decoder, nn.NewBlock(dd, cfg.DecoderNumHeads, cfg.MLPRatio, eps))
	}
	var err error
	m.Head, err = NewHead(cfg.TokenDim(), dd, cfg.DiffLossW, cfg.DiffLossD)
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
