// attention_sm90a.cu: fused attention forward in bf16 on Hopper: TMA copies, wgmma multiplies, one pass over the keys
// with an online softmax. Heads of 64, 72, 80 and 128 columns; attention_mma.cuh serves all else.
//
// Mapping. A block computes 64 queries of one head of one sequence with each of its WGS warpgroups; one more warp
// copies. Grid: query tiles × heads × sequences; blocks past the end of a short sequence leave at once, and so do warpgroups without
// queries. 320 queries are 5 blocks of 64, or 192 and 128. Lanes hold S and O as mma.sync has them:
// rows g = lane/4 and g+8 of the warp's 16, columns 2(lane%4) and next of every 8.
//
// Copies. Keys come in tiles of 64, counted from the sequence's own first key, K and V in a ring of stages: `full_k` and
// `full_v` count the bytes that have come, `empty` the warps that are done with a stage. A tensor map has dimensions column, head,
// row: a box is 64 rows of 64 columns of a head, rows of 128 bytes. 72 and 80 are 64 columns and a box of 16 in rows of 32 bytes, whose last 8 TMA
// fills with zeros for 72. A box at the sequence's end holds rows of the next one, which may be NaN: hidden
// keys have p = 0, and 0·NaN is NaN. So the copying warp takes the last tile of V itself (`landed`), writes zeros into what is not the
// sequence's, and hands it on. K needs none of this: hidden scores are replaced.
//
// Products. S = Q·Kᵀ: both from shared memory. O += P·V: P from registers, where S has left it, V with its rows as they
// are, by the transposed form of wgmma. S of tile j+1 and P·V of tile j are issued together and run one after the other;
// the softmax of tile j+1 runs beside P·V of tile j, and beside the products of other warpgroups.
//
//	head dim  queries  blocks a SM  stages  shared memory  registers
//	64        64       3            4       74 KiB         108
//	64        192      1            5       106 KiB        108
//	72, 80    64       3            3       72 KiB         117
//	128       64       2            2       82 KiB         141
//
// Three warpgroups of 64 queries thus share a multiprocessor (two at 128). No spills, no serialised products (nvcc 13.5). O goes out through Q's shared memory, whole rows.
//
// Numerics: those of attention_mma.cuh, operation by operation (base that moves seldom, p rounded to bf16 for P·V, sums of the
// unrounded p in the same order, k16 products in ascending order), so that the emulator gives the same bits. Every 64 queries end with the last tile
// that one of them sees, whatever the block: a query's bits depend on its own sequence only. Rows that are not finite
// are computed anew (redo). Negative scales are left to mma.sync.
#include "attention_sm90a.cuh"

#include "gemm_sm90a.cuh"
#include "margo_sm90.cuh"

namespace {

constexpr int BN = 64;        // keys of a tile, and queries of a warpgroup
constexpr int BOX = 64 * 64;  // elements of a box of 64 columns

template <int D_, int WGS_, int STAGES_, int BLOCKS_> struct Hopper {
	static constexpr int D = D_, WGS = WGS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
	static constexpr int WIDE = D / 64, TAIL = D % 64; // boxes of 64 columns, columns of the box after them
	static constexpr int THREADS = WGS * 128 + 32;
	static constexpr int TILE = 64 * D, BYTES = TILE * 2;
	static_assert(TAIL == 0 || TAIL == 16);
};

template <class P> struct alignas(1024) Memory {
	bf16 q[P::WGS][P::TILE]; // a tile: its boxes one after the other
	bf16 k[P::STAGES][P::TILE], v[P::STAGES][P::TILE];
	uint64_t full_q, landed, full_k[P::STAGES], full_v[P::STAGES], empty[P::STAGES];
};

struct Map { // of 64 rows of a head, without and with the columns from 64 on if these are 16
	CUtensorMap wide, tail;
};
struct Maps {
	Map q, k, v;
};

// Place is a stage of the ring, and the parity of its round.
template <int STAGES> struct Place {
	int slot = 0;
	uint32_t parity = 0;
	MARGO_DEVICE void next() {
		if (++slot == STAGES) slot = 0, parity ^= 1;
	}
};

// copy_tiles is the copying warp: queries of `groups` warpgroups from row `first` on, `tiles` tiles of keys.
template <class P> MARGO_DEVICE void copy_tiles(Memory<P> &mem, const Maps &maps, const Span &span, int head, int first, int groups, int tiles) {
	const int lane = int(threadIdx.x % 32), left = span.keys - (tiles - 1) * BN; // left: keys of the last tile
	auto load = [&](bf16 *to, const Map &m, int row, uint64_t *full) {
#pragma unroll
		for (int b = 0; b < P::WIDE; b++) gpu::tma_load_head(to + b * BOX, &m.wide, b * 64, head, row, full);
		if (P::TAIL) gpu::tma_load_head(to + P::WIDE * BOX, &m.tail, P::WIDE * 64, head, row, full);
	};
	if (lane == 0) {
		gpu::mbarrier_arrive_expect(&mem.full_q, groups * P::BYTES);
		for (int w = 0; w < groups; w++) load(mem.q[w], maps.q, span.q0 + first + w * 64, &mem.full_q);
		Place<P::STAGES> at;
		for (int t = 0; t < tiles; t++, at.next()) {
			gpu::mbarrier_wait(&mem.empty[at.slot], at.parity ^ 1);
			gpu::mbarrier_arrive_expect(&mem.full_k[at.slot], P::BYTES);
			load(mem.k[at.slot], maps.k, span.k0 + t * BN, &mem.full_k[at.slot]);
			uint64_t *full = t == tiles - 1 && left < BN ? &mem.landed : &mem.full_v[at.slot];
			gpu::mbarrier_arrive_expect(full, P::BYTES);
			load(mem.v[at.slot], maps.v, span.k0 + t * BN, full);
		}
	}
	__syncwarp();
	if (left >= BN) return;
	const int slot = (tiles - 1) % P::STAGES;
	gpu::mbarrier_wait(&mem.landed, 0);
	auto clear = [&](bf16 *box, int row_elements) { // rows lie in a row, swizzled within
		auto *to = reinterpret_cast<uint4 *>(box + left * row_elements);
		for (int i = lane; i < (BN - left) * row_elements / 8; i += 32) to[i] = make_uint4(0, 0, 0, 0);
	};
	for (int b = 0; b < P::WIDE; b++) clear(mem.v[slot] + b * BOX, 64);
	if (P::TAIL) clear(mem.v[slot] + P::WIDE * BOX, 16);
	gpu::fence_proxy_async();
	__syncwarp();
	if (lane == 0) gpu::mbarrier_arrive(&mem.full_v[slot]);
}

// Strip is what a thread of a warpgroup of 64 queries holds.
template <class P> struct Strip {
	float s[32];                             // S, then P in f32, of a tile
	uint32_t p[4][4];                        // P in bf16, as wgmma takes it: 16 keys each
	float o[P::WIDE * 32], ot[8];            // Σ pV of rows g and g+8; ot: columns from 64 on of a box of 16
	float base[2], sum[2], shrink[2], m[2]; // minus the exponent that p is relative to, this lane's Σp, what O is to be multiplied by, greatest s
	float c;                                 // 2^(c·s)
	int visible[2], t2;                      // keys that the rows see; first column

	// scores issues S of a stage.
	MARGO_DEVICE void scores(const bf16 *q, const bf16 *k) {
		const uint64_t a = gpu::wgmma_tile(q), b = gpu::wgmma_tile(k);
#pragma unroll
		for (int w = 0; w < P::WIDE; w++)
#pragma unroll
			for (int j = 0; j < 4; j++) gpu::wgmma_bf16<64>(s, a + w * (BOX / 8) + j * 2, b + w * (BOX / 8) + j * 2, w > 0 || j > 0); // 32 bytes on
		if (P::TAIL) gpu::wgmma_bf16<64>(s, gpu::wgmma_tile16(q + P::WIDE * BOX), gpu::wgmma_tile16(k + P::WIDE * BOX), 1);
		gpu::wgmma_commit();
	}
	// values issues O += P·V of a stage.
	MARGO_DEVICE void values(const bf16 *v) {
		const uint64_t b = gpu::wgmma_tile(v, P::WIDE > 1 ? BOX * 2 : 16);
#pragma unroll
		for (int j = 0; j < 4; j++) { // 16 rows on
			gpu::wgmma_bf16_rt<P::WIDE * 64>(o, p[j], b + j * 128, 1);
			if (P::TAIL) gpu::wgmma_bf16_rt<16>(ot, p[j], gpu::wgmma_tile16(v + P::WIDE * BOX) + j * 32, 1);
		}
		gpu::wgmma_commit();
	}
	// settle: the registers of O and P are the compiler's again, or wgmma's.
	MARGO_DEVICE void settle() {
		gpu::wgmma_settled(o);
		if (P::TAIL) gpu::wgmma_settled(ot);
#pragma unroll
		for (int j = 0; j < 4; j++) gpu::wgmma_settled(p[j]);
	}

	// beyond tells if a row's base must move: p may reach 2^8 before sums are rescaled.
	MARGO_DEVICE bool beyond(int h) const { return fmaf(m[h], c, base[h]) > 8.0f; }
	// softmax turns S of the tile that begins with key at into p and adds that to the sums. True: O must be multiplied by shrink first.
	MARGO_DEVICE bool softmax(int at, bool mask) {
		if (mask) {
#pragma unroll
			for (int i = 0; i < 32; i++)
				if (at + i / 4 * 8 + t2 + i % 2 >= visible[i / 2 % 2]) s[i] = -INFINITY;
		}
#pragma unroll
		for (int h = 0; h < 2; h++) {
			m[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
			for (int n = 1; n < 8; n++) m[h] = fmaxf(m[h], fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
		}
		const bool moves = __any_sync(0xffffffffu, beyond(0) || beyond(1));
		if (moves) {
#pragma unroll
			for (int h = 0; h < 2; h++) {
				m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
				m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
				const float old = base[h];
				if (beyond(h)) base[h] = -m[h] * c;
				shrink[h] = gpu::exp2_fast(base[h] - old);
				sum[h] *= shrink[h];
			}
		}
#pragma unroll
		for (int i = 0; i < 32; i++) {
			s[i] = gpu::exp2_fast(fmaf(s[i], c, base[i / 2 % 2]));
			sum[i / 2 % 2] += s[i];
		}
		return moves;
	}
	MARGO_DEVICE void rescale() {
#pragma unroll
		for (int i = 0; i < P::WIDE * 32; i++) o[i] *= shrink[i / 2 % 2];
		if (P::TAIL) {
#pragma unroll
			for (int i = 0; i < 8; i++) ot[i] *= shrink[i / 2 % 2];
		}
	}
	MARGO_DEVICE void pack() {
#pragma unroll
		for (int i = 0; i < 16; i++) p[i / 4][i % 4] = gpu::pack_bf16(s[2 * i], s[2 * i + 1]);
	}
};

template <class P> __global__ void __launch_bounds__(P::THREADS, P::BLOCKS) attention_wgmma(const __grid_constant__ Maps maps, const __grid_constant__ Attention p) {
	const Span span(p, int(blockIdx.z));
	const int block_first = int(blockIdx.x) * P::WGS * 64, head = int(blockIdx.y);
	if (block_first >= span.queries) return;
	char *aligned_base = &gpu::smem<char>();
	aligned_base += -gpu::shared_address(aligned_base) & 1023;
	auto &mem = *reinterpret_cast<Memory<P> *>(aligned_base);
	const int block_rows = span.queries - block_first < P::WGS * 64 ? span.queries - block_first : P::WGS * 64, groups = (block_rows + 63) / 64;
	const int tiles = (span.visible(p, block_first + block_rows - 1) + BN - 1) / BN;
	if (threadIdx.x == 0) {
		gpu::mbarrier_init(&mem.full_q, 1), gpu::mbarrier_init(&mem.landed, 1);
		for (int s = 0; s < P::STAGES; s++) gpu::mbarrier_init(&mem.full_k[s], 1), gpu::mbarrier_init(&mem.full_v[s], 1), gpu::mbarrier_init(&mem.empty[s], groups * 4);
		gpu::mbarrier_init_fence();
	}
	__syncthreads();
	// Taken from one lane, so that the compiler sees it to be the warp's: descriptors need registers of the warp's.
	const int wg = __shfl_sync(0xffffffffu, int(threadIdx.x / 128), 0), lane = int(threadIdx.x % 32), strip = int(threadIdx.x / 32 % 4) * 16;
	if (wg == P::WGS) {
		if (tiles > 0) copy_tiles<P>(mem, maps, span, head, block_first, groups, tiles);
		return;
	}
	if (wg >= groups) return;

	const int first = block_first + wg * 64, rows = span.queries - first < 64 ? span.queries - first : 64;
	const int whole = span.visible(p, first), own = (span.visible(p, first + rows - 1) + BN - 1) / BN; // keys that all rows see, tiles that some do
	bf16 *const q = mem.q[wg];
	Strip<P> w;
	w.t2 = 2 * (lane & 3);
	w.c = fmaxf(p.scale * 1.4426950408889634f, 1.17549435e-38f); // not 0: -inf·0 is NaN
#pragma unroll
	for (int h = 0; h < 2; h++) {
		const int row = strip + h * 8 + lane / 4;
		w.base[h] = 3e38f, w.sum[h] = 0, w.visible[h] = row < rows ? span.visible(p, first + row) : 0;
	}
#pragma unroll
	for (int i = 0; i < P::WIDE * 32; i++) w.o[i] = 0;
#pragma unroll
	for (int i = 0; i < 8; i++) w.ot[i] = 0;

	Place<P::STAGES> at, next;
	auto release = [&] {
		if (lane == 0) gpu::mbarrier_arrive(&mem.empty[at.slot]);
	};
	if (tiles > 0) gpu::mbarrier_wait(&mem.full_q, 0); // also before its memory takes O
	if (own > 0) {
		gpu::mbarrier_wait(&mem.full_k[0], 0);
		gpu::wgmma_fence();
		w.scores(q, mem.k[0]);
		gpu::wgmma_wait<0>();
		gpu::wgmma_settled(w.s);
		w.softmax(0, BN > whole); // O is 0
		w.pack();
#pragma unroll 1
		for (int t = 1; t < own; t++) {
			next.next();
			gpu::mbarrier_wait(&mem.full_k[next.slot], next.parity);
			gpu::mbarrier_wait(&mem.full_v[at.slot], at.parity);
			w.settle();
			gpu::wgmma_fence();
			w.scores(q, mem.k[next.slot]);
			w.values(mem.v[at.slot]);
			gpu::wgmma_wait<1>();
			gpu::wgmma_settled(w.s);
			const bool moves = w.softmax(t * BN, (t + 1) * BN > whole);
			gpu::wgmma_settled(w.s); // before the wait, not behind it
			gpu::wgmma_wait<0>();
			gpu::wgmma_settled(w.s);
			w.settle();
			release();
			if (moves) w.rescale();
			w.pack();
			at = next;
		}
		gpu::mbarrier_wait(&mem.full_v[at.slot], at.parity);
		w.settle();
		gpu::wgmma_fence();
		w.values(mem.v[at.slot]);
		gpu::wgmma_wait<0>();
		w.settle();
		release();
		at.next();
	}
	for (int t = own; t < tiles; t++, at.next()) { // what only later queries see
		gpu::mbarrier_wait(&mem.full_v[at.slot], at.parity);
		release();
	}

	gpu::bar_sync(1 + wg, 128); // Q is not needed any more: its rows take O, chunks of 16 bytes exchanged as TMA does
	uint32_t bad[2];
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float sum = w.sum[h];
		sum += __shfl_xor_sync(0xffffffffu, sum, 1);
		sum += __shfl_xor_sync(0xffffffffu, sum, 2);
		const float inverse = 1.0f / sum;
		const int row = strip + h * 8 + lane / 4;
		bool ok = true;
		auto put = [&](bf16 *to, const float *from) {
			float a = from[0] * inverse, b = from[1] * inverse;
			ok = ok && finite(a) && finite(b);
			if (w.visible[h] == 0) a = b = 0;
			*reinterpret_cast<uint32_t *>(to) = gpu::pack_bf16(a, b);
		};
#pragma unroll
		for (int n = 0; n < P::WIDE * 8; n++) put(q + n / 8 * BOX + row * 64 + ((n ^ row) & 7) * 8 + w.t2, w.o + 4 * n + 2 * h);
		if (P::TAIL) {
#pragma unroll
			for (int n = 0; n < 2; n++) put(q + P::WIDE * BOX + row * 16 + ((n ^ row >> 2) & 1) * 8 + w.t2, w.ot + 4 * n + 2 * h);
		}
		bad[h] = __ballot_sync(0xffffffffu, w.visible[h] > 0 && !ok);
	}
	__syncwarp();
	const bool vector = ((reinterpret_cast<uintptr_t>(p.o) | uintptr_t(p.ldo) * 2) & 15) == 0;
	for (int i = lane; i < 16 * (P::D / 8); i += 32) {
		const int row = strip + i / (P::D / 8), n = i % (P::D / 8);
		if (row >= rows || n * 8 >= p.dh) continue;
		const bf16 *from = P::TAIL && n >= P::WIDE * 8 ? q + P::WIDE * BOX + row * 16 + ((n ^ row >> 2) & 1) * 8 : q + n / 8 * BOX + row * 64 + ((n ^ row) & 7) * 8;
		bf16 *o = static_cast<bf16 *>(p.o) + int64_t(span.q0 + first + row) * p.ldo + head * p.dh + n * 8;
		if (vector)
			*reinterpret_cast<uint4 *>(o) = *reinterpret_cast<const uint4 *>(from);
		else
			for (int j = 0; j < 8; j++) o[j] = from[j];
	}
	if (bad[0] | bad[1]) {
		__syncwarp(); // the rows are written again, by other lanes
		const Rows<false> map(p, span, int(blockIdx.z));
		for (int r = 0; r < 16; r++)
			if ((r < 8 ? bad[0] : bad[1]) >> (r % 8 * 4) & 15) redo<bf16, P::D>(p, span, map, head, first + strip + r, 0, P::D);
	}
}

template <class P> margo_status launch_sm90a(margo_stream *st, const char *name, const Attention &p, const margo_attention_args *a) {
	Maps maps{};
	auto describe = [&](Map &map, const margo_mat &m) {
		auto one = [&](CUtensorMap *to, int box_cols) { return gpu::tensor_map_heads_bf16(to, ptr<void>(m), m.rows, a->heads, p.dh, m.ld, 64, box_cols); };
		return one(&map.wide, 64) && (!P::TAIL || one(&map.tail, 16));
	};
	if (!describe(maps.q, a->q) || !describe(maps.k, a->k) || !describe(maps.v, a->v)) return MARGO_UNSUPPORTED;
	return run(st, name, attention_wgmma<P>, attention_grid(a, P::WGS * 64), dim3(P::THREADS), sizeof(Memory<P>) + 1024, maps, p);
}

} // namespace

bool attention_sm90a_serves(const margo_context *c, const Attention &p, const margo_attention_args *a) {
	auto fits = [](const margo_mat &m) { return m.dtype == MARGO_BF16 && m.p % 16 == 0 && m.ld % 8 == 0 && m.ld >= m.cols && m.rows > 0 && m.rows < int64_t(1) << 31; };
	return sm90a_enabled(c) && !p.blocks && (p.dh == 64 || p.dh == 72 || p.dh == 80 || p.dh == 128) && p.scale >= 0 && fits(a->q) && fits(a->k) && fits(a->v) && a->o.dtype == MARGO_BF16;
}

margo_status attention_sm90a(margo_stream *st, const Attention &p, const margo_attention_args *a, int blocks) {
	// Blocks of 192 read keys from the L2 cache a third as often; those of 64 fill a device with less and waste less of short sequences.
	const bool one = blocks ? blocks == 1 : a->max_q <= 128 || ceil_div(a->max_q, 192) * a->heads * a->seqs < 4 * st->ctx->prop.multiProcessorCount;
	if (p.dh == 64 && !one) return launch_sm90a<Hopper<64, 3, 5, 1>>(st, "attention_sm90a_192x64", p, a);
	if (p.dh == 64) return launch_sm90a<Hopper<64, 1, 4, 3>>(st, "attention_sm90a_64x64", p, a);
	if (p.dh <= 80) return launch_sm90a<Hopper<80, 1, 3, 3>>(st, "attention_sm90a_64x80", p, a);
	return launch_sm90a<Hopper<128, 1, 2, 2>>(st, "attention_sm90a_64x128", p, a);
}
