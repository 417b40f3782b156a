/* For x86 with AVX2; chosen at run time. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MATH cvxq_decoder_math_avx2
#define ISA "avx2"
#define LANES 8
#define TILE 2
#define VECTORS 4
#include "decoder_math.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cvxq_not_on_this_machine;
#endif
