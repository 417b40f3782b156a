/* Rounding of the input for one cluster, for any processor; see internal.h for the arithmetic. What
 * includes this file inlines it into functions for its instruction set, whose compiler then takes
 * several elements at a time: no step depends on the one before. */
#ifndef CVXQ_PREPARE_H
#define CVXQ_PREPARE_H

#include <math.h>
#include <string.h>

#include "internal.h"

#define PREPARE_INLINE static inline __attribute__((always_inline))

enum { LANES_OF_MEAN = 8 };

/* y (64,) = x · scale, zero behind `count`. Returns what the means of its groups add. */
PREPARE_INLINE float scale_block(const cvxq_matrix *w, int64_t groups, const float *x, int count,
                                 float *y) {
    const uint8_t *scales = w->scale_codes + groups;
    for (int j = 0; j < count; j++) y[j] = x[j] * w->scales[scales[j]];
    for (int j = count; j < BLOCK; j++) y[j] = 0;
    if (!w->mean_codes) return 0;
    int8_t codes[BLOCK] = {0};
    float sums[LANES_OF_MEAN] = {0};
    memcpy(codes, w->mean_codes + groups, (size_t)count);
    for (int j = 0; j < BLOCK; j += LANES_OF_MEAN)
        for (int i = 0; i < LANES_OF_MEAN; i++)
            sums[i] += y[j + i] * ((float)codes[j + i] * w->mean_step);
    for (int i = 0; i < 4; i++) sums[i] += sums[i + 4];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

/* Largest magnitude of y (64,); is infinite or NaN if any is. */
PREPARE_INLINE float largest_of(const float *y) {
    int32_t most = 0; /* magnitudes are in the order of their bits */
    for (int i = 0; i < BLOCK; i++) {
        int32_t bits;
        memcpy(&bits, y + i, 4);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value;
}

/* Round y (64,) to one block of bytes, or of two planes of them. */
PREPARE_INLINE void round_block(const float *y, const int is_narrow, int depth, float unit,
                                int64_t block, cvxq_input *out) {
    const float most = largest_of(y), top = is_narrow ? 127.0f : 32639.0f; /* 127 · 256 + 127 */
    const int is_finite = isfinite(most);
    const float inverse = is_finite && most > 0 ? fminf(top / most, 0x1.fffffep127f) : 0;
    int8_t *high = out->high + block * BLOCK, *low = out->low + block * BLOCK;
    int32_t sum = 0, low_sum = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t value = is_finite ? (int32_t)rintf(y[i] * inverse) : 0;
        const int32_t upper = is_narrow ? value : (value + 128) >> 8;
        const int32_t lower = value - upper * 256;
        high[i] = (int8_t)upper;
        sum += upper;
        if (is_narrow) continue;
        low[i] = (int8_t)lower;
        low_sum += lower;
    }
    cvxq_finish_block(out, block, depth, unit, is_finite ? most : NAN, sum, low_sum);
}

PREPARE_INLINE void prepare_input(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                                  const float *x, const uint8_t *soon, cvxq_input *out) {
    int64_t block = 0;
    float mean = 0;
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        const float unit = w->tables->unit[run->depth];
        for (int64_t i = 0; i < run->count; i += BLOCK, soon += AHEAD_BLOCK) {
            for (int j = 0; j < AHEAD_BLOCK; j += 64) __builtin_prefetch(soon + j, 0, 2);
            const int64_t at = run->first + i;
            _Alignas(64) float y[BLOCK];
            mean += scale_block(w, groups + at, x + at, (int)min_of(BLOCK, run->count - i), y);
            if (!run->depth) continue;
            if (out->exact)
                memcpy(out->exact + block * BLOCK, y, sizeof y);
            else if (run->depth <= NARROW)
                round_block(y, 1, run->depth, unit, block, out);
            else
                round_block(y, 0, run->depth, unit, block, out);
            block++;
        }
    }
    out->mean = mean;
}

#endif
