/* One function for each type of dense weights and number of inputs at once, out of multiply_row(dtype,
 * batch, …), which is inlined with both constant, and the choice among them. */
#define DENSE_OF(DTYPE, BATCH_)                                                                   \
    TARGET static void multiply_##DTYPE##_##BATCH_(const void *row, int64_t inputs,               \
                                                   const float *x, int64_t stride, float *sums) { \
        multiply_row(CVXQ_##DTYPE, BATCH_, row, inputs, x, stride, sums);                         \
    }
#define DENSE_BATCHES(DTYPE) DENSE_OF(DTYPE, 1) DENSE_OF(DTYPE, 2) DENSE_OF(DTYPE, 4)
DENSE_BATCHES(BF16)
DENSE_BATCHES(F16)
DENSE_BATCHES(F32)

#define DENSE_ROW(DTYPE) {multiply_##DTYPE##_1, multiply_##DTYPE##_2, multiply_##DTYPE##_4}

static void multiply_dense(const void *row, int dtype, int64_t inputs, const float *x,
                           int64_t stride, int batch, float *sums) {
    typedef void (*dense_function)(const void *, int64_t, const float *, int64_t, float *);
    static const dense_function functions[3][3] = {DENSE_ROW(BF16), DENSE_ROW(F16), DENSE_ROW(F32)};
    functions[dtype][batch >> 1](row, inputs, x, stride, sums);
}
