package sample

import (
	"math"
	"slices"

	"margo/engine"
	"margo/engine/mar"
)

// MaskLens is the number of tokens still unknown after each of iters iterations
// that begin with unknown: ⌊unknown·cos(π/2·(s+1)/iters)⌋, at least one less
// than before and at least 1 until the last, which leaves none (P33;
// mar.py sample_tokens). With more iterations than tokens some predict nothing.
func MaskLens(unknown, iters int) []int {
	out := make([]int, iters)
	left := unknown
	for s := range out {
		left = nextMask(unknown, left, s, iters)
		out[s] = left
	}
	if iters > 0 {
		out[iters-1] = 0
	}
	return out
}

// nextMask is the authors' mask_len: what the schedule leaves after iteration s,
// also at the last, where guidance still uses it.
func nextMask(unknown, left, s, iters int) int {
	ratio := math.Cos(math.Pi / 2 * float64(s+1) / float64(iters))
	return max(1, min(left-1, int(math.Floor(float64(unknown)*ratio))))
}

// guidanceAt is the CFG scale of an iteration that leaves next of tokens unknown:
// linear 1 + (ω−1)·(L − next)/L (Muse's, P54) or constant ω.
func guidanceAt(cfg float64, schedule string, next, tokens int) float32 {
	if schedule == Constant {
		return float32(cfg)
	}
	return float32(1 + (cfg-1)*float64(tokens-next)/float64(tokens))
}

// image is one image of a batch.
type image struct {
	index, class int // class -1: unconditional
	order        []int
	visible      []bool
	left, next   int // order[:left] is unknown, after this iteration order[:next]

	full []int // causal: all positions in the order of generation
	at   int   // causal: full[at] is the token asked for last; those before it are in the cache
}

// TokenID names a token of an image.
type TokenID struct{ Image, Token int }

// iteration is one step of the autoregressive loop for a batch.
type iteration struct {
	number   int             // of Request.Iters
	seqs     []mar.Seq       // Image counts within the batch
	exts     []mar.Extension // causal: in the place of seqs
	rows     []int32         // image·L + position of each token to be predicted
	pos      []int32
	ids      []TokenID
	cond     []int32   // row of z for each row of the head: conditional, then unconditional
	guidance []float32 // of each token; nil without guidance
}

// batch is the schedule of images that are made together.
type batch struct {
	r       *Request
	tokens  int // L
	images  []image
	classes []int // rows of the class table
	causal  bool
	open    bool        // confidence order: iterations are scheduled as the run goes
	iters   []iteration // the whole schedule, unless open
}

// row is the row of the class table of a class.
func (b *batch) row(class int) int { return slices.Index(b.classes, class) }

// newBatch schedules the images first … first+n-1 of r.
func newBatch(cfg *mar.Config, r *Request, first, n int) (*batch, error) {
	l, kind := cfg.Tokens(), r.orderKind(cfg)
	b := &batch{r: r, tokens: l, causal: cfg.IsCausal(), open: kind == ConfidenceOrder}
	for i := range n {
		im := image{index: first + i, class: r.class(first + i), visible: make([]bool, l), at: -1}
		for _, class := range []int{im.class, -1} {
			if used := class == im.class || r.CFG != 1; used && b.row(class) < 0 {
				b.classes = append(b.classes, class)
			}
		}
		order, err := r.order(kind, im.index, l)
		if err != nil {
			return nil, err
		}
		for _, p := range order {
			if r.Known != nil && !r.Known.Unknown[p] {
				im.visible[p] = true
			} else {
				im.order = append(im.order, p)
			}
		}
		im.left = len(im.order)
		if b.causal {
			im.full = r.generation(kind, order)
		}
		b.images = append(b.images, im)
	}
	for s := 0; s < r.Iters && !b.open; s++ {
		it := b.schedule(s)
		b.advance()
		if len(it.rows) > 0 {
			b.iters = append(b.iters, it)
		}
	}
	return b, nil
}

// schedule plans iteration s of images whose state is that after iteration s-1.
func (b *batch) schedule(s int) iteration {
	if b.causal {
		return b.extend(s)
	}
	return b.iterate(s)
}

// advance moves the images' state past the iteration that was scheduled.
func (b *batch) advance() {
	for i := range b.images {
		im := &b.images[i]
		for _, p := range im.order[im.next:im.left] {
			im.visible[p] = true
		}
		im.left = im.next
	}
}

// generation is the order in which a causal model meets all positions: known
// ones first, unless the order is raster.
func (r *Request) generation(kind string, order []int) []int {
	full := slices.Clone(order)
	slices.Reverse(full)
	if r.Known != nil && kind != RasterOrder {
		slices.SortStableFunc(full, func(a, b int) int {
			ua, ub := r.Known.Unknown[a], r.Known.Unknown[b]
			switch {
			case ua == ub:
				return 0
			case ub:
				return -1
			}
			return 1
		})
	}
	return full
}

// iterate is schedule for bidirectional attention. In confidence order all
// unknown tokens are asked for.
func (b *batch) iterate(s int) iteration {
	r, l, row := b.r, b.tokens, b.row
	it := iteration{number: s}
	set := seqSet{tokens: l, at: map[seqKey]int{}}
	guided := r.CFG != 1
	var cond, uncond []seqRef
	for i := range b.images {
		im := &b.images[i]
		if im.next = im.left; im.left == 0 {
			continue
		}
		im.next = nextMask(len(im.order), im.left, s, r.Iters)
		scale := guidanceAt(r.CFG, r.CFGSchedule, im.next, l)
		if s == r.Iters-1 {
			im.next = 0
		}
		from := im.next
		if b.open && im.next < im.left {
			from = 0
		}
		want := slices.Sorted(slices.Values(im.order[from:im.left]))
		if len(want) == 0 {
			continue // more iterations than tokens: nothing to predict this time
		}
		c := set.ask(row(im.class), i, im, want)
		u := c // without a class both halves are the same sequence
		if guided && im.class >= 0 {
			u = set.ask(row(-1), i, im, want)
		}
		for _, p := range want {
			it.rows, it.pos = append(it.rows, int32(i*l+p)), append(it.pos, int32(p))
			it.ids = append(it.ids, TokenID{im.index, p})
			cond, uncond = append(cond, seqRef{c, p}), append(uncond, seqRef{u, p})
			if guided {
				it.guidance = append(it.guidance, scale)
			}
		}
	}
	if guided {
		cond = append(cond, uncond...)
	}
	it.seqs, it.cond = set.resolve(cond)
	return it
}

// seqSet collects the sequences of an iteration. Images of one class that have
// no token yet share a sequence: the trunk sees the same for all of them.
type seqSet struct {
	tokens int
	seqs   []mar.Seq
	wants  [][]bool
	at     map[seqKey]int
}

type seqKey struct{ class, image int }

type seqRef struct{ seq, pos int }

func (q *seqSet) ask(class, i int, im *image, want []int) int {
	key := seqKey{class, i}
	if !slices.Contains(im.visible, true) {
		key.image = -1
	}
	k, ok := q.at[key]
	if !ok {
		k = len(q.seqs)
		q.at[key] = k
		s := mar.Seq{Class: class, Image: i}
		for p, v := range im.visible {
			if v {
				s.Visible = append(s.Visible, int32(p))
			}
		}
		q.seqs, q.wants = append(q.seqs, s), append(q.wants, make([]bool, q.tokens))
	}
	for _, p := range want {
		q.wants[k][p] = true
	}
	return k
}

// resolve fills Want of every sequence and finds the row of z of each reference.
func (q *seqSet) resolve(refs []seqRef) ([]mar.Seq, []int32) {
	at, n := make([][]int32, len(q.seqs)), int32(0)
	for k, w := range q.wants {
		at[k] = make([]int32, q.tokens)
		for p, yes := range w {
			if yes {
				q.seqs[k].Want = append(q.seqs[k].Want, int32(p))
				at[k][p] = n
				n++
			}
		}
	}
	rows := make([]int32, len(refs))
	for i, r := range refs {
		rows[i] = at[r.seq][r.pos]
	}
	return q.seqs, rows
}

// Draws supplies the random choices of a run in place of the generator: for
// replaying a recorded trace.
type Draws interface {
	// Order is the generation order of an image, a permutation of 0 … tokens-1;
	// what stands last is generated first.
	Order(image, tokens int) []int
	// Noise gives x_T [n,C] and δ [steps·n, C], in the order of the steps, for the
	// n tokens that iteration iter predicts: by image, then by position.
	Noise(iter int, ids []TokenID, steps, channels int) (init, noise []float32, err error)
}

// order is a permutation of the tokens, what stands last being generated first.
func (r *Request) order(kind string, index, tokens int) ([]int, error) {
	if kind == RasterOrder {
		o := make([]int, tokens)
		for i := range o {
			o[i] = tokens - 1 - i
		}
		return o, nil
	}
	if r.Draws == nil {
		return engine.Permutation(r.Seed, index, tokens), nil
	}
	o := r.Draws.Order(index, tokens)
	seen := make([]bool, tokens)
	for _, p := range o {
		if p < 0 || p >= tokens || seen[p] {
			return nil, engine.Errorf("sample", engine.Invalid, "the order given for image %d is no permutation: token %d", index, p)
		}
		seen[p] = true
	}
	if len(o) != tokens {
		return nil, engine.Errorf("sample", engine.Invalid, "the order given for image %d has %d of %d tokens", index, len(o), tokens)
	}
	return o, nil
}
