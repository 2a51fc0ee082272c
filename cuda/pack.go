package cuda

// #include "calls.h"
import "C"

import (
	"encoding/binary"
	"fmt"
	"math"

	"margo/engine"
)

// packed is a weight with rows that begin at multiples of 16 bytes, so that
// kernels can load it in vectors; what is added to a row is 0. A weight in FP8
// that the latency path of the head can use has its codes and scales
// (margo_fp8) behind them.
type packed struct {
	*buffer
	dtype         engine.DType
	n, k, ld      int
	codes, scales C.uint64_t // offsets; 0: none
}

// Pack copies W into aligned rows of the dtype asked for.
func (d *Device) Pack(a engine.PackArgs) (engine.Packed, error) {
	if err := d.named(a.Check()); err != nil {
		return nil, err
	}
	n, k, layout := a.W.Rows(), a.W.Cols(), d.packing(a)
	p := &packed{dtype: a.DType, n: n, k: k, ld: layout.ld, codes: C.uint64_t(layout.codes), scales: C.uint64_t(layout.scales)}
	what := fmt.Sprintf("pack %v[%d,%d]", a.DType, n, k)
	if p.codes != 0 {
		what += " and fp8"
	}
	var err error
	if p.buffer, err = d.alloc("pack", layout.bytes, what); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	// W may still be on its way on any stream.
	err = d.status("pack", C.m_synchronize(d.p.api, d.ctx))
	if err == nil {
		err = d.ranks.allWaited("pack")
	}
	s := &Stream{dev: d, s: d.util}
	whole := engine.NewTensor(p.buffer, 0, a.DType, n, p.ld)
	if err == nil && n > 0 {
		err = s.Fill(whole, 0)
	}
	if err == nil && n > 0 && k > 0 {
		err = s.Cast(engine.CastArgs{X: a.W, Y: whole.Slice(0, k), Scale: 1})
	}
	if err == nil && p.codes != 0 {
		err = d.packFP8(s, p, whole)
	}
	if err == nil {
		err = s.Sync()
	}
	if err != nil {
		p.Free()
		return nil, err
	}
	return p, nil
}

// packFP8 puts codes and scales behind the BF16 rows, from which the host makes them: once, when a model is loaded.
func (d *Device) packFP8(s *Stream, p *packed, rows *engine.Tensor) error {
	b := make([]byte, rows.Bytes())
	if err := s.CopyOut(b, rows); err != nil {
		return err
	}
	codes, scales := make([]byte, p.n*p.k), make([]float32, p.n)
	row := make([]float32, p.k)
	for r := range p.n {
		for i := range row {
			row[i] = engine.FromBF16(binary.LittleEndian.Uint16(b[2*(r*p.ld+i):]))
		}
		of := codes[r*p.k : (r+1)*p.k]
		scales[r] = engine.QuantiseE4M3(of, row)
		for i, v := range row {
			if q := engine.FromE4M3(of[i]) * scales[r]; q != v && q == q {
				return d.errorf("pack", engine.Invalid, "W(%d,%d) is %g, no e4m3 number times %g as FP8 says", r, i, v, scales[r])
			}
		}
	}
	return s.putFP8(p, fragments(codes, p.n, p.k), scales)
}

// putFP8 writes codes, as fragments, and scales.
func (s *Stream) putFP8(p *packed, codes []byte, scales []float32) error {
	out := append(make([]byte, 0, len(codes)+4*len(scales)), codes...)
	for _, v := range scales {
		out = binary.LittleEndian.AppendUint32(out, math.Float32bits(v))
	}
	return s.CopyIn(engine.NewTensor(p.buffer, int(p.codes), engine.I32, len(out)/4), out)
}

// fragments lays the codes of a weight [n,k] out as margo_fp8 says.
func fragments(codes []byte, n, k int) []byte {
	out := make([]byte, 0, n*k)
	for tile := 0; tile < n; tile += 8 {
		for step := 0; step < k; step += 16 {
			for lane := range 32 {
				q := codes[(tile+lane/4)*k+step+lane%4*2:]
				out = append(out, q[0], q[1], q[8], q[9])
			}
		}
	}
	return out
}
