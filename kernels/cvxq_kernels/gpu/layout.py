"""Where the bits of the codes lie on the device.

A matrix is cut into *tiles* of ROWS stored rows inside one cluster; a cluster's columns, sorted by
depth, into *chunks* of 32 columns of one depth B (the last chunk of a run is padded).  A chunk of a
tile is B·ROWS words of 32 bits, word after word: lane = row, and a word holds bits of one row for
several columns.  The arrangement of the 32·B bits is chosen so that the fewest instructions give
operands for look-ups; columns 8v … 8v + 7 of a chunk are its v-th eighth:

    B = 1, 2   bit i of nibbles: word >> B·s, masked, has a column of an eighth in every nibble
    B = 3      three words of eight nibbles with 3 bits each; the fourth bits of all three words
               hold the last eighth, so that 32 codes fill 3 words exactly
    B = 4      four words of eight nibbles; a code's lowest bit is the nibble's highest, because
               look-ups treat that one apart (`tables`)
    B = 5 … 7  low nibbles as low and high halves of bytes, so that masking leaves *quads*: four
               columns, one per byte; then 2-bit and 1-bit pieces of the same quads
    B = 8      a quad per word

A nibble is a selector of `prmt` as it stands.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cvxq_format.limits import MAX_DEPTH

CHUNK = 32  # columns of a chunk
EIGHTHS, PAIRS = CHUNK // 8, CHUNK // 2  # of a chunk: eight columns, two columns
LOW_DEPTH = 4  # up to here codes fit nibbles, and `prmt` looks levels up
LOOK_AHEAD = 1024  # words that a program asks for before it needs them; `words` has as many more
# Sets of depths, bit B for depth B: those that have words, and the low ones of them.
ALL_DEPTHS, LOW_DEPTHS = (2 << MAX_DEPTH) - 2, (2 << LOW_DEPTH) - 2
TILE_ROWS = (16, 32, 64, 128)

# Fields of a row of `tiles`, and how many it has room for.
CLUSTER, WORD_BASE, CHUNK_BASE, SLOT_BASE, ORDER_BASE, MATRIX = range(6)
TILE_FIELDS = 8
# A row of `runs`: the first chunk of every depth, then the end.
RUN_FIELDS = MAX_DEPTH + 2
RUN_END = RUN_FIELDS - 1
# An entry of `chunks`: the first column's place, the depth, and the columns in the lowest bits.
START_SHIFT, DEPTH_SHIFT = 10, 6
DEPTH_MASK, WIDTH_MASK = 15, 63
SCALES = 256  # entries of a matrix in `scales`
# Words of a depth in the level tables, and where a kind of them begins in `units` (`tables`).
BYTE_WORDS, WIDE_WORDS, HALF_WORDS = 4, 8, 8
BYTE_UNITS, HALF_UNITS, WIDE_UNITS = (kind * (MAX_DEPTH + 1) for kind in range(3))


def bit_places(depth: int) -> npt.NDArray[np.int32]:
    """(32, depth) int32: bit b of column j lies at bit `place % 32` of word `place // 32`."""
    column = np.arange(CHUNK)
    eighth, i = column // 8, column % 8
    quad, byte = column // 4, column % 4
    if depth == 1:
        places = [4 * i + eighth]
    elif depth == 2:
        low = 32 * (eighth // 2) + 4 * i + 2 * (eighth % 2)
        places = [low, low + 1]
    elif depth == 3:
        places = [
            np.where(eighth < 3, 32 * eighth + 4 * i + bit, 32 * bit + 4 * i + 3)
            for bit in range(3)
        ]
    elif depth == 4:
        places = [32 * eighth + 4 * i + (bit - 1) % 4 for bit in range(4)]
    elif depth == 8:
        places = [32 * quad + 8 * byte + bit for bit in range(8)]
    else:
        low = 32 * (quad // 2) + 8 * byte + 4 * (quad % 2)
        places = [low + bit for bit in range(4)]
        if depth >= 6:
            pair = 32 * (4 + quad // 4) + 8 * byte + 2 * (quad % 4)
            places += [pair, pair + 1]
        if depth != 6:
            places.append(32 * (depth - 1) + 8 * byte + quad)
    return np.stack(places, axis=1).astype(np.int32)


def place_table() -> npt.NDArray[np.int32]:
    """(9, 32, 8) int32: `bit_places` of every depth, bits that a depth lacks at place 256."""
    table = np.full((MAX_DEPTH + 1, CHUNK, 8), 256, np.int32)
    for depth in range(1, MAX_DEPTH + 1):
        table[depth, :, :depth] = bit_places(depth)
    return table


def operand_order(depth: int) -> npt.NDArray[np.int64]:
    """(2^depth,) int64: the code that stands for each value of a nibble or byte of the layout."""
    value = np.arange(1 << depth)
    return (value & 7) * 2 + (value >> 3) if depth == 4 else value


def tile_rows(group_size: int) -> int:
    """Rows of a tile: of 16, 32, 64 and 128 the largest that pads clusters of G rows least."""
    return min(TILE_ROWS[::-1], key=lambda rows: -(-group_size // rows) * rows)
