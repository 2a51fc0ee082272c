package conformance

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

func TestRefRounded(t *testing.T) { Run(t, ref.New(ref.Rounded)) }

// TestRefExact runs the F32 cases on the float64 oracle, which is nearer to the
// truth than any device. Its BF16 is not BF16, so those must be skipped.
func TestRefExact(t *testing.T) {
	rep := Check(onlyF32{ref.New(ref.Exact)}, Options{})
	if f := rep.With(Fail); len(f) > 0 {
		t.Errorf("%d failures, first: %v", len(f), f[0])
	}
	if len(rep.With(Skip)) < 100 {
		t.Errorf("%d skips, want the BF16 cases among them", len(rep.With(Skip)))
	}
}

type onlyF32 struct{ *ref.Device }

func (d onlyF32) Supports(_ engine.Op, t engine.DType) bool { return t == engine.F32 }

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
	os.Stdout.WriteString(Table(ts))
}
