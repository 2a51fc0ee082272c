package main

import (
	"encoding/binary"
	"encoding/json"
	"io"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"margo/engine/checkpoint"
)

// randomMAR writes a MAR with random weights for tokens of a tokenizer with stride 2.
func randomMAR(t *testing.T, name string, change func(*checkpoint.MARConfig)) string {
	t.Helper()
	cfg, err := checkpoint.NamedMAR("mar-base")
	if err != nil {
		t.Fatal(err)
	}
	cfg.ImgSize, cfg.VAEStride, cfg.EncoderEmbedDim, cfg.DecoderEmbedDim, cfg.EncoderNumHeads, cfg.DecoderNumHeads = 16, 2, 32, 32, 2, 2
	cfg.EncoderDepth, cfg.DecoderDepth, cfg.ClassNum, cfg.BufferSize, cfg.DiffLossD, cfg.DiffLossW, cfg.VAEEmbedDim = 1, 1, 4, 2, 1, 32, 8
	change(cfg)
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var entries []checkpoint.Entry
	for _, p := range cfg.Params() {
		entries = append(entries, checkpoint.Entry{Info: checkpoint.Info{Name: p.Name, DType: checkpoint.F32, Shape: p.Shape}, Write: func(w io.Writer) error {
			b := make([]byte, 0, 4*p.Elems())
			for range p.Elems() {
				b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(rng.NormFloat64()*0.2)))
			}
			_, err := w.Write(b)
			return err
		}})
	}
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name+".safetensors")
	if err := checkpoint.Save(t.Context(), path, entries, map[string]string{"kind": "mar", "config": string(text), "latent_scale": "1"}); err != nil {
		t.Fatal(err)
	}
	return path
}

// A model of codes completes a known image: what is kept is what the tokenizer makes
// of the image, and only the rest depends on the seed.
func TestInpaintCodes(t *testing.T) {
	const vq = goldens + "vq_ldm.safetensors"
	model := randomMAR(t, "codes", func(c *checkpoint.MARConfig) {
		c.Head, c.CodebookSize, c.DiffLossD, c.DiffLossW = checkpoint.CategoricalHead, 256, 0, 0
	})
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	run := func(out string, more ...string) {
		t.Helper()
		ok(t, append([]string{"sample", "--model", model, "--tokenizer", vq, "--iters", "4", "-n", "1", "--quiet", "-o", at(out)}, more...)...)
	}
	run("source.png", "--seed", "3")
	all, none := writeGray(t, dir, 255), at("half.png")
	run("free.png", "--image", at("source.png"), "--mask", all)
	run("again.png")
	if !slices.Equal(pixels(t, at("free.png")).Pix, pixels(t, at("again.png")).Pix) {
		t.Error("an image that is masked completely has an influence")
	}
	run("sure.png", "--order", "confidence", "--choice-temperature", "0", "--tile", "8")
	if p := parameters(t, at("sure.png")); p["choice_temperature"] != 0.0 || p["tile"] != 8.0 || p["overlap"] != 2.0 {
		t.Errorf("what made the image is not recorded: %v", p)
	}
	writeMask(t, none, 16, 8)
	run("tiles.png", "--image", at("source.png"), "--mask", none, "--tile", "8")
	run("a.png", "--image", at("source.png"), "--mask", none, "--seed", "1")
	run("b.png", "--image", at("source.png"), "--mask", none, "--seed", "2")
	a, b := pixels(t, at("a.png")), pixels(t, at("b.png"))
	if slices.Equal(a.Pix, b.Pix) {
		t.Error("the filled part is the same for two seeds")
	}
	code, _, msg := margo("sample", "--model", model, "--tokenizer", vq, "--iters", "4", "-n", "1", "--image", at("source.png"), "--mask", none, "-o", at("c.png"))
	if code != 0 || !strings.Contains(msg, "filling 32 of 64 tokens") {
		t.Errorf("exit %d: %s", code, msg)
	}
}

// Every variant can be sampled from the command line, by raster and random order, with
// the settings of its head and no others.
func TestVariantFlags(t *testing.T) {
	const vq = goldens + "vq_ldm.safetensors"
	causal := func(c *checkpoint.MARConfig) { c.Attention, c.EncoderDepth = checkpoint.Causal, 0 }
	codes := func(c *checkpoint.MARConfig) {
		c.Head, c.CodebookSize, c.DiffLossD, c.DiffLossW = checkpoint.CategoricalHead, 256, 0, 0
	}
	ar := randomMAR(t, "ar", causal)
	arCodes := randomMAR(t, "ar-codes", func(c *checkpoint.MARConfig) { causal(c); codes(c) })
	l2 := randomMAR(t, "l2", func(c *checkpoint.MARConfig) { c.Head, c.DiffLossD, c.DiffLossW = checkpoint.L2Head, 0, 0 })
	out := filepath.Join(t.TempDir(), "x.png")
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{0, "", []string{ar, "--order", "raster", "--head-steps", "2", "--max-timestep", "700", "--cfg", "2"}},
		{0, "", []string{ar, "--order", "random", "--head-steps", "2", "--max-timestep", "700"}},
		{0, "", []string{arCodes, "--order", "random", "--top-k", "5", "--top-p", "0.9", "--code-sampler", "inverse", "--cfg", "1.5"}},
		{0, "", []string{l2, "--iters", "3"}},
		{2, "one token at a time", []string{ar, "--iters", "8"}},
		{2, "confidence order with causal", []string{arCodes, "--order", "confidence"}},
		{2, "chooses among codes, and this model has the l2 head", []string{l2, "--top-k", "3"}},
		{2, "--order", []string{ar, "--order", "spiral"}},
		{2, "--top-p", []string{arCodes, "--top-p", "2"}},
		{2, "--code-sampler", []string{arCodes, "--code-sampler", "dice"}},
		{2, "--head-steps is of the diffusion head, and this model has the l2 head", []string{l2, "--head-steps", "3"}},
		{2, "--choice-temperature is for --order confidence", []string{ar, "--choice-temperature", "1"}},
		{2, "--latent-scale: the tokens of this model are codes", []string{arCodes, "--latent-scale", "2"}},
	} {
		code, _, msg := margo(append([]string{"sample", "--tokenizer", vq, "-n", "2", "-o", out, "--model"}, c.args...)...)
		if code != c.code || !strings.Contains(msg, c.want) {
			t.Errorf("%v: exit %d, want %d with %q: %s", c.args[1:], code, c.code, c.want, msg)
		}
	}
	for _, c := range [][2]string{{ar, "causal autoregressive model"}, {arCodes, "categorical, 256 codes"}, {l2, "l2 head"}} {
		if s := ok(t, "inspect", c[0]); !strings.Contains(s, c[1]) {
			t.Errorf("inspect does not say %q:\n%s", c[1], s)
		}
	}
}
