package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"margo/engine"
)

// The parameters of the published tokenizers, counted on the libraries' own
// models (diffusers AutoencoderKL, LDM AutoencoderKL, taming VQModel).
func TestPublishedTokenizers(t *testing.T) {
	f16 := KL16()
	f16.DecoderAttn = []int{4}
	with := func(c KLConfig, f func(*KLConfig)) *KLConfig { f(&c); return &c }
	for name, tc := range map[string]struct {
		c     *KLConfig
		count int64
		kind  string
	}{
		"KL-16 of LDM": {f16, 69610963, KindKL},
		"sd-vae-ft-mse": {&KLConfig{Ch: 128, ChMult: []int{1, 2, 4, 4}, NumResBlocks: 2, InChannels: 3, OutChannels: 3, ZChannels: 4, EmbedDim: 4},
			83653863, KindKL},
		"vqgan_imagenet_f16_16384": {with(*f16, func(c *KLConfig) { c.ZChannels, c.EmbedDim, c.NEmbed = 256, 256, 16384 }), 76073859, KindVQ},
		"vqgan_imagenet_f16_1024":  {with(*f16, func(c *KLConfig) { c.ZChannels, c.EmbedDim, c.NEmbed = 256, 256, 1024 }), 72141699, KindVQ},
		"vq-f16 of LDM":            {with(*f16, func(c *KLConfig) { c.ZChannels, c.EmbedDim, c.NEmbed = 8, 8, 16384 }), 69593371, KindVQ},
	} {
		f := shapeFile(tc.c.Params(), nil)
		m, err := Describe(f, MAROptions{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := Check(f, m.Params(), nil); err != nil || m.Kind != tc.kind || CountParams(m.Params(), "") != tc.count || !sameTokenizer(m.KL, tc.c) {
			t.Errorf("%s: kind %s, %d parameters, %+v, %v", name, m.Kind, CountParams(m.Params(), ""), m.KL, err)
		}
	}
}

// Files of the real libraries in every layout have exactly the tensors that their
// configuration, read from them, asks for.
func TestTokenizerGoldens(t *testing.T) {
	for name, want := range map[string]struct {
		layout, kind string
		c            KLConfig
		ignored      int
	}{
		"kl_diffusers.safetensors":      {LayoutDiffusers, KindKL, KLConfig{ChMult: []int{1, 2, 1}, ZChannels: 4, EmbedDim: 4}, 0},
		"kl_diffusers_old.safetensors":  {LayoutDiffusers, KindKL, KLConfig{ChMult: []int{1, 1, 1, 1}, ZChannels: 4, EmbedDim: 4}, 0},
		"kl_diffusers_bare.safetensors": {LayoutDiffusers, KindKL, KLConfig{ChMult: []int{1, 1}, ZChannels: 16, EmbedDim: 16, NoQuantConv: true}, 0},
		"kl_ldm.safetensors":            {"", KindKL, KLConfig{ChMult: []int{2, 1}, ZChannels: 8, EmbedDim: 4, EncoderAttn: []int{1}, DecoderAttn: []int{1}}, 0},
		"vq_ldm.safetensors":            {"", KindVQ, KLConfig{ChMult: []int{2, 1}, ZChannels: 4, EmbedDim: 8, EncoderAttn: []int{1}, DecoderAttn: []int{1}, NEmbed: 256}, 0},
		"vq_taming.ckpt":                {"", KindVQ, KLConfig{ChMult: []int{2, 1}, ZChannels: 8, EmbedDim: 16, EncoderAttn: []int{1}, DecoderAttn: []int{1}, NEmbed: 128}, 2},
	} {
		f := mustOpen(t, goldens+name, OpenOptions{})
		m, err := Describe(f, MAROptions{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		ignored, err := Check(f, m.Params(), m.Ignorable)
		want.c.Ch, want.c.NumResBlocks, want.c.InChannels, want.c.OutChannels = 32, 1, 3, 3
		got, _ := json.Marshal(m.KL)
		wanted := want.c
		wanted.EncoderAttn, wanted.DecoderAttn = append([]int{}, wanted.EncoderAttn...), append([]int{}, wanted.DecoderAttn...)
		text, _ := json.Marshal(wanted)
		if err != nil || f.Layout() != want.layout || m.Kind != want.kind || string(got) != string(text) || len(ignored) != want.ignored {
			t.Errorf("%s: layout %q, kind %s, config %s, ignored %v, %v", name, f.Layout(), m.Kind, got, ignored, err)
		}
		// Every name goes there and back.
		for _, n := range f.Names() {
			stored := f.Stored(n)
			old := strings.Contains(name, "old")
			if f.Layout() != "" && (fromDiffusers(stored, len(want.c.ChMult)) != n || toDiffusers(n, len(want.c.ChMult), old) != stored) {
				t.Errorf("%s: %s is %s, and back %s", name, stored, n, toDiffusers(n, len(want.c.ChMult), old))
			}
		}
	}
}

// diffusersFile is a golden as entries that a test may change.
func diffusersFile(t *testing.T, name string, edit func(name string, info *Info) bool) string {
	t.Helper()
	f := mustOpen(t, goldens+name, OpenOptions{})
	var entries []Entry
	for _, n := range f.Names() {
		info, _ := f.Tensor(n)
		info.Name = f.Stored(n)
		if isAttention(n) { // as in the file
			info.Shape = info.Shape[:2]
		}
		if !edit(info.Name, &info) {
			continue
		}
		entries = append(entries, entry(info.Name, info.DType, info.Shape, make([]byte, info.Bytes())))
	}
	path := filepath.Join(t.TempDir(), "diffusion_pytorch_model.safetensors")
	if err := Save(context.Background(), path, entries, nil); err != nil {
		t.Fatal(err)
	}
	return path
}

// Messages name tensors as the file does.
func TestDiffusersErrors(t *testing.T) {
	const q = "decoder.mid_block.attentions.0."
	for _, tc := range []struct {
		file, want string
		edit       func(name string, info *Info) bool
	}{
		{"kl_diffusers.safetensors", `missing "` + q + `to_out.0.weight" [32,32,1,1]`, func(n string, _ *Info) bool { return n != q+"to_out.0.weight" }},
		{"kl_diffusers_old.safetensors", `missing "` + q + `proj_attn.bias" [32]`, func(n string, _ *Info) bool { return n != q+"proj_attn.bias" }},
		{"kl_diffusers.safetensors", `missing "decoder.up_blocks.0.upsamplers.0.conv.bias" [32]`, func(n string, _ *Info) bool { return n != "decoder.up_blocks.0.upsamplers.0.conv.bias" }},
		{"kl_diffusers.safetensors", `missing "encoder.down_blocks.1.resnets.0.conv_shortcut.weight" [64,32,1,1]`,
			func(n string, _ *Info) bool { return n != "encoder.down_blocks.1.resnets.0.conv_shortcut.weight" }},
		{"kl_diffusers.safetensors", `missing "quant_conv.bias" [8]`, func(n string, _ *Info) bool { return n != "quant_conv.bias" }},
		{"kl_diffusers.safetensors", `"encoder.conv_norm_out.weight" has shape [31] instead of [32]`, func(n string, i *Info) bool {
			if n == "encoder.conv_norm_out.weight" {
				i.Shape = []int{31}
			}
			return true
		}},
		{"kl_diffusers.safetensors", `unexpected "decoder.mid_block.motion.weight" [32,32]`, func(n string, i *Info) bool {
			if n == q+"to_q.weight" {
				i.Name = "decoder.mid_block.motion.weight"
			}
			return true
		}},
		{"kl_diffusers.safetensors", `"` + q + `query.bias" and "` + q + `to_q.bias" are the same part`, func(n string, i *Info) bool {
			if n == q+"to_k.bias" {
				i.Name = q + "query.bias"
			}
			return true
		}},
	} {
		path := diffusersFile(t, tc.file, tc.edit)
		_, err := func() (*Model, error) {
			f, err := Open(path, OpenOptions{})
			if err != nil {
				return nil, err
			}
			defer f.Close()
			m, err := Describe(f, MAROptions{})
			if err == nil {
				_, err = Check(f, m.Params(), m.Ignorable)
			}
			return m, err
		}()
		if !errors.Is(err, engine.IO) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v, want %s", err, tc.want)
		}
	}
}

// The scale is that of config.json beside the weights, unless a shift belongs to
// it; what shapes don't tell must be what the model does.
func TestDiffusersConfig(t *testing.T) {
	path := diffusersFile(t, "kl_diffusers_old.safetensors", func(string, *Info) bool { return true })
	for _, tc := range []struct {
		json    string
		scale   float64
		assumed float64
		fails   string
	}{
		{"", 0, DiffusersLatentScale, ""},
		{`{"_class_name":"AutoencoderKL","scaling_factor":0.13025,"shift_factor":null,"norm_num_groups":32,"act_fn":"silu"}`, 0.13025, DiffusersLatentScale, ""},
		{`{"_class_name":"AutoencoderKL","scaling_factor":1.5305,"shift_factor":0.0609}`, 0, DiffusersLatentScale, ""},
		{`{"_class_name":"UNet2DModel","scaling_factor":2}`, 0, DiffusersLatentScale, ""},
		{`{"_class_name":"AutoencoderKL","norm_num_groups":16}`, 0, 0, "norm_num_groups is 16"},
		{`{"_class_name":"AutoencoderKL","act_fn":"mish"}`, 0, 0, "act_fn is mish"},
		{`{"_class_name":"AutoencoderKL","scaling_factor":-1}`, 0, 0, "latent_scale"},
		{`[1]`, 0, 0, "config.json"},
	} {
		config := filepath.Join(filepath.Dir(path), "config.json")
		os.Remove(config)
		if tc.json != "" {
			if err := os.WriteFile(config, []byte(tc.json), 0o666); err != nil {
				t.Fatal(err)
			}
		}
		m, err := Describe(mustOpen(t, path, OpenOptions{}), MAROptions{})
		if tc.fails != "" {
			if err == nil || !strings.Contains(err.Error(), tc.fails) {
				t.Errorf("%s: %v", tc.json, err)
			}
			continue
		}
		if err != nil || m.LatentScale != tc.scale || m.AssumedScale() != tc.assumed {
			t.Errorf("%s: %+v, %v", tc.json, m, err)
		}
	}
}

// A converted tokenizer has LDM's names, the same numbers and a recorded scale,
// and says the same about itself.
func TestConvertTokenizers(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out.safetensors")
	for name, scale := range map[string]float64{"kl_diffusers_old.safetensors": DiffusersLatentScale, "kl_diffusers_bare.safetensors": 0,
		"kl_ldm.safetensors": 0, "vq_taming.ckpt": 0} {
		in := mustOpen(t, goldens+name, OpenOptions{})
		done, err := Convert(context.Background(), goldens+name, out, ConvertOptions{})
		if err != nil {
			t.Fatal(err)
		}
		f := mustOpen(t, out, OpenOptions{})
		m, err := Describe(f, MAROptions{})
		if err != nil || m.LatentScale != scale || done.AssumedScale != (scale > 0) || m.Kind != done.Model.Kind || m.Layout != "" || f.Layout() != "" {
			t.Fatalf("%s: %+v, %v", name, m, err)
		}
		for _, p := range m.Params() {
			info, _ := in.Tensor(p.Name)
			a, b := make([]byte, info.Bytes()), make([]byte, info.Bytes())
			if err := errors.Join(in.ReadRaw(p.Name, a), f.ReadRaw(p.Name, b)); err != nil || !slices.Equal(a, b) {
				t.Errorf("%s: %s differs (%v)", name, p.Name, err)
			}
		}
	}
	// A config that is recorded must be met.
	for from, want := range map[string]string{
		"kl_ldm.safetensors": `no tensor "post_quant_conv.weight", which the file's config has`,
		"vq_taming.ckpt":     `metadata kind is "vq", but the tensors are those of a tokenizer of kind "kl"`,
	} {
		if _, err := Convert(context.Background(), goldens+from, out, ConvertOptions{}); err != nil {
			t.Fatal(err)
		}
		f := mustOpen(t, out, OpenOptions{})
		for _, n := range f.Names() {
			if n == codebook || f.tensors[codebook] == nil && strings.Contains(n, "quant_conv.") {
				delete(f.tensors, n)
			}
		}
		if _, err := Describe(f, MAROptions{}); !errors.Is(err, engine.IO) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", from, err)
		}
	}
}

func TestTokenizerConfigs(t *testing.T) {
	for want, edit := range map[string]func(c *KLConfig){
		"n_embed is -1":    func(c *KLConfig) { c.NEmbed = -1 },
		"embed_dim is 8":   func(c *KLConfig) { c.NoQuantConv, c.EmbedDim = true, 8 },
		"embed_dim is 0":   func(c *KLConfig) { c.EmbedDim = 0 },
		"attention at lev": func(c *KLConfig) { c.DecoderAttn = []int{5} },
	} {
		c := KL16()
		edit(c)
		if err := c.Validate(); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// FuzzDiffusersNames: a translated name is translated back, whatever it is.
func FuzzDiffusersNames(f *testing.F) {
	for _, name := range []string{"encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "decoder.up_blocks.0.upsamplers.0.conv.bias",
		"decoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid_block.resnets.1.norm1.bias", "decoder.conv_norm_out.weight",
		"encoder.down_blocks.2.attentions.0.group_norm.bias", "quant_conv.weight", "decoder.up_blocks.9.resnets", "encoder..", "decoder.up_blocks.-1.resnets.0.x"} {
		f.Add(name, 3)
	}
	f.Fuzz(func(t *testing.T, name string, levels int) {
		levels = levels & 15
		to := fromDiffusers(name, levels)
		toDiffusers(name, levels, false)
		if to == name {
			return
		}
		back := toDiffusers(to, levels, false)
		if again := fromDiffusers(back, levels); again != to {
			t.Errorf("%q is %q, that %q, and that %q", name, to, back, again)
		}
	})
}
