/* From the file's bit planes to the layout of internal.h. */
#ifndef CVXQ_REPACK_H
#define CVXQ_REPACK_H

#include "internal.h"

/* Fill a packed matrix; 0 if memory is short or the code bytes do not match the depths. */
int cvxq_repack(cvxq_pool *pool, cvxq_matrix *w, const cvxq_companded *source);

/* Bytes 16·strips × 4·(8 / strips) of codes, one column after the other, to eight code vectors. */
void cvxq_interleave(const uint8_t *columns, int strips, uint8_t codes[UNIT][VECTOR]);

/* The units of a run in a tile of four strips that is a whole cluster. The planes (8 bytes each) of
 * its `count` columns begin at codes + starts[0], codes + starts[1], … */
void cvxq_repack_run_avx512(int depth, const uint8_t *codes, const int64_t *starts, int64_t count,
                            uint8_t *out);

#endif
