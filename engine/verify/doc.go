// Package verify replays recorded traces of the authors' PyTorch code: every
// random draw is taken from the trace, every stage is fed the recorded inputs,
// and the results are compared. It is how margo shows that it computes the
// authors' function and not something near it.
//
// A stage runs on three sides: the device under test, the float64 oracle
// (ref.Exact) and the oracle in the device's precision (ref.Rounded). With g the
// golden, e the exact and r the rounded result, and |·| the largest absolute
// value, a device may miss g by
//
//	max(2·|g − e|, 1e-6·|g|)                            F32
//	2·|r − e| + |g − e| + one rounding of the output    BF16
//
// where F32 also allows 2·|r − e|: the golden's own distance is one sample of
// what F32 does to the stage, and a lucky one would make the limit arbitrary. A
// loop that runs free in BF16 is reported and not judged, for the reason that
// design and documentation give: the first head step amplifies an error of ε
// hundreds of times.
package verify
