/* For x86 with AVX-512; chosen at run time. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
#define MATH cvxq_decoder_math_avx512
#define ISA "avx512"
#define LANES 16
#define TILE 4
#define VECTORS 4
#include "decoder_math.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cvxq_not_on_this_machine;
#endif
