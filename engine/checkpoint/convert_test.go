package checkpoint

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
)

func TestConvertKeeps(t *testing.T) {
	for _, name := range []string{"mar_tiny_trained", "vae_tiny"} {
		out := filepath.Join(t.TempDir(), "out.safetensors")
		opt := ConvertOptions{Metadata: map[string]string{"latent_scale": "0.5", "license": "MIT"}}
		if name == "mar_tiny_trained" {
			opt.MAR.Heads = 4 // the .pth carries no args
			opt.MAR.PatchSize = 1
		}
		c, err := Convert(context.Background(), goldens+name+".pth", out, opt)
		if err != nil {
			t.Fatal(err)
		}
		if c.State != "model_ema" || len(c.Ignored) != 0 || c.Params != CountParams(c.Model.Params(), "") {
			t.Errorf("%+v", c)
		}
		f := mustOpen(t, out, OpenOptions{})
		sameTensors(t, f, mustOpen(t, goldens+name+".safetensors", OpenOptions{}))
		meta := f.Metadata()
		if meta["license"] != "MIT" || meta["latent_scale"] != "0.5" || meta["kind"] != c.Model.Kind || !strings.HasPrefix(meta["config"], "{") {
			t.Errorf("%v", meta)
		}
		m, err := Describe(f, MAROptions{})
		if err != nil || m.LatentScale != 0.5 {
			t.Fatalf("%+v, %v", m, err)
		}
		if m.Kind == KindMAR && *m.MAR != *c.Model.MAR {
			t.Errorf("%+v became %+v", c.Model.MAR, m.MAR)
		}
		// Converting the result again, onto itself, changes nothing.
		before, _ := os.ReadFile(out)
		if _, err := Convert(context.Background(), out, out, ConvertOptions{}); err != nil {
			t.Fatal(err)
		}
		if after, _ := os.ReadFile(out); string(before) != string(after) {
			t.Error("a second conversion differs")
		}
	}
}

func TestConvertToBF16(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out.safetensors")
	if _, err := Convert(context.Background(), goldens+"mar_tiny.safetensors", out, ConvertOptions{DType: BF16}); err != nil {
		t.Fatal(err)
	}
	a, b := mustOpen(t, goldens+"mar_tiny.safetensors", OpenOptions{}), mustOpen(t, out, OpenOptions{})
	if m, err := Describe(b, MAROptions{}); err != nil || m.LatentScale != DefaultLatentScale || m.MAR.NumSamplingSteps != 10 {
		t.Errorf("%+v %v", m, err)
	}
	for _, name := range a.Names() {
		ia, _ := a.Tensor(name)
		ib, _ := b.Tensor(name)
		if ib.DType != BF16 {
			t.Fatalf("%s is %s", name, ib.DType)
		}
		x, y, h := make([]float32, ia.Elems()), make([]float32, ia.Elems()), make([]byte, 2*ia.Elems())
		if err := errors.Join(a.ReadF32(name, x), b.ReadF32(name, y), a.ReadAs(name, engine.BF16, h)); err != nil {
			t.Fatal(err)
		}
		for i := range x {
			if math.Abs(float64(x[i]-y[i])) > math.Abs(float64(x[i]))/256 || engine.FromBF16(le.Uint16(h[2*i:])) != y[i] {
				t.Fatalf("%s[%d]: %v became %v", name, i, x[i], y[i])
			}
		}
	}
}

// The authors' latent scale is written only where their latents are likely, and
// the caller is told; it goes behind what the file or the caller says.
func TestConvertAssumesScale(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out.safetensors")
	for _, c := range []struct {
		file    string
		given   string
		stride  int
		scale   float64
		assumed bool
	}{
		{"mar_tiny", "", 0, DefaultLatentScale, true},
		{"mar_tiny", "0.5", 0, 0.5, false},
		{"mar_tiny", "", 8, 0, false}, // its tokenizer is not the authors'
		{"vae_tiny", "", 0, 0, false},
	} {
		o := ConvertOptions{MAR: MAROptions{VAEStride: c.stride}, Metadata: map[string]string{}}
		if c.given != "" {
			o.Metadata["latent_scale"] = c.given
		}
		done, err := Convert(context.Background(), goldens+c.file+".safetensors", out, o)
		if err != nil {
			t.Fatal(err)
		}
		m, err := Describe(mustOpen(t, out, OpenOptions{}), MAROptions{})
		if err != nil || m.LatentScale != c.scale || done.AssumedScale != c.assumed {
			t.Errorf("%+v: scale %g, assumed %v, %v", c, m.LatentScale, done.AssumedScale, err)
		}
	}
}

func TestConvertRefuses(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out.safetensors")
	refuse := func(what, in string, o ConvertOptions, kind engine.Kind, part string) {
		t.Helper()
		_, err := Convert(context.Background(), in, out, o)
		if !errors.Is(err, kind) || kind == engine.Invalid && errors.Is(err, engine.IO) || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refuse("heads", goldens+"mar_tiny.pth", ConvertOptions{}, engine.Invalid, "--heads")
	refuse("dtype", goldens+"mar_tiny.pth", ConvertOptions{DType: F16}, engine.Invalid, "F16")
	refuse("config", goldens+"mar_tiny.pth", ConvertOptions{Metadata: map[string]string{"config": "{}"}}, engine.Invalid, "config")
	refuse("absent", filepath.Join(dir, "none"), ConvertOptions{}, engine.IO, "no such file")
	refuse("trace", goldens+"mar_encdec_vis6.safetensors", ConvertOptions{}, engine.IO, "neither a MAR, a DiT nor a KL")
	for k, v := range map[string]string{"latent_scale": "-1", "iters": "0", "head_steps": "1", "max_timestep": "0", "cfg": "NaN",
		"cfg_schedule": "cosine", "temperature": "-1", "class_names": `["one"]`, "kind": "gan"} {
		refuse(k, goldens+"mar_tiny.safetensors", ConvertOptions{Metadata: map[string]string{k: v}}, engine.Invalid, k)
	}
	refuse("steps", goldens+"mar_tiny.safetensors", ConvertOptions{Metadata: map[string]string{"head_steps": "100", "max_timestep": "98"}},
		engine.Invalid, "100 head_steps don't fit into timesteps 0 to 98")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Convert(ctx, goldens+"mar_tiny.safetensors", out, ConvertOptions{}); !errors.Is(err, engine.Cancelled) {
		t.Error(err)
	}
	// A tensor too many, too few, or of another shape.
	f := mustOpen(t, goldens+"vae_tiny.safetensors", OpenOptions{})
	for what, edit := range map[string]func(Entry) []Entry{
		`missing "decoder.norm_out.bias"`: func(e Entry) []Entry { return nil },
		`unexpected "extra"`: func(e Entry) []Entry {
			return []Entry{e, entry("extra", F32, []int{1}, floats(1))}
		},
		`"decoder.norm_out.bias" has shape`: func(e Entry) []Entry { return []Entry{entry(e.Name, F32, []int{1}, floats(1))} },
	} {
		var entries []Entry
		for _, name := range f.Names() {
			info, _ := f.Tensor(name)
			raw := make([]byte, info.Bytes())
			if err := f.ReadRaw(name, raw); err != nil {
				t.Fatal(err)
			}
			e := entry(name, info.DType, info.Shape, raw)
			if name == "decoder.norm_out.bias" {
				entries = append(entries, edit(e)...)
			} else {
				entries = append(entries, e)
			}
		}
		in := filepath.Join(dir, "in.safetensors")
		if err := Save(context.Background(), in, entries, nil); err != nil {
			t.Fatal(err)
		}
		refuse(what, in, ConvertOptions{}, engine.IO, what)
		os.Remove(in)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
