/* Bit planes of the file to one byte per code, eight rows at a time.
 *
 * SPREAD[byte] has bit i of the byte in bit 0 of its own byte i.  Shifting plane b's word left by b
 * and joining puts finished codes into the eight bytes of one word: codes are below 256, so
 * nothing carries over.
 */
#include <string.h>

#include "internal.h"

#define S1(b, i) ((uint64_t)((b) >> (i) & 1) << (8 * (i)))
#define S8(b) \
    (S1(b, 0) | S1(b, 1) | S1(b, 2) | S1(b, 3) | S1(b, 4) | S1(b, 5) | S1(b, 6) | S1(b, 7))
#define T4(b) S8(b), S8((b) + 1), S8((b) + 2), S8((b) + 3)
#define T16(b) T4(b), T4((b) + 4), T4((b) + 8), T4((b) + 12)
#define T64(b) T16(b), T16((b) + 16), T16((b) + 32), T16((b) + 48)

static const uint64_t SPREAD[256] = {T64(0), T64(64), T64(128), T64(192)};

void cvxq_spread(const uint8_t *planes, int depth, int64_t plane_bytes, int64_t first_byte,
                 int64_t bytes, uint8_t *codes) {
    for (int64_t i = 0; i < bytes; i++) {
        const uint8_t *at = planes + first_byte + i;
        uint64_t word = 0;
        for (int b = 0; b < depth; b++, at += plane_bytes) word |= SPREAD[*at] << b;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        memcpy(codes + 8 * i, &word, 8);
    }
}
