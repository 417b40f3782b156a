/* How threads work: see pool.h. `turn` is twice the number of the open job, odd while a thread begins
 * the next one. That number stands in every claim and every commit as well: a thread that comes late
 * finds that its compare-and-exchange fails, whatever has happened meanwhile.
 *
 * Threads without work spin for SPIN_NS, offering their processor to others before long, and then
 * sleep on a condition.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "internal.h"
#include "pool_state.h"

enum {
    SPIN_NS = 200000, /* without work, before sleep */
    ALONE_NS = 20000, /* without work, before others are offered the processor */
    PATIENCE_NS = 5000, /* for others' last chunks, besides the time of two of one's own */
    PAUSES = 16, /* between two looks at the clock */
    POLITE_PAUSES = 32, /* for which the caller may begin the next job before others do */
    WORDS = CVXQ_WORK_WORDS,
    HEAD_WORDS = offsetof(cvxq_work, context) / sizeof(uint64_t),
};

static inline void pause_once(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t number_of(uint64_t turn) { return turn / 2; }

/* Words of a job's description, whatever nonsense a late thread reads. */
static size_t words_of(size_t context_bytes) {
    return HEAD_WORDS + (size_t)min_of((int64_t)(context_bytes / 8 + 1), WORDS - HEAD_WORDS);
}

static void publish(cvxq_pool *pool, const cvxq_work *work) {
    const unsigned char *from = (const unsigned char *)work;
    for (size_t i = 0; i < words_of(work->bytes); i++) {
        uint64_t word;
        memcpy(&word, from + 8 * i, 8);
        atomic_store_explicit(&pool->work[i], word, memory_order_release);
    }
}

static void copy_words(cvxq_pool *pool, cvxq_work *work, size_t from, size_t to) {
    for (size_t i = from; i < to; i++) {
        const uint64_t word = atomic_load_explicit(&pool->work[i], memory_order_acquire);
        memcpy((unsigned char *)work + 8 * i, &word, 8);
    }
}

/* Copy the job of `turn`; 0 if that is over. */
static int copy_work(cvxq_pool *pool, cvxq_member *self, uint64_t turn) {
    if (self->copied == turn) return 1;
    copy_words(pool, &self->work, 0, HEAD_WORDS);
    copy_words(pool, &self->work, HEAD_WORDS, words_of(self->work.bytes));
    self->copied = atomic_load(&pool->turn) == turn ? turn : 0;
    return self->copied == turn;
}

/* Bounds of the chunks that thread `index` takes first. */
static int64_t stretch_start(const cvxq_pool *pool, const cvxq_work *work, int index) {
    return work->chunks * index / pool->threads;
}

static uint64_t ticket_of(uint64_t number, int64_t chunk) {
    return number << 32 | (uint64_t)chunk; /* chunks are fewer than 2^31 */
}

/* The next chunk of a stretch, −1 if there is none. */
static int64_t claim(_Atomic uint64_t *ticket, uint64_t number, int64_t end) {
    uint64_t seen = atomic_load_explicit(ticket, memory_order_relaxed);
    while (seen >= ticket_of(number, 0) && seen < ticket_of(number, end))
        if (atomic_compare_exchange_weak(ticket, &seen, seen + 1))
            return (int64_t)(seen & UINT32_MAX);
    return -1;
}

static void do_chunk(cvxq_pool *pool, cvxq_member *self, int64_t chunk) {
    const cvxq_work *work = &self->work;
    work->compute(work->context, chunk, self->index);
    if (work->commit) {
        const uint64_t number = number_of(self->copied);
        uint64_t seen = atomic_load(&pool->committed[chunk]);
        if (seen >= number ||
            !atomic_compare_exchange_strong(&pool->committed[chunk], &seen, number))
            return; /* another thread was faster */
        work->commit(work->context, chunk, self->index);
    }
    atomic_fetch_sub(&pool->remaining, 1);
}

static int is_open(cvxq_pool *pool, uint64_t turn) {
    return atomic_load(&pool->turn) == turn && atomic_load(&pool->remaining) > 0;
}

/* Wait for chunks that others have claimed, but not for long; 1 if they are done. */
static int others_finish(cvxq_pool *pool, const cvxq_member *self, uint64_t turn, int64_t since) {
    const int64_t until = since + 2 * self->chunk_ns + PATIENCE_NS;
    do
        for (int i = 0; i < PAUSES; i++) {
            if (!is_open(pool, turn)) return 1;
            pause_once();
        }
    while (now_ns() < until);
    return 0;
}

/* Do what there is to do for the job of `turn`. */
static void help(cvxq_pool *pool, cvxq_member *self, uint64_t turn) {
    const uint64_t number = number_of(turn);
    const int threads = pool->threads;
    if (!copy_work(pool, self, turn)) return;
    const cvxq_work *work = &self->work;
    const int64_t begun = now_ns();
    int64_t done = 0;
    for (int i = 0; i < threads; i++) {
        const int at = (self->index + i) % threads;
        const int64_t end = stretch_start(pool, work, at + 1);
        int64_t chunk;
        for (; (chunk = claim(&pool->members[at].ticket, number, end)) >= 0; done++)
            do_chunk(pool, self, chunk);
    }
    if (!work->commit || !is_open(pool, turn)) return;
    const int64_t now = now_ns();
    if (done) self->chunk_ns = (now - begun) / done;
    if (others_finish(pool, self, turn, now)) return;
    /* A thread that claimed a chunk seems to have lost its processor. */
    const int64_t first = stretch_start(pool, work, self->index);
    for (int64_t i = 0; i < work->chunks && is_open(pool, turn); i++) {
        const int64_t chunk = (first + i) % work->chunks;
        if (atomic_load(&pool->committed[chunk]) < number) do_chunk(pool, self, chunk);
    }
}

/* No chunk is open, so only threads that are late may look at these numbers. */
static void make_room(cvxq_pool *pool, int64_t chunks) {
    if (chunks <= pool->room) return;
    cvxq_pool_settle(pool);
    free(pool->committed);
    pool->room = 2 * chunks;
    pool->committed = calloc((size_t)pool->room, sizeof *pool->committed);
    if (!pool->committed) {
        fprintf(stderr, "cvxq: no memory for a job of %lld chunks\n", (long long)chunks);
        abort();
    }
}

/* Begin the next job, as the thread that made `turn` odd. */
static void begin_job(cvxq_pool *pool, cvxq_member *self, uint64_t turn) {
    cvxq_work *work = &self->work;
    const uint64_t next = turn + 2;
    int is_over;
    self->copied = 0;
    while (!(is_over = !pool->next(pool->program, work)) && work->chunks == 1) {
        work->compute(work->context, 0, self->index); /* not worth waking anyone */
        if (work->commit) work->commit(work->context, 0, self->index);
    }
    if (is_over) {
        atomic_store(&pool->is_over, 1);
    } else {
        make_room(pool, work->chunks);
        publish(pool, work);
        atomic_store(&pool->remaining, work->chunks);
        for (int i = 0; i < pool->threads; i++)
            atomic_store_explicit(&pool->members[i].ticket,
                                  ticket_of(number_of(next), stretch_start(pool, work, i)),
                                  memory_order_relaxed);
        self->copied = next;
    }
    atomic_store(&pool->turn, next);
    const int wakes = !is_over && atomic_load(&pool->sleepers);
    if (!wakes && !atomic_load(&pool->caller_sleeps)) return;
    pthread_mutex_lock(&pool->lock);
    if (wakes) pthread_cond_broadcast(&pool->wake);
    pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->lock);
}

static int has_changed(cvxq_pool *pool, uint64_t turn) {
    return atomic_load(&pool->turn) != turn || atomic_load(&pool->stopping);
}

/* Whether all of the job of `turn` is done and its successor has not been begun. */
static int is_finished(cvxq_pool *pool, uint64_t turn) {
    return !(turn & 1) && !atomic_load(&pool->remaining) && !atomic_load(&pool->is_over) &&
           atomic_load(&pool->turn) == turn;
}

static void sleep_until_change(cvxq_pool *pool, const cvxq_member *self, uint64_t turn) {
    atomic_int *counter = self->index ? &pool->sleepers : &pool->caller_sleeps;
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(counter, 1);
    while (!has_changed(pool, turn) && !is_finished(pool, turn))
        pthread_cond_wait(self->index ? &pool->wake : &pool->done, &pool->lock);
    atomic_fetch_sub(counter, 1);
    pthread_mutex_unlock(&pool->lock);
}

/* Wait until the turn changes or the next job can be begun. */
static void await_change(cvxq_pool *pool, const cvxq_member *self, uint64_t turn) {
    const int polite = self->index ? POLITE_PAUSES : 0;
    int64_t begun = 0;
    for (int pauses = 0;; pauses++) {
        if (has_changed(pool, turn) || (pauses >= polite && is_finished(pool, turn))) return;
        pause_once();
        if (pauses % PAUSES) continue;
        const int64_t now = now_ns();
        if (!begun) begun = now;
        if (now - begun > SPIN_NS) break;
        if (now - begun > ALONE_NS) sched_yield();
    }
    sleep_until_change(pool, self, turn);
}

/* Work until the program is over, as the caller, or until the pool ends. */
static void work_along(cvxq_pool *pool, cvxq_member *self) {
    while (!atomic_load(&pool->stopping)) {
        uint64_t turn = atomic_load(&pool->turn);
        const int is_over = atomic_load(&pool->is_over);
        if (is_over && !self->index) return;
        if (!is_over && !(turn & 1)) {
            atomic_fetch_add(&self->visits, 1);
            help(pool, self, turn);
            atomic_fetch_add(&self->visits, 1);
        }
        await_change(pool, self, turn);
        if (is_finished(pool, turn) && atomic_compare_exchange_strong(&pool->turn, &turn, turn + 1))
            begin_job(pool, self, turn);
    }
}

void *cvxq_pool_member(void *argument) {
    cvxq_member *self = argument;
    work_along(self->pool, self);
    return NULL;
}

/* Without other threads: nothing is claimed, nothing is late. */
static void run_alone(cvxq_pool *pool, cvxq_next next, void *program) {
    cvxq_work *work = &pool->members[0].work;
    while (next(program, work))
        for (int64_t chunk = 0; chunk < work->chunks; chunk++) {
            work->compute(work->context, chunk, 0);
            if (work->commit) work->commit(work->context, chunk, 0);
        }
}

void cvxq_pool_run(cvxq_pool *pool, cvxq_next next, void *program) {
    if (pool->threads == 1) {
        run_alone(pool, next, program);
        return;
    }
    pool->next = next;
    pool->program = program;
    atomic_store(&pool->is_over, 0);
    work_along(pool, &pool->members[0]);
}

void cvxq_work_fill(cvxq_work *work, cvxq_chunk compute, cvxq_chunk commit, int64_t chunks,
                    const void *context, size_t bytes) {
    work->compute = compute;
    work->commit = commit;
    work->chunks = chunks;
    work->bytes = bytes;
    memcpy(work->context, context, bytes);
}

typedef struct {
    cvxq_chunk compute;
    const void *context;
    int64_t chunks; /* 0 once they are given out */
} each_program;

static void each_chunk(const void *context, int64_t chunk, int thread) {
    const each_program *program = context;
    program->compute(program->context, chunk, thread);
}

static int next_each(void *context, cvxq_work *work) {
    each_program *program = context;
    if (!program->chunks) return 0;
    cvxq_work_fill(work, each_chunk, NULL, program->chunks, program, sizeof *program);
    program->chunks = 0;
    return 1;
}

void cvxq_pool_each(cvxq_pool *pool, cvxq_chunk compute, const void *context, int64_t chunks) {
    each_program program = {compute, context, chunks};
    cvxq_pool_run(pool, next_each, &program);
}
