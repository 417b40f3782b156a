/* LANES floats at a time, in the vector types of GCC and Clang; the including file says how many its
 * registers hold. */
#ifndef CVXQ_DECODER_VECTOR_H
#define CVXQ_DECODER_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* such vectors never cross a call: all is inlined */
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES))); /* wraps, as the bits of NaN make it */

INLINE vf load(const float *x) {
    vf value;
    memcpy(&value, x, sizeof value);
    return value;
}

INLINE void store(float *x, vf value) { memcpy(x, &value, sizeof value); }

/* The first n < LANES elements, zeros behind them. */
INLINE vf load_part(const float *x, int n) {
    vf value = {0};
    memcpy(&value, x, (size_t)n * sizeof *x);
    return value;
}

INLINE void store_part(float *x, vf value, int n) { memcpy(x, &value, (size_t)n * sizeof *x); }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

INLINE float sum(vf x) {
    float part[LANES];
    memcpy(part, &x, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE float largest(vf x) {
    float part[LANES];
    memcpy(part, &x, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

/* e^x, relative error below 2e-7; below −87 it is e^−87, above 88 it is e^88,
 * of NaN it is NaN.
 * x = n ln 2 + r, |r| ≤ ln 2 / 2, and the Taylor polynomial of degree 7 in r. */
INLINE vf exponential(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 · 2^23: adding it rounds to an integer */
    x = choose(x > splat(88.0f), splat(88.0f), x);
    x = choose(x < splat(-87.0f), splat(-87.0f), x);
    const vf shifted = x * splat(1.44269504f) + magic;
    const vf n = shifted - magic;
    const vf r = (x - n * splat(0.693145752f)) - n * splat(1.42860677e-6f);
    vf p = splat(1.0f / 5040);
    p = p * r + splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    return (vf)((vu)p + (((vu)shifted - (vu)magic) << 23));
}

#endif
