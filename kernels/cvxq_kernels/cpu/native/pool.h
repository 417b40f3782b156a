/* Threads that work through a program: one job after the other, each cut into chunks.
 *
 * Chunks are claimed, not dealt: whichever thread is on a processor takes the next one, and nobody
 * waits for a thread that has not begun. A chunk is computed into memory of the thread's own and
 * then committed, which one thread may do, once: so a chunk whose thread was put off its processor
 * is computed again by a thread that has nothing else to do, and what the late thread finds out is
 * thrown away. Any thread goes on to the next job when all chunks of one are committed. What
 * remains to wait for is a thread that was stopped while it committed or began a job.
 *
 * A late thread may still read what its chunk reads, while that changes: it must stay allocated
 * until cvxq_pool_settle. The context is copied for each thread, and may change.
 */
#ifndef CVXQ_POOL_H
#define CVXQ_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "cvxq.h"

/* One chunk on thread 0 ≤ thread < cvxq_pool_threads. */
typedef void (*cvxq_chunk)(const void *context, int64_t chunk, int thread);

enum { CVXQ_CONTEXT_BYTES = 1024 };

/* commit NULL: compute writes the results itself, is called once for each chunk and waited for. */
typedef struct {
    cvxq_chunk compute, commit;
    int64_t chunks;
    size_t bytes; /* of the context */
    _Alignas(16) unsigned char context[CVXQ_CONTEXT_BYTES];
} cvxq_work;

/* Let `work` share `chunks` chunks, with a copy of `context`. */
void cvxq_work_fill(cvxq_work *work, cvxq_chunk compute, cvxq_chunk commit, int64_t chunks,
                    const void *context, size_t bytes);

/* Fill `work`, the next job of a program; 0 at its end. Called on one thread at a time, any of the
 * pool's, when everything before is done: what does not pay to share, it does itself. */
typedef int (*cvxq_next)(void *program, cvxq_work *work);

/* Run a program to its end. Must not be called from inside one. */
void cvxq_pool_run(cvxq_pool *pool, cvxq_next next, void *program);

/* Run one job whose chunks write their results themselves; the context is not copied. */
void cvxq_pool_each(cvxq_pool *pool, cvxq_chunk compute, const void *context, int64_t chunks);

/* Wait until no thread is late with a chunk of an earlier job; in this pool, or in all. */
void cvxq_pool_settle(cvxq_pool *pool);
void cvxq_pools_settle(void);

/* Memory of one thread, or shared by all (thread −1), 64-byte aligned; grows between jobs only, and
 * what it held is then lost. Never NULL: without memory the process ends. */
void *cvxq_pool_scratch(cvxq_pool *pool, int thread, size_t bytes);

#endif
