/* The forward pass; see decoder.h. It is a program of the pool (pool.h): a list of steps, each of
 * which does its work at once or has it shared. For one token everything between the matrix
 * products is done at once, unless attention is long: waking threads would cost more. */
#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <math.h>
#include <string.h>
#include <time.h>

#include "decoder_state.h"

enum { REPEATED = 5 }; /* steps from taking routes to giving their results */

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

void cvxq_decoder_share(cvxq_decoder *decoder, cvxq_work *work, cvxq_chunk chunk, int rows) {
    if (rows == 1)
        chunk(&decoder, 0, 0);
    else
        cvxq_work_fill(work, chunk, NULL, rows, &decoder, sizeof decoder);
}

void cvxq_decoder_start_clock(cvxq_decoder *decoder, int64_t *spent_on) {
    decoder->since = now();
    decoder->spent_on = spent_on;
}

void cvxq_decoder_multiply(cvxq_decoder *decoder, const cvxq_matrix *const *weights, int count,
                           const float *x, int rows, float *const *y) {
    cvxq_decoder_start_clock(decoder, &decoder->products);
    cvxq_product_begin(&decoder->product, decoder->pool, weights, count, x, rows, y, decoder->exact,
                       0);
}

static void normalize(const cvxq_decoder *decoder, const cvxq_norm *norm, const float *x,
                      float *out) {
    const int n = decoder->shape.hidden;
    if (norm->kind != CVXQ_NO_NORM)
        decoder->math->normalize(norm, x, n, out);
    else if (x != out)
        memcpy(out, x, (size_t)n * sizeof *x);
}

/* Add the branch to the stream and prepare the input of the next one. */
static void settle_row(const void *context, int64_t row, int thread) {
    cvxq_decoder *decoder = decoder_of(context);
    const int hidden = decoder->shape.hidden;
    float *branch = decoder->branch + row * hidden, *stream = decoder->stream + row * hidden;
    (void)thread;
    if (decoder->norms[0] != NULL) {
        normalize(decoder, decoder->norms[0], branch, branch);
        decoder->math->add(stream, branch, decoder->shape.residual_scale, hidden);
        normalize(decoder, decoder->norms[1], stream, stream);
    }
    if (decoder->norms[2] != NULL)
        normalize(decoder, decoder->norms[2], stream, decoder->input + row * hidden);
    if (decoder->norms[3] != NULL)
        normalize(decoder, decoder->norms[3], stream, decoder->beside + row * hidden);
}

/* out NULL: there is no branch yet. in, beside NULL: nothing reads this input. */
static void settle(cvxq_decoder *decoder, cvxq_work *work, const cvxq_norm *out,
                   const cvxq_norm *sum, const cvxq_norm *in, const cvxq_norm *beside) {
    decoder->norms[0] = out;
    decoder->norms[1] = sum;
    decoder->norms[2] = in;
    decoder->norms[3] = beside;
    cvxq_decoder_share(decoder, work, settle_row, decoder->count);
}

static void project_in(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder);
    const cvxq_matrix *const weights[] = {layer->q, layer->k, layer->v};
    const int is_one = layer->k == NULL;
    float *const results[] = {is_one ? decoder->together : decoder->query, decoder->key,
                              decoder->value};
    (void)work;
    cvxq_decoder_multiply(decoder, weights, is_one ? 1 : 3, decoder->input, decoder->count,
                          results);
}

static void project_out(cvxq_decoder *decoder, cvxq_work *work) {
    (void)work;
    cvxq_decoder_multiply(decoder, &layer_of(decoder)->o, 1, decoder->query, decoder->count,
                          &decoder->branch);
}

static void settle_attention(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder);
    settle(decoder, work, &layer->attention_out, &layer->attention_sum,
           layer->is_parallel ? NULL : &layer->ffn_in, NULL);
}

static void project_up(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder);
    const float *input = layer->is_parallel ? decoder->beside : decoder->input;
    const int gated = layer->gate != NULL;
    const cvxq_matrix *const weights[] = {layer->up, layer->gate};
    float *const results[] = {decoder->up, decoder->gate};
    (void)work;
    if (layer->experts != NULL)
        cvxq_decoder_experts_up(decoder);
    else if (gated && layer->up == NULL)
        cvxq_decoder_multiply(decoder, &layer->gate, 1, input, decoder->count, &decoder->together);
    else
        cvxq_decoder_multiply(decoder, weights, 1 + gated, input, decoder->count, results);
}

static int is_gated(const cvxq_layer *layer) {
    return (layer->experts != NULL ? layer->experts->gate : layer->gate) != NULL;
}

static void activate_row(const void *context, int64_t row, int thread) {
    cvxq_decoder *decoder = decoder_of(context);
    const cvxq_layer *layer = layer_of(decoder);
    const int ffn = decoder->shape.ffn;
    float *up = decoder->up + row * ffn, *gate = decoder->gate + row * ffn;
    (void)thread;
    if (!is_gated(layer)) {
        decoder->math->activate(up, NULL, layer->activation, ffn);
        return;
    }
    if (layer->experts == NULL && layer->up == NULL) { /* both side by side */
        memcpy(gate, decoder->together + row * 2 * ffn, (size_t)ffn * sizeof *gate);
        up = decoder->together + (row * 2 + 1) * ffn;
    }
    if (isfinite(layer->limit) || layer->slope != 1.0f || layer->up_offset != 0.0f)
        decoder->math->activate_bounded(gate, up, layer->limit, layer->slope, layer->up_offset,
                                        ffn);
    else
        decoder->math->activate(gate, up, layer->activation, ffn);
}

static void activate(cvxq_decoder *decoder, cvxq_work *work) {
    const int rows = layer_of(decoder)->experts != NULL ? decoder->taken : decoder->count;
    cvxq_decoder_share(decoder, work, activate_row, rows);
}

static void project_down(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder);
    (void)work;
    if (layer->experts != NULL)
        cvxq_decoder_experts_down(decoder);
    else
        cvxq_decoder_multiply(decoder, &layer->down, 1,
                              layer->gate != NULL ? decoder->gate : decoder->up, decoder->count,
                              &decoder->branch);
}

/* The norm of what a layer's feed-forward block reads beside its attention, if it does. */
static const cvxq_norm *beside(const cvxq_layer *layer) {
    return layer->is_parallel ? &layer->ffn_in : NULL;
}

static void settle_block(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder), *next = layer + 1;
    if (++decoder->layer < decoder->shape.layers)
        settle(decoder, work, &layer->ffn_out, &layer->ffn_sum, &next->attention_in, beside(next));
    else
        settle(decoder, work, &layer->ffn_out, &layer->ffn_sum, &decoder->shape.final, NULL);
}

/* Angles in float32, position times frequency, as transformers computes them. */
static void turn(cvxq_decoder *decoder) {
    const cvxq_decoder_shape *s = &decoder->shape;
    float *cosine = decoder->cosine, *sine = decoder->sine;
    for (const cvxq_rope *rope = s->rope; rope < s->rope + s->ropes; rope++)
        for (int row = 0; row < decoder->count; row++) {
            const cvxq_span *span = span_of(decoder, row);
            const int is_long = span->piece.decoder->is_long;
            const float *frequencies = is_long ? rope->long_frequencies : rope->frequencies;
            const float scale = is_long ? rope->long_scale : rope->scale;
            const float position = (float)position_of(span, row);
            for (int i = 0; i < rope->pairs; i++) {
                const float angle = position * frequencies[i];
                *cosine++ = cosf(angle) * scale;
                *sine++ = sinf(angle) * scale;
            }
        }
}

void cvxq_decoder_turn(cvxq_decoder *decoder, int is_long) { decoder->is_long = is_long; }

static void embed(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    turn(decoder);
    cvxq_decoder_start_clock(decoder, &decoder->products);
    cvxq_rows_fill(work, s->embed, decoder->ids, decoder->count,
                   s->project_in != NULL ? decoder->input : decoder->stream);
}

static void scale_embedding(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t all = (int64_t)decoder->count * s->embedding;
    float *x = s->project_in != NULL ? decoder->input : decoder->stream;
    (void)work;
    if (s->embedding_scale != 1.0f) decoder->math->scale(x, s->embedding_scale, (int)all);
    if (s->project_in != NULL)
        cvxq_decoder_multiply(decoder, &s->project_in, 1, x, decoder->count, &decoder->stream);
}

static void add_position(const void *context, int64_t row, int thread) {
    cvxq_decoder *decoder = decoder_of(context);
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t position = position_of(span_of(decoder, row), row) + s->position_offset;
    float *place = decoder->branch + row * s->hidden;
    (void)thread;
    cvxq_rows(decoder->pool, s->positions, &position, 1, place); /* of one row: at once */
    decoder->math->add(decoder->stream + row * s->hidden, place, 1.0f, s->hidden);
}

static void add_positions(cvxq_decoder *decoder, cvxq_work *work) {
    if (decoder->shape.positions != NULL)
        cvxq_decoder_share(decoder, work, add_position, decoder->count);
}

static void settle_embedding(cvxq_decoder *decoder, cvxq_work *work) {
    decoder->layer = 0;
    settle(decoder, work, NULL, NULL, &decoder->layers[0].attention_in, beside(decoder->layers));
}

/* Bring the rows of the tokens whose logits are wanted together, behind those of the first piece. */
static void gather_last(cvxq_decoder *decoder) {
    const int64_t hidden = decoder->shape.hidden;
    const cvxq_span *span = decoder->spans;
    float *next = decoder->input + (span->piece.count - span->piece.wanted) * hidden;
    decoder->last = next;
    for (; span < decoder->spans + decoder->span_count; span++) {
        const int64_t row = span->first + span->piece.count - span->piece.wanted;
        const float *from = decoder->input + row * hidden;
        if (from != next) memmove(next, from, (size_t)(span->piece.wanted * hidden) * sizeof *next);
        next += span->piece.wanted * hidden;
    }
}

static void project_last(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    (void)work;
    gather_last(decoder);
    if (decoder->wanted && s->project_out != NULL)
        cvxq_decoder_multiply(decoder, &s->project_out, 1, decoder->last, decoder->wanted,
                              &decoder->branch);
}

static void predict(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const float *input = s->project_out != NULL ? decoder->branch : decoder->last;
    (void)work;
    if (decoder->wanted)
        cvxq_decoder_multiply(decoder, &s->head, 1, input, decoder->wanted, &decoder->logits);
}

/* Scale and cap a piece of the logits. */
static void finish_logits(const void *context, int64_t piece, int thread) {
    cvxq_decoder *decoder = decoder_of(context);
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t all = (int64_t)decoder->wanted * s->vocabulary, begin = piece * LOGITS;
    const int n = (int)min_of(LOGITS, all - begin);
    (void)thread;
    if (s->logit_scale != 1.0f) decoder->math->scale(decoder->logits + begin, s->logit_scale, n);
    if (s->logit_cap > 0) decoder->math->soft_cap(decoder->logits + begin, s->logit_cap, n);
}

static void finish(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t all = (int64_t)decoder->wanted * s->vocabulary;
    if (all && (s->logit_scale != 1.0f || s->logit_cap > 0))
        cvxq_decoder_share(decoder, work, finish_logits, (int)ceil_div(all, LOGITS));
}

/* Go back to the next routes until all experts have done their part. */
static void repeat(cvxq_decoder *decoder, cvxq_work *work) {
    (void)work;
    if (cvxq_decoder_again(decoder)) decoder->step -= REPEATED + 1;
}

typedef void (*step)(cvxq_decoder *, cvxq_work *);
static const step FIRST[] = {embed, scale_embedding, add_positions, settle_embedding};
static const step LAYER[] = {
    project_in,
    cvxq_decoder_prepare,
    cvxq_decoder_attend,
    project_out,
    settle_attention,
    cvxq_decoder_score,
    cvxq_decoder_choose,
    cvxq_decoder_order,
    cvxq_decoder_take,
    project_up,
    activate,
    project_down,
    cvxq_decoder_give,
    repeat,
    settle_block,
};
static const step LAST[] = {project_last, predict, finish};
enum {
    FIRST_STEPS = sizeof FIRST / sizeof *FIRST,
    LAYER_STEPS = sizeof LAYER / sizeof *LAYER,
    LAST_STEPS = sizeof LAST / sizeof *LAST,
};

/* Step `index` of a call, NULL at its end. */
static step step_at(const cvxq_decoder *decoder, int64_t index) {
    if (index < FIRST_STEPS) return FIRST[index];
    index -= FIRST_STEPS;
    const int64_t all = (int64_t)decoder->shape.layers * LAYER_STEPS;
    if (index < all) return LAYER[index % LAYER_STEPS];
    return index - all < LAST_STEPS ? LAST[index - all] : NULL;
}

/* Count the time since the product or the attention that just ended was begun. */
static void stop_clock(cvxq_decoder *decoder) {
    if (decoder->spent_on != NULL) *decoder->spent_on += now() - decoder->since;
    decoder->spent_on = NULL;
}

static int next_work(void *program, cvxq_work *work) {
    cvxq_decoder *decoder = program;
    for (work->chunks = 0; !work->chunks;) {
        if (cvxq_product_next(&decoder->product, work)) return 1;
        stop_clock(decoder);
        const step next = step_at(decoder, decoder->step++);
        if (next == NULL) return 0;
        next(decoder, work);
    }
    return 1;
}

static int is_piece(const cvxq_decoder *decoder, const cvxq_piece *piece) {
    const cvxq_decoder_shape *s = &decoder->shape, *own = &piece->decoder->shape;
    if (piece->decoder->pool != decoder->pool || own->layers != s->layers) return 0;
    if (own->hidden != s->hidden || own->capacity != s->capacity) return 0;
    if (piece->count < 1 || piece->wanted < 0 || piece->wanted > piece->count) return 0;
    return piece->start >= 0 && piece->start + piece->count <= s->capacity;
}

/* Let the rows of the call be those of the pieces; 0 where something is out of its range. */
static int place(cvxq_decoder *decoder, const int64_t *ids, const cvxq_piece *pieces, int count) {
    const cvxq_decoder_shape *s = &decoder->shape;
    int rows = 0, wanted = 0;
    if (count < 1 || count > CVXQ_TEXTS) return 0;
    for (int i = 0; i < count; i++) {
        if (!is_piece(decoder, pieces + i) || pieces[i].count > s->chunk - rows) return 0;
        for (int j = 0; j < i; j++)
            if (pieces[j].decoder == pieces[i].decoder) return 0;
        decoder->spans[i] = (cvxq_span){pieces[i], rows};
        rows += pieces[i].count;
        wanted += pieces[i].wanted;
    }
    for (int i = 0; i < rows; i++)
        if (ids[i] < 0 || ids[i] >= s->vocabulary) return 0;
    decoder->span_count = count;
    decoder->count = rows;
    decoder->wanted = wanted;
    return 1;
}

int cvxq_decoder_feed(cvxq_decoder *decoder, const int64_t *ids, const cvxq_piece *pieces,
                      int count, int exact, float *logits) {
    if (!place(decoder, ids, pieces, count)) return 2;
    for (int i = 0; i < count; i++)
        if (cvxq_decoder_hold(pieces[i].decoder, pieces[i].start + pieces[i].count)) return 1;
    const int64_t begin = now();
    decoder->exact = exact;
    decoder->ids = ids;
    decoder->logits = logits;
    decoder->step = 0;
    decoder->product.stage = PRODUCT_DONE;
    cvxq_pool_run(decoder->pool, next_work, decoder);
    decoder->total += now() - begin;
    return 0;
}

void cvxq_decoder_clock(const cvxq_decoder *decoder, int64_t *products, int64_t *attention,
                        int64_t *total) {
    *products = decoder->products;
    *attention = decoder->attended;
    *total = decoder->total;
}
