/* Products and rows of any kind of matrix, cut into items of work for the pool's threads.
 *
 * Every part starts with its own stretch of items, of equal cost, and then helps the others: memory
 * is read in long runs, and a thread that the system put aside holds nobody up. An item computes
 * its outputs alone, in one order of operations, so who does it changes nothing.
 */
#include <stdlib.h>

#include "internal.h"

enum { MOST_WEIGHTS = 8 };

typedef struct {
    _Alignas(64) atomic_llong next;
    int64_t end;
} stretch;

typedef struct {
    cvxq_pool *pool;
    cvxq_job jobs[MOST_WEIGHTS];
    const float *x;
    float *ordered[MOST_WEIGHTS]; /* (M, K) to fill, or NULL */
    cvxq_wide wide[MOST_WEIGHTS]; /* the same, for matrices that take many inputs at once */
    int count;
    int64_t m, inputs;
    stretch *stretches;
} product;

/* Results of the matrices that take many inputs, to their places; the parts share the rows. */
static void collect(product *p, int part, int parts) {
    for (int i = 0; i < p->count; i++) {
        const cvxq_job *job = &p->jobs[i];
        for (int64_t row = part; p->wide[i].high && row < p->m; row += parts)
            cvxq_wide_collect(&p->wide[i], job->weight, row, job->y + row * job->weight->outputs);
    }
}

/* Inputs in the order of each matrix; the parts share the columns, or the rows. */
static void put_in_order(product *p, int part, int parts) {
    const int64_t from = p->inputs * part / parts, to = p->inputs * (part + 1) / parts;
    for (int i = 0; i < p->count; i++) {
        const int32_t *order = p->jobs[i].weight->order;
        const cvxq_wide *wide = &p->wide[i];
        for (int64_t row = part; wide->high && row < wide->rows; row += parts)
            cvxq_wide_round(wide, order, p->inputs, row < p->m ? p->x + row * p->inputs : NULL,
                            row);
        for (int64_t m = 0; p->ordered[i] && m < p->m; m++) {
            const float *x = p->x + m * p->inputs;
            float *out = p->ordered[i] + m * p->inputs;
            for (int64_t k = from; k < to; k++) out[k] = x[order[k]];
        }
    }
}

static void do_item(const product *p, int64_t index, void *scratch) {
    const cvxq_job *job = p->jobs;
    while (index >= job->weight->item_count) index -= job++->weight->item_count;
    const cvxq_item *item = &job->weight->items[index];
    const cvxq_wide *wide = &p->wide[job - p->jobs];
    if (wide->high) {
        cvxq_wide_item(wide, job, item, scratch);
    } else if (job->weight->kind == KIND_PACKED) {
        cvxq_packed_item(job, item, scratch);
    } else if (job->weight->kind == KIND_DENSE) {
        cvxq_dense_item(job, item);
    } else {
        cvxq_transposed_item(job, item, scratch);
    }
}

static void multiply(void *context, int part, int parts) {
    product *p = context;
    int is_ordered = 0, is_wide = 0;
    for (int i = 0; i < p->count; i++) {
        is_wide |= p->wide[i].high != NULL;
        is_ordered |= is_wide || p->ordered[i];
    }
    if (is_ordered) {
        put_in_order(p, part, parts);
        cvxq_pool_barrier(p->pool);
    }
    void *scratch = cvxq_pool_scratch(p->pool, part, 0);
    for (int i = 0; i < parts; i++) {
        stretch *s = &p->stretches[(part + i) % parts];
        for (;;) {
            if (atomic_load_explicit(&s->next, memory_order_relaxed) >= s->end) break;
            const int64_t item = atomic_fetch_add_explicit(&s->next, 1, memory_order_relaxed);
            if (item >= s->end) break;
            do_item(p, item, scratch);
        }
    }
    if (is_wide) {
        cvxq_pool_barrier(p->pool);
        collect(p, part, parts);
    }
}

/* Number of items whose work begins before `cost`, all matrices in turn. */
static int64_t items_before(const product *p, int64_t cost) {
    int64_t before = 0;
    for (int i = 0; i < p->count; i++) {
        const cvxq_matrix *w = p->jobs[i].weight;
        if (cost < w->code_bytes) {
            int64_t low = 0, high = w->item_count;
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                if (w->items[middle].cost < cost) {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            return before + low;
        }
        cost -= w->code_bytes;
        before += w->item_count;
    }
    return before;
}

static void cut_work(product *p, int parts) {
    int64_t total = 0, last = 0;
    for (int i = 0; i < p->count; i++) total += p->jobs[i].weight->code_bytes;
    for (int part = 0; part < parts; part++) {
        /* In steps that cannot overflow; the last stretch takes all that is left. */
        const int64_t end = part + 1 < parts ? items_before(p, total / parts * (part + 1))
                                             : INT64_MAX;
        atomic_store(&p->stretches[part].next, last);
        last = p->stretches[part].end = max_of(end, last);
    }
    int64_t items = 0;
    for (int i = 0; i < p->count; i++) items += p->jobs[i].weight->item_count;
    for (int part = 0; part < parts; part++)
        p->stretches[part].end = min_of(p->stretches[part].end, items);
}

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static int is_wide(const cvxq_matrix *w, int64_t m, int exact) {
    return m > NATIVE && !exact && w->kind == KIND_PACKED && !w->cluster_orders &&
           cvxq_wide_available();
}

static size_t scratch_of(const cvxq_matrix *w, int64_t m, int exact) {
    if (is_wide(w, m, exact)) return cvxq_wide_scratch(m);
    if (w->kind == KIND_PACKED) return cvxq_packed_scratch(w, exact);
    return w->kind == KIND_TRANSPOSED ? cvxq_transposed_scratch(w) : 64;
}

/* Bytes that the inputs in the order of `w`, and results in that of its tiles, take. */
static size_t ordered_bytes(const cvxq_matrix *w, int64_t m, int exact) {
    if (is_wide(w, m, exact)) return cvxq_wide_lay_out(w, m, NULL, NULL);
    return w->order ? aligned((size_t)(m * w->inputs) * sizeof(float)) : 0;
}

/* One product of at most MOST_WEIGHTS matrices with at most CHUNK inputs. */
static void multiply_some(cvxq_pool *pool, const cvxq_matrix *const *weights, int count,
                          const float *x, int64_t m, float *const *y, int exact) {
    const int parts = cvxq_pool_threads(pool);
    product p = {.pool = pool, .x = x, .count = count, .m = m, .inputs = weights[0]->inputs};
    size_t scratch = 0, shared_bytes = sizeof(stretch) * (size_t)parts;
    for (int i = 0; i < count; i++) {
        const size_t own = scratch_of(weights[i], m, exact);
        if (own > scratch) scratch = own;
        shared_bytes += ordered_bytes(weights[i], m, exact);
    }
    for (int part = 0; part < parts; part++) cvxq_pool_scratch(pool, part, scratch);
    char *shared = cvxq_pool_scratch(pool, -1, shared_bytes);
    p.stretches = (stretch *)shared;
    shared += sizeof(stretch) * (size_t)parts;
    for (int i = 0; i < count; i++) {
        const size_t bytes = ordered_bytes(weights[i], m, exact);
        p.jobs[i] = (cvxq_job){weights[i], x, y[i], m, exact};
        if (is_wide(weights[i], m, exact)) {
            cvxq_wide_lay_out(weights[i], m, shared, &p.wide[i]);
        } else if (bytes) {
            p.ordered[i] = (float *)shared;
            p.jobs[i].x = p.ordered[i];
        }
        shared += bytes;
    }
    cut_work(&p, parts);
    cvxq_pool_run(pool, multiply, &p);
}

void cvxq_matmul(cvxq_pool *pool, const cvxq_matrix *const *weights, int count, const float *x,
                 int64_t m, float *const *y, int exact) {
    for (int first = 0; first < count; first += MOST_WEIGHTS) {
        const int some = (int)min_of(MOST_WEIGHTS, count - first);
        for (int64_t at = 0; at < m; at += CHUNK) {
            float *part[MOST_WEIGHTS];
            for (int i = 0; i < some; i++)
                part[i] = y[first + i] + at * weights[first + i]->outputs;
            multiply_some(pool, weights + first, some, x + at * weights[0]->inputs,
                          min_of(CHUNK, m - at), part, exact);
        }
    }
}

typedef struct {
    const cvxq_matrix *matrix;
    const int64_t *ids;
    int64_t count;
    float *out;
} rows_job;

static void expand_rows(void *context, int part, int parts) {
    const rows_job *job = context;
    const cvxq_matrix *w = job->matrix;
    for (int64_t i = part; i < job->count; i += parts) {
        float *out = job->out + i * w->inputs;
        if (w->kind == KIND_PACKED) {
            cvxq_packed_row(w, job->ids[i], out);
        } else if (w->kind == KIND_DENSE) {
            cvxq_dense_row(w, job->ids[i], out);
        } else {
            cvxq_transposed_row(w, job->ids[i], out);
        }
    }
}

void cvxq_rows(cvxq_pool *pool, const cvxq_matrix *matrix, const int64_t *ids, int64_t count,
               float *out) {
    rows_job job = {matrix, ids, count, out};
    if (count == 1) { /* one token: not worth waking anyone */
        expand_rows(&job, 0, 1);
    } else {
        cvxq_pool_run(pool, expand_rows, &job);
    }
}
