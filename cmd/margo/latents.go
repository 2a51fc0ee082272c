package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"slices"
	"strconv"
	"unsafe"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/plan"
)

// kindLatents is the metadata kind of a file of latents.
const kindLatents = "latents"

// latents are those of N images, as encode writes and decode reads them.
type latents struct {
	tokenizer string // file name of the tokenizer; "" if unknown
	stride    int    // its stride; 0 if unknown
	scale     float64
	c, h, w   int
	images    []latentImage
	latents   []float32 // [N,c,h,w]; nil with codes alone
	codes     []int32   // [N,h,w]; nil without a codebook
}

// latentImage is where latents come from: width and height are the image's own,
// before it was filled up to whole latent positions.
type latentImage struct {
	Name   string `json:"name"`
	Width  int    `json:"width"`
	Height int    `json:"height"`
}

// save writes the latents, complete or not at all.
func (l *latents) save(ctx context.Context, path string) error {
	text, err := json.Marshal(l.images)
	if err != nil {
		return engine.Errorf("write "+path, engine.Internal, "%w", err)
	}
	meta := map[string]string{"kind": kindLatents, "tokenizer": l.tokenizer, "stride": strconv.Itoa(l.stride), "images": string(text)}
	if l.scale > 0 {
		meta["latent_scale"] = strconv.FormatFloat(l.scale, 'g', -1, 64)
	}
	n := len(l.images)
	entries := []checkpoint.Entry{{Info: checkpoint.Info{Name: "latents", DType: checkpoint.F32, Shape: []int{n, l.c, l.h, l.w}},
		Write: func(w io.Writer) error { return binary.Write(w, binary.LittleEndian, l.latents) }}}
	if l.codes != nil {
		entries = append(entries, checkpoint.Entry{Info: checkpoint.Info{Name: "codes", DType: checkpoint.I32, Shape: []int{n, l.h, l.w}},
			Write: func(w io.Writer) error { return binary.Write(w, binary.LittleEndian, l.codes) }})
	}
	return asFailure(checkpoint.Save(ctx, path, entries, meta))
}

// readLatents reads what encode wrote, or another program: any safetensors or
// PyTorch file with latents [N,C,h,w] or codes [N,h,w] does. What is above room
// bytes is refused before it is read; 0 is no limit.
func readLatents(path string, cfg *checkpoint.KLConfig, room int64) (*latents, error) {
	f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	meta := f.Metadata()
	if k := meta["kind"]; k != "" && k != kindLatents {
		return nil, filef("%s holds a %s, not latents", path, oneLine(k))
	}
	l := &latents{tokenizer: meta["tokenizer"], stride: cfg.Stride()}
	if s := meta["stride"]; s != "" && s != strconv.Itoa(l.stride) {
		return nil, usagef("the latents of %s were made at stride %s, the tokenizer has stride %d", path, oneLine(s), l.stride)
	}
	z, hasLatents := f.Tensor("latents")
	codes, hasCodes := f.Tensor("codes")
	useCodes := hasCodes && cfg.NEmbed > 0 // no need to search again
	x, each := z, 4.0
	if useCodes {
		x, each = codes, 12 // read as I64, then kept as I32
	}
	// A sparse file takes no room on its disk. Counted as a float: sizes may be any.
	need := float64(x.Elems()) * each
	if len(x.Shape) > 0 {
		need += float64(x.Shape[0]) * float64(unsafe.Sizeof(latentImage{}))
	}
	if room > 0 && need > float64(room) {
		return nil, failf("not enough memory: the latents of %s need %s, there are %s free", path, plan.Size(int64(min(need, 1<<62))), plan.Size(room))
	}
	n := 0
	switch {
	case useCodes:
		if len(codes.Shape) != 3 || codes.Elems() < 1 || codes.DType.Float() {
			return nil, filef("%s: codes is %s %s, expected whole numbers [N,h,w]", path, codes.DType, engine.ShapeString(codes.Shape))
		}
		n, l.c, l.h, l.w = codes.Shape[0], cfg.EmbedDim, codes.Shape[1], codes.Shape[2]
		v := make([]int64, codes.Elems())
		if err := f.ReadI64("codes", v); err != nil {
			return nil, err
		}
		l.codes = make([]int32, len(v))
		for i, k := range v {
			if k < 0 || k >= int64(cfg.NEmbed) {
				return nil, filef("%s: code %d is %d, the tokenizer has 0 to %d", path, i, k, cfg.NEmbed-1)
			}
			l.codes[i] = int32(k)
		}
	case hasLatents:
		if len(z.Shape) != 4 || z.Elems() < 1 || !z.DType.Float() {
			return nil, filef("%s: latents is %s %s, expected floating-point [N,C,h,w]", path, z.DType, engine.ShapeString(z.Shape))
		}
		if n, l.c, l.h, l.w = z.Shape[0], z.Shape[1], z.Shape[2], z.Shape[3]; l.c != cfg.EmbedDim {
			return nil, usagef("the latents of %s have %d channels, the tokenizer %d", path, l.c, cfg.EmbedDim)
		}
		l.latents = make([]float32, z.Elems())
		if err := f.ReadF32("latents", l.latents); err != nil {
			return nil, err
		}
	default:
		want := `"latents" [N,C,h,w]`
		if cfg.NEmbed > 0 {
			want += ` or "codes" [N,h,w]`
		}
		return nil, filef("%s has no tensor %s", path, want)
	}
	if text := meta["images"]; text != "" {
		if err := json.Unmarshal([]byte(text), &l.images); err != nil {
			return nil, filef("%s: metadata images: %w", path, err)
		}
		if len(l.images) != n {
			return nil, filef("%s: metadata names %d images, there are latents of %d", path, len(l.images), n)
		}
	}
	l.images = slices.Grow(l.images, n-len(l.images))
	for i := range n {
		if i == len(l.images) {
			l.images = append(l.images, latentImage{Width: l.w * l.stride, Height: l.h * l.stride})
		}
		if im := l.images[i]; im.Width < 1 || im.Height < 1 || im.Width > l.w*l.stride || im.Height > l.h*l.stride {
			return nil, filef("%s: image %d is said to have %d×%d pixels, its latents make %d×%d", path, i, im.Width, im.Height, l.w*l.stride, l.h*l.stride)
		}
	}
	return l, nil
}
