/* Steps of a layer whose feed-forward block is a choice among many: which experts each token goes
 * through, and their work. A route is one token through one expert; routes are sorted by expert, and
 * taken an expert at a time, so that its matrices are read once. A single token takes a few experts
 * at once instead, so that there is enough to do for all threads. */
#include <math.h>
#include <string.h>

#include "decoder_state.h"

static const float *block_input(const cvxq_decoder *decoder) {
    return layer_of(decoder)->is_parallel ? decoder->beside : decoder->input;
}

void cvxq_decoder_score(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder);
    (void)work;
    if (layer->experts != NULL)
        cvxq_decoder_multiply(decoder, &layer->router, 1, block_input(decoder), decoder->count,
                              &decoder->scores);
}

/* The experts with the highest scores, in falling order, and their shares. NaN is never high. */
static void choose_row(const void *context, int64_t row, int thread) {
    const cvxq_decoder *decoder = decoder_of(context);
    const cvxq_layer *layer = layer_of(decoder);
    const int count = layer->expert_count, chosen = layer->chosen;
    float *scores = decoder->scores + row * count, *shares = decoder->shares + row * chosen;
    int32_t *picks = decoder->picks + row * chosen;
    float total = 0, most = 0;
    (void)thread;
    for (int i = 0; i < chosen; i++) {
        int best = -1;
        for (int e = 0; e < count; e++) {
            int taken = 0;
            for (int j = 0; j < i; j++) taken |= picks[j] == e;
            if (!taken && (best < 0 || scores[e] > scores[best])) best = e;
        }
        picks[i] = best;
        if (i == 0) most = scores[best];
        shares[i] = expf(scores[best] - most);
        total += shares[i];
    }
    if (layer->shares_of_all) {
        total = 0;
        for (int e = 0; e < count; e++) total += expf(scores[e] - most);
    }
    for (int i = 0; i < chosen; i++) shares[i] /= total;
}

void cvxq_decoder_choose(cvxq_decoder *decoder, cvxq_work *work) {
    if (layer_of(decoder)->experts != NULL)
        cvxq_decoder_share(decoder, work, choose_row, decoder->count);
}

static int routes_of(const cvxq_decoder *decoder) {
    return decoder->count * layer_of(decoder)->chosen;
}

static int expert_of(const cvxq_decoder *decoder, int route) {
    return decoder->picks[decoder->routes[route]];
}

static int64_t token_of(const cvxq_decoder *decoder, int route) {
    return decoder->routes[route] / layer_of(decoder)->chosen;
}

void cvxq_decoder_order(cvxq_decoder *decoder, cvxq_work *work) {
    const cvxq_layer *layer = layer_of(decoder);
    (void)work;
    if (layer->experts == NULL) return;
    const int routes = routes_of(decoder);
    int next = 0;
    for (int e = 0; next < routes; e++)
        for (int i = 0; i < routes; i++)
            if (decoder->picks[i] == e) decoder->routes[next++] = i;
    decoder->at = 0;
    memset(decoder->branch, 0, (size_t)decoder->count * decoder->shape.hidden * sizeof(float));
}

/* Inputs of the routes in work, one after the other, where the results will be. */
static void take_row(const void *context, int64_t row, int thread) {
    const cvxq_decoder *decoder = decoder_of(context);
    const int hidden = decoder->shape.hidden;
    (void)thread;
    memcpy(decoder->outputs + row * hidden,
           block_input(decoder) + token_of(decoder, decoder->at + (int)row) * hidden,
           (size_t)hidden * sizeof(float));
}

void cvxq_decoder_take(cvxq_decoder *decoder, cvxq_work *work) {
    if (layer_of(decoder)->experts == NULL) return;
    const int routes = routes_of(decoder), at = decoder->at;
    if (decoder->count == 1) {
        decoder->taken = (int)min_of(TOGETHER, routes - at);
        return;
    }
    int taken = 1;
    while (at + taken < routes && expert_of(decoder, at + taken) == expert_of(decoder, at)) taken++;
    decoder->taken = taken;
    cvxq_decoder_share(decoder, work, take_row, taken);
}

void cvxq_decoder_experts_up(cvxq_decoder *decoder) {
    const int together = decoder->count == 1 ? decoder->taken : 1, ffn = decoder->shape.ffn;
    const float *input = decoder->count == 1 ? block_input(decoder) : decoder->outputs;
    const cvxq_matrix *weights[MOST_FACTORS] = {NULL};
    float *results[MOST_FACTORS] = {NULL};
    int count = 0;
    for (int i = 0; i < together; i++) {
        const cvxq_expert *expert = layer_of(decoder)->experts +
                                    expert_of(decoder, decoder->at + i);
        weights[count] = expert->up;
        results[count++] = decoder->up + (int64_t)i * ffn;
        if (expert->gate == NULL) continue;
        weights[count] = expert->gate;
        results[count++] = decoder->gate + (int64_t)i * ffn;
    }
    cvxq_decoder_multiply(decoder, weights, count, input, decoder->taken / together, results);
}

void cvxq_decoder_experts_down(cvxq_decoder *decoder) {
    const cvxq_layer *layer = layer_of(decoder);
    const int together = decoder->count == 1 ? decoder->taken : 1;
    const float *inner = layer->experts->gate != NULL ? decoder->gate : decoder->up;
    const cvxq_matrix *weights[TOGETHER] = {NULL};
    float *results[TOGETHER] = {NULL};
    for (int i = 0; i < together; i++) {
        weights[i] = layer->experts[expert_of(decoder, decoder->at + i)].down;
        results[i] = decoder->outputs + (int64_t)i * decoder->shape.hidden;
    }
    cvxq_decoder_multiply(decoder, weights, together, inner, decoder->taken / together, results);
    for (int i = 1; i < together; i++)
        cvxq_product_read(&decoder->product, i, inner + (int64_t)i * decoder->shape.ffn);
}

/* Add what an expert made of a token to the branch. */
static void give_row(const void *context, int64_t row, int thread) {
    const cvxq_decoder *decoder = decoder_of(context);
    const int hidden = decoder->shape.hidden, route = decoder->at + (int)row;
    (void)thread;
    decoder->math->add(decoder->branch + token_of(decoder, route) * hidden,
                       decoder->outputs + row * hidden, decoder->shares[decoder->routes[route]],
                       hidden);
}

void cvxq_decoder_give(cvxq_decoder *decoder, cvxq_work *work) {
    if (layer_of(decoder)->experts == NULL) return;
    if (decoder->count > 1) {
        cvxq_decoder_share(decoder, work, give_row, decoder->taken); /* of different tokens */
        return;
    }
    for (int row = 0; row < decoder->taken; row++) give_row(&decoder, row, 0);
}

int cvxq_decoder_again(cvxq_decoder *decoder) {
    if (layer_of(decoder)->experts == NULL) return 0;
    decoder->at += decoder->taken;
    return decoder->at < routes_of(decoder);
}
