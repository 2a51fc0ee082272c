// Package ref is the oracle: an engine.Device in plain Go that defines what
// every op means. It is written to be read next to a formula, not to be fast.
//
// It computes in one of two modes. Exact works in float64 and rounds nothing:
// what is uploaded is what the bytes say, and every intermediate result keeps
// all 53 bits whatever dtype its tensor declares. Rounded works as a careful
// device would: every scalar operation is rounded to float32 (sums one term
// after the other), exp, log, erf, sin and their like are computed in float64
// and rounded once, GEMM operands that meet a BF16 weight are rounded to BF16,
// and results are rounded to the dtype of the tensor that takes them. The
// distance between the two modes is the error that rounding itself causes; the
// limits of package conformance come from it.
//
// Memory is made of slots, one float64 for every two bytes: the element at
// byte b of a buffer lives in slot b/2, so any dtype fits, and so do arenas,
// slices and offsets. Reading a location with another dtype than it was
// written with is not supported: it finds NaN or stale numbers.
//
// Mistakes that a real device punishes with crashes are errors here: use after
// free, reading indices never written, buffers of another device, offsets and
// indices out of range. Fresh memory is NaN.
package ref
