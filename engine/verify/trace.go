package verify

import (
	"fmt"
	"strconv"

	"margo/engine"
	"margo/engine/checkpoint"
)

// Kind of a trace, told by its keys.
type Kind string

const (
	EncDec    Kind = "MAR encoder and decoder"
	HeadNet   Kind = "diffusion head"
	Sampling  Kind = "MAR sampling loop"
	Tokenizer Kind = "tokenizer"
)

// trace gives the tensors of a recorded run.
type trace struct {
	*checkpoint.File
	kind Kind
}

func openTrace(path string) (*trace, error) {
	f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
	if err != nil {
		return nil, err
	}
	t := &trace{File: f}
	has := func(name string) bool { _, ok := f.Tensor(name); return ok }
	switch {
	case has("step0.loss"), has("per_sample_loss"):
		err = t.unknown("a training trace; this margo does not train")
	case has("orders") && has("iter0.tokens_in"):
		t.kind = Sampling
	case has("ps_index"):
		t.kind = HeadNet
	case has("moments"), has("decoded"), has("decoded_z"):
		t.kind = Tokenizer
	case has("enc_out") && has("dec_out_z"):
		t.kind = EncDec
	case has("t_embed"), has("step_samples") && has("z") && has("y"):
		err = t.unknown("a DiT trace; this margo has no DiT")
	default:
		err = t.unknown("no known kind of trace: its tensors are not those of encoder and decoder, head, sampling loop or tokenizer")
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

// need fails if one of the tensors is missing.
func (t *trace) need(names ...string) error {
	for _, n := range names {
		if !t.has(n) {
			return t.unknown("tensor %s is missing from this trace of kind %s", n, t.kind)
		}
	}
	return nil
}

// data is a recorded tensor.
type data struct {
	shape []int
	v     []float32
}

// get reads a tensor of rank dims (-1: any); the first error sticks in *err.
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
		*err = t.ReadF32(name, d.v)
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

// number reads a value of the metadata, def if it is absent.
func (t *trace) number(err *error, key string, def float64) float64 {
	s, ok := t.Metadata()[key]
	if !ok || *err != nil {
		return def
	}
	v, e := strconv.ParseFloat(s, 64)
	if e != nil {
		*err = t.unknown("metadata %s: %q is not a number", key, s)
	}
	return v
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
