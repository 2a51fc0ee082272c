// Package bench measures margo and its peers side by side and reports it so
// that somebody else can repeat it: machine, commit, command, both sides from
// one interleaved run, medians and spread.
//
// Work is counted in FLOPs of the authors' algorithm (mult + add = 2), for both
// sides: work that margo avoids counts as done, so "share of peak" says how
// close the machine is to what the paper's operations would need at its
// measured peak. The FLOPs that margo really executes are printed beside.
package bench
