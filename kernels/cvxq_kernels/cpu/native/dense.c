/* Matrices that a file keeps raw: 16- or 32-bit weights, row after row. */
#include <string.h>

#include "internal.h"

static size_t width_of(int dtype) { return dtype == CVXQ_F32 ? 4 : 2; }

void cvxq_dense_item(const cvxq_job *job, const cvxq_item *item, float *results) {
    const cvxq_matrix *w = job->weight;
    const cvxq_ops *ops = job->exact ? &cvxq_ops_scalar : cvxq_ops_in_use();
    const size_t pitch = (size_t)w->inputs * width_of(w->dtype);
    float sums[BATCH];
    int batch;
    for (int64_t m = 0; m < job->m; m += batch) { /* which the first cache holds for all rows */
        batch = job->m - m >= 4 ? 4 : job->m - m >= 2 ? 2 : 1;
        for (int64_t n = item->first_tile; n < item->first_tile + item->tiles; n++) {
            ops->dense(w->codes + (size_t)n * pitch, w->dtype, w->inputs, job->x + m * w->inputs,
                       w->inputs, batch, sums);
            for (int b = 0; b < batch; b++)
                results[(m + b) * item->tiles + n - item->first_tile] = sums[b] +
                                                                        (w->bias ? w->bias[n] : 0);
        }
    }
}

void cvxq_dense_row(const cvxq_matrix *w, int64_t row, float *out) {
    const uint8_t *from = w->codes + (size_t)(row * w->inputs) * width_of(w->dtype);
    for (int64_t k = 0; k < w->inputs; k++) out[k] = cvxq_widen(from, w->dtype, k);
}
