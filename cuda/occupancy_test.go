package cuda

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"margo/engine/testkit"
)

const budget = "../kernels/BUDGET.md"

// compiled maps the names under which kernels with products are launched to those of the static table: which template a
// launch takes. The sizes come from the launches and from the compiler.
var compiled = map[string]string{
	"attention_64":           "attention_kernel<Plan<64, 64, 4, 1>, true, false>",
	"attention_sm90a_64x64":  "attention_wgmma<Hopper<64, 1, 4, 3> >",
	"attention_sm90a_192x64": "attention_wgmma<Hopper<64, 3, 5, 1> >",
	"gemm_bf16_32x32":        "gemm_bf16<32, 32, 1, 2, 6, true>",
	"gemm_bf16_64x64":        "gemm_bf16<64, 64, 2, 2, 4, true>",
	"gemm_bf16_128x128":      "gemm_bf16<128, 128, 2, 4, 3, true>",
	"gemm_bf16_128x256":      "gemm_bf16<128, 256, 2, 4, 3, true>",
	"gemm_f32_64x64":         "gemm_f32<64, 64>",
	"gemm_f32_128x128":       "gemm_f32<128, 128>",
	"gemm_sm90a_64x32":       "gemm_wgmma<1, 32, 8>",
	"gemm_sm90a_64x64":       "gemm_wgmma<1, 64, 6>",
	"gemm_sm90a_64x128":      "gemm_wgmma<1, 128, 6>",
	"gemm_sm90a_128x128":     "gemm_wgmma<2, 128, 5>",
	"gemm_sm90a_128x256":     "gemm_wgmma<2, 256, 4>",
	"head_latency":           "head_latency_kernel<2, 12, false>", // of three, the one with most registers
	"head_latency_fp8":       "head_latency_kernel<2, 12, true>",
}

// registers reads the static table: kernel and architecture → registers.
func registers(t *testing.T, text string) map[string]int {
	t.Helper()
	found := map[string]int{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (\\w+) \\| (\\d+) \\|").FindAllStringSubmatch(text, -1) {
		n, err := strconv.Atoi(m[3])
		if err != nil {
			t.Fatal(err)
		}
		found[m[1]+" "+m[2]] = n
	}
	if len(found) == 0 {
		t.Fatalf("%s has no static table", budget)
	}
	return found
}

// occupancy is how many blocks of a kernel a multiprocessor holds: by its 65,536 registers, which a warp takes in units of
// 256, and by shared memory, threads and blocks (bySize).
func occupancy(registers, threads, bySize int) (blocks, byRegisters int) {
	byRegisters = 65536 / ((registers*32 + 255) / 256 * 256 * (threads / 32))
	return min(byRegisters, bySize), byRegisters
}

// TestOccupancyTable: kernels/BUDGET.md lists the occupancy of the kernels with products that a MAR-B sample of 8 iterations launches.
// Threads and shared memory are those of the launches, counted on the emulator; registers are nvcc's. At least one block must fit.
// MARGO_UPDATE_BUDGET=1 writes the table.
func TestOccupancyTable(t *testing.T) {
	text, err := os.ReadFile(budget)
	if err != nil {
		t.Fatal(err)
	}
	regs := registers(t, string(text))
	var b strings.Builder
	b.WriteString("\n| launch | kernel | GPU | registers | threads | shared memory | blocks by registers | by the rest | warps of 64 |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, g := range []struct{ cc, sms, arch, name string }{{"80", "108", "sm_80", "A100"}, {"90", "132", "sm_90a", "H100"}} {
		rows := map[string]string{}
		for _, head := range [][2]string{{"throughput", ""}, {"latency", ""}, {"latency", "fp8"}} {
			path := head[0]
			t.Run(g.name+" "+path+head[1], func(t *testing.T) {
				d, e := traced(t, "MARGO_EMU_CC="+g.cc, "MARGO_EMU_SMS="+g.sms, "MARGO_HEAD_PATH="+path, "MARGO_HEAD_WEIGHTS="+head[1])
				few := marB(1)
				few.Iters, few.HeadSteps = 8, 10
				launched(t, d, e, few)
				if path == "throughput" {
					few.N, few.Batch = 64, 64
					launched(t, d, e, few)
				}
				for _, k := range d.Kernels() {
					name, known := compiled[k.Name]
					if !known && (strings.Contains(k.Name, "gemm") || strings.Contains(k.Name, "attention")) {
						t.Errorf("%s is launched, and this test does not know as what it was compiled", k.Name)
					}
					r, listed := regs[name+" "+g.arch]
					if !known || !listed {
						continue // on the H100 the static table has Hopper's own kernels only
					}
					blocks, by := occupancy(r, k.Threads, k.BlocksPerMultiprocessor)
					if blocks < 1 {
						t.Errorf("%s on %s: %d registers, %d threads and %d bytes do not fit", k.Name, g.name, r, k.Threads, k.Shared)
					}
					rows[k.Name] = fmt.Sprintf("| `%s` | `%s` | %s | %d | %d | %d | %d | %d | %d |\n", k.Name, name, g.name, r, k.Threads, k.Shared, by,
						k.BlocksPerMultiprocessor, blocks*k.Threads/32)
				}
			})
		}
		names := []string{}
		for n := range rows {
			names = append(names, n)
		}
		slices.Sort(names)
		for _, n := range names {
			b.WriteString(rows[n])
		}
	}
	b.WriteString("\n")
	testkit.Section(t, budget, "occupancy", b.String())
}
