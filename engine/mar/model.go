package mar

import (
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/nn"
)

// Model is MAR's trunk and head. Field tags are the keys of the authors'
// checkpoints; De and Dd are the widths of encoder and decoder, B the number of
// buffer ([cls]) tokens. Fields that the configuration has no use for are nil: a
// causal model has no encoder, no encoder positions and no mask token, and its
// decoder is the whole trunk (see Extend).
type Model struct {
	Config Config

	ClassEmb   Embedding     `param:"class_emb"`   // [classes, De]
	FakeLatent *engine.Param `param:"fake_latent"` // [1, De]: the class of unconditional sampling

	ZProj      nn.Linear     `param:"z_proj"`
	TokenEmb   *Embedding    `param:"token_emb"` // [codes, De], in the place of z_proj where tokens are codes
	ZProjLN    nn.LayerNorm  `param:"z_proj_ln"`
	EncoderPos *engine.Param `param:"encoder_pos_embed_learned"` // [1, B+L, De]
	Encoder    []*nn.Block   `param:"encoder_blocks"`
	EncoderOut nn.LayerNorm  `param:"encoder_norm"`

	DecoderIn  nn.Linear     `param:"decoder_embed"`
	MaskToken  *engine.Param `param:"mask_token"`                // [1, 1, Dd]
	DecoderPos *engine.Param `param:"decoder_pos_embed_learned"` // [1, B+L, Dd]
	Decoder    []*nn.Block   `param:"decoder_blocks"`
	DecoderOut nn.LayerNorm  `param:"decoder_norm"`

	TargetPos *engine.Param `param:"target_pos_embed_learned"` // [1, L, Dd]: causal models' next position

	HeadPos *engine.Param `param:"diffusion_pos_embed_learned"` // [1, L, Dd]

	// One of these, as Config.Head says.
	Head    *Head       `param:"diffloss.net"`
	CELoss  *Projection `param:"celoss"`  // [codes, Dd], no bias
	L2Loss  *Projection `param:"l2loss"`  // [C, Dd]
	GMMLoss *Projection `param:"gmmloss"` // [mixtures·(1+2C), Dd]
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
		ZProjLN:    nn.NewLayerNorm(de, 1e-6), // fixed in the authors' code
		DecoderPos: nn.Vec(1, rows, dd),
		DecoderOut: nn.NewLayerNorm(dd, eps),
		HeadPos:    nn.Vec(1, cfg.Tokens(), dd),
	}
	if cfg.Discrete() {
		m.TokenEmb = &Embedding{nn.Vec(cfg.CodebookSize, de)}
	} else {
		m.ZProj = nn.NewLinear(cfg.TokenDim(), de).InF32()
	}
	if cfg.IsCausal() {
		m.TargetPos = nn.Vec(1, cfg.Tokens(), dd)
	} else {
		m.EncoderPos, m.EncoderOut = nn.Vec(1, rows, de), nn.NewLayerNorm(de, eps)
		m.DecoderIn, m.MaskToken = nn.NewLinear(de, dd), nn.Vec(1, 1, dd)
	}
	for range cfg.EncoderDepth {
		m.Encoder = append(m.Encoder, nn.NewBlock(de, cfg.EncoderNumHeads, cfg.MLPRatio, eps))
	}
	for range cfg.DecoderDepth {
		m.Decoder = append(m.Decoder, nn.NewBlock(dd, cfg.DecoderNumHeads, cfg.MLPRatio, eps))
	}
	var err error
	switch cfg.HeadKind() {
	case checkpoint.CategoricalHead:
		m.CELoss = newProjection(dd, cfg.CodebookSize, false)
	case checkpoint.L2Head:
		m.L2Loss = newProjection(dd, cfg.TokenDim(), true)
	case checkpoint.GMMHead:
		m.GMMLoss = newProjection(dd, cfg.MixtureOut(), true)
	default:
		m.Head, err = NewHead(cfg.TokenDim(), dd, cfg.DiffLossW, cfg.DiffLossD)
	}
	return m, err
}

// inputPos is the table of the positions of the trunk's input: buffer, tokens.
func (m *Model) inputPos() *engine.Param {
	if m.Config.IsCausal() {
		return m.DecoderPos
	}
	return m.EncoderPos
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
