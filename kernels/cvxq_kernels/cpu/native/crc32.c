/* CRC-32 as zlib has it, at the speed of memory: files are checked whenever they are loaded.
 *
 * 64 bytes at a time are folded by carry-less multiplication: what lies d bits ahead of the end
 * counts times x^d modulo the polynomial, so four registers are multiplied by x^512 and joined with
 * the next 64 bytes (Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ
 * instruction", Intel 2009, whose constants for reflected bits these are).
 */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("pclmul,sse4.1")))
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE __m128i load(const uint8_t *at) { return _mm_loadu_si128((const __m128i *)at); }

/* `state` moved ahead by as many bits as `powers` says, joined with `next`. */
INLINE __m128i fold(__m128i state, __m128i powers, __m128i next) {
    return _mm_xor_si128(next, _mm_xor_si128(_mm_clmulepi64_si128(state, powers, 0x00),
                                             _mm_clmulepi64_si128(state, powers, 0x11)));
}

/* The inverted checksum of a multiple of 16 bytes, 64 at least. */
TARGET static uint32_t crc_of_blocks(const uint8_t *at, int64_t bytes) {
    const __m128i by_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
    const __m128i by_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    const __m128i by_64 = _mm_set_epi64x(0, 0x163cd6124);
    const __m128i barrett = _mm_set_epi64x(0x1f7011641, 0x1db710641);
    const __m128i low = _mm_set_epi32(0, -1, 0, -1);
    __m128i part[4];
    for (int i = 0; i < 4; i++) part[i] = load(at + 16 * i);
    part[0] = _mm_xor_si128(part[0], _mm_cvtsi32_si128(-1));
    for (at += 64, bytes -= 64; bytes >= 64; at += 64, bytes -= 64)
        for (int i = 0; i < 4; i++) part[i] = fold(part[i], by_512, load(at + 16 * i));
    __m128i state = part[0];
    for (int i = 1; i < 4; i++) state = fold(state, by_128, part[i]);
    for (; bytes >= 16; at += 16, bytes -= 16) state = fold(state, by_128, load(at));
    /* 128 bits to 64, to 32 and a remainder. */
    state = _mm_xor_si128(_mm_srli_si128(state, 8), _mm_clmulepi64_si128(state, by_128, 0x10));
    state = _mm_xor_si128(_mm_srli_si128(state, 4),
                          _mm_clmulepi64_si128(_mm_and_si128(state, low), by_64, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(state, low), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(state, quotient), 1);
}

int cvxq_crc32(const void *data, int64_t bytes, uint32_t *crc) {
    const uint8_t *at = data;
    const int64_t whole = bytes < 64 ? 0 : bytes / 16 * 16;
    if (!__builtin_cpu_supports("pclmul") || !__builtin_cpu_supports("sse4.1")) return 0;
    uint32_t state = whole ? crc_of_blocks(at, whole) : 0xFFFFFFFF;
    for (int64_t i = whole; i < bytes; i++) {
        state ^= at[i];
        for (int bit = 0; bit < 8; bit++) state = state >> 1 ^ (0xEDB88320 & -(state & 1));
    }
    *crc = ~state;
    return 1;
}

#else
int cvxq_crc32(const void *data, int64_t bytes, uint32_t *crc) {
    (void)data, (void)bytes, (void)crc;
    return 0;
}
#endif
