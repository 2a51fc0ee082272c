// peak.h: measured limits of the machine (peak.c).
#ifndef MARGO_CPU_PEAK_H
#define MARGO_CPU_PEAK_H

#include <stdint.h>

// mc_peak_flops is floating-point operations per second of nt threads doing
// multiply-adds on registers, f32 FMA or bf16 dot products with f32 sums: the best
// millisecond of a tenth of a second.
double mc_peak_flops(int dtype, int nt);
// mc_peak_mean is the mean over limit seconds; no thread waits for another.
double mc_peak_mean(int dtype, int nt, double limit);
// mc_peak_stream is bytes per second of nt threads reading bytes of memory in
// order; 0 if they cannot be had.
double mc_peak_stream(int64_t bytes, int nt);

#endif
