"""Weights from the packed form: the whole matrix for a vendor's GEMM, or rows for an embedding.

Exact: w = S · (level + t), times the row's factor, in float32, each operation rounded, as FORMAT.md
has it, then rounded once to the type asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names
from cvxq_kernels.gpu.codes import chunk_codes


@triton.jit
def expand_kernel(
    words, tiles, runs, chunks, order, scale_codes, mean_codes, scales, mean_steps, levels, row_of,
    factors, slot_tiles, out, out_stride, first_slot, first_row,
    ROWS: tl.constexpr, DEPTHS: tl.constexpr, HAS_MEANS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Write a chunk of a tile to out[row_of − first_row, column], columns sorted if not NATURAL.

    Grid: slots from first_slot on. slot_tiles: (slots,) int32, the tile of every slot.
    levels: `LevelTables.exact`.
    """
    slot = first_slot + tl.program_id(0)
    tile = tl.load(slot_tiles + slot)
    info = tiles + tile * names.TILE_FIELDS
    ends = runs + tl.load(info + names.CLUSTER) * names.RUN_FIELDS
    number = slot - tl.load(info + names.SLOT_BASE)
    chunk = tl.load(info + names.CHUNK_BASE) + number
    entry = tl.load(chunks + chunk)
    lane = tl.arange(0, names.CHUNK)
    row = tl.arange(0, ROWS)
    inside = lane < (entry & names.WIDTH_MASK)
    column = (entry >> names.START_SHIFT) + lane
    if NATURAL:
        column = tl.load(order + tl.load(info + names.ORDER_BASE) + column, mask=inside, other=0)
    matrix = tl.load(info + names.MATRIX)
    code = tl.load(scale_codes + chunk * names.CHUNK + lane).to(tl.int32)
    scale = tl.load(scales + matrix * names.SCALES + code)
    value = tl.zeros([ROWS, names.CHUNK], tl.float32)
    base = tl.load(info + names.WORD_BASE).to(tl.int64) * ROWS
    for depth in tl.static_range(1, names.MAX_DEPTH + 1):
        low = tl.load(ends + depth)
        high = tl.load(ends + depth + 1)
        if (DEPTHS >> depth) & 1:  # noqa: SIM102 (this one is decided when compiling)
            if ((entry >> names.DEPTH_SHIFT) & names.DEPTH_MASK) == depth:
                start = words + base + (number - low) * (depth * ROWS) + row
                value = tl.load(levels + (1 << depth) + chunk_codes(start, ROWS, depth))
        base += (high - low).to(tl.int64) * (depth * ROWS)
    if HAS_MEANS:
        mean = tl.load(mean_codes + chunk * names.CHUNK + lane).to(tl.float32)
        value += (mean * tl.load(mean_steps + matrix))[None, :]
    target = tl.load(row_of + tile * ROWS + row)
    pointers = out + (target - first_row).to(tl.int64)[:, None] * out_stride + column[None, :]
    value = scale[None, :] * value * tl.load(factors + tile * ROWS + row)[:, None]
    tl.store(pointers, value, mask=(target >= 0)[:, None] & inside[None, :])


@triton.jit
def rows_kernel(
    words, tiles, runs, chunks, order, scale_codes, mean_codes, scales, mean_steps, levels,
    factors, places, place_of_row, ids, out, columns,
    ROWS: tl.constexpr, HAS_MEANS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write row ids[i] of W to out[i]; grid (ids, blocks of WIDTH chunks).

    place_of_row: (N,) int32, tile · ROWS + row of the tile. places: `place_table`. Bits are read
    one by one: a row is a handful of kilobytes. Ids must be in 0 … N − 1.
    """
    place = tl.load(place_of_row + tl.load(ids + tl.program_id(0)))
    info = tiles + place // ROWS * names.TILE_FIELDS
    ends = runs + tl.load(info + names.CLUSTER) * names.RUN_FIELDS
    chunk_base = tl.load(info + names.CHUNK_BASE)
    number = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = number < tl.load(ends + names.RUN_END)
    entry = tl.load(chunks + chunk_base + number, mask=here, other=0)
    depth = (entry >> names.DEPTH_SHIFT) & names.DEPTH_MASK
    # Words before a chunk: those of the shallower runs, then of its own.
    before = tl.zeros([WIDTH], tl.int32)
    for shallow in tl.static_range(1, names.MAX_DEPTH + 1):
        low = tl.load(ends + shallow)
        high = tl.load(ends + shallow + 1)
        before += shallow * tl.maximum(tl.minimum(number, high) - low, 0)
    start = words + (tl.load(info + names.WORD_BASE) + before).to(tl.int64) * ROWS + place % ROWS
    lane = tl.arange(0, names.CHUNK)[None, :]
    inside = lane < (entry & names.WIDTH_MASK)[:, None]
    code = tl.zeros([WIDTH, names.CHUNK], tl.int32)
    for bit in tl.static_range(names.MAX_DEPTH):
        wanted = inside & (bit < depth)[:, None]
        at = tl.load(places + (depth[:, None] * names.CHUNK + lane) * names.MAX_DEPTH + bit)
        word = tl.load(start[:, None] + (at >> 5) * ROWS, mask=wanted, other=0)
        code |= ((word >> (at & 31)) & 1) << bit
    # The table is in the order of operands, in which depth 4 has its lowest bit on top.
    code = tl.where(depth[:, None] == 4, (code >> 1) | ((code & 1) << 3), code)
    value = tl.load(levels + (1 << depth)[:, None] + code)
    side = (chunk_base + number)[:, None] * names.CHUNK + lane
    matrix = tl.load(info + names.MATRIX)
    if HAS_MEANS:
        mean = tl.load(mean_codes + side, mask=inside, other=0).to(tl.float32)
        value += mean * tl.load(mean_steps + matrix)
    scale = tl.load(scale_codes + side, mask=inside, other=0).to(tl.int32)
    sorted_columns = order + tl.load(info + names.ORDER_BASE)
    column = tl.load(sorted_columns + (entry >> names.START_SHIFT)[:, None] + lane, inside, 0)
    target = out + tl.program_id(0).to(tl.int64) * columns + column
    value = tl.load(scales + matrix * names.SCALES + scale) * value * tl.load(factors + place)
    tl.store(target, value, mask=inside)
