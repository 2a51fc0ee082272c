package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
)

// The counts of the authors' constructor, fixed position embedding included as
// sum(p.numel() for p in parameters()) has it: DiT-XL/2 with its published 675,129,632,
// the others by the layers of the paper's Table 1, added up here in another way.
func TestDiTParameterCounts(t *testing.T) {
	for _, name := range DiTNames() {
		c, err := NamedDiT(name)
		if err != nil {
			t.Fatal(err)
		}
		d, p := int64(c.HiddenSize), int64(c.PatchSize)
		perBlock := 18*d*d + 15*d                                                // 3+1+4+4+6 matrices; their biases
		rest := 257*d + d*(d+1) + 1001*d + (4*p*p+1)*d + 2*d*(d+1) + 8*p*p*(d+1) // t, y, x, final
		want := int64(c.Depth)*perBlock + rest + (32/p)*(32/p)*d
		if got := CountParams(c.Params(), ""); got != want {
			t.Errorf("%s has %d parameters, want %d", name, got, want)
		}
	}
	for name, want := range map[string]int64{"dit-xl/2": 675129632, "dit-l/2": 458102816} {
		c, _ := NamedDiT(name)
		if got := CountParams(c.Params(), ""); got != want {
			t.Errorf("%s has %d parameters, want %d", name, got, want)
		}
	}
	for _, bad := range []string{"dit-xl", "dit-xl/3", "dit-h/2", "dit/2"} {
		if _, err := NamedDiT(bad); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "dit-xl/2") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestInferDiT(t *testing.T) {
	for _, name := range DiTNames() {
		want, _ := NamedDiT(name)
		want.InputSize = 64 // 512×512 pixels
		m, err := Describe(shapeFile(want.Params(), nil), MAROptions{})
		if err != nil || m.Kind != KindDiT || *m.DiT != *want {
			t.Fatalf("%s: %+v, %v", name, m, err)
		}
		if m.Sampling != DiTSampling() || m.AssumedScale() != DiTLatentScale || m.PixelSize() != 512 || m.Classes() != 1000 {
			t.Errorf("%s: %+v", name, m)
		}
	}
	// A width nobody published needs its heads, a file without positions has none stored.
	odd := ditDefaults()
	odd.HiddenSize, odd.Depth, odd.NumHeads, odd.MLPRatio, odd.InChannels, odd.PatchSize = 96, 3, 2, 3.25, 3, 4
	specs := odd.Params()
	if _, err := InferDiT(shapeFile(specs, nil), MAROptions{}); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "--heads") {
		t.Error(err)
	}
	f := shapeFile(specs[1:], map[string]string{"config": `{"num_heads": 2, "learn_sigma": true}`})
	got, err := InferDiT(f, MAROptions{})
	if err != nil || *got != odd {
		t.Fatalf("%+v, %v", got, err)
	}
	pos := make([]float32, odd.Tokens()*96)
	if _, err := Check(f, got.Params(), nil); err != nil || f.ReadF32("pos_embed", pos) != nil || pos[96] != 0.84147096 {
		t.Errorf("%v, %v", err, pos[96])
	}
	for text, part := range map[string]string{`{"num_heads": 5}`: "num_heads", `{"num_heads": 2, "depth": 7}`: "depth", `{"num_heads": 2, "input_size": 30}`: "input_size",
		`{"num_heads": 2, "num_classes": 10}`: "num_classes"} {
		if _, err := InferDiT(shapeFile(specs, map[string]string{"config": text}), MAROptions{}); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", text, err)
		}
	}
	fixed := odd.Params()
	for i := range fixed {
		if strings.HasPrefix(fixed[i].Name, "final_layer.linear.") {
			fixed[i].Shape[0] /= 2
		}
	}
	if _, err := InferDiT(shapeFile(fixed, nil), MAROptions{Heads: 2}); !errors.Is(err, engine.Unsupported) || !strings.Contains(err.Error(), "learn_sigma") {
		t.Error(err)
	}
}

// diffusersDiT writes dit_tiny under diffusers' names; edit may change the entries.
func diffusersDiT(t *testing.T, path string, edit func(map[string]Entry)) {
	t.Helper()
	f := mustOpen(t, goldens+"dit_tiny.safetensors", OpenOptions{})
	out := map[string]Entry{}
	add := func(name string, shape []int, dtype DType, b []byte) {
		out[name] = Entry{Info{name, dtype, shape}, func(w io.Writer) error { _, err := w.Write(b); return err }}
	}
	for _, name := range f.Names() {
		info, _ := f.Tensor(name)
		b := make([]byte, info.Bytes())
		if err := f.ReadRaw(name, b); err != nil {
			t.Fatal(err)
		}
		put := func(name string) { add(name, info.Shape, info.DType, b) }
		end := name[strings.LastIndexByte(name, '.')+1:]
		emb := "transformer_blocks.%d.norm1.emb."
		every := func(part string) {
			for i := range 2 {
				put(fmt.Sprintf(emb, i) + part + "." + end)
			}
		}
		var i int
		switch p := strings.Split(name, "."); {
		case name == "pos_embed": // a buffer that is not stored
		case strings.HasPrefix(name, "x_embedder"):
			put("pos_embed.proj." + end)
		case strings.HasPrefix(name, "t_embedder.mlp.0"):
			every("timestep_embedder.linear_1")
		case strings.HasPrefix(name, "t_embedder.mlp.2"):
			every("timestep_embedder.linear_2")
		case strings.HasPrefix(name, "y_embedder"):
			every("class_embedder.embedding_table")
		case strings.HasPrefix(name, "final_layer.linear"):
			put("proj_out_2." + end)
		case strings.HasPrefix(name, "final_layer.ada"):
			put("proj_out_1." + end)
		default:
			fmt.Sscanf(p[1], "%d", &i)
			at := fmt.Sprintf("transformer_blocks.%d.", i)
			switch strings.Join(p[2:len(p)-1], ".") {
			case "attn.qkv":
				third := append([]int{info.Shape[0] / 3}, info.Shape[1:]...)
				for k, q := range []string{"to_q.", "to_k.", "to_v."} {
					add(at+"attn1."+q+end, third, info.DType, b[k*len(b)/3:(k+1)*len(b)/3])
				}
			case "attn.proj":
				put(at + "attn1.to_out.0." + end)
			case "mlp.fc1":
				put(at + "ff.net.0.proj." + end)
			case "mlp.fc2":
				put(at + "ff.net.2." + end)
			case "adaLN_modulation.1":
				put(at + "norm1.linear." + end)
			default:
				t.Fatal(name)
			}
		}
	}
	if edit != nil {
		edit(out)
	}
	var list []Entry
	for _, e := range out {
		list = append(list, e)
	}
	if err := Save(context.Background(), path, list, nil); err != nil {
		t.Fatal(err)
	}
	config := `{"_class_name": "Transformer2DModel", "sample_size": 8, "patch_size": 2, "num_attention_heads": 4, "attention_head_dim": 16,
		"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}`
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "config.json"), []byte(config), 0o666); err != nil {
		t.Fatal(err)
	}
}

// diffusers' layout becomes the authors' file, byte for byte but for the position
// embedding, which is computed.
func TestDiffusersDiT(t *testing.T) {
	path := filepath.Join(t.TempDir(), "diffusion_pytorch_model.safetensors")
	out := filepath.Join(t.TempDir(), "dit.safetensors")
	diffusersDiT(t, path, nil)
	done, err := Convert(context.Background(), path, out, ConvertOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if m := done.Model; m.Layout != LayoutDiffusers || m.DiT.NumHeads != 4 || m.DiT.InputSize != 8 || m.LatentScale != DiTLatentScale || !done.AssumedScale {
		t.Errorf("%+v %+v", m, m.DiT)
	}
	got, want := mustOpen(t, out, OpenOptions{}), mustOpen(t, goldens+"dit_tiny.safetensors", OpenOptions{})
	for _, name := range want.Names() {
		info, _ := want.Tensor(name)
		a, b := make([]byte, info.Bytes()), make([]byte, info.Bytes())
		if err := want.ReadRaw(name, a); err != nil {
			t.Fatal(err)
		}
		if err := got.ReadRaw(name, b); err != nil {
			t.Fatal(err)
		}
		if name != "pos_embed" && !bytes.Equal(a, b) {
			t.Errorf("%s differs", name)
		}
	}
	if m, err := Describe(got, MAROptions{}); err != nil || m.Sampling != DiTSampling() || m.DiT.NumHeads != 4 {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestDiffusersDiTRefused(t *testing.T) {
	const emb = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
	for part, edit := range map[string]func(map[string]Entry){
		"differs from that of block 0": func(m map[string]Entry) {
			e := m[emb]
			e.Write = func(w io.Writer) error { _, err := w.Write(make([]byte, e.Bytes())); return err }
			m[emb] = e
		},
		"attn1.to_k.weight": func(m map[string]Entry) { delete(m, "transformer_blocks.0.attn1.to_k.weight") },
		"attn1.to_k.bias":   func(m map[string]Entry) { delete(m, "transformer_blocks.1.attn1.to_q.bias") },
	} {
		path := filepath.Join(t.TempDir(), "model.safetensors")
		diffusersDiT(t, path, edit)
		f, err := Open(path, OpenOptions{})
		if err == nil {
			var m *Model
			if m, err = Describe(f, MAROptions{}); err == nil {
				_, err = Check(f, m.Params(), m.Ignorable)
			}
			f.Close()
		}
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", part, err)
		}
	}
}
