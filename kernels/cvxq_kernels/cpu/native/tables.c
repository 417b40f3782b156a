/* Level tables rounded to 8 or 16 bits.
 *
 * A step near largest / 127 is enough for 8 bits; of a few steps from there up, the one that
 * rounds this table best is taken, which makes tables of two or four levels nearly exact.
 */
#include <math.h>
#include <pthread.h>

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

/* How often each level occurs, about: its share of a normal density, up to a factor. */
static void weigh_levels(const float *levels, int count, float *weights) {
    for (int i = 0; i < count; i++) {
        const float width = levels[i + (i < count - 1)] - levels[i - (i > 0)];
        weights[i] = width * expf(-0.5f * fminf(levels[i] * levels[i], 9));
    }
}

/* Error of rounding levels to whole numbers 0 … top, of which `zero` is zero; `enough` if that. */
static float nibble_error(const float *levels, const float *weights, int count, float step,
                          float zero, float enough) {
    float sum = 0;
    for (int i = 0; i < count && sum < enough; i++) {
        const float number = levels[i] / step + zero, error = number - nearbyintf(number);
        sum += error * error * step * step * weights[i];
    }
    return sum;
}

/* Choose step and zero, the middle if `is_centered`: the best of steps up to 1.5 times the least and
 * of shifts by quarters, which have a third of the error that the least step has. */
static void choose_step(cvxq_nibble_tables *t, const float *levels, int depth, int top,
                        int is_centered) {
    const int count = 1 << depth;
    const float range = levels[count - 1] - levels[0];
    float weights[32], best = INFINITY;
    weigh_levels(levels, count, weights);
    t->unit[depth] = t->zero[depth] = 0;
    for (float steps = (float)top; range > 0 && steps >= 0.67f * (float)top; steps -= 0.5f) {
        const float step = range / steps, room = (float)top - steps;
        for (int quarter = 0; quarter < 4 && (float)quarter / 4 <= room; quarter++) {
            const float shift = (float)quarter / 4;
            const float zero = is_centered ? (float)top / 2 : shift - levels[0] / step;
            const float error = nibble_error(levels, weights, count, step, zero, best);
            if (error >= best) continue;
            best = error;
            t->unit[depth] = step;
            t->zero[depth] = zero;
        }
    }
}

static void fill_nibbles(cvxq_nibble_tables *t, const float *levels, int depth) {
    const int top = depth < 4 ? MOST_JOINED : MOST_PAIRED;
    choose_step(t, levels, depth, top, 0);
    for (int i = 0; i < 16; i++)
        for (int p = 0; p < 4; p++) {
            const int code = i >> (depth == 3 ? p : p * depth) & ((1 << depth) - 1);
            const float step = t->unit[depth];
            const float number = step > 0 ? nearbyintf(levels[code] / step + t->zero[depth]) : 0;
            t->narrow[depth - 1][p][i] = (uint8_t)fminf(fmaxf(number, 0), (float)top);
        }
}

static void fill_whole(cvxq_nibble_tables *t, const float *levels, int depth) {
    const int half = 1 << (depth - 1);
    const float top = depth == 5 ? 255 : MOST_WHOLE;
    float step = largest(levels, half) / (top + 0.5f);
    for (int i = 0; i < half; i++)
        if (!(levels[i] <= 0 && levels[2 * half - 1 - i] == -levels[i])) return;
    if (t->symmetric == depth - 1) t->symmetric = depth;
    if (depth == 5) {
        choose_step(t, levels, depth, 511, 1);
        step = t->unit[depth];
    }
    t->unit[depth] = -step;
    t->zero[depth] = -0.5f;
    for (int i = 0; i < half; i++) {
        const float size = step > 0 ? nearbyintf(-levels[i] / step - 0.5f) : 0;
        const int number = (int)fminf(fmaxf(size, 0), top);
        t->high[depth - 5][i] = (uint8_t)(number >> 8);
        t->low[depth - 5][i] = (uint8_t)number;
    }
}

static void fill(cvxq_tables *t, const float *levels) {
    memset(&t->nibble, 0, sizeof t->nibble);
    t->nibble.symmetric = NARROW;
    for (int i = 0; i < 512; i++) t->level[i] = i < 2 ? 0 : levels[i];
    t->unit[0] = 0;
    for (int depth = 1; depth <= 8; depth++) {
        if (depth <= NARROW) {
            fill_narrow(t, depth);
            fill_nibbles(&t->nibble, levels + (1 << depth), depth);
        } else {
            fill_wide(t, depth);
            fill_whole(&t->nibble, levels + (1 << depth), depth);
        }
    }
}

/* The matrices of a model share their levels: what was computed last is likely wanted again. */
void cvxq_tables_fill(cvxq_tables *tables, const float *levels) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static cvxq_tables last;
    static int is_filled;
    const size_t bytes = sizeof last.level - 2 * sizeof *levels; /* those of depth 0 mean nothing */
    pthread_mutex_lock(&lock);
    if (!is_filled || memcmp(last.level + 2, levels + 2, bytes)) fill(&last, levels);
    is_filled = 1;
    *tables = last;
    pthread_mutex_unlock(&lock);
}
