package verify

import (
	"context"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/ref"
)

// recorded reads all tensors of a golden.
func recorded(t *testing.T, name string) record {
	t.Helper()
	f, err := checkpoint.Open(goldens+name, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := record{}
	for _, n := range f.Names() {
		info, _ := f.Tensor(n)
		v := make([]float32, info.Elems())
		if info.DType.Float() {
			err = f.ReadF32(n, v)
		} else {
			k := make([]int64, len(v))
			err = f.ReadI64(n, k)
			for i, x := range k {
				v[i] = float32(x)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		r.add(n, v, info.Shape...)
	}
	return r
}

// tokenizerTrace replays a recording with a golden tokenizer.
func tokenizerTrace(t *testing.T, model string, r record, meta map[string]string) (*Result, error) {
	t.Helper()
	return Run(context.Background(), Options{Model: filepath.Join(goldens, model), Trace: r.save(t, "trace.safetensors", meta), Device: ref.New(ref.Rounded), DType: engine.F32})
}

// A code that is not the nearest fails, whatever the device does; one that is as
// near does not.
func TestWrongCodes(t *testing.T) {
	r := recorded(t, "vq_ldm_io.safetensors")
	indices := r["indices"]
	indices.v[5] = float32(int(indices.v[5]+1) % 256)
	res, err := tokenizerTrace(t, "vq_ldm.safetensors", r, nil)
	if err != nil {
		t.Fatal(err)
	}
	failed := map[string]bool{}
	for _, s := range res.Stages {
		failed[s.Name] = !s.Pass
	}
	if res.Pass || !failed["quantise: distance to the code"] || !failed["quantise: vectors of the codes"] || failed["encode: before quantisation"] || failed["decode: decoded_codes"] {
		t.Errorf("%v", failed)
	}
}

// Tokens of 2×2 positions: the authors' order of columns, their scale.
func TestGroupedTokens(t *testing.T) {
	const p, side = 2, 4
	r, sq := record{}, make([]float32, 4*8*8) // [4,8,8]
	for i := range sq {
		sq[i] = float32(math.Sin(float64(i * i)))
	}
	tokens := make([]float32, len(sq))
	for i, v := range sq {
		c, y, x := i/64, i/8%8, i%8
		tokens[(y/p*side+x/p)*16+c*p*p+y%p*p+x%p] = v * 3 // latent_scale
	}
	// What the tokenizer makes of the square, by another stage's way.
	r.add("z", sq, 1, 4, 8, 8)
	r.add("decoded_z", make([]float32, 3*16*16), 1, 3, 16, 16)
	v := &verifier{ctx: context.Background()}
	var err error
	if v.t, err = openTrace(r.save(t, "z.safetensors", nil), 0); err != nil {
		t.Fatal(err)
	}
	defer v.t.Close()
	f, err := checkpoint.Open(goldens+"kl_ldm.safetensors", checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if v.model, err = checkpoint.Describe(f, checkpoint.MAROptions{}); err != nil {
		t.Fatal(err)
	}
	s, err := v.bind(f, ref.New(ref.Exact), engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	v.device = s
	defer v.close()
	image := s.read(s.m.tok.Decode(s.c, s.image(nhwc(r["z"]))))
	if s.c.Err() != nil {
		t.Fatal(s.c.Err())
	}
	decoded := make([]float32, len(image))
	for i, x := range image { // HWC to CHW
		decoded[i%3*256+i/3] = float32(x)
	}
	g := record{}
	g.add("tokens", tokens, 1, 16, 16)
	g.add("decoded_tokens", decoded, 1, 3, 16, 16)
	meta := map[string]string{"patch_size": "2", "latent_scale": "3"}
	res, err := tokenizerTrace(t, "kl_ldm.safetensors", g, meta)
	if err != nil || !res.Pass || len(res.Stages) != 1 {
		t.Fatalf("%+v, %v", res, err)
	}
	// Another scale is another image; another order of columns, too.
	if res, err := tokenizerTrace(t, "kl_ldm.safetensors", g, map[string]string{"patch_size": "2", "latent_scale": "1"}); err != nil || res.Pass {
		t.Errorf("another scale: %+v, %v", res, err)
	}
	for i := 0; i < len(tokens); i += 4 {
		tokens[i+1], tokens[i+2] = tokens[i+2], tokens[i+1]
	}
	if res, err := tokenizerTrace(t, "kl_ldm.safetensors", g, meta); err != nil || res.Pass {
		t.Errorf("another order: %+v, %v", res, err)
	}
}

func TestTokenizerTraceErrors(t *testing.T) {
	vq, kl := recorded(t, "vq_ldm_io.safetensors"), recorded(t, "kl_ldm_io.safetensors")
	nan := float32(math.NaN())
	for _, c := range []struct {
		model, want string
		meta        map[string]string
		edit        func() record
	}{
		{"kl_ldm.safetensors", "the trace is of a VQ tokenizer, the model is none", nil, func() record { return vq }},
		{"vq_ldm.safetensors", "the trace is of a KL tokenizer, the model is a VQ one", nil, func() record { return kl }},
		{"vq_ldm.safetensors", "tensor indices: element 0 is 256, expected a whole number in 0..255", nil, func() record {
			return record{"image": vq["image"], "prequant": vq["prequant"], "quant": vq["quant"], "indices": {vq["indices"].shape, append([]float32{256}, vq["indices"].v[1:]...)}}
		}},
		{"vq_ldm.safetensors", "tensor indices has shape [1,1,1] for latents of", nil, func() record {
			return record{"image": vq["image"], "prequant": vq["prequant"], "quant": vq["quant"], "indices": {[]int{1, 1, 1}, []float32{0}}}
		}},
		{"vq_ldm.safetensors", "tensor quant is missing", nil, func() record {
			return record{"image": vq["image"], "prequant": vq["prequant"], "indices": vq["indices"]}
		}},
		{"vq_ldm.safetensors", "tensor decoded_codes has shape [1,3,2,2]; this model needs [1,3,4,4]", nil, func() record {
			return record{"codes": {[]int{1, 2, 2}, make([]float32, 4)}, "decoded_codes": {[]int{1, 3, 2, 2}, make([]float32, 12)}}
		}},
		{"kl_ldm.safetensors", "tensor tokens has shape [1,3,16]; this model needs [1,4,16]", map[string]string{"patch_size": "2"}, func() record {
			return record{"tokens": {[]int{1, 3, 16}, make([]float32, 48)}, "decoded_tokens": {[]int{1, 3, 8, 8}, make([]float32, 192)}}
		}},
		{"kl_ldm.safetensors", "metadata patch_size is 0, expected 1", map[string]string{"patch_size": "0"}, func() record {
			return record{"tokens": {[]int{1, 1, 16}, make([]float32, 16)}, "decoded_tokens": {[]int{1, 3, 4, 4}, make([]float32, 48)}}
		}},
		{"kl_ldm.safetensors", "not finite", nil, func() record {
			return record{"z": {[]int{1, 4, 1, 1}, []float32{nan, 0, 0, 0}}, "decoded_z": {[]int{1, 3, 2, 2}, make([]float32, 12)}}
		}},
	} {
		_, err := tokenizerTrace(t, c.model, c.edit(), c.meta)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}
