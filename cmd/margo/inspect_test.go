package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine/checkpoint"
)

func inspectJSON(t *testing.T, args ...string) (d struct {
	Kind     string
	Config   map[string]any
	DTypes   map[string]int
	Params   int64  `json:"parameters"`
	Parts    []part `json:"parameters_per_part"`
	Tensors  []tensorLine
	Sampling map[string]any
	Tok      string   `json:"tokenizer"`
	Classes  []string `json:"class_names"`
	Scale    float64  `json:"latent_scale"`
}) {
	t.Helper()
	if err := json.Unmarshal([]byte(ok(t, append([]string{"inspect", "--json"}, args...)...)), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// A causal model has one transformer, which its input projection belongs to; there is no encoder.
func TestInspectCausal(t *testing.T) {
	const width, token, blocks = 768, 16, 24
	// A block: two norms, qkv, projection, an MLP of 4 widths. Before them z_proj and its norm, behind them a norm.
	transformer := int64(blocks*(4*width+3*width*width+3*width+width*width+width+8*width*width+5*width) + token*width + width + 2*width + 2*width)
	for name, head := range map[string]string{"ar-raster-base": "diffusion head", "ar-random-base": "diffusion head", "ar-raster-base-ce": "head"} {
		d := inspectJSON(t, "--config", name, "--tensors")
		var names []string
		sum, all := int64(0), int64(0)
		for _, p := range d.Parts {
			names = append(names, p.Name)
			sum += p.Params
		}
		for _, x := range d.Tensors {
			n := int64(1)
			for _, k := range x.Shape {
				n *= int64(k)
			}
			all += n
		}
		want := transformer
		if name == "ar-raster-base-ce" {
			want -= token*width + width // codes have a table of embeddings in place of z_proj
		}
		if strings.Join(names, ", ") != "embeddings, transformer, "+head || d.Params != sum || d.Params != all || d.Parts[1].Params != want {
			t.Errorf("%s: %d parameters of %d, parts %v, want %d in the transformer", name, d.Params, all, d.Parts, want)
		}
	}
	if out := ok(t, "inspect", "--config", "ar-raster-base"); strings.Contains(out, "encoder") || !strings.Contains(out, "transformer    24 blocks, width 768") {
		t.Error(out)
	}
}

// The counts are those of the published models (paper Table 4 rounds them up).
func TestInspectConfig(t *testing.T) {
	for name, want := range map[string][2]int64{ // total, diffusion head
		"mar-base":  {207924768, 35749920},
		"mar-large": {478326304, 72230432},
		"mar-huge":  {942403104, 151206944},
	} {
		d := inspectJSON(t, "--config", name)
		sum := int64(0)
		for _, p := range d.Parts {
			sum += p.Params
		}
		if d.Params != want[0] || sum != want[0] || d.Parts[len(d.Parts)-1].Params != want[1] {
			t.Errorf("%s: %d parameters, parts %v", name, d.Params, d.Parts)
		}
	}
	if out := ok(t, "inspect", "--config", "mar-base"); !strings.Contains(out, "207,924,768") || strings.Contains(out, "sampling") {
		t.Error(out)
	}
	// sd-vae-ft-mse's, as diffusers counts it.
	if d := inspectJSON(t, "--config", "kl-8"); d.Params != 83653863 || len(d.Parts) != 2 {
		t.Errorf("kl-8: %d parameters, parts %v", d.Params, d.Parts)
	}
	// A configuration of one's own, in the authors' words.
	path := filepath.Join(t.TempDir(), "c.json")
	os.WriteFile(path, []byte(`{"encoder_embed_dim": 64, "encoder_depth": 2, "encoder_num_heads": 4, "decoder_embed_dim": 64, "decoder_depth": 2,
		"decoder_num_heads": 4, "img_size": 64, "class_num": 10, "buffer_size": 8, "diffloss_d": 2, "diffloss_w": 64, "num_sampling_steps": "10"}`), 0o666)
	if a, b := inspectJSON(t, "--config", path), inspectJSON(t, tiny); a.Params != b.Params || a.Params != 288544 {
		t.Errorf("from JSON %d parameters, from the file %d", a.Params, b.Params)
	}
}

func TestInspectFile(t *testing.T) {
	d := inspectJSON(t, fashion, "--tensors")
	if d.Kind != "mar" || d.Params != 2379744 || len(d.Tensors) != 148 || d.Sampling["max_timestep"] != 950.0 || d.Tok != "fashion-kl.safetensors" || len(d.Classes) != 10 {
		t.Errorf("%+v", d)
	}
	if d := inspectJSON(t, fashionKL); d.Kind != "kl" || d.Params != 976563 || d.Tensors != nil || len(d.Parts) != 2 {
		t.Errorf("%+v", d)
	}
	out := ok(t, "inspect", fashion, "--tensors")
	for _, want := range []string{"28×28 pixels, 10 classes", "7×7 of 16 channels", "diffusion head         751,712", "7 sneaker", "F32  [10,128]         class_emb.weight"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	// What can be said about a file is printed before what is wrong with it.
	code, out, msg := margo("inspect", tinyPTH)
	if code != exitUsage || !strings.Contains(out, "92 × F32") || !strings.Contains(msg, "--heads") {
		t.Errorf("exit %d: %s: %s", code, out, msg)
	}
	// A model with a tensor missing.
	f, err := checkpoint.Open(tiny, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var entries []checkpoint.Entry
	for _, name := range f.Names() {
		if info, _ := f.Tensor(name); name != "decoder_norm.bias" {
			entries = append(entries, entryOf(f, info))
		}
	}
	path := filepath.Join(t.TempDir(), "less.safetensors")
	if err := checkpoint.Save(t.Context(), path, entries, f.Metadata()); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range [][]string{{"inspect", path}, {"sample", "--model", path, "-o", path + ".png"}, {"convert", path, path + ".out.safetensors"}} {
		if code, _, msg := margo(cmd...); code != exitFile || !strings.Contains(msg, `missing "decoder_norm.bias" [64]`) {
			t.Errorf("%s: exit %d: %s", cmd[0], code, msg)
		}
	}
}

func TestConvert(t *testing.T) {
	out := filepath.Join(t.TempDir(), "o.safetensors")
	if text := ok(t, "convert", tinyPTH, out, "--heads", "4", "--patch-size", "1", "--dtype", "bf16", "--tokenizer", "some/kl.ckpt", "--set", "cfg=2.5",
		"--set", `class_names=["a","b","c","d","e","f","g","h","i","j"]`, "--latent-scale", "0.5"); !strings.Contains(text, "288,544 parameters of model_ema") {
		t.Error(text)
	}
	d := inspectJSON(t, out)
	if d.Kind != "mar" || d.Config["encoder_num_heads"] != 4.0 || d.DTypes["BF16"] != 92 || d.Tok != "kl.ckpt" || d.Sampling["cfg"] != 2.5 ||
		d.Sampling["iters"] != 64.0 || len(d.Classes) != 10 || d.Scale != 0.5 {
		t.Errorf("%+v", d)
	}
	var r map[string]any
	if err := json.Unmarshal([]byte(ok(t, "convert", fashionKL, out, "--json")), &r); err != nil || r["kind"] != "kl" || r["parameters"] != 976563.0 {
		t.Errorf("%v, %v", r, err)
	}
	if n := files(t, filepath.Dir(out)); len(n) != 1 {
		t.Errorf("left %v", n)
	}
	// The authors' latent scale is assumed for latents like theirs only, aloud.
	mar := filepath.Join(t.TempDir(), "m.safetensors")
	if text := ok(t, "convert", tiny, mar); !strings.Contains(text, "0.2325 is assumed") || inspectJSON(t, mar).Scale != 0.2325 {
		t.Error(text)
	}
	if text := ok(t, "convert", tiny, mar, "--vae-stride", "8"); !strings.Contains(text, "not recorded; the tokenizer's") || inspectJSON(t, mar).Scale != 0 {
		t.Error(text)
	}
	if text := ok(t, "convert", tiny, mar, "--latent-scale", "0.5"); strings.Contains(text, "latent scale") {
		t.Error(text)
	}
	// Settings that cannot be are refused, and the old file stays.
	if code, _, msg := margo("convert", fashion, out, "--set", "max_timestep=5000"); code == exitOK || !strings.Contains(msg, "max_timestep") {
		t.Errorf("exit %d: %s", code, msg)
	}
	if inspectJSON(t, out).Kind != "kl" {
		t.Error("a failed conversion changed the output")
	}
}

func entryOf(f *checkpoint.File, info checkpoint.Info) checkpoint.Entry {
	return checkpoint.Entry{Info: info, Write: func(w io.Writer) error { return f.WriteTo(w, info.Name, info.DType) }}
}
