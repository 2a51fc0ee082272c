package main

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/atomicfile"
	"margo/engine/checkpoint"
	"margo/engine/ref"
)

// The latent scale is the one given, else the model's, else the tokenizer's,
// else the authors' if the latents look like theirs; two that differ are told.
func TestLatentScale(t *testing.T) {
	dir := t.TempDir()
	f, kl, err := openKind(fashionKL, checkpoint.KindKL, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var entries []checkpoint.Entry
	for _, name := range f.Names() {
		info, _ := f.Tensor(name)
		entries = append(entries, entryOf(f, info))
	}
	meta := f.Metadata()
	delete(meta, "latent_scale")
	silent := filepath.Join(dir, "silent.safetensors")
	if err := errors.Join(checkpoint.Save(t.Context(), silent, entries, meta), f.Close()); err != nil {
		t.Fatal(err)
	}
	f, info, err := openModel(fashion, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, c := range []struct {
		model, given float64
		tokenizer    string
		want         float64
		log          string // part of it; "": nothing is logged
	}{
		{kl.LatentScale, 0, fashionKL, kl.LatentScale, ""},
		{0, 0, fashionKL, kl.LatentScale, ""},
		{0.5, 0, silent, 0.5, ""},
		{0.5, 0, fashionKL, 0.5, "using the model's 0.5"},
		{0.5, 0.25, fashionKL, 0.25, ""},
		{0, 0.25, silent, 0.25, ""},
	} {
		var log buffer
		info.LatentScale = c.model
		tok, err := openScaled(c.tokenizer, fashion, info, c.given, newLogger(&log))
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		if said := log.String(); tok.scale != c.want || (said == "") != (c.log == "") || !strings.Contains(said, c.log) {
			t.Errorf("%+v: scale %g, log %q", c, tok.scale, said)
		}
		tok.close()
	}
	// Nobody knows: an error for latents of other makers.
	info.LatentScale = 0
	if _, err := openTokenizer(silent, fashion, info, newLogger(&buffer{})); exitCode(err) != exitUsage || !strings.Contains(err.Error(), "--latent-scale") {
		t.Errorf("no scale: %v", err)
	}
	// Pixels have no latents.
	c := *info.MAR
	c.VAEStride, c.VAEEmbedDim = 1, 3
	pixels := &checkpoint.Model{Kind: checkpoint.KindMAR, MAR: &c, LatentScale: 0.2325}
	if tok, err := openTokenizer("", "pixels", pixels, nil); err != nil || tok.scale != 1 {
		t.Errorf("pixels: %+v, %v", tok, err)
	}
	if _, err := openScaled("", "pixels", pixels, 0.5, nil); exitCode(err) != exitUsage {
		t.Errorf("pixels with a scale: %v", err)
	}
}

// Loading stops between two tensors, and gives back what it took.
func TestLoadingIsCancelled(t *testing.T) {
	f, info, err := openModel(fashion, checkpoint.MAROptions{}, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dev := ref.New(ref.Exact)
	free := dev.Info().MemFree
	if _, err := loadModel(ctx, f, info, dev, engine.F32, false); exitCode(err) != exitInterrupted {
		t.Errorf("exit %d: %v", exitCode(err), err)
	}
	if now := dev.Info().MemFree; now != free {
		t.Errorf("%d bytes are not given back", free-now)
	}
}

// A file that cannot be written is no bad input file.
func TestWriteErrors(t *testing.T) {
	err := checkpoint.Save(t.Context(), filepath.Join(t.TempDir(), "no", "x.safetensors"), nil, nil)
	if !errors.Is(err, atomicfile.ErrWrite) || exitCode(err) != exitFailed {
		t.Errorf("exit %d: %v", exitCode(err), err)
	}
}
