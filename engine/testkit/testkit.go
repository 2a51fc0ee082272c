// Package testkit holds what tests of several packages share. Nothing else may
// import it.
package testkit

import (
	"encoding/binary"
	"math"
	"net"
	"os"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/load"
	"margo/engine/mar"
)

// FreeAddr is a TCP address of this machine that nobody listened on a moment ago.
func FreeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// OpenMAR opens the file of a MAR, until the test ends, and describes the model, without values.
func OpenMAR(t testing.TB, path string) (*checkpoint.File, *mar.Model) {
	t.Helper()
	f, err := checkpoint.Open(path, checkpoint.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	cfg, err := checkpoint.InferMAR(f, checkpoint.MAROptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := mar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f, m
}

// LoadMAR puts the MAR of a file on a device until the test ends.
func LoadMAR(t testing.TB, path string, dev engine.Device, compute engine.DType) *mar.Model {
	t.Helper()
	f, m := OpenMAR(t, path)
	if err := load.Bind(engine.Params(m), f, dev, compute, load.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { load.Free(engine.Params(m)) })
	return m
}

// Section compares want with the lines of a file between "<!-- name: made by `make
// budget` -->" and "<!-- end of name -->"; MARGO_UPDATE_BUDGET=1 writes it there.
func Section(t testing.TB, path, name, want string) {
	t.Helper()
	begin, end := "<!-- "+name+": made by `make budget` -->\n", "<!-- end of "+name+" -->\n"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	got, after, ok2 := strings.Cut(rest, end)
	switch {
	case !ok || !ok2:
		t.Fatalf("%s has no place for the %s", path, name)
	case got == want:
	case os.Getenv("MARGO_UPDATE_BUDGET") == "":
		t.Fatalf("%s is out of date: `make budget` writes it. Now:\n%s", path, want)
	default:
		if err := os.WriteFile(path, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// number is one whose sums over ranks depend on their order.
func number(rank, i int) float32 {
	return float32(math.Ldexp(float64(1+(i*7+rank*13)%17), (i*5+rank*11)%40-20)) * float32(1-2*((i+rank)%2))
}

// whole is one whose sums over ranks wrap.
func whole(rank, i int) uint32 { return uint32(i+1) * uint32(1_000_003+rank*0x3fffffff) }

// Numbers are n elements of a rank, for collectives: F32, BF16 or I32.
func Numbers(d engine.DType, rank, n int) []byte {
	var b []byte
	for i := range n {
		switch d {
		case engine.F32:
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(number(rank, i)))
		case engine.BF16:
			b = binary.LittleEndian.AppendUint16(b, engine.ToBF16(number(rank, i)))
		default:
			b = binary.LittleEndian.AppendUint32(b, whole(rank, i))
		}
	}
	return b
}

// Sum is that of the Numbers of size ranks, ((t_0 + t_1) + t_2) + … as engine.Comm says:
// BF16 in F32, rounded once.
func Sum(d engine.DType, size, n int) []byte {
	var b []byte
	for i := range n {
		var f float32
		var u uint32
		for r := range size {
			v := number(r, i)
			if d == engine.BF16 {
				v = engine.FromBF16(engine.ToBF16(v))
			}
			f, u = f+v, u+whole(r, i)
		}
		switch d {
		case engine.F32:
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(f))
		case engine.BF16:
			b = binary.LittleEndian.AppendUint16(b, engine.ToBF16(f))
		default:
			b = binary.LittleEndian.AppendUint32(b, u)
		}
	}
	return b
}
