/* Reading memory as fast as loads go, to measure kernels against. */
#include "internal.h"

typedef uint64_t words __attribute__((vector_size(32), aligned(8)));

/* A page, in words; pages that are read line by line in turn: processors run ahead of each of them,
 * and reach half as much again as with one. */
enum { PAGE = 4096 / sizeof(words), STREAMS = 8 };

enum { PIECE = 1024 * PAGE }; /* words read at a time */

typedef struct {
    const words *memory;
    int64_t count;
    atomic_ullong *sum;
} reading;

static void read_piece(const void *context, int64_t chunk, int thread) {
    const reading *job = context;
    const int64_t from = chunk * PIECE, to = min_of(job->count, from + PIECE);
    const words *at = job->memory;
    words a = {0}, b = a;
    int64_t i = from;
    (void)thread;
    for (; i + STREAMS * PAGE <= to; i += STREAMS * PAGE)
        for (int64_t line = i; line < i + PAGE; line += 2)
            for (int64_t k = line; k < line + STREAMS * PAGE; k += PAGE) {
                a ^= at[k];
                b ^= at[k + 1];
            }
    for (; i < to; i++) a ^= at[i];
    a ^= b;
    atomic_fetch_xor(job->sum, a[0] ^ a[1] ^ a[2] ^ a[3]);
}

uint64_t cvxq_read_through(cvxq_pool *pool, const void *memory, int64_t bytes) {
    atomic_ullong sum = 0;
    const reading job = {memory, bytes / (int64_t)sizeof(words), &sum};
    cvxq_pool_each(pool, read_piece, &job, ceil_div(job.count, PIECE));
    return sum;
}
