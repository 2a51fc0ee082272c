// Package load puts the parameters of a model on a device: from a checkpoint,
// at random for benchmarks, or without values for plans. It is the only place
// where a weight's dtype, layout and packing are decided:
//
//	Vector  F32, as in the checkpoint
//	Weight  [out, rest] in the compute dtype (F32 if Param.F32), packed
//	Conv    [Cout,Cin,kh,kw] turned into [Cout, kh·kw·Cin], then as Weight
//
// A parameter with Exact gets a second, F32 copy when the compute dtype is
// BF16, one with FP8 has its BF16 copy rounded to e4m3; parts of a stack are put together and packed as one.
//
// Tensors go one by one, a stack counting as one: read and converted into a
// host buffer that is used again, copied to the device, packed; then the
// device's unpacked copy is freed and the file's pages are given back. Beside
// the model itself, loading holds one tensor three times at most.
package load

import (
	"margo/engine"
	"margo/engine/checkpoint"
)

// Source gives the values of checkpoint tensors. *checkpoint.File is one.
type Source interface {
	// ReadAs fills dst with the named tensor, row-major in dtype d.
	ReadAs(name string, d engine.DType, dst []byte) error
	// Release gives back memory that reading the tensor took.
	Release(name string)
}

// Options of Bind.
type Options struct {
	// Ignore is asked about tensors of the file that the model has no parameter
	// for; false, or no function, makes such a tensor an error.
	Ignore func(name string) bool
	// Progress, if not nil, is called after each parameter with the elements
	// loaded so far and in all; an error of it ends the loading.
	Progress func(done, total int64) error
}

// Bind fills the parameters from f. Names and shapes are compared first: a
// tensor that is missing, unexpected or misshapen is an error that names it
// (Kind IO), and nothing is loaded. After any error no parameter holds memory; one
// that held some before is an error itself (Kind Invalid), and keeps it.
func Bind(params []engine.NamedParam, f *checkpoint.File, dev engine.Device, compute engine.DType, o Options) error {
	if _, err := checkpoint.Check(f, Specs(params), o.Ignore); err != nil {
		return err
	}
	return Fill(params, f, dev, compute, o.Progress)
}

// Fill fills the parameters from any source that has them all; nil leaves their
// values undefined. After an error no parameter holds memory.
func Fill(params []engine.NamedParam, src Source, dev engine.Device, compute engine.DType, progress func(done, total int64) error) (err error) {
	for _, p := range params {
		if p.T != nil {
			return engine.Errorf("load", engine.Invalid, "%q is loaded already", p.Name)
		}
		if p.FP8 && (p.Role != engine.Weight || p.DType(compute) != engine.BF16 || p.Stack != nil) {
			return engine.Errorf("load", engine.Invalid, "%q cannot be rounded to fp8: that is for weights held in bf16, this one is %v", p.Name, p.DType(compute))
		}
	}
	targets, err := group(params)
	if err != nil {
		return err
	}
	s, err := dev.NewStream()
	if err != nil {
		return err
	}
	l := &loader{dev: dev, stream: s, src: src}
	defer func() {
		if e := s.Close(); err == nil {
			err = e
		}
		if err != nil {
			Free(params)
		}
	}()
	done, total := int64(0), Elems(params)
	for _, t := range targets {
		if err := l.load(t, compute); err != nil {
			return err
		}
		if done += int64(t.Elems()); progress != nil {
			if err := progress(done, total); err != nil {
				return err
			}
		}
	}
	return nil
}

// Allocate gives the parameters memory with undefined contents: what a model
// needs to run on a plan.
func Allocate(params []engine.NamedParam, dev engine.Device, compute engine.DType) error {
	return Fill(params, nil, dev, compute, nil)
}

// Free releases the device memory of all parameters.
func Free(params []engine.NamedParam) error {
	var first error
	for _, p := range params {
		if err := p.Free(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Elems is the number of trained values.
func Elems(params []engine.NamedParam) int64 {
	n := int64(0)
	for _, p := range params {
		n += int64(p.Elems())
	}
	return n
}

// Bytes is the device memory of the loaded parameters, without the padding
// that a device's packed layout may add.
func Bytes(params []engine.NamedParam, compute engine.DType) int64 {
	n := int64(0)
	for _, p := range params {
		e := int64(p.Elems())
		n += e * int64(p.DType(compute).Size())
		if wantsExact(p.Param, compute) {
			n += e * 4
		}
	}
	return n
}

// Specs lists names and shapes as package checkpoint compares them.
func Specs(params []engine.NamedParam) []checkpoint.ParamSpec {
	out := make([]checkpoint.ParamSpec, len(params))
	for i, p := range params {
		out[i] = checkpoint.ParamSpec{Name: p.Name, Shape: p.Shape}
	}
	return out
}

// wantsExact: an F32 copy is made beside a BF16 weight only.
func wantsExact(p *engine.Param, compute engine.DType) bool {
	return p.Exact && p.DType(compute) == engine.BF16
}
