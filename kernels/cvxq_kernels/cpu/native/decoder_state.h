/* What a decoder holds: decoder_memory.c allocates it, decoder.c computes with it. */
#ifndef CVXQ_DECODER_STATE_H
#define CVXQ_DECODER_STATE_H

#include "decoder.h"
#include "decoder_math.h"
#include "internal.h"

#define ROWS 16     /* rows of attention that one thread computes together */
#define LOGITS 8192 /* that one thread finishes together */
#define TOGETHER (MOST_FACTORS / 2) /* experts that one token goes through together */

/* The rows of a call that are of one piece: from `first` on. */
typedef struct {
    cvxq_piece piece;
    int first;
} cvxq_span;

struct cvxq_decoder {
    cvxq_decoder_shape shape;
    cvxq_layer *layers;
    cvxq_rope *ropes;
    cvxq_pool *pool;
    const cvxq_decoder_math *math;
    int threads, blocks, held;
    float **memory;                /* (blocks) what was allocated, NULL beyond `held` */
    const float **keys, **values;  /* (layers, kv_heads, blocks) */
    float *scratch;
    int64_t scratch_floats, part_floats;
    float *stream, *input, *query, *key, *value, *branch, *gate, *up, *parts;
    float *cosine, *sine; /* of each rope (chunk, pairs), one after the other */
    float *beside;        /* (chunk, hidden): what a parallel feed-forward block reads */
    float *together;      /* (chunk, …): results of one matrix for several parts */
    float *scores;        /* (chunk, experts): what the router gives */
    float *shares;        /* (chunk, chosen) */
    float *outputs;       /* (taken, hidden): of the experts in work */
    int32_t *picks;       /* (chunk, chosen): experts of each token */
    int32_t *routes;      /* (chunk, chosen): places in picks, by expert */
    int at, taken;        /* routes that are done, and those in work */
    int is_long;
    int64_t products, attended, total;
    /* this call, and how far it has come */
    const int64_t *ids;
    float *logits;
    cvxq_span spans[CVXQ_TEXTS];
    int span_count, count, layer, exact, wanted;
    const float *last; /* (wanted, hidden): what comes before the logits */
    int64_t step;
    cvxq_product product;      /* under way, or done */
    int64_t since, *spent_on;  /* when the clock of products or attention began to run */
    const cvxq_norm *norms[4]; /* of branch, branch + stream, the next input, the one beside it */
};

static inline int padded(int width) {
    return (width + CVXQ_PADDING - 1) / CVXQ_PADDING * CVXQ_PADDING;
}

/* Floats of `count` rows of `width`, rounded up so that what follows is aligned as well. */
static inline int64_t span(int64_t count, int64_t width) { return (count * width + 15) / 16 * 16; }

/* Hold keys and values of all layers for the first `positions` positions; 1 without memory. */
int cvxq_decoder_hold(cvxq_decoder *decoder, int64_t positions);

static inline const cvxq_layer *layer_of(const cvxq_decoder *decoder) {
    return decoder->layers + decoder->layer;
}

/* The piece that a row is of, and its position there. */
static inline const cvxq_span *span_of(const cvxq_decoder *decoder, int64_t row) {
    const cvxq_span *span = decoder->spans;
    while (row >= span->first + span->piece.count) span++;
    return span;
}

static inline int64_t position_of(const cvxq_span *span, int64_t row) {
    return span->piece.start + row - span->first;
}

/* The decoder of a chunk that cvxq_decoder_share gave out. */
static inline cvxq_decoder *decoder_of(const void *context) {
    return *(cvxq_decoder *const *)context;
}

/* Let all threads do `chunk` for each of some rows, which is not worth it for one. */
void cvxq_decoder_share(cvxq_decoder *decoder, cvxq_work *work, cvxq_chunk chunk, int rows);

/* Begin a product; its jobs come before the next step. */
void cvxq_decoder_multiply(cvxq_decoder *decoder, const cvxq_matrix *const *weights, int count,
                           const float *x, int rows, float *const *y);

/* Count time as spent on products, or attention, until the next step. */
void cvxq_decoder_start_clock(cvxq_decoder *decoder, int64_t *spent_on);

/* decoder_attention.c: steps of a layer. */
void cvxq_decoder_prepare(cvxq_decoder *decoder, cvxq_work *work);
void cvxq_decoder_attend(cvxq_decoder *decoder, cvxq_work *work);

/* decoder_experts.c: steps of a layer that has experts, which do nothing in others. From `take` to
 * `give` they are repeated for some routes at a time, and `again` says for how long. */
void cvxq_decoder_score(cvxq_decoder *decoder, cvxq_work *work);
void cvxq_decoder_choose(cvxq_decoder *decoder, cvxq_work *work);
void cvxq_decoder_order(cvxq_decoder *decoder, cvxq_work *work);
void cvxq_decoder_take(cvxq_decoder *decoder, cvxq_work *work);
void cvxq_decoder_give(cvxq_decoder *decoder, cvxq_work *work);
int cvxq_decoder_again(cvxq_decoder *decoder);
void cvxq_decoder_experts_up(cvxq_decoder *decoder);
void cvxq_decoder_experts_down(cvxq_decoder *decoder);

#endif
