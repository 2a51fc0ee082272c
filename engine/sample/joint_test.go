package sample

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/dit"
	"margo/engine/ref"
)

// tinyJoint is a DiT of 9 tokens of 2×2 latent positions, with random weights.
func tinyJoint(t *testing.T, dev engine.Device, d engine.DType) *dit.Model {
	t.Helper()
	cfg, err := checkpoint.NamedDiT("dit-s/2")
	if err != nil {
		t.Fatal(err)
	}
	cfg.InputSize, cfg.VAEStride, cfg.HiddenSize, cfg.Depth, cfg.NumHeads, cfg.NumClasses = 6, 2, 16, 2, 2, 4
	m, err := dit.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	randomWeights(t, engine.Params(m), dev, d, 5)
	return m
}

// The joint process with every sampler, guidance and tokenizer: finite images of the
// right kind, the same alone and in a batch, other ones for another seed. (A VQ
// tokenizer decodes its latents before quantisation, P44.)
func TestJointCombinations(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m := tinyJoint(t, dev, engine.F32)
	respacings := []string{"4", "ddim4", "2,1"}
	if testing.Short() { // under the race detector
		respacings = respacings[:1]
	}
	for _, tok := range tokenizers {
		e, err := OpenDiT(m, tinyTokenizer(t, dev, engine.F32, tok), dev, Options{Compute: engine.F32})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		for _, sampler := range []string{DDPM, DDIM} {
			for _, guided := range []string{"none", GuideThree, GuideAll} {
				for _, steps := range respacings {
					r := Defaults()
					r.N, r.Batch, r.Labels, r.Seed, r.Steps, r.Sampler = 3, 3, []int{3, -1, 1}, 11, steps, sampler
					if guided != "none" {
						r.CFG, r.CFGChannels = 2, guided
					}
					name := fmt.Sprintf("%s/%s/%s/%s", tok, sampler, guided, steps)
					all := collect(t, e, r)
					for i, im := range all {
						if len(im.Tokens) != 9*16 || im.Codes != nil || (tok != "none") != (im.Pixels != nil) {
							t.Fatalf("%s: image %d has %d tokens, %d codes, %d pixels", name, i, len(im.Tokens), len(im.Codes), len(im.Pixels))
						}
						for _, v := range append(append([]float32(nil), im.Tokens...), im.Pixels...) {
							if v-v != 0 {
								t.Fatalf("%s: image %d is not finite", name, i)
							}
						}
						one := r
						one.N, one.Batch, one.FirstIndex = 1, 1, i
						if alone := collect(t, e, one); !alike(alone[0], im) {
							t.Errorf("%s: image %d is another when it is made alone", name, i)
						}
					}
					if r.Seed++; alike(collect(t, e, r)[0], all[0]) {
						t.Errorf("%s: the seed has no influence", name)
					}
				}
			}
		}
	}
}

// What belongs to one process is refused by the other, in words.
func TestJointRefusals(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e, err := OpenDiT(tinyJoint(t, dev, engine.F32), nil, dev, Options{Compute: engine.F32})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for want, change := range map[string]func(*Request){
		"raster order, but a DiT denoises all": func(r *Request) { r.Order = RasterOrder },
		"confidence order, but a DiT":          func(r *Request) { r.Order = ConfidenceOrder },
		"top-k":                                func(r *Request) { r.TopK = 2 },
		"sampler of codes":                     func(r *Request) { r.CodeSampler = Gumbel },
		"top-p":                                func(r *Request) { r.TopP = 0.5 },
		"nothing can be kept":                  func(r *Request) { r.Known = &Known{} },
		`sampler "euler"`:                      func(r *Request) { r.Sampler = "euler" },
		"eta 0.5 is for the sampler":           func(r *Request) { r.Eta = 0.5 },
		`guidance of channels "4"`:             func(r *Request) { r.CFGChannels = "4" },
	} {
		r := Defaults()
		r.Steps = "4"
		change(&r)
		if _, err := e.Estimate(r); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("refused with %v, want %q", err, want)
		}
	}
}
