package verify

import (
	"fmt"
	"math"
	"strconv"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
)

// Kind of a trace, told by its keys.
type Kind string

const (
	EncDec    Kind = "MAR encoder and decoder"
	HeadNet   Kind = "diffusion head"
	Sampling  Kind = "MAR sampling loop"
	Tokenizer Kind = "tokenizer"

	DiTForward  Kind = "DiT forward pass"
	DiTSampling Kind = "DiT sampling loop"
)

// trace gives the tensors of a recorded run.
type trace struct {
	*checkpoint.File
	kind Kind
}

// maxElems is what the oracle's 4 GiB of memory hold of F32 (ref.Device): a sparse
// file takes no room on its disk, and its tensors would take the host's memory.
const maxElems = 1 << 30

// elemBytes is what an element of a trace takes of the host's memory at least: as
// F32, in the oracle's float64, and on the device.
const elemBytes = 16

// openTrace opens a trace that the oracle, and room bytes of memory, can hold; 0 is
// no limit of memory.
func openTrace(path string, room int64) (*trace, error) {
	f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
	if err != nil {
		return nil, err
	}
	t := &trace{File: f}
	elems := int64(0)
	for _, name := range f.Names() {
		info, _ := f.Tensor(name)
		if elems += min(info.Elems(), maxElems+1); elems > maxElems {
			f.Close()
			return nil, t.unknown("its tensors have more than %d elements, which the float64 oracle cannot hold", int64(maxElems))
		}
	}
	if need := elems * elemBytes; room > 0 && need > room {
		f.Close()
		return nil, engine.Errorf("trace "+path, engine.OutOfMemory, "its %d elements need %d bytes, there are %d free", elems, need, room)
	}
	has := func(name string) bool { _, ok := f.Tensor(name); return ok }
	switch {
	case has("step0.loss"), has("per_sample_loss"):
		err = t.unknown("a training trace; this margo does not train")
	case has("orders") && has("iter0.tokens_in"):
		t.kind = Sampling
	case has("ps_index"):
		t.kind = HeadNet
	case has("moments"), has("prequant"), has("decoded"), has("decoded_z"), has("decoded_codes"), has("decoded_tokens"):
		t.kind = Tokenizer
	case has("enc_out") && has("dec_out_z"):
		t.kind = EncDec
	case has("t_embed"):
		t.kind = DiTForward
	case has("step_samples") && has("z") && has("y"):
		t.kind = DiTSampling
	default:
		err = t.unknown("no known kind of trace: its tensors are not those of encoder and decoder, head, sampling loop, DiT or tokenizer")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return t, nil
}

func (t *trace) unknown(format string, args ...any) error {
	return engine.Errorf("trace "+t.Path(), engine.IO, format, args...)
}

func (t *trace) has(name string) bool { _, ok := t.Tensor(name); return ok }

// data is a recorded tensor.
type data struct {
	shape []int
	v     []float32
}

// get reads a tensor of rank dims (-1: any) of finite numbers: nothing can be
// compared with others. The first error sticks in *err.
func (t *trace) get(err *error, name string, rank int) data {
	if *err != nil {
		return data{}
	}
	info, ok := t.Tensor(name)
	if !ok {
		*err = t.unknown("tensor %s is missing from this trace of kind %s", name, t.kind)
		return data{}
	}
	if rank >= 0 && len(info.Shape) != rank {
		*err = t.unknown("tensor %s has shape %s, expected %d dimensions", name, engine.ShapeString(info.Shape), rank)
		return data{}
	}
	d := data{info.Shape, make([]float32, info.Elems())}
	if info.DType.Float() {
		if *err = t.ReadF32(name, d.v); *err != nil {
			return d
		}
		for i, x := range d.v {
			if x-x != 0 {
				*err = t.unknown("tensor %s: element %d is %g; a recording of numbers that are not finite shows nothing", name, i, x)
				break
			}
		}
		return d
	}
	ints := make([]int64, info.Elems())
	if *err = t.ReadI64(name, ints); *err == nil {
		for i, x := range ints {
			d.v[i] = float32(x)
		}
	}
	return d
}

// ints reads a tensor of whole numbers in [0, below).
func (t *trace) ints(err *error, name string, rank, below int) []int {
	d := t.get(err, name, rank)
	out := make([]int, len(d.v))
	for i, x := range d.v {
		out[i] = int(x)
		if *err == nil && (float32(out[i]) != x || out[i] < 0 || out[i] >= below) {
			*err = t.unknown("tensor %s: element %d is %g, expected a whole number in 0..%d", name, i, x, below-1)
		}
	}
	return out
}

// number reads a value of the metadata, between low and high; def if it is
// absent.
func (t *trace) number(err *error, key string, def, low, high float64) float64 {
	s, ok := t.Metadata()[key]
	if !ok || *err != nil {
		return def
	}
	v, e := strconv.ParseFloat(s, 64)
	switch {
	case e != nil:
		*err = t.unknown("metadata %s: %q is not a number", key, s)
	case !(v >= low && v <= high): // also NaN
		*err = t.unknown("metadata %s is %s, expected %g to %g", key, s, low, high)
	default:
		return v
	}
	return def
}

// process is the diffusion process of the recorded head: metadata
// diffusion_steps goes before the model's num_sampling_steps.
func (v *verifier) process(err *error) *diffusion.Process {
	const name = "diffusion_steps"
	steps := v.t.number(err, name, float64(v.model.MAR.NumSamplingSteps), 2, diffusion.TrainSteps)
	if *err != nil {
		return nil
	}
	if steps != math.Trunc(steps) {
		*err = v.t.unknown("metadata %s is %g, expected a whole number", name, steps)
		return nil
	}
	p, e := diffusion.MAR(int(steps), diffusion.TrainSteps-1)
	if e != nil {
		*err = v.t.unknown("metadata %s, or the model's num_sampling_steps without it, is %g: %w", name, steps, e)
	}
	return p
}

// is demands a shape.
func (t *trace) is(err *error, name string, d data, shape ...int) {
	if *err == nil && engine.ShapeString(d.shape) != engine.ShapeString(shape) {
		*err = t.unknown("tensor %s has shape %s; this model needs %s", name, engine.ShapeString(d.shape), engine.ShapeString(shape))
	}
}

// rows views rows [from, to) of a matrix of rows of cols numbers.
func (d data) rows(cols, from, to int) []float32 { return d.v[from*cols : to*cols] }

func key(iter int, name string) string { return fmt.Sprintf("iter%d.%s", iter, name) }
