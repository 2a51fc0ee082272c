package checkpoint

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"margo/engine"
)

// ditSign is a tensor that only diffusers' DiT has: with proj_out_1 it is no other
// Transformer2DModel.
const (
	ditSign  = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
	ditSign2 = "proj_out_1.weight"
)

// ditNames are the parts of diffusers' DiT outside its blocks and, after "N.", in
// them, with the authors' names.
var ditNames = map[string]string{
	"pos_embed.proj": "x_embedder.proj",
	"proj_out_1":     "final_layer.adaLN_modulation.1",
	"proj_out_2":     "final_layer.linear",

	"N.norm1.linear":                             "adaLN_modulation.1",
	"N.attn1.to_out.0":                           "attn.proj",
	"N.ff.net.0.proj":                            "mlp.fc1",
	"N.ff.net.2":                                 "mlp.fc2",
	"N.norm1.emb.timestep_embedder.linear_1":     "t_embedder.mlp.0",
	"N.norm1.emb.timestep_embedder.linear_2":     "t_embedder.mlp.2",
	"N.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}

var ditBlock = regexp.MustCompile(`^transformer_blocks\.(\d{1,4})\.(.+)\.(weight|bias)$`)

// translateDiT gives the tensors of diffusers' DiT (Transformer2DModel, with ada_norm_zero)
// the authors' names:
//
//	transformer_blocks.I.norm1.linear     blocks.I.adaLN_modulation.1
//	….attn1.to_q, to_k, to_v              blocks.I.attn.qkv, one after the other
//	….attn1.to_out.0                      blocks.I.attn.proj
//	….ff.net.0.proj, ff.net.2             blocks.I.mlp.fc1, .fc2
//	….norm1.emb.timestep_embedder.linear_1, _2    t_embedder.mlp.0, .2
//	….norm1.emb.class_embedder            y_embedder
//	pos_embed.proj                        x_embedder.proj
//	proj_out_1, proj_out_2                final_layer.adaLN_modulation.1, .linear
//
// diffusers keeps a copy of both embedders in every block, and nothing that says they
// are the same: sameEmbedders compares them. Its timestep embedding divides by 127 where
// the authors' divides by 128 (embeddings.py CombinedTimestepLabelEmbeddings,
// downscale_freq_shift 1), and its second norm has an eps of 1e-5 (norm_eps) where the
// authors' has 1e-6; margo computes the authors', which the published weights were
// trained with.
func (f *File) translateDiT() error {
	if f.tensors[ditSign] == nil || f.tensors[ditSign2] == nil {
		return nil
	}
	out, source := map[string]*tensor{}, map[string]string{}
	put := func(to, from string, t *tensor) error {
		if out[to] != nil {
			return badFile(f.path, "tensors %s and %s are the same part of the model", quote(from), quote(source[to]))
		}
		out[to], source[to], t.Name = t, from, to
		return nil
	}
	for _, name := range f.Names() {
		t := f.tensors[name]
		m := ditBlock.FindStringSubmatch(name)
		if m == nil {
			part, end := name, ""
			if i := strings.LastIndexByte(name, '.'); i > 0 {
				part, end = name[:i], name[i:]
			}
			to := name
			if s, ok := ditNames[part]; ok {
				to = s + end
			}
			if err := put(to, name, t); err != nil {
				return err
			}
			continue
		}
		block, part, end := m[1], m[2], m[3]
		to, ok := ditNames["N."+part]
		switch {
		case ok && strings.HasPrefix(part, "norm1.emb."):
			if block != "0" {
				f.copies = append(f.copies, [2]*tensor{f.tensors["transformer_blocks.0."+part+"."+end], t})
				continue
			}
			to += "." + end
		case ok:
			to = "blocks." + block + "." + to + "." + end
		case part == "attn1.to_k" || part == "attn1.to_v":
			if f.tensors["transformer_blocks."+block+".attn1.to_q."+end] != nil {
				continue // with to_q
			}
			to = name
		case part == "attn1.to_q":
			joined, err := f.join(strings.TrimSuffix(name, "to_q."+end), end)
			if err != nil {
				return err
			}
			to, t = "blocks."+block+".attn.qkv."+end, joined
		default:
			to = name
		}
		if err := put(to, name, t); err != nil {
			return err
		}
	}
	f.tensors, f.source, f.layout = out, source, LayoutDiffusers
	return nil
}

// join is queries, keys and values of a block as one tensor.
func (f *File) join(prefix, end string) (*tensor, error) {
	j := &tensor{derived: &derived{}}
	for _, p := range []string{"to_q.", "to_k.", "to_v."} {
		t := f.tensors[prefix+p+end]
		if t == nil {
			return nil, badFile(f.path, "no tensor %s beside %s", quote(prefix+p+end), quote(prefix+"to_q."+end))
		}
		first := f.tensors[prefix+"to_q."+end]
		if len(t.Shape) == 0 || t.DType != first.DType || !slices.Equal(t.Shape[1:], first.Shape[1:]) {
			return nil, badFile(f.path, "tensor %s does not go with %s", quote(t.Name), quote(first.Name))
		}
		if j.Shape == nil {
			j.Info = Info{DType: t.DType, Shape: slices.Clone(t.Shape)}
		} else {
			j.Shape[0] += t.Shape[0]
		}
		j.derived.parts = append(j.derived.parts, t)
	}
	return j, nil
}

// sameEmbedders demands that the copies of the embedders in the blocks are the first
// block's: the authors' model has one.
func (f *File) sameEmbedders() error {
	for _, c := range f.copies {
		if c[0] == nil {
			return badFile(f.path, "tensor %s has no counterpart in block 0", quote(c[1].Name))
		}
		same, err := f.same(c[0], c[1])
		if err != nil {
			return err
		}
		if !same {
			return engine.Errorf("open "+f.path, engine.Unsupported, "tensor %s differs from that of block 0: a DiT has one embedding of timestep and class for all blocks", quote(c[1].Name))
		}
	}
	return nil
}

// diffusersDiTConfig is what diffusers' config.json beside the file says, by the
// authors' names; nil if there is none.
func (f *File) diffusersDiTConfig() (map[string]any, error) {
	if f.layout != LayoutDiffusers {
		return nil, nil
	}
	m, err := f.besideConfig()
	if m == nil || err != nil {
		return nil, err
	}
	if c := fmt.Sprint(m["_class_name"]); c != "Transformer2DModel" && c != "DiTTransformer2DModel" {
		return nil, nil
	}
	for key, want := range map[string]string{"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"} {
		if v, ok := m[key]; ok && v != nil && fmt.Sprint(v) != want {
			return nil, engine.Errorf("open "+f.path, engine.Unsupported, "config.json: %s is %v; only %s is supported", key, v, want)
		}
	}
	return map[string]any{"input_size": m["sample_size"], "patch_size": m["patch_size"], "num_heads": m["num_attention_heads"]}, nil
}
