package cpu

import (
	"errors"
	"fmt"
	"math"
	"math/rand"
	"strings"
	"testing"

	"margo/engine"
)

// What is here complements the conformance table, whose shapes are small:
// shapes that are cut into several work items, compared bit for bit between
// numbers of threads and, at sampled elements, with plain float64 loops.

var floats = []engine.DType{engine.F32, engine.BF16}

// near fails if got is further from want than tol·scale, or want rounded to dt.
func near(t *testing.T, what string, dt engine.DType, got float32, want, scale, tol float64) {
	t.Helper()
	if dt == engine.BF16 {
		tol = math.Max(tol, 1.0/256)
	}
	if !(math.Abs(float64(got)-want) <= tol*scale) {
		t.Fatalf("%s is %g, want %g ± %g", what, got, want, tol*scale)
	}
}

// sameForThreads runs f for several numbers of threads and compares the outputs.
func sameForThreads(t *testing.T, f func(f *fixture) *engine.Tensor) (first []float32) {
	t.Helper()
	for _, threads := range []int{1, 2, 3, 7} {
		fix := open(t, threads)
		got := fix.get(f(fix))
		if first == nil {
			first = got
		} else if i := sameBits(first, got); i >= 0 {
			t.Fatalf("element %d is %g with %d threads, %g with one", i, got[i], threads, first[i])
		}
	}
	return first
}

// sequences makes attention arguments for q and k rows per sequence; Q, K and V
// are slices of one tensor if they have the same rows.
func (f *fixture) sequences(r *rand.Rand, dt engine.DType, heads, dh int, q, k []int) engine.AttentionArgs {
	width := heads * dh
	qo, ko := []int32{0}, []int32{0}
	for i := range q {
		qo, ko = append(qo, qo[i]+int32(q[i])), append(ko, ko[i]+int32(k[i]))
	}
	mq, mk := int(qo[len(q)]), int(ko[len(k)])
	kv := f.put(dt, randn(r, mk*2*width, 1), mk, 2*width)
	return engine.AttentionArgs{Q: f.put(dt, randn(r, mq*width, 1), mq, width), K: kv.Slice(0, width), V: kv.Slice(width, 2*width),
		O: f.tensor(dt, mq, width, width), Heads: heads, Scale: float32(1 / math.Sqrt(float64(dh))),
		QOff: f.index(qo), KOff: f.index(ko), QOffHost: qo, KOffHost: ko}
}

func (f *fixture) index(v []int32) *engine.Tensor {
	t := f.tensor(engine.I32, 1, len(v), len(v))
	t.Shape = []int{len(v)}
	copy(elems[int32](t), v)
	return t
}

// attend is row i of head h of sequence s in float64, with the largest |v|.
func attend(f *fixture, a engine.AttentionArgs, s, h, i int) (o []float64) {
	dh := a.Q.Cols() / a.Heads
	q, k, v := f.get(a.Q), f.get(a.K), f.get(a.V)
	width := a.Heads * dh
	nq, nk := int(a.QOffHost[s+1]-a.QOffHost[s]), int(a.KOffHost[s+1]-a.KOffHost[s])
	see := nk
	if a.Causal {
		see = nk - nq + i + 1
	}
	o = make([]float64, dh)
	sum := 0.0
	for j := 0; j < see; j++ {
		dot := 0.0
		for d := 0; d < dh; d++ {
			dot += float64(q[(int(a.QOffHost[s])+i)*width+h*dh+d]) * float64(k[(int(a.KOffHost[s])+j)*width+h*dh+d])
		}
		p := math.Exp(dot * float64(a.Scale))
		sum += p
		for d := range o {
			o[d] += p * float64(v[(int(a.KOffHost[s])+j)*width+h*dh+d])
		}
	}
	for d := range o {
		o[d] /= sum
	}
	return o
}

func TestAttentionThreads(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, dt := range floats {
			for _, c := range []struct {
				heads, dh int
				q, k      []int
				causal    bool
			}{
				{1, 512, []int{150}, []int{150}, false}, // one head: cut by queries
				{3, 72, []int{90, 0, 31}, []int{90, 4, 77}, false},
				{4, 64, []int{61, 61}, []int{61, 90}, true},
				{1, 40, []int{33, 40}, []int{50, 20}, false},
			} {
				t.Run(fmt.Sprintf("%v/%dx%d", dt, c.heads, c.dh), func(t *testing.T) {
					var args engine.AttentionArgs
					var fix *fixture
					o := sameForThreads(t, func(f *fixture) *engine.Tensor {
						args = f.sequences(rand.New(rand.NewSource(1)), dt, c.heads, c.dh, c.q, c.k)
						args.Causal = c.causal
						f.ok(f.s.Attention(args))
						fix = f
						return args.O
					})
					for _, s := range []int{0, len(c.q) - 1} {
						for _, i := range []int{0, 1, c.q[s] - 1} {
							row, h := int(args.QOffHost[s])+i, c.heads-1
							for d, want := range attend(fix, args, s, h, i) {
								got := o[row*c.heads*c.dh+h*c.dh+d]
								near(t, fmt.Sprintf("query %d of sequence %d, column %d", i, s, d), dt, got, want, 1+math.Abs(want), 2e-6)
							}
						}
					}
				})
			}
		}
	})
}

// TestAttentionAlone: a query's result has the same bits whatever queries are
// beside it, as when only some positions of the last block are wanted.
func TestAttentionAlone(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, dt := range floats {
			for _, dh := range []int{64, 80} {
				for _, causal := range []bool{false, true} {
					f := open(t, 2)
					a := f.sequences(rand.New(rand.NewSource(2)), dt, 2, dh, []int{100}, []int{131})
					a.Causal = causal
					f.ok(f.s.Attention(a))
					all := f.get(a.O)
					for _, n := range []int{1, 2, 5, 29, 57} { // the last n, so that causal sees the same keys
						b := a
						b.Q, b.O = a.Q.RowsAt(100-n, 100), f.tensor(dt, n, 2*dh, 2*dh)
						b.QOffHost = []int32{0, int32(n)}
						b.QOff = f.index(b.QOffHost)
						f.ok(f.s.Attention(b))
						if i := sameBits(all[(100-n)*2*dh:], f.get(b.O)); i >= 0 {
							t.Fatalf("%v head %d causal %v: the last %d queries differ at %d", dt, dh, causal, n, i)
						}
					}
				}
			}
		}
	})
}

// TestAttentionUnseen: keys and values that a query must not see may be NaN.
func TestAttentionUnseen(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, dt := range floats {
			f := open(t, 1)
			a := f.sequences(rand.New(rand.NewSource(3)), dt, 1, 64, []int{40}, []int{40})
			a.Causal = true
			f.ok(f.s.Attention(a))
			clean := f.get(a.O)
			const first = 33 // keys from here on; query 32 sees an odd number
			kv := &engine.Tensor{Buf: a.K.Buf, DType: dt, Shape: []int{40 - first, 128}, RowStride: 128, Off: first * 128 * dt.Size()}
			f.ok(f.s.Fill(kv, float32(math.NaN())))
			f.ok(f.s.Attention(a))
			got := f.get(a.O)
			if i := sameBits(clean[:first*64], got[:first*64]); i >= 0 {
				t.Errorf("%v: query %d is %g, was %g before keys from %d on were NaN", dt, i/64, got[i], clean[i], first)
			}
			if x := got[first*64]; x == x {
				t.Errorf("%v: query %d sees NaN and is %g", dt, first, x)
			}
		}
	})
}

func TestAttentionOffsets(t *testing.T) {
	f := open(t, 1)
	a := f.sequences(rand.New(rand.NewSource(4)), engine.F32, 1, 8, []int{4}, []int{4})
	elems[int32](a.KOff)[1] = 400
	if err := f.s.Attention(a); err == nil {
		t.Error("offsets on the device beyond the keys were accepted")
	}
}

// image makes an NHWC tensor.
func (f *fixture) image(dt engine.DType, v []float32, n, h, w, c int) *engine.Tensor {
	t := f.tensor(dt, n*h*w, c, c)
	if v != nil {
		f.set(t, v)
	}
	t.Shape = []int{n, h, w, c}
	return t
}

func TestConvThreads(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, dt := range floats {
			for _, c := range []struct {
				h, w, cin, cout, stride int
				up                      bool
			}{
				{37, 90, 64, 70, 1, false}, // bands, two runs of pixels
				{12, 16, 512, 96, 1, false},
				{21, 20, 32, 33, 1, true},
				{50, 31, 48, 3, 2, false},
				{40, 100, 3, 40, 1, false}, // im2col
			} {
				t.Run(fmt.Sprintf("%v/%dx%dx%d>%d", dt, c.h, c.w, c.cin, c.cout), func(t *testing.T) {
					r := rand.New(rand.NewSource(5))
					x, w, bias := randn(r, c.h*c.w*c.cin, 1), randn(r, c.cout*9*c.cin, 0.3/math.Sqrt(float64(c.cin))), randn(r, c.cout, 1)
					var a engine.Conv2DArgs
					y := sameForThreads(t, func(f *fixture) *engine.Tensor {
						wt := f.put(dt, w, c.cout, 9*c.cin)
						a = engine.Conv2DArgs{X: f.image(dt, x, 1, c.h, c.w, c.cin), W: wt, Packed: f.pack(wt, dt),
							Bias: f.put(engine.F32, bias, 1, c.cout), Kernel: 3, Stride: c.stride, Upsample: c.up,
							PadTop: 1, PadLeft: 1, PadBottom: 1, PadRight: 1}
						ho, wo := a.OutSize()
						a.Y = f.image(engine.F32, nil, 1, ho, wo, c.cout)
						f.ok(f.s.Conv2D(a))
						return a.Y
					})
					xr, wr := rounded(x, dt), rounded(w, dt)
					ho, wo := a.OutSize()
					for range 300 {
						oy, ox, o := r.Intn(ho), r.Intn(wo), r.Intn(c.cout)
						sum := float64(bias[o])
						for tap := range 9 {
							iy, ix := oy*c.stride+tap/3-1, ox*c.stride+tap%3-1
							if c.up {
								iy, ix = iy>>1, ix>>1
							}
							if iy < 0 || ix < 0 || iy >= c.h || ix >= c.w {
								continue
							}
							for i := range c.cin {
								sum += float64(xr[(iy*c.w+ix)*c.cin+i]) * float64(wr[(o*9+tap)*c.cin+i])
							}
						}
						near(t, fmt.Sprintf("pixel %d,%d channel %d", oy, ox, o), engine.F32, y[(oy*wo+ox)*c.cout+o], sum, 1, 1e-5)
					}
				})
			}
		}
	})
}

// TestGroupNormBlocks: images of several blocks of pixels, far from zero.
func TestGroupNormBlocks(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		const n, h, w, ch, groups = 2, 61, 40, 96, 32
		r := rand.New(rand.NewSource(6))
		x := randn(r, n*h*w*ch, 1)
		for i := range x {
			x[i] = x[i]*float32(1+i%ch%3) + 1000
		}
		gain, bias := randn(r, ch, 1), randn(r, ch, 1)
		y := sameForThreads(t, func(f *fixture) *engine.Tensor {
			y := f.image(engine.F32, nil, n, h, w, ch)
			f.ok(f.s.GroupNorm(engine.GroupNormArgs{X: f.image(engine.F32, x, n, h, w, ch), Y: y, Weight: f.put(engine.F32, gain, 1, ch),
				Bias: f.put(engine.F32, bias, 1, ch), Groups: groups, Eps: 1e-6, Act: engine.SiLU}))
			return y
		})
		for image := range n {
			for g := range groups {
				mean, m2, count := 0.0, 0.0, float64(h*w*ch/groups)
				each := func(f func(i int)) {
					for p := range h * w {
						for c := g * ch / groups; c < (g+1)*ch/groups; c++ {
							f((image*h*w+p)*ch + c)
						}
					}
				}
				each(func(i int) { mean += float64(x[i]) / count })
				each(func(i int) { m2 += (float64(x[i]) - mean) * (float64(x[i]) - mean) / count })
				each(func(i int) {
					c := i % ch
					want := (float64(x[i])-mean)/math.Sqrt(m2+1e-6)*float64(gain[c]) + float64(bias[c])
					// x is known to 2^-14 at 1000, and so is the mean.
					near(t, fmt.Sprintf("element %d", i), engine.F32, y[i], activate(engine.SiLU, want), 1+math.Abs(want), 2e-4)
				})
			}
		}
	})
}

func TestRowOpsThreads(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		const m, d = 300, 257
		r := rand.New(rand.NewSource(7))
		x, mod := randn(r, m*d, 1), randn(r, 3*2*d, 1)
		for _, dt := range floats {
			sameForThreads(t, func(f *fixture) *engine.Tensor {
				h, s := f.put(dt, x, m, d), f.put(engine.F32, mod, 3, 2*d)
				n, y := f.tensor(dt, m, d, d+3), f.tensor(engine.F32, m, d, d)
				f.ok(f.s.Norm(engine.NormArgs{X: h, Y: n, Scale: s.Slice(0, d), Shift: s.Slice(d, 2*d), ModRows: 100, Eps: 1e-6}))
				f.ok(f.s.Cast(engine.CastArgs{X: n, Y: y, Scale: 2, Shift: 1}))
				f.ok(f.s.GatedAdd(engine.GatedAddArgs{X: y, H: n, Gate: s.Slice(0, d), GateRows: 100, Y: y}))
				z := f.tensor(dt, m, d, d)
				f.ok(f.s.Rows(engine.RowsArgs{Y: z, A: y, B: h, Count: m, Act: engine.GELUErf}))
				return z
			})
		}
	})
}

func TestRowsIndex(t *testing.T) {
	f := open(t, 1)
	a, y := f.put(engine.F32, make([]float32, 12), 3, 4), f.put(engine.F32, randn(rand.New(rand.NewSource(8)), 12, 1), 3, 4)
	before := f.get(y)
	for name, args := range map[string]engine.RowsArgs{
		"IA too large": {Y: y, A: a, IA: f.index([]int32{0, 3}), Count: 2},
		"IB too large": {Y: y, A: a, B: a, IB: f.index([]int32{1, 7}), Count: 2},
		"IY too large": {Y: y, A: a, IY: f.index([]int32{0, 3}), Count: 2},
		"IY negative":  {Y: y, A: a, IY: f.index([]int32{0, -1}), Count: 2},
	} {
		if err := f.s.Rows(args); err == nil {
			t.Errorf("%s: no error", name)
		}
		if i := sameBits(before, f.get(y)); i >= 0 {
			t.Errorf("%s: Y was written", name)
		}
	}
}

// TestNormalDraws: the device's draws are engine.NormalAt, rounded, on every
// instruction set and for any number of channels.
func TestNormalDraws(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, c := range []int{1, 3, 16, 70} {
			f := open(t, 2)
			const m = 40
			ids := make([]int32, 2*m)
			for i := range ids {
				ids[i] = int32(i * 7 % 256)
			}
			rng := engine.RNG{Seed: 1<<40 + 12345, Purpose: engine.PurposeStepNoise, Step: 99}
			y, id := f.tensor(engine.F32, m, c, c), f.index(ids)
			id.Shape = []int{m, 2}
			id.RowStride = 2
			f.ok(f.s.Normal(engine.NormalArgs{Y: y, IDs: id, RNG: rng}))
			// The same draws, used by a reverse step that adds noise to nothing.
			zero := f.put(engine.F32, make([]float32, m*2*c), m, 2*c)
			z := f.put(engine.F32, make([]float32, m*c), m, c)
			f.ok(f.s.DiffusionStep(engine.DiffusionStepArgs{X: z, Y: z, Out: zero, IDs: id, RNG: rng, Temperature: 1}))
			got, noise := f.get(y), f.get(z)
			for i, v := range got {
				want := engine.NormalAt(rng, i%c, int(ids[i/c*2]), int(ids[i/c*2+1]))
				near(t, fmt.Sprintf("draw %d", i), engine.F32, v, want, math.Abs(want), 1e-7)
				if noise[i] != v {
					t.Fatalf("the step drew %g where Normal drew %g", noise[i], v)
				}
			}
		}
	})
}

// TestRowsEmpty: an index into a tensor without rows is an error, one that names
// nothing is not.
func TestRowsEmpty(t *testing.T) {
	f := open(t, 1)
	a, y := f.put(engine.F32, []float32{1, 2}, 1, 2), f.tensor(engine.F32, 1, 2, 2)
	empty := f.tensor(engine.F32, 0, 2, 2)
	none, first := f.index([]int32{-1}), f.index([]int32{0})
	f.ok(f.s.Rows(engine.RowsArgs{Y: y, A: a, B: empty, IB: none, Count: 1}))
	if i := sameBits(f.get(y), []float32{1, 2}); i >= 0 {
		t.Errorf("element %d is %v", i, f.get(y)[i])
	}
	f.ok(f.s.Rows(engine.RowsArgs{Y: y, A: a, IB: first, Count: 1})) // without B its index says nothing
	for _, args := range []engine.RowsArgs{
		{Y: y, A: a, B: empty, IB: first, Count: 1},
		{Y: y, A: empty, IA: first, Count: 1},
		{Y: empty, A: a, IY: first, Count: 1},
	} {
		if err := f.s.Rows(args); !errors.Is(err, engine.Invalid) {
			t.Errorf("%+v: %v", args, err)
		}
	}
}

// TestAttentionFirstError: what is reported is what went wrong first.
func TestAttentionFirstError(t *testing.T) {
	f, other := open(t, 1), open(t, 1)
	a := f.sequences(rand.New(rand.NewSource(1)), engine.F32, 1, 8, []int{2}, []int{2})
	elems[int32](a.QOff)[1] = 1
	if err := f.s.Attention(a); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "QOffHost differ") {
		t.Errorf("other offsets: %v", err)
	}
	a.K = other.put(engine.F32, make([]float32, 16), 2, 8)
	if err := f.s.Attention(a); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "not in memory") {
		t.Errorf("a tensor of another device, and other offsets: %v", err)
	}
}

// TestAttentionNoKeys: without any key the result is zero.
func TestAttentionNoKeys(t *testing.T) {
	eachISA(t, func(t *testing.T) {
		for _, dt := range floats {
			f := open(t, 1)
			a := f.sequences(rand.New(rand.NewSource(1)), dt, 2, 32, []int{3}, []int{0})
			f.ok(f.s.Attention(a))
			if i := sameBits(f.get(a.O), make([]float32, 3*64)); i >= 0 {
				t.Errorf("%v: element %d is %v", dt, i, f.get(a.O)[i])
			}
		}
	})
}
