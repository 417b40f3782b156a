/* Steps of a layer between its products: queries and keys prepared, and attention. */
#include <string.h>

#include "decoder_state.h"

#define SERIAL_PRODUCTS 60000 /* fewer multiplications stay on one thread */

/* Take the results for queries, keys and values apart, and normalize over all heads at once. */
static void part_row(const void *context, int64_t row, int thread) {
    cvxq_decoder *decoder = decoder_of(context);
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = layer_of(decoder);
    const int64_t wide = (int64_t)s->heads * s->head_dim,
                  narrow = (int64_t)s->kv_heads * s->head_dim;
    float *query = decoder->query + row * wide, *key = decoder->key + row * narrow;
    (void)thread;
    if (layer->k == NULL) {
        const float *from = decoder->together + row * (wide + 2 * narrow);
        memcpy(query, from, (size_t)wide * sizeof *from);
        memcpy(key, from + wide, (size_t)narrow * sizeof *from);
        memcpy(decoder->value + row * narrow, from + wide + narrow, (size_t)narrow * sizeof *from);
    }
    if (!layer->wide_norms) return;
    if (layer->q_norm.kind != CVXQ_NO_NORM)
        decoder->math->normalize(&layer->q_norm, query, (int)wide, query);
    if (layer->k_norm.kind != CVXQ_NO_NORM)
        decoder->math->normalize(&layer->k_norm, key, (int)narrow, key);
}

static void prepare_head(cvxq_decoder *decoder, const cvxq_norm *norm, float *x, int row) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = layer_of(decoder);
    if (norm->kind != CVXQ_NO_NORM && !layer->wide_norms)
        decoder->math->normalize(norm, x, s->head_dim, x);
    if (layer->rope < 0) return;
    const int pairs = s->rope[layer->rope].pairs;
    int64_t at = (int64_t)row * pairs;
    for (int i = 0; i < layer->rope; i++) at += (int64_t)decoder->count * s->rope[i].pairs;
    if (pairs) decoder->math->rotate(x, decoder->cosine + at, decoder->sine + at, pairs);
}

/* Norms and rotation of one key and its queries; keys (width, 64), values (64, width) to the
 * cache. */
static void prepare_group(cvxq_decoder *decoder, int row, int head) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = layer_of(decoder);
    const int width = s->head_dim, group = s->heads / s->kv_heads;
    const int64_t position = decoder->start + row;
    const int64_t block = position / CVXQ_BLOCK, place = position % CVXQ_BLOCK;
    const int64_t at = ((int64_t)row * s->kv_heads + head) * width;
    const int64_t index = ((int64_t)decoder->layer * s->kv_heads + head) * decoder->blocks + block;
    float *key = decoder->key + at;
    float *keys = (float *)decoder->keys[index], *values = (float *)decoder->values[index];
    for (int member = 0; member < group; member++) {
        float *query = decoder->query + at * group + member * width;
        prepare_head(decoder, &layer->q_norm, query, row);
        decoder->math->scale(query, layer->scale, width);
    }
    prepare_head(decoder, &layer->k_norm, key, row);
    for (int i = 0; i < width; i++) keys[i * CVXQ_BLOCK + place] = key[i];
    memcpy(values + place * padded(width), decoder->value + at, (size_t)width * sizeof(float));
}

static void prepare_row(const void *context, int64_t row, int thread) {
    cvxq_decoder *decoder = decoder_of(context);
    (void)thread;
    if (layer_of(decoder)->k == NULL || layer_of(decoder)->wide_norms) part_row(context, row, 0);
    for (int head = 0; head < decoder->shape.kv_heads; head++)
        prepare_group(decoder, (int)row, head);
}

void cvxq_decoder_prepare(cvxq_decoder *decoder, cvxq_work *work) {
    cvxq_decoder_share(decoder, work, prepare_row, decoder->count);
}

/* Attention of a call, for threads that may be late: nothing here changes. */
typedef struct {
    const cvxq_decoder *decoder;
    const cvxq_layer *layer;
    const float *const *keys, *const *values; /* of the layer */
    int64_t start;
    int count, step; /* rows; those of a key head that are computed together */
} attention_job;

/* Number of steps in which the rows of one key head are taken. */
static int attention_steps(const attention_job *job) {
    const cvxq_decoder_shape *s = &job->decoder->shape;
    return (job->count * (s->heads / s->kv_heads) + job->step - 1) / job->step;
}

/* The rows of a chunk: places of their queries, later of their results. Returns their number. */
static int attention_rows(const attention_job *job, int64_t chunk, float **places,
                          int64_t *positions) {
    const cvxq_decoder *decoder = job->decoder;
    const cvxq_decoder_shape *s = &decoder->shape;
    const int group = s->heads / s->kv_heads, all = job->count * group;
    const int head = (int)(chunk % s->kv_heads), begin = (int)(chunk / s->kv_heads) * job->step;
    const int rows = all - begin < job->step ? all - begin : job->step;
    for (int r = 0; r < rows; r++) {
        const int row = (begin + r) / group, member = (begin + r) % group;
        positions[r] = job->start + row;
        places[r] = decoder->query +
                    ((int64_t)row * s->heads + head * group + member) * s->head_dim;
    }
    return rows;
}

static void attend_rows(const void *context, int64_t chunk, int thread) {
    const attention_job *job = context;
    const cvxq_decoder *decoder = job->decoder;
    const int width = decoder->shape.head_dim, head = (int)(chunk % decoder->shape.kv_heads);
    const int64_t window = job->layer->window, index = (int64_t)head * decoder->blocks;
    float *tile = decoder->parts + thread * decoder->part_floats;
    const int group = decoder->shape.heads / decoder->shape.kv_heads;
    const int begin = (int)(chunk / decoder->shape.kv_heads) * job->step;
    float *out[ROWS], sinks[ROWS];
    int64_t first[ROWS], last[ROWS];
    const int rows = attention_rows(job, chunk, out, last);
    for (int r = 0; r < rows; r++) {
        memcpy(tile + r * width, out[r], (size_t)width * sizeof *tile);
        out[r] = tile + r * width; /* read before it is written */
        first[r] = window > 0 && last[r] >= window ? last[r] - window + 1 : 0;
        if (job->layer->sinks != NULL)
            sinks[r] = job->layer->sinks[head * group + (begin + r) % group];
    }
    decoder->math->attend(tile, rows, width, job->keys + index, job->values + index, first, last,
                          job->layer->cap, job->layer->sinks != NULL ? sinks : NULL, out,
                          tile + span(ROWS, width));
}

/* The results replace the queries. */
static void commit_rows(const void *context, int64_t chunk, int thread) {
    const attention_job *job = context;
    const int width = job->decoder->shape.head_dim;
    const float *tile = job->decoder->parts + thread * job->decoder->part_floats;
    float *out[ROWS];
    int64_t positions[ROWS];
    const int rows = attention_rows(job, chunk, out, positions);
    for (int r = 0; r < rows; r++) memcpy(out[r], tile + r * width, (size_t)width * sizeof *tile);
}

void cvxq_decoder_attend(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t seen = decoder->start + decoder->count;
    const int alone = seen * decoder->count * s->heads * s->head_dim * 2 < SERIAL_PRODUCTS;
    const int parts = alone ? 1 : decoder->threads, all = decoder->count * s->heads;
    const int64_t index = (int64_t)decoder->layer * s->kv_heads * decoder->blocks;
    attention_job job = {decoder, layer_of(decoder), decoder->keys + index, decoder->values + index,
                         decoder->start, decoder->count,
                         /* few enough that every thread has some */
                         (int)min_of((all + parts - 1) / parts, ROWS)};
    const int64_t chunks = (int64_t)s->kv_heads * attention_steps(&job);
    cvxq_decoder_start_clock(decoder, &decoder->attended);
    if (!alone) {
        cvxq_work_fill(work, attend_rows, commit_rows, chunks, &job, sizeof job);
        return;
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        attend_rows(&job, chunk, 0);
        commit_rows(&job, chunk, 0);
    }
}
