// Package ptx parses and runs the PTX that nvcc emits for compute_80 and compute_90a, so that tests see what the compiler made of a kernel, its
// inline assembly included, on machines without a GPU. Only tests import it.
//
// Model. A warp runs in lock step: of its lanes that can run, those with the lowest program counter take one step, so that lanes
// which parted meet again where their paths join. Warps of a block take turns at barriers. Blocks run one after the other, or
// side by side when a launch is cooperative. What runs in lock step does not show a missing barrier inside a warp; the emulator in
// kernels/emu and its checkers are for that.
//
// Memory. Every access is checked for bounds and natural alignment. New memory, shared memory and the target of an asynchronous
// copy under way hold bytes 0xff, a NaN in every float type, or what a launch says, and registers hold bits 1; a branch on a predicate that was never written is an
// error. The copy reads and writes only when its thread waits for it.
//
// Numerics. add, sub, mul, fma, div.rn, sqrt.rn, rcp.rn and conversions round as IEEE 754 and PTX say, so they are bit-equal to
// hardware. The approx instructions are computed in binary64 and rounded once: hardware may differ by the error that the PTX
// manual gives (2 ulp of ex2, 1 of rcp, about 2^-22 relative of rsqrt and sqrt, 2^-20.5 absolute of sin and cos). mma sums the
// products of one call in binary64, adds the accumulator and rounds once; hardware rounds or truncates more often, by at most
// one unit of the last place of the largest term for each addition.
//
// Hopper. mbarriers, copies of tensors by TMA and wgmma follow the PTX ISA, not kernels/emu. All that is asynchronous happens as late as
// it may: copies come when nothing else in a block can go on, the newest first; products are computed when a wait asks for their group. To
// touch their registers or shared memory before is an error, as are a missing wgmma.fence or fence.proxy.async, an mbarrier with too many
// arrivals or bytes or whose phase a thread has missed, warps of a warpgroup that differ, descriptors with bits that mean nothing
// and what is left under way at the end. Tensor maps have a form of their own (TensorMap), since NVIDIA does not document its. Clusters,
// multicast, base offsets of descriptors and types other than bf16 are not known.
//
// An instruction, modifier or type that is not known is an error that names it and its line: nothing is ignored.
package ptx
