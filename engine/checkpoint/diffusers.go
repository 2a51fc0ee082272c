package checkpoint

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"margo/engine"
)

// LayoutDiffusers names the layout of diffusers' AutoencoderKL and VQModel.
const LayoutDiffusers = "diffusers"

// diffusersSigns are tensors that only diffusers' autoencoders have.
var diffusersSigns = []string{"encoder.mid_block.resnets.0.norm1.weight", "decoder.mid_block.resnets.0.norm1.weight"}

// translate renames the tensors of a file in diffusers' layout to those of LDM's,
// so that one model serves both:
//
//	encoder.down_blocks.I.resnets.J        encoder.down.I.block.J
//	encoder.down_blocks.I.downsamplers.0   encoder.down.I.downsample
//	decoder.up_blocks.I.resnets.J          decoder.up.N-1-I.block.J (LDM counts from the image)
//	decoder.up_blocks.I.upsamplers.0       decoder.up.N-1-I.upsample
//	….attentions.J                         ….attn.J
//	….mid_block.resnets.0, .1              ….mid.block_1, .block_2
//	….mid_block.attentions.0               ….mid.attn_1
//	conv_norm_out, conv_shortcut           norm_out, nin_shortcut
//	group_norm                             norm
//	to_q, to_k, to_v, to_out.0             q, k, v, proj_out
//	query, key, value, proj_attn           the same (before diffusers 0.13)
//
// Attention is made of linear layers there, [C,C], and of 1×1 convolutions here,
// [C,C,1,1]: the same numbers. Both pad a downsampling convolution right and
// below, have 32 groups, eps 1e-6 and one attention head (diffusers
// unet_2d_blocks.py, downsampling.py Downsample2D). Names without a counterpart
// stay as they are, and are unexpected later on.
func (f *File) translate() error {
	if !slices.ContainsFunc(diffusersSigns, func(s string) bool { return f.tensors[s] != nil }) {
		return nil
	}
	levels := 0
	for name := range f.tensors {
		if i, ok := indexAfter(name, "decoder.up_blocks."); ok && i < 1<<10 {
			levels = max(levels, i+1)
		}
	}
	out, source := make(map[string]*tensor, len(f.tensors)), map[string]string{}
	for name, t := range f.tensors {
		to := fromDiffusers(name, levels)
		if out[to] != nil {
			a, b := name, cmp.Or(source[to], to)
			return badFile(f.path, "tensors %s and %s are the same part of the model", quote(min(a, b)), quote(max(a, b)))
		}
		if out[to] = t; to == name {
			continue
		}
		source[to], t.Name = name, to
		if isAttention(to) && len(t.Shape) == 2 {
			t.Shape = append(slices.Clone(t.Shape), 1, 1)
			if t.stride != nil {
				t.stride = append(slices.Clone(t.stride), 1, 1)
			}
		}
	}
	f.tensors, f.source, f.layout = out, source, LayoutDiffusers
	return nil
}

// stored is the name that a tensor has, or would have, in the file: for messages.
func (f *File) stored(name string) string {
	s, ok := f.source[name]
	if ok || f.layout != LayoutDiffusers || f.tensors[name] != nil {
		return cmp.Or(s, name)
	}
	levels, old := 0, false
	for _, s := range f.source {
		if i, ok := indexAfter(s, "decoder.up_blocks."); ok {
			levels = max(levels, i+1)
		}
		old = old || strings.Contains(s, ".query.") || strings.Contains(s, ".proj_attn.")
	}
	return toDiffusers(name, levels, old)
}

// indexAfter reads the number that follows prefix in name.
func indexAfter(name, prefix string) (int, bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return 0, false
	}
	digits, _, _ := strings.Cut(rest, ".")
	i, err := strconv.Atoi(digits)
	return i, err == nil && i >= 0
}

// attentionNames are the parts of an attention block: LDM's, diffusers', and
// diffusers' before 0.13.
var attentionNames = [][3]string{
	{"norm", "group_norm", "group_norm"}, {"q", "to_q", "query"}, {"k", "to_k", "key"}, {"v", "to_v", "value"}, {"proj_out", "to_out.0", "proj_attn"},
}

// isAttention reports whether a tensor of LDM's layout is a projection of an
// attention block.
func isAttention(name string) bool {
	p := strings.Split(name, ".")
	n := len(p)
	return n > 3 && p[n-1] == "weight" && p[n-2] != "norm" && (p[n-3] == "attn_1" || p[n-4] == "attn")
}

// fromDiffusers is LDM's name of a tensor of diffusers'; the name itself if it is
// none of a translated part.
func fromDiffusers(name string, levels int) string {
	part, rest, _ := strings.Cut(name, ".")
	if part != "encoder" && part != "decoder" {
		return name
	}
	p := strings.Split(rest, ".")
	attention := func(p []string) (string, bool) {
		s := strings.Join(p, ".")
		for _, a := range attentionNames {
			for _, theirs := range a[1:] {
				if end, ok := strings.CutPrefix(s, theirs+"."); ok {
					return a[0] + "." + end, true
				}
			}
		}
		return "", false
	}
	resnet := func(p []string) string {
		if p[0] == "conv_shortcut" {
			return strings.Join(append([]string{"nin_shortcut"}, p[1:]...), ".")
		}
		return strings.Join(p, ".")
	}
	switch {
	case p[0] == "conv_norm_out":
		return part + ".norm_out" + strings.TrimPrefix(rest, p[0])
	case p[0] == "mid_block" && len(p) > 3:
		switch i, err := strconv.Atoi(p[2]); {
		case p[1] == "resnets" && err == nil && i < 2:
			return fmt.Sprintf("%s.mid.block_%d.%s", part, i+1, resnet(p[3:]))
		case p[1] == "attentions" && p[2] == "0":
			if a, ok := attention(p[3:]); ok {
				return part + ".mid.attn_1." + a
			}
		}
	case len(p) > 4 && (part == "encoder" && p[0] == "down_blocks" || part == "decoder" && p[0] == "up_blocks"):
		level, err := strconv.Atoi(p[1])
		if err != nil {
			return name
		}
		to := "down"
		if part == "decoder" {
			to, level = "up", levels-1-level
		}
		at := fmt.Sprintf("%s.%s.%d.", part, to, level)
		switch {
		case p[2] == "resnets":
			return at + "block." + p[3] + "." + resnet(p[4:])
		case p[2] == "attentions":
			if a, ok := attention(p[4:]); ok {
				return at + "attn." + p[3] + "." + a
			}
		case p[2] == "downsamplers" && to == "down" && p[3] == "0", p[2] == "upsamplers" && to == "up" && p[3] == "0":
			return at + to + "sample." + strings.Join(p[4:], ".")
		}
	}
	return name
}

// toDiffusers undoes fromDiffusers.
func toDiffusers(name string, levels int, old bool) string {
	part, rest, _ := strings.Cut(name, ".")
	if part != "encoder" && part != "decoder" {
		return name
	}
	p := strings.Split(rest, ".")
	column := 1
	if old {
		column = 2
	}
	attention := func(p []string) string {
		for _, a := range attentionNames {
			if a[0] == p[0] {
				return strings.Join(append([]string{a[column]}, p[1:]...), ".")
			}
		}
		return strings.Join(p, ".")
	}
	resnet := func(p []string) string {
		return strings.Replace(strings.Join(p, "."), "nin_shortcut", "conv_shortcut", 1)
	}
	switch {
	case p[0] == "norm_out":
		return part + ".conv_norm_out" + strings.TrimPrefix(rest, p[0])
	case p[0] == "mid" && len(p) > 2 && p[1] == "attn_1":
		return part + ".mid_block.attentions.0." + attention(p[2:])
	case p[0] == "mid" && len(p) > 2 && (p[1] == "block_1" || p[1] == "block_2"):
		return fmt.Sprintf("%s.mid_block.resnets.%d.%s", part, p[1][6]-'1', resnet(p[2:]))
	case (p[0] == "down" || p[0] == "up") && len(p) > 3:
		level, err := strconv.Atoi(p[1])
		if err != nil {
			return name
		}
		if p[0] == "up" {
			level = levels - 1 - level
		}
		at := fmt.Sprintf("%s.%s_blocks.%d.", part, p[0], level)
		switch p[2] {
		case "block":
			return at + "resnets." + p[3] + "." + resnet(p[4:])
		case "attn":
			return at + "attentions." + p[3] + "." + attention(p[4:])
		case p[0] + "sample":
			return at + p[2] + "rs.0." + strings.Join(p[3:], ".")
		}
	}
	return name
}

// diffusersConfig is the config.json that diffusers keeps beside its weights; nil
// if there is none, or it is of something else.
func (f *File) diffusersConfig() (map[string]any, error) {
	if f.layout != LayoutDiffusers {
		return nil, nil
	}
	m, err := f.besideConfig()
	if m == nil || err != nil {
		return nil, err
	}
	if c := m["_class_name"]; c != "AutoencoderKL" && c != "VQModel" {
		return nil, nil
	}
	for key, want := range map[string]string{"norm_num_groups": "32", "act_fn": "silu"} {
		if v, ok := m[key]; ok && v != nil && fmt.Sprint(v) != want {
			path := filepath.Join(filepath.Dir(f.path), "config.json")
			return nil, engine.Errorf("open "+path, engine.Unsupported, "%s is %v; only %s is supported", key, v, want)
		}
	}
	return m, nil
}

// besideConfig is the config.json beside the file; nil if there is none.
func (f *File) besideConfig() (map[string]any, error) {
	path := filepath.Join(filepath.Dir(f.path), "config.json")
	st, err := os.Stat(path) // first: opening a FIFO would wait for its writer
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	var file *os.File
	if err == nil {
		file, err = os.Open(path)
	}
	if err != nil {
		return nil, badFile(path, "%w", err)
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxJSON+1))
	if err != nil {
		return nil, badFile(path, "%w", err)
	}
	m, err := parseObject(string(text))
	if err != nil {
		return nil, badFile(path, "%w", err)
	}
	return m, nil
}

// scalingFactor is diffusers' latent scale, nil where none is recorded. With a
// shift_factor too (Stable Diffusion 3, FLUX) the scale alone would be wrong.
func (f *File) scalingFactor() (any, error) {
	m, err := f.diffusersConfig()
	if m == nil || err != nil {
		return nil, err
	}
	if v := m["shift_factor"]; v != nil && fmt.Sprint(v) != "0" && fmt.Sprint(v) != "0.0" {
		return nil, nil
	}
	return m["scaling_factor"], nil
}
