/* Matrices stored as Wᵀ: clusters run along the inputs, so a group belongs to one output.
 *
 * y_n = Σ over clusters c of S_cn · (Σ_k x_k · level(q_kn) + t_cn · Σ_k x_k), k in the cluster.
 * Rare enough (checkpoints that keep (inputs, outputs)) to be served from the file's own bit planes
 * in float32, without a layout of its own.  An item is a stretch of outputs, and a group becomes
 * weights once for all rows of x.
 */
#include <string.h>

#include "internal.h"

#define LANES 8 /* sums beside each other, which compilers turn into vectors */

size_t cvxq_transposed_scratch(const cvxq_matrix *w) {
    return (size_t)w->group_size * (sizeof(float) + 1) + 8;
}

static float dot(const float *a, const float *b, int64_t count) {
    float lanes[LANES] = {0}, sum = 0;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += a[k + lane] * b[k + lane];
    for (; k < count; k++) sum += a[k] * b[k];
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

void cvxq_transposed_item(const cvxq_job *job, const cvxq_item *item, float *results,
                          void *scratch) {
    const cvxq_matrix *w = job->weight;
    const int64_t end = item->first_tile + item->tiles;
    float *values = scratch; /* of one group */
    uint8_t *codes = (uint8_t *)(values + w->group_size);
    for (int64_t m = 0; m < job->m; m++)
        for (int64_t n = item->first_tile; n < end; n++)
            results[m * item->tiles + n - item->first_tile] = w->bias ? w->bias[n] : 0;
    for (int64_t c = 0; c < w->cluster_count; c++) {
        const int64_t first = c * w->group_size;
        const int64_t height = min_of(w->group_size, w->inputs - first);
        const int64_t plane = (height + 7) / 8;
        const uint8_t *planes = w->codes + w->chunk_starts[c * w->item_count + (item - w->items)];
        for (int64_t n = item->first_tile; n < end; n++) {
            const int64_t group = c * w->outputs + n;
            const int depth = w->depths[group];
            const float *levels = w->tables->level + (1 << depth);
            const float scale = w->scales[w->scale_codes[group]];
            const float mean = w->mean_codes ? (float)w->mean_codes[group] * w->mean_step : 0;
            cvxq_spread(planes, depth, plane, 0, plane, codes);
            planes += depth * plane;
            for (int64_t k = 0; k < height; k++) values[k] = scale * (levels[codes[k]] + mean);
            for (int64_t m = 0; m < job->m; m++)
                results[m * item->tiles + n - item->first_tile] += dot(
                    job->x + m * w->inputs + first, values, height);
        }
    }
}

void cvxq_transposed_row(const cvxq_matrix *w, int64_t row, float *out) {
    const cvxq_item *item = w->items;
    while (item->first_tile + item->tiles <= row) item++;
    for (int64_t c = 0; c < w->cluster_count; c++) {
        const int64_t first = c * w->group_size;
        const int64_t height = min_of(w->group_size, w->inputs - first);
        const int64_t plane = (height + 7) / 8, group = c * w->outputs + row;
        const uint8_t *planes = w->codes + w->chunk_starts[c * w->item_count + (item - w->items)];
        for (int64_t n = item->first_tile; n < row; n++)
            planes += w->depths[c * w->outputs + n] * plane;
        const int depth = w->depths[group];
        const float *levels = w->tables->level + (1 << depth);
        const float scale = w->scales[w->scale_codes[group]];
        for (int64_t k = 0; k < height; k++) {
            int code = 0;
            for (int b = 0; b < depth; b++) code |= (planes[b * plane + k / 8] >> (k % 8) & 1) << b;
            float value = levels[code];
            if (w->mean_codes) value += (float)w->mean_codes[group] * w->mean_step;
            out[w->order ? w->order[first + k] : first + k] = scale * value;
        }
    }
}
