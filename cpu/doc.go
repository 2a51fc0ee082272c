// Package cpu is the CPU device of margo: engine.Device for the machine's own
// cores, with no dependency beyond the C compiler. On amd64 that is GCC, whose
// target pragmas choose the instruction sets; elsewhere Clang works too.
//
// Go checks arguments and resolves memory; everything else is C (core.h says
// how it is layered). Kernels are written once, in the vectors of simd.h, and
// compiled for AVX-512 with bf16, AVX-512, AVX2 and portably; the best one that
// the machine can run is chosen at run time.
//
// GEMM follows the usual plan: weights packed once into panels of 32 columns,
// register-blocked micro-kernels (14×32 with AVX-512), bias, activation, gate
// and residual applied while a tile is in L1. Every sum over K is taken in one
// sequential order, so that a row's result does not depend on the batch, on
// how work is cut, or on the number of threads.
//
// The diffusion head runs as one native call for all its steps (HeadSteps).
//
// All devices of a process share one pool of worker threads. A stream executes
// each call before it returns.
package cpu
