package checkpoint

import (
	"errors"
	"strings"
	"testing"

	"margo/engine"
)

// The counts of the paper's Tables 3, 4 and 6, to the last parameter.
func TestParameterCounts(t *testing.T) {
	with := func(name string, d, w, img int) *MARConfig {
		c, err := NamedMAR(name)
		if err != nil {
			t.Fatal(err)
		}
		if d > 0 {
			c.DiffLossD, c.DiffLossW = d, w
		}
		c.ImgSize = img
		return c
	}
	for _, x := range []struct {
		name         string
		d, w, img    int
		trunk, head  int64
		total        int64
		tensors      int
		tokens, dims int
	}{
		{"mar-base", 0, 0, 256, 172174848, 35749920, 207924768, 364, 256, 16},
		{"mar-large", 0, 0, 256, 406095872, 72230432, 478326304, 476, 256, 16},
		{"mar-huge", 0, 0, 256, 791196160, 151206944, 942403104, 604, 256, 16},
		{"mar-large", 3, 256, 256, 406095872, 1526560, 407622432, 0, 256, 16},
		{"mar-large", 3, 512, 256, 406095872, 5412384, 411508256, 0, 256, 16},
		{"mar-large", 3, 1024, 256, 406095872, 20261920, 426357792, 0, 256, 16},
		{"mar-large", 3, 1536, 256, 406095872, 44548640, 450644512, 0, 256, 16},
		{"mar-large", 0, 0, 512, 408455168, 72230432, 480685600, 476, 1024, 16},
	} {
		c := with(x.name, x.d, x.w, x.img)
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		specs := c.Params()
		head, total := CountParams(specs, "diffloss."), CountParams(specs, "")
		if head != x.head || total-head != x.trunk || total != x.total {
			t.Errorf("%s %d×%d: trunk %d, head %d, total %d", x.name, x.d, x.w, total-head, head, total)
		}
		if x.tensors > 0 && len(specs) != x.tensors {
			t.Errorf("%s: %d tensors, published files have %d", x.name, len(specs), x.tensors)
		}
		if c.Tokens() != x.tokens || c.TokenDim() != x.dims {
			t.Errorf("%s: %d tokens of %d", x.name, c.Tokens(), c.TokenDim())
		}
	}
	k := KL16()
	if err := k.Validate(); err != nil {
		t.Fatal(err)
	}
	if n := CountParams(k.Params(), ""); n != 66456019 || k.Stride() != 16 {
		t.Errorf("KL-16 has %d parameters, stride %d", n, k.Stride())
	}
}

func TestNames(t *testing.T) {
	if _, err := NamedMAR("mar-giant"); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "mar-huge") {
		t.Error(err)
	}
	for _, n := range MARNames() {
		if _, err := NamedMAR(n); err != nil {
			t.Error(err)
		}
	}
}

func TestValidateNamesTheField(t *testing.T) {
	for field, breakIt := range map[string]func(*MARConfig){
		"encoder_num_heads":  func(c *MARConfig) { c.EncoderNumHeads = 7 },
		"decoder_num_heads":  func(c *MARConfig) { c.DecoderNumHeads = 0 },
		"img_size":           func(c *MARConfig) { c.ImgSize = 8 },
		"mlp_ratio":          func(c *MARConfig) { c.MLPRatio = -1 },
		"buffer_size":        func(c *MARConfig) { c.BufferSize = -1 },
		"diffloss_d":         func(c *MARConfig) { c.DiffLossD = 1 << 30 },
		"layernorm_eps":      func(c *MARConfig) { c.LayerNormEps = 0 },
		"num_sampling_steps": func(c *MARConfig) { c.NumSamplingSteps = 1001 },
		"attn_dropout":       func(c *MARConfig) { c.AttnDropout = 2 },
	} {
		c, _ := NamedMAR("mar-base")
		breakIt(c)
		if err := c.Validate(); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	for field, breakIt := range map[string]func(*KLConfig){
		"ch_mult":        func(c *KLConfig) { c.ChMult = nil },
		"ch · ch_mult":   func(c *KLConfig) { c.Ch = 20 },
		"num_res_blocks": func(c *KLConfig) { c.NumResBlocks = 0 },
		"attention":      func(c *KLConfig) { c.DecoderAttn = []int{5} },
	} {
		c := KL16()
		breakIt(c)
		if err := c.Validate(); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

// shapeFile is a File with tensors but no data, for inference from shapes.
func shapeFile(specs []ParamSpec, meta map[string]string) *File {
	f := &File{path: "shapes", format: "safetensors", region: memRegion(nil), tensors: map[string]*tensor{}, meta: meta}
	for _, p := range specs {
		f.tensors[p.Name] = &tensor{Info: Info{p.Name, F32, p.Shape}}
	}
	return f
}

func TestInferMAR(t *testing.T) {
	for _, name := range MARNames() {
		want, _ := NamedMAR(name)
		got, err := InferMAR(shapeFile(want.Params(), nil), MAROptions{})
		if err != nil || *got != *want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		m, err := Describe(shapeFile(want.Params(), nil), MAROptions{})
		if err != nil || m.Sampling.CFG < 2.9 || m.Sampling.MaxTimestep != 999 {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
	odd := func() *MARConfig { // widths nobody published, patches of 2
		c, _ := NamedMAR("mar-base")
		c.EncoderEmbedDim, c.DecoderEmbedDim, c.EncoderNumHeads, c.DecoderNumHeads = 96, 192, 3, 6
		c.EncoderDepth, c.DecoderDepth, c.MLPRatio, c.ClassNum, c.BufferSize = 2, 3, 3.3, 7, 5
		c.PatchSize, c.VAEEmbedDim, c.VAEStride, c.ImgSize = 2, 4, 8, 128
		c.DiffLossD, c.DiffLossW = 1, 40
		return c
	}
	specs := odd().Params()
	if _, err := InferMAR(shapeFile(specs, nil), MAROptions{}); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "--heads") {
		t.Error(err)
	}
	if _, err := InferMAR(shapeFile(specs, nil), MAROptions{Heads: 3}); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "--patch-size") {
		t.Error(err)
	}
	c, err := InferMAR(shapeFile(specs, nil), MAROptions{Heads: 3, PatchSize: 2, VAEStride: 8})
	if err != nil || c.ImgSize != 128 || c.VAEEmbedDim != 4 || c.PatchSize != 2 || c.EncoderHidden() != 316 || c.DecoderHidden() != 633 {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := InferMAR(shapeFile(specs, nil), MAROptions{Heads: 3, PatchSize: 3}); !errors.Is(err, engine.Invalid) {
		t.Error(err)
	}
	// Settings as the authors' Namespace and our metadata have them.
	text := `{"encoder_num_heads": "3", "decoder_num_heads": 6.0, "patch_size": 2, "vae_embed_dim": "4", "vae_stride": 8, "mlp_ratio": "3.3", "num_sampling_steps": "25", "model": null, "batch_size": 64}`
	c, err = InferMAR(shapeFile(specs, map[string]string{"config": text}), MAROptions{})
	if err != nil || c.DecoderNumHeads != 6 || c.NumSamplingSteps != 25 || c.ImgSize != 128 {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []string{`{"encoder_num_heads": 5}`, `{"encoder_depth": 9, "encoder_num_heads": 3, "decoder_num_heads": 6, "patch_size": 2}`,
		`{"patch_size": "x"}`, `{"patch_size": true}`, `{"patch_size": 1e300}`, `{"layernorm_eps": "NaN"}`, `[]`, `null`, `{`, `{} {}`, strings.Repeat(`{"a":`, 20000)} {
		if _, err := InferMAR(shapeFile(specs, map[string]string{"config": bad}), MAROptions{}); err == nil {
			t.Errorf("config %.60s was accepted", bad)
		}
	}
}

func TestPixelTokens(t *testing.T) { // P49: 4×4 pixels of 3 channels for each token
	c, _ := NamedMAR("mar-large")
	c.ImgSize, c.VAEStride, c.PatchSize, c.VAEEmbedDim = 64, 1, 4, 3
	if c.Tokens() != 256 || c.TokenDim() != 48 {
		t.Fatalf("%d tokens of %d", c.Tokens(), c.TokenDim())
	}
	got, err := InferMAR(shapeFile(c.Params(), nil), MAROptions{PatchSize: 4, VAEStride: 1})
	if err != nil || *got != *c {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestInferKL(t *testing.T) {
	ldm := KL16()
	ldm.DecoderAttn = []int{4} // latent diffusion's decoder
	for _, want := range []*KLConfig{KL16(), ldm} {
		extra := append(want.Params(), ParamSpec{"loss.logvar", []int{}}, ParamSpec{"loss.discriminator.main.0.weight", []int{64, 3, 4, 4}})
		f := shapeFile(extra, nil)
		got, err := InferKL(f)
		if err != nil || !sameTokenizer(got, want) || len(got.DecoderAttn) != len(want.DecoderAttn) {
			t.Fatalf("%+v, %v", got, err)
		}
		ignored, err := Check(f, got.Params(), IgnorableKL)
		if err != nil || len(ignored) != 2 {
			t.Errorf("%v, %v", ignored, err)
		}
		if _, err := Check(f, got.Params(), nil); err == nil || !strings.Contains(err.Error(), `unexpected "loss.logvar"`) {
			t.Error(err)
		}
	}
}

func TestCheckNamesTensors(t *testing.T) {
	c, _ := NamedMAR("mar-base")
	specs := c.Params()
	f := shapeFile(specs, nil)
	delete(f.tensors, "decoder_norm.bias")
	f.tensors["z_proj.weight"].Shape = []int{16, 768}
	f.tensors["fake_latent"].DType = I64
	f.tensors["optimizer.step"] = &tensor{Info: Info{"optimizer.step", F32, nil}}
	_, err := Check(f, specs, nil)
	if !errors.Is(err, engine.IO) {
		t.Fatal(err)
	}
	for _, s := range []string{`missing "decoder_norm.bias" [768]`, `"z_proj.weight" has shape [16,768] instead of [768,16]`, `"fake_latent" is I64`, `unexpected "optimizer.step"`, "4 of 364"} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q is not in: %v", s, err)
		}
	}
}

func TestSamplingRanges(t *testing.T) {
	ok := Sampling{Iters: 64, HeadSteps: 100, MaxTimestep: 99, CFG: 1, CFGSchedule: "linear", Temperature: 1}
	if err := ok.Validate(); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		steps, last int
		want        string // in the error; "": none
	}{
		{2, 1, ""}, {1000, 999, ""}, {1, 999, "head_steps is 1,"}, {1001, 999, "head_steps is 1001,"}, {2, 0, "max_timestep is 0,"},
		{2, 1000, "max_timestep is 1000,"}, {3, 1, "3 head_steps don't fit into timesteps 0 to 1"},
	} {
		s := ok
		s.HeadSteps, s.MaxTimestep = c.steps, c.last
		if err := s.Validate(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d steps to %d: %v", c.steps, c.last, err)
		}
	}
	// A trainer that recorded a single step made a good model all the same.
	c, _ := NamedMAR("mar-base")
	m, err := Describe(shapeFile(c.Params(), map[string]string{"config": `{"num_sampling_steps": "1"}`}), MAROptions{})
	if err != nil || m.Sampling.HeadSteps != 100 {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestParseMAR(t *testing.T) {
	c, err := ParseMAR(`{"encoder_embed_dim": 64, "encoder_depth": 2, "encoder_num_heads": 4, "decoder_embed_dim": 64, "decoder_depth": 2,
		"decoder_num_heads": 4, "diffloss_d": 2, "diffloss_w": "64", "class_num": 10, "buffer_size": 8, "img_size": 64}`)
	if err != nil || c.Tokens() != 16 || c.NumSamplingSteps != 100 || c.DiffLossW != 64 {
		t.Fatalf("%+v, %v", c, err)
	}
	f := mustOpen(t, goldens+"mar_tiny.safetensors", OpenOptions{})
	if _, err := Check(f, c.Params(), nil); err != nil {
		t.Error(err)
	}
	for text, part := range map[string]string{`{}`: "encoder_embed_dim", `{"encoder_depth": "two"}`: "encoder_depth", `x`: "invalid character"} {
		if _, err := ParseMAR(text); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
