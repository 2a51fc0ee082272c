package ptx

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"margo/engine"
)

// args lays out a struct of parameters: fields in order, each at a multiple of its size, the whole of 8.
func args(fields ...any) []byte {
	var b bytes.Buffer
	pad := func(n int) {
		for b.Len()%n != 0 {
			b.WriteByte(0)
		}
	}
	for _, f := range fields {
		pad(binary.Size(f))
		binary.Write(&b, binary.LittleEndian, f) // into memory, of fixed sizes: cannot fail
	}
	pad(8)
	return b.Bytes()
}

// families says what runs the kernels of each file: the key is in the kernel's name.
var families = map[string]map[string]func(t testing.TB, m *Module, name string){
	"pointwise.cu": {"cast_kernel": castKernel, "copy_kernel": copyKernel, "fill_kernel": fillKernel, "gated_add_kernel": gatedAddKernel,
		"rows_kernel": rowsKernel, "timestep_embedding_kernel": timestepKernel, "patchify_kernel": patchifyKernel},
	"diffusion.cu":        {"diffusion_step_kernel": diffusionStepKernel, "normal_kernel": normalKernel},
	"attention.cu":        {"attention_kernel": attentionKernel},
	"attention_paged.cu":  {"attention_kernel": attentionKernel},
	"attention_sm90a.cu":  {"attention_wgmma": attentionSm90Kernel},
	"attention_f32.cu":    {"attention_f32_kernel": attentionF32Kernel},
	"attention_decode.cu": {"attention_decode_kernel": attentionDecodeKernel},
	"categorical.cu":      {"categorical_kernel": categoricalKernel},
	"conv.cu":             {"conv_": convKernel},
	"group_norm.cu":       {"group_part_kernel": groupNormKernel, "group_apply_kernel": groupNormKernel},
	"head.cu":             {"head_input": headInputKernel, "head_final": headFinalKernel, "head_silu": headSiLUKernel},
	"head_latency.cu":     {"head_latency_kernel": headLatencyKernel},
	"gemm.cu":             {"gemm_": gemmKernel},
	"gemm_sm90a.cu":       {"gemm_wgmma": gemmSm90Kernel},
	"norm.cu":             {"norm_": normKernel},
}

// TestKernels runs every kernel of every file.
func TestKernels(t *testing.T) {
	for file, family := range families {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			m := parsed(t, compiled(t, file))
			if len(m.Kernels()) == 0 {
				t.Fatal("no kernels")
			}
			for _, name := range m.Kernels() {
				run := func(t testing.TB, _ *Module, name string) { t.Fatalf("no test runs %s", name) }
				for key, f := range family {
					if strings.Contains(name, key) {
						run = f
					}
				}
				t.Run(name[strings.LastIndex(name, "_cu_")+12:], func(t *testing.T) { run(t, m, name) })
			}
		})
	}
}

// notRun are files that TestKernels leaves out, and why.
var notRun = map[string]string{
	"cublaslt.cu": "no kernels",
	"nccl.cu":     "no kernels",
	"memory.cu":   "no kernels",
	"plugin.cu":   "no kernels",
}

// TestFamilies sees to it that a new file cannot be forgotten.
func TestFamilies(t *testing.T) {
	files, err := filepath.Glob("../../kernels/*.cu")
	if err != nil || len(files) == 0 {
		t.Fatalf("no kernels found (%v)", err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		f = filepath.Base(f)
		if notRun[f] == "no kernels" && bytes.Contains(text, []byte("__global__")) {
			t.Errorf("%s has kernels", f)
		}
		if why := notRun[f]; (families[f] == nil) == (why == "") {
			t.Errorf("%s is neither in families nor in notRun, or in both", f)
		}
	}
}

// tile reads the template's numbers: ILi128ELi256E gives 128, 256.
func tile(name string) (n []int, flag bool) {
	for _, part := range strings.Split(name, "Li")[1:] {
		v := 0
		fmt.Sscanf(part, "%d", &v)
		n = append(n, v)
	}
	return n, strings.Contains(name, "Lb1E")
}

// gemmKernel runs a tile of gemm.cu over 37 × 44 × 72 with bias, GELU, gate and residual: edges in rows and columns, two steps in k, the
// second cut. Then without the rest on small whole numbers, whose sums are exact in any order: the limit is far below 1. An
// asynchronous kernel of n[4] stages then gets k long enough for its loop of whole steps to run twice.
func gemmKernel(t testing.TB, m *Module, name string) {
	const rows, cols, gateRows = 37, 44, 10
	k := 72
	n, async := tile(name)
	x, w, l := engine.F32, engine.F32, Launch{Block: [3]int{256}, Shared: 4 * 2 * 16 * (n[0] + n[1] + 8)}
	if strings.Contains(name, "gemm_bf16") {
		w, l = engine.BF16, Launch{Block: [3]int{32 * n[2] * n[3]}, Shared: n[4] * (n[0] + n[1]) * 64 * 2}
	}
	half := int32(0)
	if async {
		x = engine.BF16
	}
	if w == engine.BF16 {
		half = 1
	}
	whole := gen(func(r *rand.Rand, _ int) float32 { return float32(r.IntN(17) - 8) })
	for _, exact := range []bool{false, true} {
		p := newProblem(t)
		p.gap = 8
		g := normal(1).bf16Of()
		if exact {
			g = whole
			if async {
				k += 64 * n[4]
			}
		}
		px, pw := p.in(x, g, rows, k), p.in(w, g, cols, k)
		p.gap = 4
		bias, gate, residual := p.in(engine.F32, whole, cols), p.f32((rows+gateRows-1)/gateRows, cols), p.f32(rows, cols)
		y := p.out(engine.F32, rows, cols)
		pg, pr, act := gate.at, residual.at, engine.GELUErf
		if exact {
			pg, pr, act = 0, 0, engine.Identity
		}
		xHalf := int32(0)
		if x == engine.BF16 {
			xHalf = 1
		}
		l.Grid = [3]int{(rows + n[0] - 1) / n[0] * ((cols + n[1] - 1) / n[1])}
		l.Args = []any{args(px.at, int64(px.ld), xHalf, int32(1), pw.at, int64(pw.ld), half, int32(1), int64(rows), int64(cols), int64(k),
			bias.at, pg, pr, y.at, int64(gate.ld), int64(gateRows), int64(residual.ld), int64(y.ld), int32(act), int32(0), int32(1))}
		launch(t, m, p.mem, l, name)
		p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
			a := engine.GemmArgs{X: at(px), W: at(pw), Bias: at(bias), Act: act, Y: at(y)}
			if !exact {
				a.Gate, a.GateRows, a.Residual = at(gate), gateRows, at(residual)
			}
			return s.Gemm(a)
		})
	}
}

// normalKernel draws the numbers of 5 tokens.
func normalKernel(t testing.TB, m *Module, name string) {
	const rows, cols = 5, 13
	rng := engine.RNG{Seed: 0x1122334455667788, Purpose: engine.PurposeStepNoise, Step: 17}
	p := newProblem(t)
	p.gap = 3
	y, ids := p.out(engine.F32, rows, cols), p.ids(rows)
	launch(t, m, p.mem, Launch{Block: [3]int{4, 8}, Args: []any{y.at, int64(y.ld), int64(rows), int64(cols), ids.at,
		args(rng.Seed, uint32(rng.Purpose), uint32(rng.Step))}}, name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.Normal(engine.NormalArgs{Y: at(y), IDs: at(ids), RNG: rng})
	})
}

// normKernel runs a kernel of norm.cu on two rows of the widest D that it serves, with affine and modulation.
func normKernel(t testing.TB, m *Module, name string) {
	const rows, eps = 2, 1e-6
	n, vec := tile(name)
	d, l := 2052, Launch{Grid: [3]int{rows}, Block: [3]int{256}, Shared: 32}
	if len(n) > 0 {
		d, l = 128*n[0], Launch{Block: [3]int{32, rows}}
	}
	if !vec {
		d--
	}
	types := name[strings.Index(name, "kernelI")+7:]
	x, y := engine.F32, engine.F32
	if strings.HasPrefix(types, "4bf16") {
		x = engine.BF16
	}
	if strings.HasPrefix(types, "f4bf16") || strings.HasPrefix(types, "4bf16S") {
		y = engine.BF16
	}
	p := newProblem(t)
	p.gap = 4
	px, py := p.in(x, normal(1), rows, d), p.out(y, rows, d)
	weight, bias, scale, shift := p.f32(d), p.f32(d), p.f32(rows, d), p.f32(rows, d)
	l.Args = []any{args(px.at, py.at, weight.at, bias.at, scale.at, shift.at, int64(px.ld), int64(py.ld), int64(scale.ld), int64(shift.ld), int64(rows),
		int64(1), int32(d), float32(eps))}
	launch(t, m, p.mem, l, name)
	p.verify(func(s engine.Stream, at func(*operandOf) *engine.Tensor) error {
		return s.Norm(engine.NormArgs{X: at(px), Y: at(py), Weight: at(weight), Bias: at(bias), Scale: at(scale), Shift: at(shift), ModRows: 1, Eps: eps})
	})
}
