/* One function for each depth, number of strips and of inputs at once, out of run_1 … run_8(job,
 * strips, batch), and the products of a tile by them.
 *
 * Every loop is inlined with constant depth, strips and batch, so that sums stay in registers; RUNS
 * holds one function for each choice. With ONE_INPUT defined there is none for 2 and 4 inputs at
 * once: compilers choke on that where a register holds little.
 */
#define RUNS_OF(STRIPS, DEPTH, BATCH_)                                         \
    TARGET static void run_##STRIPS##_##DEPTH##_##BATCH_(const run_job *job) { \
        run_##DEPTH(job, STRIPS, BATCH_);                                      \
    }
#ifdef ONE_INPUT
#define BATCHES_OF(STRIPS, DEPTH) RUNS_OF(STRIPS, DEPTH, 1)
#else
#define BATCHES_OF(STRIPS, DEPTH) \
    RUNS_OF(STRIPS, DEPTH, 1) RUNS_OF(STRIPS, DEPTH, 2) RUNS_OF(STRIPS, DEPTH, 4)
#endif
#define DEPTHS_OF(STRIPS) \
    BATCHES_OF(STRIPS, 1) \
    BATCHES_OF(STRIPS, 2) \
    BATCHES_OF(STRIPS, 3) \
    BATCHES_OF(STRIPS, 4) \
    BATCHES_OF(STRIPS, 5) BATCHES_OF(STRIPS, 6) BATCHES_OF(STRIPS, 7) BATCHES_OF(STRIPS, 8)
DEPTHS_OF(1)
DEPTHS_OF(2)
DEPTHS_OF(4)

#ifdef ONE_INPUT
#define ROW(STRIPS, DEPTH) {run_##STRIPS##_##DEPTH##_1}
#else
#define ROW(STRIPS, DEPTH) \
    {run_##STRIPS##_##DEPTH##_1, run_##STRIPS##_##DEPTH##_2, run_##STRIPS##_##DEPTH##_4}
#endif
#define ROWS(STRIPS)                                                 \
    {ROW(STRIPS, 1), ROW(STRIPS, 2), ROW(STRIPS, 3), ROW(STRIPS, 4), \
     ROW(STRIPS, 5), ROW(STRIPS, 6), ROW(STRIPS, 7), ROW(STRIPS, 8)}
typedef void (*run_function)(const run_job *);
static const run_function RUNS[3][8][3] = {ROWS(1), ROWS(2), ROWS(4)}; /* log2 strips, log2 batch */

static void multiply_inputs(const cvxq_matrix *w, const cvxq_cluster *cluster,
                            const cvxq_tile *tile, const cvxq_input *inputs, int batch,
                            float *sums) {
    const int strips = tile->strips;
    run_job job = {w->codes + tile->codes, w->tables, inputs, 0, 0, sums, cvxq_fetches_by_page()};
    memset(sums, 0, sizeof(float) * TILE * (size_t)batch);
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        if (!run->depth) continue;
        job.columns = run->count;
        RUNS[strips >> 1][run->depth - 1][batch >> 1](&job);
        job.codes += ceil_div(run->count, unit_columns(strips)) * VECTOR * run->depth;
        job.block += ceil_div(run->count, BLOCK);
    }
}

static void multiply_tile(const cvxq_matrix *w, const cvxq_cluster *cluster, const cvxq_tile *tile,
                          const cvxq_input *inputs, int batch, float *sums) {
#ifdef ONE_INPUT
    for (int b = 0; b < batch; b++)
        multiply_inputs(w, cluster, tile, inputs + b, 1, sums + b * TILE);
#else
    multiply_inputs(w, cluster, tile, inputs, batch, sums);
#endif
}
