/* The arithmetic of a decoder apart from its matrix products, once per instruction set. */
#ifndef CVXQ_DECODER_MATH_H
#define CVXQ_DECODER_MATH_H

#include "decoder.h"

#define CVXQ_BLOCK 64 /* positions of a block of keys and values */
#define CVXQ_PADDING 16 /* rows of values are padded to a multiple of this */

typedef struct {
    /* out (n) = norm of x (n); both may be the same. */
    void (*normalize)(const cvxq_norm *norm, const float *x, int n, float *out);
    /* x (n) += scale · y (n) */
    void (*add)(float *x, const float *y, float scale, int n);
    /* x (n) *= scale */
    void (*scale)(float *x, float scale, int n);
    /* x (n) = cap · tanh(x / cap) */
    void (*soft_cap)(float *x, float cap, int n);
    /* x (n) = activation(x) · y, y NULL: 1 */
    void (*activate)(float *x, const float *y, int activation, int n);
    /* With g = min(x, limit) and u = y brought to −limit … limit:
     * x (n) = g / (1 + e^(−slope · g)) · (u + offset) */
    void (*activate_bounded)(float *x, const float *y, float limit, float slope, float offset,
                             int n);
    /* Turn the pairs (x[i], x[i + pairs]) by the angles whose cosines and sines are given. */
    void (*rotate)(float *x, const float *cosine, const float *sine, int pairs);
    /* Attend with rows (rows, width), scaled already, row r at positions first[r] to last[r]:
     * keys[b] (width, 64) and values[b] (64, padded width) of block b. Writes out[r] (width).
     * scratch: rows · (64 + padded + 2) floats. cap 0: none. sinks (rows): scores that only add to
     * the sum of the softmax, or NULL. */
    void (*attend)(const float *query, int rows, int width, const float *const *keys,
                   const float *const *values, const int64_t *first, const int64_t *last, float cap,
                   const float *sinks, float *const *out, float *scratch);
    const char *name;
} cvxq_decoder_math;

extern const cvxq_decoder_math cvxq_decoder_math_base;
#if defined(__x86_64__)
extern const cvxq_decoder_math cvxq_decoder_math_avx2;
extern const cvxq_decoder_math cvxq_decoder_math_avx512;
#endif

#endif
