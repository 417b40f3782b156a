/* AVX2 with FMA: x86 processors since 2013.
 *
 * vpshufb looks up 16 levels by bits 0–3 of every index byte whose top bit is clear, and there is no
 * dot product of bytes, only vpmaddubsw, which adds two products in 16 bits. At depth 4 levels go up to
 * 181, at depths 1–3, where four products are added in 16 bits, up to 127, and inputs are rounded so
 * that these sums always fit, which seldom costs anything: two neighbors are rarely both large. Deeper
 * codes have levels of a sign and 13 bits, or 8 at depth 5, looked up byte by byte in half a table
 * and complemented for codes of the other half; vpmaddwd multiplies them with inputs of 14 bits.
 *
 * Registers hold 32 bytes: a half of a code vector, eight rows. A block is gone through for the lower
 * halves first and then for the upper ones, so that all sums of one half stay in registers.
 */
#include "repack.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

#include "tile.h"

enum { HALF = 32 }; /* bytes of half a code vector */

INLINE __m256i load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE __m256i only(__m256i a, int bits) {
    return _mm256_and_si256(a, _mm256_set1_epi8((char)bits));
}
INLINE __m256i left(__m256i a, int by) { return by ? _mm256_slli_epi16(a, by) : a; }
INLINE __m256i right(__m256i a, int by) { return by ? _mm256_srli_epi16(a, by) : a; }
INLINE __m256i look(const uint8_t *table, __m256i index) {
    const __m128i entries = _mm_loadu_si128((const __m128i *)table);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
}

/* Levels of vector `i` of a unit of depth 1–4; `half` is the same half of its first row. */
INLINE __m256i narrow_levels(const int depth, const int i, const uint8_t *half,
                             const cvxq_tables *t) {
    const uint8_t (*tables)[16] = t->nibble.narrow[depth - 1];
    if (depth == 3 && i >= 6) { /* bits 6 and 7 of two rows: three of these four */
        const __m256i a = load(half + VECTOR * (i - 6)), b = load(half + VECTOR * (i - 5));
        return look(tables[i - 6], _mm256_or_si256(only(right(a, 6), 3), only(right(b, 4), 12)));
    }
    if (depth == 3)
        return look(tables[i % 2], only(right(load(half + i / 2 * VECTOR), i % 2 * 2), 15));
    const int in_row = 8 / depth, in_nibble = 4 / depth, at = i % in_row;
    const __m256i row = load(half + i / in_row * VECTOR);
    return look(tables[at % in_nibble], only(right(row, at / in_nibble * 4), 15));
}

/* Codes of depth 5–8 as places in the lower half of their table, and all ones where the level there
 * is to be negated. At depth 6 bit 4 of the place is apart, on top of the bytes of `fifth`. */
typedef struct {
    __m256i place, fifth, negated;
} index_t;

INLINE index_t index_of(__m256i codes, int bits, __m256i top, __m256i fifth) {
    const __m256i upper = _mm256_cmpgt_epi8(_mm256_setzero_si256(), top);
    return (index_t){only(_mm256_xor_si256(codes, upper), bits), _mm256_xor_si256(fifth, upper),
                     upper};
}

/* The same for vector `i` of a unit; `half` is the same half of its first row. */
INLINE index_t wide_index(const int depth, const int i, const uint8_t *half) {
    const __m256i none = _mm256_setzero_si256();
    if (depth <= 6) {
        const int width = depth - 4, at = i % (8 / width) * width;
        const __m256i row = load(half + (4 + i * width / 8) * VECTOR);
        const __m256i nibbles = right(load(half + i / 2 * VECTOR), i % 2 * 4);
        return index_of(nibbles, 15, left(row, 8 - width - at), left(row, 7 - at));
    }
    if (depth == 7 && i == 7) {
        __m256i codes = right(only(load(half), 128), 7);
    UNROLL for (int row = 1; row < 7; row++)
            codes = _mm256_or_si256(codes, right(only(load(half + row * VECTOR), 128), 7 - row));
        return index_of(codes, 63, left(codes, 1), none);
    }
    const __m256i codes = load(half + i * VECTOR);
    return index_of(codes, depth == 7 ? 63 : 127, left(codes, 8 - depth), none);
}

/* One byte of 16 · parts entries. Adding 0x70 with saturation sets the top bit of every place that
 * another part answers for, and vpshufb gives zero for it. */
INLINE __m256i look_parts(const int parts, const uint8_t *table, __m256i place) {
    __m256i found = _mm256_setzero_si256();
    UNROLL for (int part = 0; part < parts; part++) {
        const __m256i from = _mm256_xor_si256(place, _mm256_set1_epi8((char)(16 * part)));
        const __m256i own = _mm256_adds_epu8(from, _mm256_set1_epi8(0x70));
        found = _mm256_or_si256(found, look(table + 16 * part, own));
    }
    return found;
}
INLINE __m256i look_wide(const int depth, const uint8_t *table, index_t x) {
    const __m256i found =
        depth == 5   ? look(table, x.place)
        : depth == 6 ? _mm256_blendv_epi8(look(table, x.place), look(table + 16, x.place), x.fifth)
                     : look_parts(1 << (depth - 5), table, x.place);
    return _mm256_xor_si256(found, x.negated);
}

INLINE __m256i four_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
INLINE __m256i four_words(const int16_t *p) {
    int64_t four;
    memcpy(&four, p, 8);
    return _mm256_set1_epi64x(four);
}

/* out (8,) += scale · sum */
INLINE void add_scaled(float *out, __m256 sum, float scale) {
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_set1_ps(scale), sum, _mm256_loadu_ps(out)));
}

/* sums += products; compilers would add up products first, for which there are no registers. */
INLINE void add_to(__m256i *sums, __m256i products) {
    *sums = _mm256_add_epi32(*sums, products);
    __asm__("" : "+x"(*sums));
}

/* Half a block of depth 1–4, `units` units of it. What lies a region ahead of `soon` is asked for on
 * the way, as much as half the block has: all at once would keep those buffers busy through which
 * this block's loads get their lines from the second cache. */
INLINE void narrow_half(const run_job *job, const int depth, const int strips, const int batch,
                        const uint8_t *half, const uint8_t *soon, int64_t block, int64_t units,
                        float *out) {
    const int joined = depth < 4 ? 2 : 1; /* quads whose products are added in 16 bits */
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[BATCH][4];
    UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)
        sums[m][s] = _mm256_set1_epi32(job->inputs[m].start[block]);
    for (int64_t u = 0; u < units; u++, half += VECTOR * depth, soon += HALF * depth) {
        fetch_region(soon, soon + HALF * depth);
        UNROLL for (int q = 0; q < UNIT / strips; q += joined)
            UNROLL for (int s = 0; s < strips; s++) {
                __m256i levels[2];
                UNROLL for (int j = 0; j < joined; j++)
                    levels[j] = narrow_levels(depth, (q + j) * strips + s, half, job->tables);
                UNROLL for (int m = 0; m < batch; m++) {
                    const int64_t at = block * BLOCK + (u * (UNIT / strips) + q) * 4;
                    const int8_t *x = job->inputs[m].high + at;
                    __m256i sum = _mm256_maddubs_epi16(levels[0], four_bytes(x));
                    if (joined == 2)
                        sum = _mm256_add_epi16(
                            sum, _mm256_maddubs_epi16(levels[1], four_bytes(x + 4)));
                    add_to(&sums[m][s], _mm256_madd_epi16(sum, ones));
                }
            }
    }
    UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)
        add_scaled(out + m * TILE + s * STRIP, _mm256_cvtepi32_ps(sums[m][s]),
                   job->inputs[m].scale[block]);
}

/* Half a block of depth 5–8: a sum for columns 0 and 1 of a quad and one for 2 and 3, of rows 0 and 1
 * of four in `sums[0]`, of rows 2 and 3 in `sums[1]`. */
INLINE void wide_half(const run_job *job, const int depth, const int strips, const int batch,
                      const uint8_t *half, const uint8_t *soon, int64_t block, int64_t units,
                      float *out) {
    const cvxq_nibble_tables *t = &job->tables->nibble;
    __m256i sums[BATCH][4][2];
    UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)
        sums[m][s][0] = sums[m][s][1] =
            _mm256_set1_epi64x((uint32_t)job->inputs[m].start[block]);
    for (int64_t u = 0; u < units; u++, half += VECTOR * depth, soon += HALF * depth) {
        fetch_region(soon, soon + HALF * depth);
        UNROLL for (int q = 0; q < UNIT / strips; q++)
            UNROLL for (int s = 0; s < strips; s++) {
                const index_t index = wide_index(depth, q * strips + s, half);
                const __m256i low = look_wide(depth, t->low[depth - 5], index);
                /* A level of depth 5 is its sign and eight bits. */
                const __m256i high =
                    depth == 5 ? index.negated : look_wide(depth, t->high[depth - 5], index);
                const __m256i levels[2] = {_mm256_unpacklo_epi8(low, high),
                                           _mm256_unpackhi_epi8(low, high)};
                UNROLL for (int m = 0; m < batch; m++) {
                    const int64_t at = block * BLOCK + (u * (UNIT / strips) + q) * 4;
                    const __m256i x = four_words(job->inputs[m].whole + at);
                    UNROLL for (int p = 0; p < 2; p++)
                        add_to(&sums[m][s][p], _mm256_madd_epi16(levels[p], x));
                }
            }
    }
    UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)
        add_scaled(out + m * TILE + s * STRIP,
                   _mm256_hadd_ps(_mm256_cvtepi32_ps(sums[m][s][0]),
                                  _mm256_cvtepi32_ps(sums[m][s][1])),
                   job->inputs[m].scale[block]);
}

INLINE void run(const run_job *job, const int depth, const int strips, const int batch) {
    const int per_unit = 4 * UNIT / strips;
    const uint8_t *unit = job->codes;
    int64_t block = job->block;
    for (int64_t left = job->columns; left > 0; left -= BLOCK, block++) {
        const int64_t units = (min_of(left, BLOCK) + per_unit - 1) / per_unit;
        for (int h = 0; h < 2; h++) {
            const uint8_t *half = unit + HALF * h, *soon = unit + units * HALF * depth * h;
            float *sums = job->sums + STRIP / 2 * h;
            if (depth <= NARROW)
                narrow_half(job, depth, strips, batch, half, soon, block, units, sums);
            else
                wide_half(job, depth, strips, batch, half, soon, block, units, sums);
        }
        unit += units * VECTOR * depth;
    }
}

#define RUN(DEPTH)                                                               \
    INLINE void run_##DEPTH(const run_job *job, const int strips, const int batch) { \
        run(job, DEPTH, strips, batch);                                          \
    }
RUN(1)
RUN(2)
RUN(3)
RUN(4)
RUN(5)
RUN(6)
RUN(7)
RUN(8)

#include "tile_table.h"

INLINE float sum_of(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* Eight dense weights from place k on. */
INLINE __m256 widen(const void *row, const int dtype, int64_t k) {
    if (dtype == CVXQ_F32) return _mm256_loadu_ps((const float *)row + k);
    const __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + k));
    if (dtype == CVXQ_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* At most two inputs, whose sums the registers hold. */
INLINE void multiply_two(const int dtype, const int batch, const void *row, int64_t inputs,
                         const float *x, int64_t stride, float *sums) {
    __m256 lanes[2][4];
    UNROLL for (int m = 0; m < batch; m++) UNROLL for (int i = 0; i < 4; i++)
        lanes[m][i] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= inputs; k += 32)
        UNROLL for (int i = 0; i < 4; i++) {
            const __m256 weights = widen(row, dtype, k + 8 * i);
            UNROLL for (int m = 0; m < batch; m++)
                lanes[m][i] = _mm256_fmadd_ps(
                    weights, _mm256_loadu_ps(x + m * stride + k + 8 * i), lanes[m][i]);
        }
    for (int m = 0; m < batch; m++) {
        float sum = sum_of(_mm256_add_ps(_mm256_add_ps(lanes[m][0], lanes[m][1]),
                                         _mm256_add_ps(lanes[m][2], lanes[m][3])));
        for (int64_t i = k; i < inputs; i++)
            sum += cvxq_widen(row, dtype, i) * x[m * stride + i];
        sums[m] = sum;
    }
}

/* Each weight is widened once for two inputs; how many they are changes no result. */
INLINE void multiply_row(const int dtype, const int batch, const void *row, int64_t inputs,
                         const float *x, int64_t stride, float *sums) {
    multiply_two(dtype, batch < 2 ? batch : 2, row, inputs, x, stride, sums);
    if (batch > 2) multiply_two(dtype, 2, row, inputs, x + 2 * stride, stride, sums + 2);
}

#include "dense_table.h"

/* Masks of eight places: all ones for the first `have`, else 0; `have` is −56 … 64. */
static const int32_t FIRST[2 * BLOCK + 8] = {[0 ... BLOCK - 1] = -1};
INLINE __m256i first_of_eight(int64_t have) {
    return _mm256_loadu_si256((const __m256i *)(FIRST + BLOCK - have));
}

/* Scales of eight groups. From one octave of eight to the next they double, in any usual file: the
 * lower three bits of a code choose a scale of the lowest octave, the others add to its exponent. */
INLINE __m256 scales_of(const cvxq_matrix *w, const uint8_t *codes) {
    if (!w->has_octaves)
        return _mm256_setr_ps(w->scales[codes[0]], w->scales[codes[1]], w->scales[codes[2]],
                              w->scales[codes[3]], w->scales[codes[4]], w->scales[codes[5]],
                              w->scales[codes[6]], w->scales[codes[7]]);
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    const __m256 lowest = _mm256_permutevar8x32_ps(_mm256_loadu_ps(w->octave), code);
    const __m256i exponent =
        _mm256_and_si256(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(31 << 23));
    const __m256i scale = _mm256_add_epi32(_mm256_castps_si256(lowest), exponent);
    const __m256i is_some = _mm256_cmpgt_epi32(code, _mm256_setzero_si256());
    return _mm256_castsi256_ps(_mm256_and_si256(scale, is_some));
}

/* y (64,) = `count` inputs times the scales of their groups, zeros behind them. */
INLINE void scale_block(const cvxq_matrix *w, int64_t groups, const float *x, int64_t count,
                        __m256 y[BLOCK / 8]) {
    const uint8_t *codes = w->scale_codes + groups;
    fetch(codes + w->inputs); /* of the next cluster */
    if (count >= BLOCK) {
        UNROLL for (int j = 0; j < BLOCK / 8; j++)
            y[j] = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * j), scales_of(w, codes + 8 * j));
    } else {
        UNROLL for (int j = 0; j < BLOCK / 8; j++) {
            const __m256i own = first_of_eight(count - 8 * j);
            const __m256 scaled =
                _mm256_mul_ps(_mm256_maskload_ps(x + 8 * j, own), scales_of(w, codes + 8 * j));
            y[j] = _mm256_and_ps(scaled, _mm256_castsi256_ps(own));
        }
    }
}

/* What the means of the groups add to every row. */
INLINE float mean_of(const cvxq_matrix *w, int64_t groups, const __m256 y[BLOCK / 8]) {
    const int8_t *codes = w->mean_codes + groups;
    __m256 sum = _mm256_setzero_ps();
    fetch((const uint8_t *)codes + w->inputs);
    for (int j = 0; j < BLOCK / 8; j++) {
        const __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + 8 * j));
        const __m256 means = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        sum = _mm256_fmadd_ps(y[j], _mm256_mul_ps(means, _mm256_set1_ps(w->mean_step)), sum);
    }
    return sum_of(sum);
}

/* The larger of positive numbers by their bits, which puts NaN and infinity above all others. */
INLINE __m256 larger(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
/* The largest of eight such numbers, in all places. */
INLINE __m256 largest_of(__m256 v) {
    v = larger(v, _mm256_permute2f128_ps(v, v, 1));
    v = larger(v, _mm256_permute_ps(v, 0x4E));
    return larger(v, _mm256_permute_ps(v, 0xB1));
}
INLINE __m128i whole_sum(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
}

/* Sums of those of 16 magnitudes whose products vpmaddubsw adds up, with those of the other quad at
 * depths 1–3. */
INLINE __m256 joined_sizes(const int depth, __m256 a, __m256 b) {
    if (depth == 4)
        return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
    const __m256 quads = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                       _mm256_permute2f128_ps(a, b, 0x31));
    return _mm256_add_ps(quads, _mm256_permute_ps(quads, 0xB1));
}

/* The step, in all places, that rounds a block (depth: 3 for 1–3, 5 for 5–8): as many of it as 8 or 14
 * bits hold make the largest input and, at depths 1–4, as many as sums of products with the largest
 * level hold in 16 bits, each input rounded up by half, make the largest of those sums. NaN where an
 * input is not finite. */
INLINE __m256 step_of(const int depth, const __m256 y[BLOCK / 8]) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));
    __m256 most = _mm256_setzero_ps(), joined = most;
    UNROLL for (int j = 0; j < BLOCK / 8; j += 2) {
        const __m256 a = _mm256_and_ps(y[j], magnitude), b = _mm256_and_ps(y[j + 1], magnitude);
        most = larger(most, larger(a, b));
        if (depth <= NARROW) joined = larger(joined, joined_sizes(depth, a, b));
    }
    __m256 step = _mm256_mul_ps(most, _mm256_set1_ps(1.0f / (depth <= NARROW ? INT8_MAX : MOST_WHOLE)));
    if (depth <= NARROW) {
        const int fit = depth < 4 ? INT16_MAX / MOST_JOINED - 2 : INT16_MAX / MOST_PAIRED - 1;
        step = larger(step, _mm256_mul_ps(joined, _mm256_set1_ps(1.0f / (float)fit)));
    }
    step = largest_of(step);
    if (isfinite(_mm256_cvtss_f32(step))) return step;
    most = largest_of(most); /* sums may be infinite where no input is */
    return _mm256_set1_ps(isfinite(_mm256_cvtss_f32(most)) ? _mm256_cvtss_f32(most) / 63 : NAN);
}

/* Round the scaled inputs of a block, in steps of step_of. */
INLINE void round_block(const int depth, const cvxq_nibble_tables *tables, int run_depth,
                        const __m256 y[BLOCK / 8], int64_t block, cvxq_input *out) {
    const __m256 step = step_of(depth, y), one = _mm256_set1_ps(1);
    const __m256 factor = _mm256_min_ps(_mm256_div_ps(one, step), _mm256_set1_ps(FLT_MAX));
    __m256i whole[BLOCK / 8], sum = _mm256_setzero_si256();
    UNROLL for (int j = 0; j < BLOCK / 8; j++) {
        whole[j] = _mm256_cvtps_epi32(_mm256_mul_ps(y[j], factor));
        sum = _mm256_add_epi32(sum, whole[j]);
    }
    UNROLL for (int j = 0; j < BLOCK / 8; j += 4) {
        const __m256i a = _mm256_packs_epi32(whole[j], whole[j + 1]);
        const __m256i b = _mm256_packs_epi32(whole[j + 2], whole[j + 3]);
        int16_t *words = out->whole + block * BLOCK + 8 * j;
        int8_t *bytes = out->high + block * BLOCK + 8 * j;
        if (depth <= NARROW) {
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(
                (__m256i *)bytes,
                _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
        } else {
            _mm256_storeu_si256((__m256i *)words, _mm256_permute4x64_epi64(a, 0xD8));
            _mm256_storeu_si256((__m256i *)(words + 16), _mm256_permute4x64_epi64(b, 0xD8));
        }
    }
    const __m128 total = _mm_cvtepi32_ps(whole_sum(sum));
    out->scale[block] = _mm256_cvtss_f32(step) * tables->unit[run_depth];
    out->start[block] = _mm_cvtss_si32(_mm_mul_ss(total, _mm_set_ss(-tables->zero[run_depth])));
}

/* Others, which no converter writes, are left to the portable kernel. */
static int has_tables(const cvxq_matrix *w) { return w->deepest <= w->tables->nibble.symmetric; }

TARGET static void prepare(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                           const float *x, const uint8_t *soon, cvxq_input *out) {
    if (!has_tables(w)) {
        cvxq_prepare_portable(w, cluster, groups, x, soon, out);
        return;
    }
    int64_t block = 0;
    float mean = 0;
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        const int depth = run->depth;
        if (!depth && !w->mean_codes) continue;
        for (int64_t i = 0; i < run->count; i += BLOCK) {
            const int64_t at = run->first + i;
            __m256 y[BLOCK / 8];
            scale_block(w, groups + at, x + at, run->count - i, y);
            if (w->mean_codes) mean += mean_of(w, groups + at, y);
            if (!depth) continue;
            for (int j = 0; j < AHEAD_BLOCK; j += LINE) fetch(soon + j);
            soon += AHEAD_BLOCK;
            if (depth < 4)
                round_block(3, &w->tables->nibble, depth, y, block, out);
            else if (depth == 4)
                round_block(4, &w->tables->nibble, depth, y, block, out);
            else
                round_block(5, &w->tables->nibble, depth, y, block, out);
            block++;
        }
    }
    out->mean = mean;
}

static void multiply(const cvxq_matrix *w, const cvxq_cluster *cluster, const cvxq_tile *tile,
                     const cvxq_input *inputs, int batch, float *sums) {
    (has_tables(w) ? multiply_tile : cvxq_ops_scalar.tile)(w, cluster, tile, inputs, batch, sums);
}

const cvxq_ops cvxq_ops_avx2 = {"avx2", prepare, multiply, multiply_dense,
                                  cvxq_repack_run_avx2};
#endif
