package verify

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/ref"
)

// tensor is a tensor of a file under edit.
type tensor struct {
	checkpoint.Info
	raw []byte
}

// reshape keeps as much of the contents as fits; what is more is zero.
func (x *tensor) reshape(shape ...int) {
	x.Shape = shape
	x.raw = append(x.raw, make([]byte, x.Bytes())...)[:x.Bytes()]
}

// first copies the first n rows of the leading dimension.
func (x *tensor) first(n int) {
	shape := slices.Clone(x.Shape)
	shape[0] = n
	x.reshape(shape...)
}

func (x *tensor) setF32(i int, v float32) {
	binary.LittleEndian.PutUint32(x.raw[4*i:], math.Float32bits(v))
}
func (x *tensor) setI64(i int, v int64) { binary.LittleEndian.PutUint64(x.raw[8*i:], uint64(v)) }

// edit writes a changed copy of a golden and returns its path.
func edit(t testing.TB, name string, change func(e map[string]*tensor, meta map[string]string)) string {
	t.Helper()
	f, err := checkpoint.Open(goldens+name+".safetensors", checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := map[string]*tensor{}
	for _, n := range f.Names() {
		info, _ := f.Tensor(n)
		x := &tensor{info, make([]byte, info.Bytes())}
		if err := f.ReadRaw(n, x.raw); err != nil {
			t.Fatal(err)
		}
		all[n] = x
	}
	meta := maps.Clone(f.Metadata())
	if meta == nil {
		meta = map[string]string{}
	}
	change(all, meta)
	var entries []checkpoint.Entry
	for n, x := range all {
		x.Name = n
		entries = append(entries, checkpoint.Entry{Info: x.Info, Write: func(w io.Writer) error { _, err := w.Write(x.raw); return err }})
	}
	path := filepath.Join(t.TempDir(), name+".safetensors")
	if err := checkpoint.Save(context.Background(), path, entries, meta); err != nil {
		t.Fatal(err)
	}
	return path
}

type tensors = map[string]*tensor

func TestBadTraces(t *testing.T) {
	type text = map[string]string
	meta := func(key, value string) func(tensors, text) { return func(_ tensors, m text) { m[key] = value } }
	drop := func(name string) func(tensors, text) { return func(e tensors, _ text) { delete(e, name) } }
	shape := func(name string, s ...int) func(tensors, text) {
		return func(e tensors, _ text) { e[name].reshape(s...) }
	}
	put := func(name string, i int, v float32) func(tensors, text) {
		return func(e tensors, _ text) { e[name].setF32(i, v) }
	}
	whole := func(name string, i int, v int64) func(tensors, text) {
		return func(e tensors, _ text) { e[name].setI64(i, v) }
	}
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	for _, c := range []struct {
		trace  string
		change func(tensors, text)
		want   string
	}{
		{"mar_sample_cfg1", meta("num_iter", "-1"), "num_iter"},
		{"mar_sample_cfg1", meta("num_iter", "1e18"), "num_iter"},
		{"mar_sample_cfg1", meta("num_iter", "3"), "num_iter"},
		{"mar_sample_cfg1", meta("num_iter", "5"), "num_iter"},
		{"mar_sample_cfg1", meta("num_iter", "NaN"), "num_iter"},
		{"mar_sample_cfg1", meta("num_iter", "four"), "num_iter"},
		{"mar_sample_cfg1", drop("iter2.tokens_in"), "num_iter"},
		{"mar_sample_cfg1", meta("bsz", "3"), "bsz"},
		{"mar_sample_cfg1", meta("bsz", "0"), "bsz"},
		{"mar_sample_cfg1", meta("diffusion_steps", "1"), "diffusion_steps"},
		{"mar_sample_cfg1", meta("diffusion_steps", "-5"), "diffusion_steps"},
		{"mar_sample_cfg1", meta("diffusion_steps", "10.5"), "diffusion_steps"},
		{"mar_sample_cfg1", meta("diffusion_steps", "1e300"), "diffusion_steps"},
		{"mar_sample_cfg1", meta("diffusion_steps", "11"), "step_noise"},
		{"mar_sample_cfg1", meta("temperature", "-1"), "temperature"},
		{"mar_sample_cfg1", meta("temperature", "Inf"), "temperature"},
		{"mar_sample_cfg1", meta("cfg", "NaN"), "cfg"},
		{"mar_sample_cfg1", meta("cfg", "3"), "cfg"},
		{"mar_sample_cfg3_linear", meta("cfg", "1"), "cfg"},
		{"mar_sample_cfg1", meta("cfg_schedule", "cubic"), "cfg_schedule"},
		{"mar_sample_cfg1", shape("orders", 0, 16), "orders"},
		{"mar_sample_cfg1", shape("orders", 2, 15), "orders"},
		{"mar_sample_cfg1", shape("orders", 32, 1), "orders"},
		{"mar_sample_cfg1", whole("orders", 3, 16), "orders"},
		{"mar_sample_cfg1", whole("orders", 3, -1), "orders"},
		{"mar_sample_cfg1", whole("orders", 3, math.MinInt64), "orders"},
		{"mar_sample_cfg1", func(e tensors, _ text) { copy(e["orders"].raw[:8], e["orders"].raw[8:16]) }, "orders"},
		{"mar_sample_cfg1", shape("iter1.dec_out_z", 1, 1, 64), "iter1.dec_out_z"},
		{"mar_sample_cfg1", shape("iter1.dec_out_z", 2, 16, 0), "iter1.dec_out_z"},
		{"mar_sample_cfg1", shape("iter1.enc_out", 1, 8, 64), "iter1.enc_out"},
		{"mar_sample_cfg1", shape("iter1.enc_out", 2, 8, 0), "iter1.enc_out"},
		{"mar_sample_cfg1", shape("iter0.tokens_in", 0, 16, 16), "iter0.tokens_in"},
		{"mar_sample_cfg1", shape("iter0.mask", 0, 16), "iter0.mask"},
		{"mar_sample_cfg1", shape("iter0.tokens_in", 2, 16), "iter0.tokens_in"},
		{"mar_sample_cfg1", shape("iter0.class_embedding", 1, 64), "iter0.class_embedding"},
		{"mar_sample_cfg1", func(e tensors, _ text) {
			for _, n := range []string{"tokens_in", "mask", "class_embedding", "enc_out", "dec_out_z"} {
				e["iter1."+n].first(1)
			}
		}, "iter1.tokens_in"},
		{"mar_sample_cfg3_linear", func(e tensors, _ text) {
			for _, n := range []string{"tokens_in", "mask", "class_embedding", "enc_out", "dec_out_z"} {
				e["iter0."+n].first(0)
			}
		}, "iter0.tokens_in"},
		{"mar_sample_cfg3_linear", func(e tensors, _ text) { m := e["iter1.mask"]; half := len(m.raw) / 2; clear(m.raw[half:]) }, "iter"},
		{"mar_sample_cfg1", func(e tensors, _ text) { clear(e["iter1.mask"].raw) }, "iter"},
		{"mar_sample_cfg1", shape("iter0.cfg_iter", 0), "iter0.cfg_iter"},
		{"mar_sample_cfg1", put("iter0.cfg_iter", 0, nan), "iter0.cfg_iter"},
		{"mar_sample_cfg1", put("iter3.step_noise", 5, inf), "iter3.step_noise"},
		{"mar_sample_cfg1", shape("iter3.step_noise", 10, 0, 16), "iter3.step_noise"},
		{"mar_sample_cfg1", shape("iter3.init_noise", 1, 16), "iter3.init_noise"},
		{"mar_sample_cfg1", shape("iter3.sampled", 1, 16), "iter3.sampled"},
		{"mar_sample_cfg1", drop("iter3.step_samples"), "iter3.step_samples"},
		{"mar_sample_cfg1", shape("final_tokens", 2, 16, 16, 1), "final_tokens"},
		{"mar_sample_cfg1", shape("labels", 3), "labels"},
		{"mar_sample_cfg1", shape("labels", 0), "labels"},
		{"mar_sample_cfg1", whole("labels", 0, 10), "labels"},
		{"mar_encdec_vis6", shape("enc_out", 1, 1, 64), "enc_out"},
		{"mar_encdec_vis6", shape("dec_out_z", 1, 1, 64), "dec_out_z"},
		{"mar_encdec_vis6", shape("enc_block1_in", 1, 1, 64), "enc_block1_in"},
		{"mar_encdec_vis6", shape("dec_block1_out", 1, 24, 0), "dec_block1_out"},
		{"mar_encdec_vis6", drop("dec_block0_out"), "dec_block0_out"},
		{"mar_encdec_vis6", shape("labels", 1), "labels"},
		{"mar_encdec_vis6", func(e tensors, _ text) { e["mask"].raw[0] ^= 7 }, "mask"},
		{"mar_diffloss_net", shape("x", 0, 16), "x"},
		{"mar_diffloss_net", shape("t", 0), "tensor"},
		{"mar_diffloss_net", whole("t", 0, 1000), "t"},
		{"mar_diffloss_net", shape("timestep_embedding", 1, 1), "timestep_embedding"},
		{"mar_diffloss_net", shape("ps_index", 0), "ps_"},
		{"mar_diffloss_net", whole("ps_index", 0, 10), "ps_index"},
		{"mar_diffloss_net", meta("diffusion_steps", "0"), "diffusion_steps"},
		{"mar_diffloss_net", meta("temperature", "x"), "temperature"},
		{"vae_io", shape("image", 2, 1, 32, 32), "image"},
		{"vae_io", shape("image", 0, 3, 32, 32), "image"},
		{"vae_io", shape("moments", 2, 8, 0, 16), "moments"},
		{"vae_io", shape("sample_noise", 2, 4, 1, 1), "sample_noise"},
		{"vae_io", shape("sample", 1, 4, 16, 16), "sample"},
		{"vae_io", shape("z", 2, 4, 0, 16), "z"},
		{"vae_io", shape("decoded_z", 2, 3, 16, 32), "decoded_z"},
		{"vae_io", drop("mean"), "mean"},
		{"vae_io_rect", shape("z", 1, 4, 8), "z"},
	} {
		model := "mar_tiny"
		if strings.HasPrefix(c.trace, "vae") {
			model = "vae_tiny"
		}
		path := edit(t, c.trace, c.change)
		_, err := Run(context.Background(), Options{Model: goldens + model + ".safetensors", Trace: path, Device: ref.New(ref.Rounded), DType: engine.F32})
		if !errors.Is(err, engine.IO) || !strings.Contains(strings.Replace(err.Error(), path, "", 1), c.want) {
			t.Errorf("%s, %s: %v", c.trace, c.want, err)
		}
	}
}

// Settings that metadata may change do change what is computed.
func TestHeadMetadata(t *testing.T) {
	for _, c := range []struct {
		key, value string
		pass       bool
	}{{"diffusion_steps", "10", true}, {"diffusion_steps", "100", false}, {"temperature", "0.9", true}, {"temperature", "1", false}} {
		path := edit(t, "mar_diffloss_net", func(_ tensors, m map[string]string) { m[c.key] = c.value })
		r, err := Run(context.Background(), Options{Model: goldens + "mar_tiny.safetensors", Trace: path, Device: ref.New(ref.Rounded), DType: engine.F32})
		if err != nil || r.Pass != c.pass {
			t.Errorf("%s %s: %v, %v", c.key, c.value, r, err)
		}
	}
}

// FuzzTrace changes one thing of a golden: an element, a shape or a value of the
// metadata. Whatever it is, the replay ends with a result or an error.
func FuzzTrace(f *testing.F) {
	keys := []string{"num_iter", "bsz", "diffusion_steps", "cfg", "temperature", "cfg_schedule"}
	names := []string{"mar_sample_uncond", "mar_encdec_allmasked", "mar_diffloss_net", "vae_io_rect"}
	f.Add(uint8(0), uint16(0), uint16(0), uint32(1<<31), "-1")
	f.Add(uint8(1), uint16(3), uint16(1), uint32(0), "")
	f.Add(uint8(2), uint16(9), uint16(2), uint32(math.MaxUint32), "1e18")
	f.Fuzz(func(t *testing.T, trace uint8, which, at uint16, value uint32, text string) {
		name := names[int(trace)%len(names)]
		path := edit(t, name, func(e tensors, m map[string]string) {
			order := slices.Sorted(maps.Keys(e))
			x := e[order[int(which)%len(order)]]
			switch {
			case text != "" && utf8.ValidString(text):
				m[keys[int(which)%len(keys)]] = text
			case at%2 == 0 && len(x.Shape) > 0:
				shape := slices.Clone(x.Shape)
				shape[int(at/2)%len(shape)] = int(value % 40)
				x.reshape(shape...)
			case len(x.raw) >= 4:
				binary.LittleEndian.PutUint32(x.raw[int(at)%(len(x.raw)/4)*4:], value)
			}
		})
		model := "mar_tiny"
		if strings.HasPrefix(name, "vae") {
			model = "vae_tiny"
		}
		r, err := Run(context.Background(), Options{Model: goldens + model + ".safetensors", Trace: path, Device: ref.New(ref.Rounded), DType: engine.F32})
		if err != nil && !errors.Is(err, engine.IO) || err == nil && r == nil {
			t.Errorf("%v, %v", r, err)
		}
	})
}
