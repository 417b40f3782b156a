/* The kernel in portable C, for processors without a version of their own. */
#include "internal.h"

/* sums (batch, strips, 16) += levels · inputs for one code vector. */
static void dot(int32_t *sums, const uint8_t *levels, const int8_t *x) {
    for (int i = 0; i < STRIP; i++)
        for (int j = 0; j < 4; j++) sums[i] += levels[4 * i + j] * x[j];
}

static void look_up(const uint8_t codes[UNIT][VECTOR], const uint8_t *table,
                    uint8_t levels[UNIT][VECTOR]) {
    for (int v = 0; v < UNIT; v++)
        for (int j = 0; j < VECTOR; j++) levels[v][j] = table[codes[v][j]];
}

typedef struct {
    int32_t first[TILE], second[TILE]; /* high · high; high · low + low · high */
} tile_sums;

static void multiply_unit(const cvxq_tables *t, int depth, const uint8_t *unit, int strips,
                          const int8_t *high, const int8_t *low, tile_sums *sums) {
    const uint8_t *narrow[] = {t->narrow1[0], t->narrow2[0], t->narrow3[0], t->narrow4};
    uint8_t codes[UNIT][VECTOR], levels[UNIT][VECTOR], lower[UNIT][VECTOR];
    cvxq_unpack_unit(depth, unit, codes);
    look_up(codes, depth <= NARROW ? narrow[depth - 1] : t->high[depth - 5], levels);
    if (depth > NARROW) look_up(codes, t->low[depth - 5], lower);
    for (int v = 0; v < UNIT; v++) {
        const int strip = v % strips * STRIP, quad = v / strips * 4;
        dot(sums->first + strip, levels[v], high + quad);
        if (depth <= NARROW) continue;
        dot(sums->second + strip, levels[v], low + quad);
        dot(sums->second + strip, lower[v], high + quad);
    }
}

static void multiply_run(const cvxq_matrix *w, const cvxq_run *run, const uint8_t *unit, int strips,
                         const cvxq_input *x, int64_t block, float *out) {
    const int64_t per_unit = unit_columns(strips);
    for (int64_t left = run->count; left > 0; left -= BLOCK, block++) {
        const int is_wide = run->depth > NARROW;
        tile_sums sums;
        for (int i = 0; i < TILE; i++) {
            sums.first[i] = x->start[block];
            sums.second[i] = is_wide ? x->start2[block] : 0;
        }
        for (int64_t at = block * BLOCK; at < block * BLOCK + min_of(left, BLOCK);
             at += per_unit, unit += VECTOR * run->depth)
            multiply_unit(w->tables, run->depth, unit, strips, x->high + at, x->low + at, &sums);
        for (int i = 0; i < strips * STRIP; i++) {
            const float sum = (float)sums.first[i];
            out[i] += x->scale[block] * (is_wide ? 256.0f * sum + (float)sums.second[i] : sum);
        }
    }
}

static void multiply_tile(const cvxq_matrix *w, const cvxq_cluster *cluster, const cvxq_tile *tile,
                          const cvxq_input *inputs, int batch, float *sums) {
    memset(sums, 0, sizeof(float) * TILE * (size_t)batch);
    for (int b = 0; b < batch; b++) {
        const uint8_t *unit = w->codes + tile->codes;
        int64_t block = 0;
        for (int32_t r = 0; r < cluster->runs; r++) {
            const cvxq_run *run = &w->runs[cluster->first_run + r];
            if (!run->depth) continue;
            multiply_run(w, run, unit, tile->strips, &inputs[b], block, sums + b * TILE);
            unit += ceil_div(run->count, unit_columns(tile->strips)) * VECTOR * run->depth;
            block += ceil_div(run->count, BLOCK);
        }
    }
}

static void multiply_dense(const void *row, int dtype, int64_t inputs, const float *x,
                           int64_t stride, int batch, float *sums) {
    for (int m = 0; m < batch; m++) {
        float lanes[STRIP] = {0};
        for (int64_t k = 0; k < inputs; k++)
            lanes[k % STRIP] += cvxq_widen(row, dtype, k) * x[m * stride + k];
        sums[m] = 0;
        for (int i = 0; i < STRIP; i++) sums[m] += lanes[i];
    }
}

const cvxq_ops cvxq_ops_scalar = {"scalar", cvxq_prepare_portable, multiply_tile, multiply_dense,
                                  NULL};
