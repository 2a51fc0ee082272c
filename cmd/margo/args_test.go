package main

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
)

func panickingCommand() *cli.Command {
	return &cli.Command{Name: "panic", Action: func(*cli.Context) error { panic("two\nlines") }}
}

func TestArrange(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"inspect file", "inspect -- file"},
		{"inspect file --json", "inspect --json -- file"},
		{"convert --dtype bf16 in out --which=ema", "convert --dtype bf16 --which=ema -- in out"},
		{"sample --cfg -1 --log-level debug -n 3", "--log-level debug sample --cfg -1 -n 3"},
		{"--log-level=warn devices --json", "--log-level=warn devices --json"},
		{"inspect -- --json", "inspect -- --json"},
		{"help sample", "help sample"},
	} {
		got, err := arrange(newApp(newLogger(os.Stderr)), strings.Fields(c.in))
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%q became %q (%v), want %q", c.in, got, err, c.want)
		}
	}
}

func TestSuggest(t *testing.T) {
	flags := []string{"iters", "head-steps", "seed", "n", "temperature"}
	for in, want := range map[string]string{"itres": "iters", "steps": "head-steps", "temp": "temperature", "sed": "seed", "Seed": "seed", "xyzzy": "", "q": ""} {
		if got := suggest(in, flags); got != want {
			t.Errorf("suggest(%q) = %q, want %q", in, got, want)
		}
	}
	if d := edits("kitten", "sitting"); d != 3 {
		t.Errorf("distance %d", d)
	}
}

func TestParseClasses(t *testing.T) {
	names := []string{"T-shirt/top", "tench, Tinca tinca", "bag", "Bag, handbag"}
	for _, c := range []struct {
		in   string
		want []int
	}{
		{"0", []int{0}}, {"3,0,3", []int{3, 0, 3}}, {"1-3", []int{1, 2, 3}}, {" 1 , 2 ", []int{1, 2}},
		{"t-shirt", []int{0}}, {"Top", []int{0}}, {"T-shirt/top", []int{0}}, {"tinca TINCA,0-1", []int{1, 0, 1}},
		{"bag", []int{2}}, {"handbag", []int{3}},
	} {
		if got, err := parseClasses(c.in, names, 4); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q: %v, %v; want %v", c.in, got, err, c.want)
		}
	}
	for _, in := range []string{"4", "-1", "2-4", "3-1", "", "0,", "cat", "1.5", "99999999999999999999"} {
		if got, err := parseClasses(in, names, 4); err == nil || exitCode(err) != exitUsage {
			t.Errorf("%q gave %v, %v", in, got, err)
		}
	}
	twice := []string{"crane", "cat, crane", "Crane"}
	if _, err := parseClasses("CRANE", twice, 3); err == nil || !strings.Contains(err.Error(), "give the id") {
		t.Errorf("two classes of one name: %v", err)
	}
	if got, err := parseClasses("cat", twice, 3); err != nil || !slices.Equal(got, []int{1}) {
		t.Errorf("a synonym beside two classes of one name: %v, %v", got, err)
	}
	if _, err := parseClasses("cat", nil, 4); err == nil || !strings.Contains(err.Error(), "no class names") {
		t.Errorf("without names: %v", err)
	}
}

func TestComplete(t *testing.T) {
	for _, c := range []struct{ words, want string }{
		{"|", "help sample"}, {"sa", "sample"}, {"completion|f", "fish"}, {"sample|--cfg-s", "--cfg-schedule"},
		{"sample|--dtype|", "f32 bf16"}, {"sample|--model|", ""}, {"help|ins", "inspect"}, {"--log-level|d", "debug"},
		{"sample|--dtype|b", "bf16"}, {"inspect|--log-f", "--log-format"}, {"inspect|mod", ""},
		{"sample|--dtype=b", "--dtype=bf16"}, {"sample|--dtype|=|b", "bf16"}, {"sample|--dtype|=", "f32 bf16"}, {"inspect|--config|dit-xl", "dit-xl/2"},
		{"sample|--sampler|", "ddpm ddim"}, {"convert|--kind|", "mar dit kl vq"}, {"bench|--format|", "benchstat"},
	} {
		code, out, _ := margo(append([]string{completeArg}, strings.Split(strings.TrimPrefix(c.words, "|"), "|")...)...)
		got := strings.Fields(out)
		for _, w := range strings.Fields(c.want) {
			if !slices.Contains(got, w) {
				t.Errorf("%q: %q lacks %q", c.words, got, w)
			}
		}
		if code != 0 || c.want == "" && len(got) > 0 {
			t.Errorf("%q: exit %d, %q", c.words, code, got)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script := ok(t, "completion", shell)
		path, err := exec.LookPath(shell)
		if err != nil {
			continue
		}
		cmd := exec.Command(path, "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s does not accept its script: %v: %s", shell, err, out)
		}
	}
}

func TestProgress(t *testing.T) {
	if got := (state{3, 8, 10 * time.Second, 30 * time.Second, 0.3}).text("images"); got != " 25%  3/8 images  3.33 s/image  30s left" {
		t.Errorf("%q", got)
	}
	if got := (state{8, 8, 3 * time.Second, 0, 2.5}).text("images"); got != "100%  8/8 images" {
		t.Errorf("%q", got)
	}
	for d, want := range map[time.Duration]string{400 * time.Millisecond: "0s", 59600 * time.Millisecond: "1m00s", 3725 * time.Second: "1h02m"} {
		if got := duration(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	// A bar, a message above it, and nothing of it in the end.
	var b buffer
	term := &console{w: &b}
	log := newLogger(term)
	p, err := newProgress("bar", "images", term, log)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	p.update(now, state{1, 4, time.Second, 3 * time.Second, 1})
	p.update(now.Add(time.Millisecond), state{2, 4, time.Second, 3 * time.Second, 1}) // too soon
	log.Warn("careful")
	p.finish()
	want := eraseLine + "[######------------------]  25%  1/4 images  1 images/s  3s left" + eraseLine + "warning: careful\n"
	if b.String() != want {
		t.Errorf("terminal got %q, want %q", b.String(), want)
	}
	// Log lines: none for short work, then one every ten seconds.
	var l buffer
	if p, err = newProgress("auto", "images", &console{w: &l}, newLogger(&l)); err != nil {
		t.Fatal(err)
	}
	for s := range 25 {
		p.update(now.Add(time.Duration(s)*time.Second), state{s, 25, time.Duration(s) * time.Second, time.Second, 1})
	}
	if n := strings.Count(l.String(), "\n"); n != 2 {
		t.Errorf("%d lines in 25 s: %q", n, l.String())
	}
}

func TestPlaceholder(t *testing.T) {
	for in, want := range map[string][2]string{
		"plain": {"plain", ""}, "`N`|of them": {"of them", "N"}, "run `N`|of them": {"run N of them", "N"}, "the `FILE` to read": {"the FILE to read", "FILE"},
	} {
		if text, value := placeholder(in); text != want[0] || value != want[1] {
			t.Errorf("%q: %q, %q", in, text, value)
		}
	}
}
