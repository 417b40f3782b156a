/* NEON: every 64-bit Arm processor.
 *
 * Tables of up to 64 levels fit one look-up in four registers; deeper codes take two or four, each
 * adding nothing for indices that are not its own. Products of signed bytes want signed levels:
 * levels lose their 128 here, and every quad of inputs brings 128 times its sum along instead.
 */
#include "internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#ifndef ONE_INPUT
#define ONE_INPUT
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    uint8x16_t part[4];
} codes_t;
typedef struct {
    int32x4_t part[4];
} sums_t;
typedef struct {
    int8x16_t quad;
    int32x4_t offset;
} inputs_t;

INLINE void fetch(const uint8_t *p) { __builtin_prefetch(p, 0, 2); }
INLINE codes_t load(const uint8_t *p) {
    return (codes_t){{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
INLINE sums_t sums_of(int32_t n) {
    return (sums_t){{vdupq_n_s32(n), vdupq_n_s32(n), vdupq_n_s32(n), vdupq_n_s32(n)}};
}
INLINE inputs_t inputs_at(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return (inputs_t){vreinterpretq_s8_s32(vdupq_n_s32(four)),
                      vdupq_n_s32(128 * (p[0] + p[1] + p[2] + p[3]))};
}
INLINE sums_t dot(sums_t sums, codes_t levels, inputs_t x) {
    for (int i = 0; i < 4; i++) {
        const int8x16_t level = vreinterpretq_s8_u8(veorq_u8(levels.part[i], vdupq_n_u8(128)));
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(level), vget_low_s8(x.quad)));
        const int32x4_t high = vpaddlq_s16(vmull_high_s8(level, x.quad));
        sums.part[i] = vaddq_s32(vaddq_s32(sums.part[i], x.offset), vpaddq_s32(low, high));
    }
    return sums;
}

INLINE codes_t field(codes_t codes, int shift, int mask) {
    for (int i = 0; i < 4; i++)
        codes.part[i] = vandq_u8(vshlq_u8(codes.part[i], vdupq_n_s8((int8_t)-shift)),
                                 vdupq_n_u8((uint8_t)mask));
    return codes;
}
INLINE codes_t join(codes_t a, codes_t b, int shift) {
    for (int i = 0; i < 4; i++)
        a.part[i] = vorrq_u8(a.part[i], vshlq_u8(b.part[i], vdupq_n_s8((int8_t)shift)));
    return a;
}
INLINE codes_t look(const uint8_t *table, codes_t index) {
    for (int i = 0; i < 4; i++) index.part[i] = vqtbl1q_u8(vld1q_u8(table), index.part[i]);
    return index;
}
INLINE codes_t look_wide(const uint8_t *table, int depth, codes_t index) {
    for (int i = 0; i < 4; i++) {
        uint8x16_t found = vdupq_n_u8(0);
        for (int from = 0; from < 1 << depth; from += 64)
            found = vqtbx4q_u8(found, vld1q_u8_x4(table + from),
                               vsubq_u8(index.part[i], vdupq_n_u8((uint8_t)from)));
        index.part[i] = found;
    }
    return index;
}

INLINE void decode_1(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    for (int i = 0; i < 8; i++) levels[i] = look(t->narrow1[0], field(load(unit), i, 1));
}
INLINE void decode_2(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    for (int i = 0; i < 8; i++)
        levels[i] = look(t->narrow2[0], field(load(unit + i / 4 * 64), i % 4 * 2, 3));
}
INLINE void decode_3(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    codes_t top = field(load(unit), 6, 3);
    for (int row = 0; row < 3; row++) {
        const codes_t a = load(unit + 64 * row);
        levels[2 * row] = look(t->narrow3[0], field(a, 0, 7));
        levels[2 * row + 1] = look(t->narrow3[0], field(a, 3, 7));
        if (row) top = join(top, field(a, 6, 3), 2 * row);
    }
    levels[6] = look(t->narrow3[0], field(top, 0, 7));
    levels[7] = look(t->narrow3[0], field(top, 3, 7));
}
INLINE void decode_4(const uint8_t *unit, const cvxq_tables *t, codes_t *levels) {
    for (int i = 0; i < 8; i++)
        levels[i] = look(t->narrow4, field(load(unit + i / 2 * 64), i % 2 * 4, 15));
}
INLINE void look_both(const cvxq_tables *t, int depth, codes_t index, codes_t *high, codes_t *low) {
    *high = look_wide(t->high[depth - 5], depth, index);
    *low = look_wide(t->low[depth - 5], depth, index);
}
INLINE void decode_5(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < 8; i++) {
        const codes_t nibble = field(load(unit + i / 2 * 64), i % 2 * 4, 15);
        look_both(t, 5, join(nibble, field(load(unit + 256), i, 1), 4), high + i, low + i);
    }
}
INLINE void decode_6(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < 8; i++) {
        const codes_t nibble = field(load(unit + i / 2 * 64), i % 2 * 4, 15);
        const codes_t top = field(load(unit + 256 + i / 4 * 64), i % 4 * 2, 3);
        look_both(t, 6, join(nibble, top, 4), high + i, low + i);
    }
}
INLINE void decode_7(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    codes_t last = field(load(unit), 7, 1);
    for (int i = 0; i < 7; i++) {
        const codes_t row = load(unit + 64 * i);
        look_both(t, 7, field(row, 0, 127), high + i, low + i);
        if (i) last = join(last, field(row, 7, 1), i);
    }
    look_both(t, 7, last, high + 7, low + 7);
}
INLINE void decode_8(const uint8_t *unit, const cvxq_tables *t, codes_t *high, codes_t *low) {
    for (int i = 0; i < 8; i++) look_both(t, 8, load(unit + 64 * i), high + i, low + i);
}

INLINE void add_sums(float *out, sums_t sums, float scale) {
    for (int i = 0; i < 4; i++)
        vst1q_f32(out + 4 * i,
                  vfmaq_n_f32(vld1q_f32(out + 4 * i), vcvtq_f32_s32(sums.part[i]), scale));
}
INLINE void add_sums2(float *out, sums_t sums, sums_t sums2, float scale) {
    for (int i = 0; i < 4; i++) {
        const float32x4_t sum = vfmaq_n_f32(vcvtq_f32_s32(sums2.part[i]),
                                            vcvtq_f32_s32(sums.part[i]), 256);
        vst1q_f32(out + 4 * i, vfmaq_n_f32(vld1q_f32(out + 4 * i), sum, scale));
    }
}

#include "tile_dots.h"

static void multiply_dense(const void *row, int dtype, int64_t inputs, const float *x,
                           int64_t stride, int batch, float *sums) {
    for (int m = 0; m < batch; m++, x += stride) {
        float32x4_t lanes[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
        int64_t k = 0;
        for (; k + 16 <= inputs; k += 16) {
            float wide[16];
            for (int i = 0; i < 16; i++) wide[i] = cvxq_widen(row, dtype, k + i);
            for (int i = 0; i < 4; i++)
                lanes[i] = vfmaq_f32(lanes[i], vld1q_f32(wide + 4 * i), vld1q_f32(x + k + 4 * i));
        }
        sums[m] =
            vaddvq_f32(vaddq_f32(vaddq_f32(lanes[0], lanes[1]), vaddq_f32(lanes[2], lanes[3])));
        for (; k < inputs; k++) sums[m] += cvxq_widen(row, dtype, k) * x[k];
    }
}

const cvxq_ops cvxq_ops_neon = {"neon", cvxq_prepare_portable, multiply_tile, multiply_dense, NULL};
#endif
