/* See pool.h. `turn` is twice the number of the open job, odd while a thread begins the next one.
 * That number stands in every claim and every commit as well: a thread that comes late finds that
 * its compare-and-exchange fails, whatever has happened meanwhile.
 *
 * Threads without work spin for SPIN_NS, offering their processor to others before long, and then
 * sleep on a condition.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "internal.h"

enum {
    SPIN_NS = 200000,    /* without work, before sleep */
    ALONE_NS = 20000,    /* without work, before others are offered the processor */
    PATIENCE_NS = 5000,  /* for others' last chunks, besides the time of two of one's own */
    PAUSES = 16,         /* between two looks at the clock */
    POLITE_PAUSES = 32,  /* for which the caller may begin the next job before others do */
    WORDS = sizeof(cvxq_work) / sizeof(uint64_t),
    HEAD_WORDS = offsetof(cvxq_work, context) / sizeof(uint64_t),
};

typedef struct {
    _Alignas(64) cvxq_work work; /* the thread's copy of the job of turn `copied` */
    cvxq_pool *pool;
    int index;
    pthread_t handle;
    uint64_t copied;
    int64_t chunk_ns; /* what a chunk took in the last job with any */
    void *scratch;
    size_t scratch_bytes;
    _Alignas(64) _Atomic uint64_t ticket; /* of its stretch: number of the job, next chunk */
    _Alignas(64) _Atomic uint64_t visits; /* odd while at work on chunks */
} member;

struct cvxq_pool {
    int threads;
    member *members; /* [0] is the caller */
    void *shared_scratch;
    size_t shared_bytes;
    cvxq_next next;
    void *program;
    _Atomic uint64_t *committed; /* (room,): number of the last job that committed this chunk */
    int64_t room;
    cvxq_pool *other; /* list of all pools */
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    _Alignas(64) _Atomic uint64_t turn;
    atomic_int is_over, stopping, sleepers, caller_sleeps;
    _Alignas(64) _Atomic int64_t remaining; /* chunks to commit */
    _Alignas(64) _Atomic uint64_t work[WORDS];
};

static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static cvxq_pool *pools;

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
static int copy_work(cvxq_pool *pool, member *self, uint64_t turn) {
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

static void do_chunk(cvxq_pool *pool, member *self, int64_t chunk) {
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
static int others_finish(cvxq_pool *pool, const member *self, uint64_t turn, int64_t since) {
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
static void help(cvxq_pool *pool, member *self, uint64_t turn) {
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
static void begin_job(cvxq_pool *pool, member *self, uint64_t turn) {
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

static void sleep_until_change(cvxq_pool *pool, const member *self, uint64_t turn) {
    atomic_int *counter = self->index ? &pool->sleepers : &pool->caller_sleeps;
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(counter, 1);
    while (!has_changed(pool, turn) && !is_finished(pool, turn))
        pthread_cond_wait(self->index ? &pool->wake : &pool->done, &pool->lock);
    atomic_fetch_sub(counter, 1);
    pthread_mutex_unlock(&pool->lock);
}

/* Wait until the turn changes or the next job can be begun. */
static void await_change(cvxq_pool *pool, const member *self, uint64_t turn) {
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
static void work_along(cvxq_pool *pool, member *self) {
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

static void *work_as_thread(void *argument) {
    member *self = argument;
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

void cvxq_pool_settle(cvxq_pool *pool) {
    for (int i = 0; i < pool->threads; i++) {
        _Atomic uint64_t *visits = &pool->members[i].visits;
        const uint64_t seen = atomic_load(visits);
        if (seen & 1)
            while (atomic_load(visits) == seen) sched_yield();
    }
}

void cvxq_pools_settle(void) {
    pthread_mutex_lock(&pools_lock);
    for (cvxq_pool *pool = pools; pool; pool = pool->other) cvxq_pool_settle(pool);
    pthread_mutex_unlock(&pools_lock);
}

static void stop(cvxq_pool *pool, int started) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stopping, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < started; i++) pthread_join(pool->members[i].handle, NULL);
}

static void enlist(cvxq_pool *pool) {
    pthread_mutex_lock(&pools_lock);
    pool->other = pools;
    pools = pool;
    pthread_mutex_unlock(&pools_lock);
}

static void unlist(const cvxq_pool *pool) {
    pthread_mutex_lock(&pools_lock);
    cvxq_pool **place = &pools;
    while (*place != pool) place = &(*place)->other;
    *place = pool->other;
    pthread_mutex_unlock(&pools_lock);
}

static void release(cvxq_pool *pool) {
    for (int i = 0; i < pool->threads; i++) free(pool->members[i].scratch);
    free(pool->shared_scratch);
    free(pool->committed);
    free(pool->members);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    free(pool);
}

static void *zeroed(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes)) return NULL;
    return memset(memory, 0, bytes);
}

cvxq_pool *cvxq_pool_new(int threads) {
    if (threads < 1) return NULL;
    cvxq_pool *pool = zeroed(sizeof *pool);
    member *members = zeroed(sizeof *members * (size_t)threads);
    if (!pool || !members) {
        free(pool);
        free(members);
        return NULL;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->members = members;
    pool->threads = threads;
    pool->is_over = 1;
    for (int i = 0; i < threads; i++) {
        members[i].pool = pool;
        members[i].index = i;
    }
    for (int i = 1; i < threads; i++)
        if (pthread_create(&members[i].handle, NULL, work_as_thread, &members[i])) {
            stop(pool, i);
            release(pool);
            return NULL;
        }
    enlist(pool);
    return pool;
}

void cvxq_pool_free(cvxq_pool *pool) {
    if (!pool) return;
    unlist(pool);
    stop(pool, pool->threads);
    release(pool);
}

int cvxq_pool_threads(const cvxq_pool *pool) { return pool->threads; }

void *cvxq_pool_scratch(cvxq_pool *pool, int thread, size_t bytes) {
    void **memory = thread < 0 ? &pool->shared_scratch : &pool->members[thread].scratch;
    size_t *held = thread < 0 ? &pool->shared_bytes : &pool->members[thread].scratch_bytes;
    if (*held < bytes) {
        cvxq_pool_settle(pool);
        free(*memory);
        *held = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        if (posix_memalign(memory, 64, *held)) {
            fprintf(stderr, "cvxq: no memory for %zu bytes of scratch\n", *held);
            abort();
        }
    }
    return *memory;
}
