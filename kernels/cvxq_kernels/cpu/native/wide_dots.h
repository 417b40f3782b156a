/* Products of bfloat16 by AVX-512's dot products of pairs (AVX512-BF16); for wide_bf16.c only. */
#ifndef CVXQ_WIDE_DOTS_H
#define CVXQ_WIDE_DOTS_H

#include "wide_bf16.h"

enum { DOT_INPUTS = 6 }; /* with four strips: 24 sums, four weights and an input in registers */

/* Sums of some inputs += inputs · weights of one step. */
INLINE void add_step(const int inputs, const int strips, const uint16_t *x, const uint8_t *weights,
                     __m512 sums[DOT_INPUTS][4]) {
    for (int pair = 0; pair < PAIRS; pair++, weights += PAIR, x += 2) {
        __m512bh pairs[4];
    UNROLL for (int s = 0; s < strips; s++)
            pairs[s] = (__m512bh)_mm512_load_si512(weights + s * VECTOR);
        UNROLL for (int i = 0; i < inputs; i++) {
            int32_t two;
            memcpy(&two, x + i * STEP, sizeof two);
            const __m512bh input = (__m512bh)_mm512_set1_epi32(two);
            UNROLL for (int s = 0; s < strips; s++)
                sums[i][s] = _mm512_dpbf16_ps(sums[i][s], pairs[s], input);
        }
    }
}

INLINE void dot_block(const int inputs, const int strips, const batch_state *b, int64_t steps,
                      int64_t m) {
    float *out = b->sums + m * TILE;
    __m512 sums[DOT_INPUTS][4];
    UNROLL for (int i = 0; i < inputs; i++) UNROLL for (int s = 0; s < strips; s++)
        sums[i][s] = b->is_first ? _mm512_setzero_ps()
                                 : _mm512_load_ps(out + i * TILE + s * STRIP);
    for (int64_t s = 0; s < steps; s++) {
        const int64_t at = ((b->first + s) * b->stride + m) * STEP;
        const int64_t place = s * PAIRS * PAIR;
        add_step(inputs, strips, b->high + at, b->weights + place, sums);
        if (b->first + s < b->split) continue;
        add_step(inputs, strips, b->high + at, b->rest + place, sums);
        add_step(inputs, strips, b->low + at, b->weights + place, sums);
    }
    UNROLL for (int i = 0; i < inputs; i++) UNROLL for (int s = 0; s < strips; s++)
        _mm512_store_ps(out + i * TILE + s * STRIP, sums[i][s]);
}

INLINE void dot_inputs(const int strips, const batch_state *b, int64_t steps) {
    int64_t m = 0;
    for (; m + DOT_INPUTS <= b->rows; m += DOT_INPUTS) dot_block(DOT_INPUTS, strips, b, steps, m);
    switch (b->rows - m) {
    case 5: dot_block(5, strips, b, steps, m); break;
    case 4: dot_block(4, strips, b, steps, m); break;
    case 3: dot_block(3, strips, b, steps, m); break;
    case 2: dot_block(2, strips, b, steps, m); break;
    case 1: dot_block(1, strips, b, steps, m); break;
    default: break;
    }
}

TARGET static void multiply_by_dots(const batch_state *b, int64_t steps) {
    switch (b->strips) {
    case 4: dot_inputs(4, b, steps); break;
    case 2: dot_inputs(2, b, steps); break;
    default: dot_inputs(1, b, steps);
    }
}

#endif
