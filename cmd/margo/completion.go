package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"margo/bench"
)

// completeArg asks for completions: the words typed so far follow, the last of
// them unfinished (perhaps empty). All shells' scripts use it.
const completeArg = "__complete"

// values lists what flags with a fixed set of values accept.
var values = map[string][]string{
	"cfg-schedule": {"linear", "constant"},
	"order":        {"random", "raster", "confidence"},
	"code-sampler": {"gumbel", "inverse"},
	"dtype":        {"f32", "bf16"},
	"head-weights": {"fp8"},
	"device":       {"cpu", "cuda:0", "emu:0", "ref"},
	"against":      {"pytorch", "pytorch-eager", "pytorch-tuned"},
	"format":       bench.Formats,
	"progress":     {"auto", "bar", "log", "off"},
	"log-level":    {"debug", "info", "warn", "error"},
	"log-format":   {"text", "json"},
	"which":        {"ema", "model"},
	"config":       configNames(),
	"sampler":      {"ddpm", "ddim"},
	"cfg-channels": {"3", "all"},
	"kind":         {"mar", "dit", "kl", "vq"},
	"only":         {"table", "memory", "streams", "determinism", "traces", "fp8", "speed"},
	"ranks":        {"auto", "off"},
}

// complete lists the words that may stand for the last one; none means that
// the shell should offer files.
func complete(app *cli.App, words []string) []string {
	if len(words) == 0 {
		words = []string{""}
	}
	done, last := words[:len(words)-1], words[len(words)-1]
	var cmd *cli.Command
	flags := slices.Clone(app.Flags)
	for _, w := range done {
		if cmd == nil && !strings.HasPrefix(w, "-") {
			if cmd = findCommand(app, w); cmd != nil {
				flags = append(flags, cmd.Flags...)
			}
		}
	}
	// --flag=value, which bash cuts into "--flag", "=" and "value".
	var before string
	if flag, value, ok := strings.Cut(last, "="); ok && strings.HasPrefix(flag, "-") {
		done, last, before = append(slices.Clone(done), flag), value, flag+"="
	} else if last == "=" {
		last = ""
	} else if n := len(done); n > 1 && done[n-1] == "=" {
		done = done[:n-1]
	}
	var candidates []string
	switch {
	case strings.HasPrefix(last, "-"):
		for _, f := range append(flags, cli.HelpFlag) {
			candidates = append(candidates, dashed(f.Names()[0]))
		}
	case len(done) > 0 && strings.HasPrefix(done[len(done)-1], "-"):
		name := strings.TrimLeft(done[len(done)-1], "-")
		if d, ok := findFlag(flags, name).(cli.DocGenerationFlag); ok && d.TakesValue() {
			candidates = values[name]
		}
	case cmd == nil || cmd.Name == "help":
		candidates = commandNames(app)
	case cmd.Name == "completion":
		candidates = []string{"bash", "zsh", "fish"}
	}
	var out []string
	for _, c := range candidates {
		if strings.HasPrefix(c, last) {
			out = append(out, before+c)
		}
	}
	return out
}

var completionScripts = map[string]string{
	"bash": `# bash completion for margo
_margo() {
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <("${COMP_WORDS[0]}" ` + completeArg + ` "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _margo margo
`,
	"zsh": `#compdef margo
_margo() {
    local -a found
    found=("${(@f)$("${words[1]}" ` + completeArg + ` "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then
        compadd -a found
    else
        _files
    fi
}
if [[ "${funcstack[1]}" == "_margo" ]]; then
    _margo "$@" # loaded from a file _margo in the fpath
else
    compdef _margo margo
fi
`,
	"fish": `# fish completion for margo
complete -c margo -a '(margo ` + completeArg + ` (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
`,
}

func completionCommand() *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "print a script for completion in your shell",
		UsageText: "margo completion bash|zsh|fish",
		Description: `Load the script in the shell's start-up file, with margo in the PATH.

Examples:
  source <(margo completion bash)                            # in ~/.bashrc
  source <(margo completion zsh)                             # in ~/.zshrc, after compinit
  margo completion fish > ~/.config/fish/completions/margo.fish`,
		Action: func(c *cli.Context) error {
			script, ok := completionScripts[c.Args().First()]
			if !ok || c.NArg() != 1 {
				return usagef("name one shell: margo completion bash, zsh or fish")
			}
			_, err := c.App.Writer.Write([]byte(script))
			return err
		},
	}
}
