/* Making and ending threads, and what they leave behind; see pool.h. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "internal.h"
#include "pool_state.h"

static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static cvxq_pool *pools;

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
    cvxq_member *members = zeroed(sizeof *members * (size_t)threads);
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
        if (pthread_create(&members[i].handle, NULL, cvxq_pool_member, &members[i])) {
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
