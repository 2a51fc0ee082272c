// Package conformance decides whether a device is finished. It holds a table
// of cases, each an op with shapes, dtypes and data, and runs a device through
// them in several modes:
//
//	oracle       results are as near to the float64 oracle as rounding allows
//	exact        data made of small integers, so that every sum is exact: the
//	             result has one right value, bit for bit
//	nan          NaN and Inf go where they should and nowhere else
//	guards       nothing outside the outputs is written, and nothing outside the
//	             inputs is read: every tensor lies between sentinels, with
//	             sentinels in the gaps of its rows
//	determinism  the same call gives the same bits again
//	batch        rows, sequences or tokens computed in several calls give the
//	             same bits as in one
//	identical    two devices, such as one with 1 and one with 2 threads, give the
//	             same bits (Same)
//	failed       no case gives an error (this mode is never passed, only failed)
//	system       memory, copies, streams, events, graphs and refusals
//
// An op may be wrong by twice the error that rounding causes in the oracle
// itself, |Rounded − Exact|, plus one rounding of the output:
//
//	limit = 2·max|Rounded − Exact| + max|Exact|·u   u = 2^-24 (F32), 2^-9 (BF16)
//
// with the maxima over all elements of an output. Small outputs are too few to
// show what rounding can do, so their cases are repeated in the oracle with
// other data. BF16 outputs must also be unbiased, which tells rounding to
// nearest from truncation.
//
// In a test of a device:
//
//	conformance.Run(t, dev)
//
// Check does the same without package testing, Bench measures, and Support
// prints what a device supports. Whatever a device does not support is listed
// as skipped, never passed over in silence.
package conformance
