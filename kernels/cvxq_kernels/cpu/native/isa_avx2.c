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
#include "internal.h"

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

/* Scales of 32 groups. Each byte of them is looked up if there are not too many for that. */
INLINE void scales_of(const cvxq_matrix *w, const uint8_t *codes, __m256 scales[4]) {
    if (!w->few_scales) {
        for (int j = 0; j < 4; j++, codes += 8)
            scales[j] = _mm256_setr_ps(w->scales[codes[0]], w->scales[codes[1]],
                                       w->scales[codes[2]], w->scales[codes[3]],
                                       w->scales[codes[4]], w->scales[codes[5]],
                                       w->scales[codes[6]], w->scales[codes[7]]);
        return;
    }
    __m256i bytes[4], words[4];
    for (int b = 0; b < 4; b++) bytes[b] = look_parts(4, w->scale_bytes[b], load(codes));
    for (int b = 0; b < 4; b += 2) {
        words[b] = _mm256_unpacklo_epi8(bytes[b], bytes[b + 1]);
        words[b + 1] = _mm256_unpackhi_epi8(bytes[b], bytes[b + 1]);
    }
    __m256i fours[4]; /* groups 0–3 and 16–19, 4–7 and 20–23, … */
    for (int h = 0; h < 2; h++) {
        fours[2 * h] = _mm256_unpacklo_epi16(words[h], words[2 + h]);
        fours[2 * h + 1] = _mm256_unpackhi_epi16(words[h], words[2 + h]);
    }
    for (int h = 0; h < 2; h++) {
        const __m256i a = fours[2 * h], b = fours[2 * h + 1];
        scales[h] = _mm256_castsi256_ps(_mm256_permute2x128_si256(a, b, 0x20));
        scales[2 + h] = _mm256_castsi256_ps(_mm256_permute2x128_si256(a, b, 0x31));
    }
}

/* Masks of eight places: all ones for the first `have`, else 0; `have` is −56 … 64. */
static const int32_t FIRST[2 * BLOCK + 8] = {[0 ... BLOCK - 1] = -1};
INLINE __m256i first_of_eight(int64_t have) {
    return _mm256_loadu_si256((const __m256i *)(FIRST + BLOCK - have));
}

/* scaled (K,) = inputs times the scales of their groups; returns what the groups' means add. */
INLINE float scale_inputs(const cvxq_matrix *w, int64_t groups, const float *x, float *scaled) {
    __m256 mean = _mm256_setzero_ps();
    for (int64_t k = 0; k < w->inputs; k += 32) {
        __m256 scales[4];
        scales_of(w, w->scale_codes + groups + k, scales);
        fetch(w->scale_codes + groups + k + w->inputs); /* of the next cluster */
        if (w->mean_codes) fetch((const uint8_t *)w->mean_codes + groups + k + w->inputs);
        UNROLL for (int j = 0; j < 32; j += 8) {
            const int64_t have = w->inputs - k - j;
            const __m256 eight =
                have >= 8 ? _mm256_loadu_ps(x + k + j)
                          : _mm256_maskload_ps(x + k + j, first_of_eight(max_of(have, 0)));
            const __m256 y = _mm256_mul_ps(eight, scales[j / 8]);
            _mm256_storeu_ps(scaled + k + j, y);
            if (!w->mean_codes) continue;
            const __m128i codes =
                _mm_loadl_epi64((const __m128i *)(w->mean_codes + groups + k + j));
            const __m256 means = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            mean = _mm256_fmadd_ps(y, _mm256_mul_ps(means, _mm256_set1_ps(w->mean_step)), mean);
        }
    }
    return sum_of(mean);
}

/* The largest of positive numbers, given as bits, by which they are in order; NaN for infinity or NaN,
 * which are above all numbers. */
INLINE float largest_of(__m256i v) {
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
    return _mm_cvtsi128_si32(most) < 0x7f800000 ? _mm_cvtss_f32(_mm_castsi128_ps(most)) : NAN;
}
INLINE int32_t whole_sum(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

/* At most FLT_MAX. Unlike this, fminf is a call, which keeps no vector in its register. */
INLINE float capped(float v) { return v < FLT_MAX ? v : FLT_MAX; }

/* Sums of the magnitudes that vpmaddubsw adds up, with the four of the other quad at depths 1–3. */
INLINE __m256 joined_sizes(const int depth, __m256 sizes) {
    if (depth < 4) sizes = _mm256_add_ps(sizes, _mm256_permute2f128_ps(sizes, sizes, 1));
    return _mm256_add_ps(sizes, _mm256_permute_ps(sizes, 0xB1));
}

/* Round `count` scaled inputs, one block, with zeros behind them (depth: 3 for 1–3, 5 for 5–8): to as
 * many steps as 8 or 14 bits hold and, at depths 1–4, as sums of products with the largest number in
 * 16 bits do. Where an input is not finite the step is NaN, and so is every product. */
INLINE void round_block(const int depth, const float *scaled, int64_t count, int64_t block,
                        cvxq_input *out) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));
    __m256 y[BLOCK / 8];
    __m256i most_bits = _mm256_setzero_si256(), joined_bits = most_bits, sum = most_bits;
    UNROLL for (int j = 0; j < BLOCK / 8; j++) {
        const __m256 own = _mm256_castsi256_ps(first_of_eight(min_of(count, BLOCK) - 8 * j));
        y[j] = _mm256_and_ps(_mm256_loadu_ps(scaled + 8 * j), own);
        const __m256 size = _mm256_and_ps(y[j], magnitude);
        most_bits = _mm256_max_epi32(most_bits, _mm256_castps_si256(size));
        if (depth > NARROW) continue;
        const __m256i joined = _mm256_castps_si256(joined_sizes(depth, size));
        joined_bits = _mm256_max_epi32(joined_bits, joined);
    }
    float step = largest_of(most_bits) / (depth <= NARROW ? INT8_MAX : MOST_WHOLE);
    if (depth <= NARROW) { /* each may be rounded up by half */
        const int most = depth < 4 ? INT16_MAX / MOST_JOINED - 2 : INT16_MAX / MOST_PAIRED - 1;
        const float least = capped(largest_of(joined_bits)) / (float)most;
        if (step < least) step = least;
    }
    const __m256 factor = _mm256_set1_ps(step > 0 ? capped(1 / step) : 0);
    __m256i whole[BLOCK / 8];
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
    out->scale[block] = step;
    out->start[block] = whole_sum(sum);
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
    out->mean = scale_inputs(w, groups, x, out->scaled);
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        if (!run->depth) continue;
        const float *scaled = out->scaled + run->first;
        for (int64_t left = run->count; left > 0; left -= BLOCK, scaled += BLOCK, block++) {
            for (int j = 0; j < AHEAD_BLOCK; j += LINE) fetch(soon + j);
            soon += AHEAD_BLOCK;
            if (run->depth < 4)
                round_block(3, scaled, left, block, out);
            else if (run->depth == 4)
                round_block(4, scaled, left, block, out);
            else
                round_block(5, scaled, left, block, out);
            out->scale[block] *= w->tables->nibble.unit[run->depth];
            out->start[block] = (int32_t)lrintf(-w->tables->nibble.zero[run->depth] *
                                                (float)out->start[block]);
        }
    }
}

static void multiply(const cvxq_matrix *w, const cvxq_cluster *cluster, const cvxq_tile *tile,
                     const cvxq_input *inputs, int batch, float *sums) {
    (has_tables(w) ? multiply_tile : cvxq_ops_scalar.tile)(w, cluster, tile, inputs, batch, sums);
}

const cvxq_ops cvxq_ops_avx2 = {"avx2", prepare, multiply, multiply_dense};
#endif
