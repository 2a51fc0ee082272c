package engine

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
)

func TestTensorViews(t *testing.T) {
	x := NewTensor(nil, 64, BF16, 2, 3, 10)
	if x.Elems() != 60 || x.Rows() != 6 || x.Cols() != 10 || x.Bytes() != 120 || !x.Contiguous() || x.RowStride != 10 {
		t.Errorf("%+v", x)
	}
	s := x.Slice(4, 9)
	if s.Off != 64+8 || s.Contiguous() || s.RowStride != 10 || !slices.Equal(s.Shape, []int{6, 5}) || s.Bytes() != 60 {
		t.Errorf("slice %+v", s)
	}
	r := s.RowsAt(2, 5)
	if r.Off != 72+2*10*2 || !slices.Equal(r.Shape, []int{3, 5}) || r.RowStride != 10 {
		t.Errorf("rows %+v", r)
	}
	if one := s.RowsAt(1, 2); !one.Contiguous() || one.Reshape(5) == nil {
		t.Error("one row has no gaps")
	}
	if v := x.Reshape(3, 20); v == nil || v.RowStride != 20 || v.Off != 64 {
		t.Errorf("reshape %+v", v)
	}
	for name, bad := range map[string]*Tensor{
		"reshape of a slice": s.Reshape(30), "reshape to more": x.Reshape(61), "slice backwards": x.Slice(3, 2),
		"slice too far": x.Slice(0, 11), "rows before": x.RowsAt(-1, 2), "rows behind": x.RowsAt(0, 7),
		"slice of nil": (*Tensor)(nil).Slice(0, 0), "reshape of nil": (*Tensor)(nil).Reshape(1),
	} {
		if bad != nil {
			t.Errorf("%s is %v, want nil", name, bad)
		}
	}
	if got := x.String() + " " + (*Tensor)(nil).String(); got != "bf16[2,3,10] nil" {
		t.Error(got)
	}
	if scalar := NewTensor(nil, 0, F32); scalar.Elems() != 1 || scalar.Cols() != 1 || scalar.Rows() != 1 {
		t.Error("scalar")
	}
}

func TestErrors(t *testing.T) {
	err := Errorf("gemm", DeviceFault, "reading: %w", io.ErrUnexpectedEOF)
	err.Device, err.Shapes = "cpu", "X f32[2,3]"
	wrapped := fmt.Errorf("step 3: %w", err)
	if got, want := err.Error(), "gemm (cpu) [X f32[2,3]]: device fault: reading: unexpected EOF"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if !errors.Is(wrapped, DeviceFault) || errors.Is(wrapped, Invalid) || !errors.Is(wrapped, io.ErrUnexpectedEOF) {
		t.Error("errors.Is")
	}
	var e *Error
	if !errors.As(wrapped, &e) || e.Op != "gemm" {
		t.Error("errors.As")
	}
	for k := Invalid; k <= Internal; k++ {
		if k.Error() == "" || k.Error() == "unknown" {
			t.Errorf("kind %d has no name", k)
		}
	}
	if Kind(200).Error() != "kind 200" {
		t.Error(Kind(200).Error())
	}
}
