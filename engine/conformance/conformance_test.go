package conformance

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

// TestRefRounded shows that a faultless device has nothing to fear.
func TestRefRounded(t *testing.T) { Run(t, ref.New(ref.Rounded), Options{Quick: true}) }

// TestRefExact runs the F32 cases on the float64 oracle, which is nearer to the
// truth than any device. Its BF16 is not BF16, so those must be skipped.
func TestRefExact(t *testing.T) {
	rep := Check(onlyF32{ref.New(ref.Exact)}, Options{Match: regexp.MustCompile("/(f32|bf16)/"), Quick: true})
	if f := rep.With(Fail); len(f) > 0 {
		t.Errorf("%d failures, first: %v", len(f), f[0])
	}
	if n := len(rep.With(Skip)); n < 100 || !strings.Contains(rep.String(), fmt.Sprintf("%d skipped", n)) {
		t.Errorf("%d skips, want the BF16 cases, and to be told: %v", n, rep)
	}
	if !strings.Contains(Support(onlyF32{ref.New(ref.Exact)}), "| gemm | yes | no |") {
		t.Error("support table")
	}
}

type onlyF32 struct{ *ref.Device }

func (d onlyF32) Supports(_ engine.Op, t engine.DType) bool { return t == engine.F32 }

// TestSame finds the oracle to agree with itself, and a mutant not to.
func TestSame(t *testing.T) {
	opt := Options{Match: regexp.MustCompile("^(gemm|rows)/f32/21x70")}
	a := ref.New(ref.Rounded)
	if rep := Same(a, ref.New(ref.Rounded), opt); len(rep.With(Fail)) > 0 || len(rep.Results) < 30 {
		t.Errorf("%d cases: %v", len(rep.Results), rep)
	}
	m := mutant{gemm: func(s engine.Stream, a engine.GemmArgs) error { a.Bias = nil; return s.Gemm(a) }}
	if rep := Same(a, faulty{a, &m}, opt); len(rep.With(Fail)) < 20 {
		t.Errorf("a mutant is the same: %v", rep)
	}
}

func TestTable(t *testing.T) {
	seen, ops := map[string]bool{}, map[engine.Op]int{}
	for _, c := range Cases() {
		if seen[c.Name] {
			t.Errorf("two cases are called %q", c.Name)
		}
		seen[c.Name] = true
		if !strings.HasPrefix(c.Name, string(c.Op)+"/"+c.DType.String()+"/") {
			t.Errorf("%q is a case of %s in %v", c.Name, c.Op, c.DType)
		}
		ops[c.Op]++
	}
	for _, op := range engine.Ops {
		if ops[op] == 0 {
			t.Errorf("no case of %s", op)
		}
	}
	t.Logf("%d cases: %v", len(seen), ops)
}

func TestBench(t *testing.T) {
	ts, err := Bench(ref.New(ref.Rounded), regexp.MustCompile("^norm/f32/320x768 "), 0)
	if err != nil || len(ts) != 1 || ts[0].Runs < 3 || ts[0].Cost.Bytes == 0 || !(ts[0].Bandwidth() > 0) {
		t.Errorf("%+v, %v", ts, err)
	}
	if s := Table(ts); !strings.Contains(s, "320x768") || !strings.Contains(s, "GB/s") {
		t.Error(s)
	}
}
