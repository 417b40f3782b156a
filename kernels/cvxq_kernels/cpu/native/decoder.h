/* The forward pass of a decoder-only transformer, one call per chunk of tokens, of one text or of
 * several.
 *
 * Norms before, after or around the branches, which may read the same input; q/k/v and gate/up in
 * matrices of their own or together; rotary or learned positions, grouped queries, sliding windows,
 * soft caps. Everything is float32; rows are tokens. The caller owns matrices, norms, frequencies
 * and the pool, and keeps them alive.
 */
#ifndef CVXQ_DECODER_H
#define CVXQ_DECODER_H

#include <stdint.h>

#include "cvxq.h"

enum cvxq_norm_kind { CVXQ_NO_NORM = 0, CVXQ_RMS_NORM = 1, CVXQ_LAYER_NORM = 2 };

enum cvxq_activation {
    CVXQ_SILU = 0,
    CVXQ_GELU = 1,      /* x Φ(x), with erf */
    CVXQ_GELU_TANH = 2, /* its approximation with tanh */
    CVXQ_RELU = 3,
};

/* weight and bias have as many elements as the rows that are normalized; NULL is 1, 0. */
typedef struct {
    const float *weight, *bias;
    int32_t kind;
    float epsilon;
} cvxq_norm;

/* Elements i and i + pairs of a head turn together, i < pairs, by place · frequencies[i] radians;
 * in a long text (cvxq_decoder_turn) by the long ones. scale: on cosines and sines. */
typedef struct {
    const float *frequencies, *long_frequencies; /* (pairs) */
    float scale, long_scale;
    int32_t pairs;
} cvxq_rope;

/* One of the blocks that tokens are routed to; gate NULL: down(act(up(x))). */
typedef struct {
    const cvxq_matrix *gate, *up, *down;
} cvxq_expert;

/* k and v NULL: q gives queries, keys and values side by side. gate NULL: down(act(up(x))), else
 * down(act(gate(x)) * up(x)); up NULL: gate gives both, gate first. experts: in place of gate, up
 * and down; the router scores them, and a token goes through the `chosen` ones with the highest
 * scores, whose outputs are added, each times its share of the softmax. */
typedef struct {
    const cvxq_matrix *q, *k, *v, *o, *gate, *up, *down;
    cvxq_norm q_norm, k_norm;                             /* before rotation */
    cvxq_norm attention_in, attention_out, attention_sum; /* of input, branch, branch + stream */
    cvxq_norm ffn_in, ffn_out, ffn_sum;
    float scale, cap;    /* of scores; cap: c tanh(x / c), 0: none */
    int32_t window;      /* 0: no limit; else a token sees itself and the window − 1 before it */
    int32_t rope;        /* index of one, −1: nothing is rotated */
    int32_t wide_norms;  /* q_norm and k_norm are over all heads at once, else over each */
    int32_t is_parallel; /* the feed-forward block reads the layer's own input */
    int32_t activation;
    float limit, slope, up_offset; /* of gated blocks; INFINITY, 1 and 0 for none, see
                                      cvxq_decoder_math */
    const float *sinks;            /* (heads): a score without a value, or NULL */
    const cvxq_matrix *router;
    const cvxq_expert *experts; /* (expert_count), or NULL */
    int32_t expert_count, chosen;
    int32_t shares_of_all; /* the softmax is over all scores, else over those of the chosen */
} cvxq_layer;

typedef struct {
    int32_t layers, hidden, embedding, heads, kv_heads, head_dim, ffn, vocabulary;
    int32_t capacity;        /* most tokens of a text */
    int32_t chunk;           /* most tokens of a call */
    int32_t ropes;
    int32_t position_offset; /* row of `positions` for token 0 */
    float embedding_scale, residual_scale, logit_scale;
    float logit_cap; /* c tanh(x / c); 0: none */
    const cvxq_rope *rope; /* (ropes) */
    const cvxq_matrix *embed, *head;
    const cvxq_matrix *positions, *project_in, *project_out; /* NULL: none */
    cvxq_norm final;
} cvxq_decoder_shape;

typedef struct cvxq_decoder cvxq_decoder;

enum { CVXQ_TEXTS = 16 }; /* most of a call */

/* `count` tokens of the text that `decoder` holds, at positions start, start + 1, …, whose
 * predecessors have been read; logits after the last `wanted` of them. */
typedef struct {
    cvxq_decoder *decoder;
    int64_t start;
    int32_t count, wanted;
} cvxq_piece;

/* Copies `shape`, its ropes and its `layers` layers, but not their experts; NULL when memory is short. */
CVXQ_API cvxq_decoder *cvxq_decoder_new(cvxq_pool *pool, const cvxq_decoder_shape *shape,
                                        const cvxq_layer *layers);
CVXQ_API void cvxq_decoder_free(cvxq_decoder *decoder);

/* Read 1 to CVXQ_TEXTS pieces, together at most chunk tokens, and write the logits (all that are
 * wanted, vocabulary). Their decoders are different ones, `decoder` may be among them, and were made
 * of the same pool, shape and layers. ids: of one piece after the other. exact: as in cvxq_matmul.
 * Returns 0; 1 when memory is short; 2 for tokens, positions or counts out of their range. */
CVXQ_API int cvxq_decoder_feed(cvxq_decoder *decoder, const int64_t *ids, const cvxq_piece *pieces,
                               int count, int exact, float *logits);

/* From the next call on, texts are long (1) or not (0); what was read is to be read anew. */
CVXQ_API void cvxq_decoder_turn(cvxq_decoder *decoder, int is_long);

/* Let `decoder` hold the first `count` positions that `from`, of the same shape, holds.
 * Returns 0; 1 when memory is short; 2 where `from` has fewer. */
CVXQ_API int cvxq_decoder_copy(cvxq_decoder *decoder, const cvxq_decoder *from, int64_t count);

/* Nanoseconds spent so far: with matrices, in attention (scores to sums of values), altogether. */
CVXQ_API void cvxq_decoder_clock(const cvxq_decoder *decoder, int64_t *products, int64_t *attention,
                                 int64_t *total);

/* Bytes of keys and values held, and of scratch. */
CVXQ_API int64_t cvxq_decoder_bytes(const cvxq_decoder *decoder);

#endif
