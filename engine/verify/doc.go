// Package verify replays recorded traces of the authors' PyTorch code: every
// random draw is taken from the trace, every stage is fed the recorded inputs,
// and the results are compared. It is how margo shows that it computes the
// authors' function and not something near it. Tokenizers are replayed against
// recordings of the libraries that their layouts come from, too.
//
// A VQ tokenizer's choice of codes is judged by their distances from the latents:
// F32 cannot tell codes that are nearly as near, and need not choose the same.
//
// A stage runs on the device under test, on the float64 oracle (ref.Exact) and
// on the oracle that rounds (ref.Rounded), in the device's precision and in F32.
// Below g is the golden, e the exact result, r the rounded one, s the one
// rounded in F32, and |·| the largest absolute value. Two things are judged.
//
// First the recording itself. The oracle runs the same weights and model code
// as the device: were they wrong, it would be wrong in the same way, and no
// distance between the two would tell. But g was computed in F32, so
//
//	|g − e| ≤ min(max(4·|s − e|, 1e-6·|g|), 0.01·|g|)
//
// holds unless g is of other weights or of another model; then the stage fails
// whatever the device does, also where the device is not judged.
//
// g and s are two F32 computations that differ in the order of their sums and
// in the last bit of functions: two samples of one error. Their largest elements
// differ little, and PyTorch's sums in blocks err less than s's one by one. So a
// small factor serves every stage, however much it amplifies. The most that is
// seen in the goldens is 2.05; 4 is twice that. Where few roundings happen s may
// have none by luck, or because e itself is short (class embedding; the log
// variance, which takes seven operations from the network's output): 1e-6 is 17
// roundings of the largest value, where 2.1 are the most seen. A stage that F32
// blurs by more than 1 % shows nothing, however it is explained; the most seen
// is 0.02 %. Recordings must be made in F32, without TF32.
//
// Largest |g − e|/|g| of the goldens, and of its ratio to |s − e|/|g|:
//
//	timestep embedding (t·f is rounded at up to 999)  4.1e-5  1.0
//	time MLP                                          9.4e-6  1.0
//	encoder, decoder and their blocks                 6.0e-7  1.4
//	head's network and reverse step                   4.4e-7  1.3 (log variance: 10, of 1.2e-8)
//	head steps and loops, untrained                   5.7e-7  2.0
//	head steps and loops, trained, 10 or 100 steps    2.0e-4  2.1
//	whole runs                                        2.0e-4  1.2
//	tokenizers                                        1.8e-6  1.4
//
// Then the device: it may miss g by
//
//	max(2·|g − e|, 2·|r − e|, 1e-6·|g|)                 F32
//	2·|r − e| + |g − e| + one rounding of the output    BF16
//
// In F32 r counts too: the golden's own distance is one sample of what F32 does
// to the stage, and a lucky one would make the limit arbitrary. A loop that runs
// free in BF16 is reported and not judged, for the reason that design and
// documentation give: the first head step amplifies an error of ε hundreds of
// times.
package verify
