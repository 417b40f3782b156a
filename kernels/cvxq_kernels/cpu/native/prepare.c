/* Rounding of the input for one cluster, in portable C; see internal.h for the arithmetic. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "internal.h"

/* Round `count` scaled inputs (the rest of the block is zero) to one block of bytes. */
static void round_block(const float *y, int count, int depth, float unit, int64_t block,
                        cvxq_input *out) {
    float most = 0;
    int is_finite = 1;
    for (int i = 0; i < count; i++) {
        const float size = fabsf(y[i]);
        is_finite &= size <= FLT_MAX; /* NaN is not */
        most = size > most ? size : most;
    }
    const float top = depth <= NARROW ? 127.0f : 32639.0f; /* 127 · 256 + 127 */
    const float inverse = is_finite && most > 0 ? fminf(top / most, FLT_MAX) : 0;
    int8_t *high = out->high + block * BLOCK, *low = out->low + block * BLOCK;
    int32_t sum = 0, low_sum = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t value = i < count && is_finite ? (int32_t)rintf(y[i] * inverse) : 0;
        const int32_t upper = depth <= NARROW ? value : (value + 128) >> 8;
        const int32_t lower = value - upper * 256;
        high[i] = (int8_t)upper;
        if (depth > NARROW) low[i] = (int8_t)lower;
        sum += upper;
        low_sum += lower;
    }
    cvxq_finish_block(out, block, depth, unit, is_finite ? most : NAN, sum, low_sum);
}

void cvxq_prepare_portable(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                           const float *x, const uint8_t *soon, cvxq_input *out) {
    int64_t block = 0;
    float mean = 0;
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        for (int64_t i = 0; i < run->count; i += BLOCK, soon += AHEAD_BLOCK) {
            for (int j = 0; j < AHEAD_BLOCK; j += 64) __builtin_prefetch(soon + j, 0, 2);
            const int count = (int)min_of(BLOCK, run->count - i);
            float y[BLOCK], part = 0;
            for (int j = 0; j < count; j++) {
                const int64_t at = run->first + i + j;
                y[j] = x[at] * w->scales[w->scale_codes[groups + at]];
                if (w->mean_codes)
                    part += y[j] * ((float)w->mean_codes[groups + at] * w->mean_step);
            }
            mean += part;
            if (run->depth) {
                if (out->exact) {
                    float *exact = out->exact + block * BLOCK;
                    memset(exact, 0, sizeof(float) * BLOCK);
                    memcpy(exact, y, sizeof(float) * (size_t)count);
                } else {
                    round_block(y, count, run->depth, w->tables->unit[run->depth], block, out);
                }
                block++;
            }
        }
    }
    out->mean = mean;
}
