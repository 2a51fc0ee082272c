package checkpoint

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

const goldens = "../../testdata/goldens/"

func mustOpen(t testing.TB, path string, o OpenOptions) *File {
	t.Helper()
	f, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// sameTensors compares two files tensor by tensor, byte by byte.
func sameTensors(t *testing.T, a, b *File) {
	t.Helper()
	if !slices.Equal(a.Names(), b.Names()) {
		t.Fatalf("%s has %d tensors, %s has %d", a.Path(), len(a.Names()), b.Path(), len(b.Names()))
	}
	for _, name := range a.Names() {
		ia, _ := a.Tensor(name)
		ib, _ := b.Tensor(name)
		if ia.DType != ib.DType || !slices.Equal(ia.Shape, ib.Shape) {
			t.Fatalf("%s: %v and %v", name, ia, ib)
		}
		ra, rb := make([]byte, ia.Bytes()), make([]byte, ib.Bytes())
		if err := a.ReadRaw(name, ra); err != nil {
			t.Fatal(err)
		}
		if err := b.ReadRaw(name, rb); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(ra, rb) {
			t.Fatalf("%s: contents differ", name)
		}
		a.Release(name)
		again := make([]byte, len(ra))
		if err := a.ReadRaw(name, again); err != nil || !bytes.Equal(ra, again) {
			t.Fatalf("%s: differs after Release (%v)", name, err)
		}
	}
}

// Files of the real torch.save hold the same tensors as their twins.
func TestTorchGoldens(t *testing.T) {
	for _, name := range []string{"mar_tiny", "mar_tiny_trained", "vae_tiny"} {
		for _, state := range []string{"", "model", "model_ema"} {
			pth := mustOpen(t, goldens+name+".pth", OpenOptions{State: state})
			if pth.Format() != "torch" || state != "" && pth.State() != state || state == "" && pth.State() != "model_ema" {
				t.Errorf("%s, state %q: format %s, state %s", name, state, pth.Format(), pth.State())
			}
			if v, ok := pth.Value("epoch"); !ok {
				t.Errorf("%s: epoch is %v", name, v)
			}
			sameTensors(t, pth, mustOpen(t, goldens+name+".safetensors", OpenOptions{}))
		}
	}
}

// The format is told by content, not by name.
func TestContentDecides(t *testing.T) {
	b, err := os.ReadFile(goldens + "mar_tiny.pth")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "x.safetensors")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	sameTensors(t, mustOpen(t, path, OpenOptions{}), mustOpen(t, goldens+"mar_tiny.safetensors", OpenOptions{}))
}

func TestDescribeGoldens(t *testing.T) {
	for _, path := range []string{"mar_tiny.safetensors", "mar_tiny_trained.safetensors", "vae_tiny.safetensors", "vae_tiny.pth"} {
		f := mustOpen(t, goldens+path, OpenOptions{})
		m, err := Describe(f, MAROptions{})
		if err != nil {
			t.Fatal(err)
		}
		if ignored, err := Check(f, m.Params(), m.Ignorable); err != nil || len(ignored) != 0 {
			t.Errorf("%s: %v, ignored %v", path, err, ignored)
		}
		switch m.Kind {
		case KindMAR:
			c := m.MAR
			if c.Grid() != 4 || c.TokenDim() != 16 || c.EncoderNumHeads != 4 || c.DecoderNumHeads != 4 || c.NumSamplingSteps != 10 || c.LayerNormEps != 1e-6 || m.Sampling.HeadSteps != 10 {
				t.Errorf("%s: %+v", path, m)
			}
		case KindKL:
			c := m.KL
			if c.Ch != 32 || !slices.Equal(c.ChMult, []int{1, 2}) || c.NumResBlocks != 1 || c.ZChannels != 4 || c.EmbedDim != 4 ||
				!slices.Equal(c.EncoderAttn, []int{1}) || len(c.DecoderAttn) != 0 || c.Stride() != 2 {
				t.Errorf("%s: %+v", path, c)
			}
		}
	}
}

// Integer, boolean and float64 tensors of the traces.
func TestReadKinds(t *testing.T) {
	f := mustOpen(t, goldens+"mar_encdec_vis6.safetensors", OpenOptions{})
	info, ok := f.Tensor("mask")
	if !ok {
		t.Fatalf("no mask in %v", f.Names())
	}
	mask := make([]float32, info.Elems())
	var hidden float32
	if info.DType.Float() {
		if err := f.ReadF32("mask", mask); err != nil {
			t.Fatal(err)
		}
	} else {
		ids := make([]int64, info.Elems())
		if err := f.ReadI64("mask", ids); err != nil {
			t.Fatal(err)
		}
		for i, v := range ids {
			mask[i] = float32(v)
		}
	}
	for _, v := range mask[:16] {
		hidden += v
	}
	if hidden != 10 { // 6 of 16 visible
		t.Errorf("%v tokens masked", hidden)
	}
	labels := make([]int64, 2)
	if info, _ := f.Tensor("labels"); info.Elems() != 2 {
		labels = make([]int64, info.Elems())
	}
	if err := f.ReadI64("labels", labels); err != nil {
		t.Fatal(err)
	}
	for _, l := range labels {
		if l < 0 || l > 9 {
			t.Errorf("label %d", l)
		}
	}
	ids := make([]byte, 4*len(labels))
	if err := f.ReadAs("labels", 2, ids); err != nil || int64(le.Uint32(ids)) != labels[0] {
		t.Errorf("labels as I32: %v %v", ids, err)
	}
	if err := f.ReadF32("labels", make([]float32, len(labels))); err == nil {
		t.Error("integers read as floats")
	}
	tab := mustOpen(t, goldens+"mar_diffusion_tables.safetensors", OpenOptions{})
	beta := make([]float64, 1000)
	if err := tab.ReadF64("cosine_full1000.betas", beta); err != nil || beta[999] != 0.999 {
		t.Errorf("betas[999] = %v, %v", beta[999], err)
	}
}

// The models that ship are whole, fit each other, and say how to sample them.
func TestShippedModels(t *testing.T) {
	mar := mustOpen(t, "../../models/fashion-mar.safetensors", OpenOptions{})
	m, err := Describe(mar, MAROptions{})
	if err != nil {
		t.Fatal(err)
	}
	kl := mustOpen(t, "../../models/"+m.Tokenizer, OpenOptions{})
	k, err := Describe(kl, MAROptions{})
	if err != nil {
		t.Fatal(err)
	}
	for f, d := range map[*File]*Model{mar: m, kl: k} {
		if _, err := Check(f, d.Params(), nil); err != nil {
			t.Error(err)
		}
	}
	if want := (Sampling{Iters: 24, HeadSteps: 100, MaxTimestep: 950, CFG: 2, CFGSchedule: "linear", Temperature: 1}); m.Sampling != want || len(m.ClassNames) != 10 || m.ClassNames[9] != "ankle boot" {
		t.Errorf("%+v", m)
	}
	if m.LatentScale != 0.7403369118397486 || k.LatentScale != m.LatentScale || k.KL.EmbedDim != m.MAR.VAEEmbedDim || k.KL.Stride() != m.MAR.VAEStride {
		t.Errorf("%+v and %+v do not fit", m, k)
	}
	if total, head := CountParams(m.Params(), ""), CountParams(m.Params(), "diffloss."); total != 2379744 || head != 751712 || CountParams(k.Params(), "") != 976563 {
		t.Errorf("%d parameters, %d in the head", total, head)
	}
}
