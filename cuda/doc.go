// Package cuda is the CUDA device: engine.Device and engine.Stream over a plugin
// that holds the kernels (kernels/). margo links neither CUDA nor the plugin: it is
// opened at run time, so one binary starts everywhere, and a machine without CUDA
// gets an error that says what is missing.
//
// There are two plugins of the same sources: libmargo_cuda.so, compiled by nvcc, and
// libmargo_emu.so, which runs every CUDA thread on the host and checks what a GPU
// would not; devices are called "cuda:0" and "emu:0". A plugin is looked for in
//
//	$MARGO_CUDA_PLUGIN or $MARGO_EMU_PLUGIN (the file itself), the folder of the
//	executable, ../lib from there, and ./bin
//
// $MARGO_HEAD_PATH is throughput (the default) or latency: the diffusion head of few rows
// in one persistent kernel. It is faster for one or two images at a time, and rounds
// otherwise, so that an image then depends on the batch. $MARGO_SM90=0 leaves Hopper's own
// matrix products out. $MARGO_CUBLASLT is 0 (the default), 1 or autotune: the vendor's library
// for products without an epilogue of ours, which also makes an image depend on the batch.
//
// $MARGO_NCCL_LIB is the NCCL that Comm uses for ranks, else libnccl.so.2.
//
// Bindings are our own and thin: the function table of kernels/margo_abi.h.
package cuda
