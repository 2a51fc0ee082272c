package engine

import (
	"errors"
	"math"
	"testing"
)

// TestBF16 checks every BF16 and, between neighbours, that rounding is to
// nearest and ties go to even.
func TestBF16(t *testing.T) {
	for i := 0; i < 1<<16; i++ {
		h := uint16(i)
		f := FromBF16(h)
		if f != f {
			if back := FromBF16(ToBF16(f)); back == back {
				t.Fatalf("%#04x: NaN became %v", h, back)
			}
			continue
		}
		if ToBF16(f) != h {
			t.Fatalf("%#04x does not come back: %#04x", h, ToBF16(f))
		}
		if h&0x7fff >= 0x7f7f { // the next one is no number
			continue
		}
		u := math.Float32bits(f)
		even := h + h&1
		for _, c := range []struct {
			low  uint32
			want uint16
		}{{1, h}, {0x7fff, h}, {0x8000, even}, {0x8001, h + 1}, {0xffff, h + 1}} {
			if got := ToBF16(math.Float32frombits(u | c.low)); got != c.want {
				t.Fatalf("%#04x and %#04x rounds to %#04x, want %#04x", h, c.low, got, c.want)
			}
		}
	}
	if FromBF16(ToBF16(math.MaxFloat32)) != float32(math.Inf(1)) {
		t.Error("the largest float32 is nearer to infinity")
	}
	if v := FromBF16(ToBF16(math.Float32frombits(0x7f800001))); v == v {
		t.Errorf("a NaN with low bits only became %v", v)
	}
}

func TestParseDType(t *testing.T) {
	for s, want := range map[string]DType{"f32": F32, "fp32": F32, "float32": F32, "bf16": BF16, "bfloat16": BF16} {
		if got, err := ParseDType(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "i32", "f16", "F32"} {
		if _, err := ParseDType(s); !errors.Is(err, Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if F32.Size() != 4 || BF16.Size() != 2 || I32.Size() != 4 {
		t.Error("sizes")
	}
}
