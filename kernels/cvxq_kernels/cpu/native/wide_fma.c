/* Products with many inputs, in float32 with AVX2 and FMA.
 *
 * With many inputs, what a weight costs is no longer its decoding but its products. Without a dot
 * product of bytes, float32 multiplies as fast as anything: two fused instructions of eight products
 * a cycle, where those of 16-bit integers are half as many and want additions besides. So weights
 * are expanded once, S · (level + t), and nothing is rounded that the exact mode would not round.
 *
 * A chunk of work expands about COLUMNS columns of a tile at a time, each strip to (columns, 16)
 * float32, which the first cache holds while all inputs of the chunk pass. These lie in panels of
 * up to PANEL inputs, (columns, inputs) each, so that a step of the innermost loop reads two vectors
 * of weights and as many inputs as there are, and does two products with each.
 *
 * A level is found byte by byte: the four bytes of a float32 have tables of their own, of 16 entries
 * for each look-up. That is exact, and takes fewer cycles than a gather at every depth.
 */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 8")

enum {
    PANEL = 6, /* inputs: with them, twelve sums, two weights and an input fill the registers */
    COLUMNS = 256,
    ROOM = COLUMNS + 32, /* a unit spans up to 32 columns */
};

/* Level tables of one depth, 16 entries of each byte of a float32, for both halves of a register. */
typedef struct {
    __m256i bytes[16][4];
} byte_tables;

typedef struct {
    const cvxq_wide *wide;
    const cvxq_matrix *w;
    const float *scale, *shift; /* (K + 32) of the cluster */
    float *weights;             /* (4 strips, ROOM, 16) */
    float *sums;                /* (inputs, 64) of the tile in work */
    int64_t first_panel, panels;
    int64_t at;     /* place of the first column expanded */
    int64_t filled; /* columns expanded */
    int strips;
} expansion;

INLINE __m256i both(__m128i half) { return _mm256_broadcastsi128_si256(half); }

/* Bytes 4·i + j of a half to 4·j + i. */
INLINE __m128i by_column(void) {
    return _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

INLINE void fill_tables(const cvxq_matrix *w, const int depth, byte_tables *t) {
    const float *levels = w->tables->level + (1 << depth);
    for (int part = 0; part < (depth > 4 ? 1 << (depth - 4) : 1); part++) {
        __m128i four[4];
    UNROLL for (int i = 0; i < 4; i++)
            four[i] = _mm_shuffle_epi8(_mm_castps_si128(_mm_loadu_ps(levels + 16 * part + 4 * i)),
                                       by_column());
        const __m128i low01 = _mm_unpacklo_epi32(four[0], four[1]);
        const __m128i high01 = _mm_unpackhi_epi32(four[0], four[1]);
        const __m128i low23 = _mm_unpacklo_epi32(four[2], four[3]);
        const __m128i high23 = _mm_unpackhi_epi32(four[2], four[3]);
        t->bytes[part][0] = both(_mm_unpacklo_epi64(low01, low23));
        t->bytes[part][1] = both(_mm_unpackhi_epi64(low01, low23));
        t->bytes[part][2] = both(_mm_unpacklo_epi64(high01, high23));
        t->bytes[part][3] = both(_mm_unpackhi_epi64(high01, high23));
    }
}

/* `width` bits of every byte from bit `place` on, moved to bit `to`. */
INLINE __m256i field(__m256i bytes, const int place, const int width, const int to) {
    const __m256i moved = place > to   ? _mm256_srli_epi16(bytes, place - to)
                          : place < to ? _mm256_slli_epi16(bytes, to - place)
                                       : bytes;
    return _mm256_and_si256(moved, _mm256_set1_epi8((char)(((1 << width) - 1) << to)));
}

/* Half of a unit's eight code vectors (see unit.c), column by column: 8 rows of each. */
INLINE void codes_of(const int depth, const uint8_t *unit, __m256i codes[UNIT]) {
    __m256i row[8];
    UNROLL for (int i = 0; i < depth; i++)
        row[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(unit + VECTOR * i)),
                                     both(by_column()));
    if (depth == 3) {
        __m256i top = field(row[0], 6, 2, 0);
        top = _mm256_or_si256(top, field(row[1], 6, 2, 2));
        top = _mm256_or_si256(top, field(row[2], 6, 2, 4));
        UNROLL for (int i = 0; i < 6; i++) codes[i] = field(row[i / 2], i % 2 * 3, 3, 0);
        codes[6] = field(top, 0, 3, 0);
        codes[7] = field(top, 3, 3, 0);
    } else if (depth == 7) {
        codes[7] = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < 7; i++) {
            codes[i] = field(row[i], 0, 7, 0);
            codes[7] = _mm256_or_si256(codes[7], field(row[i], 7, 1, i));
        }
    } else if (depth == 5 || depth == 6) {
        const int width = depth - 4;
        UNROLL for (int i = 0; i < UNIT; i++)
            codes[i] = _mm256_or_si256(field(row[i / 2], i % 2 * 4, 4, 0),
                                       field(row[4 + i * width / 8], i * width % 8, width, 4));
    } else {
        UNROLL for (int i = 0; i < UNIT; i++)
            codes[i] = field(row[i * depth / 8], i * depth % 8, depth, 0);
    }
}

/* bytes[b] = byte b of the levels of 32 codes. Where a table has several parts, adding 0x70 with
 * saturation sets the top bit of every index that another part answers for, which gives zero. */
INLINE void look_up(const int depth, const byte_tables *t, __m256i codes, __m256i bytes[4]) {
    const int parts = depth > 4 ? 1 << (depth - 4) : 1;
    UNROLL for (int b = 0; b < 4; b++) bytes[b] = _mm256_setzero_si256();
    UNROLL for (int part = 0; part < parts; part++) {
        const __m256i own = _mm256_adds_epu8(
            _mm256_xor_si256(codes, _mm256_set1_epi8((char)(16 * part))), _mm256_set1_epi8(0x70));
        UNROLL for (int b = 0; b < 4; b++) {
            const __m256i found = _mm256_shuffle_epi8(t->bytes[part][b], parts > 1 ? own : codes);
            bytes[b] = _mm256_or_si256(bytes[b], found);
        }
    }
}

/* Four columns, 8 rows of each, to every other half line at `out`. */
INLINE void put_columns(const __m256i bytes[4], const float *scale, const float *shift,
                        float *out) {
    const __m256i low01 = _mm256_unpacklo_epi8(bytes[0], bytes[1]);
    const __m256i high01 = _mm256_unpackhi_epi8(bytes[0], bytes[1]);
    const __m256i low23 = _mm256_unpacklo_epi8(bytes[2], bytes[3]);
    const __m256i high23 = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
    const __m256i column[4] = {
        _mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
        _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
    UNROLL for (int j = 0; j < 4; j++)
        _mm256_store_ps(out + STRIP * j, _mm256_fmadd_ps(_mm256_castsi256_ps(column[j]),
                                                         _mm256_broadcast_ss(scale + j),
                                                         _mm256_broadcast_ss(shift + j)));
}

/* One unit, whose first column goes to `out`: column k's weights are level · scale + shift. Only what
 * is a constant number of steps is unrolled: all of it would take compilers minutes. */
INLINE void expand_unit(const int depth, const byte_tables *t, const uint8_t *unit, int strips,
                        const float *scale, const float *shift, float *out) {
    for (int half = 0; half < 2; half++, unit += VECTOR / 2, out += STRIP / 2) {
        __m256i codes[UNIT];
        codes_of(depth, unit, codes);
        for (int quad = 0, v = 0; v < UNIT; quad += 4) {
            for (int strip = 0; strip < strips; strip++, v++) {
                __m256i bytes[4];
                look_up(depth, t, codes[v], bytes);
                put_columns(bytes, scale + quad, shift + quad,
                            out + (strip * ROOM + quad) * STRIP);
            }
        }
    }
}

/* Sums (inputs, 16 of 64) += inputs · weights (columns, 16). */
INLINE void multiply_panel(const int inputs, const float *weights, const float *x, int64_t columns,
                           float *sums) {
    __m256 sum[PANEL][2];
    UNROLL for (int i = 0; i < inputs; i++) UNROLL for (int h = 0; h < 2; h++)
        sum[i][h] = _mm256_load_ps(sums + i * TILE + 8 * h);
    for (int64_t k = 0; k < columns; k++, weights += STRIP, x += inputs) {
        const __m256 upper = _mm256_load_ps(weights), lower = _mm256_load_ps(weights + 8);
        UNROLL for (int i = 0; i < inputs; i++) {
            const __m256 input = _mm256_broadcast_ss(x + i);
            sum[i][0] = _mm256_fmadd_ps(upper, input, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(lower, input, sum[i][1]);
        }
    }
    UNROLL for (int i = 0; i < inputs; i++) UNROLL for (int h = 0; h < 2; h++)
        _mm256_store_ps(sums + i * TILE + 8 * h, sum[i][h]);
}

/* Multiply what is expanded with all inputs of the chunk, and forget it. */
TARGET static void multiply_expanded(expansion *e) {
    const int64_t first = cvxq_wide_input(e->wide, e->first_panel);
    for (int strip = 0; strip < e->strips; strip++) {
        const float *weights = e->weights + strip * ROOM * STRIP;
        for (int64_t p = e->first_panel; p < e->first_panel + e->panels; p++) {
            const int64_t m = cvxq_wide_input(e->wide, p);
            const int inputs = (int)(cvxq_wide_input(e->wide, p + 1) - m);
            const float *x = (const float *)e->wide->inputs + m * e->w->inputs + e->at * inputs;
            float *sums = e->sums + (m - first) * TILE + strip * STRIP;
            switch (inputs) {
            case 1: multiply_panel(1, weights, x, e->filled, sums); break;
            case 2: multiply_panel(2, weights, x, e->filled, sums); break;
            case 3: multiply_panel(3, weights, x, e->filled, sums); break;
            case 4: multiply_panel(4, weights, x, e->filled, sums); break;
            case 5: multiply_panel(5, weights, x, e->filled, sums); break;
            default: multiply_panel(PANEL, weights, x, e->filled, sums);
            }
        }
    }
    e->at += e->filled;
    e->filled = 0;
}

/* Expand a run; multiply whenever enough is there. Its codes begin at `unit`. */
INLINE void do_run(const int depth, const cvxq_run *run, const uint8_t *unit, expansion *e) {
    const int64_t per_unit = unit_columns(e->strips);
    byte_tables tables;
    fill_tables(e->w, depth, &tables);
    for (int64_t i = 0; i < run->count; i += per_unit, unit += VECTOR * depth) {
        expand_unit(depth, &tables, unit, e->strips, e->scale + run->first + i,
                    e->shift + run->first + i, e->weights + e->filled * STRIP);
        /* What a last unit has beyond its run is none of it: the next run begins there. */
        e->filled += min_of(per_unit, run->count - i);
        if (e->filled >= COLUMNS) multiply_expanded(e);
    }
}

/* Pruned columns: their weights are the means. */
TARGET static void do_pruned(const cvxq_run *run, expansion *e) {
    for (int64_t i = 0; i < run->count; i++) {
        for (int strip = 0; strip < e->strips; strip++) {
            float *out = e->weights + (strip * ROOM + e->filled) * STRIP;
            for (int lane = 0; lane < STRIP; lane++) out[lane] = e->shift[run->first + i];
        }
        if (++e->filled >= COLUMNS) multiply_expanded(e);
    }
}

typedef void (*runner)(const cvxq_run *, const uint8_t *, expansion *);
#define RUNNER(DEPTH)                                                                             \
    TARGET static void do_run_##DEPTH(const cvxq_run *run, const uint8_t *unit, expansion *e) {   \
        do_run(DEPTH, run, unit, e);                                                              \
    }
RUNNER(1)
RUNNER(2)
RUNNER(3)
RUNNER(4)
RUNNER(5)
RUNNER(6)
RUNNER(7)
RUNNER(8)
static const runner RUNNERS[8] = {do_run_1, do_run_2, do_run_3, do_run_4,
                                  do_run_5, do_run_6, do_run_7, do_run_8};

static void multiply_tile(const cvxq_cluster *cluster, const cvxq_tile *tile, expansion *e) {
    const cvxq_run *runs = &e->w->runs[cluster->first_run];
    const uint8_t *unit = e->w->codes + tile->codes;
    e->strips = tile->strips;
    e->at = cluster->runs ? runs[0].first : 0;
    e->filled = 0;
    for (int32_t r = 0; r < cluster->runs; r++) {
        if (runs[r].depth) {
            RUNNERS[runs[r].depth - 1](&runs[r], unit, e);
            unit += ceil_div(runs[r].count, unit_columns(tile->strips)) * VECTOR * runs[r].depth;
        } else {
            do_pruned(&runs[r], e);
        }
    }
    if (e->filled) multiply_expanded(e);
}

/* Scales, and scales times means, of a cluster's columns; zeros where a unit reaches past them. */
static void load_scales(const cvxq_matrix *w, int64_t groups, float *scale, float *shift) {
    for (int64_t k = 0; k < w->inputs; k++) {
        scale[k] = w->scales[w->scale_codes[groups + k]];
        shift[k] = w->mean_codes ? scale[k] * ((float)w->mean_codes[groups + k] * w->mean_step) : 0;
    }
    memset(scale + w->inputs, 0, 4 * UNIT * sizeof *scale);
    memset(shift + w->inputs, 0, 4 * UNIT * sizeof *shift);
}

static size_t column_bytes(const cvxq_matrix *w) {
    return aligned((size_t)(w->inputs + 4 * UNIT) * sizeof(float));
}

static int is_available(int exact) {
    const cvxq_ops *ops = cvxq_ops_in_use();
    return ops == &cvxq_ops_avx2 || (exact && ops == &cvxq_ops_avx512);
}

static void plan(cvxq_wide *wide, const cvxq_matrix *w, int threads) {
    wide->panels = wide->fills = (int32_t)ceil_div(wide->m, PANEL);
    wide->pieces = (int32_t)cvxq_wide_pieces(wide->m, w, threads);
    wide->rows = (int32_t)ceil_div(wide->panels, wide->pieces) * PANEL;
    wide->input_bytes = aligned((size_t)wide->m * (size_t)w->inputs * sizeof(float));
    wide->scratch_bytes = cvxq_wide_sums_bytes(wide) + 4 * ROOM * STRIP * sizeof(float) +
                          2 * column_bytes(w);
}

/* One panel, column by column. */
static void fill(const cvxq_wide *wide, const cvxq_matrix *w, const float *x, int64_t panel) {
    const int64_t first = cvxq_wide_input(wide, panel), inputs = w->inputs;
    const int64_t count = cvxq_wide_input(wide, panel + 1) - first;
    float *out = (float *)wide->inputs + first * inputs;
    x += first * inputs;
    for (int64_t k = 0; k < inputs; k++) {
        const float *from = x + (w->order ? w->order[k] : k);
        for (int64_t i = 0; i < count; i++) *out++ = from[i * inputs];
    }
}

static void item(const cvxq_wide *wide, const cvxq_matrix *w, const cvxq_item *item, int64_t piece,
                 void *scratch) {
    char *memory = (char *)scratch + cvxq_wide_sums_bytes(wide);
    float *scale = (float *)memory, *shift = (float *)(memory + column_bytes(w));
    const int64_t first = cvxq_wide_panel(wide, piece);
    expansion e = {.wide = wide,
                   .w = w,
                   .scale = scale,
                   .shift = shift,
                   .weights = (float *)(memory + 2 * column_bytes(w)),
                   .sums = scratch,
                   .first_panel = first,
                   .panels = cvxq_wide_panel(wide, piece + 1) - first};
    load_scales(w, item->cluster * w->inputs, scale, shift);
    memset(scratch, 0, sizeof(float) * (size_t)(item->tiles * wide->rows * TILE));
    for (int64_t t = item->first_tile; t < item->first_tile + item->tiles; t++) {
        multiply_tile(&w->clusters[item->cluster], &w->tiles[t], &e);
        e.sums += wide->rows * TILE;
    }
}

static void collect(const cvxq_wide *wide, const cvxq_matrix *w, int64_t row, float *restrict y) {
    const float *restrict results = wide->results + row * cvxq_wide_pitch(w);
    for (int64_t n = 0; n < w->outputs; n++) y[n] = results[w->places[n]];
    for (int64_t n = 0; w->row_scales && n < w->outputs; n++) y[n] *= w->row_scales[n];
    for (int64_t n = 0; w->bias && n < w->outputs; n++) y[n] += w->bias[n];
}

const cvxq_wide_ops cvxq_wide_fma = {is_available, plan, fill, item, collect};
#endif
