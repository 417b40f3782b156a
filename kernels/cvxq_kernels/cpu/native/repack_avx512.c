/* Units from bit planes with AVX-512, for tiles of four strips that are whole clusters. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "repack.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

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
