// pool.c: the process's worker threads.
//
// A region borrows idle workers, hands each its part and waits. A worker that
// has nothing to do spins for SPIN_NS, since the next region usually follows at
// once, then sleeps on a futex. Regions are admitted in order of arrival, and
// several at a time only while there is a CPU for every worker: two engines
// that both want the whole machine take turns region by region, which is
// faster than preempting each other inside barriers.
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

#define SPIN_NS 200000  // idle worker, before it sleeps
#define YIELD_NS 20000  // waiting inside a region, before it offers its CPU to others
#define CROWDED_NS 1000 // the same when there are more workers than CPUs
#define MAX_WORKERS 1024

struct mc_team {
	mc_fn fn;
	void *ctx;
	int nt;
	int64_t spin_ns;
	_Alignas(MC_LINE) atomic_int pending;  // workers still running
	_Alignas(MC_LINE) atomic_int arrived;  // at the barrier
	_Alignas(MC_LINE) atomic_uint passed;  // barriers completed
	_Alignas(MC_LINE) _Atomic int64_t next; // mc_take
};

// The thread joins a region, or the caller withdraws it: whoever first takes
// the offer away.
static inline int take_offer(atomic_int *offer) {
	int one = 1;
	return atomic_compare_exchange_strong(offer, &one, 0);
}

// A seat is scratch for one worker of a region, and a thread unless it is used
// by callers.
struct seat {
	_Alignas(MC_LINE) atomic_uint go; // bumped for every region given to the thread
	atomic_int asleep;
	atomic_int offer; // whether the region is still there for the thread to join
	struct mc_worker w;
	size_t cap; // of w.scratch
	struct seat *next;
};

static struct {
	pthread_mutex_t mu;
	pthread_cond_t turn;
	uint64_t arrived, admitted; // tickets of regions
	int running;                // workers of admitted regions
	atomic_int ncpu;
	int threads, most; // worker threads there are, and may be
	struct seat *idle, *callers; // free seats with and without a thread
} pool = {.mu = PTHREAD_MUTEX_INITIALIZER, .turn = PTHREAD_COND_INITIALIZER, .ncpu = 1, .most = MAX_WORKERS};

int mc_pool_cpus(int n) { return n > 0 ? atomic_exchange(&pool.ncpu, n) : atomic_load(&pool.ncpu); }

void mc_pool_limit(int threads) {
	pthread_mutex_lock(&pool.mu);
	pool.most = threads < 0 ? MAX_WORKERS : threads;
	pthread_mutex_unlock(&pool.mu);
}

static inline void relax(void) {
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static long futex(atomic_uint *a, int op, unsigned v) { return syscall(SYS_futex, a, op | FUTEX_PRIVATE_FLAG, v, NULL, NULL, 0); }

// spin returns whether to keep spinning, given the number of turns so far and
// the time of the first; it looks at the clock now and then.
static inline int spin(unsigned *turns, int64_t *start, int64_t limit) {
	relax();
	if (++*turns % 64) return 1;
	int64_t t = now_ns();
	if (*turns == 64) *start = t;
	return t - *start < limit;
}

// Waiting inside a region: others must be running, so after a short spin the
// CPU is offered to them, should there be fewer CPUs than workers.
#define WAIT_WHILE(ns, cond)                                                                          \
	do {                                                                                      \
		unsigned turns_ = 0;                                                              \
		int64_t start_ = 0;                                                               \
		while (cond)                                                                      \
			if (!spin(&turns_, &start_, ns)) sched_yield();                     \
	} while (0)

static void *worker_main(void *arg) {
	struct seat *s = arg;
	unsigned seen = 0;
	for (;;) {
		unsigned turns = 0, go;
		int64_t start = 0;
		while ((go = atomic_load_explicit(&s->go, memory_order_acquire)) == seen) {
			if (spin(&turns, &start, SPIN_NS)) continue;
			atomic_store(&s->asleep, 1);
			if (atomic_load(&s->go) == seen) futex(&s->go, FUTEX_WAIT, seen);
			atomic_store(&s->asleep, 0);
		}
		seen = go;
		if (!take_offer(&s->offer)) continue;
		struct mc_team *team = s->w.team;
		team->fn(&s->w, team->ctx);
		// The team and the seat belong to the caller again after this.
		atomic_fetch_sub_explicit(&team->pending, 1, memory_order_release);
	}
	return NULL;
}

// reserve makes a seat's scratch at least bytes. Called with pool.mu not held.
static int reserve(struct seat *s, size_t bytes) {
	if (s->cap >= bytes && s->w.scratch) return 1;
	mc_free(s->w.scratch);
	s->cap = bytes;
	s->w.scratch = mc_alloc(bytes + MC_LINE);
	if (!s->w.scratch) s->cap = 0;
	return s->w.scratch != NULL;
}

static struct seat *new_seat(int thread) {
	struct seat *s = aligned_alloc(MC_LINE, sizeof *s);
	if (!s) return NULL;
	memset(s, 0, sizeof *s);
	if (!thread) return s;
	// The threads are not Go's: they must take none of its signals.
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	pthread_t t;
	int err = pthread_create(&t, NULL, worker_main, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err) {
		free(s);
		return NULL;
	}
	pthread_detach(t);
	return s;
}

// take_seat is called with pool.mu held.
static struct seat *take_seat(struct seat **list, int thread) {
	struct seat *s = *list;
	if (s) {
		*list = s->next;
		return s;
	}
	if (thread && pool.threads >= pool.most) return NULL;
	s = new_seat(thread);
	if (s && thread) pool.threads++;
	return s;
}

static void give_seat(struct seat **list, struct seat *s) {
	s->next = *list;
	*list = s;
}

// admit waits for this region's turn and takes its seats: seat[0] for the
// caller, the others with threads. Returns how many, nt unless the system gives
// no more threads; at 0, without memory for the first, nothing is held.
static int admit(int nt, struct seat **seat) {
	pthread_mutex_lock(&pool.mu);
	uint64_t ticket = pool.arrived++;
	while (ticket != pool.admitted || (pool.running > 0 && pool.running + nt > pool.ncpu))
		pthread_cond_wait(&pool.turn, &pool.mu);
	pool.admitted++;
	int got = 0;
	while (got < nt && (seat[got] = take_seat(got ? &pool.idle : &pool.callers, got > 0))) got++;
	pool.running += got;
	int waiting = pool.arrived != pool.admitted;
	pthread_mutex_unlock(&pool.mu);
	if (waiting) pthread_cond_broadcast(&pool.turn);
	return got;
}

static void leave(int nt, struct seat **seat) {
	pthread_mutex_lock(&pool.mu);
	pool.running -= nt;
	for (int i = nt - 1; i >= 0; i--) give_seat(i ? &pool.idle : &pool.callers, seat[i]);
	int waiting = pool.arrived != pool.admitted;
	pthread_mutex_unlock(&pool.mu);
	if (waiting) pthread_cond_broadcast(&pool.turn);
}

static int parallel(int nt, size_t scratch, mc_fn fn, void *ctx, int withdraw) {
	if (nt < 1) nt = 1;
	if (nt > MAX_WORKERS) nt = MAX_WORKERS;
	struct seat *seat[MAX_WORKERS];
	nt = admit(nt, seat);
	if (nt == 0) return MC_NOMEM;
	for (int i = 0; i < nt; i++)
		if (!reserve(seat[i], scratch)) {
			leave(nt, seat);
			return MC_NOMEM;
		}
	struct mc_team team = {.fn = fn, .ctx = ctx, .nt = nt, .spin_ns = nt > pool.ncpu ? CROWDED_NS : YIELD_NS};
	atomic_init(&team.pending, nt - 1);
	for (int i = 0; i < nt; i++) {
		struct seat *s = seat[i];
		s->w.tid = i;
		s->w.nt = nt;
		s->w.team = &team;
		if (i == 0) continue;
		atomic_store(&s->offer, 1);
		atomic_fetch_add(&s->go, 1);
		if (atomic_load(&s->asleep)) futex(&s->go, FUTEX_WAKE, 1);
	}
	fn(&seat[0]->w, ctx);
	for (int i = 1; withdraw && i < nt; i++)
		if (take_offer(&seat[i]->offer)) atomic_fetch_sub(&team.pending, 1);
	WAIT_WHILE(team.spin_ns, atomic_load_explicit(&team.pending, memory_order_acquire) > 0);
	leave(nt, seat);
	return MC_OK;
}

int mc_parallel(int nt, size_t scratch, mc_fn fn, void *ctx) { return parallel(nt, scratch, fn, ctx, 0); }

int mc_parallel_take(int nt, size_t scratch, mc_fn fn, void *ctx) { return parallel(nt, scratch, fn, ctx, 1); }

void mc_barrier(struct mc_worker *w) {
	struct mc_team *t = w->team;
	if (t->nt == 1) return;
	unsigned round = atomic_load_explicit(&t->passed, memory_order_relaxed);
	if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) == t->nt - 1) {
		atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
		atomic_store_explicit(&t->passed, round + 1, memory_order_release);
		return;
	}
	WAIT_WHILE(t->spin_ns, atomic_load_explicit(&t->passed, memory_order_acquire) == round);
}

int64_t mc_take(struct mc_worker *w) { return atomic_fetch_add_explicit(&w->team->next, 1, memory_order_relaxed); }

void mc_take_reset(struct mc_worker *w) {
	mc_barrier(w);
	if (w->tid == 0) atomic_store(&w->team->next, 0);
	mc_barrier(w);
}
