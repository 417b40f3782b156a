/* What the files of this library share: the packed layout and the table of one instruction set.
 *
 * Layout.  Columns of a cluster are visited in an order in which depths never fall, so that each
 * depth is one run.  Rows of a cluster are cut into tiles of 4, 2 or 1 strips; a strip is 16 rows,
 * one 32-bit lane each.  A code vector is 64 bytes: 16 rows × 4 consecutive columns (a quad), which
 * is what 8-bit dot products take.  Eight code vectors form a unit, stored in exactly 64·B bytes at
 * depth B (pack_unit in unit.c).  With S strips a unit spans 8/S quads, vector q·S + s holding
 * quad q of strip s.  A run is padded to whole units; its inputs there are zero.
 *
 * Arithmetic.  Inputs, times the group's scale, are rounded per block of 64 columns: to 8 bits for
 * depths 1–4, to 16 bits in two planes (256·high + low) for depths 5–8.  Levels are rounded alike,
 * stored with 128 added to the (high) byte because dot products want one unsigned side; `start`
 * takes that out again.  AVX2 rounds otherwise (cvxq_nibble_tables): levels to 0 … 127 for depths
 * 1–3 and 0 … 181 for depth 4, inputs so that sums of their products fit 16 bits; levels to 9 bits
 * for depth 5 and 14 for depths 6–8, inputs to 14 bits.  Sums inside a block are exact
 * integers, so any number of threads, and every instruction set with the same rounding, gives the
 * same result up to the order of a few float32 operations.
 */
#ifndef CVXQ_INTERNAL_H
#define CVXQ_INTERNAL_H

#include <stdatomic.h>
#include <string.h>

#include "cvxq.h"
#include "pool.h"

enum {
    STRIP = 16,        /* rows of a strip */
    VECTOR = 64,       /* bytes of a code vector, codes in it */
    UNIT = 8,          /* code vectors of a unit */
    BLOCK = 64,        /* columns that share one rounding of the input */
    TILE = 64,         /* most rows of a tile */
    BATCH = 4,         /* inputs that one pass over a tile serves */
    NARROW = 4,        /* deepest depth whose levels and inputs have 8 bits */
    MOST_WHOLE = 8191, /* largest of 14-bit levels and inputs: 32 products fit 31 bits */
    MOST_JOINED = 127, /* largest level in a sum of four products in 16 bits, at depths 1–3 */
    MOST_PAIRED = 181, /* the same for two, at depth 4; inputs are rounded accordingly */
    GROUP_PAD = 64,    /* bytes that may be read behind scale and mean codes */
    NATIVE = 16,       /* largest M for which inputs are rounded per cluster, given a choice */
    CHUNK = 256,       /* inputs that are in work at a time */
    ITEM_TILES = 4,    /* most tiles of one item of work */
    AHEAD_BLOCK = 512, /* bytes fetched ahead per block of inputs that is rounded */
};

/* Columns that a unit spans, for tiles of `strips` strips. */
static inline int64_t unit_columns(int strips) { return 4 * UNIT / strips; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Rounded up to whole cache lines. */
static inline size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Row of a tile that lane `lane` of strip `strip` holds: four rows in turn go to each strip, which
 * is the order that interleaving bytes of columns gives. */
static inline int lane_row(int strips, int strip, int lane) {
    return 4 * (lane / 4 * strips + strip) + lane % 4;
}

typedef struct {
    int32_t depth;        /* 0 only where the matrix has means */
    int32_t first, count; /* columns, as places in the cluster's order */
} cvxq_run;

typedef struct {
    int64_t codes;  /* first byte of its units */
    int32_t strips; /* 4, 2 or 1 */
} cvxq_tile;

typedef struct {
    const int32_t *order; /* its own order of columns, or NULL for the matrix's */
    int32_t first_run, runs;
    int32_t blocks; /* over all runs of depth 1–8 */
} cvxq_cluster;

typedef struct {
    int32_t cluster, first_tile, tiles;
} cvxq_item;

/* Level tables for look-ups by four bits and sums of 16-bit products. Depths 1–4: whole numbers from 0
 * up, of which `zero` stands for zero; [depth − 1][p] answers for code p of the nibble, whatever its
 * other bits are (depth 3: for the low three bits, and for the high three). Depths 5–8: the bytes of
 * whole numbers n, one at depth 5 and else two, for the levels −(n + ½) steps of a table's lower
 * half, of which the upper half is the mirror image at all depths from 5 to `symmetric`. */
typedef struct {
    _Alignas(64) uint8_t narrow[4][4][16];
    uint8_t high[4][128], low[4][128]; /* [depth − 5][code] */
    float zero[9], unit[9];            /* unit: value of one step, negative for depths 5–8 */
    int32_t symmetric;
} cvxq_nibble_tables;

/* Rounded level tables, as every instruction set wants them. A table with a shift in its name
 * answers for the code that starts at that bit of the index, whatever the other bits are. */
typedef struct {
    _Alignas(64) uint8_t narrow1[6][64]; /* [shift] */
    uint8_t narrow2[3][64];              /* [shift / 2] */
    uint8_t narrow3[2][64];              /* [shift / 3] */
    uint8_t narrow4[64];
    uint8_t high[4][256], low[4][256]; /* [depth − 5][code], periodic */
    float unit[9];                     /* value of one step of the rounded levels */
    float level[512];                  /* unrounded: depth B's table at [2^B, 2^(B+1)) */
    cvxq_nibble_tables nibble;
} cvxq_tables;

/* An input row as one cluster wants it. */
typedef struct {
    int8_t *high;    /* (blocks, 64) */
    int8_t *low;     /* (blocks, 64), written for depths 5–8 */
    int16_t *whole;  /* (blocks, 64), what AVX2 writes for depths 5–8 in place of both */
    float *scale;    /* (blocks,) value of one step of the integer sum */
    int32_t *start;  /* (blocks,) what the sum with `high` starts from */
    int32_t *start2; /* (blocks,) what the sum of second order starts from */
    float *exact;    /* (blocks, 64) input times scale, in the exact mode only */
    float mean;      /* what the groups' means add to every row */
} cvxq_input;

/* Element k of a dense row, as float32. */
static inline float cvxq_widen(const void *row, int dtype, int64_t k) {
    uint32_t bits;
    float value;
    if (dtype == CVXQ_F32) return ((const float *)row)[k];
    const uint16_t half = ((const uint16_t *)row)[k];
    if (dtype == CVXQ_BF16) {
        bits = (uint32_t)half << 16;
    } else {
        /* Put exponent and mantissa where float32 has them; the product mends the exponent's bias,
         * subnormals included. Infinity and NaN keep all exponent bits. */
        bits = (uint32_t)(half & 0x7fff) << 13;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        memcpy(&bits, &value, 4);
        if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
        bits |= (uint32_t)(half & 0x8000) << 16;
    }
    memcpy(&value, &bits, 4);
    return value;
}

typedef enum { KIND_PACKED, KIND_DENSE, KIND_TRANSPOSED } cvxq_kind;

struct cvxq_matrix {
    cvxq_kind kind;
    int64_t outputs, inputs, bytes;
    float *bias;       /* (N,), or NULL */
    float *row_scales; /* (N,), or NULL; only of packed ones */
    float *lane_scales, *lane_bias; /* (tiles, 64): the same, lane by lane */
    cvxq_item *items;
    int64_t item_count;
    uint8_t *codes; /* units, or dense weights, or bit planes */
    int64_t code_bytes;
    int file; /* that holds the codes, −1: memory does */
    /* packed and transposed */
    cvxq_tables *tables;
    float scales[256];
    int few_scales;  /* no scale code above 63 */
    int has_octaves; /* scales double every eight codes, from `octave` on; that of code 0 is 0 */
    float octave[8];
    float mean_step; /* 0 without means */
    uint8_t *scale_codes;
    int8_t *mean_codes;
    int32_t *order; /* (K,), or NULL for the natural one; transposed: row at each position */
    /* packed */
    cvxq_cluster *clusters;
    cvxq_run *runs;
    cvxq_tile *tiles;
    int32_t *targets;        /* (tiles, 64): output of each lane, −1 for none */
    int32_t *places;         /* (N,): tile · 64 + lane of each output */
    int32_t *tile_cluster;   /* (tiles,) */
    int32_t *cluster_orders; /* what `order` of clusters points into, or NULL */
    int64_t cluster_count, tile_count, most_blocks;
    int32_t deepest; /* of all runs */
    /* dense */
    int dtype;
    /* transposed */
    int64_t group_size;
    uint8_t *depths;       /* (clusters, N) */
    int64_t *chunk_starts; /* (clusters, items): first byte of the item's columns */
};

/* The units of a run in a tile of four strips that is a whole cluster. The planes (8 bytes each) of
 * its `count` columns begin at codes + starts[0], codes + starts[1], … */
typedef void (*cvxq_repack_run)(int depth, const uint8_t *codes, const int64_t *starts,
                                int64_t count, uint8_t *out);

/* One instruction set. */
typedef struct {
    const char *name;
    /* Round input `x`, already in the cluster's order, for one cluster. Meanwhile memory would idle:
     * `soon` are the codes that come next, to be fetched AHEAD_BLOCK bytes per block. */
    void (*prepare)(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                    const float *x, const uint8_t *soon, cvxq_input *out);
    /* sums (batch, 64) float32 = products of one tile's rows with 1, 2 or 4 inputs. */
    void (*tile)(const cvxq_matrix *w, const cvxq_cluster *cluster, const cvxq_tile *tile,
                 const cvxq_input *inputs, int batch, float *sums);
    /* sums (batch,) = one dense row of K weights times 1, 2 or 4 inputs that lie `stride` apart. */
    void (*dense)(const void *row, int dtype, int64_t inputs, const float *x, int64_t stride,
                  int batch, float *sums);
    cvxq_repack_run repack_run; /* or NULL: as on any processor */
} cvxq_ops;

extern const cvxq_ops cvxq_ops_scalar;
#if defined(__x86_64__)
extern const cvxq_ops cvxq_ops_avx2, cvxq_ops_avx512;
#elif defined(__aarch64__)
extern const cvxq_ops cvxq_ops_neon;
#endif
const cvxq_ops *cvxq_ops_in_use(void);
/* isa.c: whether memory is read best some lines of several pages at a time (see tile.h). */
int cvxq_fetches_by_page(void);

/* arena.c: large read-only memory on huge pages where the system has them. `_in`: in a file, −1
 * for none; the file only grows, and must not be used for another purpose. */
void *cvxq_arena_new(size_t bytes);
void cvxq_arena_free(void *memory, size_t bytes);
size_t cvxq_arena_taken(size_t bytes); /* what so many take: prefetches may reach past their end */
void *cvxq_arena_new_in(size_t bytes, int file);
void cvxq_arena_free_in(void *memory, size_t bytes, int file);

/* unit.c: eight code vectors to 64·depth bytes and back, and one code of them. */
void cvxq_pack_unit(int depth, const uint8_t codes[UNIT][VECTOR], uint8_t *out);
void cvxq_unpack_unit(int depth, const uint8_t *unit, uint8_t codes[UNIT][VECTOR]);
int cvxq_unit_code(int depth, const uint8_t *unit, int vector, int byte);

/* prepare.c: `prepare` for any processor (with out->exact set it only scales), and the end of a
 * block for the others: `most` is the largest magnitude, NaN if an input was not finite. */
void cvxq_prepare_portable(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                           const float *x, const uint8_t *soon, cvxq_input *out);

static inline void cvxq_finish_block(cvxq_input *out, int64_t block, int depth, float unit,
                                     float most, int32_t sum, int32_t low_sum) {
    out->start[block] = -128 * sum;
    if (depth <= NARROW) {
        out->scale[block] = most * (1 / 127.0f) * unit;
    } else {
        /* Levels are 256 · (high − 128) + low, low being 127.5 on average: that average times the
         * low inputs is all that is kept of the product of both low parts. */
        out->start2[block] = -128 * low_sum + low_sum / 2;
        out->scale[block] = most * (1 / 32639.0f) * unit * 256.0f;
    }
}

/* tables.c */
void cvxq_tables_fill(cvxq_tables *tables, const float *levels);

/* spread.c: codes of rows [8·first_byte, 8·(first_byte + bytes)) of one group, a byte each. */
void cvxq_spread(const uint8_t *planes, int depth, int64_t plane_bytes, int64_t first_byte,
                 int64_t bytes, uint8_t *codes);

/* The kinds of matrices: what one item of work adds to the result, (M, rows of the item), in
 * memory of the thread's own. */
typedef struct {
    const cvxq_matrix *weight;
    const float *x; /* (M, K), in the matrix's order if it has one */
    float *y; /* (M, N) */
    int64_t m;
    int exact;
} cvxq_job;
void cvxq_packed_item(const cvxq_job *job, const cvxq_item *item, float *results, void *scratch);
void cvxq_packed_commit(const cvxq_job *job, const cvxq_item *item, const float *results);
size_t cvxq_packed_scratch(const cvxq_matrix *w, int exact);
void cvxq_packed_row(const cvxq_matrix *w, int64_t row, float *out);
void cvxq_dense_item(const cvxq_job *job, const cvxq_item *item, float *results);
void cvxq_dense_row(const cvxq_matrix *w, int64_t row, float *out);
void cvxq_transposed_item(const cvxq_job *job, const cvxq_item *item, float *results,
                          void *scratch);
size_t cvxq_transposed_scratch(const cvxq_matrix *w);
void cvxq_transposed_row(const cvxq_matrix *w, int64_t row, float *out);

/* wide_bf16.c, wide_fma.c: many inputs at once, for packed matrices with one order of columns. Inputs
 * are first laid out for the kernel; then chunks of work, an item of the matrix and some inputs
 * each, give results in the order of tiles, which are put in that of outputs at the end, row by row:
 * written to their places at once, every one would touch a cache line of its own that threads
 * share. */
typedef struct {
    void *inputs; /* as the kernel wants them */
    float *results; /* (M, pitch): 64 for every tile */
    int32_t m;
    int32_t panels; /* of inputs, of about the same size */
    int32_t pieces; /* of panels, each a chunk of work for every item */
    int32_t rows; /* of the sums of a tile in a chunk: at least the inputs of a piece */
    int32_t fills; /* steps in which the inputs are laid out */
    size_t input_bytes, scratch_bytes;
} cvxq_wide;

/* First input of a panel, first panel of a piece. */
static inline int64_t cvxq_wide_input(const cvxq_wide *wide, int64_t panel) {
    return wide->m * panel / wide->panels;
}
static inline int64_t cvxq_wide_panel(const cvxq_wide *wide, int64_t piece) {
    return wide->panels * piece / wide->pieces;
}
/* Floats from one row of results to the next: an odd number of cache lines, because rows a multiple
 * of 4 kB apart would share a few sets. */
static inline int64_t cvxq_wide_pitch(const cvxq_matrix *w) { return w->tile_count * TILE + STRIP; }
/* Pieces that M inputs are cut into where there are few items for so many threads: eight chunks are
 * wanted for each. Weights are expanded anew in every piece, which has 48 inputs or more. */
static inline int64_t cvxq_wide_pieces(int64_t m, const cvxq_matrix *w, int threads) {
    const int64_t wanted = threads > 1 ? ceil_div(8 * threads, w->item_count) : 1;
    return max_of(1, min_of(wanted, m / 48));
}
static inline size_t cvxq_wide_sums_bytes(const cvxq_wide *wide) {
    return (size_t)ITEM_TILES * (size_t)(wide->rows * TILE) * sizeof(float);
}

typedef struct {
    int (*is_available)(int exact);
    /* Fill in what follows from M, which is set, except for memory. */
    void (*plan)(cvxq_wide *wide, const cvxq_matrix *w, int threads);
    /* Lay out inputs x (M, K): step 0 ≤ step < fills. */
    void (*fill)(const cvxq_wide *wide, const cvxq_matrix *w, const float *x, int64_t step);
    /* sums (tiles of the item, rows, 64) of the inputs of one piece, where the scratch begins. */
    void (*item)(const cvxq_wide *wide, const cvxq_matrix *w, const cvxq_item *item, int64_t piece,
                 void *scratch);
    /* y (N,) = the results of row `row`, and the bias. */
    void (*collect)(const cvxq_wide *wide, const cvxq_matrix *w, int64_t row, float *y);
} cvxq_wide_ops;
#if defined(__x86_64__)
#define CVXQ_HAS_FMA
#define CVXQ_HAS_BF16
extern const cvxq_wide_ops cvxq_wide_fma, cvxq_wide_bf16;
#endif

/* matmul.c: a product of a few matrices with at most CHUNK inputs, as some jobs of a program. */
enum { MOST_FACTORS = 8 };
typedef struct {
    cvxq_job job;
    const float *from; /* (M, K): its input */
    float *ordered; /* (M, K) to fill, or NULL */
    const cvxq_wide_ops *many; /* for many inputs at once, or NULL */
    cvxq_wide wide;
} cvxq_factor;
typedef struct {
    cvxq_pool *pool;
    int64_t m, inputs;
    int32_t count;
    enum { PRODUCT_ORDERS, PRODUCT_COMPUTES, PRODUCT_COLLECTS, PRODUCT_DONE } stage;
    cvxq_factor factors[MOST_FACTORS];
} cvxq_product;
_Static_assert(sizeof(cvxq_product) <= CVXQ_CONTEXT_BYTES, "a job's context must hold a product");
/* is_passing: x may be gone when the pool has not settled yet, and is copied. */
void cvxq_product_begin(cvxq_product *p, cvxq_pool *pool, const cvxq_matrix *const *weights,
                        int count, const float *x, int64_t m, float *const *y, int exact,
                        int is_passing);
/* Let matrix `index` of a product that was just begun have an input of its own; not is_passing. */
void cvxq_product_read(cvxq_product *p, int index, const float *x);
/* Fill `work` with the next job; 0 when the product is done. */
int cvxq_product_next(cvxq_product *p, cvxq_work *work);

/* Let `work` be what cvxq_rows does. */
void cvxq_rows_fill(cvxq_work *work, const cvxq_matrix *matrix, const int64_t *ids, int64_t count,
                    float *out);

#endif
