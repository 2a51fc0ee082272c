// Package dit is "Scalable Diffusion Models with Transformers" at inference: a
// transformer that denoises all tokens of an image at once, at every step of the
// reverse process (Peebles & Xie 2023; DiT models.py). It is the rival that MAR is
// compared with (P12, P83).
//
// Each stage is a method of Model, so that a test can feed any of them:
//
//	timesteps, classes → Time, Class → Cond → Modulations
//	tokens → Embed → Blocks → Final → ε and v of every token
//
// Nothing but the tokens depends on the image: modulations are a table of class and
// timestep, computed for many steps at once. Both halves of a guided pair begin with
// the same tokens, which are embedded once.
//
// A token's channels are ordered (c, py, px) as Patchify has them. The final layer's
// rows are permuted on loading (FinalOrder) so that ε and v of the guided channels
// come first, then those of the others: engine.DiffusionStep takes each part as it is.
package dit
