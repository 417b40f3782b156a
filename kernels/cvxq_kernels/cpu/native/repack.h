/* From the file's bit planes to the layout of internal.h. */
#ifndef CVXQ_REPACK_H
#define CVXQ_REPACK_H

#include "internal.h"

/* Fill a packed matrix; 0 if memory is short or the code bytes do not match the depths. */
int cvxq_repack(cvxq_pool *pool, cvxq_matrix *w, const cvxq_companded *source);

/* Bytes 16·strips × 4·(8 / strips) of codes, one column after the other, to eight code vectors. */
void cvxq_interleave(const uint8_t *columns, int strips, uint8_t codes[UNIT][VECTOR]);

/* `repack_run` of instruction sets that have one. */
#if defined(__x86_64__)
void cvxq_repack_run_avx2(int depth, const uint8_t *codes, const int64_t *starts, int64_t count,
                          uint8_t *out);
void cvxq_repack_run_avx512(int depth, const uint8_t *codes, const int64_t *starts, int64_t count,
                            uint8_t *out);
#endif

/* Call `body` with DEPTH a constant equal to `depth`. */
#define ONE_DEPTH(B, body)  \
    case B: {               \
        enum { DEPTH = B }; \
        body;               \
        break;              \
    }
#define BY_DEPTH(depth, body) \
    switch (depth) {          \
        ONE_DEPTH(1, body)    \
        ONE_DEPTH(2, body)    \
        ONE_DEPTH(3, body)    \
        ONE_DEPTH(4, body)    \
        ONE_DEPTH(5, body)    \
        ONE_DEPTH(6, body)    \
        ONE_DEPTH(7, body)    \
        ONE_DEPTH(8, body)    \
    }

#endif
