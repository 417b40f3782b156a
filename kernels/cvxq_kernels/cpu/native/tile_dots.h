/* The inner loops for sets that take dot products of bytes, over whole code vectors, written once;
 * each includes this file after defining, besides what tile.h wants,
 *
 *   codes_t           one code vector or the levels of one, 64 bytes
 *   sums_t            16 int32 sums, one per row of a strip
 *   inputs_t          four inputs, as `dot` wants them
 *   sums_of(n), inputs_at(p), dot(sums, levels, inputs)
 *   decode_1 … decode_4(unit, tables, levels[8])          narrow depths
 *   decode_5 … decode_8(unit, tables, high[8], low[8])    wide depths
 *   add_sums(out, sums, scale)                  out[16] += scale · sums
 *   add_sums2(out, sums, sums2, scale)          out[16] += scale · (256 · sums + sums2)
 */
#include "tile.h"

/* Depths 1–4: one 8-bit dot product per four weights. */
#define NARROW_RUN(DEPTH)                                                                  \
    INLINE void run_##DEPTH(const run_job *job, const int strips, const int batch) {       \
        const int per_unit = 4 * UNIT / strips;                                            \
        const uint8_t *unit = job->codes;                                                  \
        int64_t block = job->block;                                                        \
        for (int64_t left = job->columns; left > 0; left -= BLOCK, block++) {              \
            const int64_t units = (min_of(left, BLOCK) + per_unit - 1) / per_unit;         \
            sums_t sums[BATCH][4];                                                         \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++) \
                sums[m][s] = sums_of(job->inputs[m].start[block]);                         \
            for (int64_t u = 0; u < units; u++, unit += 64 * DEPTH) {                      \
                codes_t levels[UNIT];                                                      \
                fetch_ahead(unit, DEPTH, job->by_page);                                    \
                decode_##DEPTH(unit, job->tables, levels);                                 \
                UNROLL for (int q = 0; q < UNIT / strips; q++)                             \
                    UNROLL for (int m = 0; m < batch; m++) {                               \
                    const int64_t at = block * BLOCK + u * per_unit + 4 * q;               \
                    const inputs_t x = inputs_at(job->inputs[m].high + at);                \
                    UNROLL for (int s = 0; s < strips; s++)                                \
                        sums[m][s] = dot(sums[m][s], levels[q * strips + s], x);           \
                }                                                                          \
            }                                                                              \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++) \
                add_sums(job->sums + m * TILE + s * STRIP, sums[m][s],                     \
                         job->inputs[m].scale[block]);                                     \
        }                                                                                  \
    }

/* Depths 5–8: high · high, and high · low + low · high; low · low is below the rounding. */
#define WIDE_RUN(DEPTH)                                                                      \
    INLINE void run_##DEPTH(const run_job *job, const int strips, const int batch) {         \
        const int per_unit = 4 * UNIT / strips;                                              \
        const uint8_t *unit = job->codes;                                                    \
        int64_t block = job->block;                                                          \
        for (int64_t left = job->columns; left > 0; left -= BLOCK, block++) {                \
            const int64_t units = (min_of(left, BLOCK) + per_unit - 1) / per_unit;           \
            sums_t sums[BATCH][4], sums2[BATCH][4];                                          \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++) { \
                sums[m][s] = sums_of(job->inputs[m].start[block]);                           \
                sums2[m][s] = sums_of(job->inputs[m].start2[block]);                         \
            }                                                                                \
            for (int64_t u = 0; u < units; u++, unit += 64 * DEPTH) {                        \
                codes_t high[UNIT], low[UNIT];                                               \
                fetch_ahead(unit, DEPTH, job->by_page);                                      \
                decode_##DEPTH(unit, job->tables, high, low);                                \
                UNROLL for (int q = 0; q < UNIT / strips; q++)                               \
                    UNROLL for (int m = 0; m < batch; m++) {                                 \
                    const int64_t at = block * BLOCK + u * per_unit + 4 * q;                 \
                    const inputs_t xh = inputs_at(job->inputs[m].high + at);                 \
                    const inputs_t xl = inputs_at(job->inputs[m].low + at);                  \
                    UNROLL for (int s = 0; s < strips; s++) {                                \
                        const int v = q * strips + s;                                        \
                        sums[m][s] = dot(sums[m][s], high[v], xh);                           \
                        sums2[m][s] = dot(sums2[m][s], high[v], xl);                         \
                        sums2[m][s] = dot(sums2[m][s], low[v], xh);                          \
                    }                                                                        \
                }                                                                            \
            }                                                                                \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)   \
                add_sums2(job->sums + m * TILE + s * STRIP, sums[m][s], sums2[m][s],         \
                          job->inputs[m].scale[block]);                                      \
        }                                                                                    \
    }

NARROW_RUN(1)
NARROW_RUN(2)
NARROW_RUN(3)
NARROW_RUN(4)
WIDE_RUN(5)
WIDE_RUN(6)
WIDE_RUN(7)
WIDE_RUN(8)

#include "tile_table.h"
