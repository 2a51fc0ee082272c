package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"margo/engine"
)

// Peer is another implementation in a process of its own that answers JSON
// lines (bench/peers). One request is under way at a time, so that the sides of
// a comparison never run at once.
type Peer struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
	err     *tail
	reaped  sync.Once
	waitErr error
}

// live holds the peers whose process has not been waited for.
var live sync.Map // *Peer → nil

// KillPeers ends all peers at once, for a program that is about to exit in the
// middle of its work. They have process groups of their own, so nobody else
// would: the terminal's signals do not reach them.
func KillPeers() {
	live.Range(func(p, _ any) bool {
		p.(*Peer).kill()
		return true
	})
}

// tail keeps the last bytes a process wrote to stderr, for error messages.
type tail struct{ buf []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - 2000; n > 0 {
		t.buf = t.buf[n:]
	}
	return len(p), nil
}

// StartPeer starts the process.
func StartPeer(name string, args ...string) (*Peer, error) {
	p := &Peer{cmd: exec.Command(name, args...), err: &tail{}}
	p.cmd.Stderr = p.err
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = 5 * time.Second // for a grandchild that keeps stderr open
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReaderSize(out, 1<<20)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	live.Store(p, nil)
	return p, nil
}

// PID is the process's number.
func (p *Peer) PID() int { return p.cmd.Process.Pid }

// Call sends a request and decodes the answer into reply; numbers that are not
// finite are left as reply has them. An answer with "error" is an error. So is
// silence for longer than timeout; that and the end of ctx, which is reported
// as engine.Cancelled, end the process.
func (p *Peer) Call(ctx context.Context, request map[string]any, reply any, timeout time.Duration) error {
	line, err := json.Marshal(request)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	stop := context.AfterFunc(limited, p.kill)
	var answer []byte
	if _, err = p.in.Write(append(line, '\n')); err == nil {
		answer, err = p.out.ReadBytes('\n')
	}
	if !stop() {
		p.kill()
		p.wait()
		if ctx.Err() != nil {
			return engine.Errorf("peer", engine.Cancelled, "%w", ctx.Err())
		}
		return fmt.Errorf("peer: no answer to %v within %v", request["cmd"], timeout)
	}
	if err != nil {
		p.kill()
		p.wait()
		return fmt.Errorf("peer: ended: %w; its last words: %s", err, strings.TrimSpace(string(p.err.buf)))
	}
	var failed struct {
		Error string `json:"error"`
	}
	answer = strictJSON(answer)
	if err := json.Unmarshal(answer, &failed); err != nil {
		return fmt.Errorf("peer: %q is not JSON: %w", answer[:min(len(answer), 200)], err)
	}
	if failed.Error != "" {
		return fmt.Errorf("peer: %v: %s", request["cmd"], failed.Error)
	}
	if reply == nil {
		return nil
	}
	return json.Unmarshal(answer, reply)
}

// strictJSON turns the bare NaN and Infinity that Python writes for floats,
// which JSON does not have, into null.
func strictJSON(line []byte) []byte {
	for _, sep := range []string{": ", ", ", "["} {
		for _, word := range []string{"NaN", "Infinity", "-Infinity"} {
			line = bytes.ReplaceAll(line, []byte(sep+word), []byte(sep+"null"))
		}
	}
	return line
}

// kill ends the process and its children: a compiler that torch.compile started
// would otherwise keep the pipe open. A process that was waited for is left
// alone, its number may be another's.
func (p *Peer) kill() {
	if _, ok := live.Load(p); ok {
		syscall.Kill(-p.PID(), syscall.SIGKILL)
	}
}

// wait collects the process's end, however often it is called.
func (p *Peer) wait() error {
	p.reaped.Do(func() {
		p.waitErr = p.cmd.Wait()
		live.Delete(p)
	})
	return p.waitErr
}

// Close ends the process.
func (p *Peer) Close() error {
	p.in.Close()
	timer := time.AfterFunc(5*time.Second, p.kill)
	defer timer.Stop()
	return p.wait()
}
