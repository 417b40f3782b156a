/* The pool under stress, for thread sanitizers: many short programs on more threads than there are
 * processors, and threads that are held inside a chunk as if the system had stopped them. Prints
 * what went wrong and returns 1, or returns 0. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "pool.h"

enum { MOST_CHUNKS = 300, THREADS = 6 };

static uint32_t state = 1;
static uint32_t next_random(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static void fail(const char *what) {
    fprintf(stderr, "pool: %s\n", what);
    exit(1);
}

/* ---- every chunk once, every job after the one before ---------------------------------------- */

typedef struct {
    _Atomic int *values; /* (chunks,): how many jobs have added to each */
    int *found;          /* (THREADS,): what a thread computed and has not committed */
    int job;             /* jobs before this one */
} counting;

static void count_chunk(const void *context, int64_t chunk, int thread) {
    const counting *job = context;
    job->found[thread] = atomic_load(&job->values[chunk]) + 1;
    if (chunk % 16 == 3) sched_yield();
}

static void commit_chunk(const void *context, int64_t chunk, int thread) {
    const counting *job = context;
    if (job->found[thread] != job->job + 1) fail("a chunk came before the job before was done");
    atomic_store(&job->values[chunk], job->found[thread]);
}

static void count_once(const void *context, int64_t chunk, int thread) {
    const counting *job = context;
    (void)thread;
    if (atomic_fetch_add(&job->values[chunk], 1) != job->job) fail("a chunk was done twice");
}

typedef struct {
    counting job;
    int64_t chunks;
    int left;
} counting_program;

static int next_count(void *context, cvxq_work *work) {
    counting_program *program = context;
    for (int64_t i = 0; i < program->chunks; i++)
        if (program->job.values[i] != program->job.job) fail("a job began too early");
    if (!program->left--) return 0;
    const int is_repeatable = next_random() % 3 > 0;
    cvxq_work_fill(work, is_repeatable ? count_chunk : count_once,
                   is_repeatable ? commit_chunk : NULL, program->chunks, &program->job,
                   sizeof program->job);
    program->job.job++;
    return 1;
}

static void run_many(cvxq_pool *pool, int programs) {
    static _Atomic int values[MOST_CHUNKS];
    static int found[THREADS];
    for (int i = 0; i < programs; i++) {
        const int jobs = 1 + (int)(next_random() % 30);
        counting_program program = {{values, found, 0}, 1 + next_random() % MOST_CHUNKS, jobs};
        for (int c = 0; c < MOST_CHUNKS; c++) values[c] = 0;
        cvxq_pool_run(pool, next_count, &program);
        for (int64_t c = 0; c < program.chunks; c++)
            if (values[c] != jobs) fail("a chunk was left out");
        if (i % 50 == 0) cvxq_pools_settle();
    }
}

/* ---- threads that are stopped ----------------------------------------------------------------- */

typedef struct {
    atomic_int is_open, held; /* whether threads are let through; how many wait */
    _Atomic int results[MOST_CHUNKS];
    int found[THREADS];
    int value;
} gate;

typedef struct {
    gate *at;
    int value;
} gated;

static void pass_gate(const void *context, int64_t chunk, int thread) {
    const gated *job = context;
    job->at->found[thread] = job->value;
    if (thread != 0 && !atomic_load(&job->at->is_open)) {
        atomic_fetch_add(&job->at->held, 1);
        while (!atomic_load(&job->at->is_open)) sched_yield();
    } else if (thread == 0 && chunk == 0) { /* until all others are held, or for a while */
        for (int i = 0; i < 1000 && atomic_load(&job->at->held) < THREADS - 1; i++) sched_yield();
    }
}

static void commit_gated(const void *context, int64_t chunk, int thread) {
    const gated *job = context;
    atomic_store(&job->at->results[chunk], job->at->found[thread]);
}

static int next_gated(void *context, cvxq_work *work) {
    gate *at = context;
    const gated job = {at, at->value};
    if (!at->value) return 0;
    at->value = 0;
    cvxq_work_fill(work, pass_gate, commit_gated, MOST_CHUNKS, &job, sizeof job);
    return 1;
}

/* The others are held with a chunk each: the caller does all without them, and what they bring
 * when they are let go is not taken. */
static void hold_threads(cvxq_pool *pool) {
    static gate at;
    at = (gate){0};
    for (int value = 1; value <= 200; value++) {
        at.value = value;
        cvxq_pool_run(pool, next_gated, &at);
        for (int c = 0; c < MOST_CHUNKS; c++)
            if (at.results[c] != value) fail("a chunk of a held thread was not done");
    }
    if (!at.held) fail("no thread took part");
    atomic_store(&at.is_open, 1);
    cvxq_pool_settle(pool);
    for (int c = 0; c < MOST_CHUNKS; c++)
        if (at.results[c] != 200) fail("a late thread's result was taken");
}

int main(void) {
    for (int threads = 1; threads <= THREADS; threads += 5) {
        cvxq_pool *pool = cvxq_pool_new(threads);
        if (!pool) fail("no threads");
        run_many(pool, 400);
        if (threads > 1) hold_threads(pool);
        run_many(pool, 100);
        cvxq_pool_free(pool);
    }
    for (int i = 0; i < 50; i++) cvxq_pool_free(cvxq_pool_new(THREADS)); /* unused ones end, too */
    return 0;
}
