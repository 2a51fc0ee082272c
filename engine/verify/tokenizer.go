package verify

import (
	"math"

	"margo/engine"
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

// tokenizer compares encoding and decoding.
func (v *verifier) tokenizer() error {
	var err error
	cfg := v.model.KL
	f := cfg.Stride()
	get := func(name string, shape ...int) data { // recorded NCHW, returned NHWC
		d := v.t.get(&err, name, 4)
		v.t.is(&err, name, d, shape...)
		return nhwc(d)
	}
	// sized is get of the tensor that fixes the others' sizes.
	sized := func(name string, channels, least int) (data, []int) {
		d := v.t.get(&err, name, 4)
		if err != nil {
			return data{}, make([]int, 4)
		}
		n, h, w := d.shape[0], d.shape[2], d.shape[3]
		if v.t.is(&err, name, d, n, channels, h, w); err == nil && (n < 1 || h < least || w < least) {
			err = v.t.unknown("tensor %s has shape %s: too small for this model", name, engine.ShapeString(d.shape))
		}
		return nhwc(d), d.shape
	}
	var checks []check
	if v.t.has("moments") {
		img, s := sized("image", cfg.InChannels, f)
		latent := func(name string, channels int) data { return get(name, s[0], channels, s[2]/f, s[3]/f) }
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
	for _, p := range [][2]string{{"z", "decoded_z"}, {"mean", "decoded_mode"}, {"z", "decoded"}} {
		if !v.t.has(p[1]) {
			continue
		}
		z, s := sized(p[0], cfg.EmbedDim, 1)
		out := get(p[1], s[0], cfg.OutChannels, s[2]*f, s[3]*f)
		checks = append(checks, one("decode: "+p[1], out.v, func(s *side) *engine.Tensor { return s.m.kl.Decode(s.c, s.image(z)) }))
	}
	if err != nil {
		return err
	}
	return v.all(checks)
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
