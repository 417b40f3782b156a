/* Columns of codes to code vectors: rows become 32-bit lanes that hold four columns. */
#include "repack.h"

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t words8 __attribute__((vector_size(16)));

#define LOW8(a, b) \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH8(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW16(a, b) __builtin_shufflevector((words8)(a), (words8)(b), 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH16(a, b) __builtin_shufflevector((words8)(a), (words8)(b), 4, 12, 5, 13, 6, 14, 7, 15)

/* Four strips: sixteen rows at a time, four to each strip, as lane_row says. */
static void interleave_full(const uint8_t *columns, uint8_t codes[UNIT][VECTOR]) {
    for (int quad = 0; quad < 2; quad++)
        for (int p = 0; p < 4; p++) {
            bytes16 c[4];
            for (int j = 0; j < 4; j++)
                memcpy(&c[j], columns + (4 * quad + j) * TILE + STRIP * p, 16);
            const bytes16 low01 = LOW8(c[0], c[1]), high01 = HIGH8(c[0], c[1]);
            const bytes16 low23 = LOW8(c[2], c[3]), high23 = HIGH8(c[2], c[3]);
            const words8 strips[4] = {LOW16(low01, low23), HIGH16(low01, low23),
                                      LOW16(high01, high23), HIGH16(high01, high23)};
            for (int s = 0; s < 4; s++) memcpy(codes[4 * quad + s] + 16 * p, &strips[s], 16);
        }
}

void cvxq_interleave(const uint8_t *columns, int strips, uint8_t codes[UNIT][VECTOR]) {
    if (strips == 4) {
        interleave_full(columns, codes);
        return;
    }
    const int rows = strips * STRIP;
    for (int v = 0; v < UNIT; v++)
        for (int lane = 0; lane < STRIP; lane++)
            for (int j = 0; j < 4; j++)
                codes[v][4 * lane + j] =
                    columns[(v / strips * 4 + j) * rows + lane_row(strips, v % strips, lane)];
}
