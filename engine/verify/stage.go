package verify

import (
	"encoding/json"
	"fmt"
	"math"

	"margo/engine"
	"margo/engine/ref"
)

// Stage is one comparison.
type Stage struct {
	Name   string  `json:"stage"`
	MaxAbs float64 `json:"max_abs"` // |device − golden|
	Rel    float64 `json:"relative"`
	Limit  float64 `json:"limit"` // of MaxAbs
	Gated  bool    `json:"gated"`
	Pass   bool    `json:"pass"`

	Oracle      float64 `json:"oracle"`           // |exact − golden|
	OracleLimit float64 `json:"oracle_limit"`     // what rounding to F32 can explain of Oracle
	Reason      string  `json:"reason,omitempty"` // why it does not pass
}

// MarshalJSON writes null for distances that are not finite, which JSON cannot
// express.
func (s Stage) MarshalJSON() ([]byte, error) {
	finite := func(v float64) *float64 {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil
		}
		return &v
	}
	type stage Stage // without this method
	return json.Marshal(struct {
		stage
		MaxAbs      *float64 `json:"max_abs"`
		Rel         *float64 `json:"relative"`
		Limit       *float64 `json:"limit"`
		Oracle      *float64 `json:"oracle"`
		OracleLimit *float64 `json:"oracle_limit"`
	}{stage(s), finite(s.MaxAbs), finite(s.Rel), finite(s.Limit), finite(s.Oracle), finite(s.OracleLimit)})
}

// side is one of the devices a stage runs on, with the model bound to it.
type side struct {
	dev     engine.Device
	compute engine.DType
	c       *engine.Ctx
	m       models
}

// eval computes the outputs of a stage on a side, in the order of the goldens.
type eval func(s *side) [][]float64

// read downloads a result in full precision.
func (s *side) read(t *engine.Tensor) []float64 {
	if s.c.Err() != nil {
		return nil
	}
	if t == nil {
		s.c.Fail(engine.Errorf("verify", engine.Internal, "stage has no result"))
		return nil
	}
	if _, ok := s.dev.(*ref.Device); ok {
		v, err := ref.Float64s(t)
		s.c.Fail(err)
		return v
	}
	return widen(s.c.Download(t))
}

func widen(v []float32) []float64 {
	out := make([]float64, len(v))
	for i, x := range v {
		out[i] = float64(x)
	}
	return out
}

// check is a stage to be run: goldens by name, and how to compute them.
type check struct {
	names   []string
	goldens [][]float32
	free    bool // runs free over many steps: judged in F32 only
	run     eval
}

func one(name string, golden []float32, run func(s *side) *engine.Tensor) check {
	return check{names: []string{name}, goldens: [][]float32{golden},
		run: func(s *side) [][]float64 { return [][]float64{s.read(run(s))} }}
}

// compare runs c on all sides and judges the device.
func (v *verifier) compare(c check) error {
	var results [4][][]float64
	for i, s := range []*side{v.device, v.exact, v.rounded, v.single} {
		if i == 3 && s == v.rounded {
			results[i] = results[2]
			continue
		}
		var r [][]float64
		s.c.Scoped(func() { r = c.run(s) })
		if err := s.c.ClearErr(); err != nil {
			return fmt.Errorf("stage %s on %s: %w", c.names[0], s.dev.Name(), err)
		}
		results[i] = r
	}
	for i, name := range c.names {
		g := widen(c.goldens[i])
		for _, r := range results {
			if len(r[i]) != len(g) {
				return engine.Errorf("stage "+name, engine.IO, "trace has %d values, the model computes %d", len(g), len(r[i]))
			}
		}
		v.add(judge(name, values{g, results[0][i], results[1][i], results[2][i], results[3][i]}, v.dtype, c.free))
	}
	return nil
}

// values of one output: the golden, and what each side computed. single is
// rounded in F32.
type values struct{ golden, device, exact, rounded, single []float64 }

// Bounds of what rounding to F32 explains of a golden's distance from the exact
// result; see the package comment.
const (
	noiseFactor = 4
	fewRounds   = 1e-6 // of the largest value: the floor of every limit
	mostBlur    = 1e-2
)

// judge compares the device's result with the golden; see the package comment
// for the limits.
func judge(name string, x values, d engine.DType, free bool) Stage {
	peak := maxAbs(x.golden)
	noise := distance(x.rounded, x.exact)
	s := Stage{Name: name, MaxAbs: distance(x.device, x.golden), Oracle: distance(x.golden, x.exact), Gated: d == engine.F32 || !free}
	s.OracleLimit = math.Min(math.Max(noiseFactor*distance(x.single, x.exact), fewRounds*peak), mostBlur*peak)
	if d == engine.F32 {
		s.Limit = math.Max(2*math.Max(s.Oracle, noise), 1e-6*peak)
	} else {
		// The rounding that ends a BF16 stage is 2⁻⁹ of the value.
		s.Limit = math.Max(2*noise+s.Oracle+peak/512, 1e-6*peak)
	}
	if peak > 0 {
		s.Rel = s.MaxAbs / peak
	}
	switch { // the comparisons are false for NaN
	case !(s.Oracle <= s.OracleLimit):
		// Whatever the device does: this is judged in BF16 loops, too.
		s.Gated = true
		s.Reason = "the oracle itself misses the golden: other weights or another model"
	case !(s.MaxAbs <= s.Limit):
		s.Reason = "the device is beyond its limit"
	default:
		s.Pass = true
	}
	return s
}

// maxAbs is the largest finite absolute value.
func maxAbs(v []float64) float64 {
	m := 0.0
	for _, x := range v {
		if a := math.Abs(x); !math.IsInf(a, 0) && a > m { // NaN is never above
			m = a
		}
	}
	return m
}

// distance is the largest difference; NaN if any element is NaN on one side
// only, or infinite on one side only.
func distance(a, b []float64) float64 {
	m := 0.0
	for i := range a {
		if a[i] == b[i] || math.IsNaN(a[i]) && math.IsNaN(b[i]) {
			continue
		}
		d := math.Abs(a[i] - b[i])
		if math.IsNaN(d) || math.IsInf(d, 0) {
			return math.NaN()
		}
		m = math.Max(m, d)
	}
	return m
}
