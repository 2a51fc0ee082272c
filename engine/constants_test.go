//go:build cgo

package engine_test

import (
	"slices"
	"testing"

	"margo/cpu"
	"margo/engine"
)

// What a dry run records is copied in one piece and taken from there in the same order,
// equal lists once; from the first difference on lists are copied as they come.
func TestConstants(t *testing.T) {
	dev, err := cpu.New(cpu.Options{Threads: 1, Poison: true}) // its memory is bytes, as a GPU's
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	dry := newCtx(t)
	c, err := engine.NewCtx(dev, engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	k := engine.NewConstants()
	dry.Constants = k
	run := func(c *engine.Ctx, last []int32) []*engine.Tensor {
		return []*engine.Tensor{c.I32([]int32{1, 2, 3}), c.F32([]float32{4, 5, 6, 7}, 2, 2), c.I32(nil), c.I32([]int32{1, 2, 3}, 3, 1), c.I32(last), c.F32([]float32{8}, 1)}
	}
	run(dry, []int32{9})
	if k.Bytes() != 4*256 {
		t.Errorf("%d bytes of four different lists", k.Bytes())
	}
	check := func(got []*engine.Tensor, last float32) {
		t.Helper()
		for i, want := range [][]float32{nil, {4, 5, 6, 7}, {}, nil, nil, {8}} {
			if want != nil && !slices.Equal(c.Download(got[i]), want) {
				t.Errorf("list %d is %v", i, c.Download(got[i]))
			}
		}
		if !slices.Equal(got[1].Shape, []int{2, 2}) || !slices.Equal(got[3].Shape, []int{3, 1}) || got[0].DType != engine.I32 || got[1].DType != engine.F32 {
			t.Errorf("%v %v %v", got[0], got[1], got[3])
		}
	}
	c.Constants = k
	k.Load(c)
	at := c.Arena.Mark()
	got := run(c, []int32{9})
	check(got, 9)
	if got[0].Buf != got[3].Buf || got[0].Off != got[3].Off || got[0].Off%256 != 0 || got[1].Off == got[0].Off {
		t.Errorf("at %d, %d, %d", got[0].Off, got[1].Off, got[3].Off)
	}
	if c.Arena.Mark() != at {
		t.Error("lists that were recorded take memory")
	}
	k.Load(c)
	at = c.Arena.Mark()
	got = run(c, []int32{10}) // not what was recorded
	check(got, 10)
	if c.Arena.Mark() == at || got[5].Off == got[1].Off {
		t.Error("a list that was not recorded takes no memory")
	}
	c.F32([]float32{1}, 1) // beyond the end
	if c.Err() != nil {
		t.Error(c.Err())
	}
	if x := c.F32([]float32{1, 2}, 3); x != nil && c.Err() == nil {
		t.Error("two values for three elements")
	}
	c.ClearErr()
}
