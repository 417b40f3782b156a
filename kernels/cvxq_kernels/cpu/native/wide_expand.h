/* From codes to pairs of bfloat16; for wide_bf16.c only. */
#ifndef CVXQ_WIDE_EXPAND_H
#define CVXQ_WIDE_EXPAND_H

#include "wide_bf16.h"

INLINE __m512i right(__m512i a, const int by) { return _mm512_srli_epi16(a, by); }
INLINE __m512i left(__m512i a, const int by) { return _mm512_slli_epi16(a, by); }
/* Bits of `a` where the mask's are set, else of `b`. */
INLINE __m512i choose(const int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), a, b, 0xCA);
}

/* A unit's code vectors (see unit.c); bits above a code may be anything. */
INLINE void codes_of(const int depth, const uint8_t *unit, __m512i codes[UNIT]) {
    __m512i row[8];
    UNROLL for (int i = 0; i < depth; i++) row[i] = _mm512_loadu_si512(unit + VECTOR * i);
    if (depth == 3) {
        const __m512i top = choose(0x0F, choose(0x03, right(row[0], 6), right(row[1], 4)),
                                   right(row[2], 2));
        UNROLL for (int i = 0; i < 6; i++) codes[i] = i % 2 ? right(row[i / 2], 3) : row[i / 2];
        codes[6] = top;
        codes[7] = right(top, 3);
    } else if (depth == 7) {
        codes[7] = right(row[0], 7);
        UNROLL for (int i = 1; i < 7; i++)
            codes[7] = choose((1 << i) - 1, codes[7], right(row[i], 7 - i));
        UNROLL for (int i = 0; i < 7; i++) codes[i] = row[i];
    } else if (depth == 5 || depth == 6) {
        UNROLL for (int i = 0; i < UNIT; i++) {
            const int width = depth - 4, place = i * width % 8;
            const __m512i nibble = i % 2 ? right(row[i / 2], 4) : row[i / 2];
            const __m512i above = row[4 + i * width / 8];
            codes[i] = choose(0x0F, nibble, place < 4 ? left(above, 4 - place)
                                                      : right(above, place - 4));
        }
    } else {
        UNROLL for (int i = 0; i < UNIT; i++)
            codes[i] = depth ? right(row[i * depth / 8], i * depth % 8) : _mm512_setzero_si512();
    }
}

/* Levels of a depth as registers hold them: 16 to each, repeated where there are fewer. */
INLINE void load_levels(const cvxq_matrix *w, const int depth, __m512 levels[4]) {
    const float *table = w->tables->level + (1 << depth);
    UNROLL for (int i = 0; i < 4; i++)
        levels[i] = depth >= 4 && i < 1 << (depth - 4) ? _mm512_loadu_ps(table + 16 * i)
                                                       : _mm512_setzero_ps();
    if (depth >= 4) return;
    _Alignas(64) float repeated[16];
    for (int i = 0; i < 16; i++) repeated[i] = depth ? table[i & ((1 << depth) - 1)] : 0;
    levels[0] = _mm512_load_ps(repeated);
}

INLINE __m512i rounded(__m512 high, __m512 low, __m512 scale, __m512 shift) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high, scale, shift),
                                        _mm512_fmadd_ps(low, scale, shift));
}

/* What the codes of two columns stand for: all values of both, as bfloat16. */
typedef struct {
    __m512i even[2], odd[2];
} pair_table;

INLINE pair_table table_of(const int depth, const __m512 levels[4], const float *scale,
                           const float *shift) {
    const __m512 scale0 = _mm512_set1_ps(scale[0]), scale1 = _mm512_set1_ps(scale[1]);
    const __m512 shift0 = _mm512_set1_ps(shift[0]), shift1 = _mm512_set1_ps(shift[1]);
    pair_table t;
    if (depth <= 4) {
        t.even[0] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(levels[0], scale1, shift1),
                                                 _mm512_fmadd_ps(levels[0], scale0, shift0));
        return t;
    }
    UNROLL for (int i = 0; i < depth - 4; i++) {
        t.even[i] = rounded(levels[2 * i + 1], levels[2 * i], scale0, shift0);
        t.odd[i] = rounded(levels[2 * i + 1], levels[2 * i], scale1, shift1);
    }
    return t;
}

/* 16 rows of the two columns whose codes `select` takes from each row's four. */
INLINE __m512i look_up(const int depth, const pair_table *t, __m512i codes, __m512i select) {
    const __m512i words = _mm512_shuffle_epi8(codes, select);
    if (depth == 6)
        return _mm512_mask_blend_epi16(0xAAAAAAAA,
                                       _mm512_permutex2var_epi16(t->even[0], words, t->even[1]),
                                       _mm512_permutex2var_epi16(t->odd[0], words, t->odd[1]));
    const int values = depth <= 4 ? 16 : 32;
    const __m512i index = _mm512_ternarylogic_epi32(
        words, _mm512_set1_epi32((values - 1) * 0x10001), _mm512_set1_epi32(values << 16), 0xEA);
    return depth <= 4 ? _mm512_permutexvar_epi16(index, t->even[0])
                      : _mm512_permutex2var_epi16(t->even[0], index, t->odd[0]);
}

/* The same for depths 7 and 8, value by value; what rounding leaves goes to `rest`. */
INLINE __m512i compute(const int depth, const float *table, __m512i codes, const int column,
                       const float *scale, const float *shift, __m512i *rest) {
    static const uint16_t ORDER[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_loadu_si512(ORDER);
    __m512 value[2];
    UNROLL for (int j = 0; j < 2; j++) {
        const __m512i index = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * (column + j)),
                                               _mm512_set1_epi32((1 << depth) - 1));
        value[j] = _mm512_fmadd_ps(_mm512_i32gather_ps(index, table, 4), _mm512_set1_ps(scale[j]),
                                   _mm512_set1_ps(shift[j]));
    }
    const __m512i pairs = _mm512_permutexvar_epi16(
        order, (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    if (depth == SPLIT) {
        value[0] = _mm512_sub_ps(value[0], _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
        value[1] = _mm512_sub_ps(value[1], _mm512_castsi512_ps(_mm512_and_si512(
                                               pairs, _mm512_set1_epi32((int)0xFFFF0000))));
        *rest = _mm512_permutexvar_epi16(order,
                                         (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    }
    return pairs;
}

/* One unit; `out` and `rest` are its first pair's. Column k's weights are level · scale + shift. */
INLINE void expand_unit(const int depth, const cvxq_matrix *w, const __m512 levels[4],
                        const __m512i codes[UNIT], const int strips, const float *scale,
                        const float *shift, uint8_t *out, uint8_t *rest) {
    const __m512i select[2] = {
        _mm512_set4_epi32((int)0x800D800C, (int)0x80098008, (int)0x80058004, (int)0x80018000),
        _mm512_set4_epi32((int)0x800F800E, (int)0x800B800A, (int)0x80078006, (int)0x80038002)};
    const float *table = w->tables->level + (1 << depth);
    UNROLL for (int p = 0; p < 2 * UNIT / strips; p++) {
        const int column = 2 * p;
        pair_table t;
        if (depth <= 6) t = table_of(depth, levels, scale + column, shift + column);
        UNROLL for (int s = 0; s < strips; s++) {
            const __m512i vector = codes[p / 2 * strips + s];
            __m512i left_over;
            const __m512i pairs =
                depth <= 6 ? look_up(depth, &t, vector, select[p % 2])
                           : compute(depth, table, vector, 2 * (p % 2), scale + column,
                                     shift + column, &left_over);
            _mm512_store_si512(out + p * PAIR + s * VECTOR, pairs);
            if (depth == SPLIT) _mm512_store_si512(rest + p * PAIR + s * VECTOR, left_over);
        }
    }
}

/* Scales, and scales times means, of `count` columns from group `at` on of which only those in
 * [from, to) count; the others are zero. */
INLINE void load_scales(const cvxq_matrix *w, int64_t at, int64_t from, int64_t to, int count,
                        float *scale, float *shift) {
    for (int k = 0; k < count; k += 8) {
        __mmask8 mask = 0;
        if (from <= k && to >= k + 8) {
            mask = 0xFF;
        } else {
            for (int j = 0; j < 8; j++) mask |= (__mmask8)((k + j >= from && k + j < to) << j);
        }
        const __m256i codes =
            _mm256_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w->scale_codes + at + k));
        const __m256 scales =
            _mm256_mmask_i32gather_ps(_mm256_setzero_ps(), mask, codes, w->scales, 4);
        _mm256_storeu_ps(scale + k, scales);
        if (!w->mean_codes) continue;
        const __m256 means = _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, w->mean_codes + at + k)));
        _mm256_storeu_ps(shift + k, _mm256_mul_ps(scales, _mm256_mul_ps(
                                                              means, _mm256_set1_ps(w->mean_step))));
    }
}

#endif
