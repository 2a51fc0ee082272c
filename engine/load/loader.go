package load

import (
	"cmp"
	"encoding/binary"
	"math"
	"slices"

	"margo/engine"
)

// target is one tensor to make on the device: a parameter, or a stack of them.
type target struct {
	*engine.Param
	parts []engine.NamedParam // in order of rows
}

// group lists what to make, in the order in which parameters first ask for it.
func group(params []engine.NamedParam) ([]*target, error) {
	var out []*target
	stacks := map[*engine.Param]*target{}
	for _, p := range params {
		if p.Stack == nil {
			out = append(out, &target{p.Param, []engine.NamedParam{p}})
			continue
		}
		t := stacks[p.Stack]
		if t == nil {
			t = &target{Param: p.Stack}
			stacks[p.Stack] = t
			out = append(out, t)
		}
		t.parts = append(t.parts, p)
	}
	for _, t := range stacks {
		slices.SortStableFunc(t.parts, func(a, b engine.NamedParam) int { return cmp.Compare(a.Row, b.Row) })
		if err := t.covered(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// covered reports a stack whose parts don't fill its rows exactly, or are not
// of its kind.
func (t *target) covered() error {
	row := 0
	for _, p := range t.parts {
		if len(p.Shape) == 0 || p.Row != row || p.Role != t.Role || p.F32 != t.F32 || p.Exact != t.Exact ||
			len(t.Shape) == 0 || !slices.Equal(p.Shape[1:], t.Shape[1:]) {
			return engine.Errorf("load", engine.Internal, "%q %s does not fit row %d of its stack %s", p.Name,
				engine.ShapeString(p.Shape), row, engine.ShapeString(t.Shape))
		}
		row += p.Shape[0]
	}
	if row != t.Shape[0] {
		return engine.Errorf("load", engine.Internal, "the parts of the stack of %q end at row %d of %d", t.parts[0].Name, row, t.Shape[0])
	}
	return nil
}

// loader carries what is used again from tensor to tensor.
type loader struct {
	dev       engine.Device
	stream    engine.Stream
	src       Source // nil: values stay undefined
	host, tmp []byte
	codes     []byte
}

// load makes the target in its dtype, and in F32 too where that is asked for.
func (l *loader) load(t *target, compute engine.DType) (err error) {
	d := t.DType(compute)
	if t.T, t.Pack, err = l.make(t, d); err != nil {
		return err
	}
	if wantsExact(t.Param, compute) {
		if t.T32, t.Pack32, err = l.make(t, engine.F32); err != nil {
			return err
		}
	}
	for _, p := range t.parts {
		if p.Stack != nil {
			p.T = partOf(t.Param, t.T, p.Param)
			if t.T32 != nil {
				p.T32 = partOf(t.Param, t.T32, p.Param)
			}
		}
		if l.src != nil {
			l.src.Release(p.Name)
		}
	}
	return nil
}

// make reads the target as d. The tensor's buffer is gone if the device has
// packed it.
func (l *loader) make(t *target, d engine.DType) (*engine.Tensor, engine.Packed, error) {
	buf, err := l.dev.Alloc(t.Elems() * d.Size())
	if err != nil {
		return nil, nil, err
	}
	tensor := engine.NewTensor(buf, 0, d, t.DeviceShape()...)
	name := t.parts[0].Name + " " + tensor.String()
	engine.Label(buf, name)
	var packed engine.Packed
	for _, p := range t.parts {
		if err = l.read(p, partOf(t.Param, tensor, p.Param)); err == nil && t.FP8 && d == engine.BF16 && l.src == nil {
			err = l.stream.Fill(tensor, 0) // what is not defined may be no number of the format
		}
		if err != nil {
			break
		}
	}
	if err == nil && t.Role != engine.Vector {
		// Pack is no operation of the stream, so what it reads must be there.
		if err = l.stream.Sync(); err == nil {
			packed, err = l.dev.Pack(engine.PackArgs{W: tensor, DType: d, FP8: t.FP8 && d == engine.BF16})
		}
	}
	if err == nil && packed == nil {
		return tensor, nil, nil
	}
	if packed != nil {
		engine.Label(packed, name)
	}
	tensor.Buf = nil
	if e := buf.Free(); err == nil {
		err = e
	}
	if err != nil {
		return nil, nil, err
	}
	return tensor, packed, nil
}

// partOf views the rows of t, the value of whole, that part p is.
func partOf(whole *engine.Param, t *engine.Tensor, p *engine.Param) *engine.Tensor {
	row := 0
	if whole != p {
		row = p.Row * (whole.Elems() / max(whole.Shape[0], 1))
	}
	return engine.NewTensor(t.Buf, t.Off+row*t.DType.Size(), t.DType, p.DeviceShape()...)
}

// read copies the checkpoint tensor p to dst in dst's dtype.
func (l *loader) read(p engine.NamedParam, dst *engine.Tensor) error {
	if l.src == nil || dst.Elems() == 0 {
		return nil
	}
	l.host = slices.Grow(l.host[:0], dst.Bytes())[:dst.Bytes()]
	b := l.host
	if p.FP8 && dst.DType == engine.BF16 {
		if err := l.readFP8(p, dst); err != nil {
			return err
		}
	} else if err := l.src.ReadAs(p.Name, dst.DType, l.host); err != nil {
		return err
	}
	if p.Role == engine.Conv {
		if len(p.Shape) != 4 {
			return engine.Errorf("load", engine.Internal, "convolution weight %q has shape %s", p.Name, engine.ShapeString(p.Shape))
		}
		l.tmp = slices.Grow(l.tmp[:0], len(b))[:len(b)]
		channelsLast(l.tmp, b, p.Shape, dst.DType.Size())
		b = l.tmp
	}
	if p.Order != nil {
		if len(p.Shape) == 0 || len(p.Order) != p.Shape[0] {
			return engine.Errorf("load", engine.Internal, "the order of %q has %d rows, its shape is %s", p.Name, len(p.Order), engine.ShapeString(p.Shape))
		}
		size := len(b) / len(p.Order)
		ordered := make([]byte, len(b))
		for to, from := range p.Order {
			copy(ordered[to*size:(to+1)*size], b[from*size:])
		}
		b = ordered
	}
	return l.stream.CopyIn(dst, b)
}

// readFP8 reads p, rounded to e4m3 row by row, into l.host as BF16. It rounds what the file has, not what BF16 left of it.
func (l *loader) readFP8(p engine.NamedParam, dst *engine.Tensor) error {
	k := dst.Cols()
	l.tmp = slices.Grow(l.tmp[:0], 4*dst.Elems())[:4*dst.Elems()]
	l.codes = slices.Grow(l.codes[:0], k)[:k]
	if err := l.src.ReadAs(p.Name, engine.F32, l.tmp); err != nil {
		return err
	}
	row := make([]float32, k)
	for r := range dst.Rows() {
		for i := range row {
			row[i] = math.Float32frombits(binary.LittleEndian.Uint32(l.tmp[4*(r*k+i):]))
		}
		engine.RoundE4M3(row, l.codes)
		for i, v := range row {
			put(l.host, r*k+i, engine.BF16, v)
		}
	}
	return nil
}

// channelsLast reorders [Cout,Cin,kh,kw] to [Cout,kh,kw,Cin], elements of size
// bytes.
func channelsLast(dst, src []byte, shape []int, size int) {
	cin, taps := shape[1], shape[2]*shape[3]
	for o := 0; o < shape[0]; o++ {
		s, d := src[o*cin*taps*size:], dst[o*cin*taps*size:]
		for c := 0; c < cin; c++ {
			for k := 0; k < taps; k++ {
				copy(d[(k*cin+c)*size:][:size], s[(c*taps+k)*size:])
			}
		}
	}
}
