package checkpoint

import (
	"bytes"
	"errors"
	"testing"

	"margo/engine"
)

// exercise does with a file what margo does: nothing may panic, and whatever
// is read must fit what the table says.
func exercise(t *testing.T, b []byte) {
	f, err := openBytes(b, OpenOptions{})
	if err != nil {
		if !errors.Is(err, engine.IO) && !errors.Is(err, engine.Invalid) {
			t.Fatalf("unclassified error: %v", err)
		}
		return
	}
	for _, name := range f.Names() {
		info, ok := f.Tensor(name)
		if !ok || info.Elems() < 0 {
			t.Fatalf("%q: %v", name, info)
		}
		if info.DType.Size() == 0 {
			continue
		}
		if info.Bytes() > int64(len(b)) {
			t.Fatalf("%q has %d bytes in a file of %d", name, info.Bytes(), len(b))
		}
		raw := make([]byte, info.Bytes())
		if err := f.ReadRaw(name, raw); err != nil && f.Format() == "safetensors" {
			t.Fatal(err)
		} else if x := f.tensors[name]; err == nil && x.stride != nil {
			wantGathered(t, x, raw, b)
		}
		if info.DType.Float() {
			_ = f.ReadAs(name, engine.BF16, make([]byte, 2*info.Elems()))
		} else {
			_ = f.ReadI64(name, make([]int64, info.Elems()))
		}
		f.Release(name)
	}
	for _, key := range []string{"args", "epoch", "latent_scale"} {
		f.Value(key)
	}
	if m, err := Describe(f, MAROptions{}); err == nil {
		_, _ = Check(f, m.Params(), m.Ignorable)
	}
}

// wantGathered compares raw with the elements of a strided tensor of the file, each
// found by its own index.
func wantGathered(t *testing.T, x *tensor, raw, file []byte) {
	size := x.DType.Size()
	for i := range x.Elems() {
		at, rest := int64(0), i
		for d := len(x.Shape) - 1; d >= 0; d-- {
			at += rest % int64(x.Shape[d]) * x.stride[d]
			rest /= int64(x.Shape[d])
		}
		if got, want := raw[i*size:][:size], file[x.off+at*size:][:size]; !bytes.Equal(got, want) {
			t.Fatalf("%q %v %v: element %d is % x, not % x", x.Name, x.Shape, x.stride, i, got, want)
		}
	}
}

// FuzzSafetensors varies header and data apart; skew makes the header's length
// a lie.
func FuzzSafetensors(f *testing.F) {
	f.Add(`{"__metadata__":{"kind":"mar"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}`, floats(1, 2), int64(0))
	f.Add(`{"i":{"dtype":"U8","shape":[1,3],"data_offsets":[0,3]},"h":{"dtype":"F16","shape":[],"data_offsets":[3,5]}}  `, make([]byte, 5), int64(0))
	f.Add(`{"b":{"data_offsets":[1,1],"shape":[0,9],"dtype":"BF16"},"t":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}`, []byte{1}, int64(1))
	f.Add(`{}`, []byte{}, int64(10<<40))
	f.Fuzz(func(t *testing.T, header string, data []byte, skew int64) {
		b := stFile(header, data)
		le.PutUint64(b, uint64(int64(len(header))+skew))
		exercise(t, b)
	})
}

// FuzzPickle covers the stack machine and everything behind it: the pickle is
// put into an archive with two storages.
func FuzzPickle(f *testing.F) {
	f.Add(newPickler().op("}").str("model").op("}(").str("w").tensor("FloatStorage", "0", 4, 1, []int64{1, 2}, []int64{2, 1}).op("us.").Bytes())
	f.Add(newPickler().op("}").str("w").tensor("HalfStorage", "1", 2, 0, []int64{2, 1}, []int64{1, 9}).op("s.").Bytes())
	f.Add(newPickler().op("}(").str("a").tensor("FloatStorage", "0", 4, 1, []int64{2, 1, 1, 2}, []int64{2, 1 << 62, 9, 0}).
		str("b").tensor("HalfStorage", "0", 8, 0, []int64{2, 2, 2}, []int64{1, 4, 2}).op("u.").Bytes())
	f.Add(newPickler().op("}").str("w").tensor("ByteStorage", "0", 16, 1, []int64{2, 3, 2}, []int64{7, 3, 1}).op("s.").Bytes())
	f.Add(newPickler().op("}(").str("args").global("argparse", "Namespace").op(")\x81}").str("class_num").int(3).op("sb").
		str("w").tensor("LongStorage", "0", 2, 0, nil, nil).op("u.").Bytes())
	f.Add(newPickler().global("os", "system").str("true").op("\x85R.").Bytes())
	f.Add([]byte("\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01w\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93)R]\x94(K\x01K\x02es."))
	f.Fuzz(func(t *testing.T, pickle []byte) {
		exercise(t, archiveOf(t, pickle, map[string][]byte{"0": floats(1, 2, 3, 4), "1": {0, 0x3c, 0, 0x40}}))
	})
}

func FuzzZipCheckpoint(f *testing.F) {
	pickle := newPickler().op("}").str("w").tensor("FloatStorage", "0", 2, 0, []int64{2}, []int64{1}).op("s.").Bytes()
	f.Add(archiveOf(f, pickle, map[string][]byte{"0": floats(1, 2)}))
	f.Add([]byte("PK\x05\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(exercise)
}

// FuzzConfig covers metadata of a file whose tensors are those of a small MAR.
func FuzzConfig(f *testing.F) {
	c, err := NamedMAR("mar-base")
	if err != nil {
		f.Fatal(err)
	}
	c.EncoderEmbedDim, c.DecoderEmbedDim, c.EncoderNumHeads, c.DecoderNumHeads, c.EncoderDepth, c.DecoderDepth = 8, 8, 2, 2, 1, 1
	c.DiffLossD, c.DiffLossW, c.ClassNum = 1, 8, 2
	specs := c.Params()
	f.Add(`{"encoder_num_heads": 2, "decoder_num_heads": "2", "patch_size": 1, "mlp_ratio": 4.0, "num_sampling_steps": "10"}`, "0.2325", "2.9", "100", `["a","b"]`)
	f.Add(`{"patch_size": 4, "vae_embed_dim": 1, "encoder_num_heads": 1e0, "decoder_num_heads": 8, "img_size": null}`, "1e-3", "x", "-1", `[]`)
	f.Add(`{"vae_stride": 1099511627776, "patch_size": 2, "encoder_num_heads": 4, "decoder_num_heads": 4}`, "NaN", "1e999", "1e2", `{}`)
	f.Fuzz(func(t *testing.T, config, scale, cfg, steps, names string) {
		meta := map[string]string{"config": config, "latent_scale": scale, "cfg": cfg, "head_steps": steps, "class_names": names}
		file := shapeFile(specs, meta)
		m, err := Describe(file, MAROptions{})
		if err != nil {
			if !errors.Is(err, engine.IO) && !errors.Is(err, engine.Invalid) {
				t.Fatalf("unclassified error: %v", err)
			}
			return
		}
		// An accepted configuration is one that fits the tensors, and survives
		// being written and read.
		if _, err := Check(file, m.Params(), nil); err != nil {
			t.Fatal(err)
		}
		text, err := m.metadata()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Describe(shapeFile(specs, text), MAROptions{})
		if err != nil || *again.MAR != *m.MAR || again.LatentScale != m.LatentScale || again.Sampling != m.Sampling {
			t.Fatalf("%+v became %+v, %v", m, again, err)
		}
	})
}
