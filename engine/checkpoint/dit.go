package checkpoint

import (
	"fmt"
	"math"
	"strings"

	"margo/engine"
)

// DiTConfig describes a DiT by its authors' argument names (DiT models.py). The
// grid has (InputSize/PatchSize)² tokens of InChannels·PatchSize² channels; the
// network predicts noise and variance (learn_sigma), 2·InChannels channels.
type DiTConfig struct {
	InputSize  int     `json:"input_size"` // latent positions per side
	PatchSize  int     `json:"patch_size"` // latent positions for each token, per side
	InChannels int     `json:"in_channels"`
	HiddenSize int     `json:"hidden_size"`
	Depth      int     `json:"depth"`
	NumHeads   int     `json:"num_heads"`
	MLPRatio   float64 `json:"mlp_ratio"`
	NumClasses int     `json:"num_classes"` // without the null class, which is one more
	VAEStride  int     `json:"vae_stride"`  // pixels for each latent position
}

// DiTLatentScale is the factor between sd-vae's latents and DiT's in the authors'
// code (sample.py, train.py).
const DiTLatentScale = 0.18215

// ditSize is a named model of the paper's Table 1 (models.py DiT_models).
type ditSize struct{ width, depth, heads int }

var ditSizes = map[string]ditSize{
	"dit-s": {384, 12, 6}, "dit-b": {768, 12, 12}, "dit-l": {1024, 24, 16}, "dit-xl": {1152, 28, 16},
}

// DiTNames lists the named configurations.
func DiTNames() []string {
	var out []string
	for _, size := range []string{"dit-s", "dit-b", "dit-l", "dit-xl"} {
		for _, patch := range []string{"/2", "/4", "/8"} {
			out = append(out, size+patch)
		}
	}
	return out
}

// ditDefaults are the defaults of the authors' constructor: 256×256 pixels.
func ditDefaults() DiTConfig {
	return DiTConfig{InputSize: 32, PatchSize: 2, InChannels: 4, MLPRatio: 4, NumClasses: 1000, VAEStride: 8}
}

// NamedDiT returns a published configuration at 256×256 pixels: dit-s, dit-b,
// dit-l or dit-xl with patches of 2, 4 or 8, such as dit-xl/2.
func NamedDiT(name string) (*DiTConfig, error) {
	size, patch, _ := strings.Cut(name, "/")
	s, ok := ditSizes[size]
	p := map[string]int{"2": 2, "4": 4, "8": 8}[patch]
	if !ok || p == 0 {
		return nil, engine.Errorf("config", engine.Invalid, "no configuration %s; there are %s", quote(name), strings.Join(DiTNames(), ", "))
	}
	c := ditDefaults()
	c.PatchSize, c.HiddenSize, c.Depth, c.NumHeads = p, s.width, s.depth, s.heads
	return &c, nil
}

// Grid is the tokens per side.
func (c *DiTConfig) Grid() int { return c.InputSize / c.PatchSize }

// Tokens is the length L of the sequence.
func (c *DiTConfig) Tokens() int { return c.Grid() * c.Grid() }

// TokenDim is the channels of a token.
func (c *DiTConfig) TokenDim() int { return c.InChannels * c.PatchSize * c.PatchSize }

// Hidden is the width inside a block's MLP.
func (c *DiTConfig) Hidden() int { return int(float64(c.HiddenSize) * c.MLPRatio) }

// Validate reports the first field that cannot be.
func (c *DiTConfig) Validate() error {
	bad := func(format string, args ...any) error {
		return engine.Errorf("DiT config", engine.Invalid, format, args...)
	}
	for _, f := range []struct {
		name    string
		v, most int
	}{
		{"input_size", c.InputSize, 1 << 14}, {"patch_size", c.PatchSize, 1 << 8}, {"in_channels", c.InChannels, 1 << 10},
		{"hidden_size", c.HiddenSize, 1 << 16}, {"depth", c.Depth, 1 << 10}, {"num_heads", c.NumHeads, 1 << 10},
		{"num_classes", c.NumClasses, 1 << 24}, {"vae_stride", c.VAEStride, 1 << 10},
	} {
		if f.v < 1 || f.v > f.most {
			return bad("%s is %d, it must be between 1 and %d", f.name, f.v, f.most)
		}
	}
	if c.InputSize%c.PatchSize != 0 || c.Grid() > 1<<10 {
		return bad("input_size %d is not 1 to %d patches of patch_size %d", c.InputSize, 1<<10, c.PatchSize)
	}
	if c.TokenDim() > 1<<16 {
		return bad("tokens of %d channels are too large", c.TokenDim())
	}
	if c.HiddenSize%4 != 0 {
		return bad("hidden_size %d is not a multiple of 4, which the position embedding needs", c.HiddenSize)
	}
	if c.HiddenSize%c.NumHeads != 0 {
		return bad("hidden_size %d is not divisible by num_heads %d", c.HiddenSize, c.NumHeads)
	}
	if c.HiddenSize/c.NumHeads > 512 {
		return bad("num_heads %d makes heads of %d columns; 512 are the most", c.NumHeads, c.HiddenSize/c.NumHeads)
	}
	if !(c.MLPRatio > 0 && c.MLPRatio <= 64) || c.Hidden() < 1 {
		return bad("mlp_ratio is %g, it must be above 0 and at most 64", c.MLPRatio)
	}
	return nil
}

// Params lists the tensors of the model by the authors' keys, in the order of
// their definition.
func (c *DiTConfig) Params() []ParamSpec {
	var b builder
	d, out := c.HiddenSize, 2*c.TokenDim()
	b.add(ditPos, 1, c.Tokens(), d)
	b.add("x_embedder.proj.weight", d, c.InChannels, c.PatchSize, c.PatchSize)
	b.add("x_embedder.proj.bias", d)
	b.linear("t_embedder.mlp.0", d, frequencies)
	b.linear("t_embedder.mlp.2", d, d)
	b.add(ditTable, c.NumClasses+1, d)
	for i := range c.Depth {
		p := fmt.Sprintf("blocks.%d", i)
		b.linear(p+".attn.qkv", 3*d, d)
		b.linear(p+".attn.proj", d, d)
		b.linear(p+".mlp.fc1", c.Hidden(), d)
		b.linear(p+".mlp.fc2", d, c.Hidden())
		b.linear(p+".adaLN_modulation.1", 6*d, d)
	}
	b.linear("final_layer.linear", out, d)
	b.linear("final_layer.adaLN_modulation.1", 2*d, d)
	return b.out
}

const (
	ditPos   = "pos_embed"
	ditTable = "y_embedder.embedding_table.weight"
	ditLast  = "final_layer.linear.weight"
)

// isDiT reports whether the tensors are those of a DiT.
func (f *File) isDiT() bool {
	return f.tensors["x_embedder.proj.weight"] != nil && f.tensors[ditTable] != nil && f.tensors[ditLast] != nil
}

// InferDiT finds the configuration of a DiT. Widths, depth and counts come from
// shapes; heads and, where no pos_embed is stored, the size of the input from what
// the file records (metadata or PyTorch's "config" or "args"; config.json beside a
// file in diffusers' layout); o overrides. What is then still open is taken from
// the authors' models: their heads for their widths, an input of 32×32. The
// position embedding is computed where the file has none (Computed).
func InferDiT(f *File, o MAROptions) (*DiTConfig, error) {
	recorded, err := f.recordedConfig()
	if err != nil {
		return nil, err
	}
	if recorded == nil {
		if recorded, err = f.diffusersDiTConfig(); err != nil {
			return nil, err
		}
	}
	c := ditDefaults()
	dim := func(name string, rank, axis int) int {
		info, ok := f.Tensor(name)
		switch {
		case err != nil:
		case !ok:
			err = badFile(f.path, "not a DiT: no tensor %s", quote(f.stored(name)))
		case len(info.Shape) != rank || info.Shape[axis] < 1:
			err = badFile(f.path, "not a DiT: tensor %s has shape %s", quote(f.stored(name)), engine.ShapeString(info.Shape))
		default:
			return info.Shape[axis]
		}
		return 0
	}
	c.HiddenSize = dim("x_embedder.proj.weight", 4, 0)
	c.InChannels = dim("x_embedder.proj.weight", 4, 1)
	c.PatchSize = dim("x_embedder.proj.weight", 4, 2)
	c.NumClasses = dim(ditTable, 2, 0) - 1
	hidden, out := dim("blocks.0.mlp.fc1.weight", 2, 0), dim(ditLast, 2, 0)
	tokens := 0
	if f.tensors[ditPos] != nil {
		tokens = dim(ditPos, 3, 1)
	}
	if err != nil {
		return nil, err
	}
	c.Depth = f.count("blocks.%d.mlp.fc1.weight")
	if c.MLPRatio = float64(hidden) / float64(c.HiddenSize); c.Hidden() != hidden { // the quotient was rounded down
		c.MLPRatio = math.Nextafter(c.MLPRatio, math.Inf(1))
	}
	if out == c.TokenDim() {
		return nil, engine.Errorf("open "+f.path, engine.Unsupported, "a DiT that predicts noise alone (learn_sigma false); only those with a learned variance are supported")
	}
	for _, s := range ditSizes {
		if s.width == c.HiddenSize {
			c.NumHeads = s.heads
		}
	}
	shapes := c
	if err := setFields(&c, recorded); err != nil {
		return nil, badFile(f.path, "config: %w", err)
	}
	if o.Heads > 0 {
		c.NumHeads = o.Heads
	}
	if o.VAEStride > 0 {
		c.VAEStride = o.VAEStride
	}
	if c.NumHeads == 0 {
		return nil, engine.Errorf("open "+f.path, engine.Invalid, "the file does not say how many attention heads the width %d has; pass --heads", c.HiddenSize)
	}
	if tokens > 0 {
		side := int(math.Round(math.Sqrt(float64(tokens))))
		if side*side != tokens {
			return nil, badFile(f.path, "%d tokens are not a square grid", tokens)
		}
		shapes.InputSize = side * c.PatchSize
		if recorded["input_size"] == nil {
			c.InputSize = shapes.InputSize
		}
	} else {
		shapes.InputSize = c.InputSize
	}
	if err := c.Validate(); err != nil {
		return nil, badFile(f.path, "%w", err)
	}
	for _, x := range []struct {
		field    string
		got, had int
	}{
		{"input_size", c.InputSize, shapes.InputSize}, {"patch_size", c.PatchSize, shapes.PatchSize}, {"in_channels", c.InChannels, shapes.InChannels},
		{"hidden_size", c.HiddenSize, shapes.HiddenSize}, {"depth", c.Depth, shapes.Depth}, {"mlp_ratio · hidden_size", c.Hidden(), hidden},
		{"num_classes", c.NumClasses, shapes.NumClasses},
	} {
		if x.got != x.had {
			return nil, badFile(f.path, "the config says %s = %d, the tensors say %d", x.field, x.got, x.had)
		}
	}
	if tokens == 0 {
		f.computed(ditPos, []int{1, c.Tokens(), c.HiddenSize}, SinCos2D(c.HiddenSize, c.Grid()))
	}
	return &c, nil
}

// SinCos2D is DiT's fixed position embedding of grid² tokens, [grid², dim]: for
// row i and column j, with ω_k = 10000^(−k/(dim/4)), the column comes first
// (models.py get_2d_sincos_pos_embed):
//
//	sin jω_0 … sin jω_{dim/4−1}, cos jω …, sin iω …, cos iω …
func SinCos2D(dim, grid int) []float32 {
	q := dim / 4
	out := make([]float32, grid*grid*dim)
	for k := range q {
		omega := 1 / math.Pow(10000, float64(k)/float64(q))
		for p := range grid * grid {
			si, ci := math.Sincos(float64(p/grid) * omega)
			sj, cj := math.Sincos(float64(p%grid) * omega)
			for part, v := range []float64{sj, cj, si, ci} {
				out[p*dim+part*q+k] = float32(v)
			}
		}
	}
	return out
}
