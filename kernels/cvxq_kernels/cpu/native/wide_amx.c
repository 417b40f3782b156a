/* Products with many inputs, on Intel's matrix unit (AMX) in bfloat16.
 *
 * With many inputs, rounding each of them for every cluster costs more than the products do. So
 * weights are expanded instead, S · (level + t), 256 columns of a tile at a time (the first cache
 * holds them), into the pairs of bfloat16 that the unit takes, and meet inputs that were rounded
 * once per matrix. Both roundings add 5e-6 of the signal's power, too much beside the error of
 * 8-bit codes only (4e-5): for those both factors are split in two parts, and three of the four
 * products are taken.
 *
 * A step is 32 columns: 16 rows of the unit's second operand, each the 16 lanes of a strip times two
 * columns. Every run begins a new step; what is left of its last step has weights of zero.
 */
#define _GNU_SOURCE
#include "internal.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET                                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16," \
                          "fma,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { STEP = 32, STEPS = 8, TILE_BYTES = 1024, SPLIT = 8 };

typedef struct {
    uint8_t *weights; /* (STEPS, 4 strips, 16 pairs, 16 rows, 2) bfloat16 */
    float *sums;      /* (padded M, 64) */
    const uint16_t *inputs[STEPS]; /* first input of each step, in its first row */
    int steps, strips;
    int64_t pitch, padded; /* bfloat16 values from row to row of the inputs; M in steps of 32 */
    int is_first;          /* sums hold nothing yet */
} batch_state;

static int ask_for_tiles(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

int cvxq_wide_available(void) {
    static atomic_int known; /* 0 not asked yet, 1 no, 2 yes */
    int state = atomic_load(&known);
    if (!state) {
        unsigned a, b, c, d, has_tiles, has_bf16;
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        has_tiles = (d >> 24 & 1) && (d >> 22 & 1); /* amx-tile, amx-bf16 */
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
        has_bf16 = a >> 5 & 1; /* avx512_bf16 */
        state = has_tiles && has_bf16 && ask_for_tiles() ? 2 : 1;
        atomic_store(&known, state);
    }
    return state == 2 && cvxq_ops_in_use() == &cvxq_ops_avx512;
}

int64_t cvxq_wide_pitch(int64_t inputs) {
    /* Room for a whole step behind the last column; an odd number of cache lines, because rows a
     * multiple of 4 kB apart would share a few sets of the cache. */
    return (ceil_div(inputs, STEP) + 1) * STEP + (ceil_div(inputs, STEP) % 2 ? STEP : 0);
}
int64_t cvxq_wide_rows(int64_t m) { return ceil_div(m, 32) * 32; }

size_t cvxq_wide_scratch(int64_t m) {
    return STEPS * 4 * TILE_BYTES + (size_t)cvxq_wide_rows(m) * TILE * sizeof(float);
}

TARGET void cvxq_wide_round(const float *x, const int32_t *order, int64_t count, uint16_t *high,
                            uint16_t *low) {
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 mask = count - k >= 16 ? 0xFFFF : (1 << (count - k)) - 1;
        const __m512 zero = _mm512_setzero_ps();
        const __m512 value =
            order ? _mm512_mask_i32gather_ps(zero, mask,
                                             _mm512_maskz_loadu_epi32(mask, order + k), x, 4)
                  : _mm512_maskz_loadu_ps(mask, x + k);
        const __m256i upper = (__m256i)_mm512_cvtneps_pbh(value);
        const __m512 rounded =
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
        const __m256i lower = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, rounded));
        _mm256_mask_storeu_epi16(high + k, mask, upper);
        _mm256_mask_storeu_epi16(low + k, mask, lower);
    }
}

/* Level tables in registers, or in memory for depths 6–8. */
typedef struct {
    __m512 low, high;
    const float *all;
} level_table;

INLINE level_table table_of(const cvxq_matrix *w, const int depth) {
    level_table t = {.all = w->tables->level + (1 << depth)};
    const __mmask16 some = depth >= 4 ? 0xFFFF : (1 << (1 << depth)) - 1;
    t.low = _mm512_maskz_loadu_ps(some, t.all);
    t.high = depth >= 5 ? _mm512_loadu_ps(t.all + 16) : t.low;
    return t;
}

/* Levels of the codes in the lowest byte of each lane. */
INLINE __m512 levels_of(const int depth, const level_table *t, __m512i codes) {
    if (depth == 0) return _mm512_setzero_ps();
    if (depth <= 4) return _mm512_permutexvar_ps(codes, t->low);
    if (depth == 5) return _mm512_permutex2var_ps(t->low, codes, t->high);
    return _mm512_i32gather_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255)), t->all, 4);
}

/* Two columns of 16 rows as pairs; what rounding leaves goes to `rest`, if asked for. */
INLINE void put_pair(__m512 even, __m512 odd, uint8_t *out, uint8_t *rest) {
    static const uint16_t ORDER[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_loadu_si512(ORDER);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i pairs = _mm512_permutexvar_epi16(order, both);
    _mm512_storeu_si512(out, pairs);
    if (!rest) return;
    even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(
                                 pairs, _mm512_set1_epi32((int)0xFFFF0000))));
    const __m512i left = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(rest, _mm512_permutexvar_epi16(order, left));
}

/* One unit's columns of a step, in place; the weights of column k are level · scale + shift. */
INLINE void expand_unit(const int depth, const level_table *t, const uint8_t *unit, int strips,
                        const float *scale, const float *shift, uint8_t *out, uint8_t *rest) {
    _Alignas(64) uint8_t codes[UNIT][VECTOR];
    if (depth) cvxq_unpack_unit_avx512(depth, unit, codes);
    for (int v = 0; v < UNIT; v++) {
        const int k = v / strips * 4;
        uint8_t *at = out + v % strips * TILE_BYTES + k / 2 * VECTOR;
        uint8_t *left = rest ? rest + (at - out) : NULL;
        const __m512i vector = depth ? _mm512_load_si512(codes[v]) : _mm512_setzero_si512();
        __m512 value[4];
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
            const __m512 level = levels_of(depth, t, _mm512_srli_epi32(vector, 8 * j));
            value[j] = _mm512_fmadd_ps(level, _mm512_set1_ps(scale[k + j]),
                                       _mm512_set1_ps(shift[k + j]));
        }
        put_pair(value[0], value[1], at, left);
        put_pair(value[2], value[3], at + VECTOR, left ? left + VECTOR : NULL);
    }
}

/* One step of a run: `count` ≤ 32 columns, whose units begin at `unit`, for all strips. */
INLINE void expand_step(const int depth, const cvxq_matrix *w, const uint8_t *unit,
                        const int strips, int count, const float *scale, const float *shift,
                        uint8_t *out, uint8_t *rest) {
    const level_table table = table_of(w, depth);
    const int per_unit = 4 * UNIT / strips;
    int column = 0;
    for (; column < count; column += per_unit, unit += VECTOR * depth)
        expand_unit(depth, &table, unit, strips, scale + column, shift + column,
                    out + column / 2 * VECTOR, rest ? rest + column / 2 * VECTOR : NULL);
    for (int s = 0; s < strips; s++)
        for (int pair = column / 2; pair < STEP / 2; pair++) {
            _mm512_storeu_si512(out + s * TILE_BYTES + pair * VECTOR, _mm512_setzero_si512());
            if (rest)
                _mm512_storeu_si512(rest + s * TILE_BYTES + pair * VECTOR, _mm512_setzero_si512());
        }
}

typedef void (*expander)(const cvxq_matrix *, const uint8_t *, int, int, const float *,
                         const float *, uint8_t *, uint8_t *);
#define EXPANDER(DEPTH)                                                                          \
    TARGET static void expand_##DEPTH(const cvxq_matrix *w, const uint8_t *unit, int strips,     \
                                      int count, const float *scale, const float *shift,         \
                                      uint8_t *out, uint8_t *rest) {                             \
        uint8_t *split = DEPTH == SPLIT ? rest : NULL;                                           \
        if (strips == 4) {                                                                       \
            expand_step(DEPTH, w, unit, 4, count, scale, shift, out, split);                     \
        } else {                                                                                 \
            expand_step(DEPTH, w, unit, strips, count, scale, shift, out, split);                \
        }                                                                                        \
    }
EXPANDER(0)
EXPANDER(1)
EXPANDER(2)
EXPANDER(3)
EXPANDER(4)
EXPANDER(5)
EXPANDER(6)
EXPANDER(7)
EXPANDER(8)
static const expander EXPANDERS[9] = {expand_0, expand_1, expand_2, expand_3, expand_4,
                                      expand_5, expand_6, expand_7, expand_8};

INLINE void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = 16;
    }
    _tile_loadconfig(&shape);
}

/* 32 inputs times one or two strips, all steps of the batch. */
INLINE void multiply_block(const batch_state *b, int64_t m, int strip, const int is_pair) {
    enum { ROW = TILE * sizeof(float) };
    float *sums = b->sums + m * TILE + strip * STRIP;
    const size_t pitch = (size_t)b->pitch * 2;
    if (b->is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, ROW);
        _tile_loadd(1, sums + 16 * TILE, ROW);
        if (is_pair) {
            _tile_loadd(2, sums + STRIP, ROW);
            _tile_loadd(3, sums + 16 * TILE + STRIP, ROW);
        }
    }
    for (int s = 0; s < b->steps; s++) {
        const uint16_t *x = b->inputs[s] + m * b->pitch;
        const uint8_t *w = b->weights + (s * 4 + strip) * TILE_BYTES;
        _tile_loadd(4, x, pitch);
        _tile_loadd(5, x + 16 * b->pitch, pitch);
        _tile_loadd(6, w, VECTOR);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (is_pair) {
            _tile_loadd(7, w + TILE_BYTES, VECTOR);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + 16 * TILE, ROW);
    if (is_pair) {
        _tile_stored(2, sums + STRIP, ROW);
        _tile_stored(3, sums + 16 * TILE + STRIP, ROW);
    }
}

TARGET static void multiply_batch(batch_state *b) {
    if (!b->steps && !b->is_first) return;
    for (int64_t m = 0; m < b->padded; m += 32) {
        if (b->strips == 1) {
            multiply_block(b, m, 0, 0);
        } else {
            for (int strip = 0; strip < b->strips; strip += 2) multiply_block(b, m, strip, 1);
        }
    }
    b->steps = 0;
    b->is_first = 0;
}

/* Expand and multiply all runs of one tile. */
TARGET static void multiply_tile(const cvxq_wide *wide, const cvxq_matrix *w,
                                 const cvxq_cluster *cluster, const cvxq_tile *tile,
                                 int64_t groups, batch_state *b) {
    const uint8_t *unit = w->codes + tile->codes;
    const int per_unit = (int)unit_columns(tile->strips);
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        const int is_split = run->depth == SPLIT;
        for (int64_t i = 0; i < run->count; i += STEP) {
            const int count = (int)min_of(STEP, run->count - i);
            float scale[STEP] = {0}, shift[STEP] = {0};
            for (int j = 0; j < count; j++) {
                const int64_t at = groups + run->first + i + j;
                scale[j] = w->scales[w->scale_codes[at]];
                if (w->mean_codes) shift[j] = scale[j] * ((float)w->mean_codes[at] * w->mean_step);
            }
            uint8_t *out = b->weights + b->steps * 4 * TILE_BYTES;
            uint8_t *rest = is_split ? out + 4 * TILE_BYTES : NULL;
            EXPANDERS[run->depth](w, unit, tile->strips, count, scale, shift, out, rest);
            unit += ceil_div(count, per_unit) * VECTOR * run->depth;
            b->inputs[b->steps++] = wide->high + run->first + i;
            if (is_split) {
                b->inputs[b->steps++] = wide->high + run->first + i;
                memcpy(out + 8 * TILE_BYTES, out, 4 * TILE_BYTES);
                b->inputs[b->steps++] = wide->low + run->first + i;
            }
            if (b->steps + 3 > STEPS) multiply_batch(b);
        }
    }
    multiply_batch(b);
}

/* y of every input = sums + bias, each lane to its own output. */
TARGET static void store_tile(const cvxq_job *job, int64_t tile, const float *sums) {
    const cvxq_matrix *w = job->weight;
    for (int strip = 0; strip < w->tiles[tile].strips; strip++) {
        const __m512i target =
            _mm512_loadu_si512(w->targets + tile * TILE + strip * STRIP);
        const __mmask16 mask = _mm512_cmpge_epi32_mask(target, _mm512_setzero_si512());
        __m512 bias = _mm512_setzero_ps();
        if (w->bias) bias = _mm512_mask_i32gather_ps(bias, mask, target, w->bias, 4);
        for (int64_t m = 0; m < job->m; m++) {
            const __m512 sum = _mm512_loadu_ps(sums + m * TILE + strip * STRIP);
            _mm512_mask_i32scatter_ps(job->y + m * w->outputs, mask, target,
                                      _mm512_add_ps(sum, bias), 4);
        }
    }
}

TARGET void cvxq_wide_item(const cvxq_wide *wide, const cvxq_job *job, const cvxq_item *item,
                           void *scratch) {
    const cvxq_matrix *w = job->weight;
    batch_state b = {.weights = scratch,
                     .sums = (float *)((uint8_t *)scratch + STEPS * 4 * TILE_BYTES),
                     .pitch = wide->pitch,
                     .padded = cvxq_wide_rows(job->m)};
    configure();
    for (int64_t t = item->first_tile; t < item->first_tile + item->tiles; t++) {
        const cvxq_tile *tile = &w->tiles[t];
        b.strips = tile->strips;
        b.is_first = 1;
        multiply_tile(wide, w, &w->clusters[item->cluster], tile, item->cluster * w->inputs, &b);
        store_tile(job, t, b.sums);
    }
    _tile_release();
}

#else
int cvxq_wide_available(void) { return 0; }
int64_t cvxq_wide_pitch(int64_t inputs) { return inputs; }
int64_t cvxq_wide_rows(int64_t m) { return m; }
size_t cvxq_wide_scratch(int64_t m) { return (size_t)(0 * m); }
void cvxq_wide_round(const float *x, const int32_t *order, int64_t count, uint16_t *high,
                     uint16_t *low) {
    (void)x, (void)order, (void)count, (void)high, (void)low;
}
void cvxq_wide_item(const cvxq_wide *wide, const cvxq_job *job, const cvxq_item *item,
                    void *scratch) {
    (void)wide, (void)job, (void)item, (void)scratch;
}
#endif
