/* Memory of a decoder: scratch at once, keys and values as the text grows. */
#include <stdlib.h>
#include <string.h>

#include "decoder_state.h"

static const cvxq_decoder_math *best_math(void) {
#if defined(__x86_64__)
    if (strcmp(cvxq_isa(), cvxq_decoder_math_avx512.name) == 0) return &cvxq_decoder_math_avx512;
    if (strcmp(cvxq_isa(), cvxq_decoder_math_avx2.name) == 0) return &cvxq_decoder_math_avx2;
#endif
    return &cvxq_decoder_math_base;
}

static int reserve_scratch(cvxq_decoder *decoder) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const int64_t chunk = s->chunk;
    const int wide = s->hidden > s->embedding ? s->hidden : s->embedding;
    int64_t beside = 0, together = 0, pairs = 0, experts = 0, chosen = 0;
    for (int i = 0; i < s->layers; i++) {
        const cvxq_layer *layer = decoder->layers + i;
        const int64_t projected = ((int64_t)s->heads + 2 * s->kv_heads) * s->head_dim;
        if (layer->is_parallel) beside = s->hidden;
        if (layer->experts != NULL) {
            experts = max_of(experts, layer->expert_count);
            chosen = max_of(chosen, layer->chosen);
        }
        if (layer->k == NULL && projected > together) together = projected;
        if (layer->up == NULL && 2 * (int64_t)s->ffn > together) together = 2 * (int64_t)s->ffn;
    }
    for (int i = 0; i < s->ropes; i++) pairs += s->rope[i].pairs;
    const int64_t taken = experts ? max_of(chunk, TOGETHER) : chunk;
    decoder->picks = malloc((size_t)(chunk * chosen + 1) * sizeof *decoder->picks);
    decoder->routes = malloc((size_t)(chunk * chosen + 1) * sizeof *decoder->routes);
    if (decoder->picks == NULL || decoder->routes == NULL) return 1;
    decoder->part_floats = span(ROWS, s->head_dim) +
                           span(ROWS, CVXQ_BLOCK + padded(s->head_dim) + 2);
    struct {
        float **place;
        int64_t floats;
    } plan[] = {
        {&decoder->stream, span(chunk, s->hidden)},
        {&decoder->input, span(chunk, wide)},
        {&decoder->query, span(chunk, (int64_t)s->heads * s->head_dim)},
        {&decoder->key, span(chunk, (int64_t)s->kv_heads * s->head_dim)},
        {&decoder->value, span(chunk, (int64_t)s->kv_heads * s->head_dim)},
        {&decoder->branch, span(chunk, wide)},
        {&decoder->gate, span(taken, s->ffn)},
        {&decoder->up, span(taken, s->ffn)},
        {&decoder->scores, span(chunk, experts)},
        {&decoder->shares, span(chunk, chosen)},
        {&decoder->outputs, span(experts ? taken : 0, s->hidden)},
        {&decoder->beside, span(chunk, beside)},
        {&decoder->together, span(chunk, together)},
        {&decoder->cosine, span(chunk, pairs)},
        {&decoder->sine, span(chunk, pairs)},
        {&decoder->parts, decoder->threads * decoder->part_floats},
    };
    const int places = (int)(sizeof plan / sizeof *plan);
    int64_t floats = 0;
    for (int i = 0; i < places; i++) floats += plan[i].floats;
    decoder->scratch = cvxq_arena_new((size_t)floats * sizeof(float));
    if (decoder->scratch == NULL) return 1;
    decoder->scratch_floats = floats;
    float *next = decoder->scratch;
    for (int i = 0; i < places; i++) {
        *plan[i].place = next;
        next += plan[i].floats;
    }
    return 0;
}

static int64_t block_floats(const cvxq_decoder *decoder) {
    const cvxq_decoder_shape *s = &decoder->shape;
    return (int64_t)s->layers * s->kv_heads * CVXQ_BLOCK * (s->head_dim + padded(s->head_dim));
}

cvxq_decoder *cvxq_decoder_new(cvxq_pool *pool, const cvxq_decoder_shape *shape,
                               const cvxq_layer *layers) {
    cvxq_decoder *decoder = calloc(1, sizeof *decoder);
    if (decoder == NULL) return NULL;
    decoder->shape = *shape;
    decoder->pool = pool;
    decoder->math = best_math();
    decoder->threads = cvxq_pool_threads(pool);
    decoder->blocks = (shape->capacity + CVXQ_BLOCK - 1) / CVXQ_BLOCK;
    const size_t pointers = (size_t)shape->layers * shape->kv_heads * decoder->blocks;
    decoder->layers = malloc((size_t)shape->layers * sizeof *layers);
    decoder->ropes = malloc((size_t)(shape->ropes + 1) * sizeof *decoder->ropes);
    decoder->memory = calloc(decoder->blocks, sizeof *decoder->memory);
    decoder->keys = calloc(pointers, sizeof *decoder->keys);
    decoder->values = calloc(pointers, sizeof *decoder->values);
    if (decoder->layers != NULL && decoder->ropes != NULL && decoder->memory != NULL &&
        decoder->keys != NULL && decoder->values != NULL) {
        memcpy(decoder->layers, layers, (size_t)shape->layers * sizeof *layers);
        if (shape->ropes)
            memcpy(decoder->ropes, shape->rope, (size_t)shape->ropes * sizeof *shape->rope);
        decoder->shape.rope = decoder->ropes;
        if (!reserve_scratch(decoder)) return decoder;
    }
    cvxq_decoder_free(decoder);
    return NULL;
}

void cvxq_decoder_free(cvxq_decoder *decoder) {
    if (decoder == NULL) return;
    cvxq_pool_settle(decoder->pool); /* a late thread may still read it */
    for (int i = 0; i < decoder->held; i++)
        cvxq_arena_free(decoder->memory[i], (size_t)block_floats(decoder) * sizeof(float));
    free(decoder->memory);
    free(decoder->keys);
    free(decoder->values);
    free(decoder->layers);
    free(decoder->ropes);
    free(decoder->picks);
    free(decoder->routes);
    if (decoder->scratch != NULL)
        cvxq_arena_free(decoder->scratch, (size_t)decoder->scratch_floats * sizeof(float));
    free(decoder);
}

int cvxq_decoder_hold(cvxq_decoder *decoder, int64_t positions) {
    const cvxq_decoder_shape *s = &decoder->shape;
    const int key_floats = CVXQ_BLOCK * s->head_dim;
    const int value_floats = CVXQ_BLOCK * padded(s->head_dim);
    while ((int64_t)decoder->held * CVXQ_BLOCK < positions) {
        const int block = decoder->held;
        float *memory = cvxq_arena_new((size_t)block_floats(decoder) * sizeof(float));
        if (memory == NULL) return 1;
        float *next = memory;
        for (int i = 0; i < s->layers * s->kv_heads; i++) {
            decoder->keys[(int64_t)i * decoder->blocks + block] = next;
            decoder->values[(int64_t)i * decoder->blocks + block] = next + key_floats;
            next += key_floats + value_floats;
        }
        decoder->memory[block] = memory;
        decoder->held++;
    }
    return 0;
}

int cvxq_decoder_copy(cvxq_decoder *decoder, const cvxq_decoder *from, int64_t count) {
    const int blocks = (int)ceil_div(count, CVXQ_BLOCK);
    if (count < 0 || blocks > from->held || block_floats(decoder) != block_floats(from)) return 2;
    if (cvxq_decoder_hold(decoder, count)) return 1;
    for (int i = 0; i < blocks; i++)
        memcpy(decoder->memory[i], from->memory[i], (size_t)block_floats(from) * sizeof(float));
    decoder->is_long = from->is_long;
    return 0;
}

int64_t cvxq_decoder_bytes(const cvxq_decoder *decoder) {
    const size_t block = cvxq_arena_taken((size_t)block_floats(decoder) * sizeof(float));
    return decoder->held * (int64_t)block + decoder->scratch_floats * (int64_t)sizeof(float);
}
