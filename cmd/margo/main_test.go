package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

const (
	fashion   = "../../models/fashion-mar.safetensors"
	fashionKL = "../../models/fashion-kl.safetensors"
	tiny      = "../../testdata/goldens/mar_tiny.safetensors"
	tinyPTH   = "../../testdata/goldens/mar_tiny.pth"
)

// buffer is a bytes.Buffer that the signal handler may write to meanwhile.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// margo runs a command line in this process.
func margo(args ...string) (code int, stdout, stderr string) {
	var out, err buffer
	code = run(args, &out, &err, make(chan os.Signal))
	return code, out.String(), err.String()
}

// ok runs a command line that must succeed.
func ok(t *testing.T, args ...string) (stdout string) {
	t.Helper()
	code, out, err := margo(args...)
	if code != exitOK {
		t.Fatalf("margo %s: exit %d: %s", strings.Join(args, " "), code, err)
	}
	return out
}

// quick is a sample command that takes a moment on any device.
func quick(args ...string) []string {
	return append([]string{"sample", "--model", fashion, "--iters", "1", "--head-steps", "2", "--quiet"}, args...)
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range list {
		names = append(names, f.Name())
	}
	return names
}

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	put := func(name string, data []byte) string {
		if err := os.WriteFile(at(name), data, 0o666); err != nil {
			t.Fatal(err)
		}
		return at(name)
	}
	whole, err := os.ReadFile(tiny)
	if err != nil {
		t.Fatal(err)
	}
	cut := put("cut.safetensors", whole[:len(whole)/2])
	text := put("text.pth", []byte("this is no checkpoint at all, just some text"))
	huge := put("huge.safetensors", append([]byte{0, 0, 0, 0, 0, 10, 0, 0}, whole[8:64]...))
	none := at("none.safetensors")
	taken := put("taken", nil)
	sampleWith := func(args ...string) []string {
		return append([]string{"sample", "--model", fashion, "--out", at("out")}, args...)
	}
	for _, c := range []struct {
		args []string
		code int
		want string // in the message
	}{
		{[]string{"smaple"}, 2, "did you mean sample?"},
		{[]string{"help", "smaple"}, 2, "did you mean sample?"},
		{[]string{"--nothing"}, 2, "--nothing"},
		{[]string{"sample"}, 2, "--model FILE is needed"},
		{sampleWith("--itres", "3"), 2, "did you mean --iters?"},
		{sampleWith("--iters"), 2, "--iters needs a value"},
		{sampleWith("--iters", "many"), 2, `--iters: "many": not a whole number`},
		{sampleWith("--iters", "0"), 2, "--iters is 0"},
		{sampleWith("--head-steps", "1001"), 2, "--head-steps is 1001, it must be between 2 and 1000"},
		{sampleWith("--head-steps", "1"), 2, "--head-steps is 1,"},
		{sampleWith("--max-timestep", "1000"), 2, "--max-timestep is 1000, it must be between 1 and 999"},
		{sampleWith("--max-timestep", "0"), 2, "--max-timestep is 0,"},
		{sampleWith("--latent-scale", "-1"), 2, "--latent-scale is -1"},
		{[]string{"sample", "--model", fashion, "-n", "2000000000", "--out", at("sheet.png")}, 1, "use a folder or .npz"},
		{sampleWith("--max-timestep", "50"), 2, "100 head steps don't fit"},
		{sampleWith("--cfg", "-1"), 2, "--cfg is -1"},
		{sampleWith("--cfg", "NaN"), 2, "--cfg is NaN"},
		{sampleWith("--temperature", "-0.5"), 2, "--temperature"},
		{sampleWith("--cfg-schedule", "cosine"), 2, "linear or constant"},
		{sampleWith("--dtype", "fp8"), 2, "f32 or bf16"},
		{sampleWith("--head-weights", "fp8"), 2, "needs --dtype bf16, not f32"},
		{sampleWith("--head-weights", "fp4", "--dtype", "bf16"), 2, `is "fp4", it must be fp8`},
		{[]string{"bench", "--model", "mar-base", "--dtype", "bf16,f32", "--head-weights", "fp8"}, 2, "needs --dtype bf16, not f32"},
		{[]string{"sample", "--model", filepath.Join(goldens, "dit_tiny.safetensors"), "--head-weights", "fp8", "--dtype", "bf16", "--tokenizer", fashion}, 2, "--head-weights"},
		{sampleWith("--device", "tpu"), 2, `"tpu" is not a device`},
		{sampleWith("--device", "cuda:0"), 1, "no CUDA device"},
		{sampleWith("--threads", "0"), 2, "--threads is 0"},
		{sampleWith("--batch", "0"), 2, "--batch is 0"},
		{sampleWith("-n", "0"), 2, "-n is 0"},
		{sampleWith("--first-index", "-1"), 2, "--first-index"},
		{sampleWith("-n", "2147483648"), 2, "-n is 2147483648, it must be between 1 and 2147483647"},
		{sampleWith("--seed", "-1"), 2, `--seed: "-1": not a whole number from 0 on`},
		{sampleWith("--cfg", "x"), 2, `--cfg: "x": not a number`},
		{sampleWith("--quiet=maybe"), 2, `--quiet: "maybe": neither true nor false`},
		{[]string{"selftest", "--only", ""}, 2, "--only is empty"},
		{sampleWith("--classes", "10"), 2, "classes 0 to 9"},
		{sampleWith("--classes", "3-1"), 2, "3-1 runs backwards: write 1-3"},
		{sampleWith("--classes", "1,,2"), 2, "empty item"},
		{sampleWith("--classes", "sneker"), 2, "did you mean sneaker?"},
		{sampleWith("--uncond", "--classes", "1"), 2, "leave out --classes"},
		{sampleWith("--uncond", "--cfg", "2"), 2, "leave out --cfg"},
		{sampleWith("--image", fashion), 2, "go together"},
		{sampleWith("--image", text, "--mask", text), 3, "neither PNG nor JPEG"},
		{sampleWith("--progress", "dots"), 2, "auto, bar, log or off"},
		{sampleWith("extra"), 2, `what is "extra"?`},
		{sampleWith("--log-level", "loud"), 2, "--log-level"},
		{sampleWith("--log-format", "xml"), 2, "--log-format"},
		{sampleWith("--tokenizer", none), 3, "none.safetensors"},
		{sampleWith("--tokenizer", fashion), 3, "holds a MAR, not a tokenizer"},
		{[]string{"sample", "--model", fashionKL, "--out", at("out")}, 3, "holds a tokenizer, not a MAR"},
		{[]string{"sample", "--model", tiny, "--out", at("out")}, 2, "pass --tokenizer"},
		{[]string{"sample", "--model", tiny, "--tokenizer", fashionKL, "--out", at("out")}, 2, "stride 4"},
		{[]string{"sample", "--model", tinyPTH, "--out", at("out")}, 2, "--heads"},
		{[]string{"sample", "--model", none, "--out", at("out")}, 3, "none.safetensors"},
		{[]string{"sample", "--model", cut, "--out", at("out")}, 3, "cut.safetensors"},
		{[]string{"sample", "--model", fashion, "--out", at("x.jpg")}, 2, ".jpg files are not written"},
		{[]string{"sample", "--model", fashion, "--out", ""}, 2, "--out is empty"},
		{[]string{"sample", "--model", fashion, "--out", at("no/such/x.png")}, 1, "there is no folder"},
		{[]string{"sample", "--model", fashion, "--out", taken}, 1, "a file has that name"},
		{[]string{"inspect"}, 2, "name one file"},
		{[]string{"inspect", none}, 3, "none.safetensors"},
		{[]string{"inspect", text}, 3, "neither safetensors nor"},
		{[]string{"inspect", cut}, 3, "cut.safetensors"},
		{[]string{"inspect", huge}, 3, "huge.safetensors"},
		{[]string{"inspect", dir}, 3, dir},
		{[]string{"inspect", "--config", "mar-bse"}, 2, "did you mean mar-base?"},
		{[]string{"inspect", "--config", "mar-base", "--heads", "3"}, 2, "--heads is about a file"},
		{[]string{"inspect", "--config", text}, 3, "text.pth"},
		{[]string{"inspect", "--config", none}, 3, "none.safetensors"},
		{[]string{"inspect", tiny, "--which", "model"}, 2, "one state"},
		{[]string{"convert", tiny}, 2, "IN OUT"},
		{[]string{"convert", text, at("o.safetensors")}, 3, "text.pth"},
		{[]string{"convert", tinyPTH, at("o.safetensors")}, 2, "--heads"},
		{[]string{"convert", tiny, at("o.safetensors"), "--dtype", "f8"}, 2, "f32 or bf16"},
		{[]string{"convert", tiny, at("o.safetensors"), "--kind", "gan"}, 2, "mar or dit or kl"},
		{[]string{"convert", tiny, at("o.safetensors"), "--set", "cfg"}, 2, "KEY=VALUE"},
		{[]string{"convert", tiny, at("o.safetensors"), "--latent-scale", "0"}, 2, "--latent-scale"},
		{[]string{"convert", tiny, at("o.safetensors"), "--set", "head_steps=1"}, 2, "head_steps is 1, it must be between 2 and 1000"},
		{[]string{"convert", tiny, at("o.safetensors"), "--set", "max_timestep=0"}, 2, "max_timestep is 0, it must be between 1 and 999"},
		{[]string{"convert", tiny, dir}, 2, "is a folder"},
		{[]string{"convert", tiny, at("o.pth")}, 2, "written as .safetensors"},
		{[]string{"convert", tiny, at("no/such/o.safetensors")}, 1, "there is no folder"},
		{[]string{"devices", "all"}, 2, "no arguments"},
		{[]string{"version", "all"}, 2, "no arguments"},
		{[]string{"completion", "csh"}, 2, "bash, zsh or fish"},
	} {
		code, out, msg := margo(c.args...)
		line := strings.TrimSuffix(msg, "\n")
		if code != c.code || !strings.Contains(msg, c.want) {
			t.Errorf("margo %s: exit %d, want %d with %q: %s", strings.Join(c.args, " "), code, c.code, c.want, msg)
		}
		if !strings.HasPrefix(line, "margo: ") || strings.Contains(line, "\n") || strings.Contains(line, "internal error") {
			t.Errorf("margo %s: not one clear line: %q", strings.Join(c.args, " "), msg)
		}
		if out != "" && c.args[0] != "inspect" {
			t.Errorf("margo %s: output beside an error: %q", strings.Join(c.args, " "), out)
		}
	}
	// Nothing is left by a command that failed.
	for _, name := range files(t, dir) {
		switch name {
		case "cut.safetensors", "text.pth", "huge.safetensors", "taken":
		default:
			t.Errorf("left behind: %s", name)
		}
	}
}

func TestNotWritable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may write anywhere")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"x.png", "x.npz", "x"} {
		if code, _, msg := margo(quick("--out", filepath.Join(dir, name))...); code != exitFailed || !strings.Contains(msg, "permission denied") {
			t.Errorf("%s: exit %d: %s", name, code, msg)
		}
	}
}

func TestPanicIsReported(t *testing.T) {
	saved := commands
	defer func() { commands = saved }()
	commands = append(commands[:len(commands):len(commands)], panickingCommand)
	code, _, msg := margo("panic")
	if code != exitFailed || !strings.Contains(msg, "internal error: two lines") || strings.Contains(msg, "goroutine") {
		t.Errorf("exit %d: %s", code, msg)
	}
	if _, _, msg = margo("--log-level", "debug", "panic"); !strings.Contains(msg, "goroutine") {
		t.Errorf("no stack: %s", msg)
	}
}

func TestHelp(t *testing.T) {
	top := ok(t)
	if top != ok(t, "--help") || top != ok(t, "help") {
		t.Error("margo, margo --help and margo help differ")
	}
	for _, f := range commands {
		cmd := f()
		if !strings.Contains(top, "\n  "+cmd.Name+" ") {
			t.Errorf("%s is not listed", cmd.Name)
		}
		text := ok(t, cmd.Name, "--help")
		if text != ok(t, "help", cmd.Name) || text != ok(t, cmd.Name, "-h") {
			t.Errorf("%s: three ways to ask for help differ", cmd.Name)
		}
		body, examples, found := strings.Cut(text, "\nExample")
		if !found || !strings.Contains(examples, "margo "+cmd.Name) {
			t.Errorf("%s: no example", cmd.Name)
		}
		for _, line := range strings.Split(body, "\n") {
			if len([]rune(line)) > helpWidth {
				t.Errorf("%s: wider than %d: %q", cmd.Name, helpWidth, line)
			}
		}
		for _, f := range cmd.Flags {
			if name := dashed(f.Names()[0]); !strings.Contains(body, "\n  "+name) {
				t.Errorf("%s: %s is not explained", cmd.Name, name)
			}
		}
	}
	if text := ok(t, "help", "selftest"); !strings.Contains(text, "\n  memory       more than the device has") {
		t.Errorf("selftest: the list of its parts has become a paragraph:\n%s", text)
	}
	if v := ok(t, "--version"); !strings.HasPrefix(v, "margo ") || v != ok(t, "version") {
		t.Errorf("version: %q", v)
	}
}
