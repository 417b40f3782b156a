/* Products with, and rows of, a packed matrix. */
#include <string.h>

#include "internal.h"

/* Scratch of one thread: the inputs of a batch as a cluster wants them, and a tile's sums. */
typedef struct {
    cvxq_input inputs[BATCH];
    float *sums;     /* (BATCH, 64) */
    float *gathered; /* (K,) for clusters with an order of their own */
} workspace;

/* Lay out the scratch at `memory` (NULL only to measure it); returns its bytes. */
static size_t lay_out(const cvxq_matrix *w, int exact, char *memory, workspace *space) {
    const size_t blocks = (size_t)w->most_blocks;
    size_t used = 0;
#define TAKE(field, size)                            \
    do {                                             \
        if (memory) field = (void *)(memory + used); \
        used += aligned(size);                       \
    } while (0)
    TAKE(space->sums, sizeof(float) * BATCH * TILE);
    TAKE(space->gathered, sizeof(float) * (size_t)w->inputs);
    for (int m = 0; m < BATCH; m++) {
        cvxq_input *input = &space->inputs[m];
        *input = (cvxq_input){0};
        if (exact) {
            TAKE(input->exact, sizeof(float) * BLOCK * blocks);
            continue;
        }
        TAKE(input->high, BLOCK * blocks);
        TAKE(input->low, BLOCK * blocks);
        TAKE(input->whole, sizeof(int16_t) * BLOCK * blocks);
        TAKE(input->scale, sizeof(float) * blocks);
        TAKE(input->start, sizeof(int32_t) * blocks);
        TAKE(input->start2, sizeof(int32_t) * blocks);
    }
#undef TAKE
    return used;
}

size_t cvxq_packed_scratch(const cvxq_matrix *w, int exact) {
    workspace space;
    return lay_out(w, exact, NULL, &space);
}

/* Values of one tile's lanes from sums of products, whatever stands in lanes without an output. */
static void finish(const cvxq_job *job, int64_t tile, const float *sums, float mean, float *out) {
    const cvxq_matrix *w = job->weight;
    const int lanes = w->tiles[tile].strips * STRIP;
    for (int lane = 0; lane < lanes; lane++) out[lane] = sums[lane] + mean;
    if (w->lane_scales)
        for (int lane = 0; lane < lanes; lane++) out[lane] *= w->lane_scales[tile * TILE + lane];
    if (w->lane_bias)
        for (int lane = 0; lane < lanes; lane++) out[lane] += w->lane_bias[tile * TILE + lane];
}

/* sums[row] += level · input for one unit, in float32. */
static void exact_unit(const cvxq_matrix *w, int depth, const uint8_t *unit, int strips,
                       const float *x, float *sums) {
    uint8_t codes[UNIT][VECTOR];
    const float *levels = w->tables->level + (1 << depth);
    cvxq_unpack_unit(depth, unit, codes);
    for (int v = 0; v < UNIT; v++) {
        float *strip = sums + v % strips * STRIP;
        const float *quad = x + v / strips * 4;
        for (int i = 0; i < STRIP; i++)
            for (int j = 0; j < 4; j++) strip[i] += levels[codes[v][4 * i + j]] * quad[j];
    }
}

static void exact_tile(const cvxq_matrix *w, const cvxq_cluster *cluster, const cvxq_tile *tile,
                       const cvxq_input *inputs, int batch, float *sums) {
    const int64_t per_unit = unit_columns(tile->strips);
    memset(sums, 0, sizeof(float) * TILE * (size_t)batch);
    for (int b = 0; b < batch; b++) {
        const uint8_t *unit = w->codes + tile->codes;
        int64_t block = 0;
        for (int32_t r = 0; r < cluster->runs; r++) {
            const cvxq_run *run = &w->runs[cluster->first_run + r];
            if (!run->depth) continue;
            for (int64_t at = 0; at < run->count; at += per_unit, unit += VECTOR * run->depth)
                exact_unit(w, run->depth, unit, tile->strips, inputs[b].exact + block * BLOCK + at,
                           sums + b * TILE);
            block += ceil_div(run->count, BLOCK);
        }
    }
}

/* Fetch what is read when an item's sums are there. */
static void fetch_finish(const cvxq_matrix *w, const cvxq_item *item) {
    const int64_t first = item->first_tile * TILE, end = first + item->tiles * TILE;
    for (int64_t lane = first; lane < end; lane += 16) {
        __builtin_prefetch(w->targets + lane);
        if (w->lane_scales) __builtin_prefetch(w->lane_scales + lane);
        if (w->lane_bias) __builtin_prefetch(w->lane_bias + lane);
    }
}

void cvxq_packed_item(const cvxq_job *job, const cvxq_item *item, float *results, void *scratch) {
    const cvxq_matrix *w = job->weight;
    const cvxq_ops *ops = cvxq_ops_in_use();
    const cvxq_cluster *cluster = &w->clusters[item->cluster];
    const int64_t groups = item->cluster * w->inputs;
    const int64_t pitch = item->tiles * TILE;
    const uint8_t *soon = w->codes + w->tiles[item->first_tile].codes;
    workspace space;
    lay_out(w, job->exact, scratch, &space);
    fetch_finish(w, item);
    int batch;
    for (int64_t m = 0; m < job->m; m += batch) {
        batch = job->m - m >= 4 ? 4 : job->m - m >= 2 ? 2 : 1;
        for (int b = 0; b < batch; b++) {
            const float *x = job->x + (m + b) * w->inputs;
            if (cluster->order) {
                for (int64_t k = 0; k < w->inputs; k++) space.gathered[k] = x[cluster->order[k]];
                x = space.gathered;
            }
            if (job->exact) {
                cvxq_prepare_portable(w, cluster, groups, x, soon, &space.inputs[b]);
            } else {
                ops->prepare(w, cluster, groups, x, soon, &space.inputs[b]);
            }
        }
        for (int64_t t = item->first_tile; t < item->first_tile + item->tiles; t++) {
            if (job->exact) {
                exact_tile(w, cluster, &w->tiles[t], space.inputs, batch, space.sums);
            } else {
                ops->tile(w, cluster, &w->tiles[t], space.inputs, batch, space.sums);
            }
            for (int b = 0; b < batch; b++)
                finish(job, t, space.sums + b * TILE, space.inputs[b].mean,
                       results + (m + b) * pitch + (t - item->first_tile) * TILE);
        }
    }
}

void cvxq_packed_commit(const cvxq_job *job, const cvxq_item *item, const float *results) {
    const cvxq_matrix *w = job->weight;
    const int64_t first = item->first_tile;
    for (int64_t m = 0; m < job->m; m++) {
        float *y = job->y + m * w->outputs;
        for (int64_t t = first; t < first + item->tiles; t++, results += TILE) {
            const int32_t *targets = w->targets + t * TILE;
            for (int lane = 0; lane < w->tiles[t].strips * STRIP; lane++)
                if (targets[lane] >= 0) y[targets[lane]] = results[lane];
        }
    }
}

void cvxq_packed_row(const cvxq_matrix *w, int64_t row, float *out) {
    const int64_t index = w->places[row] / TILE;
    const int strip = w->places[row] % TILE / STRIP, lane = w->places[row] % STRIP;
    const int64_t number = w->tile_cluster[index], groups = number * w->inputs;
    const cvxq_tile *tile = &w->tiles[index];
    const cvxq_cluster *cluster = &w->clusters[number];
    const int32_t *order = cluster->order ? cluster->order : w->order;
    const int per_unit = (int)unit_columns(tile->strips);
    const uint8_t *units = w->codes + tile->codes;
    const float scale = w->row_scales ? w->row_scales[row] : 1;
    memset(out, 0, sizeof(float) * (size_t)w->inputs);
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        const float *levels = w->tables->level + (1 << run->depth);
        for (int32_t i = 0; i < run->count; i++) {
            const int64_t at = run->first + i;
            float value = 0;
            if (run->depth) {
                const uint8_t *unit = units + i / per_unit * VECTOR * run->depth;
                const int vector = i % per_unit / 4 * tile->strips + strip;
                value = levels[cvxq_unit_code(run->depth, unit, vector, 4 * lane + i % 4)];
            }
            if (w->mean_codes) value += (float)w->mean_codes[groups + at] * w->mean_step;
            out[order ? order[at] : at] = w->scales[w->scale_codes[groups + at]] * value * scale;
        }
        units += ceil_div(run->count, per_unit) * VECTOR * run->depth;
    }
}
