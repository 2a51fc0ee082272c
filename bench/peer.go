package bench

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Peer is another implementation in a process of its own that answers JSON
// lines (bench/peers). One request is under way at a time, so that the sides of
// a comparison never run at once.
type Peer struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	err *tail
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
	return p, nil
}

// Call sends a request and decodes the answer into reply. An answer with
// "error" is an error, as is silence for longer than timeout, which ends the
// process.
func (p *Peer) Call(request map[string]any, reply any, timeout time.Duration) error {
	line, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		return p.dead(err)
	}
	timer := time.AfterFunc(timeout, p.kill)
	answer, err := p.out.ReadBytes('\n')
	if !timer.Stop() {
		return fmt.Errorf("peer: no answer to %v within %v", request["cmd"], timeout)
	}
	if err != nil {
		return p.dead(err)
	}
	var failed struct {
		Error string `json:"error"`
	}
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

// kill ends the process and its children: a compiler that torch.compile started
// would otherwise keep the pipe open.
func (p *Peer) kill() { syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }

func (p *Peer) dead(err error) error {
	p.kill()
	p.cmd.Wait()
	return fmt.Errorf("peer: ended: %w; its last words: %s", err, strings.TrimSpace(string(p.err.buf)))
}

// Close ends the process.
func (p *Peer) Close() error {
	p.in.Close()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(5 * time.Second):
		p.kill()
		return <-done
	}
}
