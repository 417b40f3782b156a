/* The inner loops, written once; each instruction set includes this file after defining
 *
 *   TARGET, INLINE    attribute that lets a function use the set; the same, always inlined
 *   codes_t           one code vector or the levels of one, 64 bytes
 *   sums_t            16 int32 sums, one per row of a strip
 *   inputs_t          four inputs, as `dot` wants them
 *   sums_of(n), inputs_at(p), dot(sums, levels, inputs)
 *   decode_1 … decode_4(unit, tables, levels[8])          narrow depths
 *   decode_5 … decode_8(unit, tables, high[8], low[8])    wide depths
 *   add_sums(out, sums, scale)                  out[16] += scale · sums
 *   add_sums2(out, sums, sums2, scale)          out[16] += scale · (256 · sums + sums2)
 *   fetch(p)                                    line at p to the second cache, if it can be had
 *
 * Every loop is inlined with constant depth, strips and batch, so that sums stay in registers; RUNS
 * holds one function for each choice. With ONE_INPUT defined there is none for 2 and 4 inputs at
 * once: compilers choke on that where a register holds little.
 */
#define UNROLL _Pragma("GCC unroll 16")

enum { PAGE = 4096, LINE = 64, STREAMS = 8, REGION = STREAMS * PAGE };

/* Fetch as many lines as a unit at `unit` has, a region ahead: line 0 of each of its pages, then
 * line 1 and so on. Processors recognize one stream per page and run ahead of it only inside that
 * page, so that eight at once keep more of the memory busy than one: on two cores of a Sapphire
 * Rapids one stream each reads 16 GB/s, eight read 24. Every line is asked for once. */
INLINE void fetch_ahead(const uint8_t *unit, const int lines) {
    UNROLL for (int i = 0; i < lines; i++) {
        const uintptr_t at = (uintptr_t)unit + LINE * (uintptr_t)i, line = at % REGION / LINE;
        const uintptr_t next = at / REGION * REGION + REGION;
        fetch((const uint8_t *)(next + line % STREAMS * PAGE + line / STREAMS * LINE));
    }
}

typedef struct {
    const uint8_t *codes;
    const cvxq_tables *tables;
    const cvxq_input *inputs;
    int64_t block;   /* first block of the run */
    int64_t columns; /* of the run */
    float *sums;     /* (batch, 64) */
} run_job;

/* Depths 1–4: one 8-bit dot product per four weights. */
#define NARROW_RUN(DEPTH)                                                                         \
    INLINE void run_##DEPTH(const run_job *job, const int strips, const int batch) {              \
        const int per_unit = 4 * UNIT / strips;                                                   \
        const uint8_t *unit = job->codes;                                                         \
        int64_t block = job->block;                                                               \
        for (int64_t left = job->columns; left > 0; left -= BLOCK, block++) {                     \
            const int64_t units = (min_of(left, BLOCK) + per_unit - 1) / per_unit;                \
            sums_t sums[BATCH][4];                                                                \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)        \
                sums[m][s] = sums_of(job->inputs[m].start[block]);                                \
            for (int64_t u = 0; u < units; u++, unit += 64 * DEPTH) {                             \
                codes_t levels[UNIT];                                                             \
                fetch_ahead(unit, DEPTH);                                                         \
                decode_##DEPTH(unit, job->tables, levels);                                        \
                UNROLL for (int q = 0; q < UNIT / strips; q++)                                    \
                    UNROLL for (int m = 0; m < batch; m++) {                                      \
                        const int64_t at = block * BLOCK + u * per_unit + 4 * q;                  \
                        const inputs_t x = inputs_at(job->inputs[m].high + at);                   \
                        UNROLL for (int s = 0; s < strips; s++)                                   \
                            sums[m][s] = dot(sums[m][s], levels[q * strips + s], x);              \
                    }                                                                             \
            }                                                                                     \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)        \
                add_sums(job->sums + m * TILE + s * STRIP, sums[m][s],                            \
                         job->inputs[m].scale[block]);                                            \
        }                                                                                         \
    }

/* Depths 5–8: high · high, and high · low + low · high; low · low is below the rounding. */
#define WIDE_RUN(DEPTH)                                                                           \
    INLINE void run_##DEPTH(const run_job *job, const int strips, const int batch) {              \
        const int per_unit = 4 * UNIT / strips;                                                   \
        const uint8_t *unit = job->codes;                                                         \
        int64_t block = job->block;                                                               \
        for (int64_t left = job->columns; left > 0; left -= BLOCK, block++) {                     \
            const int64_t units = (min_of(left, BLOCK) + per_unit - 1) / per_unit;                \
            sums_t sums[BATCH][4], sums2[BATCH][4];                                               \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++) {      \
                sums[m][s] = sums_of(job->inputs[m].start[block]);                                \
                sums2[m][s] = sums_of(job->inputs[m].start2[block]);                              \
            }                                                                                     \
            for (int64_t u = 0; u < units; u++, unit += 64 * DEPTH) {                             \
                codes_t high[UNIT], low[UNIT];                                                    \
                fetch_ahead(unit, DEPTH);                                                         \
                decode_##DEPTH(unit, job->tables, high, low);                                     \
                UNROLL for (int q = 0; q < UNIT / strips; q++)                                    \
                    UNROLL for (int m = 0; m < batch; m++) {                                      \
                        const int64_t at = block * BLOCK + u * per_unit + 4 * q;                  \
                        const inputs_t xh = inputs_at(job->inputs[m].high + at);                  \
                        const inputs_t xl = inputs_at(job->inputs[m].low + at);                   \
                        UNROLL for (int s = 0; s < strips; s++) {                                 \
                            const int v = q * strips + s;                                         \
                            sums[m][s] = dot(sums[m][s], high[v], xh);                            \
                            sums2[m][s] = dot(sums2[m][s], high[v], xl);                          \
                            sums2[m][s] = dot(sums2[m][s], low[v], xh);                           \
                        }                                                                         \
                    }                                                                             \
            }                                                                                     \
            UNROLL for (int m = 0; m < batch; m++) UNROLL for (int s = 0; s < strips; s++)        \
                add_sums2(job->sums + m * TILE + s * STRIP, sums[m][s], sums2[m][s],              \
                          job->inputs[m].scale[block]);                                           \
        }                                                                                         \
    }

NARROW_RUN(1)
NARROW_RUN(2)
NARROW_RUN(3)
NARROW_RUN(4)
WIDE_RUN(5)
WIDE_RUN(6)
WIDE_RUN(7)
WIDE_RUN(8)

#define RUNS_OF(STRIPS, DEPTH, BATCH_)                                                            \
    TARGET static void run_##STRIPS##_##DEPTH##_##BATCH_(const run_job *job) {                    \
        run_##DEPTH(job, STRIPS, BATCH_);                                                         \
    }
#ifdef ONE_INPUT
#define BATCHES_OF(STRIPS, DEPTH) RUNS_OF(STRIPS, DEPTH, 1)
#else
#define BATCHES_OF(STRIPS, DEPTH) \
    RUNS_OF(STRIPS, DEPTH, 1) RUNS_OF(STRIPS, DEPTH, 2) RUNS_OF(STRIPS, DEPTH, 4)
#endif
#define DEPTHS_OF(STRIPS)                                                                         \
    BATCHES_OF(STRIPS, 1) BATCHES_OF(STRIPS, 2) BATCHES_OF(STRIPS, 3) BATCHES_OF(STRIPS, 4)       \
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
#define ROWS(STRIPS)                                                                              \
    {ROW(STRIPS, 1), ROW(STRIPS, 2), ROW(STRIPS, 3), ROW(STRIPS, 4),                              \
     ROW(STRIPS, 5), ROW(STRIPS, 6), ROW(STRIPS, 7), ROW(STRIPS, 8)}
typedef void (*run_function)(const run_job *);
static const run_function RUNS[3][8][3] = {ROWS(1), ROWS(2), ROWS(4)}; /* log2 strips, log2 batch */

static void multiply_inputs(const cvxq_matrix *w, const cvxq_cluster *cluster,
                            const cvxq_tile *tile, const cvxq_input *inputs, int batch,
                            float *sums) {
    const int strips = tile->strips;
    run_job job = {w->codes + tile->codes, w->tables, inputs, 0, 0, sums};
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
