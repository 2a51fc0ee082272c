package ptx

import (
	"fmt"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// recorder is a test that may fail.
type recorder struct {
	testing.TB
	failed string
}

func (r *recorder) fail(s string) {
	if r.failed == "" {
		r.failed = strings.TrimSpace(s)
	}
}
func (r *recorder) Helper()                   {}
func (r *recorder) Error(a ...any)            { r.fail(fmt.Sprintln(a...)) }
func (r *recorder) Errorf(f string, a ...any) { r.fail(fmt.Sprintf(f, a...)) }
func (r *recorder) Fatal(a ...any)            { r.fail(fmt.Sprintln(a...)); runtime.Goexit() }
func (r *recorder) Fatalf(f string, a ...any) { r.fail(fmt.Sprintf(f, a...)); runtime.Goexit() }

// seeded are bugs in the PTX of kernels, as a compiler or a hand at inline assembly would make them. count is how many of the
// pattern's occurrences are changed, 0 all. Each must fail its kernel's test, with what matches seen.
var seeded = []struct {
	file, kernel  string
	what          string
	pattern, with string
	count         int
	seen          string
}{
	{"attention.cu", "PlanILi64ELi64ELi4ELi1EEELb1E", "two fragments of one mma swapped", `(m16n8k16[^{]*\{[^}]*\},\{)(%r\d+),(%r\d+),`, "$1$3,$2,", 1, "oracle"},
	{"attention.cu", "PlanILi72ELi64ELi4ELi1EEELb1E", "the fragments of one m16n8k8 swapped", `(m16n8k8\.[^{]*\{[^}]*\},\{)(%r\d+),(%r\d+)\}`, "$1$3,$2}", 1, "oracle"},
	{"attention.cu", "PlanILi128ELi64ELi4ELi1EEELb1E", "an ldmatrix 16 bytes off", `(ldmatrix.*x4\.shared.*\[%r\d+)\]`, "$1+16]", 1, "oracle"},
	{"attention.cu", "PlanILi64ELi64ELi4ELi1EEELb1E", "a lost .trans", `x4\.trans`, "x4", 1, "oracle"},
	{"attention.cu", "PlanILi64ELi64ELi4ELi1EEELb1E", "no barriers", `bar\.sync\s+0;`, "", 0, "oracle"},
	{"attention_paged.cu", "PlanILi64ELi64ELi4ELi1EEELb1E", "waits that leave a copy under way", `wait_group 0`, "wait_group 1", 0, "oracle"},
	{"attention_decode.cu", "If", "no barriers", `bar\.sync\s+0;`, "", 0, "oracle"},
	{"conv.cu", "conv_bf16ILi64ELi64ELi2ELi2ELi4ELb1E", "the swizzle of one chunk lost", `xor\.b32(\s+%r\d+, )(%r\d+), (%r\d+);`, "or.b32$1$2, $3;", 1, "oracle"},
	{"conv.cu", "conv_f32ILi64ELi64E", "no barriers", `bar\.sync\s+0;`, "", 0, "oracle"},
	{"gemm.cu", "gemm_bf16ILi32ELi32ELi1ELi2ELi6ELb1E", "waits that leave a stage too many under way", `wait_group 4`, "wait_group 5", 0, "oracle"},
	{"group_norm.cu", "group_apply_kernelIffLb1E", "shuffles from fixed lanes", `shfl\.sync\.bfly`, "shfl.sync.idx", 0, "oracle"},
	{"head.cu", "head_finalILi4E", "no barriers", `bar\.sync\s+0;`, "", 0, "oracle"},
	{"head_latency.cu", "ILi1ELi8ELb0E", "no barriers", `bar\.sync\s+0;`, "", 0, ""},
	{"head_latency.cu", "ILi1ELi8ELb1E", "FP8 codes widened to half their value", `mul\.f32(\s+%f\d+, %f\d+), 0f7B800000`, "mul.f32$1, 0f7B000000", 0, "oracle"},
	{"head_latency.cu", "ILi1ELi8ELb1E", "the first of four FP8 codes taken for the second", `shl\.b32(\s+%r\d+, %r\d+), 24;`, "shl.b32$1, 16;", 0, "oracle"},
	{"categorical.cu", "Lb1E", "one step of the cumulative sum from the wrong lane", `shfl\.sync\.up`, "shfl.sync.down", 2, "oracle"},
	{"pointwise.cu", "rows_kernelIfffLb1E", "one row too many", `setp\.ge\.s64(\s+%p1,)`, "setp.gt.s64$1", 1, "outside every buffer"},
	{"diffusion.cu", "diffusion_step_kernelILb0E", "one column too many", `setp\.ge\.s64`, "setp.gt.s64", 0, ""},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a swizzle of 64 bytes in one descriptor", `4611686293305360384;`, "-9223371761976803328;", 1, "oracle"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "groups of 8 rows 512 bytes apart", `4611686293305360384;`, "4611686155866406912;", 1, "oracle"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a descriptor 16 columns off", `4611686293305360386;`, "4611686293305360388;", 1, "oracle"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "B transposed", `p,1,1,0,0;`, "p,1,1,0,1;", 1, "oracle"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "waits for mbarriers that do not wait", `@!p bra W\d+;`, "", 0, "read by a product under way"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a lost wait for a stage that comes", `@!p bra W\d+;([^@]*wgmma\.fence)`, "$1", 1, "read by a product under way"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a lost wait for a stage that is read", `@!p bra W\d+;([^@]*arrive\.expect_tx)`, "$1", 0, "arrivals where 0 are pending"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a lost wait for products", `wgmma\.wait_group\.sync\.aligned 0;`, "", 0, "nobody waited for"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a stage given back while it is read", `wgmma\.wait_group\.sync\.aligned 1;`, "", 0, "read by a product under way"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a lost wgmma.fence", `wgmma\.fence\.sync\.aligned;`, "", 0, "no wgmma.fence"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a stage expected 16 bytes short", `(mov\.u32\s+%r\d+, )12288;`, "${1}12272;", 0, "more have come"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "a stage expected 16 bytes too long", `(mov\.u32\s+%r\d+, )12288;`, "${1}12304;", 0, "0 arrivals and 16 bytes"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "row and column of a tile swapped", `\{(%r\d+),(%r\d+)\}\],`, "{$2,$1}],", 1, "oracle"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "stages that nobody gives back", `mbarrier\.arrive\.shared::cta\.b64 _,[^;]*;`, "", 0, "deadlock"},
	{"gemm_sm90a.cu", "ILi1ELi32ELi8E", "mbarriers that TMA does not know", `fence\.mbarrier_init[^;]*;`, "", 1, "no fence between"},
	{"gemm_sm90a.cu", "ILi2ELi128ELi5E", "more registers than there are", `(setmaxnreg\.inc.* )232;`, "${1}240;", 1, "deadlock"},
	{"attention_sm90a.cu", "HopperILi64ELi1E", "V not transposed", `p,1,1,1;`, "p,1,1,0;", 1, "oracle"},
	{"attention_sm90a.cu", "HopperILi80ELi1E", "the columns after 64 of V not transposed", `(m64n16k16[^;]*)p,1,1,1;`, "${1}p,1,1,0;", 0, "oracle"},
	{"attention_sm90a.cu", "HopperILi80ELi1E", "zeros that TMA's proxy does not see", `fence\.proxy\.async[^;]*;`, "", 0, "without fence.proxy.async"},
	{"attention_sm90a.cu", "HopperILi128ELi1E", "waits for mbarriers that do not wait", `@!p bra W\d+;`, "", 0, "arrivals where 0 are pending"},
	{"attention_sm90a.cu", "HopperILi64ELi1E", "mbarriers that another phase ends", `(try_wait\.parity[^;]*),%r\d+;`, "$1,1;", 0, "is the target of a copy"},
	{"attention_sm90a.cu", "HopperILi64ELi1E", "O used while P·V is under way", `wgmma\.wait_group\.sync\.aligned 0;`, "wgmma.wait_group.sync.aligned 1;", 0, "nobody waited for"},
	{"attention_sm90a.cu", "HopperILi64ELi1E", "S used while it is computed", `wgmma\.wait_group\.sync\.aligned 1;`, "wgmma.wait_group.sync.aligned 2;", 0, "nobody waited for"},
	{"attention_sm90a.cu", "HopperILi64ELi3E", "a lost wgmma.fence", `wgmma\.fence\.sync\.aligned;`, "", 0, "no wgmma.fence"},
	{"attention_sm90a.cu", "HopperILi64ELi3E", "stages that nobody gives back", `mbarrier\.arrive\.shared::cta\.b64 _,[^;]*;`, "", 0, "deadlock"},
	{"norm.cu", "norm_warp_kernelIffLi4ELb1E", "a rounding that does not exist", `add\.f32`, "add.rna.f32", 1, "add.rna"},
	{"pointwise.cu", "cast_kernelIffLb1E", "a predicate that nobody sets", `setp\S+\s+%p1,[^;]*;`, "", 1, "never written"},
}

func TestSeededBugsInKernels(t *testing.T) {
	for _, bug := range seeded {
		t.Run(bug.file+"/"+bug.what, func(t *testing.T) {
			t.Parallel()
			text := compiled(t, bug.file)
			whole := parsed(t, text)
			var name string
			for _, n := range whole.Kernels() {
				if strings.Contains(n, bug.kernel) {
					name = n
				}
			}
			if name == "" {
				t.Fatalf("no kernel %s", bug.kernel)
			}
			span := whole.entries[name]
			kernel := strings.Join(whole.lines[span[0]:span[1]], "\n")
			re, left := regexp.MustCompile(bug.pattern), bug.count
			changed := 0
			body := re.ReplaceAllStringFunc(kernel, func(s string) string {
				if left--; bug.count > 0 && left < 0 {
					return s
				}
				changed++
				return re.ReplaceAllString(s, bug.with)
			})
			if changed == 0 || bug.count > 0 && changed != bug.count {
				t.Fatalf("%s is %d times in %s", bug.pattern, changed, name)
			}
			m := parsed(t, strings.Replace(text, kernel, body, 1))
			r, done := &recorder{TB: t}, make(chan bool)
			go func() {
				defer close(done)
				for key, f := range families[bug.file] {
					if strings.Contains(name, key) {
						f(r, m, name)
					}
				}
			}()
			<-done
			if r.failed == "" || !strings.Contains(r.failed, bug.seen) {
				t.Errorf("with %d changes the test says %q", changed, r.failed)
			}
			t.Log(r.failed)
		})
	}
}
