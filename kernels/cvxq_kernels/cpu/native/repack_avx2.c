/* Units from bit planes with AVX2, for tiles of four strips that are whole clusters.
 *
 * Four planes of a column are at once brought to nibbles: a byte of each plane to one 32-bit word, in
 * which the number of the plane (of the byte) and the lowest two bits of the row (of the bit) change
 * places.  The third bit of the row tells strips 2 i and 2 i + 1 apart, whose codes so become the
 * lower and the upper nibble of one byte: a unit of depth 4 as it is, and what the units of other
 * depths are joined from.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "repack.h"

#define TARGET __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 8")
#define EACH_PART UNROLL for (int part = 0; part < 2; part++)

/* 64 bytes */
typedef struct {
    __m256i part[2];
} vector;

INLINE __m256i bytes(int value) { return _mm256_set1_epi8((char)value); }
INLINE __m256i both(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
INLINE __m256i only(__m256i a, int mask) { return _mm256_and_si256(a, bytes(mask)); }
INLINE __m256i left(__m256i a, int by) { return _mm256_slli_epi16(a, by); }
INLINE __m256i right(__m256i a, int by) { return _mm256_srli_epi16(a, by); }

/* Two planes of 8 bytes, in both halves; one or none where there are no more. */
INLINE __m256i planes(int count, const uint8_t *at) {
    if (count <= 0) return _mm256_setzero_si256();
    const __m128i *from = (const __m128i *)at;
    return _mm256_broadcastsi128_si256(count == 1 ? _mm_loadl_epi64(from) : _mm_loadu_si128(from));
}

/* Exchange the bits under `mask` with those `by` places above. */
INLINE __m256i exchange(__m256i a, int by, int mask) {
    const __m256i differ = _mm256_and_si256(_mm256_xor_si256(a, _mm256_srli_epi32(a, by)),
                                            _mm256_set1_epi32(mask));
    return _mm256_xor_si256(a, _mm256_xor_si256(differ, _mm256_slli_epi32(differ, by)));
}

/* Up to four planes of a column: in byte i of the lower half codes of lane i of strips 0 and 1, in
 * the upper half those of strips 2 and 3. */
INLINE __m256i column(int count, const uint8_t *at) {
    const __m256i first = _mm256_setr_epi8(
        0, 8, -1, -1, 2, 10, -1, -1, 4, 12, -1, -1, 6, 14, -1, -1, /* 0, 2, 4, 6 */
        1, 9, -1, -1, 3, 11, -1, -1, 5, 13, -1, -1, 7, 15, -1, -1);
    const __m256i second = _mm256_setr_epi8(
        -1, -1, 0, 8, -1, -1, 2, 10, -1, -1, 4, 12, -1, -1, 6, 14, /* 0, 2, 4, 6 */
        -1, -1, 1, 9, -1, -1, 3, 11, -1, -1, 5, 13, -1, -1, 7, 15);
    const __m256i words = both(_mm256_shuffle_epi8(planes(count, at), first),
                               _mm256_shuffle_epi8(planes(count - 2, at + 16), second));
    return exchange(exchange(words, 7, 0x00aa00aa), 14, 0x0000cccc);
}

/* pairs[p]: codes of vectors 2 p and 2 p + 1 of a unit, from `count` planes of `have` columns. */
INLINE void join(int count, const uint8_t *codes, const int64_t *starts, int have,
                 vector pairs[UNIT / 2]) {
    UNROLL for (int quad = 0; quad < 2; quad++) {
        __m256i c[4];
        UNROLL for (int j = 0; j < 4; j++)
            c[j] = 4 * quad + j < have ? column(count, codes + starts[4 * quad + j])
                                       : _mm256_setzero_si256();
        const __m256i low01 = _mm256_unpacklo_epi8(c[0], c[1]);
        const __m256i high01 = _mm256_unpackhi_epi8(c[0], c[1]);
        const __m256i low23 = _mm256_unpacklo_epi8(c[2], c[3]);
        const __m256i high23 = _mm256_unpackhi_epi8(c[2], c[3]);
        const __m256i a = _mm256_unpacklo_epi16(low01, low23);
        const __m256i b = _mm256_unpackhi_epi16(low01, low23);
        const __m256i d = _mm256_unpacklo_epi16(high01, high23);
        const __m256i e = _mm256_unpackhi_epi16(high01, high23);
        pairs[2 * quad].part[0] = _mm256_permute2x128_si256(a, b, 0x20);
        pairs[2 * quad].part[1] = _mm256_permute2x128_si256(d, e, 0x20);
        pairs[2 * quad + 1].part[0] = _mm256_permute2x128_si256(a, b, 0x31);
        pairs[2 * quad + 1].part[1] = _mm256_permute2x128_si256(d, e, 0x31);
    }
}

INLINE void put(uint8_t *out, int row, int part, __m256i value) {
    _mm256_storeu_si256((__m256i *)(out + row * VECTOR + part * (VECTOR / 2)), value);
}

/* The two codes of each byte, of `width` bits, side by side. */
INLINE __m256i close_up(int width, __m256i pair) {
    const int mask = (1 << width) - 1;
    return both(only(pair, mask), only(right(pair, 4 - width), mask << width));
}

/* A unit of depth 1, 2, 3 or 4 as cvxq_pack_unit makes it. */
INLINE void put_low(int depth, const vector pairs[UNIT / 2], uint8_t *out) {
    EACH_PART {
        __m256i p[UNIT / 2];
        UNROLL for (int i = 0; i < UNIT / 2; i++) p[i] = close_up(depth, pairs[i].part[part]);
        if (depth == 1) {
            const __m256i half = both(p[0], left(p[1], 2)), other = both(p[2], left(p[3], 2));
            put(out, 0, part, both(half, left(other, 4)));
        } else if (depth == 2) {
            put(out, 0, part, both(p[0], left(p[1], 4)));
            put(out, 1, part, both(p[2], left(p[3], 4)));
        } else if (depth == 3) {
            UNROLL for (int row = 0; row < 3; row++)
                put(out, row, part, both(p[row], left(only(right(p[3], 2 * row), 3), 6)));
        } else {
            UNROLL for (int row = 0; row < 4; row++) put(out, row, part, p[row]);
        }
    }
}

/* A unit of depth 7 or 8 from the nibbles of its codes. */
INLINE void put_high(int depth, const vector low[UNIT / 2], const vector high[UNIT / 2],
                     uint8_t *out) {
    EACH_PART {
        __m256i codes[UNIT];
        UNROLL for (int i = 0; i < UNIT / 2; i++) {
            const __m256i lower = low[i].part[part], upper = high[i].part[part];
            codes[2 * i] = both(only(lower, 15), left(only(upper, 15), 4));
            codes[2 * i + 1] = both(only(right(lower, 4), 15), only(upper, 240));
        }
        UNROLL for (int row = 0; row < depth; row++)
            put(out, row, part,
                depth == 8 ? codes[row]
                           : both(codes[row], left(only(right(codes[7], row), 1), 7)));
    }
}

INLINE void repack(int depth, const uint8_t *codes, const int64_t *starts, int have,
                   uint8_t *out) {
    vector low[UNIT / 2], high[UNIT / 2];
    join(depth < 4 ? depth : 4, codes, starts, have, low);
    if (depth > 4) join(depth - 4, codes + 32, starts, have, high);
    if (depth > 6) {
        put_high(depth, low, high, out);
        return;
    }
    put_low(depth < 4 ? depth : 4, low, out);
    if (depth > 4) put_low(depth - 4, high, out + 4 * VECTOR);
}

INLINE void repack_run(int depth, const uint8_t *codes, const int64_t *starts, int64_t count,
                       uint8_t *out) {
    for (; count >= UNIT; count -= UNIT, starts += UNIT, out += VECTOR * depth)
        repack(depth, codes, starts, UNIT, out);
    if (count) repack(depth, codes, starts, (int)count, out);
}

TARGET void cvxq_repack_run_avx2(int depth, const uint8_t *codes, const int64_t *starts,
                                 int64_t count, uint8_t *out) {
    BY_DEPTH(depth, repack_run(DEPTH, codes, starts, count, out))
}
#endif
