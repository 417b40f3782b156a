/* Reading memory as fast as loads go, to measure kernels against. */
#include "internal.h"

typedef uint64_t words __attribute__((vector_size(32), aligned(8)));

/* A page, in words; pages that are read line by line in turn: processors run ahead of each of them,
 * and reach half as much again as with one. */
enum { PAGE = 4096 / sizeof(words), STREAMS = 8 };

typedef struct {
    const words *memory;
    int64_t count;
    atomic_ullong sum;
} reading;

static void read_part(void *context, int part, int parts) {
    reading *job = context;
    const int64_t from = job->count / parts * part;
    const int64_t to = part + 1 < parts ? job->count / parts * (part + 1) : job->count;
    const words *at = job->memory;
    words a = {0}, b = a;
    int64_t i = from;
    for (; i + STREAMS * PAGE <= to; i += STREAMS * PAGE)
        for (int64_t line = i; line < i + PAGE; line += 2)
            for (int64_t k = line; k < line + STREAMS * PAGE; k += PAGE) {
                a ^= at[k];
                b ^= at[k + 1];
            }
    for (; i < to; i++) a ^= at[i];
    a ^= b;
    atomic_fetch_xor(&job->sum, a[0] ^ a[1] ^ a[2] ^ a[3]);
}

uint64_t cvxq_read_through(cvxq_pool *pool, const void *memory, int64_t bytes) {
    reading job = {memory, bytes / (int64_t)sizeof(words), 0};
    cvxq_pool_run(pool, read_part, &job);
    return job.sum;
}
