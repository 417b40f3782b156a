/* Large memory for weights, many matrices to one mapping, so that huge pages waste little.
 *
 * Weights are read through once per token; with pages of 4 kB the look-up of addresses alone costs
 * some 10 % of the bandwidth.  Memory is handed out from chunks that are returned to the system when
 * the last matrix in them is freed: models are loaded and dropped as a whole.
 *
 * What is larger than memory may lie in a file instead: the system then keeps the pages that were
 * used last, and writes the others to the file and drops them.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define CHUNK ((size_t)64 << 20)
#define SMALL ((size_t)256 << 10)
#define SLACK 4096 /* kernels may prefetch, never read, past the end */

typedef struct chunk {
    char *memory;
    size_t bytes, used, live;
    int file;
} chunk;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static chunk *current[2]; /* in memory, and in a file */

size_t cvxq_arena_taken(size_t bytes) { return (bytes + SLACK + 127) & ~(size_t)63; }

/* Map `bytes` more at the end of a file; room on the disk is reserved, for later there is no way
 * to say that it ran out. */
static char *map_file(int file, size_t bytes) {
    const off_t end = lseek(file, 0, SEEK_END);
    if (end < 0) return MAP_FAILED;
#if defined(__APPLE__)
    if (ftruncate(file, end + (off_t)bytes)) return MAP_FAILED;
#else
    if (posix_fallocate(file, end, (off_t)bytes)) return MAP_FAILED;
#endif
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, end);
}

/* In a file unless that is −1. */
static chunk *new_chunk(size_t bytes, int file) {
    chunk *made = malloc(sizeof *made);
    if (!made) return NULL;
    bytes = (max_of((int64_t)bytes, (int64_t)CHUNK) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    if (file >= 0) {
        char *mapped = map_file(file, bytes);
        if (mapped == MAP_FAILED) {
            free(made);
            return NULL;
        }
        *made = (chunk){mapped, bytes, 0, 0, file};
        return made;
    }
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
    *made = (chunk){memory + lead, bytes, 0, 0, -1};
    return made;
}

/* Let go of one share of a chunk; the lock is held. */
static void release(chunk *from) {
    if (--from->live) return;
    for (int i = 0; i < 2; i++)
        if (from == current[i]) current[i] = NULL;
    munmap(from->memory, from->bytes);
    free(from);
}

static int has_room(const chunk *place, size_t needed, int file) {
    return place && place->file == file && place->bytes - place->used >= needed + 64;
}

void *cvxq_arena_new(size_t bytes) { return cvxq_arena_new_in(bytes, -1); }

void *cvxq_arena_new_in(size_t bytes, int file) {
    void *memory = NULL;
    const size_t needed = cvxq_arena_taken(bytes);
    if (bytes < SMALL && file < 0) return posix_memalign(&memory, 64, needed) ? NULL : memory;
    pthread_mutex_lock(&lock);
    chunk **place = &current[file >= 0];
    if (!has_room(*place, needed, file)) {
        /* The current chunk is held by one more share, so that it outlives its first matrix. */
        chunk *made = new_chunk(needed + 64, file);
        if (made) {
            if (*place) release(*place);
            *place = made;
            made->live = 1;
        }
    }
    if (has_room(*place, needed, file)) {
        char *at = (*place)->memory + (*place)->used;
        *(chunk **)at = *place; /* 64 bytes before the memory: whose it is */
        (*place)->used += needed + 64;
        (*place)->live++;
        memory = at + 64;
    }
    pthread_mutex_unlock(&lock);
    return memory;
}

void cvxq_arena_free(void *memory, size_t bytes) { cvxq_arena_free_in(memory, bytes, -1); }

void cvxq_arena_free_in(void *memory, size_t bytes, int file) {
    if (!memory) return;
    if (bytes < SMALL && file < 0) {
        free(memory);
        return;
    }
    pthread_mutex_lock(&lock);
    chunk *owner = *(chunk **)((char *)memory - 64);
    if (owner->live == 2 && owner == current[file >= 0]) { /* its last matrix goes */
        current[file >= 0] = NULL;
        release(owner);
    }
    release(owner);
    pthread_mutex_unlock(&lock);
}
