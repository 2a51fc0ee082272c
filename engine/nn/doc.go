// Package nn has the layers that margo's models are made of: Linear, LayerNorm
// and the pre-norm Transformer block. A layer is a struct of parameters tagged
// with the keys of the published checkpoints, and a few lines over engine.Ctx.
//
// The residual stream is F32. GEMM and attention operands are in the context's
// compute dtype: norms write them, and the epilogues of GEMMs go back to F32.
package nn
