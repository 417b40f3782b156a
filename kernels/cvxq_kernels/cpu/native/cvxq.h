/* Matrices that stay packed, and products with them: the C interface of the CPU kernels.
 *
 * Everything here is plain C with pointers and sizes, so that Python reaches it through ctypes and
 * the decoder through this header. Weights W are (N, K): N outputs, K inputs; inputs x are (M, K)
 * and results y (M, N), float32, C order, without gaps. No function keeps a pointer that it was
 * given, except where it says so. Functions that allocate return NULL when memory is short.
 */
#ifndef CVXQ_H
#define CVXQ_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define CVXQ_API __attribute__((visibility("default")))
#else
#define CVXQ_API
#endif

/* ---- threads ------------------------------------------------------------------------------- */

/* A fixed set of threads, the caller's among them, and the scratch memory of each. One pool serves
 * one caller at a time. Threads without work spin for a fraction of a millisecond, then sleep. */
typedef struct cvxq_pool cvxq_pool;

CVXQ_API cvxq_pool *cvxq_pool_new(int threads);
CVXQ_API void cvxq_pool_free(cvxq_pool *pool);
CVXQ_API int cvxq_pool_threads(const cvxq_pool *pool);

/* ---- matrices ------------------------------------------------------------------------------ */

typedef struct cvxq_matrix cvxq_matrix; /* read-only once made: any number of pools may use it */

/* One companded matrix as FORMAT.md's payload holds it, decoded except for its codes. The stored
 * matrix has `rows` rows and `columns` columns: (N, K), or (K, N) if transposed. Groups are
 * [cluster][column], clusters = partitions · ceil((rows / partitions) / group_size). */
typedef struct {
    int64_t rows, columns;
    int64_t group_size, partitions;
    int transposed;
    const uint8_t *depths;      /* (clusters, columns), 0 … 8 */
    const uint8_t *scale_codes; /* (clusters, columns) */
    const int8_t *mean_codes;   /* (clusters, columns), or NULL */
    const int64_t *permutation; /* (rows,): row at each stored position, or NULL */
    const int32_t *order;       /* (columns,): an order in which depths never fall, or NULL */
    const uint8_t *codes;       /* bit planes */
    int64_t code_bytes;
    void *pages; /* whole pages of a read-only mapping that the codes lie in, which the system may
                    take back when they are repacked; or NULL */
    int64_t page_bytes;
    const float *scales;        /* (256,): scale unit · scale table, unused entries 0 */
    const float *means;         /* (256,): mean of code i at [i + 128]; NULL without means */
    const float *levels;        /* (512,): depth B's table at [2^B, 2^(B+1)) */
    const float *row_scales;    /* (N,): factor of each output's weights, or NULL: none */
    const float *bias;          /* (N,), or NULL */
    int file; /* −1, or a file of the caller's that is to hold the repacked codes:
                                   its pages need no memory while they are not used */
} cvxq_companded;

enum { CVXQ_BF16 = 0, CVXQ_F16 = 1, CVXQ_F32 = 2 };

/* Repack on the pool's threads; nothing given is needed afterwards. */
CVXQ_API cvxq_matrix *cvxq_matrix_pack(cvxq_pool *pool, const cvxq_companded *source);
/* The same for many, each by one thread: made[i] of sources[i], NULL where that failed. */
CVXQ_API void cvxq_matrices_pack(cvxq_pool *pool, const cvxq_companded *sources, int64_t count,
                                 cvxq_matrix **made);
CVXQ_API cvxq_matrix *cvxq_matrix_dense(cvxq_pool *pool, const void *weights, int dtype,
                                        int64_t outputs, int64_t inputs, const float *bias);
CVXQ_API void cvxq_matrix_free(cvxq_matrix *matrix);
CVXQ_API int64_t cvxq_matrix_outputs(const cvxq_matrix *matrix); /* N */
CVXQ_API int64_t cvxq_matrix_inputs(const cvxq_matrix *matrix); /* K */
CVXQ_API int64_t cvxq_matrix_bytes(const cvxq_matrix *matrix); /* memory held, all of it */

/* y[i] (M, N_i) = x (M, K) · W_iᵀ + bias_i for `count` matrices of the same K, on all threads at
 * once: q/k/v, or gate/up. exact: sums of float32 products instead of the fast integer ones. The
 * result does not depend on the number of threads. x and y must not overlap. */
CVXQ_API void cvxq_matmul(cvxq_pool *pool, const cvxq_matrix *const *weights, int count,
                          const float *x, int64_t m, float *const *y, int exact);

/* out (count, K) = rows ids[i] of W, each 0 … N − 1, without bias: embeddings. */
CVXQ_API void cvxq_rows(cvxq_pool *pool, const cvxq_matrix *matrix, const int64_t *ids,
                        int64_t count, float *out);

/* ---- instruction sets ---------------------------------------------------------------------- */

/* Name of the set in use: "avx512", "avx2", "neon" or "scalar". */
CVXQ_API const char *cvxq_isa(void);
/* Use this one from now on; 0 if the machine or the build lacks it. "" goes back to the best.
 * For tests: not while a product is running. */
CVXQ_API int cvxq_force_isa(const char *name);

/* The CRC-32 of some bytes, as zlib has it; 0 if this processor has no fast way to it. */
CVXQ_API int cvxq_crc32(const void *data, int64_t bytes, uint32_t *crc);

/* Read `bytes` from memory on all threads as fast as loads go; what is returned depends on every
 * byte, so that no read is left out. For measuring bandwidth. */
CVXQ_API uint64_t cvxq_read_through(cvxq_pool *pool, const void *memory, int64_t bytes);

/* ---- mapped files --------------------------------------------------------------------------- */

/* From now on, write `line` to stderr and exit with `exit_code` where a mapped file turns out to be
 * shorter than it was. Returns 1, or 0 on systems that do not tell. */
CVXQ_API int cvxq_catch_bus_errors(const char *line, int exit_code);

#endif
