package main

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"

	"margo/cpu"
	"margo/cuda"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/dit"
	"margo/engine/load"
	"margo/engine/mar"
	"margo/engine/ref"
	"margo/engine/sample"
	"margo/engine/tokenizer"
)

// openDevice opens a device by the name that --device takes; threads 0 means
// all that the process may use.
func openDevice(name string, threads int) (engine.Device, error) {
	switch {
	case name == "cpu":
		return cpu.New(cpu.Options{Threads: threads})
	case name == "ref":
		return ref.New(ref.Exact), nil
	case isCUDA(name):
		if d, err := cuda.Open(name, cuda.Options{}); err == nil {
			return d, nil
		} else if errors.Is(err, engine.Invalid) {
			return nil, usagef("--device: %w", err)
		} else {
			return nil, failf("--device %s: %s: %w", name, noCUDA, err)
		}
	}
	return nil, usagef("--device: %q is not a device; use cpu, cuda:0, emu:0 or ref (margo devices lists them)", name)
}

// isCUDA reports whether a device's name is one of package cuda.
func isCUDA(name string) bool {
	kind, _, _ := strings.Cut(name, ":")
	return kind == "cuda" || kind == "emu"
}

// noCUDA begins the message that says why there is no such device.
const noCUDA = "no CUDA device"

// openModel opens the file of a MAR or DiT and reads what it says about itself; no
// weights are loaded yet. Shapes are checked, so what a caller refuses next is refused
// before any work.
func openModel(path string, shape checkpoint.MAROptions, open checkpoint.OpenOptions) (*checkpoint.File, *checkpoint.Model, error) {
	f, info, err := openKind(path, checkpoint.KindMAR, shape, open)
	return f, info, err
}

// openKind opens a file that must hold a model of a kind; KindKL stands for any
// tokenizer, KindMAR for any model that makes images.
func openKind(path, kind string, shape checkpoint.MAROptions, open checkpoint.OpenOptions) (*checkpoint.File, *checkpoint.Model, error) {
	f, err := checkpoint.Open(path, open)
	if err != nil {
		return nil, nil, err
	}
	info, err := checkpoint.Describe(f, shape)
	if err == nil && info.IsTokenizer() != (kind == checkpoint.KindKL) {
		what := map[string]string{checkpoint.KindMAR: "a MAR", checkpoint.KindDiT: "a DiT", checkpoint.KindKL: "a tokenizer", checkpoint.KindVQ: "a tokenizer"}
		err = filef("%s holds %s, not %s", path, what[info.Kind], map[bool]string{true: "a tokenizer", false: "a MAR or DiT"}[kind == checkpoint.KindKL])
	}
	if err == nil {
		_, err = checkpoint.Check(f, info.Params(), info.Ignorable)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// generator is a MAR or a DiT: its parameters, and how to sample from it.
type generator struct {
	params []engine.NamedParam
	open   func(tok sample.Decoder, dev engine.Device, o sample.Options) (*sample.Engine, error)
}

// newGenerator describes the model, without values; fp8 asks for the head's weights in FP8.
func newGenerator(info *checkpoint.Model, fp8 bool) (*generator, error) {
	if info.Kind == checkpoint.KindDiT {
		if fp8 {
			return nil, usagef("--head-weights is for a MAR's diffusion head, and this is a DiT")
		}
		m, err := dit.New(info.DiT)
		if err != nil {
			return nil, err
		}
		return &generator{engine.Params(m), func(tok sample.Decoder, dev engine.Device, o sample.Options) (*sample.Engine, error) {
			return sample.OpenDiT(m, tok, dev, o)
		}}, nil
	}
	m, err := mar.New(info.MAR)
	if err != nil {
		return nil, err
	}
	if fp8 {
		if m.Head == nil {
			return nil, usagef("--head-weights is for a MAR's diffusion head, and this model has the %s head", info.MAR.HeadKind())
		}
		m.Head.FP8()
	}
	return &generator{engine.Params(m), func(tok sample.Decoder, dev engine.Device, o sample.Options) (*sample.Engine, error) {
		return sample.Open(m, tok, dev, o)
	}}, nil
}

// loadModel puts the weights on a device, those of the head in FP8 if fp8 is set.
func loadModel(ctx context.Context, f *checkpoint.File, info *checkpoint.Model, dev engine.Device, d engine.DType, fp8 bool) (*generator, error) {
	g, err := newGenerator(info, fp8)
	if err != nil {
		return nil, err
	}
	return g, load.Bind(g.params, f, dev, d, load.Options{Progress: until(ctx)})
}

// until ends a loading between two tensors once ctx is done.
func until(ctx context.Context) func(done, total int64) error {
	return func(_, _ int64) error { return ctx.Err() }
}

// tokenizerFile is what a MAR's images are made with: an open file, or none for
// a model that works on pixels.
type tokenizerFile struct {
	path  string
	file  *checkpoint.File
	info  *checkpoint.Model
	scale float64 // tokens = latents · scale
	tiling
}

// openTokenizer opens the tokenizer of a MAR: the file given, else the one that
// the model names, beside it. It refuses one whose latents are not the model's.
func openTokenizer(path, modelPath string, info *checkpoint.Model, log *logrus.Logger) (*tokenizerFile, error) {
	return openScaled(path, modelPath, info, 0, log)
}

// openScaled is openTokenizer with a latent scale that, unless it is 0, goes
// before those that the files record.
func openScaled(path, modelPath string, info *checkpoint.Model, givenScale float64, log *logrus.Logger) (*tokenizerFile, error) {
	_, channels := info.Latents()
	if path == "" && info.Tokenizer == "" {
		if info.Stride() == 1 && channels == 3 {
			if givenScale > 0 {
				return nil, usagef("--latent-scale: %s works on pixels and has no latents", modelPath)
			}
			return &tokenizerFile{scale: 1}, nil // the tokens are pixels
		}
		return nil, usagef("%s does not name its tokenizer; pass --tokenizer FILE (kl16.ckpt for the published MAR models, sd-vae-ft-mse or -ema for the DiT ones)", modelPath)
	}
	named := path == ""
	if named {
		// Only a file beside the model: a model from a stranger names no other.
		path = filepath.Join(filepath.Dir(modelPath), filepath.Base(info.Tokenizer))
		if _, err := os.Stat(path); err != nil {
			return nil, filef("%s names the tokenizer %s, which is not beside it: %w; pass --tokenizer FILE", modelPath, filepath.Base(path), cause(err))
		}
	}
	f, tok, err := openKind(path, checkpoint.KindKL, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		return nil, err
	}
	t := &tokenizerFile{path: path, file: f, info: tok}
	if c := info.MAR; c != nil && c.Discrete() {
		if tok.KL.NEmbed != c.CodebookSize || tok.KL.Stride() != c.VAEStride {
			f.Close()
			return nil, usagef("the tokenizer %s has %d codes at stride %d, the model %s wants %d at stride %d",
				path, tok.KL.NEmbed, tok.KL.Stride(), modelPath, c.CodebookSize, c.VAEStride)
		}
		t.scale = 1 // of codes there is none
	} else if tok.KL.EmbedDim != channels || tok.KL.Stride() != info.Stride() {
		f.Close()
		return nil, usagef("the tokenizer %s has latents of %d channels at stride %d, the model %s wants %d at stride %d",
			path, tok.KL.EmbedDim, tok.KL.Stride(), modelPath, channels, info.Stride())
	}
	if tok.KL.OutChannels != 3 {
		f.Close()
		return nil, usagef("the tokenizer %s makes images of %d channels, not RGB", path, tok.KL.OutChannels)
	}
	switch m, k := info.LatentScale, tok.LatentScale; {
	case t.scale > 0: // of codes
	case givenScale > 0:
		t.scale = givenScale
	case m > 0:
		// The model was trained on latents of its scale, whatever others use.
		if t.scale = m; k > 0 && math.Abs(k/m-1) > 1e-6 {
			log.Warnf("latent scale: the model %s says %g, the tokenizer %s %g; using the model's %g (--latent-scale sets another)", modelPath, m, path, k, m)
		}
	case k > 0:
		t.scale = k
	case info.AuthorsLatents():
		t.scale = checkpoint.DefaultLatentScale
		log.Infof("neither file records the latent scale; using the authors' %g (margo convert --latent-scale records another)", t.scale)
	case info.AssumedScale() > 0:
		t.scale = info.AssumedScale()
		log.Infof("neither file records the latent scale; using DiT's %g (margo convert --latent-scale records another)", t.scale)
	case tok.AssumedScale() > 0:
		t.scale = tok.AssumedScale()
		log.Infof("neither file records the latent scale; using %g, the default of the tokenizer's library (margo convert --latent-scale records another)", t.scale)
	default:
		f.Close()
		return nil, usagef("neither %s nor %s records the latent scale; pass --latent-scale S (1 over the latents' standard deviation), or record it with margo convert", modelPath, path)
	}
	return t, nil
}

// raw describes the tokenizer, without values, and lists its parameters. The
// encoder is there only if it is needed.
func (t *tokenizerFile) raw(encode bool) (tokenizer.Tokenizer, []engine.NamedParam, error) {
	if t.file == nil {
		return tokenizer.Pixels{}, nil, nil
	}
	k, err := tokenizer.New(t.info.KL, t.scale, encode)
	if err != nil {
		return nil, nil, err
	}
	return k, engine.Params(k), nil
}

// make is raw, working tile by tile if that was asked for.
func (t *tokenizerFile) make(encode bool) (tokenizer.Tokenizer, []engine.NamedParam, error) {
	tok, params, err := t.raw(encode)
	if err == nil {
		tok, err = t.wrap(tok)
	}
	return tok, params, err
}

// load puts the tokenizer on a device.
func (t *tokenizerFile) load(ctx context.Context, dev engine.Device, d engine.DType, encode bool) (tokenizer.Tokenizer, error) {
	tok, err := t.loadRaw(ctx, dev, d, encode)
	if err != nil {
		return nil, err
	}
	return t.wrap(tok)
}

func (t *tokenizerFile) loadRaw(ctx context.Context, dev engine.Device, d engine.DType, encode bool) (tokenizer.Tokenizer, error) {
	tok, params, err := t.raw(encode)
	if k, ok := tok.(tokenizer.Autoencoder); ok && err == nil {
		err = load.Bind(params, t.file, dev, d, load.Options{Ignore: k.Unused, Progress: until(ctx)})
	}
	return tok, err
}

func (t *tokenizerFile) close() {
	if t.file != nil {
		t.file.Close()
	}
}
