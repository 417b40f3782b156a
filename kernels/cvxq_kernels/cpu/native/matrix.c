/* Making and freeing matrices: what is decided before any code is moved. See repack.c. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "repack.h"

enum { DENSE_ROWS = 64, TRANSPOSED_OUTPUTS = ITEM_TILES * TILE };

static void *copy_of(const void *from, size_t bytes) {
    void *made = malloc(bytes ? bytes : 1);
    if (made && bytes) memcpy(made, from, bytes);
    return made;
}

/* A matrix with what all kinds have; NULL without memory. */
static cvxq_matrix *new_matrix(cvxq_kind kind, int64_t outputs, int64_t inputs, const float *bias) {
    cvxq_matrix *w = calloc(1, sizeof *w);
    if (!w) return NULL;
    w->kind = kind;
    w->outputs = outputs;
    w->inputs = inputs;
    w->file = -1;
    if (bias && !(w->bias = copy_of(bias, sizeof(float) * (size_t)outputs))) {
        free(w);
        return NULL;
    }
    w->bytes = (int64_t)sizeof *w + (bias ? 4 * outputs : 0);
    return w;
}

/* Whether scales can be made from the lowest eight, as the bits of octave[code % 8] and code / 8 in
 * the exponent. */
static void find_octaves(cvxq_matrix *w) {
    int last = 255;
    while (last && w->scales[last] == 0) last--;
    memcpy(w->octave, w->scales, sizeof w->octave);
    if (last >= 8) w->octave[0] = w->scales[8] / 2;
    w->has_octaves = w->scales[0] == 0;
    for (int code = 1; code <= last; code++) {
        const float lowest = w->octave[code % 8];
        w->has_octaves &= lowest >= FLT_MIN && w->scales[code] == ldexpf(lowest, code / 8);
    }
}

/* Tables and side information in the stored order, which all companded matrices copy. */
static int copy_side(cvxq_matrix *w, const cvxq_companded *source) {
    w->tables = NULL;
    if (posix_memalign((void **)&w->tables, 64, sizeof *w->tables)) return 0;
    cvxq_tables_fill(w->tables, source->levels);
    memcpy(w->scales, source->scales, sizeof w->scales);
    if (source->row_scales) {
        w->row_scales = copy_of(source->row_scales, sizeof(float) * (size_t)w->outputs);
        if (!w->row_scales) return 0;
        w->bytes += 4 * w->outputs;
    }
    w->few_scales = 1;
    for (int i = 64; i < 256; i++) w->few_scales &= source->scales[i] == 0;
    find_octaves(w);
    w->mean_step = source->means ? source->means[129] : 0;
    w->bytes += (int64_t)sizeof *w->tables;
    return 1;
}

/* Cut [0, count) into items of `step`. */
static int even_items(cvxq_matrix *w, int64_t count, int64_t step) {
    w->item_count = ceil_div(count, step);
    w->items = calloc((size_t)w->item_count, sizeof *w->items);
    if (!w->items) return 0;
    for (int64_t i = 0; i < w->item_count; i++)
        w->items[i] = (cvxq_item){.first_tile = (int32_t)(i * step),
                                  .tiles = (int32_t)min_of(step, count - i * step)};
    w->bytes += w->item_count * (int64_t)sizeof *w->items;
    return 1;
}

static int copy_transposed(cvxq_matrix *w, const cvxq_companded *source) {
    const int64_t clusters = ceil_div(source->rows, source->group_size);
    const int64_t groups = clusters * source->columns;
    w->group_size = source->group_size;
    w->cluster_count = clusters;
    w->code_bytes = source->code_bytes;
    w->depths = copy_of(source->depths, (size_t)groups);
    w->scale_codes = copy_of(source->scale_codes, (size_t)groups);
    if (source->mean_codes) w->mean_codes = copy_of(source->mean_codes, (size_t)groups);
    if (source->permutation) w->order = calloc((size_t)source->rows, sizeof *w->order);
    w->codes = cvxq_arena_new_in((size_t)source->code_bytes, w->file);
    if (!w->depths || !w->scale_codes || (source->mean_codes && !w->mean_codes) ||
        (source->permutation && !w->order) || !w->codes ||
        !even_items(w, source->columns, TRANSPOSED_OUTPUTS))
        return 0;
    memcpy(w->codes, source->codes, (size_t)source->code_bytes);
    for (int64_t k = 0; source->permutation && k < source->rows; k++)
        w->order[k] = (int32_t)source->permutation[k];
    w->chunk_starts = calloc((size_t)(clusters * w->item_count), sizeof *w->chunk_starts);
    if (!w->chunk_starts) return 0;
    int64_t at = 0;
    for (int64_t c = 0; c < clusters; c++) {
        const int64_t height = min_of(source->group_size, source->rows - c * source->group_size);
        for (int64_t n = 0; n < source->columns; n++) {
            if (n % TRANSPOSED_OUTPUTS == 0)
                w->chunk_starts[c * w->item_count + n / TRANSPOSED_OUTPUTS] = at;
            at += source->depths[c * source->columns + n] * ((height + 7) / 8);
        }
    }
    w->bytes += source->code_bytes + groups * (2 + !!source->mean_codes) +
                clusters * w->item_count * 8 + (source->permutation ? 4 * source->rows : 0);
    return at == source->code_bytes;
}

/* Free what no product has seen yet. */
static void discard(cvxq_matrix *w) {
    if (w->codes) cvxq_arena_free_in(w->codes, (size_t)w->code_bytes, w->file);
    free(w->bias);
    free(w->row_scales);
    free(w->lane_scales);
    free(w->lane_bias);
    free(w->items);
    free(w->tables);
    free(w->scale_codes);
    free(w->mean_codes);
    free(w->order);
    free(w->clusters);
    free(w->runs);
    free(w->tiles);
    free(w->targets);
    free(w->places);
    free(w->tile_cluster);
    free(w->cluster_orders);
    free(w->depths);
    free(w->chunk_starts);
    free(w);
}

cvxq_matrix *cvxq_matrix_pack(cvxq_pool *pool, const cvxq_companded *source) {
    const int64_t outputs = source->transposed ? source->columns : source->rows;
    const int64_t inputs = source->transposed ? source->rows : source->columns;
    cvxq_kind kind = source->transposed ? KIND_TRANSPOSED : KIND_PACKED;
    if (source->rows > INT32_MAX - TILE || source->columns > INT32_MAX - TILE) return NULL;
    if (source->transposed && source->row_scales) return NULL;
    cvxq_matrix *w = new_matrix(kind, outputs, inputs, source->bias);
    if (!w) return NULL;
    w->file = source->file;
    if (copy_side(w, source) &&
        (source->transposed ? copy_transposed(w, source) : cvxq_repack(pool, w, source))) {
        if (source->pages) madvise(source->pages, (size_t)source->page_bytes, MADV_DONTNEED);
        return w;
    }
    discard(w);
    return NULL;
}

typedef struct {
    const cvxq_companded *sources;
    cvxq_matrix **made;
} packing_job;

static void pack_alone(const void *context, int64_t i, int thread) {
    const packing_job *job = context;
    (void)thread;
    cvxq_pool *alone = cvxq_pool_new(1);
    job->made[i] = alone ? cvxq_matrix_pack(alone, &job->sources[i]) : NULL;
    if (alone) cvxq_pool_free(alone);
}

void cvxq_matrices_pack(cvxq_pool *pool, const cvxq_companded *sources, int64_t count,
                        cvxq_matrix **made) {
    const packing_job job = {sources, made};
    cvxq_pool_each(pool, pack_alone, &job, count);
}

cvxq_matrix *cvxq_matrix_dense(cvxq_pool *pool, const void *weights, int dtype, int64_t outputs,
                               int64_t inputs, const float *bias) {
    (void)pool;
    cvxq_matrix *w = new_matrix(KIND_DENSE, outputs, inputs, bias);
    if (!w) return NULL;
    const int64_t pitch = inputs * (dtype == CVXQ_F32 ? 4 : 2);
    w->dtype = dtype;
    w->code_bytes = outputs * pitch;
    w->codes = cvxq_arena_new((size_t)w->code_bytes);
    if (!w->codes || !even_items(w, outputs, DENSE_ROWS)) {
        discard(w);
        return NULL;
    }
    memcpy(w->codes, weights, (size_t)w->code_bytes);
    w->bytes += w->code_bytes;
    return w;
}

void cvxq_matrix_free(cvxq_matrix *w) {
    if (!w) return;
    cvxq_pools_settle(); /* a late thread may still read it */
    discard(w);
}

int64_t cvxq_matrix_outputs(const cvxq_matrix *w) { return w->outputs; }
int64_t cvxq_matrix_inputs(const cvxq_matrix *w) { return w->inputs; }
int64_t cvxq_matrix_bytes(const cvxq_matrix *w) { return w->bytes; }
