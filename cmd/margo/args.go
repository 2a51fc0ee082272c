package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// arrange puts a command line into the order that package cli can parse, which
// stops looking for flags at the first other argument: global flags, command,
// the command's flags, "--", the rest. So flags may stand anywhere, global
// ones too, and values may begin with a dash. Unknown commands and flags are
// reported here, with the nearest known name.
func arrange(app *cli.App, args []string) ([]string, error) {
	global := slices.Concat(app.Flags, []cli.Flag{cli.HelpFlag, cli.VersionFlag})
	var cmd *cli.Command
	var before, flags, rest []string
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "--":
			rest = append(rest, args[i+1:]...)
			i = len(args)
		case len(a) < 2 || a[0] != '-':
			if cmd == nil {
				if cmd = findCommand(app, a); cmd == nil {
					return nil, unknownCommand(app, a)
				}
				continue
			}
			rest = append(rest, a)
		default:
			name, _, valued := strings.Cut(strings.TrimLeft(a, "-"), "=")
			var f cli.Flag
			to := &flags
			if cmd != nil {
				f = findFlag(append(slices.Clone(cmd.Flags), cli.HelpFlag), name)
			}
			if f == nil {
				if f = findFlag(global, name); f == nil {
					return nil, unknownFlag(cmd, global, name)
				}
				to = &before
			}
			*to = append(*to, a)
			if d, ok := f.(cli.DocGenerationFlag); ok && d.TakesValue() && !valued {
				if i++; i == len(args) {
					return nil, usagef("%s needs a value", dashed(name))
				}
				*to = append(*to, args[i])
			}
		}
	}
	if cmd == nil {
		return before, nil
	}
	if cmd.Name == "help" && len(rest) > 0 && findCommand(app, rest[0]) == nil {
		return nil, unknownCommand(app, rest[0])
	}
	out := append(append(before, cmd.Name), flags...)
	if len(rest) > 0 {
		if cmd.Name != "help" {
			out = append(out, "--")
		}
		out = append(out, rest...)
	}
	return out, nil
}

func findCommand(app *cli.App, name string) *cli.Command {
	for _, c := range app.Commands {
		if c.HasName(name) {
			return c
		}
	}
	if name == "help" || name == "h" { // added by package cli
		return &cli.Command{Name: "help"}
	}
	return nil
}

func findFlag(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func unknownFlag(cmd *cli.Command, global []cli.Flag, name string) error {
	flags, who := global, "margo"
	if cmd != nil {
		flags, who = append(slices.Clone(cmd.Flags), global...), "margo "+cmd.Name
	}
	var names []string
	for _, f := range flags {
		names = append(names, f.Names()...)
	}
	near := suggest(name, names)
	if near != "" {
		near = dashed(near)
	}
	return usagef("%s has no flag %s%s (%s --help lists them)", who, dashed(name), didYouMean(near), who)
}

func commandNames(app *cli.App) []string {
	names := []string{"help"}
	for _, c := range app.Commands {
		names = append(names, c.Name)
	}
	return names
}

// dashed writes a flag's name as users type it.
func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

func didYouMean(name string) string {
	if name == "" {
		return ""
	}
	return "; did you mean " + name + "?"
}

// suggest is the candidate that needs the fewest edits to become name, "" if
// none is near.
func suggest(name string, candidates []string) string {
	best, at := "", 1+len(name)/3
	for _, c := range candidates {
		d := edits(strings.ToLower(name), strings.ToLower(c))
		if len(name) > 2 && (strings.HasPrefix(c, name) || strings.HasSuffix(c, "-"+name)) {
			d = min(d, 1) // a word of it
		}
		if d <= at && len(c) > 1 && (best == "" || d < at) {
			best, at = c, d
		}
	}
	return best
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, diag+1)
		}
	}
	return row[len(b)]
}
