/* What a pool holds: pool.c makes and ends it, pool_work.c works with it. */
#ifndef CVXQ_POOL_STATE_H
#define CVXQ_POOL_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "pool.h"

enum { CVXQ_WORK_WORDS = sizeof(cvxq_work) / sizeof(uint64_t) };

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
} cvxq_member;

struct cvxq_pool {
    int threads;
    cvxq_member *members; /* [0] is the caller */
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
    _Alignas(64) _Atomic uint64_t work[CVXQ_WORK_WORDS];
};

/* Work until the pool ends, as the thread of a member. */
void *cvxq_pool_member(void *member);

#endif
