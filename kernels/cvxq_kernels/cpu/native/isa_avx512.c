/* AVX-512 with VBMI and VNNI: Intel since Ice Lake, AMD since Zen 4.
 *
 * vpermb looks up 64 levels at once in a register and takes six bits of every index byte, so that
 * codes of up to three bits need no shift: there is one table per place of a code in the byte, blind
 * to the other bits. vpdpbusd multiplies and adds 64 of them. A weight at depth 3 costs 2.7 / 64
 * instructions, and 2.3 / 64 at depth 2.
 */
#include "repack.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <math.h>

#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c")))

typedef __m512i codes_t, sums_t, inputs_t;
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE __m512i load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE sums_t sums_of(int32_t n) { return _mm512_set1_epi32(n); }
INLINE inputs_t inputs_at(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
INLINE sums_t dot(sums_t sums, codes_t levels, inputs_t x) {
    return _mm512_dpbusd_epi32(sums, levels, x);
}
INLINE codes_t look(__m512i table, __m512i index) { return _mm512_permutexvar_epi8(index, table); }
/* Bits of `a` where the mask's are set, else of `b`. */
INLINE __m512i choose(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), a, b, 0xCA);
}

INLINE void decode_1(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    const __m512i a = load(unit), b = _mm512_srli_epi16(a, 6);
    for (int i = 0; i < 6; i++) levels[i] = look(load(t->narrow1[i]), a);
    for (int i = 0; i < 2; i++) levels[6 + i] = look(load(t->narrow1[i]), b);
}
INLINE void decode_2(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    for (int row = 0; row < 2; row++) {
        const __m512i a = load(unit + 64 * row);
        for (int i = 0; i < 3; i++) levels[4 * row + i] = look(load(t->narrow2[i]), a);
        levels[4 * row + 3] = look(load(t->narrow2[1]), _mm512_srli_epi16(a, 4));
    }
}
INLINE void decode_3(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    const __m512i low = load(t->narrow3[0]), high = load(t->narrow3[1]);
    const __m512i a = load(unit), b = load(unit + 64), c = load(unit + 128);
    __m512i top = choose(0x03, _mm512_srli_epi16(a, 6), _mm512_srli_epi16(b, 4));
    top = choose(0x0F, top, _mm512_srli_epi16(c, 2));
    levels[0] = look(low, a);
    levels[1] = look(high, a);
    levels[2] = look(low, b);
    levels[3] = look(high, b);
    levels[4] = look(low, c);
    levels[5] = look(high, c);
    levels[6] = look(low, top);
    levels[7] = look(high, top);
}
INLINE void decode_4(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    const __m512i table = load(t->narrow4); /* repeats every 16 entries: no mask needed */
    for (int row = 0; row < 4; row++) {
        const __m512i a = load(unit + 64 * row);
        levels[2 * row] = look(table, a);
        levels[2 * row + 1] = look(table, _mm512_srli_epi16(a, 4));
    }
}

/* Shift left for positive counts, right for negative ones; counts are constants. */
#define SHIFT(a, by)                                      \
    ((by) > 0 ? _mm512_slli_epi16(a, (by) > 0 ? (by) : 0) \
              : _mm512_srli_epi16(a, (by) < 0 ? -(by) : 0))

#define NIBBLE(unit, i) SHIFT(load((unit) + 64 * ((i) / 2)), -4 * ((i) & 1))

INLINE void look_both(const cvxq_tables *t, int depth, __m512i index, codes_t *high, codes_t *low) {
    *high = look(load(t->high[depth - 5]), index);
    *low = look(load(t->low[depth - 5]), index);
}
INLINE void decode_5(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    const __m512i top = load(unit + 256);
#define STEP(i) \
    look_both(t, 5, choose(0x0F, NIBBLE(unit, i), SHIFT(top, 4 - (i))), high + (i), low + (i))
    // clang-format off
    STEP(0); STEP(1); STEP(2); STEP(3); STEP(4); STEP(5); STEP(6); STEP(7);
    // clang-format on
#undef STEP
}
INLINE void decode_6(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    const __m512i top[2] = {load(unit + 256), load(unit + 320)};
#define STEP(i)                                                                            \
    look_both(t, 6, choose(0x0F, NIBBLE(unit, i), SHIFT(top[(i) / 4], 4 - 2 * ((i) % 4))), \
              high + (i), low + (i))
    // clang-format off
    STEP(0); STEP(1); STEP(2); STEP(3); STEP(4); STEP(5); STEP(6); STEP(7);
    // clang-format on
#undef STEP
}
INLINE codes_t look_128(const uint8_t *table, __m512i index) {
    return _mm512_permutex2var_epi8(load(table), index, load(table + 64));
}
INLINE void decode_7(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    __m512i row[7];
#define ROW(i) row[i] = load(unit + 64 * (i))
    // clang-format off
    ROW(0); ROW(1); ROW(2); ROW(3); ROW(4); ROW(5); ROW(6);
    // clang-format on
#undef ROW
    __m512i last = SHIFT(row[0], -7);
#define JOIN(i) last = choose((1 << (i)) - 1, last, SHIFT(row[i], (i) - 7))
    // clang-format off
    JOIN(1); JOIN(2); JOIN(3); JOIN(4); JOIN(5); JOIN(6);
    // clang-format on
#undef JOIN
    for (int i = 0; i < UNIT; i++) {
        high[i] = look_128(t->high[2], i < 7 ? row[i] : last);
        low[i] = look_128(t->low[2], i < 7 ? row[i] : last);
    }
}
INLINE codes_t look_256(const uint8_t *table, __m512i index) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), look_128(table, index),
                                  look_128(table + 128, index));
}
INLINE void decode_8(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < UNIT; i++) {
        const __m512i index = load(unit + 64 * i);
        high[i] = look_256(t->high[3], index);
        low[i] = look_256(t->low[3], index);
    }
}

INLINE void add_sums(float *out, sums_t sums, float scale) {
    const __m512 sum = _mm512_cvtepi32_ps(sums);
    _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_set1_ps(scale), sum, _mm512_loadu_ps(out)));
}
INLINE void add_sums2(float *out, sums_t sums, sums_t sums2, float scale) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(256), _mm512_cvtepi32_ps(sums),
                                       _mm512_cvtepi32_ps(sums2));
    _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_set1_ps(scale), sum, _mm512_loadu_ps(out)));
}

#include "tile_dots.h"

/* scales[code] for 16 codes; `table` holds the first 64 scales, which usually are all. */
INLINE __m512 scales_of(const float *scales, const __m512 table[4], int is_small, __m128i codes) {
    const __m512i index = _mm512_cvtepu8_epi32(codes);
    if (!is_small) return _mm512_i32gather_ps(index, scales, 4);
    const __m512 low = _mm512_permutex2var_ps(table[0], index, table[1]);
    const __m512 high = _mm512_permutex2var_ps(table[2], index, table[3]);
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
}

/* Round four vectors of scaled inputs, one block. */
INLINE void round_block(const __m512 y[4], int depth, float unit, int64_t block, cvxq_input *out) {
    /* Magnitudes compare like integers, with infinity and then NaN above all numbers. */
    const __m512i size = _mm512_max_epu32(
        _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(y[0])),
                         _mm512_castps_si512(_mm512_abs_ps(y[1]))),
        _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(y[2])),
                         _mm512_castps_si512(_mm512_abs_ps(y[3]))));
    const uint32_t bits = _mm512_reduce_max_epu32(size);
    const int is_finite = bits < 0x7f800000;
    float most = NAN;
    if (is_finite) memcpy(&most, &bits, 4);
    const float top = depth <= NARROW ? 127.0f : 32639.0f;
    const float inverse = is_finite && most > 0 ? fminf(top / most, FLT_MAX) : 0;
    const __m512 factor = _mm512_set1_ps(inverse);
    const __mmask16 mask = is_finite ? 0xFFFF : 0; /* NaN · 0 would not be 0 */
    __m512i sum = _mm512_setzero_si512(), low_sum = sum;
    for (int i = 0; i < 4; i++) {
        const __m512i value = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(y[i], factor));
        __m512i upper = value;
        if (depth > NARROW) {
            upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
            const __m512i lower = _mm512_sub_epi32(value, _mm512_slli_epi32(upper, 8));
            low_sum = _mm512_add_epi32(low_sum, lower);
            _mm_storeu_si128((__m128i *)(out->low + block * BLOCK + 16 * i),
                             _mm512_cvtepi32_epi8(lower));
        }
        sum = _mm512_add_epi32(sum, upper);
        _mm_storeu_si128((__m128i *)(out->high + block * BLOCK + 16 * i),
                         _mm512_cvtepi32_epi8(upper));
    }
    cvxq_finish_block(out, block, depth, unit, most, _mm512_reduce_add_epi32(sum),
                      depth > NARROW ? _mm512_reduce_add_epi32(low_sum) : 0);
}

/* Scale one block, all 64 columns of it or the first `left`; returns what the means add. */
INLINE __m512 scale_block(const cvxq_matrix *w, const __m512 table[4], const float *x,
                          const uint8_t *scale_codes, const int8_t *mean_codes, int64_t left,
                          __m512 mean, __m512 y[4]) {
    for (int j = 0; j < 4; j++, left -= 16) {
        const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0;
        const __m128i codes = _mm_maskz_loadu_epi8(mask, scale_codes + 16 * j);
        y[j] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + 16 * j),
                             scales_of(w->scales, table, w->few_scales, codes));
        if (!mean_codes) continue;
        const __m512i means = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, mean_codes + 16 * j));
        const __m512 shift = _mm512_mul_ps(_mm512_cvtepi32_ps(means), _mm512_set1_ps(w->mean_step));
        mean = _mm512_fmadd_ps(y[j], shift, mean);
    }
    return mean;
}

TARGET static void prepare(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                           const float *x, const uint8_t *soon, cvxq_input *out) {
    const uint8_t *scale_codes = w->scale_codes + groups;
    const int8_t *mean_codes = w->mean_codes ? w->mean_codes + groups : NULL;
    __m512 table[4], mean = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_ps(w->scales + 16 * i);
    int64_t block = 0;
    /* The tile before has asked for the first AHEAD bytes of this one, unless it went by page. */
    const int by_page = cvxq_fetches_by_page(), ahead = by_page ? AHEAD_BLOCK : 2 * AHEAD_BLOCK;
    if (!by_page) soon += AHEAD;
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        const float unit = w->tables->unit[run->depth];
        for (int64_t i = 0; i < run->count; i += BLOCK, soon += ahead) {
            const int64_t at = run->first + i, left = run->count - i;
            const int8_t *means = mean_codes ? mean_codes + at : NULL;
            __m512 y[4];
            if (by_page) {
                for (int j = 0; j < AHEAD_BLOCK; j += LINE) fetch(soon + j);
            } else {
                fetch_lines(soon, 2 * AHEAD_BLOCK / LINE);
            }
            mean = left >= BLOCK
                       ? scale_block(w, table, x + at, scale_codes + at, means, BLOCK, mean, y)
                       : scale_block(w, table, x + at, scale_codes + at, means, left, mean, y);
            if (!run->depth) continue;
            if (run->depth <= NARROW) {
                round_block(y, 1, unit, block++, out);
            } else {
                round_block(y, 8, unit, block++, out);
            }
        }
    }
    out->mean = _mm512_reduce_add_ps(mean);
}

/* 16 dense weights from place k on, fewer with a mask. */
INLINE __m512 widen(const void *row, const int dtype, int64_t k, __mmask16 mask) {
    if (dtype == CVXQ_F32) return _mm512_maskz_loadu_ps(mask, (const float *)row + k);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + k);
    if (dtype == CVXQ_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Each weight is widened once for all inputs; how many they are changes no result. */
INLINE void multiply_row(const int dtype, const int batch, const void *row, int64_t inputs,
                         const float *x, int64_t stride, float *sums) {
    __m512 lanes[BATCH][4];
    UNROLL for (int m = 0; m < batch; m++) UNROLL for (int i = 0; i < 4; i++)
        lanes[m][i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 64 <= inputs; k += 64)
        UNROLL for (int i = 0; i < 4; i++) {
            const __m512 weights = widen(row, dtype, k + 16 * i, 0xFFFF);
            UNROLL for (int m = 0; m < batch; m++)
                lanes[m][i] = _mm512_fmadd_ps(
                    weights, _mm512_loadu_ps(x + m * stride + k + 16 * i), lanes[m][i]);
        }
    for (; k < inputs; k += 16) {
        const __mmask16 mask = inputs - k >= 16 ? 0xFFFF : (1 << (inputs - k)) - 1;
        const __m512 weights = widen(row, dtype, k, mask);
        UNROLL for (int m = 0; m < batch; m++)
            lanes[m][0] = _mm512_fmadd_ps(
                weights, _mm512_maskz_loadu_ps(mask, x + m * stride + k), lanes[m][0]);
    }
    UNROLL for (int m = 0; m < batch; m++)
        sums[m] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(lanes[m][0], lanes[m][1]),
                                                     _mm512_add_ps(lanes[m][2], lanes[m][3])));
}

#include "dense_table.h"

const cvxq_ops cvxq_ops_avx512 = {"avx512", prepare, multiply_tile, multiply_dense,
                                  cvxq_repack_run_avx512};
#endif
