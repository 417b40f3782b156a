/* The forward pass; see decoder.h. Decoding one token runs everything between the matrix products
 * on the calling thread, unless attention is long: waking threads would cost more. */
#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <math.h>
#include <string.h>
#include <time.h>

#include "decoder_state.h"

#define SERIAL_ELEMENTS 4096   /* below this many, activations stay on one thread */
#define SERIAL_PRODUCTS 60000  /* likewise for the multiplications of attention */

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void run(cvxq_decoder *decoder, void (*task)(void *, int, int), int alone) {
    if (alone || decoder->threads == 1)
        task(decoder, 0, 1);
    else
        cvxq_pool_run(decoder->pool, task, decoder);
}

static void multiply(cvxq_decoder *decoder, const cvxq_matrix *const *weights, int count,
                     const float *x, int rows, float *const *y) {
    const int64_t begin = now();
    cvxq_matmul(decoder->pool, weights, count, x, rows, y, decoder->exact);
    decoder->products += now() - begin;
}

static void normalize(const cvxq_decoder *decoder, const cvxq_norm *norm, const float *x,
                      float *out) {
    const int n = decoder->shape.hidden;
    if (norm->kind != CVXQ_NO_NORM)
        decoder->math->normalize(norm, x, n, out);
    else if (x != out)
        memcpy(out, x, (size_t)n * sizeof *x);
}

/* A range of `count` rows for this part. */
static int first_of(int count, int part, int parts) { return (int)((int64_t)count * part / parts); }

/* Add the branch to the stream and prepare the input of the next one. */
static void settle_rows(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const int hidden = decoder->shape.hidden, end = first_of(decoder->count, part + 1, parts);
    for (int row = first_of(decoder->count, part, parts); row < end; row++) {
        float *branch = decoder->branch + (int64_t)row * hidden;
        float *stream = decoder->stream + (int64_t)row * hidden;
        if (decoder->norms[0] != NULL) {
            normalize(decoder, decoder->norms[0], branch, branch);
            decoder->math->add(stream, branch, decoder->shape.residual_scale, hidden);
            normalize(decoder, decoder->norms[1], stream, stream);
        }
        if (decoder->norms[2] != NULL)
            normalize(decoder, decoder->norms[2], stream, decoder->input + (int64_t)row * hidden);
        if (decoder->norms[3] != NULL)
            normalize(decoder, decoder->norms[3], stream, decoder->beside + (int64_t)row * hidden);
    }
}

/* out NULL: there is no branch yet. in, beside NULL: nothing reads this input. */
static void settle(cvxq_decoder *decoder, const cvxq_norm *out, const cvxq_norm *sum,
                   const cvxq_norm *in, const cvxq_norm *beside) {
    decoder->norms[0] = out;
    decoder->norms[1] = sum;
    decoder->norms[2] = in;
    decoder->norms[3] = beside;
    run(decoder, settle_rows, decoder->count == 1);
}

/* Take the results for queries, keys and values apart, and normalize over all heads at once. */
static void part_rows(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = decoder->layers + decoder->layer;
    const int64_t wide = (int64_t)s->heads * s->head_dim,
                  narrow = (int64_t)s->kv_heads * s->head_dim;
    const int end = first_of(decoder->count, part + 1, parts);
    for (int row = first_of(decoder->count, part, parts); row < end; row++) {
        float *query = decoder->query + row * wide, *key = decoder->key + row * narrow;
        if (layer->k == NULL) {
            const float *from = decoder->together + row * (wide + 2 * narrow);
            memcpy(query, from, (size_t)wide * sizeof *from);
            memcpy(key, from + wide, (size_t)narrow * sizeof *from);
            memcpy(decoder->value + row * narrow, from + wide + narrow,
                   (size_t)narrow * sizeof *from);
        }
        if (!layer->wide_norms) continue;
        if (layer->q_norm.kind != CVXQ_NO_NORM)
            decoder->math->normalize(&layer->q_norm, query, (int)wide, query);
        if (layer->k_norm.kind != CVXQ_NO_NORM)
            decoder->math->normalize(&layer->k_norm, key, (int)narrow, key);
    }
}

static void prepare_head(cvxq_decoder *decoder, const cvxq_norm *norm, float *x, int row) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = decoder->layers + decoder->layer;
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
    const cvxq_layer *layer = decoder->layers + decoder->layer;
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

static void prepare_rows(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const int heads = decoder->shape.kv_heads, all = decoder->count * heads;
    const int end = first_of(all, part + 1, parts);
    for (int i = first_of(all, part, parts); i < end; i++)
        prepare_group(decoder, i / heads, i % heads);
}

/* Rows of one key head that a task takes: few enough that every thread has some. */
static int attention_rows(const cvxq_decoder *decoder, int parts) {
    const int all = decoder->count * decoder->shape.heads;
    const int rows = (all + parts - 1) / parts;
    return rows < ROWS ? rows : ROWS;
}

/* Steps in which the rows of one key head are taken. */
static int attention_steps(const cvxq_decoder *decoder, int parts) {
    const int rows = decoder->count * (decoder->shape.heads / decoder->shape.kv_heads);
    const int step = attention_rows(decoder, parts);
    return (rows + step - 1) / step;
}

/* Attention of the chunk; the results replace the queries. */
static void attend_rows(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const cvxq_decoder_shape *s = &decoder->shape;
    const int group = s->heads / s->kv_heads, width = s->head_dim;
    const int rows_per_head = decoder->count * group, step = attention_rows(decoder, parts);
    const int steps = attention_steps(decoder, parts);
    const cvxq_layer *layer = decoder->layers + decoder->layer;
    const int64_t window = layer->window;
    float *tile = decoder->parts + part * decoder->part_floats;
    float *scratch = tile + span(ROWS, width);
    float *out[ROWS];
    int64_t first[ROWS], last[ROWS];
    /* Later rows attend to more: dealing them out in turn gives every thread its share. */
    for (int task = part; task < s->kv_heads * steps; task += parts) {
        const int head = task % s->kv_heads, begin = task / s->kv_heads * step;
        const int rows = rows_per_head - begin < step ? rows_per_head - begin : step;
        if (decoder->prepares) {
            const int64_t from = part == 0 ? now() : 0;
            prepare_group(decoder, 0, head);
            if (part == 0) decoder->attended -= now() - from; /* is not attention */
        }
        for (int r = 0; r < rows; r++) {
            const int row = (begin + r) / group, member = (begin + r) % group;
            out[r] = decoder->query + ((int64_t)row * s->heads + head * group + member) * width;
            memcpy(tile + r * width, out[r], (size_t)width * sizeof *tile);
            last[r] = decoder->start + row;
            first[r] = window > 0 && last[r] >= window ? last[r] - window + 1 : 0;
        }
        const int64_t index = ((int64_t)decoder->layer * s->kv_heads + head) * decoder->blocks;
        decoder->math->attend(tile, rows, width, decoder->keys + index, decoder->values + index,
                              first, last, layer->cap, out, scratch);
    }
}

static void attention(cvxq_decoder *decoder) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const cvxq_layer *layer = decoder->layers + decoder->layer;
    const cvxq_matrix *const weights[] = {layer->q, layer->k, layer->v};
    const int is_one = layer->k == NULL;
    float *const results[] = {is_one ? decoder->together : decoder->query, decoder->key,
                              decoder->value};
    multiply(decoder, weights, is_one ? 1 : 3, decoder->input, decoder->count, results);
    if (is_one || layer->wide_norms) run(decoder, part_rows, decoder->count == 1);
    const int64_t seen = decoder->start + decoder->count;
    const int64_t work = seen * decoder->count * s->heads * s->head_dim * 2;
    const int alone = work < SERIAL_PRODUCTS;
    /* A single token's heads need nothing of each other: prepare each where it is attended to. */
    decoder->prepares = decoder->count == 1 &&
                        attention_steps(decoder, alone ? 1 : decoder->threads) == 1;
    if (!decoder->prepares) run(decoder, prepare_rows, decoder->count == 1);
    const int64_t begin = now();
    run(decoder, attend_rows, alone);
    decoder->attended += now() - begin;
    multiply(decoder, &layer->o, 1, decoder->query, decoder->count, &decoder->branch);
}

static void activate_part(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const int64_t lines = (span(decoder->count, decoder->shape.ffn)) / 16;
    const int64_t all = (int64_t)decoder->count * decoder->shape.ffn;
    const int64_t begin = lines * part / parts * 16, limit = lines * (part + 1) / parts * 16;
    const int64_t end = limit < all ? limit : all;
    const cvxq_layer *layer = decoder->layers + decoder->layer;
    const int gated = layer->gate != NULL;
    float *x = gated ? decoder->gate : decoder->up;
    if (end > begin)
        decoder->math->activate(x + begin, gated ? decoder->up + begin : NULL, layer->activation,
                                (int)(end - begin));
}

/* Likewise of rows (count, 2, ffn) of gate and up, which it takes apart. */
static void activate_rows(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const int64_t ffn = decoder->shape.ffn;
    const int activation = decoder->layers[decoder->layer].activation;
    const int end = first_of(decoder->count, part + 1, parts);
    for (int row = first_of(decoder->count, part, parts); row < end; row++) {
        float *gate = decoder->gate + row * ffn;
        const float *from = decoder->together + row * 2 * ffn;
        memcpy(gate, from, (size_t)ffn * sizeof *gate);
        decoder->math->activate(gate, from + ffn, activation, (int)ffn);
    }
}

static void feed_forward(cvxq_decoder *decoder) {
    const cvxq_layer *layer = decoder->layers + decoder->layer;
    const float *input = layer->is_parallel ? decoder->beside : decoder->input;
    const int gated = layer->gate != NULL;
    const int alone = (int64_t)decoder->count * decoder->shape.ffn < SERIAL_ELEMENTS;
    if (gated && layer->up == NULL) {
        multiply(decoder, &layer->gate, 1, input, decoder->count, &decoder->together);
        run(decoder, activate_rows, alone || decoder->count == 1);
    } else {
        const cvxq_matrix *const weights[] = {layer->up, layer->gate};
        float *const results[] = {decoder->up, decoder->gate};
        multiply(decoder, weights, 1 + gated, input, decoder->count, results);
        run(decoder, activate_part, alone);
    }
    multiply(decoder, &layer->down, 1, gated ? decoder->gate : decoder->up, decoder->count,
             &decoder->branch);
}

/* Angles in float32, position times frequency, as transformers computes them. */
static void turn(cvxq_decoder *decoder) {
    const cvxq_decoder_shape *s = &decoder->shape;
    float *cosine = decoder->cosine, *sine = decoder->sine;
    for (const cvxq_rope *rope = s->rope; rope < s->rope + s->ropes; rope++) {
        const float *frequencies = decoder->is_long ? rope->long_frequencies : rope->frequencies;
        const float scale = decoder->is_long ? rope->long_scale : rope->scale;
        for (int row = 0; row < decoder->count; row++)
            for (int i = 0; i < rope->pairs; i++) {
                const float angle = (float)(decoder->start + row) * frequencies[i];
                *cosine++ = cosf(angle) * scale;
                *sine++ = sinf(angle) * scale;
            }
    }
}

void cvxq_decoder_turn(cvxq_decoder *decoder, int is_long) { decoder->is_long = is_long; }

/* The norm of what a layer's feed-forward block reads beside its attention, if it does. */
static const cvxq_norm *beside(const cvxq_layer *layer) {
    return layer->is_parallel ? &layer->ffn_in : NULL;
}

static void embed(cvxq_decoder *decoder, const int64_t *ids) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t all = (int64_t)decoder->count * s->embedding;
    float *target = s->project_in != NULL ? decoder->input : decoder->stream;
    const int64_t begin = now();
    cvxq_rows(decoder->pool, s->embed, ids, decoder->count, target);
    decoder->products += now() - begin;
    if (s->embedding_scale != 1.0f) decoder->math->scale(target, s->embedding_scale, (int)all);
    if (s->project_in != NULL)
        multiply(decoder, &s->project_in, 1, decoder->input, decoder->count, &decoder->stream);
    for (int row = 0; s->positions != NULL && row < decoder->count; row++) {
        const int64_t position = decoder->start + row + s->position_offset;
        cvxq_rows(decoder->pool, s->positions, &position, 1, decoder->branch);
        decoder->math->add(decoder->stream + (int64_t)row * s->hidden, decoder->branch, 1.0f,
                           s->hidden);
    }
}

static void cut_part(void *context, int part, int parts) {
    cvxq_decoder *decoder = context;
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t begin = decoder->cut_count * part / parts;
    const int n = (int)(decoder->cut_count * (part + 1) / parts - begin);
    if (s->logit_scale != 1.0f) decoder->math->scale(decoder->cut + begin, s->logit_scale, n);
    if (s->logit_cap > 0) decoder->math->soft_cap(decoder->cut + begin, s->logit_cap, n);
}

static void predict(cvxq_decoder *decoder, int wanted, float *logits) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const float *input = decoder->input + (int64_t)(decoder->count - wanted) * s->hidden;
    if (s->project_out != NULL) {
        multiply(decoder, &s->project_out, 1, input, wanted, &decoder->branch);
        input = decoder->branch;
    }
    multiply(decoder, &s->head, 1, input, wanted, &logits);
    decoder->cut = logits;
    decoder->cut_count = (int64_t)wanted * s->vocabulary;
    if (s->logit_scale != 1.0f || s->logit_cap > 0)
        run(decoder, cut_part, decoder->cut_count < SERIAL_ELEMENTS);
}

static int in_range(const cvxq_decoder *decoder, const int64_t *ids, int count, int64_t start,
                    int wanted) {
    const cvxq_decoder_shape *s = &decoder->shape;
    if (count < 1 || count > s->chunk || wanted < 0 || wanted > count) return 0;
    if (start < 0 || start + count > s->capacity) return 0;
    for (int i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= s->vocabulary) return 0;
    return 1;
}

int cvxq_decoder_feed(cvxq_decoder *decoder, const int64_t *ids, int count, int64_t start,
                      int wanted, int exact, float *logits) {
    const int layers = decoder->shape.layers;
    if (!in_range(decoder, ids, count, start, wanted)) return 2;
    if (cvxq_decoder_hold(decoder, start + count)) return 1;
    const int64_t begin = now();
    decoder->count = count;
    decoder->start = start;
    decoder->exact = exact;
    cvxq_pool_begin(decoder->pool);
    turn(decoder);
    embed(decoder, ids);
    settle(decoder, NULL, NULL, &decoder->layers[0].attention_in, beside(decoder->layers));
    for (int i = 0; i < layers; i++) {
        const cvxq_layer *layer = decoder->layers + i;
        decoder->layer = i;
        attention(decoder);
        settle(decoder, &layer->attention_out, &layer->attention_sum,
               layer->is_parallel ? NULL : &layer->ffn_in, NULL);
        feed_forward(decoder);
        if (i + 1 < layers)
            settle(decoder, &layer->ffn_out, &layer->ffn_sum, &layer[1].attention_in,
                   beside(layer + 1));
        else
            settle(decoder, &layer->ffn_out, &layer->ffn_sum, &decoder->shape.final, NULL);
    }
    if (wanted) predict(decoder, wanted, logits);
    cvxq_pool_end(decoder->pool);
    decoder->total += now() - begin;
    return 0;
}

void cvxq_decoder_clock(const cvxq_decoder *decoder, int64_t *products, int64_t *attention,
                        int64_t *total) {
    *products = decoder->products;
    *attention = decoder->attended;
    *total = decoder->total;
}
