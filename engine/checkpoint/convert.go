package checkpoint

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"

	"margo/engine"
)

// ConvertOptions of Convert; the zero value keeps everything.
type ConvertOptions struct {
	Open OpenOptions
	MAR  MAROptions
	// DType of the written tensors: F32 or BF16; "" keeps each as it is.
	DType DType
	// Metadata is added to the file and goes before what the source says.
	// margo reads kind, latent_scale, class_names (a JSON array), tokenizer,
	// iters, head_steps, max_timestep, cfg, cfg_schedule and temperature; other
	// keys are kept as they are. config comes from the tensors.
	Metadata map[string]string
}

// Converted says what Convert wrote.
type Converted struct {
	Model   *Model
	State   string   // the state dict that was used
	Params  int64    // parameters written
	Ignored []string // tensors of the source that are not part of the model
	// AssumedScale: Model.AssumedScale was written, for want of one.
	AssumedScale bool
}

// Convert writes any readable checkpoint of a MAR or a KL or VQ tokenizer as
// safetensors with metadata kind, config and latent_scale and, for a MAR, its
// sampling defaults. Tensors get the names of MAR's and LDM's layout. A file that
// records no latent scale gets the authors' 0.2325 if its latents have the shape
// of theirs (a MAR of 16 channels at stride 16, the KL-16), diffusers' 0.18215
// if it is a KL tokenizer of 4 channels in its layout, else none: a MAR's
// tokenizer may know it.
// Every tensor of the model must be there, with its shape, and no other. out
// appears complete or not at all, and may be in.
func Convert(ctx context.Context, in, out string, o ConvertOptions) (*Converted, error) {
	if o.DType != "" && o.DType != F32 && o.DType != BF16 {
		return nil, engine.Errorf("convert "+in, engine.Invalid, "cannot write dtype %s; use F32 or BF16", quote(string(o.DType)))
	}
	if _, ok := o.Metadata["config"]; ok {
		return nil, engine.Errorf("convert "+in, engine.Invalid, "metadata config is made from the tensors and cannot be given")
	}
	f, err := Open(in, o.Open)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	meta := f.Metadata()
	if meta == nil {
		meta = map[string]string{}
	}
	maps.Copy(meta, o.Metadata)
	m, err := describe(f, o.MAR, meta)
	if err != nil {
		var e *engine.Error
		if _, own := describe(f, o.MAR, f.meta); own == nil && errors.As(err, &e) { // the caller's fault then, not the file's
			return nil, &engine.Error{Op: "convert " + in, Kind: engine.Invalid, Err: e.Err}
		}
		return nil, err
	}
	specs := m.Params()
	ignored, err := Check(f, specs, m.Ignorable)
	if err != nil {
		return nil, err
	}
	assumed := m.LatentScale == 0 && m.AssumedScale() > 0
	if assumed {
		m.LatentScale = m.AssumedScale()
	}
	own, err := m.metadata()
	if err != nil {
		return nil, engine.Errorf("convert "+in, engine.Internal, "%w", err)
	}
	maps.Copy(meta, own)

	entries := make([]Entry, len(specs))
	for i, p := range specs {
		info, _ := f.Tensor(p.Name)
		if o.DType != "" {
			info.DType = o.DType
		}
		entries[i] = Entry{info, func(w io.Writer) error {
			defer f.Release(info.Name)
			return f.WriteTo(w, info.Name, info.DType)
		}}
	}
	if err := Save(ctx, out, entries, meta); err != nil {
		return nil, err
	}
	return &Converted{Model: m, State: f.State(), Params: CountParams(specs, ""), Ignored: ignored, AssumedScale: assumed}, nil
}

// sameTokenizer compares what shapes tell.
func sameTokenizer(a, b *KLConfig) bool {
	return a.Ch == b.Ch && a.NEmbed == b.NEmbed && a.NumResBlocks == b.NumResBlocks && a.ZChannels == b.ZChannels && a.EmbedDim == b.EmbedDim &&
		slices.Equal(a.ChMult, b.ChMult)
}
