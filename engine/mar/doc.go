// Package mar is the model of "Autoregressive Image Generation without Vector
// Quantization" at inference: a bidirectional encoder that sees the known tokens
// only, a decoder over all positions, and a small diffusion network, the head,
// that samples each token given the decoder's output z at its position (P13–P21,
// P25–P32, P37–P41; models/mar.py, models/diffloss.py).
//
// The trunk works on ragged batches: a Layout names, for every sequence, the
// tokens it sees and the positions it is asked about, and there is no padding.
// Each stage is a method of Model, so that a test can feed any of them:
//
//	class rows → EmbedBuffer ┐
//	tokens     → EmbedTokens ┴→ EncoderInput → Encode → DecoderInput → Decode → z
//	z → Head.Cond, timesteps → Head.Time → Head.Steps → tokens
package mar
