package ptx

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
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

func normals(r *rand.Rand, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(r.NormFloat64())
	}
	return v
}

// toBF16 gives the bits of v, which is changed to what they stand for.
func toBF16(v []float32) []uint16 {
	b := make([]uint16, len(v))
	for i := range v {
		b[i] = uint16(roundBF16(v[i]))
		v[i] = math.Float32frombits(uint32(b[i]) << 16)
	}
	return b
}

func (m *Memory) bf16(t *testing.T, v []uint16) uint64 {
	t.Helper()
	at := m.Alloc(2 * len(v))
	b, err := m.Bytes(at, 2*len(v))
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range v {
		binary.LittleEndian.PutUint16(b[2*i:], x)
	}
	return at
}

// output reads n numbers of f32 or bf16.
func output(t *testing.T, mem *Memory, at uint64, n int, half bool) []float32 {
	t.Helper()
	if !half {
		return floats(t, mem, at, n)
	}
	b, err := mem.Bytes(at, 2*n)
	if err != nil {
		t.Fatal(err)
	}
	v := make([]float32, n)
	for i := range v {
		v[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(b[2*i:])) << 16)
	}
	return v
}

// near compares within limit, plus one rounding of a bf16 output (half a unit of 8 bits).
func near(t *testing.T, what string, got []float32, want, limit []float64, half bool) {
	t.Helper()
	for i := range got {
		l := limit[i]
		if half {
			l += math.Abs(want[i]) * 0x1p-8
		}
		if d := math.Abs(float64(got[i]) - want[i]); !(d <= l) {
			t.Fatalf("%s: element %d is %g, not %g: %g off, limit %g", what, i, got[i], want[i], d, l)
		}
	}
}

// families says what runs the kernels of each file: the key is in the kernel's name.
var families = map[string]map[string]func(t *testing.T, m *Module, name string){
	"pointwise.cu": {"cast_kernel": castKernel, "copy_kernel": copyKernel, "fill_kernel": fillKernel, "gated_add_kernel": gatedAddKernel,
		"rows_kernel": rowsKernel, "timestep_embedding_kernel": timestepKernel, "patchify_kernel": patchifyKernel},
	"diffusion.cu":        {"diffusion_step_kernel": diffusionStepKernel, "normal_kernel": normalKernel},
	"attention.cu":        {"attention_kernel": attentionKernel},
	"attention_paged.cu":  {"attention_kernel": attentionKernel},
	"attention_f32.cu":    {"attention_f32_kernel": attentionF32Kernel},
	"attention_decode.cu": {"attention_decode_kernel": attentionDecodeKernel},
	"categorical.cu":      {"categorical_kernel": categoricalKernel},
	"conv.cu":             {"conv_": convKernel},
	"group_norm.cu":       {"group_part_kernel": groupNormKernel, "group_apply_kernel": groupNormKernel},
	"head.cu":             {"head_input": headInputKernel, "head_final": headFinalKernel, "head_silu": headSiLUKernel},
	"head_latency.cu":     {"head_latency_kernel": headLatencyKernel},
	"gemm.cu":             {"gemm_": gemmKernel},
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
				run := func(t *testing.T, _ *Module, name string) { t.Fatalf("no test runs %s", name) }
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
	"gemm_sm90a.cu": "compute_80 has neither wgmma nor TMA",
	"plugin.cu":     "no kernels",
}

// TestFamilies sees to it that a new file cannot be forgotten.
func TestFamilies(t *testing.T) {
	files, err := filepath.Glob("../../kernels/*.cu")
	if err != nil || len(files) == 0 {
		t.Fatalf("no kernels found (%v)", err)
	}
	for _, f := range files {
		f = filepath.Base(f)
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

// gemmKernel runs a tile of gemm.cu over 37 × 41 × 72 with bias: edges in rows and columns, two steps in k, the second cut.
// Operands are small whole numbers, so sums are exact in any order and must be equal.
func gemmKernel(t *testing.T, m *Module, name string) {
	const rows, cols, k = 37, 44, 72
	r := rand.New(rand.NewPCG(7, 8))
	x, xf := small(r, rows*k)
	w, wf := small(r, cols*k)
	_, bias := small(r, cols)
	var want [rows * cols]float32
	for i := range want {
		want[i] = bias[i%cols]
		for j := range k {
			want[i] += xf[i/cols*k+j] * wf[i%cols*k+j]
		}
	}
	n, _ := tile(name)
	half := strings.Contains(name, "gemm_bf16")
	mem := &Memory{}
	y := mem.Alloc(4 * rows * cols)
	px, pw, in, threads, shared := mem.F32(xf), mem.F32(wf), int32(0), 256, 160<<10
	if half {
		px, pw, in, threads = mem.bf16(t, x), mem.bf16(t, w), 1, n[2]*n[3]*32
		shared = max(n[4]*(n[0]+n[1])*64*2, n[0]*(n[1]+8)*4)
	}
	blocks := (rows + n[0] - 1) / n[0] * ((cols + n[1] - 1) / n[1])
	p := args(px, int64(k), in, int32(1), pw, int64(k), in, int32(1), int64(rows), int64(cols), int64(k),
		mem.F32(bias), uint64(0), uint64(0), y, int64(0), int64(1), int64(0), int64(cols), int32(0), int32(0), int32(1))
	launch(t, m, mem, Launch{Grid: [3]int{blocks}, Block: [3]int{threads}, Shared: shared, Args: []any{p}}, name)
	for i, v := range floats(t, mem, y, rows*cols) {
		if v != want[i] {
			t.Fatalf("%s: element %d is %g, not %g", name, i, v, want[i])
		}
	}
}

// normalKernel compares with engine.NormalAt, within what rng.cuh promises: about 1e-7 of the result for each of log, sqrt, sincos.
func normalKernel(t *testing.T, m *Module, name string) {
	const rows, cols = 5, 13
	ids := make([]uint32, 2*rows)
	for i := range ids {
		ids[i] = uint32(3*i + 1)
	}
	rng := engine.RNG{Seed: 0x1122334455667788, Purpose: engine.PurposeStepNoise, Step: 17}
	mem := &Memory{}
	y := mem.Alloc(4 * rows * cols)
	launch(t, m, mem, Launch{Grid: [3]int{1}, Block: [3]int{4, 8}, Args: []any{y, int64(cols), int64(rows), int64(cols), mem.U32(ids),
		args(rng.Seed, uint32(rng.Purpose), uint32(rng.Step))}}, name)
	want, limit := make([]float64, rows*cols), make([]float64, rows*cols)
	for i := range want {
		r := i / cols
		want[i] = engine.NormalAt(rng, i%cols, int(ids[2*r]), int(ids[2*r+1]))
		limit[i] = 4e-7 * max(math.Abs(want[i]), 1)
	}
	near(t, "normal", floats(t, mem, y, rows*cols), want, limit, false)
}

// normKernel runs a kernel of norm.cu on two rows of the widest D that it serves, with affine and modulation.
func normKernel(t *testing.T, m *Module, name string) {
	const rows = 2
	n, vec := tile(name)
	d, block, shared := 2052, [3]int{256}, 32
	if len(n) > 0 {
		d, block, shared = 128*n[0], [3]int{32, rows}, 0
	}
	if !vec {
		d--
	}
	types := name[strings.Index(name, "kernelI")+7:]
	xHalf := strings.HasPrefix(types, "4bf16")
	yHalf := strings.HasPrefix(types, "f4bf16") || strings.HasPrefix(types, "4bf16S")
	r := rand.New(rand.NewPCG(9, uint64(d)))
	x, weight, bias, scale, shift := normals(r, rows*d), normals(r, d), normals(r, d), normals(r, d), normals(r, d)
	mem := &Memory{}
	px := uint64(0)
	if xHalf {
		px = mem.bf16(t, toBF16(x))
	} else {
		px = mem.F32(x)
	}
	y := mem.Alloc(4 * rows * d)
	const eps = 1e-6
	p := args(px, y, mem.F32(weight), mem.F32(bias), mem.F32(scale), mem.F32(shift), int64(d), int64(d), int64(d), int64(d), int64(rows),
		int64(rows), int32(d), float32(eps))
	grid := [3]int{1}
	if len(n) == 0 {
		grid[0] = rows
	}
	launch(t, m, mem, Launch{Grid: grid, Block: block, Shared: shared, Args: []any{p}}, name)
	want, limit := make([]float64, rows*d), make([]float64, rows*d)
	for i := range rows {
		mean, square := 0.0, 0.0
		for _, v := range x[i*d : i*d+d] {
			mean += float64(v) / float64(d)
		}
		for _, v := range x[i*d : i*d+d] {
			square += (float64(v) - mean) * (float64(v) - mean) / float64(d)
		}
		for c := range d {
			v := (float64(x[i*d+c]) - mean) / math.Sqrt(square+eps)
			want[i*d+c] = (v*float64(weight[c])+float64(bias[c]))*(1+float64(scale[c])) + float64(shift[c])
			// Sums of d terms of about 1 in f32 by lanes and butterfly: about 70 roundings of 2^-24 at most for each of mean
			// and variance, and a dozen after, of the largest intermediate.
			most := (math.Abs(v*float64(weight[c]))+math.Abs(float64(weight[c]))+math.Abs(float64(bias[c])))*(1+math.Abs(float64(scale[c]))) + math.Abs(float64(shift[c]))
			limit[i*d+c] = 150 * 0x1p-24 * most
		}
	}
	near(t, name, output(t, mem, y, rows*d, yHalf), want, limit, yHalf)
}
