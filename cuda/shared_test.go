package cuda

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// process is margo, sampling one image on an emulated device that it shares with others.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	said bytes.Buffer // read after its end
	dir  string       // of its image alone
	gate string       // what it waits for, if it was told to
}

// twoProcesses: two processes sample on one device that has no room for both. The one that finds no memory in the midst of its work
// says what it asked, holds and finds free, and ends without a file; the other's image is that of a device of its own.
// A third is refused before it begins, while the memory is taken, and runs as soon as the one that had it was killed.
func twoProcesses(t *testing.T, program string) {
	shared := filepath.Join(t.TempDir(), "memory")
	start := func(memory uint64, pause int) *process {
		t.Helper()
		p := &process{t: t, dir: t.TempDir(), gate: filepath.Join(t.TempDir(), "go")}
		p.cmd = exec.Command(program, "sample", "--device", "emu:0", "--model", filepath.Join("..", "models", "fashion-mar.safetensors"),
			"--classes", "1", "-n", "1", "--batch", "1", "--iters", "2", "--head-steps", "2", "--out", filepath.Join(p.dir, "grid.png"))
		p.cmd.Env = append(os.Environ(), "MARGO_EMU_SHARED="+shared, fmt.Sprintf("MARGO_EMU_MEMORY=%d", memory))
		if pause > 0 {
			p.cmd.Env = append(p.cmd.Env, fmt.Sprintf("MARGO_EMU_PAUSE=%d:%s", pause, p.gate))
		} else {
			p.cmd.Env = append(p.cmd.Env, "MARGO_EMU_TRACE="+p.gate+".trace")
		}
		p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.cmd.Process.Kill() })
		return p
	}
	reached := func(p *process) {
		t.Helper()
		for range 2400 {
			if _, err := os.Stat(p.gate + ".reached"); err == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		p.cmd.Process.Kill()
		p.cmd.Wait()
		t.Fatalf("does not get to its launch in two minutes:\n%s", &p.said)
	}
	goOn := func(p *process) {
		t.Helper()
		if err := os.WriteFile(p.gate, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	image := func(p *process) []byte {
		t.Helper()
		if err := p.cmd.Wait(); err != nil {
			t.Fatalf("%v:\n%s", err, &p.said)
		}
		png, err := os.ReadFile(filepath.Join(p.dir, "grid.png"))
		if err != nil {
			t.Fatal(err)
		}
		return png
	}
	fails := func(p *process, says string) {
		t.Helper()
		p.cmd.Wait()
		if code := p.cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("exit code %d, want 1:\n%s", code, &p.said)
		}
		lines := strings.Split(strings.TrimSpace(p.said.String()), "\n")
		if last := lines[len(lines)-1]; !strings.HasPrefix(last, "margo: ") || !strings.Contains(last, says) {
			t.Errorf("the last line is %q, want one with %q", last, says)
		}
		if left, err := os.ReadDir(p.dir); err != nil || len(left) > 0 || strings.Contains(p.said.String(), "not freed") {
			t.Errorf("left %v (%v):\n%s", left, err, &p.said)
		}
	}
	// taken is what all processes hold of the device, those that have ended too: a slot of 512 bytes each, after 4096.
	taken := func() (n uint64) {
		t.Helper()
		table, err := os.ReadFile(shared)
		if err != nil {
			t.Fatal(err)
		}
		for at := 4096; at+8 <= len(table); at += 512 {
			n += binary.LittleEndian.Uint64(table[at:])
		}
		return n
	}
	const plenty = 8 << 30
	alone := start(plenty, 0)
	want := image(alone)
	if n := taken(); n != 0 {
		t.Errorf("%d bytes are taken after its end", n)
	}
	trace, err := os.ReadFile(alone.gate + ".trace")
	if err != nil {
		t.Fatal(err)
	}
	// Before the first attention a sample has its weights and tensors, and before the last kernel the workspace of its head too.
	at := strings.Index(string(trace), "kernel attention")
	if at < 0 {
		t.Fatalf("no attention in\n%s", trace)
	}
	early, last := bytes.Count(trace[:at], []byte("kernel ")), bytes.Count(trace, []byte("kernel "))-1
	var held [2]uint64
	for i, pause := range []int{early, last} {
		p := start(plenty, pause)
		reached(p)
		held[i] = taken()
		goOn(p)
		if !bytes.Equal(image(p), want) {
			t.Error("the image of a process that was stopped differs")
		}
	}
	need := held[1]
	if held[0] >= need {
		t.Fatalf("%d bytes are held early, %d late", held[0], need)
	}

	// Room for one, for what another holds early, and half of what that needs yet.
	memory := need + held[0] + (need-held[0])/2
	loser := start(memory, early)
	reached(loser)
	winner := start(memory, last)
	reached(winner)
	goOn(loser)
	fails(loser, "head_steps (emu:0): out of memory: ")
	if !told.MatchString(loser.said.String()) {
		t.Errorf("does not say what was asked, held, cached and free:\n%s", &loser.said)
	}
	fails(start(memory, 0), "not enough memory: ")
	goOn(winner)
	if !bytes.Equal(image(winner), want) {
		t.Error("the image of the process that had the memory differs")
	}

	killed := start(memory, last)
	reached(killed)
	if n := taken(); n != need {
		t.Errorf("%d bytes are taken, want %d", n, need)
	}
	if err := killed.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	killed.cmd.Wait()
	if !bytes.Equal(image(start(memory, 0)), want) {
		t.Error("the image after a process was killed differs")
	}
}
