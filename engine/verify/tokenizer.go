package verify

import (
	"math"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/tokenizer"
)

// nhwc reorders a recorded NCHW tensor.
func nhwc(d data) data {
	if len(d.shape) != 4 {
		return d
	}
	n, c, h, w := d.shape[0], d.shape[1], d.shape[2], d.shape[3]
	out := data{[]int{n, h, w, c}, make([]float32, len(d.v))}
	for i := range d.v {
		x, y, ch, im := i%w, i/w%h, i/(w*h)%c, i/(w*h*c)
		out.v[((im*h+y)*w+x)*c+ch] = d.v[i]
	}
	return out
}

// image uploads a recorded NHWC tensor with its four dimensions.
func (x *side) image(d data) *engine.Tensor {
	y := x.c.New(engine.F32, d.shape...)
	x.c.Upload(y, d.v)
	return y
}

// tokens reads what a tokenizer's trace has, of the shapes that the model needs.
type tokens struct {
	v   *verifier
	cfg *checkpoint.KLConfig
	err error
}

// get reads a recorded NCHW tensor as NHWC.
func (r *tokens) get(name string, shape ...int) data {
	d := r.v.t.get(&r.err, name, 4)
	r.v.t.is(&r.err, name, d, shape...)
	return nhwc(d)
}

// sized is get of the tensor that fixes the others' sizes.
func (r *tokens) sized(name string, channels, least int) (data, []int) {
	d := r.v.t.get(&r.err, name, 4)
	if r.err != nil {
		return data{}, make([]int, 4)
	}
	n, h, w := d.shape[0], d.shape[2], d.shape[3]
	if r.v.t.is(&r.err, name, d, n, channels, h, w); r.err == nil && (n < 1 || h < least || w < least) {
		r.err = r.v.t.unknown("tensor %s has shape %s: too small for this model", name, engine.ShapeString(d.shape))
	}
	return nhwc(d), d.shape
}

// codes reads recorded codes [N,h,w].
func (r *tokens) codes(name string) ([]int32, []int) {
	c := r.v.t.ints(&r.err, name, 3, r.cfg.NEmbed)
	info, _ := r.v.t.Tensor(name)
	if r.err != nil {
		return nil, make([]int, 3)
	}
	out := make([]int32, len(c))
	for i, k := range c {
		out[i] = int32(k)
	}
	return out, info.Shape
}

// tokenizer compares encoding and decoding.
func (v *verifier) tokenizer() error {
	cfg := v.model.KL
	r := &tokens{v: v, cfg: cfg}
	f := cfg.Stride()
	var checks []check
	if v.t.has("moments") && cfg.NEmbed > 0 {
		return v.t.unknown("the trace is of a KL tokenizer, the model is a VQ one")
	}
	if v.t.has("moments") {
		img, s := r.sized("image", cfg.InChannels, f)
		latent := func(name string, channels int) data { return r.get(name, s[0], channels, s[2]/f, s[3]/f) }
		names := []string{"encode: moments", "encode: mean", "encode: log variance", "encode: std"}
		goldens := [][]float32{latent("moments", 2*cfg.EmbedDim).v, latent("mean", cfg.EmbedDim).v,
			latent("logvar", cfg.EmbedDim).v, latent("std", cfg.EmbedDim).v}
		noise := data{}
		if v.t.has("sample_noise") {
			names, noise = append(names, "encode: sample"), latent("sample_noise", cfg.EmbedDim)
			goldens = append(goldens, latent("sample", cfg.EmbedDim).v)
		}
		checks = append(checks, check{names: names, goldens: goldens, run: func(s *side) [][]float64 {
			return posterior(s, img, noise)
		}})
	}
	if v.t.has("prequant") || v.t.has("decoded_codes") {
		checks = append(checks, v.quantised(r)...)
	}
	for _, p := range [][2]string{{"z", "decoded_z"}, {"mean", "decoded_mode"}, {"z", "decoded"}} {
		if !v.t.has(p[1]) {
			continue
		}
		z, s := r.sized(p[0], cfg.EmbedDim, 1)
		out := r.get(p[1], s[0], cfg.OutChannels, s[2]*f, s[3]*f)
		checks = append(checks, one("decode: "+p[1], out.v, func(s *side) *engine.Tensor { return s.m.tok.Decode(s.c, s.image(z)) }))
	}
	if v.t.has("decoded_tokens") {
		checks = append(checks, v.grouped(r))
	}
	if r.err != nil {
		return r.err
	}
	return v.all(checks)
}

// quantised compares a codebook's work. Which code is chosen is judged by its
// distance, not its number: F32 cannot tell codes that are nearly as near.
func (v *verifier) quantised(r *tokens) (checks []check) {
	cfg := v.model.KL
	f := cfg.Stride()
	if cfg.NEmbed == 0 {
		r.err = v.t.unknown("the trace is of a VQ tokenizer, the model is none")
		return nil
	}
	if v.t.has("prequant") {
		img, s := r.sized("image", cfg.InChannels, f)
		z := r.get("prequant", s[0], cfg.EmbedDim, s[2]/f, s[3]/f)
		codes, shape := r.codes("indices")
		quant := r.get("quant", s[0], cfg.EmbedDim, s[2]/f, s[3]/f)
		if r.err == nil && len(codes)*cfg.EmbedDim != len(z.v) {
			r.err = v.t.unknown("tensor indices has shape %s for latents of %s", engine.ShapeString(shape), engine.ShapeString(z.shape))
		}
		if r.err != nil {
			return nil
		}
		golden := make([]float32, len(codes))
		v.exact.c.Scoped(func() {
			for i, d := range distances(v.exact, z, codes) {
				golden[i] = float32(d)
			}
		})
		if r.err = v.exact.c.ClearErr(); r.err != nil {
			return nil
		}
		checks = append(checks,
			one("encode: before quantisation", z.v, func(s *side) *engine.Tensor { return s.m.kl.Moments(s.c, s.image(img)) }),
			check{names: []string{"quantise: distance to the code"}, goldens: [][]float32{golden}, run: func(s *side) [][]float64 {
				return [][]float64{distances(s, z, s.m.vq.Nearest(s.c, s.image(z)))}
			}},
			one("quantise: vectors of the codes", quant.v, func(s *side) *engine.Tensor { return s.m.vq.Vectors(s.c, codes, z.shape[0], z.shape[1], z.shape[2]) }))
	}
	if v.t.has("decoded_codes") {
		codes, s := r.codes("codes")
		out := r.get("decoded_codes", s[0], cfg.OutChannels, s[1]*f, s[2]*f)
		checks = append(checks, one("decode: decoded_codes", out.v, func(x *side) *engine.Tensor { return x.m.vq.DecodeCodes(x.c, codes, s[0], s[1], s[2]) }))
	}
	return checks
}

// distances are ‖z − e‖² of each position's code, in float64 on the host.
func distances(s *side, z data, codes []int32) []float64 {
	e := s.read(s.m.vq.Vectors(s.c, codes, z.shape[0], z.shape[1], z.shape[2]))
	if e == nil {
		return nil
	}
	out, ch := make([]float64, len(codes)), z.shape[3]
	for i, x := range e {
		d := float64(z.v[i]) - x
		out[i/ch] += d * d
	}
	return out
}

// grouped compares decoding of a MAR's tokens: squares of patch_size² latent
// positions, multiplied by latent_scale (metadata).
func (v *verifier) grouped(r *tokens) check {
	cfg := v.model.KL
	f := cfg.Stride()
	p := int(v.t.number(&r.err, "patch_size", 1, 1, 1<<8))
	scale := v.t.number(&r.err, "latent_scale", 1, 1e-6, 1e6)
	t := v.t.get(&r.err, "tokens", 3)
	if r.err != nil {
		return check{}
	}
	n, grid := t.shape[0], int(math.Round(math.Sqrt(float64(t.shape[1]))))
	v.t.is(&r.err, "tokens", t, n, grid*grid, cfg.EmbedDim*p*p)
	out := r.get("decoded_tokens", n, cfg.OutChannels, grid*p*f, grid*p*f)
	return one("decode: decoded_tokens", out.v, func(s *side) *engine.Tensor {
		z := tokenizer.FromTokens(s.c, s.c.F32(t.v, t.shape...), grid*p, grid*p, p, float32(scale))
		return s.m.tok.Decode(s.c, z)
	})
}

// posterior computes moments, mean, log variance, standard deviation and, with
// noise, a sample, on the host from the moments of the side.
func posterior(s *side, img, noise data) [][]float64 {
	m := s.m.kl.Moments(s.c, s.image(img))
	moments := s.read(m)
	if moments == nil {
		return nil
	}
	ch := m.Cols() / 2
	out := make([][]float64, 4, 5)
	out[0] = moments
	var sample []float64
	for i := range len(moments) / 2 {
		row := moments[i/ch*2*ch:]
		mean, logvar := row[i%ch], math.Min(math.Max(row[ch+i%ch], -30), 20)
		std := math.Exp(logvar / 2)
		out[1], out[2], out[3] = append(out[1], mean), append(out[2], logvar), append(out[3], std)
		if i < len(noise.v) {
			sample = append(sample, mean+std*float64(noise.v[i]))
		}
	}
	if noise.v != nil {
		out = append(out, sample)
	}
	return out
}
