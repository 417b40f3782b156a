/* Products and rows of any kind of matrix, cut into chunks for the pool's threads.
 *
 * Every thread starts with its own stretch of chunks, so that memory is read in long runs, and then
 * helps the others. A chunk computes its outputs alone, in one order of operations, so who does it
 * changes nothing.
 */
#include <stdlib.h>

#include "internal.h"

enum { PIECE = 32 }; /* inputs of a chunk: more would only make the last chunks longer */

/* Results of a chunk. */
static size_t results_bytes(int64_t m) {
    return aligned(sizeof(float) * (size_t)(min_of(m, PIECE) * ITEM_TILES * TILE));
}

/* Chunks that an item is cut into, each for some of the inputs. */
static int64_t pieces_of(const cvxq_factor *factor, int64_t m) {
    return factor->many ? factor->wide.pieces : ceil_div(m, PIECE);
}

/* What one chunk is about. */
typedef struct {
    const cvxq_factor *factor;
    const cvxq_item *item;
    int64_t piece;
    cvxq_job job; /* of the piece's inputs only, of matrices that take few inputs */
} chunk_job;

static chunk_job job_of(const cvxq_product *p, int64_t chunk) {
    const cvxq_factor *factor = p->factors;
    int64_t pieces, count;
    while (pieces = pieces_of(factor, p->m), count = factor->job.weight->item_count * pieces,
           chunk >= count) {
        chunk -= count;
        factor++;
    }
    const cvxq_matrix *w = factor->job.weight;
    chunk_job found = {factor, &w->items[chunk / pieces], chunk % pieces, factor->job};
    if (!factor->many) {
        const int64_t first = found.piece * PIECE;
        found.job.x += first * w->inputs;
        found.job.y += first * w->outputs;
        found.job.m = min_of(PIECE, p->m - first);
    }
    return found;
}

static void compute_chunk(const void *context, int64_t chunk, int thread) {
    const cvxq_product *p = context;
    const chunk_job c = job_of(p, chunk);
    float *results = cvxq_pool_scratch(p->pool, thread, 0);
    void *scratch = (char *)results + results_bytes(p->m);
    if (c.factor->many) {
        c.factor->many->item(&c.factor->wide, c.job.weight, c.item, c.piece, results);
    } else if (c.job.weight->kind == KIND_PACKED) {
        cvxq_packed_item(&c.job, c.item, results, scratch);
    } else if (c.job.weight->kind == KIND_DENSE) {
        cvxq_dense_item(&c.job, c.item, results);
    } else {
        cvxq_transposed_item(&c.job, c.item, results, scratch);
    }
}

/* Sums of many inputs to the shared results. */
static void commit_many(const cvxq_wide *wide, const chunk_job *c, const float *sums) {
    const cvxq_matrix *w = c->job.weight;
    const int64_t first = cvxq_wide_input(wide, cvxq_wide_panel(wide, c->piece));
    const int64_t end = cvxq_wide_input(wide, cvxq_wide_panel(wide, c->piece + 1));
    for (int64_t i = 0; i < c->item->tiles; i++, sums += wide->rows * TILE) {
        const int64_t tile = c->item->first_tile + i;
        const size_t bytes = (size_t)w->tiles[tile].strips * STRIP * sizeof(float);
        for (int64_t m = first; m < end; m++)
            memcpy(wide->results + m * cvxq_wide_pitch(w) + tile * TILE, sums + (m - first) * TILE,
                   bytes);
    }
}

static void commit_chunk(const void *context, int64_t chunk, int thread) {
    const cvxq_product *p = context;
    const chunk_job c = job_of(p, chunk);
    const float *results = cvxq_pool_scratch(p->pool, thread, 0);
    if (c.factor->many) {
        commit_many(&c.factor->wide, &c, results);
    } else if (c.job.weight->kind == KIND_PACKED) {
        cvxq_packed_commit(&c.job, c.item, results);
    } else {
        float *y = c.job.y + c.item->first_tile;
        for (int64_t m = 0; m < c.job.m; m++)
            memcpy(y + m * c.job.weight->outputs, results + m * c.item->tiles,
                   sizeof(float) * (size_t)c.item->tiles);
    }
}

/* Steps in which a matrix's inputs are put in order. */
static int64_t orders_of(const cvxq_factor *factor, int64_t m) {
    return factor->many ? factor->wide.fills : factor->ordered ? m : 0;
}

/* One step for each matrix: for those that take few inputs, one row. */
static void put_in_order(const void *context, int64_t step, int thread) {
    const cvxq_product *p = context;
    (void)thread;
    for (const cvxq_factor *factor = p->factors; factor < p->factors + p->count; factor++) {
        const cvxq_matrix *w = factor->job.weight;
        if (step >= orders_of(factor, p->m)) continue;
        if (factor->many) {
            factor->many->fill(&factor->wide, w, factor->from, step);
            continue;
        }
        const float *x = factor->from + step * p->inputs;
        float *out = factor->ordered + step * p->inputs;
        if (w->order)
            for (int64_t k = 0; k < p->inputs; k++) out[k] = x[w->order[k]];
        else
            memcpy(out, x, sizeof(float) * (size_t)p->inputs);
    }
}

/* One row of results of the matrices that take many inputs, to their places. */
static void collect(const void *context, int64_t row, int thread) {
    const cvxq_product *p = context;
    (void)thread;
    for (const cvxq_factor *factor = p->factors; factor < p->factors + p->count; factor++) {
        const cvxq_matrix *w = factor->job.weight;
        if (factor->many)
            factor->many->collect(&factor->wide, w, row, factor->job.y + row * w->outputs);
    }
}

/* The kernel for many inputs that is best for a product, NULL for that of few. */
static const cvxq_wide_ops *ops_for(const cvxq_matrix *w, int64_t m, int exact) {
    (void)m, (void)exact; /* where there are none */
    if (w->kind != KIND_PACKED || w->cluster_orders) return NULL;
#if defined(CVXQ_HAS_BF16)
    if (m > NATIVE && cvxq_wide_bf16.is_available(exact)) return &cvxq_wide_bf16;
#endif
#if defined(CVXQ_HAS_FMA)
    if ((m > BATCH || exact) && cvxq_wide_fma.is_available(exact)) return &cvxq_wide_fma;
#endif
    return NULL;
}

static size_t scratch_of(const cvxq_factor *factor, int exact) {
    const cvxq_matrix *w = factor->job.weight;
    if (factor->many) return factor->wide.scratch_bytes;
    if (w->kind == KIND_PACKED) return cvxq_packed_scratch(w, exact);
    return w->kind == KIND_TRANSPOSED ? cvxq_transposed_scratch(w) : 0;
}

/* Bytes of a matrix's inputs in its order, and of its results in that of its tiles. */
static size_t input_bytes(const cvxq_factor *factor, int64_t m, int is_passing) {
    const cvxq_matrix *w = factor->job.weight;
    if (factor->many) return aligned(factor->wide.input_bytes);
    return w->order || is_passing ? aligned(sizeof(float) * (size_t)(m * w->inputs)) : 0;
}
static size_t wide_results_bytes(const cvxq_factor *factor, int64_t m) {
    if (!factor->many) return 0;
    return aligned(sizeof(float) * (size_t)(m * cvxq_wide_pitch(factor->job.weight)));
}

void cvxq_product_begin(cvxq_product *p, cvxq_pool *pool, const cvxq_matrix *const *weights,
                        int count, const float *x, int64_t m, float *const *y, int exact,
                        int is_passing) {
    const int threads = cvxq_pool_threads(pool);
    size_t scratch = 0, shared_bytes = 0;
    p->pool = pool;
    p->count = count;
    p->m = m;
    p->inputs = weights[0]->inputs;
    p->stage = PRODUCT_ORDERS;
    for (int i = 0; i < count; i++) {
        cvxq_factor *factor = &p->factors[i];
        *factor = (cvxq_factor){.job = {weights[i], x, y[i], m, exact},
                                .from = x,
                                .many = ops_for(weights[i], m, exact),
                                .wide = {.m = (int32_t)m}};
        if (factor->many) factor->many->plan(&factor->wide, weights[i], threads);
        scratch = (size_t)max_of((int64_t)scratch, (int64_t)scratch_of(factor, exact));
        shared_bytes += input_bytes(factor, m, is_passing) + wide_results_bytes(factor, m);
    }
    for (int thread = 0; thread < threads; thread++)
        cvxq_pool_scratch(pool, thread, results_bytes(m) + scratch);
    char *shared = cvxq_pool_scratch(pool, -1, shared_bytes);
    for (int i = 0; i < count; i++) {
        cvxq_factor *factor = &p->factors[i];
        const size_t bytes = input_bytes(factor, m, is_passing);
        if (factor->many) {
            factor->wide.inputs = shared;
            factor->wide.results = (float *)(shared + bytes);
        } else if (bytes) {
            factor->job.x = factor->ordered = (float *)shared;
        }
        shared += bytes + wide_results_bytes(factor, m);
    }
}

void cvxq_product_read(cvxq_product *p, int index, const float *x) {
    cvxq_factor *factor = &p->factors[index];
    factor->from = x;
    if (!factor->ordered && !factor->many) factor->job.x = x;
}

int cvxq_product_next(cvxq_product *p, cvxq_work *work) {
    const size_t bytes = offsetof(cvxq_product, factors) + (size_t)p->count * sizeof *p->factors;
    int64_t orders = 0, chunks = 0;
    int any_many = 0;
    for (int i = 0; i < p->count; i++) {
        const cvxq_factor *factor = &p->factors[i];
        any_many |= factor->many != NULL;
        orders = max_of(orders, orders_of(factor, p->m));
        chunks += factor->job.weight->item_count * pieces_of(factor, p->m);
    }
    switch (p->stage) {
    case PRODUCT_ORDERS:
        p->stage = PRODUCT_COMPUTES;
        if (orders > 1) {
            cvxq_work_fill(work, put_in_order, NULL, orders, p, bytes);
            return 1;
        }
        if (orders) put_in_order(p, 0, 0);
        /* fall through */
    case PRODUCT_COMPUTES:
        p->stage = any_many ? PRODUCT_COLLECTS : PRODUCT_DONE;
        cvxq_work_fill(work, compute_chunk, commit_chunk, chunks, p, bytes);
        return 1;
    case PRODUCT_COLLECTS:
        p->stage = PRODUCT_DONE;
        cvxq_work_fill(work, collect, NULL, p->m, p, bytes);
        return 1;
    default: return 0;
    }
}

/* Any number of matrices and inputs, some at a time. */
typedef struct {
    cvxq_product product;
    cvxq_pool *pool;
    const cvxq_matrix *const *weights;
    const float *x;
    float *const *y;
    int64_t m, at;
    int count, first, exact;
} matmul_program;

static int next_product(void *context, cvxq_work *work) {
    matmul_program *p = context;
    while (!cvxq_product_next(&p->product, work)) {
        if (p->at >= p->m) {
            p->at = 0;
            p->first += MOST_FACTORS;
        }
        if (p->first >= p->count) return 0;
        const cvxq_matrix *const *weights = p->weights + p->first;
        const int some = (int)min_of(MOST_FACTORS, p->count - p->first);
        float *y[MOST_FACTORS];
        for (int i = 0; i < some; i++) y[i] = p->y[p->first + i] + p->at * weights[i]->outputs;
        cvxq_product_begin(&p->product, p->pool, weights, some, p->x + p->at * weights[0]->inputs,
                           min_of(CHUNK, p->m - p->at), y, p->exact, 1);
        p->at += CHUNK;
    }
    return 1;
}

void cvxq_matmul(cvxq_pool *pool, const cvxq_matrix *const *weights, int count, const float *x,
                 int64_t m, float *const *y, int exact) {
    matmul_program program = {.product = {.stage = PRODUCT_DONE},
                              .pool = pool,
                              .weights = weights,
                              .x = x,
                              .y = y,
                              .m = m,
                              .count = count,
                              .exact = exact};
    if (m) cvxq_pool_run(pool, next_product, &program);
}

typedef struct {
    const cvxq_matrix *matrix;
    const int64_t *ids;
    float *out;
} rows_job;

static void expand_row(const void *context, int64_t i, int thread) {
    const rows_job *job = context;
    const cvxq_matrix *w = job->matrix;
    float *out = job->out + i * w->inputs;
    (void)thread;
    if (w->kind == KIND_PACKED) {
        cvxq_packed_row(w, job->ids[i], out);
    } else if (w->kind == KIND_DENSE) {
        cvxq_dense_row(w, job->ids[i], out);
    } else {
        cvxq_transposed_row(w, job->ids[i], out);
    }
}

void cvxq_rows_fill(cvxq_work *work, const cvxq_matrix *matrix, const int64_t *ids, int64_t count,
                    float *out) {
    const rows_job job = {matrix, ids, out};
    cvxq_work_fill(work, expand_row, NULL, count, &job, sizeof job);
}

void cvxq_rows(cvxq_pool *pool, const cvxq_matrix *matrix, const int64_t *ids, int64_t count,
               float *out) {
    const rows_job job = {matrix, ids, out};
    if (count == 1) { /* one token: not worth waking anyone */
        expand_row(&job, 0, 0);
        return;
    }
    cvxq_pool_each(pool, expand_row, &job, count);
}
