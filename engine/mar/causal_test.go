package mar

import (
	"fmt"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/ref"
)

// variantConfig is a tiny model: 9 tokens, width 16.
func variantConfig(attention, head string) *Config {
	c, err := checkpoint.NamedMAR("mar-base")
	if err != nil {
		panic(err)
	}
	c.ImgSize, c.VAEStride, c.VAEEmbedDim = 24, 8, 3
	c.EncoderEmbedDim, c.DecoderEmbedDim, c.EncoderNumHeads, c.DecoderNumHeads = 16, 16, 2, 2
	c.EncoderDepth, c.DecoderDepth, c.ClassNum, c.BufferSize = 2, 2, 4, 3
	c.DiffLossD, c.DiffLossW = 1, 16
	c.Attention, c.Head = attention, head
	if attention == checkpoint.Causal {
		c.EncoderDepth = 0
	}
	switch head {
	case checkpoint.CategoricalHead:
		c.CodebookSize = 11
	case checkpoint.GMMHead:
		c.Mixtures = 4
	}
	return c
}

func randomVariant(t *testing.T, cfg *Config, dev engine.Device, d engine.DType) *Model {
	t.Helper()
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Random(engine.Params(m), dev, d, 3); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(engine.Params(m)) })
	return m
}

// causalRun feeds orders in pieces and returns z of every piece's last position,
// by sequence and step. tokens is the token table of len(orders) images.
func causalRun(c *engine.Ctx, m *Model, orders [][]int32, tokens []float32, pieces func(seq, at int) int, block int, paged bool) [][][]float32 {
	l, d := m.Config.Tokens(), m.Config.DecoderEmbedDim
	classes := make([]int, len(orders))
	for i := range classes {
		classes[i] = i%(m.Config.ClassNum+1) - 1
	}
	buffers := m.EmbedBuffer(c, m.ClassRows(c, classes))
	pos := make([]int32, len(orders)*l)
	for i := range pos {
		pos[i] = int32(i % l)
	}
	table := m.EmbedTokens(c, c.F32(tokens, len(orders)*l, m.Config.TokenDim()), pos)
	k := m.NewCache(c, len(orders), len(orders)*m.CacheBlocks(block), block, paged)
	out := make([][][]float32, len(orders))
	at := make([]int, len(orders)) // positions of the order that were asked for
	for {
		var exts []Extension
		for s, o := range orders {
			n := min(pieces(s, at[s]), len(o)-at[s])
			if n <= 0 {
				continue
			}
			from := max(at[s]-1, 0) // the token asked for last goes in
			at[s] += n
			exts = append(exts, Extension{Seq: s, Class: s, Image: s, Order: o[from:at[s]]})
		}
		if len(exts) == 0 {
			return out
		}
		z := c.Download(m.Extend(c, buffers, table, k, exts))
		if c.Err() != nil {
			return nil
		}
		for i, e := range exts {
			out[e.Seq] = append(out[e.Seq], z[i*d:(i+1)*d])
		}
	}
}

func orders(l int) [][]int32 {
	raster := make([]int32, l)
	for i := range raster {
		raster[i] = int32(i)
	}
	out := [][]int32{raster}
	for image := range 3 {
		var o []int32
		for _, p := range engine.Permutation(5, image, l) {
			o = append(o, int32(p))
		}
		out = append(out, o)
	}
	return out
}

func numbers(n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(engine.NormalAt(engine.RNG{Seed: 8, Purpose: engine.PurposeTest}, i, 0, 0))
	}
	return v
}

// A cache gives what a full recomputation gives: token by token, in pieces of
// uneven length (sequences of different progress), in blocks of any size, with
// paged attention and without, alone or in a batch. The oracle sums in one order,
// so bit for bit.
func TestCausalCache(t *testing.T) {
	for _, mode := range []ref.Mode{ref.Exact, ref.Rounded} {
		for _, d := range []engine.DType{engine.F32, engine.BF16} {
			dev := ref.New(mode)
			m, c := randomVariant(t, variantConfig(checkpoint.Causal, ""), dev, d), context(t, dev, d)
			checkCausalCache(t, c, m)
		}
	}
}

func checkCausalCache(t *testing.T, c *engine.Ctx, m *Model) {
	t.Helper()
	l := m.Config.Tokens()
	os := orders(l)
	tokens := numbers(len(os) * l * m.Config.TokenDim())
	// Full recomputation: a fresh cache for every prefix, everything in one call.
	want := make([][][]float32, len(os))
	for n := 1; n <= l; n++ {
		prefix := make([][]int32, len(os))
		for s := range os {
			prefix[s] = os[s][:n]
		}
		for s, z := range causalRun(c, m, prefix, tokens, func(int, int) int { return n }, 64, true) {
			want[s] = append(want[s], z[0])
		}
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	if slices.Equal(want[0][0], want[0][1]) || slices.Equal(want[1][3], want[2][3]) {
		t.Fatal("z does not depend on anything")
	}
	for _, block := range []int{1, 4, 64} {
		for _, paged := range []bool{true, false} {
			one := causalRun(c, m, os, tokens, func(int, int) int { return 1 }, block, paged)
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
			for s := range os {
				for i := range os[s] {
					if !slices.Equal(one[s][i], want[s][i]) {
						t.Fatalf("block %d, paged %v: sequence %d, token %d differs from a full recomputation", block, paged, s, i)
					}
				}
			}
		}
	}
	uneven := causalRun(c, m, os, tokens, func(s, at int) int { return 1 + (s+at)%3 }, 4, true)
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	for s := range os {
		at := 0
		for _, z := range uneven[s] {
			at += 1 + (s+at)%3
			if !slices.Equal(z, want[s][min(at, l)-1]) {
				t.Fatalf("uneven pieces: sequence %d, token %d", s, at-1)
			}
		}
	}
}

// The model cannot see what it must predict: z at step i does not change when
// tokens at steps ≥ i do, and does when one before it does, or the target, or
// the class.
func TestCausalLeak(t *testing.T) {
	dev := ref.New(ref.Exact)
	m, c := randomVariant(t, variantConfig(checkpoint.Causal, ""), dev, engine.F32), context(t, dev, engine.F32)
	l, ch := m.Config.Tokens(), m.Config.TokenDim()
	os := orders(l)
	one := func(int, int) int { return 1 }
	tokens := numbers(len(os) * l * ch)
	base := causalRun(c, m, os, tokens, one, 4, true)
	for cut := range l {
		changed := slices.Clone(tokens)
		for s, o := range os {
			for _, p := range o[cut:] {
				for j := range ch {
					changed[(s*l+int(p))*ch+j] += 3
				}
			}
		}
		got := causalRun(c, m, os, changed, one, 4, true)
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		for s := range os {
			for i := range l {
				if same := slices.Equal(got[s][i], base[s][i]); same != (i <= cut) {
					t.Fatalf("sequence %d: z of token %d, tokens from %d on changed: the same is %v", s, i, cut, same)
				}
			}
		}
	}
	// Same prefix, another target: another z; and the order of what comes later is unseen.
	swapped := slices.Clone(os[1])
	swapped[5], swapped[7] = swapped[7], swapped[5]
	got := causalRun(c, m, [][]int32{os[0], swapped}, tokens[:2*l*ch], one, 4, true)
	for i := range l {
		if same := slices.Equal(got[1][i], base[1][i]); same != (i < 5) {
			t.Errorf("target %d: the same is %v", i, same)
		}
	}
}

// A masked token of a bidirectional model is not seen by any z.
func TestMaskedLeak(t *testing.T) {
	dev := ref.New(ref.Exact)
	m, c := randomVariant(t, variantConfig("", ""), dev, engine.F32), context(t, dev, engine.F32)
	l, ch := m.Config.Tokens(), m.Config.TokenDim()
	mask := make([]float32, l)
	for p := range l {
		mask[p] = float32(p % 2)
	}
	z := func(tokens []float32) []float32 {
		lay := m.NewLayout(c, scene(mask, l, everywhere))
		class := c.Download(m.ClassRows(c, []int{2}))
		return c.Download(m.Decode(c, m.DecoderInput(c, m.Encode(c, embed(c, m, tokens, class, lay), lay), lay), lay))
	}
	tokens := numbers(l * ch)
	base := z(tokens)
	for p := range l {
		changed := slices.Clone(tokens)
		changed[p*ch] += 2
		if same := slices.Equal(z(changed), base); same != (mask[p] == 1) {
			t.Errorf("position %d, masked %v: z the same is %v", p, mask[p] == 1, same)
		}
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}

func TestCacheErrors(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m, c := randomVariant(t, variantConfig(checkpoint.Causal, ""), dev, engine.F32), context(t, dev, engine.F32)
	buffers := m.EmbedBuffer(c, m.ClassRows(c, []int{0}))
	table := c.New(engine.F32, m.Config.Tokens(), 16)
	c.Fail(c.Stream.Fill(table, 1))
	for name, x := range map[string]struct {
		blocks int
		exts   []Extension
		kind   engine.Kind
	}{
		"twice":    {8, []Extension{{Order: []int32{1}}, {Order: []int32{1}}}, engine.Invalid},
		"position": {8, []Extension{{Order: []int32{9}}}, engine.Invalid},
		"sequence": {8, []Extension{{Seq: 2, Order: []int32{1}}}, engine.Invalid},
		"empty":    {8, []Extension{{}}, engine.Invalid},
		"full":     {1, []Extension{{Order: []int32{1, 2, 3, 4}}}, engine.OutOfMemory},
	} {
		k := m.NewCache(c, 2, x.blocks, 4, true)
		m.Extend(c, buffers, table, k, x.exts)
		if err := c.ClearErr(); err == nil || err.(*engine.Error).Kind != x.kind {
			t.Errorf("%s: %v", name, err)
		}
	}
	k := m.NewCache(c, 2, 2, 4, true)
	m.Extend(c, buffers, table, k, []Extension{{Order: []int32{1, 2, 3, 4}}})
	k.Drop(0)
	m.Extend(c, buffers, table, k, []Extension{{Seq: 1, Order: []int32{1, 2, 3, 4}}}) // the blocks are free again
	if c.Err() != nil || k.Len(1) != 6 || k.Len(0) != 0 {
		t.Error(c.Err(), k.Len(1))
	}
	if got, want := m.CacheBytes(8, 4, engine.BF16), int64(2*8*4*2*16*2); got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
}

// Parameters of the variants: a causal model has the same 2·depth blocks in one
// stack as MAR in two, and its input norm; it has no encoder norm (2D), decoder_embed
// (D²+D), mask token (D) and encoder positions ((B+L)·D), and positions of targets
// (L·D) besides. Heads: see the formulas.
func TestVariantParams(t *testing.T) {
	for _, x := range []struct {
		name    string
		d, mar  int64
		head    int64
		marHead int64
	}{
		{"base", 768, 207924768, 0, 35749920}, {"large", 1024, 478326304, 0, 72230432}, {"huge", 1280, 942403104, 0, 151206944},
	} {
		count := func(name string) int64 {
			cfg, err := checkpoint.NamedMAR(name)
			if err != nil {
				t.Fatal(err)
			}
			m, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			n := int64(0)
			for _, p := range engine.Params(m) {
				n += int64(p.Elems())
			}
			if spec := checkpoint.CountParams(cfg.Params(), ""); spec != n {
				t.Errorf("%s: model %d, layout %d parameters", name, n, spec)
			}
			return n
		}
		ar := x.mar - 2*x.d - (x.d*x.d + x.d) - x.d - 320*x.d + 256*x.d
		for name, want := range map[string]int64{
			"mar-" + x.name: x.mar, "ar-raster-" + x.name: ar, "ar-random-" + x.name: ar, "ar-" + x.name: ar,
			"ar-" + x.name + "-ce":  ar - x.marHead - 17*x.d + 2*16384*x.d, // z_proj 16·D+D; token_emb, celoss
			"mar-" + x.name + "-l2": x.mar - x.marHead + 16*(x.d+1), "mar-" + x.name + "-gmm": x.mar - x.marHead + 16*33*(x.d+1),
		} {
			if got := count(name); got != want {
				t.Errorf("%s: %d parameters, want %d", name, got, want)
			}
		}
	}
	for _, bad := range []string{"ar", "ar-raster", "ar-tiny", "mar-base-xx", "ar-raster-base-ce-l2", "mar-base-"} {
		if checkpoint.Named(bad) {
			t.Error(bad, "is a name")
		}
	}
}

// Every combination's layout is what the model binds.
func TestVariantLayout(t *testing.T) {
	for _, attention := range []string{"", checkpoint.Bidirectional, checkpoint.Causal} {
		for _, head := range []string{"", checkpoint.DiffusionHead, checkpoint.CategoricalHead, checkpoint.L2Head, checkpoint.GMMHead} {
			cfg := variantConfig(attention, head)
			m, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			var got, want []string
			for _, p := range engine.Params(m) {
				got = append(got, fmt.Sprint(p.Name, p.Shape))
			}
			for _, p := range cfg.Params() {
				want = append(want, fmt.Sprint(p.Name, p.Shape))
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%s, %s: model\n%v\nlayout\n%v", attention, head, got, want)
			}
		}
	}
}
