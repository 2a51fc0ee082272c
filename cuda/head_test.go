package cuda

import (
	"errors"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/conformance"
)

// TestHeadLatency runs the table's head steps by the persistent kernel: BF16 cases that it serves whole and in parts (at
// most 16 rows, widths that are multiples of 16 and fit the device).
func TestHeadLatency(t *testing.T) {
	d := testDevice(t)
	d.SetHeadPath(2)
	conformance.Run(t, d, conformance.Options{Quick: testing.Short(), Match: regexp.MustCompile(`^head_steps/bf16/n=[1-5] c=\d+ w=(32|48|64|128|1024) `)})
}

// fp8Cases are those of the table with weights in FP8 that the persistent kernel serves.
var fp8Cases = conformance.Options{Quick: true, Match: regexp.MustCompile(`^head_steps/bf16/n=[1-5] .* fp8`)}

// kernelRan says whether a kernel of that name was launched.
func kernelRan(d *Device, name string) bool {
	return slices.ContainsFunc(d.Kernels(), func(k Kernel) bool { return k.Name == name && k.Launches > 0 })
}

// repacked is a device that changes how weights are packed.
type repacked struct {
	*Device
	pack func(engine.PackArgs) (engine.Packed, error)
}

func (r repacked) Pack(a engine.PackArgs) (engine.Packed, error) { return r.pack(a) }

// TestHeadFP8: codes give the bits that bf16 weights of the same numbers give, with 8 columns a block and with 16, and under
// shuffled schedules.
func TestHeadFP8(t *testing.T) {
	for _, env := range [][2]string{{"MARGO_EMU_SMS", "132"}, {"MARGO_EMU_SMS", "4"}, {"MARGO_EMU_SEED", "1"}} {
		t.Run(strings.Join(env[:], "="), func(t *testing.T) {
			t.Setenv(env[0], env[1])
			d := testDevice(t)
			d.SetHeadPath(2)
			if kernelRan(d, "head_latency_fp8") {
				t.Fatal("the kernel has run before the test")
			}
			plain := repacked{d, func(a engine.PackArgs) (engine.Packed, error) { a.FP8 = false; return d.Pack(a) }}
			r := conformance.Same(d, plain, fp8Cases)
			if n := len(r.Results); n < 4 {
				t.Errorf("%d cases", n)
			}
			for _, x := range r.Results {
				if x.Status != conformance.Pass {
					t.Error(x)
				}
			}
			if !kernelRan(d, "head_latency_fp8") || !kernelRan(d, "head_latency") {
				t.Error("the persistent kernel did not run with both kinds of weights")
			}
		})
	}
}

// TestHeadFP8Mutants: what can be wrong with codes and scales is seen by the table.
func TestHeadFP8Mutants(t *testing.T) {
	d := testDevice(t)
	d.SetHeadPath(2)
	one := conformance.Options{Quick: true, Match: regexp.MustCompile(`^head_steps/bf16/n=5 .* t=3 fp8$`)}
	ulp := func(c byte) byte { return c ^ 1 }
	for name, change := range map[string]func(p *packed, codes []byte, scales []float32){
		"scales of the next rows":             func(_ *packed, _ []byte, s []float32) { copy(s, append(slices.Clone(s[1:]), s[0])) },
		"no scales":                           func(_ *packed, _ []byte, s []float32) { fillWith(s, 1) },
		"the last scale twice as large":       func(_ *packed, _ []byte, s []float32) { s[len(s)-1] *= 2 },
		"bytes of a word backwards":           func(_ *packed, c []byte, _ []float32) { eachWord(c, slices.Reverse[[]byte]) },
		"columns 1 and 8 of a word exchanged": func(_ *packed, c []byte, _ []float32) { eachWord(c, func(w []byte) { w[1], w[2] = w[2], w[1] }) },
		"rows in place of fragments":          func(p *packed, c []byte, _ []float32) { copy(c, unfragmented(c, p.n, p.k)) },
		"signs lost":                          func(_ *packed, c []byte, _ []float32) { each(c, func(v byte) byte { return v & 0x7f }) },
		"codes rounded towards another place": func(_ *packed, c []byte, _ []float32) { each(c, ulp) },
		"subnormals are zero": func(_ *packed, c []byte, _ []float32) {
			each(c, func(v byte) byte {
				if v&0x78 == 0 {
					return 0
				}
				return v
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			seen, subnormal := "", name == "subnormals are zero"
			bad := repacked{d, func(a engine.PackArgs) (engine.Packed, error) {
				p, err := d.Pack(a)
				if q, ok := p.(*packed); ok && q.codes != 0 {
					codes, scales := d.readFP8(t, q)
					change(q, codes, scales)
					d.mu.Lock()
					defer d.mu.Unlock()
					s := &Stream{dev: d, s: d.util}
					if err := errors.Join(s.putFP8(q, codes, scales), s.Sync()); err != nil {
						return nil, err
					}
				}
				return p, err
			}}
			if subnormal { // less than the oracle's limit: bit for bit
				for _, x := range conformance.Same(d, bad, fp8Cases).Results {
					if x.Status == conformance.Fail {
						seen = x.Detail
					}
				}
			} else {
				for _, x := range conformance.Check(bad, one).Results {
					if x.Status == conformance.Fail && x.Mode == conformance.Oracle {
						seen = x.Detail
					}
				}
			}
			if t.Log(seen); seen == "" {
				t.Error("the table does not see it")
			}
		})
	}
}

func fillWith(s []float32, v float32) {
	for i := range s {
		s[i] = v
	}
}

func each(c []byte, f func(byte) byte) {
	for i, v := range c {
		c[i] = f(v)
	}
}

func eachWord(c []byte, f func([]byte)) {
	for i := 0; i < len(c); i += 4 {
		f(c[i : i+4])
	}
}

// unfragmented is what fragments was made from.
func unfragmented(f []byte, n, k int) []byte {
	at := make([]byte, n*k)
	place := fragmentOrder(n, k)
	for i, p := range place {
		at[p] = f[i]
	}
	return at
}

// fragmentOrder is the element that lies at each place of the fragments of [n,k], by the definition of m16n8k16.
func fragmentOrder(n, k int) []int {
	out := make([]int, n*k)
	for row := range n {
		for col := range k {
			c := col % 16
			lane := row%8*4 + c%8/2
			word := (row/8*(k/16)+col/16)*32 + lane
			out[4*word+c/8*2+c%2] = row*k + col
		}
	}
	return out
}

// readFP8 reads codes and scales back.
func (d *Device) readFP8(t *testing.T, p *packed) ([]byte, []float32) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &Stream{dev: d, s: d.util}
	b := make([]byte, p.n*p.k+4*p.n)
	if err := s.CopyOut(b, engine.NewTensor(p.buffer, int(p.codes), engine.I32, len(b)/4)); err != nil {
		t.Fatal(err)
	}
	scales := make([]float32, p.n)
	for i := range scales {
		at := b[p.n*p.k+4*i:]
		scales[i] = math.Float32frombits(uint32(at[0]) | uint32(at[1])<<8 | uint32(at[2])<<16 | uint32(at[3])<<24)
	}
	return b[:p.n*p.k], scales
}

// TestPackFP8: codes and scales are those of the weight; a weight that is not in FP8 is refused; without the latency path, or with a shape
// that it does not serve, none are kept.
func TestPackFP8(t *testing.T) {
	d := testDevice(t)
	const n, k = 24, 48
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	pack := func(n, k int, fp8 bool, at func(row, col int) float32) (*packed, error) {
		t.Helper()
		b, err := d.Alloc(2 * n * k)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Free()
		w, host := engine.NewTensor(b, 0, engine.BF16, n, k), make([]byte, 0, 2*n*k)
		for i := range n * k {
			v := engine.ToBF16(at(i/k, i%k))
			host = append(host, byte(v), byte(v>>8))
		}
		if err := s.CopyIn(w, host); err != nil {
			t.Fatal(err)
		}
		p, err := d.Pack(engine.PackArgs{W: w, DType: engine.BF16, FP8: fp8})
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { p.Free() })
		return p.(*packed), nil
	}
	nan := float32(math.NaN())
	number := func(row, col int) float32 {
		if row == 5 {
			return nan
		}
		return engine.FromE4M3(byte((row*k+col)%0x7f)) * float32(math.Ldexp(1, row-12))
	}
	if p, err := pack(n, k, true, number); err != nil || p.codes != 0 || d.Info().KeepsFP8 {
		t.Errorf("codes are kept without the latency path (%v)", err)
	}
	d.SetHeadPath(2)
	p, err := pack(n, k, true, number)
	if err != nil {
		t.Fatal(err)
	}
	if want := 2*n*k + n*k + 4*n; p.codes == 0 || p.Bytes() != want || !d.Info().KeepsFP8 {
		t.Fatalf("%d bytes, want %d", p.Bytes(), want)
	}
	codes, scales := d.readFP8(t, p)
	for i, e := range fragmentOrder(n, k) {
		row, col := e/k, e%k
		if got, want := engine.FromE4M3(codes[i])*scales[row], number(row, col); got != want && (got == got || want == want) {
			t.Fatalf("W(%d,%d) is %g, want %g", row, col, got, want)
		}
	}
	if !slices.Equal(fragments(unfragmented(codes, n, k), n, k), codes) {
		t.Error("fragments is not what the definition says")
	}
	for _, shape := range [][2]int{{20, 48}, {24, 40}} {
		if p, err := pack(shape[0], shape[1], true, func(int, int) float32 { return 1 }); err != nil || p.codes != 0 {
			t.Errorf("%v: codes are kept of a shape that the kernel does not serve (%v)", shape, err)
		}
	}
	if p, err := pack(n, k, false, number); err != nil || p.codes != 0 {
		t.Errorf("codes are kept of a weight in bf16 (%v)", err)
	}
	_, err = pack(n, k, true, func(row, col int) float32 { return 1 + float32(col)/128 })
	if !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "W(0,1) is 1.0078125") {
		t.Errorf("a weight that is not in FP8: %v", err)
	}
}
