/* Large memory for weights, many matrices to one mapping, so that huge pages waste little.
 *
 * Weights are read through once per token; with pages of 4 kB the look-up of addresses alone costs
 * some 10 % of the bandwidth.  Memory is handed out from chunks that are returned to the system when
 * the last matrix in them is freed: models are loaded and dropped as a whole.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define CHUNK ((size_t)64 << 20)
#define SMALL ((size_t)256 << 10)
#define SLACK 4096 /* kernels may prefetch, never read, past the end */

typedef struct chunk {
    char *memory;
    size_t bytes, used, live;
} chunk;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static chunk *current;

static size_t padded(size_t bytes) { return (bytes + SLACK + 127) & ~(size_t)63; }

static chunk *new_chunk(size_t bytes) {
    chunk *made = malloc(sizeof *made);
    if (!made) return NULL;
    bytes = (max_of((int64_t)bytes, (int64_t)CHUNK) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    char *memory = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        free(made);
        return NULL;
    }
    size_t lead = (HUGE_PAGE - ((uintptr_t)memory & (HUGE_PAGE - 1))) & (HUGE_PAGE - 1);
    if (lead) munmap(memory, lead);
    munmap(memory + lead + bytes, HUGE_PAGE - lead);
#ifdef MADV_HUGEPAGE
    madvise(memory + lead, bytes, MADV_HUGEPAGE);
#endif
    *made = (chunk){memory + lead, bytes, 0, 0};
    return made;
}

/* Let go of one share of a chunk; the lock is held. */
static void release(chunk *from) {
    if (--from->live) return;
    if (from == current) current = NULL;
    munmap(from->memory, from->bytes);
    free(from);
}

void *cvxq_arena_new(size_t bytes) {
    void *memory = NULL;
    const size_t needed = padded(bytes);
    if (bytes < SMALL) return posix_memalign(&memory, 64, needed) ? NULL : memory;
    pthread_mutex_lock(&lock);
    if (!current || current->bytes - current->used < needed + 64) {
        /* The current chunk is held by one more share, so that it outlives its first matrix. */
        chunk *made = new_chunk(needed + 64);
        if (made) {
            if (current) release(current);
            current = made;
            current->live = 1;
        }
    }
    if (current && current->bytes - current->used >= needed + 64) {
        char *at = current->memory + current->used;
        *(chunk **)at = current; /* 64 bytes before the memory: whose it is */
        current->used += needed + 64;
        current->live++;
        memory = at + 64;
    }
    pthread_mutex_unlock(&lock);
    return memory;
}

void cvxq_arena_free(void *memory, size_t bytes) {
    if (!memory) return;
    if (bytes < SMALL) {
        free(memory);
        return;
    }
    pthread_mutex_lock(&lock);
    chunk *owner = *(chunk **)((char *)memory - 64);
    release(owner);
    if (owner == current && owner->live == 1) {
        current = NULL;
        release(owner);
    }
    pthread_mutex_unlock(&lock);
}
