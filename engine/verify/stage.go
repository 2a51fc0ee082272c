package verify

import (
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

// compare runs c on the three sides and judges the device.
func (v *verifier) compare(c check) error {
	var results [3][][]float64
	for i, s := range []*side{v.device, v.exact, v.rounded} {
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
		v.add(judge(name, g, results[0][i], results[1][i], results[2][i], v.dtype, c.free))
	}
	return nil
}

// judge compares the device's result with the golden; see the package comment
// for the limit.
func judge(name string, golden, device, exact, rounded []float64, d engine.DType, free bool) Stage {
	peak := maxAbs(golden)
	own, noise := distance(golden, exact), distance(rounded, exact)
	s := Stage{Name: name, MaxAbs: distance(device, golden), Gated: d == engine.F32 || !free}
	if d == engine.F32 {
		s.Limit = math.Max(2*math.Max(own, noise), 1e-6*peak)
	} else {
		// The rounding that ends a BF16 stage is 2⁻⁹ of the value.
		s.Limit = math.Max(2*noise+own+peak/512, 1e-6*peak)
	}
	if peak > 0 {
		s.Rel = s.MaxAbs / peak
	}
	s.Pass = s.MaxAbs <= s.Limit // false for NaN
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
