/* Products with many inputs in bfloat16, on Intel's matrix unit (AMX) where there is one and else by
 * AVX-512's dot products of pairs.
 *
 * With many inputs, rounding each of them for every cluster costs more than the products do, and so
 * does decoding weights for every four inputs. So weights are expanded once, S · (level + t), 256
 * columns of a tile at a time (the first cache holds them), into the pairs of bfloat16 that both
 * take, and meet inputs that were rounded once per matrix. Both roundings add 5e-6 of the signal's
 * power, too much beside the error of 8-bit codes only (4e-5): for those both factors are split in
 * two parts, and three of the four products are taken.
 *
 * A step is 32 columns: 16 pairs, each the 16 lanes of a strip times two columns, which are the rows
 * of the matrix unit's second operand. Steps begin at multiples of 32 in the order of columns,
 * whatever runs begin there: so inputs lie step after step, each (M, 32), and none of them crosses a
 * cache line. Where a run begins at an odd column, its codes are shifted by one.
 *
 * Up to depth 6 a pair of columns has few values: 2 · 2^B, each rounded once and then looked up.
 */
#define _GNU_SOURCE
#include "internal.h"

#if defined(CVXQ_HAS_BF16)
#include "wide_dots.h"
#include "wide_expand.h"
#include "wide_tiles.h"

static int is_available(int exact) {
    return !exact && cvxq_ops_in_use() == &cvxq_ops_avx512 &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
}

/* Elements of the inputs, of which there are two planes where factors are split. */
static int64_t plane_of(const cvxq_wide *wide, const cvxq_matrix *w) {
    return ceil_div(w->inputs, STEP) * STEP * wide->fills;
}

static void plan(cvxq_wide *wide, const cvxq_matrix *w, int threads) {
    /* The matrix unit takes 32 inputs at a time: some of them are padding. */
    wide->pieces = has_tiles() ? 1 : (int32_t)cvxq_wide_pieces(wide->m, w, threads);
    wide->panels = wide->pieces;
    wide->fills = has_tiles() ? (int32_t)(ceil_div(wide->m, TILE_INPUTS) * TILE_INPUTS) : wide->m;
    wide->rows = (int32_t)ceil_div(wide->fills, wide->pieces);
    wide->input_bytes = (size_t)plane_of(wide, w) * sizeof(uint16_t) *
                        (w->deepest >= SPLIT ? 2 : 1);
    wide->scratch_bytes = cvxq_wide_sums_bytes(wide) + 2 * ROOM * PAIR;
}

/* Row `row`, one of padding from M on. */
TARGET static void fill(const cvxq_wide *wide, const cvxq_matrix *w, const float *x, int64_t row) {
    const int32_t *order = w->order;
    uint16_t *high = wide->inputs, *low = high + plane_of(wide, w);
    x += row * w->inputs;
    for (int64_t k = 0; k < ceil_div(w->inputs, STEP) * STEP; k += 16) {
        const int64_t left = row < wide->m ? w->inputs - k : 0; /* what is padding is zero */
        const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0;
        const __m512 zero = _mm512_setzero_ps();
        const __m512 value = order
                                 ? _mm512_mask_i32gather_ps(
                                       zero, mask, _mm512_maskz_loadu_epi32(mask, order + k), x, 4)
                                 : _mm512_maskz_loadu_ps(mask, x + k);
        const int64_t at = (k / STEP * wide->fills + row) * STEP + k % STEP;
        const __m256i upper = (__m256i)_mm512_cvtneps_pbh(value);
        _mm256_store_si256((__m256i *)(high + at), upper);
        if (w->deepest < SPLIT) continue;
        const __m512 rounded =
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
        _mm256_store_si256((__m256i *)(low + at),
                           (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, rounded)));
    }
}

TARGET static void collect(const cvxq_wide *wide, const cvxq_matrix *w, int64_t row, float *y) {
    const float *results = wide->results + row * cvxq_wide_pitch(w);
    for (int64_t n = 0; n < w->outputs; n += 16) {
        const __mmask16 mask = w->outputs - n >= 16 ? 0xFFFF : (1 << (w->outputs - n)) - 1;
        const __m512 zero = _mm512_setzero_ps();
        __m512 sum = _mm512_mask_i32gather_ps(
            zero, mask, _mm512_maskz_loadu_epi32(mask, w->places + n), results, 4);
        if (w->row_scales) sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, w->row_scales + n));
        if (w->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, w->bias + n));
        _mm512_mask_storeu_ps(y + n, mask, sum);
    }
}

/* Multiply `steps` expanded steps; what was expanded beyond a full batch moves to the front. */
TARGET static void multiply_batch(batch_state *b, int64_t steps) {
    if (has_tiles()) {
        multiply_by_tiles(b, steps);
    } else {
        multiply_by_dots(b, steps);
    }
    if (steps == STEPS) {
        const size_t beyond = (size_t)((ROOM - STEPS * PAIRS) * PAIR);
        memcpy(b->weights, b->weights + STEPS * PAIRS * PAIR, beyond);
        if (b->split != INT64_MAX) memcpy(b->rest, b->rest + STEPS * PAIRS * PAIR, beyond);
    }
    b->first += steps;
    b->is_first = 0;
}

/* Keep what the run before has left of the pair that it shares with this one. */
INLINE void join_pair(const __m512i kept[4], uint8_t *pair) {
    for (int s = 0; s < 4; s++)
        _mm512_store_si512(pair + s * VECTOR,
                           _mm512_or_si512(kept[s], _mm512_load_si512(pair + s * VECTOR)));
}

/* Expand a run; multiply whenever enough is there. Its codes begin at `unit`. */
INLINE void do_run(const int depth, const cvxq_matrix *w, const cvxq_run *run, int64_t groups,
                   const uint8_t *unit, const int strips, batch_state *b) {
    const int per_unit = 4 * UNIT / strips, is_odd = run->first % 2;
    __m512 levels[4];
    __m512i codes[UNIT], shifted[UNIT], carry[4];
    float scale[32], shift[32] = {0};
    load_levels(w, depth, levels);
    for (int s = 0; s < 4; s++) carry[s] = _mm512_setzero_si512();
    for (int64_t i = -is_odd; i < run->count; i += per_unit, unit += VECTOR * depth) {
        const int64_t column = run->first + i - b->first * STEP;
        uint8_t *out = b->weights + column / 2 * PAIR, *rest = b->rest + column / 2 * PAIR;
        load_scales(w, groups + run->first + i, -i, run->count - i, per_unit, scale, shift);
        if (is_odd) {
            if (i + 1 < run->count) {
                codes_of(depth, unit, codes);
            } else {
                for (int v = 0; v < UNIT; v++) codes[v] = _mm512_setzero_si512();
            }
    // clang-format off
            UNROLL for (int v = 0; v < UNIT; v++)
                shifted[v] = _mm512_shrdi_epi32(v < strips ? carry[v] : codes[v - strips],
                                                codes[v], 24);
            // clang-format on
            UNROLL for (int s = 0; s < strips; s++) carry[s] = codes[UNIT - strips + s];
            __m512i kept[4], kept_rest[4];
            for (int s = 0; s < 4; s++) {
                kept[s] = _mm512_load_si512(out + s * VECTOR);
                kept_rest[s] = _mm512_load_si512(rest + s * VECTOR);
            }
            expand_unit(depth, w, levels, shifted, strips, scale, shift, out, rest);
            if (i < 0) join_pair(kept, out);
            if (i < 0 && depth == SPLIT) join_pair(kept_rest, rest);
        } else {
            codes_of(depth, unit, codes);
            expand_unit(depth, w, levels, codes, strips, scale, shift, out, rest);
        }
        /* What a last unit has beyond its run is none of it: the next run begins there. */
        if (column + min_of(per_unit, run->count - i) >= STEPS * STEP) multiply_batch(b, STEPS);
    }
}

typedef void (*runner)(const cvxq_matrix *, const cvxq_run *, int64_t, const uint8_t *,
                       batch_state *);
#define RUNNER(DEPTH)                                                                       \
    TARGET static void do_run_##DEPTH(const cvxq_matrix *w, const cvxq_run *run,            \
                                      int64_t groups, const uint8_t *unit, batch_state *b) { \
        switch (b->strips) {                                                                \
        case 4: do_run(DEPTH, w, run, groups, unit, 4, b); break;                           \
        case 2: do_run(DEPTH, w, run, groups, unit, 2, b); break;                           \
        default: do_run(DEPTH, w, run, groups, unit, 1, b);                                 \
        }                                                                                   \
    }
RUNNER(0)
RUNNER(1)
RUNNER(2)
RUNNER(3)
RUNNER(4)
RUNNER(5)
RUNNER(6)
RUNNER(7)
RUNNER(8)
static const runner RUNNERS[9] = {do_run_0, do_run_1, do_run_2, do_run_3, do_run_4,
                                  do_run_5, do_run_6, do_run_7, do_run_8};

/* Clear the pairs of the first step up to column `end`, the pair it halves included. */
static void clear_until(uint8_t *weights, int64_t end) {
    memset(weights, 0, (size_t)((end + 1) / 2 * PAIR));
}

/* Expand and multiply all runs of one tile. */
static void multiply_tile(const cvxq_matrix *w, const cvxq_cluster *cluster,
                          const cvxq_tile *tile, int64_t groups, batch_state *b) {
    const cvxq_run *runs = &w->runs[cluster->first_run];
    const uint8_t *unit = w->codes + tile->codes;
    b->strips = tile->strips;
    b->is_first = 1;
    b->split = INT64_MAX;
    b->first = cluster->runs ? runs[0].first / STEP : 0;
    if (cluster->runs) clear_until(b->weights, runs[0].first % STEP);
    int64_t end = 0;
    for (int32_t r = 0; r < cluster->runs; r++) {
        if (runs[r].depth == SPLIT) {
            b->split = runs[r].first / STEP;
            clear_until(b->rest + (b->split - b->first) * PAIRS * PAIR, runs[r].first % STEP);
        }
        RUNNERS[runs[r].depth](w, &runs[r], groups, unit, b);
        unit += ceil_div(runs[r].count, unit_columns(tile->strips)) * VECTOR * runs[r].depth;
        end = runs[r].first + runs[r].count;
    }
    /* The last step may have columns of padding, whose weights must be numbers. */
    const int64_t filled = end - b->first * STEP, steps = ceil_div(max_of(filled, 0), STEP);
    const int64_t used = (filled + 1) / 2;
    if (steps > 0) {
        const size_t unused = (size_t)((steps * PAIRS - used) * PAIR);
        memset(b->weights + used * PAIR, 0, unused);
        if (b->first + steps > b->split) memset(b->rest + used * PAIR, 0, unused);
    }
    if (steps > 0 || b->is_first) multiply_batch(b, max_of(steps, 0));
}

TARGET static void item(const cvxq_wide *wide, const cvxq_matrix *w, const cvxq_item *item,
                        int64_t piece, void *scratch) {
    uint8_t *weights = (uint8_t *)scratch + cvxq_wide_sums_bytes(wide);
    const int64_t first = cvxq_wide_input(wide, piece);
    const uint16_t *inputs = (const uint16_t *)wide->inputs + first * STEP;
    batch_state b = {.weights = weights,
                     .rest = weights + ROOM * PAIR,
                     .sums = scratch,
                     .high = inputs,
                     .low = inputs + plane_of(wide, w),
                     .rows = has_tiles() ? wide->rows : cvxq_wide_input(wide, piece + 1) - first,
                     .stride = wide->fills};
    if (has_tiles()) begin_tiles();
    for (int64_t t = item->first_tile; t < item->first_tile + item->tiles; t++) {
        const cvxq_tile *tile = &w->tiles[t];
        multiply_tile(w, &w->clusters[item->cluster], tile, item->cluster * w->inputs, &b);
        b.sums += wide->rows * TILE;
    }
    if (has_tiles()) end_tiles();
}

const cvxq_wide_ops cvxq_wide_bf16 = {is_available, plan, fill, item, collect};
#endif
