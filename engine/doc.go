// Package engine is margo's vocabulary: devices, streams, tensors, the compute
// contract (Kernels), the context that model code runs in, parameters, errors
// and the one source of randomness. It imports nothing else of margo.
//
// Letters used for shapes everywhere in margo:
//
//	N  images                 L  tokens of one image
//	D  width of the trunk     H  attention heads
//	R  rows of the head       W  width of the diffusion head
//	T  diffusion timesteps    C  channels of a token
//
// Every tensor is row-major. An op treats a tensor as a matrix: all leading
// dimensions are rows, the last one is columns; rows may be strided (a slice
// of columns of a wider tensor), columns never are.
//
// A Device owns memory and streams. A Stream is an ordered queue of kernels:
// calls enqueue, and only Sync, CopyOut and Close wait. A device is finished
// when it passes the table in package conformance against the float64 oracle
// in package ref.
package engine
