/* Steps of a layer between its products: queries and keys prepared, and attention. */
#include <stddef.h>
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
    const cvxq_span *span = span_of(decoder, row);
    const cvxq_decoder *text = span->piece.decoder;
    const int width = s->head_dim, group = s->heads / s->kv_heads;
    const int64_t position = position_of(span, row);
    const int64_t block = position / CVXQ_BLOCK, place = position % CVXQ_BLOCK;
    const int64_t at = ((int64_t)row * s->kv_heads + head) * width;
    const int64_t index = ((int64_t)decoder->layer * s->kv_heads + head) * text->blocks + block;
    float *key = decoder->key + at;
    float *keys = (float *)text->keys[index], *values = (float *)text->values[index];
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
    int layer, step; /* rows of a key head that are computed together, of one piece */
    cvxq_span spans[CVXQ_TEXTS]; /* as many as the call has, the last to be copied */
} attention_job;

/* Some rows of one key head: of a piece, `count` of its queries from `begin` on. */
typedef struct {
    const cvxq_span *span;
    int head, begin, count;
} attention_part;

/* Number of chunks in which the rows of a piece are taken. */
static int64_t attention_chunks(const attention_job *job, const cvxq_span *span) {
    const cvxq_decoder_shape *s = &job->decoder->shape;
    return s->kv_heads * ceil_div(span->piece.count * (s->heads / s->kv_heads), job->step);
}

static attention_part part_of(const attention_job *job, int64_t chunk) {
    const cvxq_decoder_shape *s = &job->decoder->shape;
    const cvxq_span *span = job->spans;
    for (int64_t own; chunk >= (own = attention_chunks(job, span)); span++) chunk -= own;
    const int begin = (int)(chunk / s->kv_heads) * job->step;
    const int all = span->piece.count * (s->heads / s->kv_heads);
    return (attention_part){span, (int)(chunk % s->kv_heads), begin,
                            (int)min_of(all - begin, job->step)};
}

/* Places of the queries, later of their results. */
static void find_rows(const attention_job *job, const attention_part *part, float **places,
                      int64_t *positions) {
    const cvxq_decoder *decoder = job->decoder;
    const cvxq_decoder_shape *s = &decoder->shape;
    const int group = s->heads / s->kv_heads;
    for (int r = 0; r < part->count; r++) {
        const int64_t row = part->span->first + (part->begin + r) / group;
        const int member = (part->begin + r) % group;
        positions[r] = position_of(part->span, row);
        places[r] = decoder->query + (row * s->heads + part->head * group + member) * s->head_dim;
    }
}

static void attend_rows(const void *context, int64_t chunk, int thread) {
    const attention_job *job = context;
    const cvxq_decoder *decoder = job->decoder;
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = decoder->layers + job->layer;
    const attention_part part = part_of(job, chunk);
    const cvxq_decoder *text = part.span->piece.decoder;
    const int width = s->head_dim, group = s->heads / s->kv_heads;
    const int64_t window = layer->window;
    const int64_t index = ((int64_t)job->layer * s->kv_heads + part.head) * text->blocks;
    float *tile = decoder->parts + thread * decoder->part_floats;
    float *out[ROWS], sinks[ROWS];
    int64_t first[ROWS], last[ROWS];
    find_rows(job, &part, out, last);
    for (int r = 0; r < part.count; r++) {
        memcpy(tile + r * width, out[r], (size_t)width * sizeof *tile);
        out[r] = tile + r * width; /* read before it is written */
        first[r] = window > 0 && last[r] >= window ? last[r] - window + 1 : 0;
        if (layer->sinks != NULL)
            sinks[r] = layer->sinks[part.head * group + (part.begin + r) % group];
    }
    decoder->math->attend(tile, part.count, width, text->keys + index, text->values + index, first,
                          last, layer->cap, layer->sinks != NULL ? sinks : NULL, out,
                          tile + span(ROWS, width));
}

/* The results replace the queries. */
static void commit_rows(const void *context, int64_t chunk, int thread) {
    const attention_job *job = context;
    const int width = job->decoder->shape.head_dim;
    const float *tile = job->decoder->parts + thread * job->decoder->part_floats;
    float *out[ROWS];
    int64_t positions[ROWS];
    const attention_part part = part_of(job, chunk);
    find_rows(job, &part, out, positions);
    for (int r = 0; r < part.count; r++)
        memcpy(out[r], tile + r * width, (size_t)width * sizeof *tile);
}

void cvxq_decoder_attend(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const size_t spans = (size_t)decoder->span_count * sizeof *decoder->spans;
    int64_t scores = 0, chunks = 0;
    for (const cvxq_span *at = decoder->spans; at < decoder->spans + decoder->span_count; at++)
        scores += (at->piece.start + at->piece.count) * at->piece.count * s->heads;
    const int alone = scores * s->head_dim * 2 < SERIAL_PRODUCTS;
    const int parts = alone ? 1 : decoder->threads, all = decoder->count * s->heads;
    attention_job job = {.decoder = decoder,
                         .layer = decoder->layer,
                         /* few enough that every thread has some */
                         .step = (int)min_of((all + parts - 1) / parts, ROWS)};
    memcpy(job.spans, decoder->spans, spans);
    for (int i = 0; i < decoder->span_count; i++) chunks += attention_chunks(&job, job.spans + i);
    cvxq_decoder_start_clock(decoder, &decoder->attended);
    if (!alone) {
        cvxq_work_fill(work, attend_rows, commit_rows, chunks, &job,
                       offsetof(attention_job, spans) + spans);
        return;
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        attend_rows(&job, chunk, 0);
        commit_rows(&job, chunk, 0);
    }
}
