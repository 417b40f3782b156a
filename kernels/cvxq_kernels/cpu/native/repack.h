/* From the file's bit planes to the layout of internal.h. */
#ifndef CVXQ_REPACK_H
#define CVXQ_REPACK_H

#include "internal.h"

/* Fill a packed matrix; 0 if memory is short or the code bytes do not match the depths. */
int cvxq_repack(cvxq_pool *pool, cvxq_matrix *w, const cvxq_companded *source);

/* Bytes 16·strips × 4·(8 / strips) of codes, one column after the other, to eight code vectors. */
void cvxq_interleave(const uint8_t *columns, int strips, uint8_t codes[UNIT][VECTOR]);

/* A unit of four strips at once, from the planes (8 bytes each) of its 8 columns; NULL for none. */
void cvxq_repack_unit_avx512(int depth, const uint8_t *const planes[8], uint8_t *out);

#endif
