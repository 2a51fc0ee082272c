// Package diffusion has the noise schedules of improved DDPM, respacing, and
// the coefficients of the reverse step, all in float64 and entry by entry what
// create_diffusion (MAR and DiT, diffusion/__init__.py) computes.
//
// The network predicts ε and an interpolation v of the log variance between the
// posterior's and β's (learned range; P8, P13–P16). x₀ is never clipped.
package diffusion
