/* Threads that are there when needed and asleep when not.
 *
 * A task is published by raising `generation`.  Workers that wait spin for at most SPIN_NS, and
 * only between begin and end; then they sleep on a condition, so that a busy machine loses
 * little.  The caller does part 0 itself and waits for the others in the same way.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "internal.h"

enum { SPIN_NS = 200000, PAUSES = 32 };

typedef struct {
    _Alignas(64) void *memory;
    size_t bytes;
} scratch_slot;

struct cvxq_pool {
    int threads;
    pthread_t *handles;
    scratch_slot *scratch; /* [0] shared, [1 + part] of each part */
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    cvxq_task task;
    void *context;
    _Alignas(64) atomic_uint generation;
    atomic_uint epoch; /* raised by begin, to wake workers before the first task */
    atomic_int spinning, stopping;
    _Alignas(64) atomic_int sleepers;
    _Alignas(64) atomic_int remaining;
    atomic_int caller_sleeps;
    _Alignas(64) atomic_int arrived;
    atomic_uint barrier_round;
};

typedef struct {
    cvxq_pool *pool;
    int part;
} worker_start;

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

static int is_called(cvxq_pool *pool, unsigned seen) {
    return atomic_load(&pool->generation) != seen || atomic_load(&pool->stopping);
}

/* Wait for a task newer than `seen`; spins first while that is allowed. */
static void await_task(cvxq_pool *pool, unsigned seen) {
    unsigned epoch = atomic_load(&pool->epoch);
    for (;;) {
        int64_t until = now_ns() + SPIN_NS;
        while (atomic_load(&pool->spinning) && now_ns() < until)
            for (int i = 0; i < PAUSES; i++) {
                if (is_called(pool, seen)) return;
                pause_once();
            }
        pthread_mutex_lock(&pool->lock);
        atomic_fetch_add(&pool->sleepers, 1);
        while (!is_called(pool, seen) && atomic_load(&pool->epoch) == epoch)
            pthread_cond_wait(&pool->wake, &pool->lock);
        atomic_fetch_sub(&pool->sleepers, 1);
        epoch = atomic_load(&pool->epoch);
        pthread_mutex_unlock(&pool->lock);
        if (is_called(pool, seen)) return;
    }
}

static void *work(void *argument) {
    worker_start start = *(worker_start *)argument;
    cvxq_pool *pool = start.pool;
    free(argument);
    unsigned seen = 0;
    for (;;) {
        await_task(pool, seen);
        if (atomic_load(&pool->stopping)) return NULL;
        seen = atomic_load(&pool->generation);
        pool->task(pool->context, start.part, pool->threads);
        if (atomic_fetch_sub(&pool->remaining, 1) == 1 && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

static void wake_all(cvxq_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

cvxq_pool *cvxq_pool_new(int threads) {
    if (threads < 1) return NULL;
    cvxq_pool *pool = NULL;
    if (posix_memalign((void **)&pool, 64, sizeof *pool)) return NULL;
    *pool = (cvxq_pool){.threads = 1};
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->handles = calloc((size_t)threads, sizeof *pool->handles);
    size_t slots = sizeof(scratch_slot) * ((size_t)threads + 1);
    if (posix_memalign((void **)&pool->scratch, 64, slots)) pool->scratch = NULL;
    for (int i = 0; pool->scratch && i <= threads; i++) pool->scratch[i] = (scratch_slot){0};
    int is_whole = pool->handles && pool->scratch;
    pool->threads = threads;
    int started = 1;
    for (; is_whole && started < threads; started++) {
        worker_start *start = malloc(sizeof *start);
        if (start) *start = (worker_start){pool, started};
        if (!start || pthread_create(&pool->handles[started], NULL, work, start)) {
            free(start);
            is_whole = 0;
            break;
        }
    }
    if (is_whole) return pool;
    pool->threads = started; /* only these can be joined */
    cvxq_pool_free(pool);
    return NULL;
}

void cvxq_pool_free(cvxq_pool *pool) {
    if (!pool) return;
    atomic_store(&pool->stopping, 1);
    wake_all(pool);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->handles[i], NULL);
    for (int i = 0; pool->scratch && i <= pool->threads; i++) free(pool->scratch[i].memory);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    free(pool->scratch);
    free(pool->handles);
    free(pool);
}

int cvxq_pool_threads(const cvxq_pool *pool) { return pool->threads; }

void cvxq_pool_begin(cvxq_pool *pool) {
    atomic_store(&pool->spinning, 1);
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->sleepers)) wake_all(pool);
}

void cvxq_pool_end(cvxq_pool *pool) { atomic_store(&pool->spinning, 0); }

void cvxq_pool_run(cvxq_pool *pool, cvxq_task task, void *context) {
    if (pool->threads > 1) {
        pool->task = task;
        pool->context = context;
        atomic_store(&pool->remaining, pool->threads - 1);
        atomic_fetch_add(&pool->generation, 1);
        if (atomic_load(&pool->sleepers)) wake_all(pool);
    }
    task(context, 0, pool->threads);
    if (pool->threads == 1) return;
    int64_t until = now_ns() + SPIN_NS;
    do
        for (int i = 0; i < PAUSES; i++) {
            if (!atomic_load(&pool->remaining)) return;
            pause_once();
        }
    while (now_ns() < until);
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeps, 1);
    while (atomic_load(&pool->remaining)) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_mutex_unlock(&pool->lock);
}

void cvxq_pool_barrier(cvxq_pool *pool) {
    if (pool->threads == 1) return;
    unsigned round = atomic_load(&pool->barrier_round);
    if (atomic_fetch_add(&pool->arrived, 1) == pool->threads - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_fetch_add(&pool->barrier_round, 1);
        return;
    }
    /* A part that was put off its processor must not be starved by those that wait for it. */
    for (int i = 0; atomic_load(&pool->barrier_round) == round; i++) {
        if (i < 4096) {
            pause_once();
        } else {
            sched_yield();
        }
    }
}

void *cvxq_pool_scratch(cvxq_pool *pool, int part, size_t bytes) {
    scratch_slot *slot = &pool->scratch[part + 1];
    if (slot->bytes < bytes) {
        free(slot->memory);
        slot->bytes = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        if (posix_memalign(&slot->memory, 64, slot->bytes)) {
            fprintf(stderr, "cvxq: no memory for %zu bytes of scratch\n", slot->bytes);
            abort();
        }
    }
    return slot->memory;
}
