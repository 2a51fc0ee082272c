package cuda

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/conformance"
)

// TestHopperTable: attention's cases pass on an emulated sm_90, whose own kernels must serve them: with one multiprocessor launches
// take blocks of 192 queries where there are, with many blocks of 64.
func TestHopperTable(t *testing.T) {
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("emulated devices")
	}
	t.Setenv("MARGO_EMU_CC", "90")
	for _, c := range []struct{ sms, seed, match string }{
		{"132", "0", `^attention/bf16/.*x(64|72|80|128)\b`},
		{"1", "7", `^attention/bf16/1x64 q=\[200 20\]`},
	} {
		t.Run(c.sms+" multiprocessors", func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "trace")
			t.Setenv("MARGO_EMU_SMS", c.sms)
			t.Setenv("MARGO_EMU_SEED", c.seed)
			t.Setenv("MARGO_EMU_TRACE", path)
			conformance.Run(t, testDevice(t), conformance.Options{Quick: true, Match: regexp.MustCompile(c.match)})
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			want := []string{"attention_sm90a_64x64", "attention_sm90a_64x80", "attention_sm90a_64x128"}
			if c.sms == "1" {
				want = []string{"attention_sm90a_192x64"}
			}
			for _, name := range want {
				if !strings.Contains(string(text), "kernel "+name+" ") {
					t.Errorf("no launch of %s", name)
				}
			}
		})
	}
}

// attentionBits runs attention of ragged sequences on an emulated device and returns O and the kernels that ran. Scores are large, so that rows'
// bases move; a value of the last sequence is NaN, and the rows before it must not see that.
func attentionBits(t *testing.T, dh int, causal, captured bool, env ...string) (o []byte, trace string) {
	t.Run(strings.Join(env, " "), func(t *testing.T) { o, trace = runAttention(t, dh, causal, captured, env) })
	return o, trace
}

func runAttention(t *testing.T, dh int, causal, captured bool, env []string) ([]byte, string) {
	path := filepath.Join(t.TempDir(), "trace")
	for _, e := range append([]string{"MARGO_EMU_TRACE=" + path}, env...) {
		name, value, _ := strings.Cut(e, "=")
		t.Setenv(name, value)
	}
	d := testDevice(t)
	s, err := d.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tensor := func(dt engine.DType, b []byte, shape ...int) *engine.Tensor {
		return upload(t, d, s, dt, b, shape...)
	}
	const heads = 2
	qoff, koff := []int32{1, 14, 14, 147, 148}, []int32{2, 90, 95, 265, 268}
	r := rand.New(rand.NewPCG(uint64(dh), 1))
	matrix := func(rows int, sigma float64) []byte {
		var b []byte
		for range rows * heads * dh {
			b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(float32(r.NormFloat64()*sigma))>>16))
		}
		return b
	}
	offsets := func(off []int32) *engine.Tensor {
		var b []byte
		for _, v := range off {
			b = binary.LittleEndian.AppendUint32(b, uint32(v))
		}
		return tensor(engine.I32, b, len(off))
	}
	const rowsQ, rowsK = 149, 270
	v := matrix(rowsK, 1)
	binary.LittleEndian.PutUint16(v[2*265*heads*dh:], 0x7fc0)
	a := engine.AttentionArgs{Q: tensor(engine.BF16, matrix(rowsQ, 4), rowsQ, heads*dh), K: tensor(engine.BF16, matrix(rowsK, 4), rowsK, heads*dh),
		V: tensor(engine.BF16, v, rowsK, heads*dh), O: tensor(engine.BF16, make([]byte, 2*rowsQ*heads*dh), rowsQ, heads*dh), Heads: heads,
		Causal: causal, Scale: float32(1 / math.Sqrt(float64(dh))), QOff: offsets(qoff), KOff: offsets(koff), QOffHost: qoff, KOffHost: koff}
	if captured {
		g, err := s.Capture(func() error { return s.Attention(a) })
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		err = s.Launch(g)
		if err != nil {
			t.Fatal(err)
		}
	} else if err := s.Attention(a); err != nil {
		t.Fatal(err)
	}
	o := make([]byte, 2*rowsQ*heads*dh)
	if err := s.CopyOut(o, a.O); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return o, string(text)
}

// TestHopperBits: attention by wgmma has the bits of attention by mma.sync on the emulator, in blocks of 64 and of 192 queries, in shuffled order
// and from a graph, and a NaN of one sequence changes no other.
func TestHopperBits(t *testing.T) {
	if os.Getenv("MARGO_CUDA_TEST_DEVICE") != "" {
		t.Skip("emulated devices")
	}
	for _, dh := range []int{64, 72, 80, 128} {
		for _, causal := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d causal=%v", dh, causal), func(t *testing.T) {
				want, trace := attentionBits(t, dh, causal, false, "MARGO_EMU_CC=80", "MARGO_EMU_SMS=132", "MARGO_EMU_SEED=0")
				if t.Failed() {
					return
				}
				if strings.Contains(trace, "sm90a") {
					t.Error("a Hopper kernel ran on 8.0")
				}
				head := want[2*2*dh : 2*147*2*dh] // all but the last sequence
				for i := 0; i < len(head); i += 2 {
					if binary.LittleEndian.Uint16(head[i:])&0x7f80 == 0x7f80 {
						t.Fatalf("element %d is not finite", i/2)
					}
				}
				name := map[int]string{64: "attention_sm90a_64x64", 72: "attention_sm90a_64x80", 80: "attention_sm90a_64x80", 128: "attention_sm90a_64x128"}[dh]
				got, trace := attentionBits(t, dh, causal, true, "MARGO_EMU_CC=90", "MARGO_EMU_SMS=132", "MARGO_EMU_SEED=3")
				if !strings.Contains(trace, "kernel "+name+" ") {
					t.Errorf("%s did not run:\n%s", name, trace)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("blocks of 64: %d elements differ", different(got, want))
				}
				if dh == 64 {
					got, trace = attentionBits(t, dh, causal, false, "MARGO_EMU_CC=90", "MARGO_EMU_SMS=1", "MARGO_EMU_SEED=0")
					if !strings.Contains(trace, "kernel attention_sm90a_192x64 ") {
						t.Errorf("blocks of 192 did not run:\n%s", trace)
					}
					if !bytes.Equal(got, want) {
						t.Errorf("blocks of 192: %d elements differ", different(got, want))
					}
				}
				if slices.Max(want[2*2*dh:]) == 0 {
					t.Error("all zero")
				}
			})
		}
	}
}

func different(a, b []byte) (n int) {
	for i := 0; i < len(a); i += 2 {
		if a[i] != b[i] || a[i+1] != b[i+1] {
			n++
		}
	}
	return n
}
