/* Reading memory as fast as loads go, to measure kernels against. */
#include "internal.h"

typedef uint64_t words __attribute__((vector_size(32), aligned(8)));

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
    words a = {0}, b = a, c = a, d = a;
    int64_t i = from;
    for (; i + 4 <= to; i += 4) {
        a ^= at[i];
        b ^= at[i + 1];
        c ^= at[i + 2];
        d ^= at[i + 3];
    }
    for (; i < to; i++) a ^= at[i];
    a ^= b ^ c ^ d;
    atomic_fetch_xor(&job->sum, a[0] ^ a[1] ^ a[2] ^ a[3]);
}

uint64_t cvxq_read_through(cvxq_pool *pool, const void *memory, int64_t bytes) {
    reading job = {memory, bytes / (int64_t)sizeof(words), 0};
    cvxq_pool_run(pool, read_part, &job);
    return job.sum;
}
