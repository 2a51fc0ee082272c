// wrappers.cu: one small kernel for each wrapper of margo.cuh and reduce.cuh. cuda/ptx compiles this file to PTX, interprets it
// and compares with plain Go what each wrapper does: the text of the inline assembly, which the emulator never sees.
#include "fp8.cuh"
#include "reduce.cuh"

// Lane l owns words 4l … of a, 2l … of b and 4l … of d, in the order of the fragments.
extern "C" __global__ void w_mma_k16(const uint32_t *a, const uint32_t *b, float *d) {
	int l = int(threadIdx.x);
	uint32_t x[4], y[2];
	float z[4];
	for (int i = 0; i < 4; i++) x[i] = a[4 * l + i], z[i] = d[4 * l + i];
	for (int i = 0; i < 2; i++) y[i] = b[2 * l + i];
	gpu::mma_bf16(z, x, y);
	for (int i = 0; i < 4; i++) d[4 * l + i] = z[i];
}
extern "C" __global__ void w_mma_k8(const uint32_t *a, const uint32_t *b, float *d) {
	int l = int(threadIdx.x);
	uint32_t x[2] = {a[2 * l], a[2 * l + 1]};
	float z[4];
	for (int i = 0; i < 4; i++) z[i] = d[4 * l + i];
	gpu::mma_bf16_k8(z, x, b[l]);
	for (int i = 0; i < 4; i++) d[4 * l + i] = z[i];
}

struct Rows {
	uint4 row[32]; // eight elements of 16 bits each
};
// y: 4 words of x4, 4 of x4_t, 2 of x2, 2 of x2_t for each lane.
extern "C" __global__ void w_ldmatrix(const uint4 *x, uint32_t *y) {
	Rows &s = gpu::smem<Rows>();
	int l = int(threadIdx.x);
	s.row[l] = x[l];
	__syncwarp();
	uint32_t r[4], q[2];
	gpu::ldmatrix_x4(r, &s.row[l]);
	for (int i = 0; i < 4; i++) y[12 * l + i] = r[i];
	gpu::ldmatrix_x4_t(r, &s.row[l]);
	for (int i = 0; i < 4; i++) y[12 * l + 4 + i] = r[i];
	gpu::ldmatrix_x2(q, &s.row[l % 16]);
	for (int i = 0; i < 2; i++) y[12 * l + 8 + i] = q[i];
	gpu::ldmatrix_x2_t(q, &s.row[l % 16]);
	for (int i = 0; i < 2; i++) y[12 * l + 10 + i] = q[i];
}

// Three copies in two groups; what the first group brought is read while the second is under way.
extern "C" __global__ void w_cp_async(const uint4 *x, const uint32_t *w, uint4 *y, uint32_t *z, int bytes, int few) {
	Rows &s = gpu::smem<Rows>(), &t = (&s)[1];
	int l = int(threadIdx.x);
	gpu::cp_async16(&s.row[l], x + l, bytes);
	gpu::cp_async_commit();
	gpu::cp_async4(&reinterpret_cast<uint32_t *>(t.row)[l], w + l, few);
	gpu::cp_async_commit();
	gpu::cp_async_wait<1>();
	y[l] = s.row[l];
	gpu::cp_async_wait<0>();
	z[l] = reinterpret_cast<uint32_t *>(t.row)[l];
}

// y: pack_bf16(x, x'), to_bf16(x), exp2_fast(x), to_f32 of the low half.
extern "C" __global__ void w_convert(const float *x, uint32_t *y) {
	int l = int(threadIdx.x);
	y[4 * l] = gpu::pack_bf16(x[l], x[l + 32]);
	y[4 * l + 1] = to_bf16(x[l]).bits;
	y[4 * l + 2] = f32_to_bits(gpu::exp2_fast(x[l]));
	y[4 * l + 3] = f32_to_bits(to_f32(bf16{uint16_t(f32_to_bits(x[l]))}));
}

struct Parts {
	float part[4];
};
extern "C" __global__ void w_sums(const float *x, float *warp, float *block) {
	float v = x[threadIdx.x];
	warp[threadIdx.x] = warp_sum(v);
	block[threadIdx.x] = block_sum<4>(v, gpu::smem<Parts>().part);
}

extern "C" __global__ void w_philox(uint32_t *y, uint64_t key) {
	uint32_t l = threadIdx.x;
	Words v = philox(l, l + 1, 7 * l, 9, key);
	for (int i = 0; i < 4; i++) y[4 * l + i] = v.w[i];
}

struct Turn {
	uint32_t v[128];
};
// Two halves of a block turn their own 64 words around, each behind its own barrier.
extern "C" __global__ void w_bar_sync(const uint32_t *x, uint32_t *y) {
	Turn &s = gpu::smem<Turn>();
	int t = int(threadIdx.x), half = t / 64;
	s.v[t] = x[t];
	gpu::bar_sync(1 + half, 64);
	y[t] = s.v[half * 64 + 63 - t % 64];
}

// p[0] counts the threads of all blocks, the last word is the value and epoch of its thread.
extern "C" __global__ void w_memory(uint32_t *p, uint64_t *q, uint32_t *seen) {
	gpu::red_release_add(p, threadIdx.x);
	int t = int(blockIdx.x * blockDim.x + threadIdx.x);
	gpu::st_relaxed_u64(q + t, gpu::ld_relaxed_u64(q + t) + (uint64_t(t) << 32));
	__syncthreads();
	seen[t] = gpu::ld_acquire(p);
}

// Thread t waits a little, then passes on t and a large number that keep has hidden, and whether time went by.
extern "C" __global__ void w_time(uint64_t *y) {
	uint64_t before = gpu::global_nanoseconds();
	int t = int(threadIdx.x);
	uint64_t large = uint64_t(t) << 40 | 7;
	keep(t), keep(large);
	gpu::spin();
	y[3 * threadIdx.x] = uint64_t(t), y[3 * threadIdx.x + 1] = large, y[3 * threadIdx.x + 2] = gpu::global_nanoseconds() > before;
}

// Two words of each four codes.
extern "C" __global__ void w_e4m3(const uint32_t *x, uint32_t *y) {
	int l = int(threadIdx.x);
	e4m3_to_bf16(x[l], y[2 * l], y[2 * l + 1]);
}
