// collective.cpp: what lanes of a warp and threads of a block do together. The
// last one to come does the work for all and wakes them.
#include "internal.h"

namespace emu {

namespace {

const char *name_of(Op op) {
	switch (op) {
	case Op::sync: return "__syncwarp";
	case Op::shuffle: return "a shuffle";
	case Op::ballot: return "__ballot_sync";
	case Op::any: return "__any_sync";
	case Op::all: return "__all_sync";
	case Op::mma:
	case Op::mma_k8: return "mma";
	case Op::ldmatrix:
	case Op::ldmatrix_t: return "ldmatrix";
	case Op::call: return "an instruction of warpgroups";
	}
	return "a collective";
}

float low(uint32_t v) { return __builtin_bit_cast(float, v << 16); }
float high(uint32_t v) { return __builtin_bit_cast(float, v & 0xffff0000u); }

// mma: K is 16 or 8. Products of bf16 are exact in binary32; they are summed by ascending k
// and the sum is added to the accumulator.
template <int K> void mma(void **args) {
	alignas(64) float a[16][K], b[K][8], d[16][8];
	for (int l = 0; l < 32; l++) {
		const Mma &m = *static_cast<Mma *>(args[l]);
		int g = l / 4, t = l % 4 * 2;
		for (int h = 0; h < K / 8 * 2; h++) {
			int r = g + h % 2 * 8, c = t + h / 2 * 8;
			a[r][c] = low(m.a[h]), a[r][c + 1] = high(m.a[h]);
		}
		for (int h = 0; h < K / 8; h++) b[t + h * 8][g] = low(m.b[h]), b[t + h * 8 + 1][g] = high(m.b[h]);
	}
	for (int i = 0; i < 16; i++) {
		float sum[8] = {};
		for (int k = 0; k < K; k++)
			for (int j = 0; j < 8; j++) sum[j] += a[i][k] * b[k][j];
		for (int j = 0; j < 8; j++) d[i][j] = sum[j];
	}
	for (int l = 0; l < 32; l++) {
		const Mma &m = *static_cast<Mma *>(args[l]);
		int g = l / 4, t = l % 4 * 2;
		m.d[0] += d[g][t], m.d[1] += d[g][t + 1], m.d[2] += d[g + 8][t], m.d[3] += d[g + 8][t + 1];
	}
}

void load_matrices(void **args, bool transposed) {
	const int count = static_cast<LdMatrix *>(args[0])->count;
	for (int m = 0; m < count; m++) {
		const char *rows[8];
		unsigned hits[8] = {}, worst = 0; // 8 rows of 16 bytes should lie in 8 different groups of 4 banks
		for (int r = 0; r < 8; r++) {
			rows[r] = static_cast<const char *>(static_cast<LdMatrix *>(args[m * 8 + r])->row);
			unsigned &h = hits[reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8];
			if (++h > worst) worst = h;
		}
		group->run->matrices.fetch_add(1, std::memory_order_relaxed), group->run->matrix_waves.fetch_add(worst, std::memory_order_relaxed);
		for (int l = 0; l < 32; l++) {
			uint32_t v;
			if (!transposed) {
				memcpy(&v, rows[l / 4] + l % 4 * 4, 4);
			} else {
				uint16_t lo, hi;
				memcpy(&lo, rows[l % 4 * 2] + l / 4 * 2, 2);
				memcpy(&hi, rows[l % 4 * 2 + 1] + l / 4 * 2, 2);
				v = lo | uint32_t(hi) << 16;
			}
			static_cast<LdMatrix *>(args[l])->r[m] = v;
		}
	}
}

void vote(Op op, void **args, uint32_t mask) {
	uint32_t bits = 0;
	for (uint32_t m = mask; m; m &= m - 1) bits |= *static_cast<uint32_t *>(args[__builtin_ctz(m)]) << __builtin_ctz(m);
	uint32_t v = op == Op::ballot ? bits : op == Op::any ? bits != 0 : bits == mask;
	for (uint32_t m = mask; m; m &= m - 1) *static_cast<uint32_t *>(args[__builtin_ctz(m)]) = v;
}

void shuffle_all(const Meeting &m) {
	for (uint32_t k = m.mask; k; k &= k - 1) {
		int lane = __builtin_ctz(k);
		auto &s = *static_cast<Shuffle *>(m.arg[lane]);
		int from = s.from & 31;
		if (!(m.mask >> from & 1))
			fail(cudaErrorLaunchFailure, m.file, m.line, "a shuffle: lane %d reads lane %d, which does not take part (mask %08x)", lane, from, m.mask);
		s.out = static_cast<Shuffle *>(m.arg[from])->in;
	}
}

bool same_place(const char *a, int al, const char *b, int bl) { return al == bl && (a == b || !strcmp(a, b)); }

} // namespace

void collective(Op op, uint32_t mask, void *arg, const char *file, int line) {
	Fiber *f = self();
	Warp &w = *f->warp;
	if (!(mask >> f->lane & 1)) fail(cudaErrorLaunchFailure, file, line, "%s: lane %d is not in its own mask %08x", name_of(op), f->lane, mask);
	mask &= w.exists; // a full mask also names the lanes that the last warp of a block lacks
	if (mask & ~w.live) fail(cudaErrorLaunchFailure, file, line, "%s: mask %08x names lanes %08x that have exited", name_of(op), mask, mask & ~w.live);
	if (op >= Op::mma && mask != ~0u) fail(cudaErrorLaunchFailure, file, line, "%s: needs 32 lanes, the warp has %08x", name_of(op), mask);
	Meeting &m = w.meetings[__builtin_ctz(mask)];
	if (!m.arrived) {
		m.mask = mask, m.op = op, m.file = file, m.line = line;
	} else if (m.mask != mask || m.op != op) {
		fail(cudaErrorLaunchFailure, file, line, "divergent warp: %s with mask %08x meets %s with mask %08x at %s:%d", name_of(op), mask, name_of(m.op), m.mask,
		     base_name(m.file), m.line);
	} else if (op >= Op::mma && !same_place(m.file, m.line, file, line)) {
		fail(cudaErrorLaunchFailure, file, line, "divergent warp: %s here and at %s:%d", name_of(op), base_name(m.file), m.line);
	}
	m.arg[f->lane] = arg;
	m.arrived |= 1u << f->lane;
	if (m.arrived != mask) {
		block_here(name_of(op), file, line);
		return;
	}
	m.arrived = 0;
	switch (op) {
	case Op::sync: break;
	case Op::shuffle: shuffle_all(m); break;
	case Op::ballot:
	case Op::any:
	case Op::all: vote(op, m.arg, mask); break;
	case Op::mma: mma<16>(m.arg); break;
	case Op::mma_k8: mma<8>(m.arg); break;
	case Op::ldmatrix: load_matrices(m.arg, false); break;
	case Op::ldmatrix_t: load_matrices(m.arg, true); break;
	case Op::call: (*static_cast<const std::function<void()> *>(arg))(); break;
	}
	if constexpr (check::on)
		if (op == Op::sync || op == Op::call) check::meet(mask);
	wake(&w, mask);
}

void ldmatrix(uint32_t *r, int count, const void *row, bool transposed, const char *file, int line) {
	if (self()->lane < count * 8) {
		check_shared(row, 16, 16, "ldmatrix: row", file, line);
		if constexpr (check::on) check::read(row, 16, __builtin_return_address(0));
	}
	LdMatrix m{r, row, count};
	collective(transposed ? Op::ldmatrix_t : Op::ldmatrix, ~0u, &m, file, line);
}

namespace {

void arrive(int id, int count, bool wait, const char *file, int line) {
	Fiber *f = self();
	Block &b = *f->block_of;
	const char *what = id == 0 ? "__syncthreads" : wait ? "bar_sync" : "bar_arrive";
	if (id == 0) {
		count = b.threads;
		if (b.live < b.threads)
			fail(cudaErrorLaunchFailure, file, line, "divergent barrier: %d of %d threads of the block have exited before this __syncthreads", b.threads - b.live, b.threads);
	} else if (id < 1 || id > 15 || count % 32 || count <= 0 || count > (b.threads + 31) / 32 * 32) {
		fail(cudaErrorLaunchFailure, file, line, "%s: barrier %d of %d threads in a block of %d", what, id, count, b.threads);
	}
	Barrier &r = b.barriers[id];
	if (r.arrived) {
		if (r.count != count) fail(cudaErrorLaunchFailure, file, line, "%s: barrier %d expects %d threads here, %d at %s:%d", what, id, count, r.count, base_name(r.file), r.line);
		if (id == 0 && !same_place(r.file, r.line, file, line))
			fail(cudaErrorLaunchFailure, file, line, "divergent barrier: others wait in __syncthreads at %s:%d", base_name(r.file), r.line);
	} else {
		r.count = count, r.file = file, r.line = line;
	}
	if constexpr (check::on) check::release(b.clocks[&r]);
	r.arrived++;
	int w = f->warp->number - b.first->number;
	if (r.arrived < count) {
		if (!wait) return;
		r.waiting[w] |= 1u << f->lane;
		block_here(what, file, line);
		return;
	}
	r.arrived = 0;
	if constexpr (check::on) {
		if (wait) check::acquire(b.clocks[&r]);
		for (int i = 0; i < b.warps; i++)
			for (uint32_t m = r.waiting[i]; m; m &= m - 1) check::acquire(b.first[i].lanes + __builtin_ctz(m), b.clocks[&r]);
		b.clocks[&r].clear();
	}
	for (int i = 0; i < b.warps; i++) {
		wake(b.first + i, r.waiting[i]);
		r.waiting[i] = 0;
	}
}

} // namespace

void barrier(int id, int count, const char *file, int line) { arrive(id, count, true, file, line); }
void barrier_arrive(int id, int count, const char *file, int line) { arrive(id, count, false, file, line); }

void thread_exits(Fiber *f) {
	Block &b = *f->block_of;
	const Barrier &r = b.barriers[0];
	if (r.arrived) fail(cudaErrorLaunchFailure, r.file, r.line, "divergent barrier: a thread exits while %d others wait in __syncthreads", r.arrived);
	for (const Meeting &m : f->warp->meetings)
		if (m.arrived && m.mask >> f->lane & 1)
			fail(cudaErrorLaunchFailure, m.file, m.line, "divergent warp: lane %d exits while lanes %08x wait for it in %s", f->lane, m.arrived, name_of(m.op));
	if (!f->copies.empty()) fail(cudaErrorLaunchFailure, nullptr, 0, "a thread exits with %zu cp.async that it has not waited for", f->copies.size());
}

} // namespace emu
