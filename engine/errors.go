package engine

import (
	"fmt"
	"strings"
)

// Kind classifies an error. It is itself an error, so that
// errors.Is(err, engine.OutOfMemory) works on any wrapped *Error.
type Kind uint8

const (
	Invalid     Kind = iota + 1 // arguments, shapes or settings that cannot work
	Unsupported                 // the device has no such op, dtype or combination
	OutOfMemory                 // the device or host cannot hold what was asked for
	DeviceFault                 // the device failed; its state is unknown
	CommFault                   // a collective or a peer failed
	IO                          // a file could not be read, parsed or written
	Cancelled                   // the caller asked to stop
	Internal                    // a broken invariant of margo itself
)

var kindNames = [...]string{"unknown", "invalid", "unsupported", "out of memory", "device fault", "communication", "I/O", "cancelled", "internal"}

// Error returns the kind's name.
func (k Kind) Error() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Error is the one error type of margo. Op is what was being done ("gemm",
// "open weights.safetensors"), Shapes the shapes involved, if any.
type Error struct {
	Op     string
	Kind   Kind
	Device string
	Shapes string
	Err    error
}

// Error formats as "op (device) [shapes]: kind: cause".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Device != "" {
		fmt.Fprintf(&b, " (%s)", e.Device)
	}
	if e.Shapes != "" {
		fmt.Fprintf(&b, " [%s]", e.Shapes)
	}
	if e.Kind != 0 && e.Kind != Invalid && e.Kind != IO {
		fmt.Fprintf(&b, ": %s", e.Kind.Error())
	}
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is this error's kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Errorf makes an *Error for op of the given kind; the cause is formatted
// (and wrapped, with %w) like fmt.Errorf.
func Errorf(op string, k Kind, format string, args ...any) *Error {
	return &Error{Op: op, Kind: k, Err: fmt.Errorf(format, args...)}
}
