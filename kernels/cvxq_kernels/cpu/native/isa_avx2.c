/* AVX2 with FMA: x86 processors since 2013.
 *
 * Tables of 16 entries fit vpshufb; deeper codes take one look-up per 16 entries, of which all but
 * the right one give zero. Without a dot product of bytes, even and odd columns are widened to 16
 * bits, where vpmaddwd multiplies and adds without ever saturating.
 */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "prepare.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef struct {
    __m256i half[2];
} codes_t, sums_t;
typedef struct {
    __m256i even, odd; /* columns 0 and 2, 1 and 3 as 16-bit pairs, in every lane */
} inputs_t;

INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE codes_t load(const uint8_t *p) {
    return (codes_t){
        {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))}};
}
INLINE sums_t sums_of(int32_t n) { return (sums_t){{_mm256_set1_epi32(n), _mm256_set1_epi32(n)}}; }
INLINE inputs_t inputs_at(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    const __m256i x = _mm256_set1_epi32(four);
    return (inputs_t){_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
INLINE sums_t dot(sums_t sums, codes_t levels, inputs_t x) {
    for (int h = 0; h < 2; h++) {
        const __m256i even = _mm256_and_si256(levels.half[h], _mm256_set1_epi16(255));
        const __m256i odd = _mm256_srli_epi16(levels.half[h], 8);
        sums.half[h] = _mm256_add_epi32(
            sums.half[h],
            _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd)));
    }
    return sums;
}

/* (codes >> shift) & mask, byte by byte; the mask keeps out what a neighbour shifts in. */
INLINE codes_t field(codes_t codes, int shift, int mask) {
    for (int h = 0; h < 2; h++)
        codes.half[h] = _mm256_and_si256(_mm256_srli_epi16(codes.half[h], shift),
                                         _mm256_set1_epi8((char)mask));
    return codes;
}
INLINE codes_t join(codes_t a, codes_t b, int shift) {
    for (int h = 0; h < 2; h++)
        a.half[h] = _mm256_or_si256(a.half[h], _mm256_slli_epi16(b.half[h], shift));
    return a;
}
INLINE __m256i table_at(const uint8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
}
INLINE codes_t look(__m256i table, codes_t index) {
    for (int h = 0; h < 2; h++) index.half[h] = _mm256_shuffle_epi8(table, index.half[h]);
    return index;
}

INLINE void decode_1(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    const codes_t a = load(unit);
    for (int i = 0; i < 8; i++) levels[i] = look(table_at(t->narrow1[0]), field(a, i, 1));
}
INLINE void decode_2(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    for (int i = 0; i < 8; i++)
        levels[i] = look(table_at(t->narrow2[0]), field(load(unit + i / 4 * 64), i % 4 * 2, 3));
}
INLINE void decode_3(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    const __m256i table = table_at(t->narrow3[0]);
    codes_t top = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
    for (int row = 0; row < 3; row++) {
        const codes_t a = load(unit + 64 * row);
        levels[2 * row] = look(table, field(a, 0, 7));
        levels[2 * row + 1] = look(table, field(a, 3, 7));
        top = join(top, field(a, 6, 3), 2 * row);
    }
    levels[6] = look(table, field(top, 0, 7));
    levels[7] = look(table, field(top, 3, 7));
}
INLINE void decode_4(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    for (int i = 0; i < 8; i++)
        levels[i] = look(table_at(t->narrow4), field(load(unit + i / 2 * 64), i % 2 * 4, 15));
}

/* Tables of 16 · parts entries: adding 0x70 with saturation sets the top bit of every index that
 * another part answers for, and vpshufb gives zero for it. */
INLINE void look_wide(const cvxq_tables *t, int depth, codes_t index, codes_t *high, codes_t *low) {
    for (int h = 0; h < 2; h++) {
        __m256i upper = _mm256_setzero_si256(), lower = upper;
        for (int part = 0; part < 1 << (depth - 4); part++) {
            const __m256i own = _mm256_adds_epu8(
                _mm256_xor_si256(index.half[h], _mm256_set1_epi8((char)(16 * part))),
                _mm256_set1_epi8(0x70));
            const uint8_t *high_part = t->high[depth - 5] + 16 * part;
            const uint8_t *low_part = t->low[depth - 5] + 16 * part;
            upper = _mm256_or_si256(upper, _mm256_shuffle_epi8(table_at(high_part), own));
            lower = _mm256_or_si256(lower, _mm256_shuffle_epi8(table_at(low_part), own));
        }
        high->half[h] = upper;
        low->half[h] = lower;
    }
}
INLINE void decode_5(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < 8; i++) {
        const codes_t nibble = field(load(unit + i / 2 * 64), i % 2 * 4, 15);
        look_wide(t, 5, join(nibble, field(load(unit + 256), i, 1), 4), high + i, low + i);
    }
}
INLINE void decode_6(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < 8; i++) {
        const codes_t nibble = field(load(unit + i / 2 * 64), i % 2 * 4, 15);
        const codes_t top = field(load(unit + 256 + i / 4 * 64), i % 4 * 2, 3);
        look_wide(t, 6, join(nibble, top, 4), high + i, low + i);
    }
}
INLINE void decode_7(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    codes_t last = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
    for (int i = 0; i < 7; i++) {
        const codes_t row = load(unit + 64 * i);
        look_wide(t, 7, field(row, 0, 127), high + i, low + i);
        last = join(last, field(row, 7, 1), i);
    }
    look_wide(t, 7, last, high + 7, low + 7);
}
INLINE void decode_8(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < 8; i++) look_wide(t, 8, load(unit + 64 * i), high + i, low + i);
}

INLINE void add_scaled(float *out, __m256 sum, float scale) {
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_set1_ps(scale), sum, _mm256_loadu_ps(out)));
}
INLINE void add_sums(float *out, sums_t sums, float scale) {
    for (int h = 0; h < 2; h++) add_scaled(out + 8 * h, _mm256_cvtepi32_ps(sums.half[h]), scale);
}
INLINE void add_sums2(float *out, sums_t sums, sums_t sums2, float scale) {
    for (int h = 0; h < 2; h++)
        add_scaled(out + 8 * h,
                   _mm256_fmadd_ps(_mm256_set1_ps(256), _mm256_cvtepi32_ps(sums.half[h]),
                                   _mm256_cvtepi32_ps(sums2.half[h])),
                   scale);
}

#include "tile.h"

INLINE float sum_of(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* Eight dense weights from place k on. */
INLINE __m256 widen(const void *row, int dtype, int64_t k) {
    if (dtype == CVXQ_F32) return _mm256_loadu_ps((const float *)row + k);
    const __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + k));
    if (dtype == CVXQ_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

TARGET static void multiply_dense(const void *row, int dtype, int64_t inputs, const float *x,
                                  int64_t stride, int batch, float *sums) {
    for (int m = 0; m < batch; m++, x += stride) {
        __m256 lanes[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                           _mm256_setzero_ps()};
        int64_t k = 0;
        for (; k + 32 <= inputs; k += 32)
            for (int i = 0; i < 4; i++)
                lanes[i] = _mm256_fmadd_ps(widen(row, dtype, k + 8 * i),
                                           _mm256_loadu_ps(x + k + 8 * i), lanes[i]);
        float sum = sum_of(
            _mm256_add_ps(_mm256_add_ps(lanes[0], lanes[1]), _mm256_add_ps(lanes[2], lanes[3])));
        for (; k < inputs; k++) sum += cvxq_widen(row, dtype, k) * x[k];
        sums[m] = sum;
    }
}

TARGET static void prepare(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                           const float *x, const uint8_t *soon, cvxq_input *out) {
    prepare_input(w, cluster, groups, x, soon, out);
}

const cvxq_ops cvxq_ops_avx2 = {"avx2", prepare, multiply_tile, multiply_dense};
#endif
