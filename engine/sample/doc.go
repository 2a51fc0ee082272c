// Package sample turns requests into images with a MAR model: the loop of
// mar.py sample_tokens over ragged batches, without padding and without work
// whose result is thrown away (P33, P34, P36, P52–P55, P104).
//
// Nothing that a run does depends on computed values, so the whole schedule of
// a batch (orders, masks, guidance, row lists) is made on the host before the
// first kernel, and a dry run on a counting device tells how much memory it
// takes.
//
// Every draw is keyed by seed, image index, token and step. An image depends on
// nothing else: not on the batch it is made in nor on the images beside it.
package sample
