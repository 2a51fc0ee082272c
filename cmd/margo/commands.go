package main

import "github.com/urfave/cli/v2"

// commands lists the subcommands in the order of the help text. To add one,
// write a file NAME.go with a func NAMECommand() *cli.Command and name it here.
var commands = []func() *cli.Command{
	sampleCommand,
	encodeCommand,
	decodeCommand,
	verifyCommand,
	benchCommand,
	inspectCommand,
	convertCommand,
	selftestCommand,
	devicesCommand,
	completionCommand,
}
