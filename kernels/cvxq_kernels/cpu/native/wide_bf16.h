/* What the parts of wide_bf16.c share. */
#ifndef CVXQ_WIDE_BF16_H
#define CVXQ_WIDE_BF16_H

#include <immintrin.h>

#include "internal.h"

#define TARGET                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2," \
                          "avx512vnni,avx512bf16,fma,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 8")

enum {
    STEP = 32,
    STEPS = 8, /* expanded before they are multiplied */
    PAIRS = STEP / 2,
    PAIR = 4 * VECTOR,         /* bytes of a pair of columns: four strips */
    ROOM = STEPS * PAIRS + 17, /* pairs; a unit may reach 16 past the end, 17 if shifted */
    SPLIT = 8,                 /* depth whose factors have two parts */
    TILE_INPUTS = 32,          /* that the matrix unit takes at once */
};

/* Some inputs and one tile of weights, some of whose steps are expanded. */
typedef struct {
    uint8_t *weights, *rest; /* (ROOM, 4 strips, 16 rows, 2) bfloat16 */
    float *sums;             /* (rows, 64) of the tile in work */
    const uint16_t *high, *low; /* (steps, stride, 32) bfloat16: inputs, what rounding left */
    int64_t rows, stride;    /* inputs, and from one step's to the next */
    int64_t first; /* first step expanded */
    int64_t split; /* first step that has a rest */
    int strips, is_first;
} batch_state;

#endif
