package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	ditTiny = "../../testdata/goldens/dit_tiny.safetensors"
	vaeTiny = "../../testdata/goldens/vae_tiny.safetensors"
)

// joint is a quick sample command with a DiT and a tokenizer of 4 channels at stride 2.
func joint(args ...string) []string {
	return append([]string{"sample", "--model", ditTiny, "--tokenizer", vaeTiny, "--vae-stride", "2", "--latent-scale", "0.25", "--steps", "4"}, args...)
}

// A DiT's images depend on seed and index only, and say how they were made.
func TestSampleDiT(t *testing.T) {
	dir := t.TempDir()
	want := filepath.Join(dir, "a.npz")
	ok(t, joint("-n", "5", "--classes", "3,7", "--batch", "5", "--threads", "1", "--out", want)...)
	a, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	for i, more := range [][]string{{"--batch", "2"}, {"--batch", "1", "--threads", "3"}} {
		other := filepath.Join(dir, string(rune('b'+i))+".npz")
		ok(t, joint(append(more, "-n", "5", "--classes", "3,7", "--out", other)...)...)
		if b, err := os.ReadFile(other); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%v: other images (%v)", more, err)
		}
	}
	ok(t, joint("-n", "1", "--classes", "3", "--sampler", "ddim", "--eta", "0.5", "--cfg-channels", "all", "--cfg", "1.5", "--dtype", "bf16", "--out", dir)...)
	p := parameters(t, filepath.Join(dir, "00000.png"))
	for k, v := range map[string]any{"steps": "4", "sampler": "ddim", "eta": 0.5, "cfg_channels": "all", "cfg": 1.5, "temperature": 1.0,
		"latent_scale": 0.25, "class": 3.0, "dtype": "bf16", "iters": nil, "head_steps": nil} {
		if p[k] != v {
			t.Errorf("%s is %v, want %v", k, p[k], v)
		}
	}
	if img := pixels(t, filepath.Join(dir, "00000.png")); img.W != 16 || img.H != 16 {
		t.Errorf("%d×%d pixels", img.W, img.H)
	}
}

func TestDiTFlags(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.png")
	for _, c := range []struct {
		part string
		args []string
	}{
		{"--iters is for a MAR", joint("--iters", "3")},
		{"--cfg-schedule is for a MAR", joint("--cfg-schedule", "linear")},
		{"--image is for a MAR", joint("--image", "a.png", "--mask", "b.png")},
		{"--steps is for a DiT", quick("--steps", "10")},
		{"--cfg-channels is for a DiT", quick("--cfg-channels", "all")},
		{"--eta is for --sampler ddim", joint("--eta", "0.5")},
		{"--eta is 2", joint("--eta", "2", "--sampler", "ddim")},
		{"ddpm or ddim", joint("--sampler", "euler")},
		{"3 or all", joint("--cfg-channels", "4")},
		{"--steps", append(joint(), "--steps", "ten")},
		{"--steps", append(joint(), "--steps", "1")},
		{"outside the model's classes 0 to 9", joint("--classes", "10")},
		{"channels at stride 2, the model", []string{"sample", "--model", ditTiny, "--tokenizer", vaeTiny}},
	} {
		code, _, stderr := margo(append(c.args, "--out", out)...)
		if code != exitUsage || !strings.Contains(stderr, c.part) {
			t.Errorf("%v: exit code %d, %s", c.args, code, stderr)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("something was written")
	}
	// A tokenizer is no model, and a DiT no tokenizer.
	if code, _, stderr := margo("sample", "--model", vaeTiny, "--out", out); code != exitFile || !strings.Contains(stderr, "holds a tokenizer, not a MAR or DiT") {
		t.Errorf("%d %s", code, stderr)
	}
	if code, _, stderr := margo("sample", "--model", ditTiny, "--tokenizer", ditTiny, "--out", out); code != exitFile || !strings.Contains(stderr, "holds a DiT, not a tokenizer") {
		t.Errorf("%d %s", code, stderr)
	}
}

func TestInspectDiT(t *testing.T) {
	text := ok(t, "inspect", "--config", "dit-xl/2")
	for _, s := range []string{"675,129,632", "28, width 1152, 16 heads", "16×16 of 16 channels", "256×256 pixels, 1000 classes"} {
		if !strings.Contains(text, s) {
			t.Errorf("%q is not in:\n%s", s, text)
		}
	}
	if d := inspectJSON(t, ditTiny); d.Kind != "dit" || d.Params != 183200 {
		t.Errorf("%+v", d)
	}
	out := filepath.Join(t.TempDir(), "dit.safetensors")
	if text := ok(t, "convert", ditTiny, out, "--set", "sampler=ddim", "--set", "steps=50"); !strings.Contains(text, "0.18215 is assumed") {
		t.Error(text)
	}
	if text := ok(t, "inspect", out); !strings.Contains(text, "50 steps of ddim, eta 0, cfg 4 on channels 3") {
		t.Error(text)
	}
}
