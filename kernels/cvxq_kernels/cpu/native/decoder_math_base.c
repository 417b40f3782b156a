/* For every machine: SSE2, NEON or whatever the compiler's default target has. */
#define MATH cvxq_decoder_math_base
#define ISA "base"
#define LANES 4
#define TILE 2
#define VECTORS 4
#include "decoder_math.inc"
