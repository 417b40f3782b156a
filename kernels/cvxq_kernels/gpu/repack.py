"""From the file's bit planes to the words of `layout`, on the device, and back.

One program makes one chunk of one tile.  Bit b of the code in column j and row r is read from its
plane and put where the layout wants it; the bits of a word are disjoint, so a sum joins them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names
from cvxq_kernels.gpu.layout import CHUNK_BASE, DEPTH_MASK, DEPTH_SHIFT, SLOT_BASE, place_table
from cvxq_kernels.gpu.part import Part
from cvxq_kernels.planes import group_starts, plane_bytes


@triton.jit
def repack_kernel(
    codes, group_starts, planes, first_rows, tiles, chunks, order, places, tile_of, words,
    columns, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the B·ROWS words of slot `program_id(0)`.

    tile_of: int32, (slots, 2) tile and number of the chunk in its cluster, then (slots,) the words
    before it, in units of ROWS.
    """
    slot = tl.program_id(0)
    tile = tl.load(tile_of + 2 * slot)
    number = tl.load(tile_of + 2 * slot + 1)
    info = tiles + tile * names.TILE_FIELDS
    cluster = tl.load(info + names.CLUSTER)
    chunk = tl.load(info + names.CHUNK_BASE) + number
    entry = tl.load(chunks + chunk)
    depth = (entry >> names.DEPTH_SHIFT) & names.DEPTH_MASK
    lane = tl.arange(0, names.CHUNK)
    valid = lane < (entry & names.WIDTH_MASK)
    sorted_columns = order + tl.load(info + names.ORDER_BASE)
    column = tl.load(sorted_columns + (entry >> names.START_SHIFT) + lane, valid, 0)
    start = tl.load(group_starts + cluster.to(tl.int64) * columns + column, valid, 0)
    plane = tl.load(planes + cluster)
    row = tl.load(first_rows + tile) + tl.arange(0, ROWS)
    wanted = valid[:, None] & (row // 8 < plane)[None, :]
    word = tl.arange(0, names.MAX_DEPTH)[:, None]
    total = tl.zeros([names.MAX_DEPTH, ROWS], tl.int32)
    for bit in range(depth):
        pointers = codes + (start + bit * plane)[:, None] + (row // 8)[None, :]
        byte = tl.load(pointers, wanted, 0).to(tl.int32)
        value = (byte >> (row % 8)[None, :]) & 1
        place = tl.load(places + (depth * names.CHUNK + lane) * names.MAX_DEPTH + bit)
        shifted = value << (place & 31)[:, None]
        mine = (place >> 5)[None, :] == word
        total += tl.sum(tl.where(mine[:, :, None], shifted[None, :, :], 0), axis=1)
    base = tl.load(tile_of + 2 * tl.num_programs(0) + slot).to(tl.int64) * ROWS
    target = words + base + word * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(target, total, mask=word < depth)


@functools.cache
def places_on(device: torch.device) -> torch.Tensor:
    """`place_table` on `device`."""
    return torch.from_numpy(place_table()).to(device)


def repack(part: Part, words: torch.Tensor) -> None:
    """Write the device words of a part to the first words · rows of `words`, int32."""
    weight, device = part.weight, part.weight.device
    slots = len(part.slot_tiles)
    if slots:
        repack_kernel[(slots,)](
            codes=weight.codes,
            group_starts=group_starts(
                weight.depths[0], weight.cluster_offset[0], weight.cluster_rows
            ),
            planes=plane_bytes(weight.cluster_rows),
            first_rows=part.first_rows,
            tiles=part.tiles,
            chunks=part.chunks,
            order=part.order,
            places=places_on(device),
            tile_of=_slot_table(part),
            words=words,
            columns=weight.shape[1],
            ROWS=part.rows,
        )


def _slot_table(part: Part) -> torch.Tensor:
    """`tile_of` of the kernel, (3 · slots,) int32."""
    tiles = part.tiles[part.slot_tiles]
    slots = torch.arange(len(tiles), dtype=torch.int32, device=tiles.device)
    number = slots - tiles[:, SLOT_BASE]
    depth = (part.chunks[tiles[:, CHUNK_BASE] + number] >> DEPTH_SHIFT) & DEPTH_MASK
    base = depth.cumsum(0, dtype=torch.int32) - depth
    return torch.cat([torch.stack([part.slot_tiles, number], 1).reshape(-1), base])
