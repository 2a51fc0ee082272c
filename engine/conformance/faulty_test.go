package conformance

import (
	"math"
	"regexp"
	"slices"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

// mutant is a device that is right but for one fault. A hook takes the place
// of an op; nil ones leave it alone.
type mutant struct {
	name  string
	match string // cases it may be seen in
	modes []Mode // modes that must find it

	gemm        func(engine.Stream, engine.GemmArgs) error
	attention   func(engine.Stream, engine.AttentionArgs) error
	norm        func(engine.Stream, engine.NormArgs) error
	gatedAdd    func(engine.Stream, engine.GatedAddArgs) error
	rows        func(engine.Stream, engine.RowsArgs) error
	cast        func(engine.Stream, engine.CastArgs) error
	embedding   func(engine.Stream, engine.TimestepEmbeddingArgs) error
	normal      func(engine.Stream, engine.NormalArgs) error
	step        func(engine.Stream, engine.DiffusionStepArgs) error
	head        func(engine.Stream, engine.HeadStepsArgs) error
	conv        func(engine.Stream, engine.Conv2DArgs) error
	groupNorm   func(engine.Stream, engine.GroupNormArgs) error
	patchify    func(engine.Stream, engine.PatchifyArgs) error
	categorical func(engine.Stream, engine.CategoricalArgs) error

	fill    func(engine.Stream, *engine.Tensor, float32) error
	copyIn  func(engine.Stream, *engine.Tensor, []byte) error
	copy    func(engine.Stream, *engine.Tensor, *engine.Tensor) error
	capture func(engine.Stream, func() error) (engine.Graph, error)
	alloc   func(engine.Device, int) (engine.Buffer, error)
}

// faulty is a mutant as a device; of *ref.Device it is not.
type faulty struct {
	engine.Device
	m *mutant
}

func (d faulty) NewStream() (engine.Stream, error) {
	s, err := d.Device.NewStream()
	return &faultyStream{s, d}, err
}

func (d faulty) Alloc(n int) (engine.Buffer, error) {
	if d.m.alloc != nil {
		return d.m.alloc(d.Device, n)
	}
	return d.Device.Alloc(n)
}

type faultyStream struct {
	engine.Stream
	dev faulty
}

func through[A any](hook func(engine.Stream, A) error, s engine.Stream, op func(A) error, a A) error {
	if hook != nil {
		return hook(s, a)
	}
	return op(a)
}

func (s *faultyStream) Device() engine.Device { return s.dev }
func (s *faultyStream) Gemm(a engine.GemmArgs) error {
	return through(s.dev.m.gemm, s.Stream, s.Stream.Gemm, a)
}
func (s *faultyStream) Attention(a engine.AttentionArgs) error {
	return through(s.dev.m.attention, s.Stream, s.Stream.Attention, a)
}
func (s *faultyStream) Norm(a engine.NormArgs) error {
	return through(s.dev.m.norm, s.Stream, s.Stream.Norm, a)
}
func (s *faultyStream) GatedAdd(a engine.GatedAddArgs) error {
	return through(s.dev.m.gatedAdd, s.Stream, s.Stream.GatedAdd, a)
}
func (s *faultyStream) Rows(a engine.RowsArgs) error {
	return through(s.dev.m.rows, s.Stream, s.Stream.Rows, a)
}
func (s *faultyStream) Cast(a engine.CastArgs) error {
	return through(s.dev.m.cast, s.Stream, s.Stream.Cast, a)
}
func (s *faultyStream) TimestepEmbedding(a engine.TimestepEmbeddingArgs) error {
	return through(s.dev.m.embedding, s.Stream, s.Stream.TimestepEmbedding, a)
}
func (s *faultyStream) Normal(a engine.NormalArgs) error {
	return through(s.dev.m.normal, s.Stream, s.Stream.Normal, a)
}
func (s *faultyStream) DiffusionStep(a engine.DiffusionStepArgs) error {
	return through(s.dev.m.step, s.Stream, s.Stream.DiffusionStep, a)
}
func (s *faultyStream) HeadSteps(a engine.HeadStepsArgs) error {
	return through(s.dev.m.head, s.Stream, s.Stream.HeadSteps, a)
}
func (s *faultyStream) Conv2D(a engine.Conv2DArgs) error {
	return through(s.dev.m.conv, s.Stream, s.Stream.Conv2D, a)
}
func (s *faultyStream) GroupNorm(a engine.GroupNormArgs) error {
	return through(s.dev.m.groupNorm, s.Stream, s.Stream.GroupNorm, a)
}
func (s *faultyStream) Patchify(a engine.PatchifyArgs) error {
	return through(s.dev.m.patchify, s.Stream, s.Stream.Patchify, a)
}
func (s *faultyStream) Categorical(a engine.CategoricalArgs) error {
	return through(s.dev.m.categorical, s.Stream, s.Stream.Categorical, a)
}
func (s *faultyStream) Fill(t *engine.Tensor, v float32) error {
	if s.dev.m.fill != nil {
		return s.dev.m.fill(s.Stream, t, v)
	}
	return s.Stream.Fill(t, v)
}
func (s *faultyStream) CopyIn(t *engine.Tensor, b []byte) error {
	if s.dev.m.copyIn != nil {
		return s.dev.m.copyIn(s.Stream, t, b)
	}
	return s.Stream.CopyIn(t, b)
}
func (s *faultyStream) Copy(dst, src *engine.Tensor) error {
	if s.dev.m.copy != nil {
		return s.dev.m.copy(s.Stream, dst, src)
	}
	return s.Stream.Copy(dst, src)
}
func (s *faultyStream) Capture(f func() error) (engine.Graph, error) {
	if s.dev.m.capture != nil {
		return s.dev.m.capture(s.Stream, f)
	}
	return s.Stream.Capture(f)
}

// TestMutants shows that every fault is found, by the mode that is there for
// it, and that without a fault nothing is (which TestRefRounded does at length).
func TestMutants(t *testing.T) {
	all := slices.Concat([]mutant{{name: "none", match: "^(gemm|norm)/"}}, gemmMutants(), attentionMutants(), rowMutants(),
		headMutants(), imageMutants(), pagedMutants(), categoricalMutants(), systemMutants())
	for i := range all {
		m := &all[i]
		t.Run(m.name, func(t *testing.T) {
			found, first := m.search(t)
			for _, mode := range m.modes {
				if !found[mode] {
					t.Errorf("mode %s did not find it", mode)
				}
			}
			if len(m.modes) == 0 && len(found) > 0 || found[Failed] {
				t.Errorf("found %v: %v", found, first)
			}
			t.Logf("%v, first: %v", found, first)
		})
	}
}

// search runs cases until every mode that should find the mutant has.
func (m *mutant) search(t *testing.T) (found map[Mode]bool, first string) {
	match := regexp.MustCompile(m.match)
	dev := faulty{ref.New(ref.Rounded), m}
	found = map[Mode]bool{}
	look := func(rs ...Result) (done bool) {
		for _, r := range rs {
			if r.Status == Fail {
				found[r.Mode] = true
				if first == "" {
					first = r.String()
				}
			}
		}
		for _, mode := range m.modes {
			if !found[mode] {
				return false
			}
		}
		return len(m.modes) > 0
	}
	for _, c := range Cases() {
		if !c.Bench && match.MatchString(c.Name) && look(c.Check(dev)...) {
			return found, first
		}
	}
	for _, c := range systemChecks {
		if match.MatchString("system/"+c.name) && look(c.check(dev)) {
			return found, first
		}
	}
	return found, first
}

// edit changes every element of t that f wants changed.
func edit(s engine.Stream, t *engine.Tensor, f func(r, c int, v float32) float32) error {
	for r := 0; r < t.Rows() && t.Cols() > 0; r++ {
		row := t.RowsAt(r, r+1)
		b := make([]byte, row.Bytes())
		if err := s.CopyOut(b, row); err != nil {
			return err
		}
		w := fromBytes(b, t.DType)
		for c, x := range w {
			if t.DType == engine.I32 {
				w[c] = uint32(int32(f(r, c, float32(int32(x)))))
			} else {
				w[c] = word(f(r, c, floatOf(x)), t.DType)
			}
		}
		if err := s.CopyIn(row, toBytes(w, t.DType)); err != nil {
			return err
		}
	}
	return nil
}

// changed is a copy of t as f makes it; nil for nil. The memory is not freed.
func changed(s engine.Stream, t *engine.Tensor, f func(r, c int, v float32) float32) *engine.Tensor {
	if t == nil {
		return nil
	}
	u := tensor(s.Device(), t.DType, t.Shape...)
	check(s.Copy(u, t))
	check(edit(s, u, f))
	return u
}

// dense is t as if its rows had no gaps.
func dense(t *engine.Tensor) *engine.Tensor {
	if t == nil {
		return nil
	}
	u := *t
	u.RowStride = t.Cols()
	return &u
}

// truncated stores F32 results in y by cutting off their low bits.
func truncated(s engine.Stream, y *engine.Tensor, op func(y *engine.Tensor) error) error {
	if y.DType != engine.BF16 {
		return op(y)
	}
	wide := tensor(s.Device(), engine.F32, y.Shape...)
	if err := op(wide); err != nil {
		return err
	}
	check(edit(s, wide, func(_, _ int, v float32) float32 { return math.Float32frombits(math.Float32bits(v) &^ 0xffff) }))
	return s.Cast(engine.CastArgs{X: wide, Y: y, Scale: 1})
}

// behind overwrites the element after the last of t.
func behind(s engine.Stream, t *engine.Tensor) error {
	if t.Elems() == 0 {
		return nil
	}
	u := t.RowsAt(t.Rows()-1, t.Rows())
	u.Off += t.Cols() * t.DType.Size()
	u.Shape = []int{1, 1}
	return s.Fill(u, 1)
}

// ulps moves a number by n units in the last place.
func ulps(v float32, n int) float32 { return math.Float32frombits(math.Float32bits(v) + uint32(n)) }

// tf32 rounds to ten bits of mantissa, as tensor cores do silently.
func tf32(v float32) float32 {
	u := math.Float32bits(v)
	return math.Float32frombits((u + 0xfff + u>>13&1) &^ 0x1fff)
}
