/* Level tables rounded to 8 or 16 bits.
 *
 * A step near largest / 127 is enough for 8 bits; of a few steps from there up, the one that
 * rounds this table best is taken, which makes tables of two or four levels nearly exact.
 */
#include <math.h>

#include "internal.h"

static float largest(const float *levels, int count) {
    float most = 0;
    for (int i = 0; i < count; i++) most = fmaxf(most, fabsf(levels[i]));
    return most;
}

static double rounding_error(const float *levels, int count, float step) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        double error = levels[i] - (double)step * nearbyint((double)levels[i] / step);
        /* Outer levels are used rarely: weigh by a rough normal density. */
        sum += error * error * exp(-0.5 * fmin((double)levels[i] * levels[i], 9));
    }
    return sum;
}

static float best_step(const float *levels, int count) {
    float most = largest(levels, count);
    float best = most / 127;
    for (int top = 126; top >= 84; top--)
        if (rounding_error(levels, count, most / top) < rounding_error(levels, count, best))
            best = most / top;
    return best;
}

static void fill_narrow(cvxq_tables *t, int depth) {
    int count = 1 << depth;
    const float *levels = t->level + count;
    float step = t->unit[depth] = best_step(levels, count);
    uint8_t rounded[16];
    for (int i = 0; i < count; i++)
        rounded[i] = (uint8_t)(128 + (step > 0 ? (int)nearbyintf(levels[i] / step) : 0));
    for (int i = 0; i < 64; i++) {
        if (depth == 4) t->narrow4[i] = rounded[i & 15];
        for (int s = 0; depth == 3 && s < 2; s++) t->narrow3[s][i] = rounded[i >> (3 * s) & 7];
        for (int s = 0; depth == 2 && s < 3; s++) t->narrow2[s][i] = rounded[i >> (2 * s) & 3];
        for (int s = 0; depth == 1 && s < 6; s++) t->narrow1[s][i] = rounded[i >> s & 1];
    }
}

static void fill_wide(cvxq_tables *t, int depth) {
    int count = 1 << depth;
    const float *levels = t->level + count;
    float step = t->unit[depth] = largest(levels, count) / 32512;
    for (int i = 0; i < 256; i++) {
        int value = step > 0 ? (int)nearbyintf(levels[i & (count - 1)] / step) : 0;
        t->high[depth - 5][i] = (uint8_t)((value + 32768) >> 8);
        t->low[depth - 5][i] = (uint8_t)(value & 255);
    }
}

void cvxq_tables_fill(cvxq_tables *t, const float *levels) {
    for (int i = 0; i < 512; i++) t->level[i] = i < 2 ? 0 : levels[i];
    t->unit[0] = 0;
    for (int depth = 1; depth <= 8; depth++) {
        if (depth <= NARROW) {
            fill_narrow(t, depth);
        } else {
            fill_wide(t, depth);
        }
    }
}
