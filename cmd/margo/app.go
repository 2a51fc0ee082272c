package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"margo/bench"
	"margo/engine/atomicfile"
)

const tagline = "images from masked autoregressive models, without vector quantization"

// run executes one command line and returns the exit code. The first signal
// cancels the command's context, which it notices between steps; the second
// ends the process at once.
func run(args []string, stdout, stderr io.Writer, signals <-chan os.Signal) (code int) {
	term := &console{w: stderr}
	stderr = term
	log := newLogger(stderr)
	out := &sink{w: stdout}
	stdout = out
	done := make(chan struct{})
	defer close(done)
	defer func() {
		if p := recover(); p != nil {
			atomicfile.RemoveUnfinished()
			fmt.Fprintf(stderr, "margo: internal error: %s: this is a bug in margo; --log-level debug shows where\n", oneLine(fmt.Sprint(p)))
			log.Debugf("%s", debug.Stack())
			code = exitFailed
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-signals:
		case <-done:
			return
		}
		log.Info("interrupted: stopping after the current step; once more to stop at once")
		cancel()
		select {
		case <-signals:
		case <-done:
			return
		}
		atomicfile.RemoveUnfinished()
		bench.KillPeers()
		os.Exit(exitInterrupted)
	}()

	if len(args) > 0 && args[0] == completeArg {
		for _, w := range complete(newApp(log), args[1:]) {
			fmt.Fprintln(stdout, w)
		}
		return exitOK
	}
	app := newApp(log)
	app.Writer, app.ErrWriter = stdout, stderr
	args, err := arrange(app, args)
	if err == nil {
		err = app.RunContext(ctx, append([]string{"margo"}, args...))
	}
	if err == nil {
		err = out.failure()
	}
	if err == nil {
		return exitOK
	}
	code = exitCode(err)
	if code == exitInterrupted {
		fmt.Fprintf(stderr, "margo: interrupted\n")
	} else {
		fmt.Fprintf(stderr, "margo: %s\n", oneLine(err.Error()))
	}
	return code
}

func newApp(log *logrus.Logger) *cli.App {
	app := &cli.App{
		Name:  "margo",
		Usage: tagline,
		Description: "margo runs MAR models, and DiT beside them, from the authors' checkpoints (.pth, .pt, .safetensors) " +
			"on a CPU or a GPU, exactly and fast. \"margo sample\" makes images, \"margo inspect\" shows what a file holds.",
		Version:                   version(),
		DisableSliceFlagSeparator: true, // values may contain commas
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "log-level", Value: "info", Usage: "`LEVEL`|least severe that is logged: debug, info, warn, error"},
			&cli.StringFlag{Name: "log-format", Value: "text", Usage: "`FORMAT`|of log lines: text, or json for machines"},
		},
		Metadata: map[string]any{"log": log},
		// Errors are printed once, by run.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   onUsageError,
		Before: func(c *cli.Context) error {
			return configureLog(log, c.String("log-level"), c.String("log-format"))
		},
		Action: func(c *cli.Context) error {
			if name := c.Args().First(); name != "" {
				return unknownCommand(c.App, name)
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, f := range append(commands, versionCommand) {
		cmd := f()
		cmd.HideHelpCommand = true
		cmd.OnUsageError = onUsageError
		app.Commands = append(app.Commands, cmd)
	}
	return app
}

func unknownCommand(app *cli.App, name string) error {
	return usagef("%q is not a command%s (margo --help lists them)", name, didYouMean(suggest(name, commandNames(app))))
}

// onUsageError turns the messages of package flag into margo's.
func onUsageError(c *cli.Context, err error, _ bool) error {
	msg := err.Error()
	if rest, ok := strings.CutPrefix(msg, "invalid boolean value "); ok {
		value, rest, _ := strings.Cut(rest, " for -")
		name, _, _ := strings.Cut(rest, ": ")
		return usagef("%s: %s: neither true nor false", dashed(name), value)
	}
	if rest, ok := strings.CutPrefix(msg, "invalid value "); ok {
		value, rest, _ := strings.Cut(rest, " for flag -")
		name, why, _ := strings.Cut(rest, ": ")
		if why == "parse error" {
			switch findFlag(c.Command.Flags, name).(type) {
			case *cli.IntFlag:
				why = "not a whole number"
			case *cli.Uint64Flag:
				why = "not a whole number from 0 on"
			default:
				why = "not a number"
			}
		}
		return usagef("%s: %s: %s", dashed(name), value, why)
	}
	return usagef("%s", msg)
}

// logger is the program's logger.
func logger(c *cli.Context) *logrus.Logger { return c.App.Metadata["log"].(*logrus.Logger) }

// version is the module's version and commit as the Go tool recorded them.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(12, len(s.Value))]):
			v += " " + s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true" && !strings.HasSuffix(v, "+dirty"):
			v += "+dirty"
		}
	}
	return v + " " + info.GoVersion
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "print the version",
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usagef("version takes no arguments")
			}
			cli.ShowVersion(c)
			return nil
		},
	}
}
