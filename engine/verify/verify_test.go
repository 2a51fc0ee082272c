package verify

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

const goldens = "../../testdata/goldens/"

func run(t *testing.T, dev engine.Device, model, trace string, d engine.DType) *Result {
	t.Helper()
	if filepath.Ext(model) == "" {
		model += ".safetensors"
	}
	r, err := Run(context.Background(), Options{Model: goldens + model, Trace: goldens + trace + ".safetensors", Device: dev, DType: d})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// The oracle in f32 passes every golden: what is left is the device's own work.
func TestRoundedOraclePasses(t *testing.T) {
	for _, c := range [][2]string{
		{"mar_tiny", "mar_encdec_vis6"}, {"mar_tiny", "mar_encdec_allmasked"}, {"mar_tiny", "mar_diffloss_net"},
		{"mar_tiny", "mar_sample_cfg3_linear"}, {"mar_tiny", "mar_sample_uncond"}, {"mar_tiny_trained", "mar_trained_sample_cfg1"},
		{"vae_tiny", "vae_io_rect"}, {"vae_tiny", "vae_io"}, {"vq_ldm", "vq_ldm_io"}, {"vq_taming.ckpt", "vq_taming_io"},
		{"dit_tiny", "dit_forward"}, {"dit_tiny", "dit_p_sample_loop_cfg4.0"}, {"dit_tiny", "dit_p_sample_loop_cfg1.5"},
		{"dit_tiny", "dit_ddim_sample_loop_cfg4.0"}, {"dit_tiny", "dit_ddim_sample_loop_cfg1.5"},
	} {
		for _, d := range []engine.DType{engine.F32, engine.BF16} {
			r := run(t, ref.New(ref.Rounded), c[0], c[1], d)
			for _, s := range r.Stages {
				if s.Gated && !s.Pass {
					t.Errorf("%s %v: %s: %.3g > %.3g", c[1], d, s.Name, s.MaxAbs, s.Limit)
				}
			}
			if !r.Pass && !t.Failed() {
				t.Errorf("%s: no stage failed, yet the result did", c[1])
			}
		}
	}
}

// bent is an oracle whose LayerNorm is off by a little: every trace that has one
// must notice.
type bent struct {
	engine.Device
	by float32
}

func (b bent) NewStream() (engine.Stream, error) {
	s, err := b.Device.NewStream()
	return bentStream{s, b.by}, err
}

type bentStream struct {
	engine.Stream
	by float32
}

func (s bentStream) Norm(a engine.NormArgs) error {
	a.Eps += s.by
	return s.Stream.Norm(a)
}

func TestWrongDeviceFails(t *testing.T) {
	for _, c := range [][2]string{{"mar_tiny", "mar_encdec_vis6"}, {"mar_tiny", "mar_sample_cfg1"}, {"dit_tiny", "dit_forward"}, {"dit_tiny", "dit_ddim_sample_loop_cfg1.5"}} {
		r := run(t, bent{ref.New(ref.Rounded), 1e-3}, c[0], c[1], engine.F32)
		if r.Pass {
			t.Errorf("%s passes with an eps of 1e-3", c[1])
		}
	}
}

func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ model, trace, want string }{
		{goldens + "mar_tiny.safetensors", goldens + "mar_tiny.safetensors", "no known kind of trace"},
		{goldens + "vae_tiny.safetensors", goldens + "mar_encdec_vis6.safetensors", "holds a model of kind"},
		{goldens + "mar_tiny.safetensors", goldens + "vae_io.safetensors", "holds a model of kind"},
		{goldens + "mar_tiny.safetensors", goldens + "dit_forward.safetensors", "holds a model of kind"},
		{goldens + "dit_tiny.safetensors", goldens + "mar_sample_cfg1.safetensors", "holds a model of kind"},
		{goldens + "mar_tiny.safetensors", filepath.Join(dir, "none.safetensors"), "none.safetensors"},
		{filepath.Join(dir, "none.safetensors"), goldens + "vae_io.safetensors", "none.safetensors"},
	} {
		_, err := Run(context.Background(), Options{Model: c.model, Trace: c.trace, Device: ref.New(ref.Rounded), DType: engine.F32})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s with %s: %v, want %q", c.trace, c.model, err, c.want)
		}
	}
	if _, err := openTrace(goldens+"vae_io.safetensors", 1000); !errors.Is(err, engine.OutOfMemory) || !strings.Contains(err.Error(), "there are 1000 free") {
		t.Errorf("1000 bytes of memory: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Run(ctx, Options{Model: goldens + "mar_tiny.safetensors", Trace: goldens + "mar_encdec_vis6.safetensors", Device: ref.New(ref.Rounded), DType: engine.F32})
	if !errors.Is(err, engine.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
}
