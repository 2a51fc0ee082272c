package verify

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/load"
	"margo/engine/mar"
)

// FP8Layer says what rounding a linear of the head's residual blocks to FP8
// (engine.RoundE4M3) does. Errors are root mean squares, relative to what is
// changed.
type FP8Layer struct {
	Name    string  `json:"layer"`
	Weights float64 `json:"weights"` // of the weights
	BF16    float64 `json:"bf16"`    // the same for rounding them to bf16
	Eps     float64 `json:"eps"`     // of ε, this layer's weights in FP8 and all others in bf16, from ε with all in bf16
}

// FP8Error is the same for all layers at once.
type FP8Error struct {
	Layers  []FP8Layer `json:"layers"`
	Weights float64    `json:"weights"`
	BF16    float64    `json:"bf16"`
	Eps     float64    `json:"eps"`      // ε with FP8 from ε with bf16 weights
	EpsBF16 float64    `json:"eps_bf16"` // ε with bf16 weights from the recorded one
	EpsFP8  float64    `json:"eps_fp8"`  // ε with FP8 weights from the recorded one
}

// FP8 measures what FP8 costs the diffusion head: of the weights in o.Model, and,
// with the trace of a head's network (HeadNet), of the noise that the network
// predicts from the recorded inputs on o.Device in bf16. Without a trace only the
// weights are looked at.
func FP8(ctx context.Context, o Options) (*FP8Error, error) {
	f, desc, err := o.openModel()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if desc.Kind != checkpoint.KindMAR || desc.MAR.HeadKind() != checkpoint.DiffusionHead {
		return nil, engine.Errorf("fp8", engine.Invalid, "%s has no diffusion head", o.Model)
	}
	e := &FP8Error{}
	if err := e.weights(f, desc.MAR); err != nil || o.Trace == "" {
		return e, err
	}
	t, err := openTrace(o.Trace, o.room())
	if err != nil {
		return nil, err
	}
	defer t.Close()
	if t.kind != HeadNet {
		return nil, engine.Errorf("fp8", engine.Invalid, "the trace %s is of a %s, not of a head's network", o.Trace, t.kind)
	}
	v := &verifier{ctx: ctx, o: o, t: t, model: desc, dtype: engine.BF16}
	golden := t.get(&err, "out", 2)
	if err != nil {
		return nil, err
	}
	run := func(fp8 func(block, linear int) bool) ([]float64, error) { return v.noise(f, fp8) }
	plain, err := run(func(int, int) bool { return false })
	if err != nil {
		return nil, err
	}
	all, err := run(func(int, int) bool { return true })
	if err != nil {
		return nil, err
	}
	ch := desc.MAR.TokenDim()
	recorded := epsOf(float64s(golden.v), ch)
	e.Eps, e.EpsBF16, e.EpsFP8 = apart(all, plain), apart(plain, recorded), apart(all, recorded)
	for i := range e.Layers {
		one, err := run(func(block, linear int) bool { return 2*block+linear == i })
		if err != nil {
			return nil, err
		}
		e.Layers[i].Eps = apart(one, plain)
	}
	return e, nil
}

// headPrefix begins the names of the head's parameters (mar.Model.Head).
const headPrefix = "diffloss.net."

// linears are the weights that FP8 is for, in order; of block b they are 2b and 2b+1.
func linears(h *mar.Head) (all []*engine.Param) {
	for _, b := range h.Blocks {
		all = append(all, b.Fc1.Weight, b.Fc2.Weight)
	}
	return all
}

// weights compares rounded weights with those of the file.
func (e *FP8Error) weights(f *checkpoint.File, cfg *checkpoint.MARConfig) error {
	m, err := mar.New(cfg)
	if err != nil {
		return err
	}
	names := map[*engine.Param]string{}
	for _, p := range engine.Params(m) {
		names[p.Param] = p.Name
	}
	var size, off, offBF16 float64
	for i, p := range linears(m.Head) {
		w, k := make([]float32, p.Elems()), p.Shape[1]
		if err := f.ReadF32(names[p], w); err != nil {
			return err
		}
		f.Release(names[p])
		rounded, codes := make([]float32, k), make([]byte, k)
		var s, d, d16 float64
		for r := 0; r < len(w); r += k {
			copy(rounded, w[r:])
			engine.RoundE4M3(rounded, codes)
			for j, q := range rounded {
				x := float64(w[r+j])
				s, d, d16 = s+x*x, d+square(float64(q)-x), d16+square(float64(engine.FromBF16(engine.ToBF16(w[r+j])))-x)
			}
		}
		e.Layers = append(e.Layers, FP8Layer{Name: fmt.Sprintf("block %d fc%d", i/2, i%2+1), Weights: root(d, s), BF16: root(d16, s)})
		size, off, offBF16 = size+s, off+d, offBF16+d16
	}
	e.Weights, e.BF16 = root(off, size), root(offBF16, size)
	return nil
}

// noise is the ε of the recorded inputs, with the linears in FP8 that fp8 names.
func (v *verifier) noise(f *checkpoint.File, fp8 func(block, linear int) bool) (eps []float64, err error) {
	if err := v.ctx.Err(); err != nil {
		return nil, engine.Errorf("fp8", engine.Cancelled, "%w", err)
	}
	m, err := mar.New(v.model.MAR)
	if err != nil {
		return nil, err
	}
	for i, p := range linears(m.Head) {
		p.FP8 = fp8(i/2, i%2)
	}
	var params []engine.NamedParam // of the head
	for _, p := range engine.Params(m) {
		if strings.HasPrefix(p.Name, headPrefix) {
			params = append(params, p)
		}
	}
	if err := load.Fill(params, f, v.o.Device, engine.BF16, nil); err != nil {
		return nil, err
	}
	ctx, err := engine.NewCtx(v.o.Device, engine.BF16)
	if err != nil {
		return nil, errors.Join(err, load.Free(params))
	}
	s := &side{dev: v.o.Device, compute: engine.BF16, c: ctx}
	defer func() { err = errors.Join(err, ctx.Close(), load.Free(params)) }()
	x, c := v.t.get(&err, "x", 2), v.t.get(&err, "c", 2)
	t := v.t.ints(&err, "t", 1, diffusion.TrainSteps)
	ch := v.model.MAR.TokenDim()
	v.t.is(&err, "x", x, len(t), ch)
	v.t.is(&err, "c", c, len(t), v.model.MAR.DecoderEmbedDim)
	if err != nil {
		return nil, err
	}
	times := make([]float32, len(t))
	for i, k := range t {
		times[i] = float32(k)
	}
	out := m.Head.Denoise(s.c, s.upload(x, engine.F32), s.c.F32(times, len(t)), s.upload(c, engine.F32), false)
	return epsOf(s.read(out), ch), s.c.Err()
}

// epsOf takes ε of rows of ε and v.
func epsOf(out []float64, ch int) (eps []float64) {
	for i := 0; i+ch <= len(out); i += 2 * ch {
		eps = append(eps, out[i:i+ch]...)
	}
	return eps
}

func float64s(v []float32) []float64 {
	out := make([]float64, len(v))
	for i, x := range v {
		out[i] = float64(x)
	}
	return out
}

// apart is the root mean square of a − b, as a share of b's.
func apart(a, b []float64) float64 {
	if len(a) != len(b) {
		return math.NaN()
	}
	var d, s float64
	for i, x := range b {
		d, s = d+square(a[i]-x), s+x*x
	}
	return root(d, s)
}

func square(v float64) float64 { return v * v }

// root is √(d/s), 0 for 0/0.
func root(d, s float64) float64 {
	if d == 0 {
		return 0
	}
	return math.Sqrt(d / s)
}
