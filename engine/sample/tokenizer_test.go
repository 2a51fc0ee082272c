package sample

import (
	"context"
	"testing"

	"margo/cpu"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/ref"
	"margo/engine/tokenizer"
)

// loadTokenizer binds a golden tokenizer without its encoder.
func loadTokenizer(t *testing.T, name string, scale float64, dev engine.Device, d engine.DType) tokenizer.Autoencoder {
	t.Helper()
	f := openGolden(t, name)
	info, err := checkpoint.Describe(f, checkpoint.MAROptions{})
	if err != nil {
		t.Fatal(err)
	}
	tok, err := tokenizer.New(info.KL, scale, false)
	if err != nil {
		t.Fatal(err)
	}
	params := engine.Params(tok)
	if err := load.Bind(params, f, dev, d, load.Options{Ignore: tok.Unused}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(params) })
	return tok
}

// KL-8 with tokens of 2×2 latent positions (P45), from the first draw to pixels:
// 32×32 latents of 4 channels, 16×16 tokens of 16, an image of 256×256. The
// tokens are the PyTorch peer's, the pixels those of diffusers' AutoencoderKL.
// The limits are twice the recording's own distance from float64, 4.0e-7 for the
// tokens (so the least limit of 1e-6 holds) and 7.7e-7 for the pixels.
func TestKL8Run(t *testing.T) {
	own, err := cpu.New(cpu.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	for name, dev := range map[string]engine.Device{"exact": ref.New(ref.Exact), "cpu": own} {
		m := loadTiny(t, "mar_kl8", dev, engine.F32)
		if c := m.Config; c.Tokens() != 256 || c.TokenDim() != 16 || c.PatchSize != 2 || c.VAEStride != 8 {
			t.Fatalf("not tokens of 2×2 on 32×32: %+v", c)
		}
		tr := trace{t, openGolden(t, "mar_kl8_run")}
		tok := loadTokenizer(t, "kl_diffusers_old", tr.number("latent_scale"), dev, engine.F32)
		e, err := Open(m, tok, dev, Options{})
		if err != nil {
			t.Fatal(err)
		}
		r := Defaults()
		r.Labels, r.Draws = []int{int(tr.number("label"))}, tr
		r.Iters, r.HeadSteps, r.MaxTimestep = int(tr.number("iters")), int(tr.number("head_steps")), int(tr.number("max_timestep"))
		r.CFG, r.Temperature, r.CFGSchedule = tr.number("cfg"), tr.number("temperature"), tr.f.Metadata()["cfg_schedule"]
		images := 0
		err = e.Run(context.Background(), r, nil, func(im Image) error {
			images++
			compare(t, name+" tokens", im.Tokens, tr.floats("tokens"), 1e-6)
			if im.H != 256 || im.W != 256 {
				t.Fatalf("%d×%d pixels", im.W, im.H)
			}
			want, got := tr.floats("decoded_tokens"), make([]float32, len(im.Pixels))
			for i, v := range im.Pixels { // HWC to CHW
				got[i%3*256*256+i/3] = v
			}
			compare(t, name+" pixels", got, want, 1.6e-6)
			return nil
		})
		if err != nil || images != 1 {
			t.Fatalf("%d images, %v", images, err)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
}

// The latents of a VQ tokenizer before quantisation as tokens (P44): what is
// sampled is quantised, then decoded, and the dry run before leaves no trace.
func TestVQRun(t *testing.T) {
	dev := ref.New(ref.Rounded)
	cfg := &mar.Config{ImgSize: 16, VAEStride: 2, PatchSize: 1, VAEEmbedDim: 8, EncoderEmbedDim: 32, EncoderDepth: 1, EncoderNumHeads: 2,
		DecoderEmbedDim: 32, DecoderDepth: 1, DecoderNumHeads: 2, MLPRatio: 2, ClassNum: 3, BufferSize: 2, DiffLossD: 1, DiffLossW: 32,
		NumSamplingSteps: 4, LayerNormEps: 1e-6, DiffusionBatchMul: 1}
	m := randomModel(t, cfg, dev)
	const scale = 2
	vq := loadTokenizer(t, "vq_ldm", scale, dev, engine.F32).(*tokenizer.VQ)
	e, err := Open(m, vq, dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	r := Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep = 2, 2, 2, 3, 500
	used := map[int32]bool{}
	err = e.Run(context.Background(), r, nil, func(im Image) error {
		c, err := engine.NewCtx(dev, engine.F32)
		if err != nil {
			return err
		}
		defer c.Close()
		z := make([]float32, len(im.Tokens))
		for i, v := range im.Tokens {
			z[i] = v / scale
		}
		codes := vq.Nearest(c, c.F32(z, 1, 8, 8, 8))
		for _, k := range codes {
			used[k] = true
		}
		compare(t, "pixels", im.Pixels, c.Download(vq.DecodeCodes(c, codes, 1, 8, 8)), 0)
		return c.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(used) < 3 {
		t.Errorf("only the codes %v are used: the test shows nothing", used)
	}
}
