/* What the loops over one run of a tile share, whatever the instruction set: the job, reading ahead,
 * and, in tile_table.h, the choice among the loops.
 *
 * Whoever includes this file has defined TARGET and INLINE, attributes that let a function use the
 * set, the latter always inlined, and fetch(p), which brings the line at p to the second cache if it
 * can be had.
 */
#ifndef CVXQ_TILE_H
#define CVXQ_TILE_H

#define UNROLL _Pragma("GCC unroll 16")

enum { PAGE = 4096, LINE = 64, STREAMS = 8, REGION = STREAMS * PAGE, AHEAD = 2 * PAGE };

/* Bring `count` lines in a row to the first cache. */
INLINE void fetch_lines(const uint8_t *from, const int count) {
    UNROLL for (int i = 0; i < count; i++) __builtin_prefetch(from + LINE * i, 0, 3);
}

/* Fetch as many lines as a unit at `unit` has. By page: a region ahead, line 0 of each of its pages,
 * then line 1 and so on. Processors recognize one stream per page and run ahead of it only inside
 * that page, so that eight at once keep more of the memory busy than one: on two cores of a Sapphire
 * Rapids one stream each reads 16 GB/s, eight read 24. Every line is asked for once. A Zen 5 decodes
 * up to two fifths faster with lines in their order, few enough ahead for the first cache. */
INLINE void fetch_ahead(const uint8_t *unit, const int lines, const int by_page) {
    if (!by_page) {
        fetch_lines(unit + AHEAD, lines);
        return;
    }
    UNROLL for (int i = 0; i < lines; i++) {
        const uintptr_t at = (uintptr_t)unit + LINE * (uintptr_t)i, line = at % REGION / LINE;
        const uintptr_t next = at / REGION * REGION + REGION;
        fetch((const uint8_t *)(next + line % STREAMS * PAGE + line / STREAMS * LINE));
    }
}

/* The same for the lines from `from` to `to`, cheaper: as the eight that follow a multiple of STREAMS
 * lines are asked for together. */
INLINE void fetch_region(const uint8_t *from, const uint8_t *to) {
    const uintptr_t step = STREAMS * LINE;
    for (uintptr_t at = ((uintptr_t)from + step - 1) / step * step; at < (uintptr_t)to; at += step) {
        const uint8_t *next = (const uint8_t *)(at / REGION * REGION + REGION + at % REGION / STREAMS);
        UNROLL for (int page = 0; page < STREAMS; page++) fetch(next + page * PAGE);
    }
}

typedef struct {
    const uint8_t *codes;
    const cvxq_tables *tables;
    const cvxq_input *inputs;
    int64_t block;   /* first block of the run */
    int64_t columns; /* of the run */
    float *sums;     /* (batch, 64) */
    int by_page;     /* how what comes next is fetched */
} run_job;

#endif
