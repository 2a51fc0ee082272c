package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"

	"github.com/sirupsen/logrus"
)

func newLogger(w io.Writer) *logrus.Logger {
	return &logrus.Logger{Out: w, Formatter: plainFormatter{}, Hooks: logrus.LevelHooks{}, Level: logrus.InfoLevel}
}

func configureLog(log *logrus.Logger, level, format string) error {
	l, err := logrus.ParseLevel(level)
	if err != nil {
		return usagef("--log-level: %q is not a level; use debug, info, warn or error", level)
	}
	log.SetLevel(l)
	switch format {
	case "text":
		log.SetFormatter(plainFormatter{})
	case "json":
		log.SetFormatter(&logrus.JSONFormatter{})
	default:
		return usagef("--log-format: %q is not a format; use text or json", format)
	}
	return nil
}

// plainFormatter writes what a person wants to read: the message, its level
// unless that is info, then the fields.
type plainFormatter struct{}

func (plainFormatter) Format(e *logrus.Entry) ([]byte, error) {
	var b bytes.Buffer
	if e.Level != logrus.InfoLevel {
		fmt.Fprintf(&b, "%s: ", e.Level)
	}
	b.WriteString(e.Message)
	keys := make([]string, 0, len(e.Data))
	for k := range e.Data {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		fmt.Fprintf(&b, " %s=%v", k, e.Data[k])
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}
