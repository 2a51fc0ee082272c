package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/plan"
)

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "show what a checkpoint holds",
		UsageText: "margo inspect FILE [flags]\nmargo inspect --config NAME [flags]",
		Description: `FILE is a safetensors file or a PyTorch checkpoint (.pth, .pt, .ckpt), told apart by content. Nothing in it is executed. With --config no weights are needed: it counts the parameters of a published model, or of a MAR that you describe in JSON by the authors' argument names.

A model whose tensors are missing, misshapen or too many is reported with exit code 3 after what could be shown.

Examples:
  margo inspect checkpoint-last.pth
  margo inspect models/fashion-mar.safetensors --tensors
  margo inspect --config mar-large
  margo inspect --config dit-xl/2`,
		Flags: slices.Concat([]cli.Flag{
			&cli.StringFlag{Name: "config", Category: "Model", Usage: "`NAME`|describe a configuration without weights: mar-base, mar-large, mar-huge, ar-raster-base and so on, dit-xl/2 (s, b, l, xl; 2, 4, 8), kl-16, kl-8, or a JSON file of a MAR"},
		}, shapeFlags(), []cli.Flag{
			&cli.BoolFlag{Name: "tensors", Category: "Output", Usage: "list all tensors: name, dtype, shape"},
			jsonFlag(),
		}),
		Action: inspect,
	}
}

// description is what inspect prints.
type description struct {
	File        string               `json:"file,omitempty"`
	Format      string               `json:"format,omitempty"`
	State       string               `json:"state,omitempty"`
	FileBytes   int64                `json:"file_bytes,omitempty"`
	TensorBytes int64                `json:"tensor_bytes,omitempty"`
	DTypes      map[string]int       `json:"dtypes,omitempty"` // tensors of each
	Kind        string               `json:"kind,omitempty"`
	Config      any                  `json:"config,omitempty"`
	Sampling    *checkpoint.Sampling `json:"sampling,omitempty"`
	LatentScale float64              `json:"latent_scale,omitempty"`
	Classes     []string             `json:"class_names,omitempty"`
	Tokenizer   string               `json:"tokenizer,omitempty"`
	Tokens      *tokenGrid           `json:"tokens,omitempty"`
	Parts       []part               `json:"parameters_per_part,omitempty"`
	Params      int64                `json:"parameters"`
	Problem     string               `json:"problem,omitempty"`
	Tensors     []tensorLine         `json:"tensors,omitempty"`
	model       *checkpoint.Model
}

type part struct {
	Name   string `json:"part"`
	Params int64  `json:"parameters"`
}

type tokenGrid struct {
	Rows     int `json:"rows"`
	Cols     int `json:"columns"`
	Channels int `json:"channels"`
}

type tensorLine struct {
	Name  string `json:"name"`
	DType string `json:"dtype"`
	Shape []int  `json:"shape"`
}

func inspect(c *cli.Context) error {
	var d *description
	var err error
	switch {
	case c.IsSet("config") && c.NArg() == 0:
		for _, f := range shapeFlags() {
			if name := f.Names()[0]; c.IsSet(name) {
				return usagef("%s is about a file, and --config needs none: leave it out", dashed(name))
			}
		}
		d, err = describeConfig(c.String("config"))
	case !c.IsSet("config") && c.NArg() == 1:
		d, err = describeFile(c, c.Args().First())
	default:
		return usagef("name one file, or --config and a configuration: margo inspect FILE")
	}
	if d == nil {
		return err
	}
	if !c.Bool("tensors") {
		d.Tensors = nil
	}
	if err != nil {
		d.Problem = err.Error()
	}
	if c.Bool("json") {
		if e := printJSON(c.App.Writer, d); e != nil {
			return e
		}
		return err
	}
	d.print(c.App.Writer)
	return err
}

// describeFile describes what it can: an error beside a description tells what
// is wrong with the file.
func describeFile(c *cli.Context, path string) (*description, error) {
	shape, open, err := shapeOptions(c)
	if err != nil {
		return nil, err
	}
	f, err := checkpoint.Open(path, open)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := &description{File: path, Format: f.Format(), State: f.State(), DTypes: map[string]int{}}
	if s, err := os.Stat(path); err == nil {
		d.FileBytes = s.Size()
	}
	for _, name := range f.Names() {
		t, _ := f.Tensor(name)
		d.TensorBytes += t.Bytes()
		d.DTypes[string(t.DType)]++
		d.Params += t.Elems()
		d.Tensors = append(d.Tensors, tensorLine{f.Stored(t.Name), string(t.DType), t.Shape})
	}
	m, err := checkpoint.Describe(f, shape)
	if err != nil {
		return d, err
	}
	d.describe(m)
	_, err = checkpoint.Check(f, m.Params(), m.Ignorable)
	return d, err
}

// namedKL are the tokenizers that have a name.
var namedKL = map[string]func() *checkpoint.KLConfig{"kl-16": checkpoint.KL16, "kl-8": checkpoint.KL8}

// configNames lists the configurations that have a name.
func configNames() []string {
	return slices.Concat(checkpoint.MARNames(), checkpoint.VariantNames(), checkpoint.DiTNames(), []string{"kl-16", "kl-8"})
}

func describeConfig(name string) (*description, error) {
	m := &checkpoint.Model{Kind: checkpoint.KindMAR}
	if checkpoint.Named(name) {
		m.MAR, _ = checkpoint.NamedMAR(name)
	} else if slices.Contains(checkpoint.DiTNames(), name) {
		m.Kind = checkpoint.KindDiT
		m.DiT, _ = checkpoint.NamedDiT(name)
	} else if kl, ok := namedKL[name]; ok {
		m.Kind, m.MAR, m.KL = checkpoint.KindKL, nil, kl()
	} else {
		if names := configNames(); !exists(name) && !strings.ContainsAny(name, "./") {
			return nil, usagef("--config: %q is neither a file nor one of %s%s", name, strings.Join(names, ", "), didYouMean(suggest(name, names)))
		}
		text, err := readText(name, 1<<20)
		if err != nil {
			return nil, filef("%w", err)
		}
		if m.MAR, err = checkpoint.ParseMAR(string(text)); err != nil {
			return nil, filef("%s: %w", name, err)
		}
	}
	d := &description{}
	d.describe(m)
	for _, p := range m.Params() {
		d.Tensors = append(d.Tensors, tensorLine{p.Name, "", p.Shape})
	}
	return d, nil
}

func (d *description) describe(m *checkpoint.Model) {
	d.model, d.Kind, d.LatentScale, d.Tokenizer, d.Classes = m, m.Kind, m.LatentScale, m.Tokenizer, m.ClassNames
	specs := m.Params()
	d.Params = checkpoint.CountParams(specs, "")
	names := []string{"embeddings"}
	if m.Kind == checkpoint.KindMAR {
		d.Config = m.MAR
		if m.Sampling.Iters > 0 {
			d.Sampling = &m.Sampling
		}
		d.Tokens = &tokenGrid{m.MAR.Grid(), m.MAR.Grid(), m.MAR.TokenDim()}
		names = []string{"embeddings", "encoder", "decoder", "diffusion head"}
		if m.MAR.HeadKind() != checkpoint.DiffusionHead {
			names[3] = "head"
		}
		if m.MAR.IsCausal() {
			names = slices.Concat([]string{"embeddings", "transformer"}, names[3:])
		}
	} else if m.Kind == checkpoint.KindDiT {
		d.Config = m.DiT
		if m.Sampling.Steps != "" {
			d.Sampling = &m.Sampling
		}
		d.Tokens = &tokenGrid{m.DiT.Grid(), m.DiT.Grid(), m.DiT.TokenDim()}
		names = []string{"embeddings", "blocks", "final layer"}
	} else {
		d.Config = m.KL
		names = []string{"encoder", "decoder"}
		if m.Kind == checkpoint.KindVQ {
			names = append(names, "codebook")
		}
	}
	sums := map[string]int64{}
	for _, p := range specs {
		sums[partOf(m, p.Name)] += p.Elems()
	}
	for _, n := range names {
		d.Parts = append(d.Parts, part{n, sums[n]})
	}
}

// partOf assigns a tensor to a part of its model. A MAR's embeddings are the
// class and position tables, the mask token and the dummy class; projections
// belong to the transformer they feed, of which a causal model has one. quant_conv ends the tokenizer's encoder,
// post_quant_conv begins its decoder.
func partOf(m *checkpoint.Model, name string) string {
	kind := m.Kind
	has := func(prefixes ...string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) })
	}
	switch {
	case kind == checkpoint.KindDiT && has("blocks."):
		return "blocks"
	case kind == checkpoint.KindDiT && has("final_layer."):
		return "final layer"
	case kind == checkpoint.KindDiT:
		return "embeddings"
	case kind == checkpoint.KindVQ && has("quantize."):
		return "codebook"
	case kind != checkpoint.KindMAR && has("encoder.", "quant_conv."):
		return "encoder"
	case kind != checkpoint.KindMAR:
		return "decoder"
	case has("diffloss."):
		return "diffusion head"
	case has("celoss.", "l2loss.", "gmmloss."):
		return "head"
	case m.MAR.IsCausal() && has("z_proj", "decoder_blocks.", "decoder_norm."):
		return "transformer"
	case has("encoder_blocks.", "encoder_norm.", "z_proj"):
		return "encoder"
	case has("decoder_blocks.", "decoder_norm.", "decoder_embed."):
		return "decoder"
	}
	return "embeddings"
}

func (d *description) print(w io.Writer) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-14s %s\n", label, oneLine(fmt.Sprintf(format, args...)))
	}
	if d.File != "" {
		line("file", "%s", d.File)
		state := ""
		if d.State != "" {
			state = ", weights of " + d.State
		}
		line("format", "%s, %s on disk%s", d.Format, plan.Size(d.FileBytes), state)
		var types []string
		for t, n := range d.DTypes {
			types = append(types, fmt.Sprintf("%d × %s", n, t))
		}
		slices.Sort(types)
		line("tensors", "%s, %s", strings.Join(types, ", "), plan.Size(d.TensorBytes))
	}
	if m := d.model; m != nil {
		switch {
		case m.MAR != nil:
			c := m.MAR
			what := "mar: masked autoregressive model"
			if c.IsCausal() {
				what = "mar: causal autoregressive model, one stack with a KV cache"
			}
			line("kind", "%s, %s head", what, c.HeadKind())
			line("images", "%d×%d pixels, %d classes", c.ImgSize, c.ImgSize, c.ClassNum)
			line("tokens", "%d×%d of %d channels (tokenizer stride %d, patch %d), buffer %d", c.Grid(), c.Grid(), c.TokenDim(), c.VAEStride, c.PatchSize, c.BufferSize)
			if c.IsCausal() {
				line("attention", "causal, trained in %s order", c.TrainedOrder())
			}
			if !c.IsCausal() {
				line("encoder", "%d blocks, width %d, %d heads", c.EncoderDepth, c.EncoderEmbedDim, c.EncoderNumHeads)
			}
			trunk := "decoder"
			if c.IsCausal() {
				trunk = "transformer"
			}
			line(trunk, "%d blocks, width %d, %d heads", c.DecoderDepth, c.DecoderEmbedDim, c.DecoderNumHeads)
			switch c.HeadKind() {
			case checkpoint.DiffusionHead:
				line("diffusion head", "%d blocks, width %d", c.DiffLossD, c.DiffLossW)
			case checkpoint.CategoricalHead:
				line("head", "categorical, %d codes", c.CodebookSize)
			case checkpoint.GMMHead:
				line("head", "mixture of %d Gaussians", c.Mixtures)
			default:
				line("head", "%s", c.HeadKind())
			}
		case m.DiT != nil:
			c := m.DiT
			line("kind", "dit: diffusion transformer over all tokens")
			if m.Layout != "" {
				line("layout", "%s: names are translated", m.Layout)
			}
			line("images", "%d×%d pixels, %d classes", m.PixelSize(), m.PixelSize(), c.NumClasses)
			line("tokens", "%d×%d of %d channels (tokenizer stride %d, patch %d)", c.Grid(), c.Grid(), c.TokenDim(), c.VAEStride, c.PatchSize)
			line("blocks", "%d, width %d, %d heads", c.Depth, c.HiddenSize, c.NumHeads)
		case m.KL != nil:
			c := m.KL
			line("kind", "%s", map[bool]string{
				false: "kl: tokenizer with a continuous latent (KL autoencoder)",
				true:  "vq: tokenizer with a codebook (vector-quantised autoencoder)",
			}[c.NEmbed > 0])
			if m.Layout != "" {
				line("layout", "%s: names are translated", m.Layout)
			}
			if c.NEmbed > 0 {
				line("codebook", "%d codes", c.NEmbed)
			}
			line("latents", "%d channels, stride %d", c.EmbedDim, c.Stride())
			line("layers", "channels %d × %v, %d blocks per level", c.Ch, c.ChMult, c.NumResBlocks)
		}
		if d.LatentScale > 0 {
			line("latent scale", "%g", d.LatentScale)
		}
		if d.Tokenizer != "" {
			line("tokenizer", "%s", d.Tokenizer)
		}
		if s := d.Sampling; s != nil && s.Steps != "" {
			line("sampling", "%s steps of %s, eta %g, cfg %g on channels %s, temperature %g", s.Steps, s.Sampler, s.Eta, s.CFG, s.CFGChannels, s.Temperature)
		} else if s != nil {
			line("sampling", "%d iterations × %d head steps up to timestep %d, cfg %g %s, temperature %g", s.Iters, s.HeadSteps, s.MaxTimestep, s.CFG, s.CFGSchedule, s.Temperature)
		}
		if n := len(d.Classes); n > 0 {
			shown := make([]string, 0, 12)
			for i, name := range d.Classes[:min(n, 12)] {
				shown = append(shown, fmt.Sprintf("%d %s", i, name))
			}
			if n > len(shown) {
				shown = append(shown, "…")
			}
			line("classes", "%s", strings.Join(shown, ", "))
		}
	}
	fmt.Fprintf(w, "parameters\n")
	for _, p := range d.Parts {
		fmt.Fprintf(w, "  %-14s %15s\n", p.Name, thousands(p.Params))
	}
	fmt.Fprintf(w, "  %-14s %15s\n", "total", thousands(d.Params))
	for _, t := range d.Tensors {
		fmt.Fprintf(w, "%-4s %-16s %s\n", t.DType, engine.ShapeString(t.Shape), oneLine(t.Name))
	}
}

// thousands writes 207924768 as 207,924,768.
func thousands(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
