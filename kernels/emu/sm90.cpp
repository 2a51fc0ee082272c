// sm90.cpp: mbarriers, TMA and wgmma.
#include "sm90.h"

#include "internal.h"

namespace emu {

namespace {

struct MBarrier { // 8 bytes of shared memory; fresh memory (all ones) is not one
	uint32_t count : 14, pending : 14, phase : 1, magic : 3;
	int32_t bytes; // expected and not yet copied
};
static_assert(sizeof(MBarrier) == 8);
constexpr uint32_t kMagic = 5;

MBarrier *barrier_at(uint64_t *p, const char *file, int line) {
	check_shared(p, 8, 8, "mbarrier", file, line);
	auto *b = reinterpret_cast<MBarrier *>(p);
	if (b->magic != kMagic) fail(cudaErrorLaunchFailure, file, line, "mbarrier: %lld bytes into shared memory there is none: not initialised, or written over",
	                             (long long)(reinterpret_cast<char *>(p) - self()->smem));
	return b;
}

void end_phase_if_complete(Block *k, MBarrier *b) {
	if (b->pending || b->bytes) return;
	b->phase ^= 1;
	b->pending = b->count;
	if constexpr (check::on) {
		k->ended[b] = std::move(k->clocks[b]);
		k->clocks[b].clear();
	}
	for (size_t i = 0; i < k->sleepers.size();) {
		if (k->sleepers[i].at != b) {
			i++;
			continue;
		}
		wake(k->sleepers[i].fiber->warp, 1u << k->sleepers[i].fiber->lane);
		k->sleepers.erase(k->sleepers.begin() + std::ptrdiff_t(i));
	}
}

// swizzled exchanges 16-byte chunks of tiles whose rows have row_bytes: 128 (chunk c of row r lies at c ^ r mod 8)
// or 32 (at c ^ r/4 mod 2). Tiles begin at a multiple of 8 rows.
uint32_t swizzled(uint32_t at, int row_bytes) { return at ^ ((at >> 7 & (row_bytes == 128 ? 7 : 1)) << 4); }

// deliver makes one copy of TMA happen.
void deliver(Block *k, size_t at) {
	Tma t = k->tma[at];
	k->tma.erase(k->tma.begin() + std::ptrdiff_t(at));
	const CUtensorMap &m = t.map;
	const int row_bytes = m.box_cols * 2;
	for (int r = 0; r < m.box_rows; r++)
		for (int c = 0; c < m.box_cols / 8; c++) {
			int64_t row = t.y + r, col = t.x + c * 8;
			uint16_t v[8] = {};
			for (int i = 0; i < 8; i++)
				if (row >= 0 && row < m.rows && t.head >= 0 && t.head < m.heads && col + i >= 0 && col + i < m.cols)
					v[i] = static_cast<const uint16_t *>(m.base)[row * m.ld + t.head * m.cols + col + i];
			memcpy(t.dst + swizzled(uint32_t(r * row_bytes + c * 16), row_bytes), v, 16);
		}
	auto *b = reinterpret_cast<MBarrier *>(t.barrier);
	if (b->magic != kMagic) return; // the next wait says so
	b->bytes -= m.bytes();
	end_phase_if_complete(k, b);
}

// Descriptor is one of a tile with rows of 128 or 32 bytes.
struct Descriptor {
	uint32_t begin, next, group, row_bytes; // bytes; next: from one block of row_bytes to that of the next columns, transposed operands only
	explicit Descriptor(uint64_t d)
	    : begin(uint32_t(d & 0x3fff) << 4), next(uint32_t(d >> 16 & 0x3fff) << 4), group(uint32_t(d >> 32 & 0x3fff) << 4), row_bytes(d >> 62 == 1 ? 128 : 32) {}
	// at is the address, counted from shared memory's begin, of an element: row of the tile as it lies in memory, col.
	uint32_t at(int row, int col) const {
		uint32_t cols = row_bytes / 2;
		return swizzled(begin + uint32_t(row / 8) * group + uint32_t(row % 8) * row_bytes + uint32_t(col) / cols * next + uint32_t(col) % cols * 2, int(row_bytes)) - 1024;
	}
};

float element(const char *smem, const Descriptor &d, int row, int col) {
	uint16_t v;
	memcpy(&v, smem + d.at(row, col), 2);
	return __builtin_bit_cast(float, uint32_t(v) << 16);
}

// check_descriptor: rows and cols as the tile lies in memory; 16 rows and cols of N if it is transposed.
void check_descriptor(uint64_t bits, int rows, int cols, bool transposed, const char *what, const char *file, int line) {
	const int swizzle = int(bits >> 62);
	if (swizzle != 1 && swizzle != 3) fail(cudaErrorLaunchFailure, file, line, "wgmma: descriptor of %s has swizzle %d, not that of 128 or 32 bytes", what, swizzle);
	const Descriptor d(bits);
	if (d.group != 8 * d.row_bytes)
		fail(cudaErrorLaunchFailure, file, line, "wgmma: %s has groups of 8 rows every %u bytes, tiles of TMA have them every %u", what, d.group, 8 * d.row_bytes);
	const uint32_t inside = d.begin & (8 * d.row_bytes - 1), last = d.begin - inside + uint32_t(rows / 8) * d.group;
	uint32_t blocks = 1;
	if (transposed) {
		blocks = (uint32_t(cols) * 2 + d.row_bytes - 1) / d.row_bytes;
		if (inside) fail(cudaErrorLaunchFailure, file, line, "wgmma: %s, transposed, begins %u bytes into %u, not with a group of 8 rows", what, inside, 8 * d.row_bytes);
		if (uint32_t(cols) * 2 % d.row_bytes) fail(cudaErrorLaunchFailure, file, line, "wgmma: %s, transposed, has %d columns in blocks of %u", what, cols, d.row_bytes / 2);
		if (blocks > 1 && (d.next < 2 * d.group || d.next % d.group))
			fail(cudaErrorLaunchFailure, file, line, "wgmma: %s has its next columns %u bytes on, inside the first ones", what, d.next);
	} else if (inside & ~(d.row_bytes - 32)) {
		fail(cudaErrorLaunchFailure, file, line, "wgmma: %s begins %u bytes into %u, not in the first row of a tile", what, inside, 8 * d.row_bytes);
	}
	if (d.begin < 1024 || last + (blocks - 1) * d.next - 1024 > self()->smem_bytes) fail(cudaErrorIllegalAddress, file, line, "wgmma: %s lies outside shared memory", what);
}

// product computes the warp's 16 rows of one wgmma into v [lane][n/2].
void product(const Warp &w, const Wgmma &g, std::vector<float> &v) {
	const char *smem = w.block->smem;
	const Descriptor da(g.a), db(g.b);
	const int row0 = (w.number - w.block->first->number) % 4 * 16, n = g.n;
	if constexpr (check::on) { // whole groups of 8 rows: what swizzling does within them does not matter
		auto at = [&](const Descriptor &d, uint32_t row) { return smem + d.begin / (8 * d.row_bytes) * (8 * d.row_bytes) - 1024 + row * d.row_bytes; };
		if (!g.in_registers) check::read(at(da, uint32_t(row0)), 16 * da.row_bytes, __builtin_return_address(0));
		if (!g.in_registers)
			check::read(at(db, 0), size_t(n) * db.row_bytes, __builtin_return_address(0));
		else
			for (uint32_t i = 0; i * db.row_bytes < uint32_t(n) * 2; i++) check::read(at(db, 0) + i * db.next, 16 * db.row_bytes, __builtin_return_address(0));
	}
	float a[16][16];
	std::vector<float> b(size_t(n) * 16), d(size_t(n) * 16);
	for (int r = 0; r < 16; r++)
		for (int k = 0; k < 16; k++)
			if (g.in_registers) { // lane r%8·4 + k%8/2 has rows r%8 (registers 0, 2) and + 8 (1, 3), columns 0 … 7 in 0 and 1
				uint32_t pair = g.registers[r % 8 * 4 + k % 8 / 2][r / 8 + k / 8 * 2];
				a[r][k] = __builtin_bit_cast(float, k % 2 ? pair & 0xffff0000 : pair << 16);
			} else {
				a[r][k] = element(smem, da, row0 + r, k);
			}
	for (int c = 0; c < n; c++)
		for (int k = 0; k < 16; k++) b[size_t(k * n + c)] = g.in_registers ? element(smem, db, k, c) : element(smem, db, c, k);
	for (int r = 0; r < 16; r++)
		for (int k = 0; k < 16; k++)
			for (int c = 0; c < n; c++) d[size_t(r * n + c)] += a[r][k] * b[size_t(k * n + c)];
	for (int l = 0; l < 32; l++)
		for (int j = 0; j < n / 8; j++)
			for (int e = 0; e < 4; e++) {
				float &x = v[size_t(l * n / 2 + j * 4 + e)];
				x = (g.accumulate ? x : 0) + d[size_t((l / 4 + e / 2 * 8) * n + j * 8 + l % 4 * 2 + e % 2)];
			}
}

} // namespace

void mbarrier_init(uint64_t *p, int count, const char *file, int line) {
	check_shared(p, 8, 8, "mbarrier", file, line);
	if (count < 1 || count > 16383) fail(cudaErrorLaunchFailure, file, line, "mbarrier: count of %d", count);
	*reinterpret_cast<MBarrier *>(p) = MBarrier{uint32_t(count), uint32_t(count), 0, kMagic, 0};
}

void mbarrier_arrive(uint64_t *p, int bytes, const char *file, int line) {
	MBarrier *b = barrier_at(p, file, line);
	if (b->pending == 0) fail(cudaErrorLaunchFailure, file, line, "mbarrier: more than %u arrivals in a phase", b->count);
	if constexpr (check::on) check::release(self()->block_of->clocks[b]);
	b->bytes += bytes;
	b->pending--;
	end_phase_if_complete(self()->block_of, b);
}

void mbarrier_wait(uint64_t *p, uint32_t parity, const char *file, int line) {
	MBarrier *b = barrier_at(p, file, line);
	if (parity > 1) fail(cudaErrorLaunchFailure, file, line, "mbarrier: parity of %u", parity);
	while (b->phase == parity) { // the phase of this parity has not ended
		self()->block_of->sleepers.push_back({b, self()});
		block_here("mbarrier_wait", file, line);
		b = barrier_at(p, file, line);
	}
	if constexpr (check::on) check::acquire(self()->block_of->ended[b]);
}

void tma_load(void *dst, const CUtensorMap *map, int x, int head, int y, uint64_t *p, const char *file, int line) {
	barrier_at(p, file, line);
	const size_t bytes = size_t(map->bytes());
	const uint32_t align = uint32_t(map->box_cols) * 16;
	check_shared(dst, bytes, 16, "tma_load: destination", file, line);
	if (shared_address(dst, file, line) % align) fail(cudaErrorMisalignedAddress, file, line, "tma_load: destination is no multiple of %u", align);
	check_global(map->base, size_t((map->rows - 1) * map->ld + map->heads * map->cols) * 2, "tma_load: matrix", file, line);
	if constexpr (check::on) {
		check::write(dst, bytes, __builtin_return_address(0));
		check::release(self()->block_of->clocks[p]);
	}
	memset(dst, 0xff, bytes);
	self()->block_of->tma.push_back({static_cast<char *>(dst), *map, x, head, y, p});
}

// deliver_late is called when no thread of the group can run. False: nothing is on its way.
bool deliver_late(Group *g) {
	for (Block &k : g->blocks)
		if (!k.tma.empty()) {
			deliver(&k, g->run->seed ? next_random(g) % k.tma.size() : 0);
			return true;
		}
	return false;
}

void check_block_exit(Block *k) {
	if (!k->tma.empty()) fail(cudaErrorLaunchFailure, nullptr, 0, "a block exits with %zu copies of TMA under way", k->tma.size());
	for (int i = 0; i < k->warps; i++)
		if (!k->first[i].products.empty()) fail(cudaErrorLaunchFailure, nullptr, 0, "warp %d exits with wgmma that it has not waited for", i);
	for (int i = 0; i < k->warps; i++)
		if (k->first[i].issued != k->first[i / 4 * 4].issued)
			fail(cudaErrorLaunchFailure, nullptr, 0, "wgmma: warp %d of a warpgroup took part in %u, warp %d in %u", i / 4 * 4, k->first[i / 4 * 4].issued, i, k->first[i].issued);
}

namespace {

void together(const std::function<void()> &f, const char *file, int line) { collective(Op::call, ~0u, const_cast<std::function<void()> *>(&f), file, line); }

} // namespace

void wgmma_fence(const char *file, int line) {
	Warp *w = self()->warp;
	together([w] { w->fenced = true; }, file, line);
}

void wgmma(float *d, int n, const uint32_t *registers, uint64_t a, uint64_t b, int accumulate, const char *file, int line) {
	Fiber *f = self();
	Warp *w = f->warp;
	if (!w->fenced) fail(cudaErrorLaunchFailure, file, line, "wgmma without wgmma_fence since the accumulators were last free");
	if (registers) {
		check_descriptor(b, 16, n, true, "b", file, line);
	} else {
		check_descriptor(a, 64, 16, false, "a", file, line);
		check_descriptor(b, n, 16, false, "b", file, line);
	}
	if (f->products == w->issued) { // the first lane opens the product, the others join it
		w->products.push_back({a, b, n, accumulate != 0, registers != nullptr, {}, {}, {}});
		w->issued++;
		// The warps of a warpgroup issue the same products.
		auto &log = w->block->wgmma_log[(w->number - w->block->first->number) / 4];
		if (log.size() < w->issued)
			log.push_back({a, b});
		else if (log[w->issued - 1].a != a || log[w->issued - 1].b != b)
			fail(cudaErrorLaunchFailure, file, line, "wgmma: warps of a warpgroup give different operands");
	}
	f->products++;
	Wgmma &g = w->products.back(); // lanes meet below, so none is ahead
	if (g.a != a || g.b != b || g.n != n || g.accumulate != (accumulate != 0) || g.in_registers != (registers != nullptr))
		fail(cudaErrorLaunchFailure, file, line, "wgmma: lanes of a warp give different operands");
	g.d[f->lane] = d, g.registers[f->lane] = registers;
	// What the accumulator holds goes along; it is NaN until the wait.
	const size_t half = size_t(n) / 2;
	bool chained = false;
	for (size_t i = 0; i + 1 < w->products.size(); i++) chained = chained || w->products[i].d[f->lane] == d;
	if (!chained) {
		g.value.resize(32 * half);
		memcpy(&g.value[size_t(f->lane) * half], d, half * 4);
		memset(static_cast<void *>(d), 0xff, half * 4);
	} else {
		for (size_t i = 0; i < half; i++)
			if (__builtin_bit_cast(uint32_t, d[i]) != ~0u) fail(cudaErrorLaunchFailure, file, line, "wgmma: the accumulator was written while a product into it is under way");
	}
	together([] {}, file, line);
}

void wgmma_settled(const void *p, size_t bytes, const char *file, int line) {
	Fiber *f = self();
	auto inside = [&](const void *q) { return q && q >= p && q < static_cast<const char *>(p) + bytes; };
	for (const Wgmma &g : f->warp->products)
		if (inside(g.d[f->lane]) || inside(g.registers[f->lane]))
			fail(cudaErrorLaunchFailure, file, line, "wgmma: registers are used while a product that %s them is under way", inside(g.d[f->lane]) ? "writes" : "reads");
}

void wgmma_commit(const char *file, int line) {
	Warp *w = self()->warp;
	together(
		[w] {
			uint32_t before = 0;
			for (uint32_t c : w->commits) before += c;
			w->commits.push_back(uint32_t(w->products.size()) - before);
		},
		file, line);
}

void wgmma_wait(int n, const char *file, int line) {
	Warp *w = self()->warp;
	together(
		[w, n] {
			if (w->commits.size() > size_t(n)) w->fenced = false; // accumulators are free
			while (w->commits.size() > size_t(n)) {
				for (uint32_t i = 0; i < w->commits.front(); i++) {
					Wgmma g = std::move(w->products.front());
					w->products.erase(w->products.begin());
					product(*w, g, g.value);
					Wgmma *next = nullptr;
					for (auto &p : w->products)
						if (!next && p.d[0] == g.d[0]) next = &p;
					if (next)
						next->value = std::move(g.value);
					else
						for (int l = 0; l < 32; l++) memcpy(g.d[l], &g.value[size_t(l * g.n / 2)], size_t(g.n) * 2);
				}
				w->commits.erase(w->commits.begin());
			}
		},
		file, line);
}

void set_registers(int n, const char *file, int line) {
	if (n % 8 || n < 24 || n > 256) fail(cudaErrorLaunchFailure, file, line, "setmaxnreg: %d registers", n);
	collective(Op::sync, ~0u, nullptr, file, line);
}

} // namespace emu
