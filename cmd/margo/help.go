package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
)

const (
	helpWidth  = 80
	helpColumn = 28 // where descriptions begin
)

// Package cli prints help through these variables only.
func init() {
	show := func(w io.Writer, data any) {
		switch d := data.(type) {
		case *cli.App:
			appHelp(w, d)
		case *cli.Command:
			commandHelp(w, d)
		}
	}
	cli.HelpPrinter = func(w io.Writer, _ string, data any) { show(w, data) }
	cli.HelpPrinterCustom = func(w io.Writer, _ string, data any, _ map[string]any) { show(w, data) }
	cli.VersionPrinter = func(c *cli.Context) { fmt.Fprintf(c.App.Writer, "margo %s\n", c.App.Version) }
	cli.HelpFlag = &cli.BoolFlag{Name: "help", Aliases: []string{"h"}, Usage: "show this text", DisableDefaultText: true}
	cli.VersionFlag = &cli.BoolFlag{Name: "version", Aliases: []string{"v"}, Usage: "print the version", DisableDefaultText: true}
}

func appHelp(w io.Writer, app *cli.App) {
	fmt.Fprintf(w, "margo: %s\n\n", app.Usage)
	paragraph(w, app.Description)
	fmt.Fprintf(w, "\nUsage:\n  margo COMMAND [flags]\n\nCommands:\n")
	for _, c := range app.Commands {
		if !c.Hidden && c.Name != "help" {
			entry(w, c.Name, c.Usage)
		}
	}
	fmt.Fprintf(w, "\nFlags of every command:\n")
	flagHelp(w, app.Flags)
	fmt.Fprintf(w, "\nExit codes: 0 ok, 1 failed or over a limit, 2 wrong usage, 3 bad file,\n130 interrupted. \"margo COMMAND --help\" explains a command, with an example.\n")
}

// commandHelp prints a command: Usage is its one line, UsageText the synopsis,
// Description its paragraphs; the examples come last, from the line that
// begins with "Example".
func commandHelp(w io.Writer, cmd *cli.Command) {
	fmt.Fprintf(w, "margo %s: %s\n", cmd.Name, cmd.Usage)
	synopsis := cmd.UsageText
	if synopsis == "" {
		synopsis = "margo " + cmd.Name
	}
	fmt.Fprintf(w, "\nUsage:\n")
	for _, l := range strings.Split(synopsis, "\n") {
		fmt.Fprintf(w, "  %s\n", l)
	}
	text, examples, _ := strings.Cut(cmd.Description, "\nExample")
	for _, p := range strings.Split(strings.Trim(text, "\n"), "\n\n") {
		if p != "" {
			fmt.Fprintln(w)
			block(w, p)
		}
	}
	// Flags under their category's heading, in the order they were written.
	var order []string
	groups := map[string][]cli.Flag{}
	for _, f := range cmd.Flags {
		if v, ok := f.(cli.VisibleFlag); ok && !v.IsVisible() || slices.Contains(f.Names(), "help") {
			continue
		}
		name := "Flags"
		if c, ok := f.(cli.CategorizableFlag); ok && c.GetCategory() != "" {
			name = c.GetCategory()
		}
		if groups[name] == nil {
			order = append(order, name)
		}
		groups[name] = append(groups[name], f)
	}
	for _, name := range order {
		fmt.Fprintf(w, "\n%s:\n", name)
		flagHelp(w, groups[name])
	}
	fmt.Fprintf(w, "\nFlags of every command: --log-level, --log-format (margo --help), --help.\n")
	if examples != "" {
		fmt.Fprintf(w, "\nExample%s\n", strings.TrimRight(examples, "\n"))
	}
}

func flagHelp(w io.Writer, flags []cli.Flag) {
	for _, f := range flags {
		d, ok := f.(cli.DocGenerationFlag)
		if !ok || slices.Contains(f.Names(), "help") || slices.Contains(f.Names(), "version") {
			continue
		}
		usage, value := placeholder(d.GetUsage())
		var names []string
		for _, n := range f.Names() {
			names = append(names, dashed(n))
		}
		label := strings.Join(names, ", ")
		if d.TakesValue() {
			if value == "" {
				value = "VALUE"
			}
			label += " " + value
			if def := strings.Trim(d.GetDefaultText(), `"`); def != "" {
				usage += " (default: " + def + ")"
			}
		}
		entry(w, label, usage)
	}
}

// placeholder takes the `NAME` of a flag's value out of its usage text. A bar
// after it ends the name; where the text begins with "`NAME`|", the name is not
// part of the sentence.
func placeholder(usage string) (text, value string) {
	before, rest, ok := strings.Cut(usage, "`")
	if !ok {
		return usage, ""
	}
	value, after, _ := strings.Cut(rest, "`")
	if sentence, ok := strings.CutPrefix(after, "|"); ok {
		if before == "" {
			return sentence, value
		}
		after = " " + sentence
	}
	return before + value + after, value
}

// entry prints a label and, from helpColumn on, its wrapped text.
func entry(w io.Writer, label, text string) {
	line := "  " + label
	if utf8.RuneCountInString(line) > helpColumn-2 {
		fmt.Fprintln(w, line)
		line = ""
	}
	for _, l := range wrap(text, helpWidth-helpColumn) {
		fmt.Fprintf(w, "%-*s%s\n", helpColumn, line, l)
		line = ""
	}
}

// block prints a paragraph, or a list as it is: lines that all begin with spaces.
func block(w io.Writer, text string) {
	lines := strings.Split(text, "\n")
	if slices.ContainsFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "  ") }) {
		paragraph(w, text)
		return
	}
	for _, l := range lines {
		fmt.Fprintln(w, l)
	}
}

func paragraph(w io.Writer, text string) {
	for _, l := range wrap(text, helpWidth) {
		fmt.Fprintln(w, l)
	}
}

func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
