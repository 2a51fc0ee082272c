package sample

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/mar"
	"margo/engine/ref"
)

// request is a short run with everything switched on.
func request(n int) Request {
	r := Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.Labels, r.Seed = n, n, 4, 5, 950, 2, []int{3, 7, 1}, 11
	return r
}

func collect(t *testing.T, e *Engine, r Request) []Image {
	t.Helper()
	var out []Image
	if err := e.Run(context.Background(), r, nil, func(im Image) error { out = append(out, im); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// An image depends on the model, the settings, its index and its class only: not
// on the batch, not on its neighbours, not on what ran before. Bit for bit.
func TestBatchInvariance(t *testing.T) {
	for _, d := range []engine.DType{engine.F32, engine.BF16} {
		dev := ref.New(ref.Rounded)
		e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, d), dev, d)
		want := collect(t, e, request(8))
		for i, im := range want {
			if im.Index != i || im.Class != []int{3, 7, 1}[i%3] || len(im.Tokens) != 16*16 {
				t.Fatalf("image %d: %d, class %d", i, im.Index, im.Class)
			}
			for _, other := range want[:i] {
				if slices.Equal(im.Tokens, other.Tokens) {
					t.Errorf("images %d and %d are the same", i, other.Index)
				}
			}
		}
		for _, batch := range []int{1, 3} {
			r := request(8)
			r.Batch = batch
			same(t, fmt.Sprintf("%v batch %d", d, batch), collect(t, e, r), want)
		}
		r := request(3)
		r.FirstIndex = 4
		same(t, fmt.Sprintf("%v images 4 to 6", d), collect(t, e, r), want[4:7])
		// Backwards, each image with a class list turned so that it keeps its class.
		for i := 7; i >= 0; i-- {
			r := request(1)
			r.FirstIndex = i
			same(t, fmt.Sprintf("%v image %d alone", d, i), collect(t, e, r), want[i:i+1])
		}
		r = request(8)
		r.Seed++
		if slices.Equal(collect(t, e, r)[0].Tokens, want[0].Tokens) {
			t.Error("the seed has no influence")
		}
	}
}

func same(t *testing.T, what string, got, want []Image) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d images, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i].Index != want[i].Index || got[i].Class != want[i].Class || !slices.Equal(got[i].Tokens, want[i].Tokens) {
			t.Errorf("%s: image %d differs", what, want[i].Index)
		}
	}
}

// Guidance of unconditional images does nothing, and guidance 1 is none: the
// unconditional half isn't computed, and its limit is the same image.
func TestGuidance(t *testing.T) {
	dev := ref.New(ref.Exact)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	run := func(cfg float64, labels ...int) []float32 {
		r := request(1)
		r.CFG, r.CFGSchedule, r.Labels = cfg, Constant, labels
		return collect(t, e, r)[0].Tokens
	}
	compare(t, "guidance next to 1", run(1+1e-9, 3), run(1, 3), 1e-6)
	compare(t, "unconditional", run(5, -1), run(1), 1e-6)
	if slices.Equal(run(2, 3), run(1, 3)) || slices.Equal(run(1, 3), run(1, 4)) || slices.Equal(run(1, 3), run(1)) {
		t.Error("guidance or class has no influence")
	}
	r := request(1)
	r.CFG = 1
	one, err := e.Estimate(r)
	if err != nil {
		t.Fatal(err)
	}
	r.CFG = 2
	two, err := e.Estimate(r)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := one.Work.Total().FLOPs(), two.Work.Total().FLOPs(); float64(a) > 0.6*float64(b) {
		t.Errorf("%d FLOPs without guidance, %d with", a, b)
	}
}

// In-painting keeps the known tokens, every bit of them, fills the others, and
// what is filled depends on what is known.
func TestInpainting(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.BF16), dev, engine.BF16)
	k := &Known{Tokens: make([]float32, 16*16), Unknown: make([]bool, 16)}
	for i := range k.Tokens {
		k.Tokens[i] = float32(math.Sin(float64(i))) // not BF16 numbers
		k.Unknown[i/16] = i/16 > 9
		if k.Unknown[i/16] {
			k.Tokens[i] = float32(math.NaN()) // must not be read
		}
	}
	r := request(3)
	r.Known = k
	got := collect(t, e, r)
	for _, im := range got {
		if !slices.Equal(im.Tokens[:10*16], k.Tokens[:10*16]) {
			t.Errorf("image %d: known tokens changed", im.Index)
		}
		for i, v := range im.Tokens[10*16:] {
			if v == 0 || v != v {
				t.Fatalf("image %d: unknown token %d is %g", im.Index, 10+i/16, v)
			}
		}
	}
	r.Batch = 2
	same(t, "in-painting in batches of 2", collect(t, e, r), got)
	other := *k
	other.Tokens = slices.Clone(k.Tokens)
	other.Tokens[5] += 0.5
	r.Known = &other
	if slices.Equal(collect(t, e, r)[0].Tokens[10*16:], got[0].Tokens[10*16:]) {
		t.Error("the known tokens have no influence on the others")
	}
	// Nothing unknown: nothing to do. Everything unknown: as without.
	r.Known = &Known{Tokens: make([]float32, 16*16), Unknown: make([]bool, 16)}
	for _, im := range collect(t, e, r) {
		if slices.ContainsFunc(im.Tokens, func(v float32) bool { return v != 0 }) {
			t.Error("a known token changed")
		}
	}
	for i := range r.Known.Unknown {
		r.Known.Unknown[i] = true
	}
	want := request(3)
	same(t, "everything unknown", collect(t, e, r), collect(t, e, want))
}

// More iterations than tokens: one token at a time, and the rest of the
// iterations do nothing.
func TestManyIterations(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	r := request(1)
	r.Iters = 40
	calls := 0
	r.AfterIterate = func(int, []float32) { calls++ }
	im := collect(t, e, r)[0]
	if calls != 16 || slices.Contains(im.Tokens, 0) {
		t.Errorf("%d iterations for 16 tokens", calls)
	}
}

// Cancellation inside the trunk or inside the head's loop ends the run with the
// context's cause; no memory stays, and the engine can run again.
func TestCancellation(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	want := collect(t, e, request(2))
	e.c.Arena.Close()
	free := dev.Info().MemFree
	for _, after := range []int{0, 2} {
		ctx, cancel := context.WithCancelCause(context.Background())
		why := errors.New("enough")
		r, iters := request(2), 0
		if after == 0 {
			r.Draws = &stopper{cancel: func() { cancel(why) }}
		}
		err := e.Run(ctx, r, func(p Progress) {
			if iters++; iters == after {
				cancel(why)
				time.Sleep(20 * time.Millisecond) // the flag is set by a goroutine
			}
		}, func(Image) error { t.Error("an image after the end"); return nil })
		if !errors.Is(err, engine.Cancelled) || !errors.Is(err, why) {
			t.Errorf("stopped after %d: %v", after, err)
		}
		if iters != after {
			t.Errorf("stopped after %d iterations, wanted %d", iters, after)
		}
		if got := dev.Info().MemFree; got != free {
			t.Errorf("stopped after %d: %d bytes stay", after, free-got)
		}
		cancel(nil)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := e.Run(ctx, request(2), nil, func(Image) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	same(t, "after cancellations", collect(t, e, request(2)), want)
}

// stopper cancels right before the head's loop.
type stopper struct{ cancel func() }

func (s *stopper) Order(image, n int) []int { return engine.Permutation(0, image, n) }
func (s *stopper) Noise(_ int, ids []TokenID, steps, ch int) ([]float32, []float32, error) {
	s.cancel()
	time.Sleep(20 * time.Millisecond)
	return make([]float32, len(ids)*ch), make([]float32, steps*len(ids)*ch), nil
}

func TestSinkError(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	full := errors.New("disk full")
	r, n := request(4), 0
	r.Batch = 1
	if err := e.Run(context.Background(), r, nil, func(Image) error {
		if n++; n == 2 {
			return full
		}
		return nil
	}); !errors.Is(err, full) || n != 2 {
		t.Errorf("%v after %d images", err, n)
	}
}

func TestProgress(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	r := request(5)
	r.Batch = 2
	var all []Progress
	if err := e.Run(context.Background(), r, func(p Progress) { all = append(all, p) }, func(Image) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if len(all) != 3*(r.Iters+1) {
		t.Fatalf("%d calls", len(all))
	}
	for i, p := range all {
		if p.Total != 5 || p.Iters != 4 || p.Rate <= 0 || p.Left < 0 || i > 0 && p.Elapsed < all[i-1].Elapsed {
			t.Errorf("%+v", p)
		}
	}
	if p := all[len(all)-1]; p.Done != 5 || p.Left != 0 {
		t.Errorf("at the end: %+v", p)
	}
	if p := all[1]; p.Done != 0 || p.Iter != 2 {
		t.Errorf("after two iterations: %+v", p)
	}
}

// small is a device that says it has little memory.
type small struct {
	engine.Device
	free int64
}

func (s small) Info() engine.Info {
	i := s.Device.Info()
	i.MemFree = s.free
	return i
}

// Too little memory is told before the first kernel; the estimate is what the
// run then takes.
func TestMemory(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m := loadTiny(t, "mar_tiny_trained", dev, engine.F32)
	e := openEngine(t, m, dev, engine.F32)
	est, err := e.Estimate(request(8))
	if err != nil {
		t.Fatal(err)
	}
	collect(t, e, request(8))
	if got := e.c.Arena.Peak(); int64(got) != est.Activations {
		t.Errorf("%d bytes estimated, %d used", est.Activations, got)
	}
	poor, err := Open(m, nil, small{dev, 1 << 20}, Options{Compute: engine.F32})
	if err != nil {
		t.Fatal(err)
	}
	defer poor.Close()
	err = poor.Run(context.Background(), request(8), func(Progress) { t.Error("work") }, nil)
	if !errors.Is(err, engine.OutOfMemory) || !strings.Contains(err.Error(), "needs") || !strings.Contains(err.Error(), "1.0 MiB") {
		t.Error(err)
	}
}

// decoder makes pixels of the first three channels.
type decoder struct{ images []int }

func (d *decoder) Decode(c *engine.Ctx, z *engine.Tensor) *engine.Tensor {
	if c.Err() != nil {
		return nil
	}
	d.images = append(d.images, z.Shape[0])
	y := c.New(engine.F32, z.Shape[0], z.Shape[1], z.Shape[2], 3)
	c.Rows(engine.RowsArgs{Y: y, A: z.Reshape(z.Rows(), z.Cols()).Slice(0, 3), Count: z.Rows()})
	return y
}

// Latents go to the tokenizer divided by their scale and laid out as an image.
func TestDecode(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m := loadTiny(t, "mar_tiny_trained", dev, engine.F32)
	dec := &decoder{}
	e, err := Open(m, dec, dev, Options{Compute: engine.F32, LatentScale: 0.25, Profile: true})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, im := range collect(t, e, request(3)) {
		if im.H != 4 || im.W != 4 || len(im.Pixels) != 48 {
			t.Fatalf("%d×%d, %d values", im.H, im.W, len(im.Pixels))
		}
		for i, v := range im.Pixels {
			if want := im.Tokens[i/3*16+i%3] * 4; v != want {
				t.Fatalf("pixel value %d is %g, want %g", i, v, want)
			}
		}
	}
	p := e.Parts()
	if p.Encoder <= 0 || p.Decoder <= 0 || p.Head <= 0 || p.Tokenizer <= 0 || p.Rest < 0 {
		t.Errorf("%+v", p)
	}
}

// A model of pixels needs no tokenizer (P49).
func TestPixelTokens(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m := loadTiny(t, "mar_tiny", dev, engine.F32)
	// 16 channels are no RGB: a head for 12, patches of 2×2 pixels.
	cfg := m.Config
	cfg.ImgSize, cfg.VAEStride, cfg.PatchSize, cfg.VAEEmbedDim = 8, 1, 2, 3
	e := openEngine(t, randomModel(t, &cfg, dev), dev, engine.F32)
	r := request(2)
	for _, im := range collect(t, e, r) {
		if im.H != 8 || im.W != 8 {
			t.Fatalf("%d×%d", im.H, im.W)
		}
		for y := range 8 {
			for x := range 8 {
				for c := range 3 {
					token, col := y/2*4+x/2, c*4+y%2*2+x%2 // mar.py unpatchify
					if got, want := im.Pixels[(y*8+x)*3+c], im.Tokens[token*12+col]; got != want {
						t.Fatalf("pixel %d,%d,%d is %g, want %g", y, x, c, got, want)
					}
				}
			}
		}
	}
}

// Tokens out of range, or not numbers at all, are told with the cure.
func TestWarning(t *testing.T) {
	task := &marTask{last: 999}
	if s := warning(5, task); s != "" {
		t.Error(s)
	}
	for _, v := range []float32{1800, float32(math.NaN()), float32(math.Inf(1))} {
		if s := warning(v, task); !strings.Contains(s, "--max-timestep 950") {
			t.Errorf("%g: %q", v, s)
		}
	}
	for _, other := range []interface{ advice() string }{&marTask{last: 950}, &ditTask{}} {
		if s := warning(1800, other); s == "" || strings.Contains(s, "950") {
			t.Errorf("%q", s)
		}
	}
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny", dev, engine.F32), dev, engine.F32) // untrained
	r := request(1)
	r.MaxTimestep = 999
	if im := collect(t, e, r)[0]; im.Warning == "" || im.MaxToken < 1000 {
		t.Errorf("%g %q", im.MaxToken, im.Warning)
	}
}

// Only some iterations, for timing: the others' tokens are noise, and the first
// iteration's those of a whole run.
func TestOnly(t *testing.T) {
	dev := ref.New(ref.Rounded)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	r := request(1)
	whole := collect(t, e, r)[0]
	r.Only = []int{0, 2}
	im := collect(t, e, r)[0]
	noise, same := 0, 0
	for p := range 16 {
		token := im.Tokens[p*16 : (p+1)*16]
		if slices.Equal(token, whole.Tokens[p*16:(p+1)*16]) {
			same++
		}
		drawn := true
		for k, v := range token {
			want := engine.NormalAt(engine.RNG{Seed: r.Seed, Purpose: engine.PurposeInitNoise}, k, p, im.Index)
			drawn = drawn && math.Abs(float64(v)-float64(want)) < 1e-6
		}
		if drawn {
			noise++
		}
	}
	lens := MaskLens(16, r.Iters)
	if want := lens[0] - lens[1] + lens[2]; noise != want || same != 16-lens[0] {
		t.Errorf("%d tokens are noise, want %d; %d as in a whole run, want %d", noise, want, same, 16-lens[0])
	}
	m := tinyVariant(t, dev, engine.F32, variantOf("", "", checkpoint.CategoricalHead))
	q := variantRequest(&m.Config, "", 1)
	q.Only = []int{q.Iters - 1}
	if im := collect(t, openEngine(t, m, dev, engine.F32), q)[0]; len(im.Codes) != m.Config.Tokens() || slices.Max(im.Codes) >= int32(m.Config.CodebookSize) {
		t.Errorf("codes %v", im.Codes)
	}
}

func TestInvalid(t *testing.T) {
	dev := ref.New(ref.Rounded)
	m := loadTiny(t, "mar_tiny", dev, engine.F32)
	e := openEngine(t, m, dev, engine.F32)
	for name, change := range map[string]func(*Request){
		"no images":   func(r *Request) { r.N = 0 },
		"batch":       func(r *Request) { r.Batch = 0 },
		"index":       func(r *Request) { r.FirstIndex = -1 },
		"index range": func(r *Request) { r.FirstIndex = 1<<32 - 1 },
		"iterations":  func(r *Request) { r.Iters = 0 },
		"head steps":  func(r *Request) { r.HeadSteps = 1 },
		"timestep":    func(r *Request) { r.MaxTimestep = 1000 },
		"steps fit":   func(r *Request) { r.MaxTimestep = 3 },
		"cfg":         func(r *Request) { r.CFG = math.NaN() },
		"schedule":    func(r *Request) { r.CFGSchedule = "cosine" },
		"temperature": func(r *Request) { r.Temperature = -1 },
		"class":       func(r *Request) { r.Labels = []int{3, 10} },
		"known size":  func(r *Request) { r.Known = &Known{} },
		"known values": func(r *Request) {
			r.Known = &Known{Tokens: slices.Repeat([]float32{float32(math.NaN())}, 256), Unknown: make([]bool, 16)}
		},
		"only":  func(r *Request) { r.Only = []int{4} },
		"order": func(r *Request) { r.Draws = &badOrder{} },
	} {
		r := request(2)
		change(&r)
		err := e.Run(context.Background(), r, func(Progress) { t.Error(name, "works") }, nil)
		if !errors.Is(err, engine.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	empty, err := mar.New(&m.Config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(empty, nil, dev, Options{}); !errors.Is(err, engine.Invalid) {
		t.Errorf("no weights: %v", err)
	}
	e.Close()
	if err := e.Run(context.Background(), request(1), nil, nil); !errors.Is(err, engine.Invalid) {
		t.Errorf("closed: %v", err)
	}
}

type badOrder struct{ stopper }

func (badOrder) Order(_, n int) []int { return make([]int, n) }

// keyed draws what the generator is documented to draw.
type keyed struct{ seed uint64 }

func (k keyed) Order(image, n int) []int { return engine.Permutation(k.seed, image, n) }
func (k keyed) Noise(_ int, ids []TokenID, steps, ch int) (init, noise []float32, err error) {
	at := func(p engine.Purpose, step int) (v []float32) {
		for _, id := range ids {
			for e := range ch {
				v = append(v, float32(engine.NormalAt(engine.RNG{Seed: k.seed, Purpose: p, Step: step}, e, id.Token, id.Image)))
			}
		}
		return v
	}
	for s := range steps {
		noise = append(noise, at(engine.PurposeStepNoise, s)...)
	}
	return at(engine.PurposeInitNoise, 0), noise, nil
}

// The keys of all draws are fixed forever: seed, image, token, diffusion step.
func TestDrawKeys(t *testing.T) {
	dev := ref.New(ref.Exact)
	e := openEngine(t, loadTiny(t, "mar_tiny_trained", dev, engine.F32), dev, engine.F32)
	r := request(2)
	r.FirstIndex, r.Seed = 1<<32-2, 1<<63+5
	want := collect(t, e, r)
	r.Draws = keyed{r.Seed}
	for i, im := range collect(t, e, r) {
		compare(t, fmt.Sprintf("image %d", im.Index), im.Tokens, want[i].Tokens, 1e-5)
	}
}
