// mutants.cu: small kernels with seeded bugs, to prove that the emulator finds them.
// Bug 0 of every kernel is right. The program prints a line for each:
//
//	kernel bug: ok | wrong result | error text
//
// Which bug must end how is the table of cuda/emu_test.go, which runs this program.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "margo.cuh"
#include "margo_sm90.cuh"

namespace {

// ---- tiles: Y = X·Wᵀ, [M, 64] and [64, K], with cp.async in two slots, ldmatrix and mma ------

struct Tiles {
	bf16 x[2][64 * 64], w[2][64 * 64];
};

enum { NO_WAIT = 1, NO_SYNC_AFTER_LOAD, NO_SYNC_AT_END, NO_SWIZZLE, STORE_PAST_END, MISALIGNED_ROW, SOURCE_PAST_END };

template <int BUG> MARGO_DEVICE bf16 *chunk(bf16 *tile, int row, int c) { return tile + row * 64 + ((BUG == NO_SWIZZLE ? c : c ^ (row & 7)) << 3); }

template <int BUG> __global__ void tiles(const bf16 *x, const bf16 *w, float *y, int m, int k) {
	auto &s = gpu::smem<Tiles>();
	const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	auto load = [&](int slot, int k0) {
		for (int i = threadIdx.x; i < 64 * 8; i += 128) {
			int r = i / 8, c = i % 8;
			bool in = BUG == SOURCE_PAST_END || r < m;
			gpu::cp_async16(chunk<BUG>(s.x[slot], r, c), x + (in ? r * k + k0 + c * 8 : 0), in ? 16 : 0);
			gpu::cp_async16(chunk<BUG>(s.w[slot], r, c), w + r * k + k0 + c * 8);
		}
		gpu::cp_async_commit();
	};
	float acc[8][4] = {};
	load(0, 0);
	for (int t = 0; t < k / 64; t++) {
		if (t + 1 < k / 64) load((t + 1) % 2, (t + 1) * 64);
		if (BUG != NO_WAIT) {
			if (t + 1 < k / 64)
				gpu::cp_async_wait<1>();
			else
				gpu::cp_async_wait<0>();
		}
		if (BUG != NO_SYNC_AFTER_LOAD) __syncthreads();
		for (int kk = 0; kk < 4; kk++) {
			uint32_t a[4];
			gpu::ldmatrix_x4(a, chunk<BUG>(s.x[t % 2], warp * 16 + lane % 16, kk * 2 + lane / 16) + (BUG == MISALIGNED_ROW));
			for (int j = 0; j < 8; j++) {
				uint32_t b[2];
				gpu::ldmatrix_x2(b, chunk<BUG>(s.w[t % 2], j * 8 + lane % 8, kk * 2 + lane / 8 % 2));
				gpu::mma_bf16(acc[j], a, b);
			}
		}
		if (BUG != NO_SYNC_AT_END) __syncthreads();
	}
	if (BUG == NO_WAIT) gpu::cp_async_wait<0>();
	for (int j = 0; j < 8; j++)
		for (int e = 0; e < 4; e++) {
			int r = warp * 16 + lane / 4 + e / 2 * 8;
			if (r < m || (BUG == STORE_PAST_END && r == m)) y[r * 64 + j * 8 + lane % 4 * 2 + e % 2] = acc[j][e];
		}
}

// ---- sums of rows: shuffles, then shared memory --------------------------------------------

enum { NO_SYNC_BEFORE_READ = 1, DIVERGENT_SYNC, SHUFFLE_WITHOUT_LANES, NO_SYNC_BETWEEN_ROWS, WRONG_MASK, EARLY_EXIT, VECTOR_MISALIGNED, PAST_SHARED };

template <int BUG> __global__ void sums(const float *x, float *y, int rows, int n) {
	float *part = &gpu::smem<float>();
	const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	if (BUG == EARLY_EXIT && threadIdx.x == 127) return;
	for (int r = 0; r < rows; r++) {
		float v = 0;
		if (BUG == VECTOR_MISALIGNED) {
			float4 q = *reinterpret_cast<const float4 *>(x + r * n + 1 + threadIdx.x);
			v = q.x;
		}
		for (int i = threadIdx.x; i < n; i += 128) v += x[r * n + i];
		if (BUG != SHUFFLE_WITHOUT_LANES || lane < 31)
			for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(BUG == WRONG_MASK ? 0xffffu : ~0u, v, d);
		if (BUG != NO_SYNC_BETWEEN_ROWS) __syncthreads();
		if (lane == 0) part[BUG == PAST_SHARED ? warp + 1 : warp] = v;
		if (BUG == DIVERGENT_SYNC) {
			if (warp == 0)
				__syncthreads();
			else
				__syncthreads();
		} else if (BUG != NO_SYNC_BEFORE_READ) {
			__syncthreads();
		}
		if (threadIdx.x == 0) y[r] = part[0] + part[1] + part[2] + part[3];
	}
}

// ---- Hopper: a producer's TMA, a warpgroup's wgmma, [64, K]·[64, K]ᵀ -------------------------

struct Ring {
	bf16 x[2][64 * 64], w[2][64 * 64];
	uint64_t full[2], empty[2];
};

enum { NO_FULL_WAIT = 1, NO_PRODUCT_WAIT, NO_FENCE, RELEASED_EARLY, NO_EMPTY_WAIT, WRONG_BYTES, NOT_INITIALISED };

template <int BUG> __global__ void hopper(CUtensorMap x, CUtensorMap w, float *y, int k) {
	char *base = &gpu::smem<char>();
	base += -gpu::shared_address(base) & 1023;
	auto &s = *reinterpret_cast<Ring *>(base);
	if (threadIdx.x == 0 && BUG != NOT_INITIALISED)
		for (int i = 0; i < 2; i++) gpu::mbarrier_init(&s.full[i], 1), gpu::mbarrier_init(&s.empty[i], 4);
	gpu::mbarrier_init_fence();
	__syncthreads();
	if (threadIdx.x >= 128) {
		if (threadIdx.x != 128) return;
		for (int t = 0; t < k / 64; t++) {
			if (BUG != NO_EMPTY_WAIT) gpu::mbarrier_wait(&s.empty[t % 2], (t / 2 & 1) ^ 1);
			gpu::mbarrier_arrive_expect(&s.full[t % 2], BUG == WRONG_BYTES ? 8192 : 16384);
			gpu::tma_load(s.x[t % 2], &x, t * 64, 0, &s.full[t % 2]);
			gpu::tma_load(s.w[t % 2], &w, t * 64, 0, &s.full[t % 2]);
		}
		return;
	}
	float acc[32] = {};
	for (int t = 0; t < k / 64; t++) {
		if (BUG != NO_FULL_WAIT) gpu::mbarrier_wait(&s.full[t % 2], t / 2 & 1);
		uint64_t a = gpu::wgmma_tile(s.x[t % 2]), b = gpu::wgmma_tile(s.w[t % 2]);
		if (BUG != NO_FENCE) gpu::wgmma_fence();
		for (int j = 0; j < 4; j++) gpu::wgmma_bf16<64>(acc, a + j * 2, b + j * 2, 1);
		gpu::wgmma_commit();
		if (BUG == RELEASED_EARLY && threadIdx.x % 32 == 0) gpu::mbarrier_arrive(&s.empty[t % 2]);
		if (BUG != NO_PRODUCT_WAIT) gpu::wgmma_wait<0>();
		if (BUG != RELEASED_EARLY && threadIdx.x % 32 == 0) gpu::mbarrier_arrive(&s.empty[t % 2]);
	}
	const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
	for (int j = 0; j < 8; j++)
		for (int e = 0; e < 4; e++) y[(row + e / 2 * 8) * 64 + j * 8 + threadIdx.x % 4 * 2 + e % 2] = acc[j * 4 + e];
	if (BUG == NO_PRODUCT_WAIT) gpu::wgmma_wait<0>();
}

// ---- Hopper: X·V for a head of V [K, 2 heads, 136], X in registers, V as its rows lie: 2 boxes of 64 columns, one of 16 ------

constexpr int V_COLS = 136, V_TILE = 2 * 64 * 64 + 64 * 16;
struct Values {
	bf16 v[2][V_TILE];
	uint64_t full[2], empty[2];
};

enum {
	V_NO_FENCE = 1, V_NO_FULL_WAIT, V_WRONG_PHASE, V_NO_PRODUCT_WAIT, V_RELEASED_EARLY, V_REGISTERS_CHANGED, V_USED_EARLY, V_NOT_TRANSPOSED, V_NO_NEXT, V_TAIL_AS_WIDE,
	V_WRONG_HEAD, V_NO_TAIL_BYTES, V_TAIL_MISALIGNED, V_GROUPS
};

template <int BUG> __global__ void values(CUtensorMap wide, CUtensorMap tail, const bf16 *x, float *y, int k) {
	char *base = &gpu::smem<char>();
	base += -gpu::shared_address(base) & 1023;
	auto &s = *reinterpret_cast<Values *>(base);
	if (threadIdx.x == 0) {
		for (int i = 0; i < 2; i++) gpu::mbarrier_init(&s.full[i], 1), gpu::mbarrier_init(&s.empty[i], 4);
		gpu::mbarrier_init_fence();
	}
	__syncthreads();
	const int tail_at = 2 * 64 * 64 + (BUG == V_TAIL_MISALIGNED ? 64 : 0);
	if (threadIdx.x >= 128) {
		if (threadIdx.x != 128) return;
		for (int t = 0; t < k / 64; t++) {
			gpu::mbarrier_wait(&s.empty[t % 2], (t / 2 & 1) ^ 1);
			gpu::mbarrier_arrive_expect(&s.full[t % 2], BUG == V_NO_TAIL_BYTES ? 64 * 256 : V_TILE * 2);
			const int head = BUG == V_WRONG_HEAD ? 0 : 1;
			for (int b = 0; b < 2; b++) gpu::tma_load_head(s.v[t % 2] + b * 64 * 64, &wide, b * 64, head, t * 64, &s.full[t % 2]);
			gpu::tma_load_head(s.v[t % 2] + tail_at, &tail, 128, head, t * 64, &s.full[t % 2]);
		}
		return;
	}
	const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
	float o[64] = {}, ot[8] = {};
	for (int t = 0; t < k / 64; t++) {
		uint32_t a[4][4];
		for (int j = 0; j < 4; j++)
			for (int e = 0; e < 4; e++) a[j][e] = *reinterpret_cast<const uint32_t *>(x + (row + e % 2 * 8) * k + t * 64 + j * 16 + e / 2 * 8 + col);
		if (BUG != V_NO_FULL_WAIT) gpu::mbarrier_wait(&s.full[t % 2], (t / 2 & 1) ^ (BUG == V_WRONG_PHASE));
		const uint64_t b = gpu::wgmma_tile(s.v[t % 2], BUG == V_NO_NEXT ? 16 : 8192) + (BUG == V_GROUPS ? uint64_t(64) << 32 : 0);
		const uint64_t bt = BUG == V_TAIL_AS_WIDE ? gpu::wgmma_tile(s.v[t % 2] + tail_at) : gpu::wgmma_tile16(s.v[t % 2] + tail_at);
		if (BUG != V_NO_FENCE) gpu::wgmma_fence();
		for (int j = 0; j < 4; j++) {
			gpu::wgmma_bf16_rt<128>(o, a[j], b + j * (BUG == V_NOT_TRANSPOSED ? 2 : 128), 1);
			gpu::wgmma_bf16_rt<16>(ot, a[j], bt + j * 32, 1);
		}
		gpu::wgmma_commit();
		if (BUG == V_REGISTERS_CHANGED) a[1][2] ^= 0x8000;
		if (BUG == V_USED_EARLY) gpu::wgmma_settled(a[3]);
		if (BUG == V_RELEASED_EARLY && threadIdx.x % 32 == 0) gpu::mbarrier_arrive(&s.empty[t % 2]);
		if (BUG != V_NO_PRODUCT_WAIT) gpu::wgmma_wait<0>();
		gpu::wgmma_settled(ot);
		if (BUG != V_RELEASED_EARLY && threadIdx.x % 32 == 0) gpu::mbarrier_arrive(&s.empty[t % 2]);
	}
	for (int n = 0; n < V_COLS / 8; n++)
		for (int e = 0; e < 4; e++) y[(row + e / 2 * 8) * V_COLS + n * 8 + col + e % 2] = n < 16 ? o[n * 4 + e] : ot[(n - 16) * 4 + e];
}

// ---- between blocks: y[i] = x[(i + 256) mod n] + 1 in two phases -----------------------------

enum { NO_GRID_BARRIER = 1, BARRIER_WITHOUT_ACQUIRE, BARRIER_WITHOUT_RELEASE, ONE_ARRIVES_TWICE, NO_SYNC_BEFORE_ARRIVAL, TOO_FEW_ARRIVE };

template <int BUG> __global__ void phases(const float *x, float *between, float *y, uint32_t *arrived, int n) {
	int i = blockIdx.x * 256 + threadIdx.x;
	between[i] = x[i] + 1;
	if (BUG != NO_SYNC_BEFORE_ARRIVAL) __syncthreads();
	if (BUG != NO_GRID_BARRIER && threadIdx.x == 0) {
		if (BUG == BARRIER_WITHOUT_RELEASE)
			atomicAdd(arrived, 1u); // relaxed
		else if (BUG != TOO_FEW_ARRIVE || blockIdx.x)
			gpu::red_release_add(arrived, BUG == ONE_ARRIVES_TWICE && blockIdx.x == 0 ? gridDim.x : 1u);
		if (BUG == BARRIER_WITHOUT_ACQUIRE)
			while (atomicAdd(arrived, 0u) < gridDim.x) gpu::spin(); // relaxed
		else
			while (gpu::ld_acquire(arrived) < gridDim.x) gpu::spin();
	}
	__syncthreads();
	y[i] = between[(i + 256) % n];
}

// counts adds what every block has seen; plain: without atomics.
template <int PLAIN> __global__ void counts(float *y) {
	if (threadIdx.x) return;
	if (PLAIN)
		y[0] = y[0] + 1;
	else
		atomicAdd(y, 1.0f);
}

// strided moves 128 values through shared memory, spread by SHARED words there and by GLOBAL values in x: right
// with any, but each of a warp's four accesses takes as many waves as cuda/emu_test.go says.
template <int SHARED, int GLOBAL> __global__ void strided(const float *x, float *y) {
	float *s = &gpu::smem<float>();
	s[threadIdx.x * SHARED] = x[threadIdx.x * GLOBAL];
	__syncthreads();
	y[threadIdx.x] = s[threadIdx.x * SHARED];
}

// vectors does the same with 16 bytes a thread, PITCH vectors apart in shared memory; ASYNC: they come by cp.async.
template <int PITCH, bool ASYNC> __global__ void vectors(const float *x, float *y) {
	float4 *s = &gpu::smem<float4>() + threadIdx.x * PITCH;
	const float4 *from = reinterpret_cast<const float4 *>(x) + threadIdx.x;
	if (ASYNC) {
		gpu::cp_async16(s, from);
		gpu::cp_async_commit();
		gpu::cp_async_wait<0>();
	} else {
		*s = *from;
	}
	__syncthreads();
	reinterpret_cast<float4 *>(y)[threadIdx.x] = *s;
}

__global__ void add_one(float *y, int n) {
	int i = blockIdx.x * blockDim.x + threadIdx.x;
	if (i < n) y[i] += 1;
}

// ---- the program ------------------------------------------------------------------------------

uint64_t state = 1;
float draw() {
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return float(int(state >> 40) % 17 - 8) / 8; // few bits: products and sums are exact
}

template <class T> T *device(const std::vector<T> &v) {
	void *p = nullptr;
	if (cudaMalloc(&p, v.size() * sizeof(T)) != cudaSuccess) return nullptr;
	cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice);
	return static_cast<T *>(p);
}

// verdict waits, compares y with want, frees and leaves a fresh device.
std::string verdict(cudaError_t launched, const float *y, const std::vector<float> &want, std::vector<void *> held) {
	std::vector<float> got(want.size());
	cudaError_t e = launched;
	if (e == cudaSuccess) e = cudaDeviceSynchronize();
	if (e == cudaSuccess) e = cudaMemcpy(got.data(), y, got.size() * 4, cudaMemcpyDeviceToHost);
	for (void *p : held) {
		cudaError_t f = cudaFree(p); // looks at what surrounds it
		if (e == cudaSuccess) e = f;
	}
	std::string text;
	if (e != cudaSuccess) {
		text = std::string(cudaGetErrorName(e)) + ": " + emu_last_report();
	} else {
		bool same = true;
		for (size_t i = 0; i < want.size(); i++) same = same && got[i] == want[i];
		text = same ? "ok" : "wrong result";
	}
	cudaDeviceReset();
	return text;
}

void print(const char *kernel, int bug, const std::string &s) {
	printf("%s %d: %s\n", kernel, bug, s.c_str());
	fflush(stdout);
}

struct Product {
	int m, k;
	std::vector<bf16> x, w;
	std::vector<float> want;
	Product(int m, int k) : m(m), k(k) {
		for (int i = 0; i < m * k; i++) x.push_back(to_bf16(draw()));
		for (int i = 0; i < 64 * k; i++) w.push_back(to_bf16(draw()));
		for (int r = 0; r < m; r++)
			for (int c = 0; c < 64; c++) {
				double sum = 0;
				for (int i = 0; i < k; i++) sum += double(to_f32(x[size_t(r * k + i)])) * double(to_f32(w[size_t(c * k + i)]));
				want.push_back(float(sum));
			}
	}
};

template <int BUG> void run_tiles() {
	Product p(61, 256);
	bf16 *x = device(p.x), *w = device(p.w);
	float *y = device(std::vector<float>(p.want.size()));
	gpu::name_next_launch("tiles");
	cudaError_t e = gpu::launch(tiles<BUG>, dim3(1), dim3(128), sizeof(Tiles), nullptr, x, w, y, p.m, p.k);
	print("tiles", BUG, verdict(e, y, p.want, {x, w, y}));
}

template <int BUG> void run_hopper() {
	Product p(64, 384);
	bf16 *x = device(p.x), *w = device(p.w);
	float *y = device(std::vector<float>(p.want.size()));
	CUtensorMap mx, mw;
	if (!gpu::tensor_map_bf16(&mx, x, 64, p.k, p.k, 64) || !gpu::tensor_map_bf16(&mw, w, 64, p.k, p.k, 64)) return print("hopper", BUG, "no tensor map");
	gpu::name_next_launch("hopper");
	cudaError_t e = gpu::launch(hopper<BUG>, dim3(1), dim3(256), sizeof(Ring) + 1024, nullptr, mx, mw, y, p.k);
	print("hopper", BUG, verdict(e, y, p.want, {x, w, y}));
}

template <int BUG> void run_values() {
	const int k = 192;
	std::vector<bf16> x, v;
	std::vector<float> want;
	for (int i = 0; i < 64 * k; i++) x.push_back(to_bf16(draw()));
	for (int i = 0; i < k * 2 * V_COLS; i++) v.push_back(to_bf16(draw()));
	for (int r = 0; r < 64; r++)
		for (int c = 0; c < V_COLS; c++) {
			double sum = 0;
			for (int i = 0; i < k; i++) sum += double(to_f32(x[size_t(r * k + i)])) * double(to_f32(v[size_t((i * 2 + 1) * V_COLS + c)]));
			want.push_back(float(sum));
		}
	bf16 *dx = device(x), *dv = device(v);
	float *y = device(std::vector<float>(want.size()));
	CUtensorMap wide, tail;
	if (!gpu::tensor_map_heads_bf16(&wide, dv, k, 2, V_COLS, 2 * V_COLS, 64, 64) || !gpu::tensor_map_heads_bf16(&tail, dv, k, 2, V_COLS, 2 * V_COLS, 64, 16))
		return print("values", BUG, "no tensor map");
	gpu::name_next_launch("values");
	cudaError_t e = gpu::launch(values<BUG>, dim3(1), dim3(160), sizeof(Values) + 1024, nullptr, wide, tail, dx, y, k);
	print("values", BUG, verdict(e, y, want, {dx, dv, y}));
}

template <int BUG> void run_sums() {
	const int rows = 5, n = 300;
	std::vector<float> x, want;
	for (int i = 0; i < rows * n; i++) x.push_back(draw());
	for (int r = 0; r < rows; r++) {
		double s = 0;
		for (int i = 0; i < n; i++) s += double(x[size_t(r * n + i)]);
		want.push_back(float(s));
	}
	float *dx = device(x), *y = device(std::vector<float>(rows));
	gpu::name_next_launch("sums");
	cudaError_t e = gpu::launch(sums<BUG>, dim3(1), dim3(128), 16, nullptr, dx, y, rows, n);
	print("sums", BUG, verdict(e, y, want, {dx, y}));
}

template <int BUG> void run_phases(bool cooperative, int shown) {
	const int blocks = 6, n = blocks * 256;
	std::vector<float> x, want;
	for (int i = 0; i < n; i++) x.push_back(draw());
	for (int i = 0; i < n; i++) want.push_back(x[size_t((i + 256) % n)] + 1);
	float *dx = device(x), *between = nullptr, *y = device(std::vector<float>(x.size()));
	uint32_t *arrived = device(std::vector<uint32_t>(1));
	cudaMalloc(&between, size_t(n) * 4);
	gpu::name_next_launch("phases");
	cudaError_t e = cooperative ? gpu::launch_cooperative(phases<BUG>, dim3(blocks), dim3(256), 0, nullptr, dx, between, y, arrived, n)
	                            : gpu::launch(phases<BUG>, dim3(blocks), dim3(256), 0, nullptr, dx, between, y, arrived, n);
	print("phases", shown, verdict(e, y, want, {dx, between, y, arrived}));
}

template <int PLAIN> void run_counts() {
	float *y = device(std::vector<float>{0});
	gpu::name_next_launch("counts");
	cudaError_t e = gpu::launch(counts<PLAIN>, dim3(40), dim3(32), 0, nullptr, y);
	print("counts", PLAIN, verdict(e, y, {40}, {y}));
}

// run_streams: one stream fills, another one adds; the host's buffer is pinned.
// 1: no wait for the event; 2: the buffer is used again before the copy has read it; 3: a memset of
// the null stream, which these streams do not wait for.
void run_streams(int bug) {
	const int n = 1000;
	cudaStream_t a, b;
	cudaEvent_t filled;
	cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
	cudaEventCreateWithFlags(&filled, cudaEventDisableTiming);
	float *y = device(std::vector<float>(n));
	void *host = nullptr;
	cudaHostAlloc(&host, n * 4, cudaHostAllocDefault);
	auto *h = static_cast<float *>(host);
	for (int i = 0; i < n; i++) h[i] = float(i);
	if (bug == 3) cudaMemset(y, 0xff, n * 4);
	cudaMemcpyAsync(y, h, n * 4, cudaMemcpyHostToDevice, a);
	cudaEventRecord(filled, a);
	if (bug != 1) cudaStreamWaitEvent(b, filled);
	cudaError_t e = gpu::launch(add_one, dim3(4), dim3(256), 0, b, y, n);
	if (bug == 2)
		for (int i = 0; i < n; i++) h[i] = -1;
	std::vector<float> want;
	for (int i = 0; i < n; i++) want.push_back(float(i) + 1);
	if (e == cudaSuccess) e = cudaStreamSynchronize(b);
	std::string s = verdict(e, y, want, {y});
	cudaFreeHost(host), cudaEventDestroy(filled), cudaStreamDestroy(a), cudaStreamDestroy(b);
	print("streams", bug, s);
}

template <int SHARED, int GLOBAL> void run_strided(int shown) {
	std::vector<float> x, want;
	for (int i = 0; i < 128 * GLOBAL; i++) x.push_back(draw());
	for (int i = 0; i < 128; i++) want.push_back(x[size_t(i * GLOBAL)]);
	float *dx = device(x), *y = device(std::vector<float>(128));
	gpu::name_next_launch("strided");
	cudaError_t e = gpu::launch(strided<SHARED, GLOBAL>, dim3(1), dim3(128), 128 * SHARED * 4, nullptr, dx, y);
	print("strided", shown, verdict(e, y, want, {dx, y}));
}

template <int PITCH, bool ASYNC> void run_vectors(int shown) {
	std::vector<float> x;
	for (int i = 0; i < 512; i++) x.push_back(draw());
	float *dx = device(x), *y = device(std::vector<float>(512));
	gpu::name_next_launch("vectors");
	cudaError_t e = gpu::launch(vectors<PITCH, ASYNC>, dim3(1), dim3(128), 128 * PITCH * 16, nullptr, dx, y);
	print("vectors", shown, verdict(e, y, x, {dx, y}));
}

template <int... BUG> void all_tiles(std::integer_sequence<int, BUG...>) { (run_tiles<BUG>(), ...); }
template <int... BUG> void all_sums(std::integer_sequence<int, BUG...>) { (run_sums<BUG>(), ...); }
template <int... BUG> void all_hopper(std::integer_sequence<int, BUG...>) { (run_hopper<BUG>(), ...); }
template <int... BUG> void all_values(std::integer_sequence<int, BUG...>) { (run_values<BUG>(), ...); }
template <int... BUG> void all_phases(std::integer_sequence<int, BUG...>) { (run_phases<BUG>(true, BUG), ...); }

} // namespace

int main() {
	int devices = 0;
	if (cudaGetDeviceCount(&devices) != cudaSuccess || devices != 1) return 1;
	all_tiles(std::make_integer_sequence<int, 8>());
	all_sums(std::make_integer_sequence<int, 9>());
	all_hopper(std::make_integer_sequence<int, 8>());
	all_values(std::make_integer_sequence<int, 15>());
	all_phases(std::make_integer_sequence<int, 7>());
	run_phases<0>(false, 7); // an ordinary launch need not run all blocks at once
	run_counts<0>(), run_counts<1>();
	for (int bug = 0; bug < 4; bug++) run_streams(bug);
	run_strided<1, 1>(0), run_strided<8, 2>(1), run_strided<33, 9>(2);
	run_vectors<1, false>(0), run_vectors<2, false>(1), run_vectors<2, true>(2);
	return 0;
}
