// Command margo samples images from MAR checkpoints (Autoregressive Image
// Generation without Vector Quantization, Li et al. 2024), inspects and
// converts them, and checks and times itself.
//
// One file per command; a command is a function in the list of commands.go.
// Exit codes: 0 ok, 1 failed or over a limit, 2 usage, 3 bad file,
// 130 interrupted.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup does
		signal.Notify(signals, syscall.SIGHUP) // the terminal is gone: nothing half-written stays
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, signals))
}
