/* How the codes of eight vectors share 64·B bytes, chosen so that they come apart in few steps.
 *
 * Depths 1, 2 and 4: byte j of vector i at bits i·B (mod 8) of a byte j.  Depth 3: two vectors fill
 * the low six bits of each of three byte rows; the six bits left over on top hold the other two.
 * Depths 5 and 6: nibbles, and above them a unit of depth B − 4 for the high bits.  Depth 7: seven
 * vectors in seven bits each, the eighth in the top bits.  Depth 8: bytes.
 *
 * Everything is inlined with a constant depth, once for any processor and once for AVX-512.
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

/* Call `body` with DEPTH a constant equal to `depth`. */
#define ONE_DEPTH(B, body)     \
    case B: {                  \
        enum { DEPTH = B };    \
        body;                  \
        break;                 \
    }
#define BY_DEPTH(depth, body)                                                           \
    switch (depth) {                                                                    \
        ONE_DEPTH(1, body) ONE_DEPTH(2, body) ONE_DEPTH(3, body) ONE_DEPTH(4, body)     \
        ONE_DEPTH(5, body) ONE_DEPTH(6, body) ONE_DEPTH(7, body) ONE_DEPTH(8, body)     \
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

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))

/* A plane of 64 rows is a mask register: it sets one bit of 64 codes at once. */
INLINE TARGET __m512i column_codes(const int depth, const uint8_t *planes) {
    __m512i codes = _mm512_setzero_si512();
    UNROLL for (int b = 0; b < depth; b++) {
        uint64_t rows;
        memcpy(&rows, planes + 8 * b, 8);
        codes = _mm512_or_si512(codes,
                                _mm512_maskz_mov_epi8(rows, _mm512_set1_epi8((char)(1 << b))));
    }
    return codes;
}

INLINE TARGET __m512i left(__m512i a, const int by) { return _mm512_slli_epi16(a, by); }
INLINE TARGET __m512i right(__m512i a, const int by) { return _mm512_srli_epi16(a, by); }
INLINE TARGET __m512i low_bits(__m512i a, const int count) {
    return _mm512_and_si512(a, _mm512_set1_epi8((char)((1 << count) - 1)));
}

/* pack_fields and pack, for vectors of bytes that have no bits above their fields. */
INLINE TARGET void put_fields(const int width, const __m512i codes[UNIT], uint8_t *out) {
    UNROLL for (int row = 0; row < width; row++) {
        __m512i joined = codes[row * (8 / width)];
        UNROLL for (int i = 1; i < 8 / width; i++)
            joined = _mm512_or_si512(joined, left(codes[row * (8 / width) + i], i * width));
        _mm512_storeu_si512(out + row * VECTOR, joined);
    }
}

INLINE TARGET void put_unit(const int depth, const __m512i codes[UNIT], uint8_t *out) {
    if (depth == 3) {
        const __m512i top = _mm512_or_si512(codes[6], left(codes[7], 3));
        UNROLL for (int row = 0; row < 3; row++) {
            const __m512i two = _mm512_or_si512(codes[2 * row], left(codes[2 * row + 1], 3));
            const __m512i rest = left(low_bits(right(top, 2 * row), 2), 6);
            _mm512_storeu_si512(out + row * VECTOR, _mm512_or_si512(two, rest));
        }
    } else if (depth == 7) {
        UNROLL for (int row = 0; row < 7; row++) {
            const __m512i rest = left(low_bits(right(codes[7], row), 1), 7);
            _mm512_storeu_si512(out + row * VECTOR, _mm512_or_si512(codes[row], rest));
        }
    } else if (depth == 5 || depth == 6) {
        __m512i nibbles[UNIT], above[UNIT];
        UNROLL for (int i = 0; i < UNIT; i++) {
            nibbles[i] = low_bits(codes[i], 4);
            above[i] = low_bits(right(codes[i], 4), depth - 4);
        }
        put_fields(4, nibbles, out);
        put_fields(depth - 4, above, out + 4 * VECTOR);
    } else {
        put_fields(depth, codes, out);
    }
}

/* A unit from the planes of its first `have` columns. */
INLINE TARGET void repack(const int depth, const uint8_t *codes, const int64_t *starts,
                          const int have, uint8_t *out) {
    __m512i units[UNIT];
    UNROLL for (int quad = 0; quad < 2; quad++) {
        __m512i c[4];
        UNROLL for (int j = 0; j < 4; j++)
            c[j] = 4 * quad + j < have ? column_codes(depth, codes + starts[4 * quad + j])
                                       : _mm512_setzero_si512();
        const __m512i low01 = _mm512_unpacklo_epi8(c[0], c[1]);
        const __m512i high01 = _mm512_unpackhi_epi8(c[0], c[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(c[2], c[3]);
        const __m512i high23 = _mm512_unpackhi_epi8(c[2], c[3]);
        units[4 * quad] = _mm512_unpacklo_epi16(low01, low23);
        units[4 * quad + 1] = _mm512_unpackhi_epi16(low01, low23);
        units[4 * quad + 2] = _mm512_unpacklo_epi16(high01, high23);
        units[4 * quad + 3] = _mm512_unpackhi_epi16(high01, high23);
    }
    put_unit(depth, units, out);
}

INLINE TARGET void repack_run(const int depth, const uint8_t *codes, const int64_t *starts,
                              int64_t count, uint8_t *out) {
    for (; count >= UNIT; count -= UNIT, starts += UNIT, out += VECTOR * depth)
        repack(depth, codes, starts, UNIT, out);
    if (count) repack(depth, codes, starts, (int)count, out);
}

TARGET void cvxq_repack_run_avx512(int depth, const uint8_t *codes, const int64_t *starts,
                                   int64_t count, uint8_t *out) {
    BY_DEPTH(depth, repack_run(DEPTH, codes, starts, count, out))
}
#endif
