package sample

import (
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/mar"
)

// The authors' schedule for 64 iterations of 256 tokens and the demo's, as their
// code computes it.
func TestMaskLens(t *testing.T) {
	want := []int{255, 254, 253, 252, 251, 250, 249, 248, 247, 246, 245, 244, 243, 241, 238, 236, 234, 231, 228, 225, 222, 219,
		216, 212, 209, 205, 201, 197, 193, 189, 185, 181, 176, 171, 167, 162, 157, 152, 147, 142, 136, 131, 126, 120, 115, 109,
		103, 97, 92, 86, 80, 74, 68, 62, 56, 49, 43, 37, 31, 25, 18, 12, 6, 0}
	if got := MaskLens(256, 64); !slices.Equal(got, want) {
		t.Errorf("64 iterations: %v", got)
	}
	for i, m := range MaskLens(256, 256) { // one token each
		if m != 255-i {
			t.Fatalf("256 iterations: %d left after %d", m, i)
		}
	}
	if got := MaskLens(3, 5); !slices.Equal(got, []int{2, 1, 1, 1, 0}) {
		t.Errorf("3 tokens in 5 iterations: %v", got)
	}
	if got := MaskLens(7, 1); !slices.Equal(got, []int{0}) {
		t.Errorf("7 tokens in 1 iteration: %v", got)
	}
	// Fingerprint of the same rule computed with Python's math.cos and math.floor,
	// lists without blanks: floor is taken next to integers, where the last bit of
	// cos decides.
	h := sha256.New()
	for _, l := range []int{1, 2, 16, 49, 64, 255, 256, 1024} {
		for s := 1; s <= 1000; s++ {
			if s <= 128 || s == 256 || s == 300 || s == 512 || s == 1000 {
				fmt.Fprint(h, strings.ReplaceAll(fmt.Sprint(MaskLens(l, s)), " ", ","))
			}
		}
	}
	if got := fmt.Sprintf("%x", h.Sum(nil)); got != "63a428a5fce2ade9dc4853ea240343360f1afbb9e275f46f9a780c2abbc2bed5" {
		t.Errorf("fingerprint %s", got)
	}
}

func tinyConfig(t *testing.T) *mar.Config {
	t.Helper()
	cfg, err := checkpoint.NamedMAR("mar-base")
	if err != nil {
		t.Fatal(err)
	}
	cfg.ImgSize, cfg.BufferSize, cfg.ClassNum = 112, 4, 10 // 49 tokens
	return cfg
}

// Every unknown token is predicted once, in the order's order; each iteration
// sees what was predicted before and nothing else; guidance follows the fraction
// known over all tokens.
func TestBatchSchedule(t *testing.T) {
	cfg := tinyConfig(t)
	l := cfg.Tokens()
	half := &Known{Tokens: make([]float32, l*cfg.TokenDim()), Unknown: make([]bool, l)}
	for p := range l {
		half.Unknown[p] = p%3 == 0
	}
	for _, c := range []struct {
		iters int
		known *Known
	}{{24, nil}, {1, nil}, {49, nil}, {60, nil}, {24, half}, {5, half}} {
		r := Defaults()
		r.N, r.Batch, r.Iters, r.CFG, r.Labels, r.Known, r.Seed = 3, 3, c.iters, 3, []int{4, -1}, c.known, 7
		b, err := newBatch(cfg, &r, 5, 3)
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		state := make([][]bool, 3)
		for i := range state {
			state[i] = make([]bool, l)
			for p := range l {
				if state[i][p] = c.known != nil && !c.known.Unknown[p]; !state[i][p] {
					total++
				}
			}
		}
		unknown := total / 3
		lens := MaskLens(unknown, c.iters)
		for _, it := range b.iters {
			before := unknown
			if it.number > 0 {
				before = lens[it.number-1]
			}
			if want := 3 * (before - lens[it.number]); len(it.rows) != want {
				t.Errorf("%d iterations: iteration %d predicts %d tokens, want %d", c.iters, it.number, len(it.rows), want)
			}
			var zrow []struct{ seq, pos int }
			for k, s := range it.seqs {
				for _, p := range s.Want {
					zrow = append(zrow, struct{ seq, pos int }{k, int(p)})
				}
			}
			n := len(it.rows)
			if len(it.cond) != 2*n || len(it.guidance) != n || len(it.ids) != n {
				t.Fatalf("iteration %d: %d rows, %d conditions, %d scales", it.number, n, len(it.cond), len(it.guidance))
			}
			for k, row := range it.rows {
				i, p := int(row)/l, int(row)%l
				if state[i][p] || it.pos[k] != int32(p) || it.ids[k] != (TokenID{5 + i, p}) {
					t.Errorf("iteration %d: token %d of image %d again, or misnamed", it.number, p, i)
				}
				for half, z := range []int32{it.cond[k], it.cond[n+k]} {
					s := it.seqs[zrow[z].seq]
					class := r.class(5 + i)
					if half == 1 {
						class = -1
					}
					if zrow[z].pos != p || b.classes[s.Class] != class {
						t.Errorf("iteration %d, token %d of image %d: condition of position %d, class %d", it.number, p, i, zrow[z].pos, b.classes[s.Class])
					}
					var visible []int32
					for q, v := range state[i] {
						if v {
							visible = append(visible, int32(q))
						}
					}
					if !slices.Equal(s.Visible, visible) || len(visible) > 0 && s.Image != i {
						t.Errorf("iteration %d, image %d: sees %v of image %d, want %v", it.number, i, s.Visible, s.Image, visible)
					}
				}
				left := max(lens[it.number], 1) // the authors clamp before they finish
				if want := 1 + 2*float64(l-left)/float64(l); math.Abs(float64(it.guidance[k])-want) > 1e-6 {
					t.Errorf("iteration %d: guidance %g, want %g", it.number, it.guidance[k], want)
				}
			}
			for _, row := range it.rows {
				state[int(row)/l][int(row)%l] = true
				total--
			}
		}
		if total != 0 {
			t.Errorf("%d iterations: %d tokens were not predicted", c.iters, total)
		}
		order := engine.Permutation(7, 5, l)
		first := order[l-1]
		for k := l - 1; c.known != nil && !c.known.Unknown[first]; k-- {
			first = order[k]
		}
		if !slices.Contains(b.iters[0].rows, int32(first)) {
			t.Error("the last token of the order is not predicted first")
		}
	}
}

// Images of a class share the sequence of the first iteration, where they have
// nothing of their own yet, and only there.
func TestSharedSequences(t *testing.T) {
	cfg := tinyConfig(t)
	r := Defaults()
	r.N, r.Batch, r.Iters, r.CFG, r.Labels = 6, 6, 3, 2, []int{1, 2}
	b, err := newBatch(cfg, &r, 0, 6)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{3, 12, 12} { // classes 1, 2 and none; then 6 guided pairs
		if got := len(b.iters[i].seqs); got != want {
			t.Errorf("iteration %d: %d sequences, want %d", i, got, want)
		}
	}
	r.CFG, r.Labels = 1, nil
	if b, err = newBatch(cfg, &r, 0, 6); err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{1, 6, 6} {
		if it := b.iters[i]; len(it.seqs) != want || it.guidance != nil || len(it.cond) != len(it.rows) {
			t.Errorf("iteration %d without guidance: %d sequences, %d conditions for %d tokens", i, len(it.seqs), len(it.cond), len(it.rows))
		}
	}
}

func TestConstantGuidance(t *testing.T) {
	if g := guidanceAt(2.5, Constant, 3, 49); g != 2.5 {
		t.Error(g)
	}
	if g := guidanceAt(2.5, Linear, 0, 49); g != 2.5 {
		t.Error(g)
	}
	if g := guidanceAt(2.5, Linear, 49, 49); g != 1 {
		t.Error(g)
	}
}
