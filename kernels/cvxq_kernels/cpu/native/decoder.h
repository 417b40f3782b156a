/* The forward pass of a decoder-only transformer, one call per chunk of tokens.
 *
 * Llama's family and OPT: norms before, after or around the branches, fused q/k/v and gate/up,
 * rotary or learned positions, grouped queries, sliding windows, soft caps. Everything is float32;
 * rows are tokens. The caller owns matrices, norms and the pool, and keeps them alive.
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

/* gate NULL: down(act(up(x))), else down(act(gate(x)) * up(x)). window 0: no limit; else a token
 * sees itself and the window − 1 tokens before it. rotated 0: this layer rotates nothing. */
typedef struct {
    const cvxq_matrix *q, *k, *v, *o, *gate, *up, *down;
    cvxq_norm q_norm, k_norm;                           /* of each head, before rotation */
    cvxq_norm attention_in, attention_out, attention_sum; /* of input, branch, branch + stream */
    cvxq_norm ffn_in, ffn_out, ffn_sum;
    int32_t window, rotated;
} cvxq_layer;

typedef struct {
    int32_t layers, hidden, embedding, heads, kv_heads, head_dim, ffn, vocabulary;
    int32_t capacity;        /* most tokens of a text */
    int32_t chunk;           /* most tokens of a call */
    int32_t rotary_pairs;    /* elements i and i + rotary_pairs turn together, i < rotary_pairs */
    int32_t position_offset; /* row of `positions` for token 0 */
    int32_t activation;
    float embedding_scale, residual_scale, attention_scale, logit_scale;
    float attention_cap, logit_cap; /* c tanh(x / c); 0: none */
    float rotary_scale;             /* on cosines and sines */
    const float *frequencies;       /* (rotary_pairs) radians per token */
    const cvxq_matrix *embed, *head;
    const cvxq_matrix *positions, *project_in, *project_out; /* NULL: none */
    cvxq_norm final;
} cvxq_decoder_shape;

typedef struct cvxq_decoder cvxq_decoder;

/* Copies `shape` and its `layers` layers; NULL when memory is short. */
CVXQ_API cvxq_decoder *cvxq_decoder_new(cvxq_pool *pool, const cvxq_decoder_shape *shape,
                                        const cvxq_layer *layers);
CVXQ_API void cvxq_decoder_free(cvxq_decoder *decoder);

/* Read `count` ≤ chunk tokens at positions start, start + 1, …, whose predecessors have been read,
 * and write the logits (wanted, vocabulary) after the last `wanted` of them. exact: as in
 * cvxq_matmul.
 * Returns 0; 1 when memory is short; 2 for tokens, positions or counts out of their range. */
CVXQ_API int cvxq_decoder_feed(cvxq_decoder *decoder, const int64_t *ids, int count, int64_t start,
                               int wanted, int exact, float *logits);

/* Nanoseconds spent so far: with matrices, in attention (scores to sums of values), altogether. */
CVXQ_API void cvxq_decoder_clock(const cvxq_decoder *decoder, int64_t *products, int64_t *attention,
                                 int64_t *total);

/* Bytes of keys and values held, and of scratch. */
CVXQ_API int64_t cvxq_decoder_bytes(const cvxq_decoder *decoder);

#endif
