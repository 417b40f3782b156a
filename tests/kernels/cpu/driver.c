/* Every instruction set on small matrices whose memory ends where their data end, for sanitizers.
 * Prints nothing and returns 0 if products are close to those computed here in double precision. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cvxq.h"

static uint32_t state = 1;
static uint32_t next(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

/* A copy that ends with its block, so that one byte too far is an error. */
static void *exact_block(size_t bytes) {
    void *block = malloc(bytes ? bytes : 1);
    if (!block) abort();
    return block;
}

static int check(cvxq_pool *pool, int rows, int columns, int group, int transposed, int many) {
    const int clusters = (rows + group - 1) / group;
    const size_t groups = (size_t)clusters * (size_t)columns;
    uint8_t *depths = exact_block(groups), *scale_codes = exact_block(groups);
    int8_t *mean_codes = exact_block(groups);
    float scales[256], means[256], levels[512] = {0};
    for (int i = 0; i < 256; i++) scales[i] = 0.01f * (float)(i + 1);
    for (int i = 0; i < 256; i++) means[i] = 0.01f * (float)(i - 128);
    for (int b = 1; b <= 8; b++)
        for (int q = 0; q < 1 << b; q++)
            levels[(1 << b) + q] = ((float)q + 0.5f) / (float)(1 << b) * 4 - 2;
    size_t bytes = 0;
    for (size_t g = 0; g < groups; g++) {
        const int first = (int)(g / (size_t)columns) * group;
        const int height = rows - first < group ? rows - first : group;
        depths[g] = (uint8_t)(many ? next() % 9 : (g % (size_t)columns) * 9 / (size_t)columns);
        scale_codes[g] = (uint8_t)next();
        mean_codes[g] = (int8_t)next();
        bytes += (size_t)(depths[g] * ((height + 7) / 8));
    }
    uint8_t *codes = exact_block(bytes);
    float *weights = calloc((size_t)rows * (size_t)columns, sizeof(float));
    uint8_t *at = codes;
    for (size_t g = 0; g < groups; g++) {
        const int column = (int)(g % (size_t)columns), first = (int)(g / (size_t)columns) * group;
        const int height = rows - first < group ? rows - first : group, plane = (height + 7) / 8;
        memset(at, 0, (size_t)(depths[g] * plane));
        for (int r = 0; r < height; r++) {
            const uint32_t code = next() & ((1u << depths[g]) - 1);
            for (int b = 0; b < depths[g]; b++)
                at[b * plane + r / 8] |= (uint8_t)((code >> b & 1) << (r % 8));
            weights[(first + r) * columns + column] =
                scales[scale_codes[g]] *
                (levels[(1 << depths[g]) + code] + (float)mean_codes[g] * means[129]);
        }
        at += depths[g] * plane;
    }
    // clang-format off
    const cvxq_companded source = {rows, columns, group, 1, transposed, depths, scale_codes,
                                   mean_codes, NULL, NULL, codes, (int64_t)bytes, NULL, 0,
                                   scales, means, levels, NULL, NULL, -1};
    // clang-format on
    cvxq_matrix *matrix = cvxq_matrix_pack(pool, &source);
    if (!matrix) return 1;
    const int n = transposed ? columns : rows, k = transposed ? rows : columns;
    const int batches[] = {1, 2, 3, 5, 40};
    int wrong = 0;
    for (int i = 0; i < 10; i++) {
        const int m = batches[i / 2];
        float *x = exact_block(sizeof(float) * (size_t)(m * k));
        float *y = exact_block(sizeof(float) * (size_t)(m * n));
        for (int j = 0; j < m * k; j++) x[j] = (float)(int)(next() % 2001) / 1000 - 1;
        cvxq_matmul(pool, (const cvxq_matrix *const[]){matrix}, 1, x, m, (float *const[]){y},
                    i & 1);
        for (int a = 0; a < m * n; a++) {
            double sum = 0, size = 0;
            for (int j = 0; j < k; j++) {
                const int row = transposed ? j : a % n, column = transposed ? a % n : j;
                const double product = (double)x[a / n * k + j] * weights[row * columns + column];
                sum += product;
                size += fabs(product);
            }
            wrong += !(fabs(y[a] - sum) <= 0.03 * size + 1e-5);
        }
        free(x);
        free(y);
    }
    float *row = exact_block(sizeof(float) * (size_t)k);
    const int64_t last = n - 1;
    cvxq_rows(pool, matrix, &last, 1, row);
    cvxq_matrix_free(matrix);
    free(row), free(weights), free(codes), free(mean_codes), free(scale_codes), free(depths);
    if (wrong) fprintf(stderr, "%s: %d values off\n", cvxq_isa(), wrong);
    return wrong;
}

int main(void) {
    const char *names[] = {"scalar", "avx2", "avx512", "neon"};
    int wrong = 0;
    cvxq_pool *pool = cvxq_pool_new(3);
    for (int i = 0; i < 4; i++) {
        if (!cvxq_force_isa(names[i])) continue;
        wrong += check(pool, 64, 130, 64, 0, 0);
        wrong += check(pool, 101, 71, 48, 0, 1);
        wrong += check(pool, 1, 1, 1, 0, 1);
        wrong += check(pool, 70, 45, 32, 1, 1);
        wrong += check(pool, 17, 300, 300, 0, 0);
    }
    cvxq_pool_free(pool);
    return wrong != 0;
}
