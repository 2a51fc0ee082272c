package main

import (
	"fmt"
	"io"
	"os"
	"sync"
)

// console is standard error with, on a terminal, one line of status at the
// bottom. Messages go above it: it is erased first, and drawn again by the next
// SetStatus. Writes from several goroutines don't mix.
type console struct {
	mu     sync.Mutex
	w      io.Writer
	status bool
}

const eraseLine = "\r\x1b[K"

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status {
		io.WriteString(c.w, eraseLine)
		c.status = false
	}
	return c.w.Write(p)
}

// SetStatus replaces the status line; "" removes it.
func (c *console) SetStatus(s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s != "" || c.status {
		fmt.Fprintf(c.w, "%s%s", eraseLine, s)
	}
	c.status = s != ""
}

// IsTerminal reports whether a person looks at it.
func (c *console) IsTerminal() bool {
	f, ok := c.w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	s, err := f.Stat()
	if err != nil || s.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	// /dev/null is a character device too.
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(s, null)
}
