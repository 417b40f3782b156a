/* Products of bfloat16 on Intel's matrix unit (AMX); for wide_bf16.c only. */
#ifndef CVXQ_WIDE_TILES_H
#define CVXQ_WIDE_TILES_H

#include "wide_bf16.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the processor has the unit and the system lends it. */
static int has_tiles(void) {
    static atomic_int known; /* 0 not asked yet, 1 no, 2 yes */
    int state = atomic_load(&known);
    if (!state) {
        enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
        unsigned a, b, c, d;
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        const int has = (d >> 24 & 1) && (d >> 22 & 1); /* amx-tile, amx-bf16 */
        state = has && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 2 : 1;
        atomic_store(&known, state);
    }
    return state == 2;
}
#else
static int has_tiles(void) { return 0; }
#endif

INLINE void begin_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = 16;
    }
    /* Not _tile_loadconfig, which up to GCC 14 claims to read eight bytes only. */
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}

INLINE void end_tiles(void) { _tile_release(); }

/* Sums of 32 inputs and one or two strips += inputs · weights of one step. */
#define MULTIPLY(x, w)                             \
    do {                                           \
        _tile_loadd(4, x, 2 * STEP);               \
        _tile_loadd(5, (x) + 16 * STEP, 2 * STEP); \
        _tile_loadd(6, w, PAIR);                   \
        _tile_dpbf16ps(0, 4, 6);                   \
        _tile_dpbf16ps(1, 5, 6);                   \
        if (is_pair) {                             \
            _tile_loadd(7, (w) + VECTOR, PAIR);    \
            _tile_dpbf16ps(2, 4, 7);               \
            _tile_dpbf16ps(3, 5, 7);               \
        }                                          \
    } while (0)

INLINE void tile_block(const batch_state *b, int64_t steps, int64_t m, int strip,
                       const int is_pair) {
    enum { ROW = TILE * sizeof(float) };
    float *sums = b->sums + m * TILE + strip * STRIP;
    if (b->is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, ROW);
        _tile_loadd(1, sums + 16 * TILE, ROW);
        if (is_pair) {
            _tile_loadd(2, sums + STRIP, ROW);
            _tile_loadd(3, sums + 16 * TILE + STRIP, ROW);
        }
    }
    for (int64_t s = 0; s < steps; s++) {
        const int64_t at = ((b->first + s) * b->stride + m) * STEP;
        const int64_t place = s * PAIRS * PAIR + strip * VECTOR;
        MULTIPLY(b->high + at, b->weights + place);
        if (b->first + s < b->split) continue;
        MULTIPLY(b->high + at, b->rest + place);
        MULTIPLY(b->low + at, b->weights + place);
    }
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + 16 * TILE, ROW);
    if (is_pair) {
        _tile_stored(2, sums + STRIP, ROW);
        _tile_stored(3, sums + 16 * TILE + STRIP, ROW);
    }
}

TARGET static void multiply_by_tiles(const batch_state *b, int64_t steps) {
    for (int64_t m = 0; m < b->rows; m += TILE_INPUTS) {
        if (b->strips == 1) {
            tile_block(b, steps, m, 0, 0);
        } else {
            for (int strip = 0; strip < b->strips; strip += 2) tile_block(b, steps, m, strip, 1);
        }
    }
}

#endif
