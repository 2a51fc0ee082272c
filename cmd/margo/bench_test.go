package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"margo/bench"
)

// fakePeers makes a folder in which a shell script stands for PyTorch: it is
// quick for a batch of 1 and sleeps over a batch of 2.
func fakePeers(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		".peers/bin/python": `#!/bin/sh
while read -r line; do case "$line" in
*'"batch":2,'*) sleep 100;;
*) echo '{"seconds_total": 1, "enc": 0.25, "dec": 0.25, "head": 0.25, "tokens_absmax": NaN}';;
esac; done`,
		"bench/peers/mar_torch.py": "",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// quickBench is a bench command that takes a moment.
func quickBench(args ...string) []string {
	return append([]string{"bench", "--model", fashion, "--iters", "2", "--head-steps", "2", "--reps", "1", "--log-level", "warn"}, args...)
}

func TestBenchRefuses(t *testing.T) {
	dir, pipe := t.TempDir(), filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o666); err != nil {
		t.Fatal(err)
	}
	peers := fakePeers(t)
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{quickBench("extra"), 2, `what is "extra"?`},
		{quickBench("--batch", "1,x"), 2, `"x" is not a batch size`},
		{quickBench("--dtype", "f32,f16"), 2, `"f16" is not a dtype`},
		{quickBench("--cfg", "NaN"), 2, "--cfg is NaN"},
		{quickBench("--format", "xml"), 2, "--format"},
		{quickBench("--max-timestep", "0"), 2, "it must be between 1 and 999"},
		{quickBench("--against", "jax"), 2, `"jax" is not a peer`},
		{quickBench("--against", "pytorch", "--peers", dir), 1, "run make peers"},
		{quickBench("--against", "pytorch", "--peers", peers, "--iters", "50"), 2, "49 tokens"},
		{quickBench("--tokenizer", fashionKL), 2, "--decode only"},
		{quickBench("--out", ""), 2, "--out is empty"},
		{quickBench("--out", dir), 2, "is a folder"},
		{quickBench("--out", pipe), 2, "not a regular file"},
		{quickBench("--out", filepath.Join(dir, "no", "such", "x")), 1, "there is no folder"},
		{[]string{"bench", "--model", "mar-bse"}, 2, "did you mean mar-base?"},
		{[]string{"bench", "--model", "ar-raster-base", "--iters", "3"}, 2, "--iters is for a MAR (a causal model takes one for each token)"},
		{[]string{"bench", "--model", "mar-base-l2", "--head-steps", "3"}, 2, "with the diffusion head"},
		{[]string{"bench", "--model", "mar-base-ce", "--decode"}, 2, "its tokens are codes"},
		{[]string{"bench", "--model", "mar-base,"}, 2, "empty item"},
		{[]string{"bench", "--model", "mar-base", "--heads", "4"}, 2, "--heads is about a file"},
		{quickBench("--head-steps", "2,0"), 2, `"0" is not a number of diffusion steps`},
		{quickBench("--iters", ""), 2, "--iters is empty"},
		{quickBench("--steps", "50"), 2, "--steps is for a DiT"},
		{quickBench("--sampler", "euler"), 2, "--sampler"},
		{quickBench("--plot", "speed.gif"), 2, "does not end in .png or .svg"},
		{quickBench("--plot", filepath.Join(dir, "no", "such", "x.png")), 1, "there is no folder"},
		{quickBench("--from", "x.json"), 2, "--model is about measuring"},
		{[]string{"bench", "--from", "x.json"}, 3, "no such file"},
		{[]string{"bench", "--from", "x.json", "--max-timestep", "5"}, 2, "--max-timestep is about measuring"},
		{[]string{"bench", "--from", fashionKL}, 3, "is not a report"},
		{[]string{"bench", "--model", "dit-xl/3"}, 2, "dit-xl/2"},
		{[]string{"bench", "--model", "dit-s/8", "--steps", "1"}, 2, `--steps: "1"`},
		{[]string{"bench", "--model", "dit-s/8", "--iters", "3"}, 2, "--iters is for a MAR"},
		{[]string{"bench", "--model", "dit-s/8", "--heads", "3"}, 2, "--heads is about a file"},
		{[]string{"bench", "--model", "mar-base-l2", "--against", "pytorch", "--peers", peers}, 2, "the diffusion head only"},
		{[]string{"bench", "--model", fashionKL}, 3, "holds a tokenizer, not a MAR"},
		{[]string{"bench", "--model", tinyPTH}, 2, "--heads"},
		{[]string{"bench", "--model", goldens + "mar_kl8.safetensors", "--decode", "--iters", "2", "--against", "pytorch", "--peers", peers}, 2, "has the names of diffusers"},
		{[]string{"bench", "--model", tinyPTH, "--heads", "4", "--patch-size", "1", "--against", "pytorch", "--peers", peers}, 2, "convert it first: margo convert " + tinyPTH},
	} {
		code, out, msg := margo(c.args...)
		if code != c.code || !strings.Contains(msg, c.want) || out != "" || strings.Count(msg, "\n") != 1 {
			t.Errorf("margo %s: exit %d, want %d with %q: %s%s", strings.Join(c.args, " "), code, c.code, c.want, msg, out)
		}
	}
	if left := files(t, dir); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func readReport(t *testing.T, text []byte) *bench.Report {
	t.Helper()
	var r bench.Report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return &r
}

func TestBench(t *testing.T) {
	r := readReport(t, []byte(ok(t, quickBench("--format", "json", "--decode", "--against", "pytorch-tuned", "--peers", fakePeers(t))...)))
	if len(r.Rows) != 2 || r.Rows[0].Side != "margo" || r.Rows[1].Side != "pytorch tuned" || r.Rows[1].Runs[0].Seconds != 1 || r.Incomplete != "" {
		t.Errorf("%+v", r)
	}
	if m := r.Rows[0]; m.Runs[0].Parts["tokenizer"] <= 0 || m.FLOPs < m.OwnFLOPs || m.Peak <= 0 || m.Runs[0].PeakThen <= 0 || m.Runs[0].PeakThen > 1.05*m.Peak || m.RandomWeight {
		t.Errorf("%+v", m)
	}
	// What sample can read, bench can: a file that does not tell its heads.
	r = readReport(t, []byte(ok(t, "bench", "--model", tinyPTH, "--heads", "4", "--patch-size", "1", "--which", "ema", "--iters", "2", "--head-steps", "2", "--reps", "1", "--format", "json")))
	if len(r.Rows) != 1 || r.Rows[0].Model != "mar_tiny" {
		t.Errorf("%+v", r.Rows)
	}
}

// Ctrl-C while the peer works: both end soon, and the report has the case that
// was complete.
func TestBenchInterrupted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.json")
	signals := make(chan os.Signal, 2)
	var out, errs buffer
	done := make(chan int)
	args := quickBench("--batch", "1,2", "--against", "pytorch-eager", "--peers", fakePeers(t), "--format", "json", "--out", path, "--log-level", "info")
	go func() { done <- run(args, &out, &errs, signals) }()
	for start := time.Now(); !strings.Contains(errs.String(), "batch 2: pytorch eager warms up"); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("no second case: %s", errs.String())
		}
	}
	time.Sleep(50 * time.Millisecond)
	signals <- os.Interrupt
	select {
	case code := <-done:
		if code != exitInterrupted || !strings.HasSuffix(errs.String(), "margo: interrupted\n") {
			t.Errorf("exit %d: %s", code, errs.String())
		}
	case <-time.After(30 * time.Second):
		t.Fatal("still running half a minute after the signal")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if r := readReport(t, text); len(r.Rows) != 2 || r.Rows[1].Batch != 1 || r.Incomplete != "interrupted" {
		t.Errorf("%s", text)
	}
}

// The whole comparison: MAR, DiT and AR in one run, taking turns, at several settings,
// with a plot; then the same report from its file.
func TestBenchRivals(t *testing.T) {
	dir := t.TempDir()
	report, plot := filepath.Join(dir, "r.json"), filepath.Join(dir, "r.png")
	ok(t, "bench", "--model", fashion+","+goldens+"dit_tiny.safetensors", "--iters", "4,8", "--head-steps", "2", "--steps", "4,ddim10", "--sampler", "ddim",
		"--subset", "2", "--reps", "2", "--interleave", "--dtype", "f32,bf16", "--format", "json", "--out", report, "--plot", plot)
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	r := readReport(t, text)
	if len(r.Rows) != 8 || !r.Interleaved {
		t.Fatalf("%d rows, interleaved %v", len(r.Rows), r.Interleaved)
	}
	for i, want := range []string{"4×2", "8×2", "4×2", "8×2", "4 ddim", "ddim10 ddim", "4 ddim", "ddim10 ddim"} {
		row := &r.Rows[i]
		part := "head"
		if i > 3 {
			part = "denoiser"
		}
		if row.Settings() != want || row.Subset != 2 || len(row.Runs) != 2 || row.PartSeconds(part) <= 0 || row.FLOPs <= 0 || row.OwnFLOPs <= 0 || row.MemoryBytes != 0 {
			t.Errorf("row %d, want %s: %+v", i, want, row)
		}
	}
	if r.Rows[5].Iters != 10 || r.Rows[4].Guided != "3" || r.Rows[4].Sampler != "ddim" {
		t.Errorf("%+v", r.Rows[5])
	}
	if b, err := os.ReadFile(plot); err != nil || !strings.HasPrefix(string(b), "\x89PNG") {
		t.Errorf("the plot: %v", err)
	}
	out := ok(t, "bench", "--from", report+","+report)
	if strings.Count(out, "ddim10") < 4 || !strings.Contains(out, "not at equal FID") {
		t.Errorf("from the file:\n%s", out)
	}
}

// PyTorch is asked for a DiT's steps, not for a MAR's iterations.
func TestBenchDiTAgainst(t *testing.T) {
	peers := fakePeers(t)
	log := filepath.Join(peers, "requests")
	script := "#!/bin/sh\nwhile read -r line; do echo \"$line\" >>" + log + "; echo '{\"seconds_total\": 2, \"denoiser\": 1.5}'; done\n"
	if err := os.WriteFile(filepath.Join(peers, ".peers/bin/python"), []byte(script), 0o777); err != nil {
		t.Fatal(err)
	}
	r := readReport(t, []byte(ok(t, "bench", "--model", goldens+"dit_tiny.safetensors", "--steps", "8", "--subset", "4", "--cfg", "2", "--reps", "1", "--against", "pytorch-eager", "--peers", peers, "--format", "json")))
	if len(r.Rows) != 2 || r.Rows[1].Runs[0].Seconds != 3.5 || r.Rows[1].Runs[0].Parts["denoiser"] != 3 {
		t.Errorf("%+v", r.Rows)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"hidden_size":64`, `"steps":"8"`, `"sampler":"ddpm"`, `"cfg_channels":"3"`, `"subset":[0,2,4,6]`, `"cfg":2`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s", want, b)
		}
	}
	if strings.Contains(string(b), "head_steps") {
		t.Errorf("a DiT has no head: %s", b)
	}
}
