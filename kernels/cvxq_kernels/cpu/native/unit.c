/* How the codes of eight vectors share 64·B bytes, chosen so that they come apart in few steps.
 *
 * Depths 1, 2 and 4: byte j of vector i at bits i·B (mod 8) of a byte j.  Depth 3: two vectors fill
 * the low six bits of each of three byte rows; the six bits left over on top hold the other two.
 * Depths 5 and 6: nibbles, and above them a unit of depth B − 4 for the high bits.  Depth 7: seven
 * vectors in seven bits each, the eighth in the top bits.  Depth 8: bytes.
 *
 * Everything is inlined with a constant depth.
 */
#include <string.h>

#include "repack.h"

#define INLINE static inline __attribute__((always_inline))
#define EACH_BYTE for (int j = 0; j < VECTOR; j++)
#define UNROLL _Pragma("GCC unroll 8")

/* Fields of `width` (1, 2 or 4) bits: 8 / width vectors to a byte row. */
INLINE void pack_fields(const int width, const uint8_t codes[UNIT][VECTOR], const int shift,
                        uint8_t *out) {
    const int per_row = 8 / width, mask = (1 << width) - 1;
    UNROLL for (int row = 0; row < width; row++)
        EACH_BYTE {
            int byte = 0;
            UNROLL for (int i = 0; i < per_row; i++)
                byte |= (codes[row * per_row + i][j] >> shift & mask) << (i * width);
            out[row * VECTOR + j] = (uint8_t)byte;
        }
}

INLINE void unpack_fields(const int width, const uint8_t *unit, const int shift,
                          uint8_t codes[UNIT][VECTOR]) {
    const int per_row = 8 / width, mask = (1 << width) - 1;
    UNROLL for (int i = 0; i < UNIT; i++) {
        const uint8_t *row = unit + i / per_row * VECTOR;
        const int field = i % per_row * width;
        EACH_BYTE codes[i][j] = (uint8_t)(codes[i][j] | (row[j] >> field & mask) << shift);
    }
}

INLINE void pack(const int depth, const uint8_t codes[UNIT][VECTOR], uint8_t *out) {
    if (depth == 3) {
        EACH_BYTE {
            const int top = codes[6][j] | codes[7][j] << 3;
            UNROLL for (int row = 0; row < 3; row++)
                out[row * VECTOR + j] = (uint8_t)(codes[2 * row][j] | codes[2 * row + 1][j] << 3 |
                                                  (top >> (2 * row) & 3) << 6);
        }
    } else if (depth == 7) {
        UNROLL for (int row = 0; row < 7; row++)
            EACH_BYTE out[row * VECTOR + j] =
                (uint8_t)(codes[row][j] | (codes[7][j] >> row & 1) << 7);
    } else if (depth == 8) {
        memcpy(out, codes, UNIT * VECTOR);
    } else if (depth > 4) {
        pack_fields(4, codes, 0, out);
        pack_fields(depth - 4, codes, 4, out + 4 * VECTOR);
    } else {
        pack_fields(depth, codes, 0, out);
    }
}

INLINE void unpack(const int depth, const uint8_t *unit, uint8_t codes[UNIT][VECTOR]) {
    if (depth == 8) {
        memcpy(codes, unit, UNIT * VECTOR);
        return;
    }
    memset(codes, 0, UNIT * VECTOR);
    if (depth == 3) {
        UNROLL for (int row = 0; row < 3; row++)
            EACH_BYTE {
                const int byte = unit[row * VECTOR + j];
                codes[2 * row][j] = byte & 7;
                codes[2 * row + 1][j] = byte >> 3 & 7;
                const int top = (byte >> 6) << (2 * row);
                codes[6][j] = (uint8_t)(codes[6][j] | (top & 7));
                codes[7][j] = (uint8_t)(codes[7][j] | top >> 3);
            }
    } else if (depth == 7) {
        UNROLL for (int row = 0; row < 7; row++)
            EACH_BYTE {
                codes[row][j] = unit[row * VECTOR + j] & 127;
                codes[7][j] = (uint8_t)(codes[7][j] | (unit[row * VECTOR + j] >> 7) << row);
            }
    } else if (depth > 4) {
        unpack_fields(4, unit, 0, codes);
        unpack_fields(depth - 4, unit + 4 * VECTOR, 4, codes);
    } else {
        unpack_fields(depth, unit, 0, codes);
    }
}

void cvxq_pack_unit(int depth, const uint8_t codes[UNIT][VECTOR], uint8_t *out) {
    BY_DEPTH(depth, pack(DEPTH, codes, out))
}

void cvxq_unpack_unit(int depth, const uint8_t *unit, uint8_t codes[UNIT][VECTOR]) {
    BY_DEPTH(depth, unpack(DEPTH, unit, codes))
}

static int field(int width, const uint8_t *unit, int vector, int byte) {
    int per_row = 8 / width;
    int value = unit[vector / per_row * VECTOR + byte] >> (vector % per_row * width);
    return value & ((1 << width) - 1);
}

int cvxq_unit_code(int depth, const uint8_t *unit, int vector, int byte) {
    if (depth == 3) {
        if (vector < 6) return unit[vector / 2 * VECTOR + byte] >> (3 * (vector & 1)) & 7;
        int top = 0;
        for (int row = 0; row < 3; row++) top |= (unit[row * VECTOR + byte] >> 6) << (2 * row);
        return vector == 6 ? top & 7 : top >> 3;
    }
    if (depth == 7) {
        if (vector < 7) return unit[vector * VECTOR + byte] & 127;
        int code = 0;
        for (int row = 0; row < 7; row++) code |= (unit[row * VECTOR + byte] >> 7) << row;
        return code;
    }
    if (depth == 8) return unit[vector * VECTOR + byte];
    if (depth < 5) return field(depth, unit, vector, byte);
    return field(4, unit, vector, byte) | field(depth - 4, unit + 4 * VECTOR, vector, byte) << 4;
}
