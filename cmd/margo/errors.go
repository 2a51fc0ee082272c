package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"margo/engine"
	"margo/engine/atomicfile"
)

// Exit codes of margo.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitFile        = 3
	exitInterrupted = 130
)

// exitError gives an error the exit code it ends the program with.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// usagef reports a command line that cannot be carried out.
func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// filef reports an input file that cannot be used.
func filef(format string, args ...any) error {
	return &exitError{exitFile, fmt.Errorf(format, args...)}
}

// failf reports a failure that neither the command line nor an input explains.
func failf(format string, args ...any) error {
	return &exitError{exitFailed, fmt.Errorf(format, args...)}
}

// exitCode is the code that err ends the program with. What the engine calls
// invalid is a setting that cannot work; what it calls I/O is a bad file, if it
// was not to be written.
func exitCode(err error) int {
	var e *exitError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, context.Canceled), errors.Is(err, engine.Cancelled):
		return exitInterrupted
	case errors.As(err, &e):
		return e.code
	case errors.Is(err, atomicfile.ErrWrite):
		return exitFailed
	case errors.Is(err, engine.IO):
		return exitFile
	case errors.Is(err, engine.Invalid):
		return exitUsage
	}
	return exitFailed
}

// oneLine keeps a message on one line, whatever a file's contents put into it.
func oneLine(s string) string {
	// Also U+0080 to U+009F: some terminals take U+009B for the beginning of a command.
	return strings.Join(strings.FieldsFunc(s, unicode.IsControl), " ")
}
